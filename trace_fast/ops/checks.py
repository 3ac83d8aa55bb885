"""Checks of arguments, run before dispatch: the same text on every device.

Every message reads `op: name must be <requirement>, got <what>`. TypeError for a type or dtype, ValueError for a shape,
range or device.
"""

import contextlib
import math
import os
import reprlib
import sys
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "choice",
    "contiguous",
    "device",
    "grid",
    "has_values",
    "image",
    "integer",
    "memory",
    "number",
    "pair",
    "same_device",
    "stack",
    "tensor",
    "values",
]

MOST_FLOAT = sys.float_info.max
MOST_SIDE = 2**31 - 1  # of a grid or an image

# bytes of memory of this machine, infinity where they are not known
MEMORY: float = math.inf
with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf, and names may be missing
    MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def tensor(op: str, name: str, value: Tensor, shape: str, sizes: dict[str, int], *dtypes: torch.dtype) -> None:
    """Require a tensor of one of `dtypes` and of a shape such as "B N N".

    Args:
        op: name of the op, for the message.
        name: name of the argument, for the message.
        value: the argument.
        shape: one letter per axis; every size is at least 1, except for B (batch) and M (number of masks).
        sizes: sizes of the letters that earlier arguments have fixed; those of new letters are added.
        dtypes: the dtypes accepted.
    """
    # messages are only put together where a check fails: this runs in every call of an op
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        accepted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a {accepted} tensor, got {type(value).__name__}")
        raise TypeError(f"{op}: {name} must be {accepted}, got {str(value.dtype).removeprefix('torch.')}")
    if value.layout != torch.strided:
        raise ValueError(f"{op}: {name} must be dense, got {str(value.layout).removeprefix('torch.')}")
    letters, bound = shape.split(), sizes.copy()
    fits = value.ndim == len(letters)
    for letter, size in zip(letters, value.shape, strict=False):
        fits = fits and bound.setdefault(letter, size) == size and (size > 0 or letter in "BM")
    if not fits:
        fixed = ", ".join(f"{letter} = {sizes[letter]}" for letter in dict.fromkeys(letters) if letter in sizes)
        where = f" with {fixed}" if fixed else ""
        raise ValueError(f"{op}: {name} must be ({', '.join(letters)}){where}, got {tuple(value.shape)}")
    sizes.update(bound)


def has_values(tensor: Tensor) -> bool:
    """Return whether a tensor has values, which those of the meta device and of a fake mode have not."""
    from torch._subclasses.fake_tensor import FakeTensor

    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def values(op: str, **tensors: Tensor) -> None:
    """Require that tensors, given by name, have values, on which the shape or the steps of a result depend."""
    for name, value in tensors.items():
        if not has_values(value):
            raise ValueError(f"{op}: {name} must have values, got a tensor of the meta device or of a fake mode")


def same_device(op: str, **tensors: Tensor) -> None:
    """Require that tensors, given by name, are on the device of the first."""
    (first_name, first), *others = tensors.items()
    for name, value in others:
        if value.device != first.device:
            raise ValueError(f"{op}: {name} must be on {first.device} like {first_name}, got {value.device}")


def contiguous(op: str, name: str, value: Tensor) -> None:
    """Require a contiguous tensor: it is written in place."""
    if not value.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {value.stride()} for {tuple(value.shape)}")


def grid(op: str, height: int, width: int, tokens: int) -> None:
    """Require a grid of `tokens` tokens."""
    integer(op, "height", height, 1)
    integer(op, "width", width, 1)
    if height * width != tokens:
        raise ValueError(f"{op}: height * width must be N = {tokens}, got {height} * {width}")


def image(op: str, name: str, value: Tensor) -> None:
    """Require images (..., H, W) whose pixels an int32 can number."""
    height, width = value.shape[-2:]
    if height * width >= 2**31:
        raise ValueError(f"{op}: {name} must be fewer than 2^31 pixels, got {height} * {width}")


def memory(op: str, name: str, value: Tensor, size: int) -> None:
    """Require that the `size` bytes which an op allocates for a tensor on the CPU fit; a GPU's allocator checks it."""
    if value.device.type == "cpu":
        _fit(op, name, tuple(value.shape), size)


def stack(op: str, name: str, shape: tuple[int, ...]) -> None:
    """Require masks (M, H, W) that fit into memory, before they are allocated."""
    _fit(op, name, shape, math.prod(shape))


def _fit(op: str, name: str, shape: tuple[int, ...], size: int) -> None:
    if size > MEMORY:
        needed, total = (f"{count / 2**30:.1f} GiB" for count in (size, MEMORY))
        raise ValueError(f"{op}: {name} must be small enough for {total} of memory, got {shape}, which takes {needed}")


def integer(op: str, name: str, value: int, least: int, most: int | None = None) -> None:
    """Require an integer, of Python or numpy, that is at least `least` and, if it is given, at most `most`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if most is not None and not least <= value <= most:
        raise ValueError(f"{op}: {name} must be from {least} to {most}, got {value}")
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")


def number(op: str, name: str, value: float, least: float | None = None, most: float | None = None) -> None:
    """Require a real number, of Python or numpy, within bounds if there are any."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not isinstance(value, Integral):
        value = float(value)  # bounds do not fit in numpy's shorter floats
    if most is not None and least is not None and not least <= value <= most:
        raise ValueError(f"{op}: {name} must be from {least} to {most}, got {value}")
    if least is not None and not value >= least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")
    # integers of Python have no bounds, those of floats are known
    if not -MOST_FLOAT <= value <= MOST_FLOAT:
        raise ValueError(f"{op}: {name} must be finite, got {value}")


def pair(op: str, name: str, value: tuple[int, int]) -> None:
    """Require (height, width), two integers that are at least 1."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{op}: {name} must be (height, width), got {reprlib.repr(value)}")
    for side, length in zip(("height", "width"), value, strict=True):
        integer(op, side, length, 1, MOST_SIDE)


def choice(op: str, name: str, value: Any, *accepted: Any) -> None:
    """Require one of a few values."""
    try:
        known = bool(value in accepted)
    except (TypeError, ValueError, RuntimeError):  # arrays and tensors have no single truth
        known = False
    if not known:
        raise ValueError(f"{op}: {name} must be {' or '.join(map(repr, accepted))}, got {reprlib.repr(value)}")


def device(op: str, value: torch.device | str | None) -> torch.device:
    """Return a device that is present; None is the GPU where there is one, else the CPU."""
    if value is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{op}: device must be a torch device, got {value!r}") from error
    if parsed.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"{op}: device must be present, got '{parsed}' where torch sees no GPU; use 'cpu'")
    if parsed.type not in ("cpu", "cuda"):
        try:
            torch.empty(1, device=parsed)
        except (AssertionError, NotImplementedError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise RuntimeError(f"{op}: device must be present, got '{parsed}': {reason}; use 'cpu'") from error
    return parsed
