"""Formats of masks: read every accepted collection as a `MaskSet`, and write results in the format that came in.

Scores, classes, boxes and other fields of a collection are kept: masks and scores are written as the result has them,
areas and boxes are measured again, and all other fields are copied. `FORMATS` at the end lists the formats.
"""

from __future__ import annotations

import itertools
import operator
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trace_fast.io.arrays import check_values, dtype_name, mask_areas, mask_boxes
from trace_fast.masks import rle
from trace_fast.ops import checks

__all__ = ["MaskSet", "open_masks", "paint_labels", "semantic_masks"]

Size = tuple[int, int] | None
Restore = Callable[["MaskSet", Sequence[Sequence[int]]], Any]
Write = Callable[["MaskSet", list[int]], Any]

INTEGER_DTYPES = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "int64")
BINARY_DTYPES = ("bool", *INTEGER_DTYPES, "float16", "bfloat16", "float32", "float64")


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
class MaskFormat:
    """A format of masks.

    Attributes:
        name: the format as the error message of `open_masks` names it.
        accepts: tells whether an object has the format.
        read: reads an object, given the size of its masks where it is known; returns the masks and `write(result,
            best)`, which writes the result in the format and copies further fields from the masks with the indices
            `best`, one for each mask of the result.
    """

    name: str
    accepts: Callable[[Any], bool]
    read: Callable[[Any, Size], tuple[MaskSet, Write]]


def open_masks(masks: Any, size: Size = None) -> tuple[MaskSet, Restore]:
    """Read masks of any accepted format, and return a function that writes results in the same format.

    Args:
        masks: the masks of one image, perhaps none:
            - array or tensor (M, H, W), bool, or integers or floats that are 0 or 1;
            - list or tuple of arrays or tensors (H, W) of such values, as MaskCut and ProMerge have them;
            - label map, array or tensor (H, W) of integers up to 64 bits with sign, where 0 is no mask. Results keep
              the labels: the first part of a mask has its label, and further parts have the lowest free labels. Where
              masks overlap, smaller ones lie on top;
            - list of COCO's RLE, {"size", "counts"}, where counts are a list, str or bytes;
            - list of records with a "segmentation" of either form: SAM's, whose score is predicted_iou and whose bbox
              ends at the last pixel; or COCO's annotations and results, also CutLER's, with a score, a category_id and
              a bbox that ends behind the last pixel. Both boxes are XYWH. Polygons are written as compressed RLE. The
              parts of one annotation share its id;
            - `supervision.Detections`, dense or compact, whose xyxy ends at the last pixel;
            - detectron2's `Instances` with pred_masks, and perhaps scores, pred_classes and pred_boxes; written from
              detectron2's documentation and tested with a stand-in of it;
            - `MaskSet`.
        size: (height, width) that the masks must have. Polygons need it. For an empty list or `Detections` without
            masks it is the size of the empty stack, otherwise (0, 0).

    Returns:
        The masks, on the device that they were on and, except for a `MaskSet`, in memory of their own; and
        `restore(result, groups)`, which writes another `MaskSet` in the format of `masks`. groups[k] are the indices of
        the masks that mask k of the result comes from; its further fields are copied from the one with the highest
        score, the first if several have it or there are no scores. `restore` raises ValueError if the groups do not
        fit, or if the dtype of a label map is too small for the masks. An array or tensor may share the memory of the
        result if it has the same dtype.

    Raises:
        TypeError: masks have a format or dtype that is not listed.
        ValueError: shapes, sizes or devices differ, a mask is not binary, RLE or polygons are malformed, a score is
            missing or not finite, or labels are negative.
        RuntimeError: masks are RLE or polygons, and pycocotools is not installed.

    Example:
        >>> mask_set, restore = open_masks(np.array([[0, 7, 7], [4, 0, 7]], dtype=np.uint8))
        >>> mask_set.masks.sum((1, 2))
        tensor([1, 3])
        >>> restore(mask_set, [[0], [1]])
        array([[0, 7, 7],
               [4, 0, 7]], dtype=uint8)
    """
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"open_masks: size must be (height, width), both at least 1, got {tuple(size)}")
    if size is not None:
        size = int(size[0]), int(size[1])
        rle.check_pixels("open_masks: size", *size)
    mask_format = next((known for known in FORMATS if known.accepts(masks)), None)
    if mask_format is None:
        *names, last = (known.name for known in FORMATS)
        raise TypeError(f"open_masks: masks must be {', '.join(names)} or {last}, got {type(masks).__name__}")
    mask_set, write = mask_format.read(masks, size)
    height, width = mask_set.masks.shape[1:]
    if size not in (None, (height, width)):
        raise ValueError(f"open_masks: masks must be of size {size}, got {(height, width)}")

    def restore(result: MaskSet, groups: Sequence[Sequence[int]]) -> Any:
        return write(result, _choose_best(mask_set, result, groups))

    return mask_set, restore


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
    distinct = list(dict.fromkeys(_require_integer(f"{op}: tags", tag) for tag in tags))
    if void in distinct:
        raise ValueError(f"{op}: tags must be classes, got {void}, which is void")
    classes = torch.tensor(distinct, dtype=torch.int64, device=labels.device)
    masks = labels == classes[:, None, None]
    is_present = masks.any(2).any(1)
    return MaskSet(masks[is_present], classes=classes[is_present])


