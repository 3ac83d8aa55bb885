"""Formats of masks: read every accepted collection as a `MaskSet`, and write results in the format that came in.

Scores, classes, boxes and other fields of a collection are kept: masks and scores are written as the result has them,
areas and boxes are measured again, and all other fields are copied. `FORMATS` at the end lists the formats.

`base` has what readers share, `arrays` masks without further fields, `maps` integers (H, W), `records` a mapping for
each mask, `fields` dictionaries and objects that hold all masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from trace_fast.masks import rle
from trace_fast.masks.formats import arrays, fields, maps, records
from trace_fast.masks.formats.base import MaskFormat, MaskSet, Options, convert_labels, convert_scores, to_xywh
from trace_fast.masks.formats.maps import keep_visible, paint_labels, semantic_masks
from trace_fast.ops import checks

__all__ = [
    "FORMATS",
    "MaskFormat",
    "MaskSet",
    "Options",
    "convert_labels",
    "convert_scores",
    "keep_visible",
    "open_masks",
    "paint_labels",
    "semantic_masks",
    "to_xywh",
]

Restore = Callable[[MaskSet, Sequence[Sequence[int]]], Any]


def open_masks(
    masks: Any,
    size: tuple[int, int] | None = None,
    *,
    ignore: int | Iterable[int] | None = None,
    label_divisor: int | None = None,
    cut: float | None = None,
) -> tuple[MaskSet, Restore]:
    """Read masks of any accepted format, and return a function that writes results in the same format.

    Args:
        masks: the masks of one image, perhaps none:
            - array or tensor (M, H, W), (H, W) or (B, M, H, W), bool, integers or floats that are 0 or 1, or uint8 that
              are 0 or 255. (B, M, H, W) are B prompts with M masks each, as SAM has them; a result of another number of
              masks is (1, K, H, W) where B is 1, else (K, 1, H, W). A single mask (H, W), which is not of integers,
              becomes (K, H, W) if there are several in the result;
            - list, tuple, set, generator or view of masks (H, W), arrays, tensors or PIL images of mode 1 or L; or a
              list of one stack, as transformers' `post_process_masks` returns it. A generator is written as a list;
            - label map, (H, W) of integers up to 64 bits with sign or PIL image of mode L, P, I or I;16, where 0 is no
              mask; see also `ignore` and `label_divisor`. Results keep the labels: the first part of a mask has its
              label, and further parts have the lowest free labels. Where masks overlap, smaller ones lie on top. A map
              whose only label is 255 is a picture of one mask. A PIL image of mode 1 is one mask;
            - list of COCO's RLE, {"size", "counts"}, where counts are a list, str or bytes;
            - list of records with a "segmentation" or a "mask" of any of these forms or polygons: SAM's, whose score is
              predicted_iou and whose bbox ends at the last pixel; COCO's annotations and results, also CutLER's, with a
              score, a category_id and a bbox that ends behind the last pixel; or those of transformers' pipelines.
              A record whose mask is as before stays as it is, but for the score. Of others the fields segmentation or
              mask, area and bbox are made again, polygons as compressed RLE; the point_coords that are outside are
              left out, or replaced by one inside; stability_score is left out. Of several parts of a record, only the
              first keeps its id;
            - dictionary of fields: IRNet's {"score", "mask", "class"}, DHR's {"keys", "masks"}, {"masks", "scores"} of
              transformers' pipelines, torchvision's {"boxes", "labels", "scores", "masks"};
            - `supervision.Detections`, dense or compact, whose xyxy ends at the last pixel. Of several parts of a
              detection the first keeps the tracker_id, and others have new ones;
            - detectron2's `Instances` with pred_masks, and perhaps scores, pred_classes and pred_boxes, or `BitMasks`;
            - panoptic segmentation, (map, segments_info) with category_id or label_id. Pixels of no segment that are
              not 0 stay as they are, and parts of stuff (isthing is false) stay one segment;
            - dictionary that a model of detectron2 or transformers returns for an image, with "instances" or else
              "panoptic_seg", or with "segmentation" and "segments_info";
            - `MaskSet`.
        size: (height, width) that the masks must have. Polygons need it. For an empty list or `Detections` without
            masks it is the size of the empty stack, otherwise (0, 0).
        ignore: labels of a label map that are void: they are no mask, and their pixels are written as they were. None
            is 255 of uint8 and 65535 of uint16 in a map with other labels, and -1; `()` is none.
        label_divisor: of a label map whose labels are class * label_divisor + instance, such as 1000. The masks have
            these classes, and new labels of parts are of the same class. A label below it is a class.
        cut: value above which a pixel of soft masks, of floats, is inside: 0.5 for probabilities, 0.0 for SAM's logits.
            Results are 0 and 1.

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
            missing or not finite, labels are negative, or an option is out of range.
        RuntimeError: masks are RLE or polygons, and pycocotools is not installed.

    Example:
        >>> mask_set, restore = open_masks(np.array([[0, 7, 7], [4, 0, 7]], dtype=np.uint8))
        >>> mask_set.masks.sum((1, 2))
        tensor([1, 3])
        >>> restore(mask_set, [[0], [1]])
        array([[0, 7, 7],
               [4, 0, 7]], dtype=uint8)
    """
    options = _check_options(size, ignore, label_divisor, cut)
    mask_format = next((known for known in FORMATS if known.accepts(masks)), None)
    if mask_format is None:
        *names, last = (known.name for known in FORMATS)
        raise TypeError(f"open_masks: masks must be {', '.join(names)} or {last}, got {type(masks).__name__}")
    mask_set, write = mask_format.read(masks, options)
    height, width = mask_set.masks.shape[1:]
    if options.size not in (None, (height, width)):
        raise ValueError(f"open_masks: masks must be of size {options.size}, got {(height, width)}")

    # not the masks themselves, so that a caller can free their memory before the result takes as much
    count, scores = len(mask_set.masks), mask_set.scores

    def restore(result: MaskSet, groups: Sequence[Sequence[int]]) -> Any:
        return write(result, _choose_best(count, (height, width), scores, result, groups))

    return mask_set, restore


def _check_options(size: Any, ignore: Any, label_divisor: int | None, cut: float | None) -> Options:
    """Check the options of `open_masks`."""
    if size is not None:
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"open_masks: size must be (height, width), both at least 1, got {tuple(size)}")
        size = int(size[0]), int(size[1])
        rle.check_pixels("open_masks: size", *size)
    if ignore is not None:
        labels = ignore if isinstance(ignore, Iterable) else (ignore,)
        ignore = tuple(maps.require_integer("open_masks: ignore", label) for label in labels)
    if label_divisor is not None:
        checks.integer("open_masks", "label_divisor", label_divisor, 2)
    if cut is not None:
        checks.number("open_masks", "cut", cut)
    return Options(size, ignore, label_divisor, cut)


def _choose_best(
    count: int, size: tuple[int, ...], scores: Tensor | None, result: MaskSet, groups: Sequence[Sequence[int]]
) -> list[int]:
    """Check the groups of a result of masks of a size, and choose the mask of each with the highest score."""
    if len(groups) != len(result.masks):
        raise ValueError(f"restore: groups must be {len(result.masks)}, one for each mask, got {len(groups)}")
    result_size = tuple(result.masks.shape[1:])
    if size != result_size:
        raise ValueError(f"restore: result must be of size {size}, got {result_size}")
    values = [0.0] * count if scores is None else scores.tolist()
    best = []
    for group in groups:
        members = sorted(int(index) for index in group)
        if not members or members[0] < 0 or members[-1] >= count:
            raise ValueError(f"restore: groups must hold indices of {count} masks, got {members}")
        best.append(max(members, key=values.__getitem__))
    return best


# the first that accepts the masks reads them; to add a format, add it here and to FORMATS of tests/test_formats.py
FORMATS = (
    MaskFormat("a MaskSet", lambda masks: isinstance(masks, MaskSet), arrays.read_mask_set),
    MaskFormat("a label map (H, W) of integers", maps.is_label_map, maps.read_label_map),
    MaskFormat(
        "an array or a tensor (M, H, W)", lambda masks: isinstance(masks, (np.ndarray, Tensor)), arrays.read_stack
    ),
    MaskFormat("a PIL image", arrays.is_picture, maps.read_label_picture),
    MaskFormat("a panoptic map with its segments", maps.is_panoptic, maps.read_panoptic),
    MaskFormat("a list of records", records.is_records, records.read_records),
    MaskFormat("a list, set or generator of masks", arrays.is_collection, arrays.read_collection),
    MaskFormat("a dictionary of fields", fields.is_fields, fields.read_fields),
    MaskFormat("a dictionary that a model returns", fields.is_outputs, fields.read_outputs),
    MaskFormat("supervision's Detections", fields.is_detections, fields.read_detections),
    MaskFormat("detectron2's BitMasks", fields.is_bit_masks, fields.read_bit_masks),
    MaskFormat("detectron2's Instances", fields.is_instances, fields.read_instances),
)
