"""Checks of arguments, run before dispatch: the same text on every device.

Every message reads `op: name must be <requirement>, got <what>`. TypeError for a type or dtype, ValueError for a shape,
range or device.
"""

import torch
from torch import Tensor

__all__ = ["contiguous", "device", "grid", "number", "same_device", "tensor"]


def tensor(op: str, name: str, value: Tensor, shape: str, sizes: dict[str, int], *dtypes: torch.dtype) -> None:
    """Require a tensor of one of `dtypes` and of a shape such as "B N N".

    Args:
        op: name of the op, for the message.
        name: name of the argument, for the message.
        value: the argument.
        shape: letters for the sizes, all at least 1 but the batch.
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
        sizes.setdefault(letter, size) == size and (size > 0 or letter == "B")
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
    for name, value in (("height", height), ("width", width)):
        if not isinstance(value, int):
            raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {value}")
    if height * width != tokens:
        raise ValueError(f"{op}: height * width must be N = {tokens}, got {height} * {width}")


def number(op: str, name: str, value: float) -> None:
    """Require a real number."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def device(op: str, value: torch.device | str) -> torch.device:
    """Require a device that is there."""
    try:
        found = torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{op}: device must be a torch device, got {value!r}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"{op}: device must be present, got '{found}' where torch sees no GPU; use 'cpu'")
    return found
