"""The door for masks: every kind of collection comes in as one stack of masks, and goes out as the kind that it was.

What has a score, a class or a box beside its masks keeps them: masks and scores go out as they became, areas and boxes
are measured again, and all else is carried over.
"""

from __future__ import annotations

import itertools
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trace_fast.io.arrays import mask_areas, mask_boxes
from trace_fast.masks import coco
from trace_fast.ops import checks

__all__ = ["MaskSet", "open_masks", "semantic_masks"]

Close = Callable[["MaskSet", Sequence[Sequence[int]]], Any]
Make = Callable[["MaskSet", list[int]], Any]  # given the best member of each group

INTEGERS = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "int64")
BINARY = ("bool", *INTEGERS, "float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, eq=False)
class MaskSet:
    """Masks of an image, M of them; they may overlap.

    Attributes:
        masks: (M, H, W) bool.
        scores: (M,) float32, higher is surer; or None.
        classes: (M,) int64; or None.
    """

    masks: Tensor
    scores: Tensor | None = None
    classes: Tensor | None = None


def open_masks(masks: Any, size: tuple[int, int] | None = None) -> tuple[MaskSet, Close]:
    """Read a collection of masks of any kind, with the way back to that kind.

    Args:
        masks: the masks of one image, perhaps none:
            - array or tensor (M, H, W), bool, or integers or floats that are 0 or 1;
            - list or tuple of arrays or tensors (H, W) of such values, as MaskCut and ProMerge have them;
            - label map, array or tensor (H, W) of integers up to 64 bits with sign, 0 for none. A mask keeps its label;
              where it was split, the first part does, and the others get the lowest numbers that are free. Where masks
              overlap, smaller ones lie on top;
            - list of COCO's RLE, {"size", "counts"}, counts a list, str or bytes;
            - list of records with a "segmentation" of either form: SAM's, with a predicted_iou, which is the score, and
              a bbox that ends at the last pixel; or COCO's annotations and results, also CutLER's, with a score, a
              category_id and a bbox that ends behind it. Both boxes are XYWH. Polygons come out as compressed RLE. The
              id of an annotation is carried over, too, so that the parts of one mask share it;
            - `supervision.Detections`, dense or compact, with xyxy that end at the last pixel;
            - detectron2's `Instances` with pred_masks, and perhaps scores, pred_classes and pred_boxes. Their classes
              were read, but detectron2 itself was not at hand for a test;
            - `MaskSet`.
        size: (height, width) that the masks must have; polygons need it, and where nothing is in a list, or there are
            `Detections` without a mask, it is the size of no masks, else (0, 0).

    Returns:
        The masks, on the device that they were on and not sharing their memory, a `MaskSet` excepted; and
        `close(result, groups)`, which gives the masks and scores of another `MaskSet` in the kind that came in.
        groups[k] are the indices of the masks that mask k of the result descends from; what else the kind holds comes
        from the one among them with the highest score, the first where several have it or none has scores. A stack
        goes out in the memory of the result where that has its dtype. `close` raises ValueError where the groups do not
        fit, and where a label map's dtype cannot number the masks.

    Raises:
        TypeError: a kind or dtype that is not listed.
        ValueError: shapes or sizes differ, a mask is not binary, RLE or polygons are malformed, a score is missing or
            not finite, devices differ, labels are negative.
        RuntimeError: RLE or polygons, and pycocotools is not installed.

    Example:
        >>> found, close = open_masks(np.array([[0, 7, 7], [4, 0, 7]], dtype=np.uint8))
        >>> found.masks.sum((1, 2))
        tensor([1, 3])
        >>> close(found, [[0], [1]])
        array([[0, 7, 7],
               [4, 0, 7]], dtype=uint8)
    """
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"open_masks: size must be (height, width), both at least 1, got {tuple(size)}")
    size = None if size is None else (int(size[0]), int(size[1]))
    found, make = _open(masks, size)
    height, width = found.masks.shape[1:]
    if size not in (None, (height, width)):
        raise ValueError(f"open_masks: masks must be of size {size}, got {(height, width)}")

    def close(result: MaskSet, groups: Sequence[Sequence[int]]) -> Any:
        return make(result, _best(found, result, groups))

    return found, close


