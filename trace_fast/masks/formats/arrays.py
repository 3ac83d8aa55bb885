"""Masks without further fields: arrays, tensors, pictures, RLE, and collections of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set, ValuesView
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trace_fast.masks import rle
from trace_fast.masks.formats.base import (
    WHITE,
    MaskSet,
    Options,
    Write,
    is_instance,
    read_binary,
    write_binary,
)
from trace_fast.ops import checks

__all__ = [
    "is_collection",
    "is_picture",
    "read_collection",
    "read_entries",
    "read_mask_set",
    "read_stack",
    "write_entries",
]

BINARY_MODES = ("1", "L")  # of pictures that are single masks
COLLECTIONS = (list, tuple, Iterator, Set, ValuesView)


def is_picture(value: Any) -> bool:
    """Tell whether an object is a PIL image."""
    return is_instance(value, "PIL.Image", "Image")


def is_collection(value: Any) -> bool:
    """Tell whether an object is a list, tuple, set, generator or view of values."""
    return isinstance(value, COLLECTIONS)


def read_mask_set(mask_set: MaskSet, _: Options) -> tuple[MaskSet, Write]:
    """Check a `MaskSet`, which is returned as it is."""
    op, sizes = "open_masks", dict[str, int]()
    # an empty list of masks is read as (0, 0, 0)
    if getattr(mask_set.masks, "shape", None) != (0, 0, 0):
        checks.tensor(op, "masks", mask_set.masks, "M H W", sizes, torch.bool)
    for name, value, dtype in (("scores", mask_set.scores, torch.float32), ("classes", mask_set.classes, torch.int64)):
        if value is not None:
            checks.tensor(op, name, value, "M", sizes, dtype)
            checks.same_device(op, masks=mask_set.masks, **{name: value})
    return mask_set, lambda result, _: result


def read_stack(stack: np.ndarray | Tensor, options: Options) -> tuple[MaskSet, Write]:
    """Read an array or tensor (H, W), (M, H, W) or (B, M, H, W)."""
    masks = read_binary(stack, "masks", options.cut)
    shape = tuple(stack.shape)
    is_empty = 0 in shape[:-2]
    if len(shape) not in (2, 3, 4) or (0 in shape and not is_empty):
        raise ValueError(f"open_masks: masks must be (H, W), (M, H, W) or (B, M, H, W), got {shape}")

    def write(result: MaskSet, _: list[int]) -> Any:
        count = len(result.masks)
        written = write_binary(result.masks, stack)
        if len(shape) == 2:
            return written[0] if count == 1 else written
        if len(shape) == 3:
            return written
        if count == shape[0] * shape[1]:
            leading = shape[:2]
        else:
            leading = (1, count) if shape[0] == 1 and shape[1] != 1 else (count, 1)
        return written.reshape(*leading, *shape[2:])

    return MaskSet(masks.reshape(-1 if masks.numel() else 0, *shape[-2:]) if len(shape) != 3 else masks), write


def read_collection(masks: Iterable[Any], options: Options) -> tuple[MaskSet, Write]:
    """Read a list, tuple, set or generator of masks; a generator is written as a list."""
    entries = list(masks)
    is_stack = [isinstance(entry, (np.ndarray, Tensor)) and entry.ndim in (3, 4) for entry in entries]
    write_stack: Write
    if is_stack == [True]:
        mask_set, write_stack = read_stack(entries[0], options)

        def write(result: MaskSet, best: list[int]) -> list[Any]:
            return [write_stack(result, best)]

    else:
        mask_set = MaskSet(read_entries(entries, options))

        def write(result: MaskSet, best: list[int]) -> list[Any]:
            return write_entries(result.masks, [entries[index] for index in best])

    container = type(masks) if isinstance(masks, (tuple, set, frozenset)) else list
    return mask_set, lambda result, best: container(write(result, best))


def read_entries(entries: Sequence[Any], options: Options, allow_polygons: bool = False) -> Tensor:
    """Read arrays, tensors, pictures, RLE and perhaps polygons as one stack (M, H, W) bool."""
    masks: list[Tensor] = []
    size = options.size
    if size is not None:
        checks.stack("open_masks", "masks", (len(entries), *size))
    for index, entry in enumerate(entries):
        name = f"masks[{index}]"
        mask = _read_entry(entry, name, size, options.cut, allow_polygons)
        if size is None:
            size = mask.shape[0], mask.shape[1]
            checks.stack("open_masks", "masks", (len(entries), *size))
        if mask.shape != size:
            raise ValueError(f"open_masks: {name} must be of size {size}, got {tuple(mask.shape)}")
        if masks and mask.device != masks[0].device:
            raise ValueError(f"open_masks: {name} must be on {masks[0].device} like masks[0], got {mask.device}")
        masks.append(mask)
    return torch.stack(masks) if masks else torch.zeros(0, *(size or (0, 0)), dtype=torch.bool, device="cpu")


def write_entries(masks: Sequence[Tensor] | Tensor, likes: Sequence[Any]) -> list[Any]:
    """Write masks (H, W) bool, each in the form of an entry that was read."""
    is_encoded = [not (isinstance(like, (np.ndarray, Tensor)) or is_picture(like)) for like in likes]
    others = [index for index, encoded in enumerate(is_encoded) if encoded]
    encoded = iter(
        rle.encode_rles("open_masks", np.stack([masks[index].cpu().numpy() for index in others])) if others else ()
    )
    written: list[Any] = []
    for mask, like in zip(masks, likes, strict=True):
        if isinstance(like, (np.ndarray, Tensor)):
            # a copy, so that a caller who keeps one mask does not keep all of them
            written.append(write_binary(mask.clone(), like))
        elif is_picture(like):
            pixels = mask.cpu().numpy()
            if like.mode == "L":
                pixels = pixels * np.uint8(1 if like.getextrema()[1] == 1 else WHITE)
            written.append(write_picture(pixels, like))
        else:
            written.append(_write_rle(next(encoded), mask, like))
    return written


def write_picture(pixels: np.ndarray, like: Any) -> Any:
    """Make a PIL image of an array (H, W), of the mode and the palette of another."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    if like.mode == "P":
        picture.putpalette(like.getpalette(), "RGB")
    picture.info.update(like.info)
    return picture


