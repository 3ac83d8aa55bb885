"""Masks as maps of integers: label maps, panoptic segmentations, semantic maps."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trace_fast.io.arrays import dtype_name, mask_areas, mask_boxes
from trace_fast.masks import rle
from trace_fast.masks.formats.arrays import write_picture
from trace_fast.masks.formats.base import (
    INTEGER_DTYPES,
    MaskSet,
    Options,
    Write,
    convert_labels,
    convert_like,
    convert_scores,
    to_xywh,
    update_scores,
)
from trace_fast.ops import checks

__all__ = [
    "find_void",
    "is_label_map",
    "is_panoptic",
    "keep_visible",
    "paint_labels",
    "read_label_map",
    "read_label_picture",
    "read_panoptic",
    "semantic_masks",
]

# void by custom, of maps that have other labels, too
VOID = {"uint8": 255, "uint16": 65535, "int8": -1, "int16": -1, "int32": -1, "int64": -1}


def semantic_masks(class_map: np.ndarray | Tensor, tags: Iterable[int], void: int = 255) -> MaskSet:
    """Read the masks of tagged classes from a semantic map such as DHR's.

    For a palette PNG, `np.asarray(Image.open(path))` is the map. It is left to the caller which classes are things,
    whose masks are to be split, and which are stuff.

    Args:
        class_map: (H, W) integers, array or tensor.
        tags: classes of the image, without the background; other classes of the map are left out.
        void: value of pixels without a class.

    Returns:
        The masks of the tags that are in the map and their classes, in the order of the tags, on the map's device.

    Raises:
        TypeError: class_map is not an integer array or tensor, or a tag is no integer.
        ValueError: class_map is not (H, W), or void is one of the tags.

    Example:
        >>> mask_set = semantic_masks(np.array([[0, 15, 15], [12, 255, 15]]), tags=[15, 3])
        >>> mask_set.masks.sum((1, 2)), mask_set.classes
        (tensor([3]), tensor([15]))
    """
    op = "semantic_masks"
    labels = convert_labels(op, "class_map", class_map)
    distinct = list(dict.fromkeys(require_integer(f"{op}: tags", tag) for tag in tags))
    if void in distinct:
        raise ValueError(f"{op}: tags must be classes, got {void}, which is void")
    classes = torch.tensor(distinct, dtype=torch.int64, device=labels.device)
    masks = labels == classes[:, None, None]
    is_present = masks.any(2).any(1)
    return MaskSet(masks[is_present], classes=classes[is_present])


def paint_labels(masks: Tensor, labels: Sequence[int] | None = None) -> Tensor:
    """Paint masks into one label map; smaller masks lie on top, and the later one of masks of equal area.

    Args:
        masks: (M, H, W) bool.
        labels: the label of each mask, M integers; None numbers them from 1.

    Returns:
        (H, W) int64, 0 outside all masks, on the device of the masks.

    Raises:
        TypeError: masks are not a bool tensor.
        ValueError: masks are not (M, H, W), or labels are not one for each.

    Example:
        >>> paint_labels(torch.tensor([[[True, False, False]], [[True, True, False]]]), [7, 9])
        tensor([[7, 9, 0]])
    """
    _check_stack("paint_labels", masks)
    labels = range(1, len(masks) + 1) if labels is None else labels
    if len(labels) != len(masks):
        raise ValueError(f"paint_labels: labels must be {len(masks)}, one for each mask, got {len(labels)}")
    label_map = masks.new_zeros(masks.shape[1:], dtype=torch.int64)
    for index in mask_areas(masks).argsort(descending=True, stable=True).tolist():
        label_map.masked_fill_(masks[index], labels[index])
    return label_map


def keep_visible(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Remove overlaps: a pixel of several masks stays in the smallest, the later one of masks of equal area.

    Args:
        masks: (M, H, W) bool.

    Returns:
        The masks that have pixels left (K, H, W) bool, in their order, and their indices (K,) int64, both on the device
        of the masks.

    Raises:
        TypeError: masks are not a bool tensor.
        ValueError: masks are not (M, H, W).

    Example:
        >>> keep_visible(torch.tensor([[[True, True, False]], [[True, False, False]]]))[0].tolist()
        [[[False, True, False]], [[True, False, False]]]
    """
    _check_stack("keep_visible", masks)
    painted = paint_labels(masks)
    numbers = painted.unique()
    numbers = numbers[numbers > 0]
    return painted == numbers[:, None, None], numbers - 1