def paint_labels(masks: Tensor, labels: Sequence[int]) -> Tensor:
    """Paint masks into one label map; smaller masks lie on top, and the later one of masks of equal area.

    Args:
        masks: (M, H, W) bool.
        labels: the label of each mask, M integers.

    Returns:
        (H, W) int64, 0 outside all masks, on the device of the masks.

    Example:
        >>> paint_labels(torch.tensor([[[True, False, False]], [[True, True, False]]]), [7, 9])
        tensor([[7, 9, 0]])
    """
    label_map = masks.new_zeros(masks.shape[1:], dtype=torch.int64)
    for index in mask_areas(masks).argsort(descending=True, stable=True).tolist():
        label_map.masked_fill_(masks[index], labels[index])
    return label_map


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


def _read_mask_set(mask_set: MaskSet, _: Size) -> tuple[MaskSet, Write]:
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


def _read_stack(stack: np.ndarray | Tensor, _: Size = None) -> tuple[MaskSet, Write]:
    """Read an array or tensor (M, H, W)."""
    masks = _read_binary(stack, "masks")
    if masks.ndim != 3 or (len(masks) and 0 in masks.shape):
        hint = ", or integers (H, W), a label map" if masks.ndim == 2 else ""
        raise ValueError(f"open_masks: masks must be (M, H, W){hint}, got {tuple(masks.shape)}")
    return MaskSet(masks), lambda result, _: _convert_like(result.masks, stack)


def _is_label_map(masks: Any) -> bool:
    """Tell whether an object is an integer array or tensor (H, W)."""
    return isinstance(masks, (np.ndarray, Tensor)) and masks.ndim == 2 and dtype_name(masks) in INTEGER_DTYPES


def _read_label_map(label_map: np.ndarray | Tensor, _: Size) -> tuple[MaskSet, Write]:
    """Read a label map (H, W)."""
    labels = convert_labels("open_masks", "masks", label_map)
    values = labels.unique()
    if values[0] < 0:
        raise ValueError(f"open_masks: masks must be labels of at least 0, got {int(values[0])}")
    values = values[values > 0]
    checks.memory("open_masks", "masks", labels, len(values) * labels.numel())
    known = values.tolist()

    def write(result: MaskSet, best: list[int]) -> Any:
        free = itertools.filterfalse(set(known).__contains__, itertools.count(1))
        numbers: list[int] = []
        used: set[int] = set()
        for label in (known[index] for index in best):
            numbers.append(next(free) if label in used else label)
            used.add(label)
        info = torch.iinfo(label_map.dtype) if isinstance(label_map, Tensor) else np.iinfo(label_map.dtype)
        if max(numbers, default=0) > info.max:
            raise ValueError(f"restore: result must be few enough masks for labels up to {info.max}, got {len(best)}")
        return _convert_like(paint_labels(result.masks, numbers), label_map)

    return MaskSet(labels == values[:, None, None]), write


