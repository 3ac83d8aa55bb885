"""Checks of arguments, run before dispatch: the same text on every device.

Every message reads `op: name must be <requirement>, got <what>`. TypeError for a type or dtype, ValueError for a shape,
range or device.
"""

import os
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

__all__ = ["contiguous", "device", "grid", "image", "integer", "memory", "number", "one_of", "same_device", "tensor"]

# bytes that this machine has
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def tensor(op: str, name: str, value: Tensor, shape: str, sizes: dict[str, int], *dtypes: torch.dtype) -> None:
    """Require a tensor of one of `dtypes` and of a shape such as "B N N".

    Args:
        op: name of the op, for the message.
        name: name of the argument, for the message.
        value: the argument.
        shape: letters for the sizes, all at least 1 but the batch and the number of masks.
        sizes: what the letters stand for; letters seen for the first time are added.
        dtypes: the dtypes accepted.
    """
    accepted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a {accepted} tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be {accepted}, got {str(value.dtype).removeprefix('torch.')}")
    letters = shape.split()
    known = {letter: sizes[letter] for letter in letters if letter in sizes}
    fits = value.ndim == len(letters) and all(
        sizes.setdefault(letter, size) == size and (size > 0 or letter in "BM")
        for letter, size in zip(letters, value.shape, strict=True)
    )
    if not fits:
        where = "".join(f"{', ' if i else ' with '}{letter} = {known[letter]}" for i, letter in enumerate(known))
        raise ValueError(f"{op}: {name} must be ({', '.join(letters)}){where}, got {tuple(value.shape)}")


def same_device(op: str, **tensors: Tensor) -> None:
    """Require tensors, given by name, on the device of the first."""
    (first, reference), *others = tensors.items()
    for name, value in others:
        if value.device != reference.device:
            raise ValueError(f"{op}: {name} must be on {reference.device} like {first}, got {value.device}")


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
    """Require that the `size` bytes which an op takes for a tensor on the CPU fit there; a GPU's allocator says so."""
    if value.device.type == "cpu" and size > MEMORY:
        need, have = (f"{x / 2**30:.1f} GiB" for x in (size, MEMORY))
        raise ValueError(f"{op}: {name} must leave room in {have} of memory, got {tuple(value.shape)}: {need} more")


def integer(op: str, name: str, value: int, least: int) -> None:
    """Require an integer, of Python or numpy, that is large enough."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")


def number(op: str, name: str, value: float, least: float | None = None, most: float | None = None) -> None:
    """Require a real number, of Python or numpy, within bounds if there are any."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if most is not None and least is not None and not least <= value <= most:
        raise ValueError(f"{op}: {name} must be from {least} to {most}, got {value}")
    if least is not None and not value >= least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")


def one_of(op: str, name: str, value: Any, *accepted: Any) -> None:
    """Require one of a few values."""
    if value not in accepted:
        raise ValueError(f"{op}: {name} must be {' or '.join(map(str, accepted))}, got {value}")


def device(op: str, value: torch.device | str | None) -> torch.device:
    """Return a device that is present; None is the GPU where there is one, else the CPU."""
    if value is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{op}: device must be a torch device, got {value!r}") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"{op}: device must be present, got '{place}' where torch sees no GPU; use 'cpu'")
    return place