def _check_stack(op: str, masks: Any) -> None:
    """Require masks (M, H, W) bool; there may be none, of any size."""
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        got = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise TypeError(f"{op}: masks must be a bool tensor, got {got}")
    if masks.ndim != 3:
        raise ValueError(f"{op}: masks must be (M, H, W), got {tuple(masks.shape)}")


def is_label_map(masks: Any) -> bool:
    """Tell whether an object is an integer array or tensor (H, W)."""
    return isinstance(masks, (np.ndarray, Tensor)) and masks.ndim == 2 and dtype_name(masks) in INTEGER_DTYPES


def is_panoptic(masks: Any) -> bool:
    """Tell whether an object is a pair of a map (H, W) and a list of segments."""
    return (
        isinstance(masks, (tuple, list))
        and len(masks) == 2
        and is_label_map(masks[0])
        and isinstance(masks[1], (tuple, list))
        and all(isinstance(segment, Mapping) for segment in masks[1])
    )


def read_label_picture(picture: Any, options: Options) -> tuple[MaskSet, Write]:
    """Read a PIL image, a label map or, of mode 1, a single mask."""
    if picture.mode not in ("1", "L", "P", "I", "I;16"):
        raise ValueError(f"open_masks: masks must be a picture of mode 1, L, P, I or I;16, got {picture.mode}")
    pixels = np.asarray(picture)
    mask_set, write = read_label_map(pixels.astype(np.uint8) if picture.mode == "1" else pixels, options)

    def write_like_picture(result: MaskSet, best: list[int]) -> Any:
        if picture.mode == "1" and len(result.masks) > 1:
            return [write_picture(mask.cpu().numpy(), picture) for mask in result.masks]
        return write_picture(write(result, best).astype(pixels.dtype), picture)

    return mask_set, write_like_picture


def read_label_map(label_map: np.ndarray | Tensor, options: Options) -> tuple[MaskSet, Write]:
    """Read a label map (H, W); pixels of void are in no mask, and are written as they were."""
    labels = convert_labels("open_masks", "masks", label_map)
    custom, void = VOID.get(dtype_name(label_map)), find_void(label_map, options.ignore)
    known = [label for label in labels.unique().tolist() if label not in void and label != 0]
    if known and known[0] < 0:
        raise ValueError(f"open_masks: masks must be labels of at least 0, or listed in ignore, got {known[0]}")
    checks.memory("open_masks", "masks", labels, len(known) * labels.numel())
    is_void = torch.isin(labels, torch.tensor(sorted(void), dtype=torch.int64, device=labels.device))
    classes = None if options.label_divisor is None else [_find_class(label, options.label_divisor) for label in known]
    info = torch.iinfo(label_map.dtype) if isinstance(label_map, Tensor) else np.iinfo(label_map.dtype)

    def write(result: MaskSet, best: list[int]) -> Any:
        taken = {*known, *void, *([] if custom is None or options.ignore is not None else [custom])}
        if known == [custom] and len(best) > 1:
            # the picture of a mask becomes a map of several
            numbers = list(range(1, len(best) + 1))
        else:
            numbers = _number_parts([known[index] for index in best], taken, options.label_divisor)
        if max(numbers, default=0) > info.max:
            raise ValueError(f"restore: result must be few enough masks for labels up to {info.max}, got {len(best)}")
        painted = paint_labels(result.masks, numbers)
        return convert_like(torch.where(is_void, labels, painted), label_map)

    masks = labels == torch.tensor(known, dtype=torch.int64, device=labels.device)[:, None, None]
    return MaskSet(masks, classes=None if classes is None else _as_tensor(classes, labels)), write


def find_void(label_map: np.ndarray | Tensor, ignore: Collection[int] | None) -> set[int]:
    """Return the labels of a map that are void: those given or, where None, what the dtype has by custom."""
    if ignore is not None:
        return set(ignore)
    custom = VOID.get(dtype_name(label_map))
    labels = np.unique(label_map.cpu().numpy() if isinstance(label_map, Tensor) else label_map)
    # a map whose only label is 255 is the picture of a mask
    return {custom} if custom is not None and (custom < 0 or np.count_nonzero(labels > 0) > 1) else set()