def _read_list(entries: Sequence[Any], size: Size) -> tuple[MaskSet, Write]:
    """Read a list of arrays, tensors or RLE, or of records that hold them or polygons."""
    is_record = [isinstance(entry, Mapping) and "segmentation" in entry for entry in entries]
    if any(is_record):
        if not all(is_record):
            raise ValueError(
                f"open_masks: masks[{is_record.index(False)}] must have a segmentation like others, got none"
            )
        return _read_records(entries, size)
    masks = _read_entries(entries, size)

    def write(result: MaskSet, best: list[int]) -> Any:
        written = _write_entries(result.masks, [entries[index] for index in best])
        return tuple(written) if isinstance(entries, tuple) else written

    return MaskSet(masks), write


def _read_records(records: Sequence[Mapping[str, Any]], size: Size) -> tuple[MaskSet, Write]:
    """Read records with a segmentation, as SAM and COCO write them."""
    segmentations = [record["segmentation"] for record in records]
    masks = _read_entries(segmentations, size, allow_polygons=True)
    keys = records[0].keys()
    score_key = next((key for key in ("predicted_iou", "score") if key in keys), None)
    scores = classes = None
    if score_key:
        scores = convert_scores("open_masks", score_key, _collect(records, score_key), len(records)).to(masks.device)
    if "category_id" in keys:
        categories = [_read_category(record, index) for index, record in enumerate(records)]
        classes = torch.tensor(categories, dtype=torch.int64, device=masks.device)
    mask_set = MaskSet(masks, None if scores is None else scores.float(), classes)

    def write(result: MaskSet, best: list[int]) -> Any:
        boxes = mask_boxes(result.masks, last=score_key == "predicted_iou")
        measured: dict[str, list[Any]] = {
            "segmentation": _write_entries(result.masks, [segmentations[index] for index in best]),
            "area": mask_areas(result.masks).tolist(),
            "bbox": to_xywh(boxes).tolist(),
        }
        if score_key and scores is not None:
            measured[score_key] = _update_scores(scores, mask_set, result, best).tolist()
        written = [
            {**records[index], **{key: values[k] for key, values in measured.items() if key in records[index]}}
            for k, index in enumerate(best)
        ]
        return tuple(written) if isinstance(records, tuple) else written

    return mask_set, write


def _is_detections(masks: Any) -> bool:
    """Tell whether an object is of supervision's class, which is not imported for it."""
    return any(
        base.__name__ == "Detections" and base.__module__.startswith("supervision.") for base in type(masks).mro()
    )


def _read_detections(detections: Any, size: Size) -> tuple[MaskSet, Write]:
    """Read `supervision.Detections`."""
    dense = detections.mask
    if dense is None:
        if len(detections):
            raise ValueError("open_masks: masks must be Detections with a mask, got boxes alone")
        dense = np.zeros((0, *(size or (0, 0))), dtype=bool)
    masks = _read_stack(np.asarray(dense))[0].masks
    scores = None
    if detections.confidence is not None:
        scores = convert_scores("open_masks", "confidence", detections.confidence, len(masks))
    classes = None if detections.class_id is None else _read_classes("class_id", detections.class_id)
    mask_set = MaskSet(masks, None if scores is None else scores.float(), classes)

    def write(result: MaskSet, best: list[int]) -> Any:
        fields = {"xyxy": _convert_like(mask_boxes(result.masks, last=True), detections.xyxy)}
        if scores is not None:
            fields["confidence"] = _convert_like(_update_scores(scores, mask_set, result, best), detections.confidence)
        if isinstance(detections.mask, np.ndarray):
            fields["mask"] = _convert_like(result.masks, detections.mask)
        elif detections.mask is not None:  # a CompactMask
            fields["mask"] = type(detections.mask).from_dense(
                result.masks.cpu().numpy(), fields["xyxy"], tuple(result.masks.shape[1:])
            )
        return replace(detections[np.array(best, dtype=np.int64)], **fields)

    return mask_set, write


