"""The base of all formats: `MaskSet`, the options of reading, and checks of masks, scores and classes."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trace_fast.io.arrays import array_to_tensor, check_values, dtype_name
from trace_fast.ops import checks

__all__ = [
    "INTEGER_DTYPES",
    "WHITE",
    "MaskFormat",
    "MaskSet",
    "Options",
    "Write",
    "convert_labels",
    "convert_like",
    "convert_scores",
    "find_changed",
    "is_instance",
    "read_binary",
    "read_classes",
    "to_xywh",
    "update_scores",
    "write_binary",
]

INTEGER_DTYPES = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "int64")
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
WHITE = 255  # of masks that are pictures


@dataclass(frozen=True, eq=False)
class MaskSet:
    """Masks of one image, M of them; they may overlap.

    Attributes:
        masks: (M, H, W) bool.
        scores: (M,) float32, higher is more certain; or None.
        classes: (M,) int64; or None.
    """

    masks: Tensor
    scores: Tensor | None = None
    classes: Tensor | None = None


@dataclass(frozen=True)
class Options:
    """Options of reading; see `open_masks`.

    Attributes:
        size: (height, width) that the masks must have, or None.
        ignore: labels of maps that are void, or None for those that dtypes have by custom.
        label_divisor: of labels that are class * label_divisor + instance, or None.
        cut: value above which a pixel of a soft mask is inside, or None if there are no soft masks.
    """

    size: tuple[int, int] | None = None
    ignore: tuple[int, ...] | None = None
    label_divisor: int | None = None
    cut: float | None = None


Write = Callable[[MaskSet, list[int]], Any]


@dataclass(frozen=True)
class MaskFormat:
    """A format of masks.

    Attributes:
        name: the format as the error message of `open_masks` names it.
        accepts: tells whether an object has the format.
        read: reads an object; returns the masks and `write(result, best)`, which writes the result in the format and
            copies further fields from the masks with the indices `best`, one for each mask of the result.
    """

    name: str
    accepts: Callable[[Any], bool]
    read: Callable[[Any, Options], tuple[MaskSet, Write]]


def is_instance(value: Any, module: str, name: str) -> bool:
    """Tell whether an object is of a class of another package, which is not imported for it."""
    return any(base.__name__ == name and f"{base.__module__}.".startswith(f"{module}.") for base in type(value).__mro__)


def read_binary(values: np.ndarray | Tensor, name: str, cut: float | None = None) -> Tensor:
    """Read masks of any dtype as a bool tensor in separate memory, on the device of the values.

    Args:
        values: bool; integers 0 and 1, or 0 and 255 of uint8; floats 0 and 1 or, with a cut, any that are not NaN.
        name: of the masks, for the message.
        cut: value above which a float is inside.
    """
    dtype = dtype_name(values)
    if dtype not in ("bool", *INTEGER_DTYPES, *FLOAT_DTYPES):
        raise TypeError(f"open_masks: {name} must be bool, or integers or floats that are 0 or 1, got {values.dtype}")
    if isinstance(values, Tensor):
        check_values(f"open_masks: {name}", values)
    checks.stack("open_masks", name, tuple(values.shape))
    inside: Any
    if dtype == "bool":
        # not a copy: bytes of 0 and 255 that are viewed as bool must become 0 and 1
        inside = values.clone() if isinstance(values, Tensor) else np.not_equal(values, False)
    else:
        is_soft = cut is not None and dtype in FLOAT_DTYPES
        inside = values > (cut or 0.0) if is_soft else values == highest(values)
        # of soft masks, NaN differs from itself
        is_bad: Any = values != values if is_soft else ~(inside | (values == 0))
        if is_bad.any():
            hint = "" if is_soft or dtype not in FLOAT_DTYPES else "; soft masks need a cut"
            required = "numbers" if is_soft else "0 or 1"
            raise ValueError(f"open_masks: {name} must be {required}, got {values[is_bad][0].item()}{hint}")
    return inside if isinstance(inside, Tensor) else array_to_tensor(inside)


def highest(values: np.ndarray | Tensor) -> int:
    """Return the value of pixels inside masks that are read as they are: 255 for pictures, else 1."""
    is_picture = dtype_name(values) == "uint8" and 0 not in values.shape and int(values.max()) == WHITE
    return WHITE if is_picture else 1


def convert_like(values: Tensor, like: np.ndarray | Tensor) -> Any:
    """Convert values to the type, dtype and device of another array or tensor, without a copy if they have them."""
    return values.to(like) if isinstance(like, Tensor) else values.cpu().numpy().astype(like.dtype, copy=False)


def write_binary(masks: Tensor, like: np.ndarray | Tensor) -> Any:
    """Write masks as `read_binary` reads them, like those that were read; soft masks become 0 and 1."""
    return convert_like(masks.byte() * WHITE if highest(like) == WHITE else masks, like)


def to_xywh(boxes: Tensor) -> Tensor:
    """Convert boxes (M, 4) of x0, y0, x1, y1 to x0, y0, width, height."""
    return torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), 1)


def convert_labels(op: str, name: str, labels: np.ndarray | Tensor) -> Tensor:
    """Check an integer map (H, W), array or tensor, and convert it to an int64 tensor on its device."""
    got = dtype_name(labels) if isinstance(labels, (np.ndarray, Tensor)) else type(labels).__name__
    if got not in INTEGER_DTYPES:
        raise TypeError(f"{op}: {name} must be an integer array or tensor, got {got}")
    if labels.ndim != 2 or 0 in labels.shape:
        raise ValueError(f"{op}: {name} must be (H, W), got {tuple(labels.shape)}")
    if isinstance(labels, Tensor):
        check_values(f"{op}: {name}", labels)
    return labels.long() if isinstance(labels, Tensor) else torch.from_numpy(labels.astype(np.int64, order="C"))


def convert_scores(op: str, name: str, scores: Any, count: int) -> Tensor:
    """Check scores of any type, and convert them to float64 (M,), on the device of a tensor."""
    if isinstance(scores, Tensor):
        values = scores.detach().double()
    else:
        try:
            values = torch.from_numpy(np.array(scores, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise TypeError(f"{op}: {name} must be numbers, got {reprlib.repr(scores)}") from error
    if values.shape != (count,):
        raise ValueError(f"{op}: {name} must be ({count},), one for each mask, got {tuple(values.shape)}")
    is_bad = ~values.float().isfinite()
    if is_bad.any():
        raise ValueError(f"{op}: {name} must be finite in float32, got {values[is_bad][0].item()}")
    return values


def read_classes(op: str, name: str, classes: Any, count: int) -> Tensor:
    """Read the classes of masks, int64, on the device of a tensor; names are numbered.

    Numbers that are no integers would become others, and are refused.
    """
    if not isinstance(classes, (np.ndarray, Tensor)):
        try:
            names = list(classes)
            is_named = all(isinstance(one, str) for one in names)
            classes = np.array([names.index(one) for one in names] if is_named else names)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{op}: {name} must be integers, got {reprlib.repr(classes)}") from error
        classes = classes if len(names) else classes.astype(np.int64)
    if isinstance(classes, Tensor):
        check_values(f"{op}: {name}", classes)
    if dtype_name(classes) not in INTEGER_DTYPES:
        raise TypeError(f"{op}: {name} must be integers, got {dtype_name(classes)}")
    if tuple(classes.shape) != (count,):
        raise ValueError(f"{op}: {name} must be ({count},), one for each mask, got {tuple(classes.shape)}")
    return classes.long() if isinstance(classes, Tensor) else torch.from_numpy(classes.astype(np.int64))


def find_changed(mask_set: MaskSet, result: MaskSet, best: list[int]) -> list[bool]:
    """Tell of each mask of a result whether it differs from the mask that it comes from."""
    # one by one: a stack of the sources would take as much memory as all masks
    return [
        not torch.equal(mask, mask_set.masks[index].to(mask.device))
        for mask, index in zip(result.masks, best, strict=True)
    ]


def update_scores(exact: Tensor, mask_set: MaskSet, result: MaskSet, best: list[int]) -> Tensor:
    """Return the scores of a result, (K,) float64; unchanged scores keep the precision that they came in."""
    chosen = torch.tensor(best, dtype=torch.int64, device=exact.device)
    if result.scores is None or mask_set.scores is None:
        return exact[chosen]
    scores = result.scores.to(exact.device)
    return torch.where(scores == mask_set.scores[chosen].to(scores.device), exact[chosen], scores.double())