def read_panoptic(pair: Sequence[Any], options: Options) -> tuple[MaskSet, Write]:
    """Read a pair of a map (H, W) and its segments, as detectron2's and transformers' panoptic models return it."""
    segment_map, segments = pair
    labels = convert_labels("open_masks", "masks", segment_map)
    ids = [require_integer("open_masks: id of a segment", segment.get("id")) for segment in segments]
    if len(set(ids)) < len(ids):
        raise ValueError(f"open_masks: ids of segments must differ, got {ids}")
    checks.memory("open_masks", "masks", labels, len(ids) * labels.numel())
    masks = labels == _as_tensor(ids, labels)[:, None, None]
    class_key = next((key for key in ("category_id", "label_id") if segments and key in segments[0]), None)
    classes = scores = None
    if class_key is not None:
        classes = [require_integer(f"open_masks: {class_key}", segment.get(class_key)) for segment in segments]
    if segments and all(segment.get("score") is not None for segment in segments):
        scores = convert_scores("open_masks", "score", [segment["score"] for segment in segments], len(segments))
    mask_set = MaskSet(
        masks,
        None if scores is None else scores.float().to(labels.device),
        None if classes is None else _as_tensor(classes, labels),
    )
    # pixels of no segment, which are void
    background = -1 if 0 in ids else 0
    is_void = ~masks.any(0) & (labels != background)

    def write(result: MaskSet, best: list[int]) -> Any:
        # stuff is one segment however many parts it has
        sources = [ids[index] for index in best]
        is_stuff = [segments[index].get("isthing", True) in (False, 0) for index in best]
        numbers = _number_parts(sources, {*ids, 0}, None, is_stuff)
        painted = paint_labels(result.masks).to(labels.device)
        written_map = torch.where(is_void, labels, _as_tensor([background, *numbers], labels)[painted])
        values = None if scores is None else update_scores(scores, mask_set, result, best).tolist()
        written: dict[int, dict[str, Any]] = {}
        for k, (number, index) in enumerate(zip(numbers, best, strict=True)):
            if number not in written and (written_map == number).any():
                fields = {"id": number} if values is None else {"id": number, "score": values[k]}
                written[number] = {**segments[index], **_measure(written_map == number, segments[index]), **fields}
        infos = tuple(written.values()) if isinstance(segments, tuple) else list(written.values())
        converted = convert_like(written_map, segment_map)
        return (converted, infos) if isinstance(pair, tuple) else [converted, infos]

    return mask_set, write


def require_integer(subject: str, value: Any) -> int:
    """Return an integer of any type; a float would silently lose its fraction."""
    try:
        integer = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{subject} must be integers, got {value!r}") from error
    if not rle.LEAST <= integer <= rle.MOST:
        raise ValueError(f"{subject} must be integers of 64 bits, got {integer}")
    return integer


def _find_class(label: int, divisor: int) -> int:
    """Return the class of a label that is class * divisor + instance; smaller labels are classes without instances."""
    return label // divisor if label >= divisor else label


def _number_parts(
    labels: Sequence[int], taken: Collection[int], divisor: int | None, is_united: Sequence[bool] = ()
) -> list[int]:
    """Return a label for each part: the first of a label keeps it, and others have the lowest that are free.

    Args:
        labels: of the mask that each part comes from.
        taken: labels that no part may have but the first of each.
        divisor: further labels have the class of the first, if it is given.
        is_united: whether all parts of a label keep it.
    """
    used: set[int] = set()
    free: dict[int | None, Iterator[int]] = {}
    numbers = []
    for label, united in itertools.zip_longest(labels, is_united, fillvalue=False):
        if label not in used or united:
            used.add(label)
            numbers.append(label)
            continue
        group = None if divisor is None else _find_class(label, divisor)
        if group not in free:
            first = 1 if group is None or divisor is None else group * divisor + 1
            free[group] = itertools.filterfalse(set(taken).__contains__, itertools.count(first))
        number = next(free[group])
        if divisor is not None and _find_class(number, divisor) != group:
            raise ValueError(
                f"restore: result must have fewer than {divisor} masks of a class, got more of class {group}"
            )
        numbers.append(number)
    return numbers


def _measure(mask: Tensor, segment: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the area and the bounding box of a segment again, as far as it has them."""
    measured: dict[str, Any] = {}
    if "area" in segment:
        measured["area"] = int(mask_areas(mask[None]))
    if "bbox" in segment:
        measured["bbox"] = to_xywh(mask_boxes(mask[None]))[0].tolist()
    return measured


def _as_tensor(values: Sequence[int], like: Tensor) -> Tensor:
    """Return integers as an int64 tensor on the device of another."""
    return torch.tensor(values, dtype=torch.int64, device=like.device)