def _read_instances(instances: Any, _: Size) -> tuple[MaskSet, Write]:
    """Read detectron2's `Instances`."""
    fields = instances.get_fields()
    stack = fields.get("pred_masks")
    if not isinstance(stack, Tensor):
        raise TypeError(f"open_masks: masks must be Instances with a tensor pred_masks, got {type(stack).__name__}")
    masks = _read_stack(stack)[0].masks
    if masks.shape[1:] != tuple(instances.image_size):
        raise ValueError(
            f"open_masks: pred_masks must be of image_size {tuple(instances.image_size)}, got {tuple(masks.shape[1:])}"
        )
    scores = convert_scores("open_masks", "scores", fields["scores"], len(masks)) if "scores" in fields else None
    classes = _read_classes("pred_classes", fields["pred_classes"]) if "pred_classes" in fields else None
    mask_set = MaskSet(masks, None if scores is None else scores.float(), classes)

    def write(result: MaskSet, best: list[int]) -> Any:
        chosen = instances[torch.tensor(best, dtype=torch.int64, device=stack.device)]
        chosen.pred_masks = _convert_like(result.masks, stack)
        if scores is not None:
            chosen.scores = _convert_like(_update_scores(scores, mask_set, result, best), fields["scores"])
        if "pred_boxes" in fields:
            boxes = mask_boxes(result.masks).to(stack.device, torch.float32)
            chosen.pred_boxes = type(fields["pred_boxes"])(boxes)
        return chosen

    return mask_set, write


def _choose_best(mask_set: MaskSet, result: MaskSet, groups: Sequence[Sequence[int]]) -> list[int]:
    """Check the groups of a result, and choose the mask of each with the highest score."""
    count = len(mask_set.masks)
    if len(groups) != len(result.masks):
        raise ValueError(f"restore: groups must be {len(result.masks)}, one for each mask, got {len(groups)}")
    size, result_size = tuple(mask_set.masks.shape[1:]), tuple(result.masks.shape[1:])
    if size != result_size:
        raise ValueError(f"restore: result must be of size {size}, got {result_size}")
    scores = [0.0] * count if mask_set.scores is None else mask_set.scores.tolist()
    best = []
    for group in groups:
        members = sorted(int(index) for index in group)
        if not members or members[0] < 0 or members[-1] >= count:
            raise ValueError(f"restore: groups must hold indices of {count} masks, got {members}")
        best.append(max(members, key=scores.__getitem__))
    return best


def _update_scores(exact: Tensor, mask_set: MaskSet, result: MaskSet, best: list[int]) -> Tensor:
    """Return the scores of a result, (K,) float64; unchanged scores keep the precision that they came in."""
    chosen = torch.tensor(best, dtype=torch.int64, device=exact.device)
    if result.scores is None or mask_set.scores is None:
        return exact[chosen]
    scores = result.scores.to(exact.device)
    return torch.where(scores == mask_set.scores[chosen], exact[chosen], scores.double())


def _read_entries(entries: Sequence[Any], size: Size, allow_polygons: bool = False) -> Tensor:
    """Read arrays, tensors, RLE and perhaps polygons as one stack (M, H, W) bool."""
    masks: list[Tensor] = []
    if size is not None:
        checks.stack("open_masks", "masks", (len(entries), *size))
    for index, entry in enumerate(entries):
        name = f"masks[{index}]"
        if isinstance(entry, (np.ndarray, Tensor)):
            mask = _read_binary(entry, name)
            if mask.ndim != 2 or 0 in mask.shape:
                raise ValueError(f"open_masks: {name} must be (H, W), got {tuple(mask.shape)}")
        elif isinstance(entry, Mapping) or (allow_polygons and isinstance(entry, list)):
            mask = _read_segmentation(entry, name, size)
        else:
            raise TypeError(f"open_masks: {name} must be an array, a tensor or RLE, got {type(entry).__name__}")
        if size is None:
            size = mask.shape[0], mask.shape[1]
            checks.stack("open_masks", "masks", (len(entries), *size))
        if mask.shape != size:
            raise ValueError(f"open_masks: {name} must be of size {size}, got {tuple(mask.shape)}")
        if masks and mask.device != masks[0].device:
            raise ValueError(f"open_masks: {name} must be on {masks[0].device} like masks[0], got {mask.device}")
        masks.append(mask)
    return torch.stack(masks) if masks else torch.zeros(0, *(size or (0, 0)), dtype=torch.bool, device="cpu")


def _read_segmentation(segmentation: Any, name: str, size: Size) -> Tensor:
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