def semantic_masks(class_map: np.ndarray | Tensor, tags: Iterable[int], void: int = 255) -> MaskSet:
    """The mask of each class that an image is tagged with, from a semantic map such as DHR's.

    Of a palette PNG, `np.asarray(Image.open(path))` is the map. Which classes are things that want splitting, and which
    are stuff, is for the caller to say.

    Args:
        class_map: (H, W) integers, array or tensor.
        tags: classes of the image, background excepted; what the map has of others is left out.
        void: value of the pixels without a class.

    Returns:
        The masks of the tags that the map has, in the order of the tags, on the map's device, with their classes.

    Raises:
        TypeError: the map is of another kind or dtype.
        ValueError: the map is not (H, W), or void is among the tags.

    Example:
        >>> found = semantic_masks(np.array([[0, 15, 15], [12, 255, 15]]), tags=[15, 3])
        >>> found.masks.sum((1, 2)), found.classes
        (tensor([3]), tensor([15]))
    """
    op = "semantic_masks"
    labels = as_labels(op, "class_map", class_map)
    wanted = list(dict.fromkeys(int(tag) for tag in tags))
    if void in wanted:
        raise ValueError(f"{op}: tags must be classes, got {void}, which is void")
    classes = torch.tensor(wanted, dtype=torch.int64, device=labels.device)
    masks = labels == classes[:, None, None]
    seen = masks.any(2).any(1)
    return MaskSet(masks[seen], classes=classes[seen])


def xywh(corners: Tensor) -> Tensor:
    """Boxes x0, y0, x1, y1 as x0, y0, width, height, (M, 4)."""
    return torch.cat((corners[:, :2], corners[:, 2:] - corners[:, :2]), 1)


def paint_labels(masks: Tensor, numbers: Sequence[int]) -> Tensor:
    """A map of the number of each mask, (H, W) int64, 0 outside all; smaller ones lie on top, of equal ones the later.

    Args:
        masks: (M, H, W) bool.
        numbers: M of them.
    """
    canvas = masks.new_zeros(masks.shape[1:], dtype=torch.int64)
    for index in mask_areas(masks).argsort(descending=True, stable=True).tolist():
        canvas.masked_fill_(masks[index], numbers[index])
    return canvas


def as_labels(op: str, name: str, labels: np.ndarray | Tensor) -> Tensor:
    """An integer map of either kind, checked, as an int64 tensor (H, W) on its device."""
    kind = _dtype(labels) if isinstance(labels, (np.ndarray, Tensor)) else type(labels).__name__
    if kind not in INTEGERS:
        raise TypeError(f"{op}: {name} must be an integer array or tensor, got {kind}")
    if labels.ndim != 2 or 0 in labels.shape:
        raise ValueError(f"{op}: {name} must be (H, W), got {tuple(labels.shape)}")
    return labels.long() if isinstance(labels, Tensor) else torch.from_numpy(labels.astype(np.int64, order="C"))