def _read_entry(entry: Any, name: str, size: tuple[int, int] | None, cut: float | None, allow_polygons: bool) -> Tensor:
    """Read one array, tensor, picture, RLE or perhaps list of polygons as a mask (H, W) bool."""
    if is_picture(entry):
        if entry.mode not in BINARY_MODES:
            raise ValueError(f"open_masks: {name} must be a picture of mode 1 or L, got {entry.mode}")
        entry = np.asarray(entry)
    if isinstance(entry, (np.ndarray, Tensor)):
        mask = read_binary(entry, name, cut)
        if mask.ndim != 2 or 0 in mask.shape:
            raise ValueError(f"open_masks: {name} must be (H, W), got {tuple(mask.shape)}")
        return mask
    if isinstance(entry, Mapping) or (allow_polygons and isinstance(entry, list)):
        return _read_segmentation(entry, name, size)
    raise TypeError(f"open_masks: {name} must be an array, a tensor or RLE, got {type(entry).__name__}")


def _read_segmentation(segmentation: Any, name: str, size: tuple[int, int] | None) -> Tensor:
    """Read RLE or polygons as a mask (H, W) bool."""
    api = rle.import_mask_api("open_masks")
    if size is None and not isinstance(segmentation, Mapping):
        raise ValueError("open_masks: size must be given with polygons, got None")
    try:
        height, width = size or rle.read_rle_size(segmentation)
        counts = rle.encode_segmentation(api, segmentation, height, width, Counter())
    except ValueError as problem:
        raise ValueError(f"open_masks: {name}: {problem}") from problem
    return torch.from_numpy(rle.decode_mask(counts, height, width))


def _write_rle(counts: Any, mask: Tensor, like: Any) -> dict[str, Any]:
    """Write an RLE in the form of another; of polygons, as a string."""
    form = like if isinstance(like, Mapping) else {"size": list(mask.shape), "counts": ""}
    if isinstance(form["counts"], str):
        counts = counts.decode("ascii")
    elif isinstance(form["counts"], list):
        counts = rle.decode_run_lengths(counts).tolist()
    return {**form, "counts": counts}