def _write_entries(masks: Tensor, likes: Sequence[Any]) -> list[Any]:
    """Write masks (K, H, W) bool, each in the form of an entry that was read."""
    is_array = [isinstance(like, (np.ndarray, Tensor)) for like in likes]
    others = [index for index, array in enumerate(is_array) if not array]
    encoded = iter(rle.encode_rles("open_masks", masks[others].cpu().numpy()) if others else ())
    written: list[Any] = []
    for mask, like, array in zip(masks, likes, is_array, strict=True):
        if array:
            # a copy, so that a caller who keeps one mask does not keep all of them
            written.append(_convert_like(mask.clone(), like))
            continue
        counts: Any = next(encoded)
        form = like if isinstance(like, Mapping) else {"size": list(mask.shape), "counts": ""}
        if isinstance(form["counts"], str):
            counts = counts.decode("ascii")
        elif isinstance(form["counts"], list):
            counts = rle.decode_run_lengths(counts).tolist()
        written.append({**form, "counts": counts})
    return written


def _collect(records: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    """Collect a field that every record must have."""
    for index, record in enumerate(records):
        if key not in record:
            raise ValueError(f"open_masks: masks[{index}] must have a {key} like masks[0], got none")
    return [record[key] for record in records]


def _read_classes(name: str, classes: np.ndarray | Tensor) -> Tensor:
    """Read the classes of masks, int64, on the device of a tensor; numbers that are no integers would become others."""
    if dtype_name(classes) not in INTEGER_DTYPES:
        raise TypeError(f"open_masks: {name} must be integers, got {dtype_name(classes)}")
    return classes.long() if isinstance(classes, Tensor) else torch.from_numpy(classes.astype(np.int64))


def _require_integer(subject: str, value: Any) -> int:
    """Return an integer of any type; a float would silently lose its fraction."""
    try:
        integer = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{subject} must be integers, got {value!r}") from error
    if not rle.LEAST <= integer <= rle.MOST:
        raise ValueError(f"{subject} must be integers of 64 bits, got {integer}")
    return integer


def _read_category(record: Mapping[str, Any], index: int) -> int:
    """Read the category_id of a record."""
    try:
        return rle.read_integer(record, "category_id")
    except ValueError as problem:
        raise ValueError(f"open_masks: masks[{index}]: {problem}") from problem


def _read_binary(values: np.ndarray | Tensor, name: str) -> Tensor:
    """Read 0 and 1 of any dtype as a bool tensor in separate memory, on the device of the values."""
    dtype = dtype_name(values)
    if dtype not in BINARY_DTYPES:
        raise TypeError(f"open_masks: {name} must be bool, or integers or floats that are 0 or 1, got {values.dtype}")
    if isinstance(values, Tensor):
        check_values(f"open_masks: {name}", values)
    if dtype == "bool":
        # not a copy: bytes of 0 and 255 that are viewed as bool must become 0 and 1
        ones = values.clone() if isinstance(values, Tensor) else np.not_equal(values, False)
    else:
        ones = values == 1
        is_bad = ~(ones | (values == 0))
        if is_bad.any():
            raise ValueError(f"open_masks: {name} must be 0 or 1, got {values[is_bad][0].item()}")
    return ones if isinstance(ones, Tensor) else torch.from_numpy(np.ascontiguousarray(ones))


def _convert_like(values: Tensor, like: np.ndarray | Tensor) -> Any:
    """Convert values to the type, dtype and device of another array or tensor, without a copy if they have them."""
    return values.to(like) if isinstance(like, Tensor) else values.cpu().numpy().astype(like.dtype, copy=False)


# the first that accepts the masks reads them; to add a format, add it here and to FORMATS of tests/test_formats.py
FORMATS = (
    MaskFormat("a MaskSet", lambda masks: isinstance(masks, MaskSet), _read_mask_set),
    MaskFormat("a label map (H, W) of integers", _is_label_map, _read_label_map),
    MaskFormat("an array or a tensor (M, H, W)", lambda masks: isinstance(masks, (np.ndarray, Tensor)), _read_stack),
    MaskFormat("a list of masks or records", lambda masks: isinstance(masks, (list, tuple)), _read_list),
    MaskFormat("supervision's Detections", _is_detections, _read_detections),
    MaskFormat(
        "detectron2's Instances",
        lambda masks: hasattr(masks, "image_size") and hasattr(masks, "get_fields"),
        _read_instances,
    ),
)