def as_scores(op: str, name: str, scores: Any, count: int) -> Tensor:
    """Scores of any kind, checked, as float64 (M,) on the device of a tensor."""
    if isinstance(scores, Tensor):
        values = scores.detach().double()
    else:
        try:
            values = torch.from_numpy(np.array(scores, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise TypeError(f"{op}: {name} must be numbers, got {reprlib.repr(scores)}") from error
    if values.shape != (count,):
        raise ValueError(f"{op}: {name} must be ({count},), one for each mask, got {tuple(values.shape)}")
    odd = ~values.float().isfinite()
    if odd.any():
        raise ValueError(f"{op}: {name} must be finite in float32, got {values[odd][0].item()}")
    return values


def _open(masks: Any, size: tuple[int, int] | None) -> tuple[MaskSet, Make]:
    if isinstance(masks, MaskSet):
        return _check_set(masks), lambda result, _: result
    if isinstance(masks, (np.ndarray, Tensor)):
        return _open_labels(masks) if masks.ndim == 2 and _dtype(masks) in INTEGERS else _open_stack(masks)
    if isinstance(masks, (list, tuple)):
        return _open_list(masks, size)
    if any(kind.__name__ == "Detections" and kind.__module__.startswith("supervision.") for kind in type(masks).mro()):
        return _open_detections(masks, size)
    if hasattr(masks, "image_size") and hasattr(masks, "get_fields"):
        return _open_instances(masks)
    raise TypeError(
        "open_masks: masks must be an array, a tensor, a list, supervision's Detections, detectron2's Instances or a "
        f"MaskSet, got {type(masks).__name__}"
    )


def _check_set(found: MaskSet) -> MaskSet:
    op, sizes = "open_masks", dict[str, int]()
    if getattr(found.masks, "shape", None) != (0, 0, 0):  # what an empty list is
        checks.tensor(op, "masks", found.masks, "M H W", sizes, torch.bool)
    for name, value, dtype in (("scores", found.scores, torch.float32), ("classes", found.classes, torch.int64)):
        if value is not None:
            checks.tensor(op, name, value, "M", sizes, dtype)
            checks.same_device(op, masks=found.masks, **{name: value})
    return found


def _open_stack(stack: np.ndarray | Tensor) -> tuple[MaskSet, Make]:
    masks = _binary(stack, "masks")
    if masks.ndim != 3 or (len(masks) and 0 in masks.shape):
        hint = ", or integers (H, W), a label map" if masks.ndim == 2 else ""
        raise ValueError(f"open_masks: masks must be (M, H, W){hint}, got {tuple(masks.shape)}")
    return MaskSet(masks), lambda result, _: _like(result.masks, stack)


def _open_labels(label_map: np.ndarray | Tensor) -> tuple[MaskSet, Make]:
    labels = as_labels("open_masks", "masks", label_map)
    values = labels.unique()
    if values[0] < 0:
        raise ValueError(f"open_masks: masks must be labels of at least 0, got {int(values[0])}")
    values = values[values > 0]
    checks.memory("open_masks", "masks", labels, len(values) * labels.numel())
    known = values.tolist()

    def make(result: MaskSet, best: list[int]) -> Any:
        free = itertools.filterfalse(set(known).__contains__, itertools.count(1))
        numbers: list[int] = []
        taken: set[int] = set()
        for label in (known[index] for index in best):
            numbers.append(next(free) if label in taken else label)
            taken.add(label)
        info = torch.iinfo(label_map.dtype) if isinstance(label_map, Tensor) else np.iinfo(label_map.dtype)
        if max(numbers, default=0) > info.max:
            raise ValueError(f"close: result must be few enough masks for labels up to {info.max}, got {len(best)}")
        return _like(paint_labels(result.masks, numbers), label_map)

    return MaskSet(labels == values[:, None, None]), make


def _open_list(entries: Sequence[Any], size: tuple[int, int] | None) -> tuple[MaskSet, Make]:
    recorded = [isinstance(entry, Mapping) and "segmentation" in entry for entry in entries]
    records = any(recorded)
    if records and not all(recorded):
        raise ValueError(f"open_masks: masks[{recorded.index(False)}] must have a segmentation like others, got none")
    parts = [entry["segmentation"] for entry in entries] if records else list(entries)
    masks = _read_parts(parts, records, size)
    keys = entries[0].keys() if records else ()
    key = next((key for key in ("predicted_iou", "score") if key in keys), None)
    scores = classes = None
    if key:
        lacking = [index for index, entry in enumerate(entries) if key not in entry]
        if lacking:
            raise ValueError(f"open_masks: masks[{lacking[0]}] must have a {key} like masks[0], got none")
        scores = as_scores("open_masks", key, [entry[key] for entry in entries], len(entries)).to(masks.device)
    if "category_id" in keys:
        numbers = [_category(entry, index) for index, entry in enumerate(entries)]
        classes = torch.tensor(numbers, dtype=torch.int64, device=masks.device)
    found = _gather(masks, scores, classes)

    def make(result: MaskSet, best: list[int]) -> Any:
        written = _write_parts(result.masks, [parts[index] for index in best])
        if records:
            measured = {
                "segmentation": written,
                "area": mask_areas(result.masks).tolist(),
                "bbox": xywh(mask_boxes(result.masks, last=key == "predicted_iou")).tolist(),
                **({} if scores is None else {str(key): _rescore(scores, found, result, best).tolist()}),
            }
            written = [
                {**entries[index], **{name: values[k] for name, values in measured.items() if name in entries[index]}}
                for k, index in enumerate(best)
            ]
        return tuple(written) if isinstance(entries, tuple) else written

    return found, make


def _open_detections(detections: Any, size: tuple[int, int] | None) -> tuple[MaskSet, Make]:
    dense = detections.mask
    if dense is None:
        if len(detections):
            raise ValueError("open_masks: masks must be Detections with a mask, got boxes alone")
        dense = np.zeros((0, *(size or (0, 0))), dtype=bool)
    masks = _open_stack(np.asarray(dense))[0].masks
    scores = None
    if detections.confidence is not None:
        scores = as_scores("open_masks", "confidence", detections.confidence, len(masks))
    classes = None if detections.class_id is None else torch.from_numpy(detections.class_id.astype(np.int64))
    found = _gather(masks, scores, classes)

    def make(result: MaskSet, best: list[int]) -> Any:
        fields = {"xyxy": _like(mask_boxes(result.masks, last=True), detections.xyxy)}
        if scores is not None:
            fields["confidence"] = _like(_rescore(scores, found, result, best), detections.confidence)
        if isinstance(detections.mask, np.ndarray):
            fields["mask"] = _like(result.masks, detections.mask)
        elif detections.mask is not None:  # a CompactMask
            fields["mask"] = type(detections.mask).from_dense(
                result.masks.cpu().numpy(), fields["xyxy"], tuple(result.masks.shape[1:])
            )
        return replace(detections[np.array(best, dtype=np.int64)], **fields)

    return found, make


def _open_instances(instances: Any) -> tuple[MaskSet, Make]:
    before = instances.get_fields()
    stack = before.get("pred_masks")
    if not isinstance(stack, Tensor):
        raise TypeError(f"open_masks: masks must be Instances with a tensor pred_masks, got {type(stack).__name__}")
    masks = _open_stack(stack)[0].masks
    if masks.shape[1:] != tuple(instances.image_size):
        raise ValueError(
            f"open_masks: pred_masks must be of image_size {tuple(instances.image_size)}, got {tuple(masks.shape[1:])}"
        )
    scores = as_scores("open_masks", "scores", before["scores"], len(masks)) if "scores" in before else None
    classes = before["pred_classes"].long() if "pred_classes" in before else None
    found = _gather(masks, scores, classes)

    def make(result: MaskSet, best: list[int]) -> Any:
        chosen = instances[torch.tensor(best, dtype=torch.int64, device=stack.device)]
        chosen.pred_masks = _like(result.masks, stack)
        if scores is not None:
            chosen.scores = _like(_rescore(scores, found, result, best), before["scores"])
        if "pred_boxes" in before:
            chosen.pred_boxes = type(before["pred_boxes"])(mask_boxes(result.masks).to(stack.device, torch.float32))
        return chosen

    return found, make


def _gather(masks: Tensor, exact: Tensor | None, classes: Tensor | None) -> MaskSet:
    return MaskSet(masks, None if exact is None else exact.float(), classes)


def _best(found: MaskSet, result: MaskSet, groups: Sequence[Sequence[int]]) -> list[int]:
    """The member of each group with the highest score."""
    count = len(found.masks)
    if len(groups) != len(result.masks):
        raise ValueError(f"close: groups must be {len(result.masks)}, one for each mask, got {len(groups)}")
    if result.masks.shape[1:] != found.masks.shape[1:]:
        sizes = tuple(found.masks.shape[1:]), tuple(result.masks.shape[1:])
        raise ValueError(f"close: result must be of size {sizes[0]}, got {sizes[1]}")
    scores = [0.0] * count if found.scores is None else found.scores.tolist()
    best = []
    for group in groups:
        members = sorted(int(index) for index in group)
        if not members or members[0] < 0 or members[-1] >= count:
            raise ValueError(f"close: groups must hold indices of {count} masks, got {members}")
        best.append(max(members, key=scores.__getitem__))
    return best


def _rescore(exact: Tensor, found: MaskSet, result: MaskSet, best: list[int]) -> Tensor:
    """Scores of the result, (K,) float64; those that are unchanged as they came, which may be more than float32."""
    chosen = torch.tensor(best, dtype=torch.int64, device=exact.device)
    if result.scores is None or found.scores is None:
        return exact[chosen]
    scores = result.scores.to(exact.device)
    return torch.where(scores == found.scores[chosen], exact[chosen], scores.double())


def _read_parts(parts: Sequence[Any], records: bool, size: tuple[int, int] | None) -> Tensor:
    """Arrays, tensors, RLE or polygons as one stack (M, H, W) bool."""
    masks: list[Tensor] = []
    for index, part in enumerate(parts):
        name = f"masks[{index}]"
        if isinstance(part, (np.ndarray, Tensor)):
            mask = _binary(part, name)
            if mask.ndim != 2 or 0 in mask.shape:
                raise ValueError(f"open_masks: {name} must be (H, W), got {tuple(mask.shape)}")
        elif isinstance(part, Mapping) or (records and isinstance(part, list)):
            mask = _from_coco(part, name, size)
        else:
            raise TypeError(f"open_masks: {name} must be an array, a tensor or RLE, got {type(part).__name__}")
        size = size or (mask.shape[0], mask.shape[1])
        if mask.shape != size:
            raise ValueError(f"open_masks: {name} must be of size {size}, got {tuple(mask.shape)}")
        if masks and mask.device != masks[0].device:
            raise ValueError(f"open_masks: {name} must be on {masks[0].device} like masks[0], got {mask.device}")
        masks.append(mask)
    return torch.stack(masks) if masks else torch.zeros(0, *(size or (0, 0)), dtype=torch.bool, device="cpu")


def _from_coco(part: Any, name: str, size: tuple[int, int] | None) -> Tensor:
    api = coco.mask_api("open_masks")
    if size is None and not isinstance(part, Mapping):
        raise ValueError("open_masks: size must be given with polygons, got None")
    try:
        height, width = size or coco.rle_size(part)
        counts = coco.encode(api, part, height, width, Counter())
    except ValueError as problem:
        raise ValueError(f"open_masks: {name}: {problem}") from problem
    image = coco.ImageInstances(0, height, width, "", [coco.Instance(counts, 1, 0)])
    return torch.from_numpy(image.masks()[0])


def _write_parts(masks: Tensor, likes: Sequence[Any]) -> list[Any]:
    """Masks (K, H, W) bool, each in the form of its like."""
    arrays = [isinstance(like, (np.ndarray, Tensor)) for like in likes]
    encoded = [index for index, array in enumerate(arrays) if not array]
    rles = iter(coco.encode_masks(masks[encoded].cpu().numpy()).instances if encoded else ())
    written: list[Any] = []
    for mask, like, array in zip(masks, likes, arrays, strict=True):
        if array:
            written.append(_like(mask.clone(), like))  # whoever keeps one mask does not keep all
            continue
        counts: Any = next(rles).counts
        form = like if isinstance(like, Mapping) else {"size": list(mask.shape), "counts": ""}
        if isinstance(form["counts"], str):
            counts = counts.decode("ascii")
        elif isinstance(form["counts"], list):
            counts = coco.run_lengths(counts).tolist()
        written.append({**form, "counts": counts})
    return written


def _category(entry: Mapping[str, Any], index: int) -> int:
    try:
        return coco.integer(entry, "category_id")
    except ValueError as problem:
        raise ValueError(f"open_masks: masks[{index}]: {problem}") from problem


def _binary(values: np.ndarray | Tensor, name: str) -> Tensor:
    """0 and 1 of any dtype as a bool tensor of its own on the device of the values."""
    kind = _dtype(values)
    if kind not in BINARY:
        raise TypeError(f"open_masks: {name} must be bool, or integers or floats that are 0 or 1, got {values.dtype}")
    if kind == "bool":
        # not a copy: where an array of 0 and 255 was viewed as bool, its bytes are to become 1
        ones = values.clone() if isinstance(values, Tensor) else np.not_equal(values, False)
    else:
        ones = values == 1
        odd = ~(ones | (values == 0))
        if odd.any():
            raise ValueError(f"open_masks: {name} must be 0 or 1, got {values[odd][0].item()}")
    return ones if isinstance(ones, Tensor) else torch.from_numpy(np.ascontiguousarray(ones))


def _like(values: Tensor, like: np.ndarray | Tensor) -> Any:
    """Values as an array or a tensor: the kind, dtype and device of another; themselves where they are that."""
    return values.to(like) if isinstance(like, Tensor) else values.cpu().numpy().astype(like.dtype, copy=False)


def _dtype(values: np.ndarray | Tensor) -> str:
    return str(values.dtype).removeprefix("torch.") if isinstance(values, Tensor) else values.dtype.name
