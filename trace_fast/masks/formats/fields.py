"""Masks as fields of one length: dictionaries, supervision's `Detections`, detectron2's `Instances` and `BitMasks`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trace_fast.io.arrays import dtype_name, mask_boxes
from trace_fast.masks import rle
from trace_fast.masks.formats.arrays import read_collection, read_stack
from trace_fast.masks.formats.base import (
    INTEGER_DTYPES,
    MaskSet,
    Options,
    Write,
    convert_like,
    convert_scores,
    find_changed,
    is_instance,
    read_classes,
    update_scores,
)
from trace_fast.masks.formats.maps import read_panoptic

__all__ = [
    "is_bit_masks",
    "is_detections",
    "is_fields",
    "is_instances",
    "is_outputs",
    "read_bit_masks",
    "read_detections",
    "read_fields",
    "read_instances",
    "read_outputs",
]

# names of the fields of IRNet, DHR, transformers and torchvision
MASK_FIELDS = ("masks", "mask")
SCORE_FIELDS = ("scores", "score")
CLASS_FIELDS = ("keys", "class", "classes", "labels")
BOX_FIELDS = ("boxes", "bounding_boxes")
RLE_FIELD = "rle_mask"
# what a dictionary may hold the masks in, the first that it has
OUTPUT_FIELDS = ("instances", "panoptic_seg", "segmentation")


def is_fields(masks: Any) -> bool:
    """Tell whether an object is a dictionary with a field of masks."""
    return isinstance(masks, Mapping) and any(key in masks for key in MASK_FIELDS)


def read_fields(fields: Mapping[str, Any], options: Options) -> tuple[MaskSet, Write]:
    """Read a dictionary of masks and perhaps scores, classes, boxes and further fields."""
    mask_key, score_key, class_key = (
        next((key for key in keys if key in fields), None) for keys in (MASK_FIELDS, SCORE_FIELDS, CLASS_FIELDS)
    )
    assert mask_key is not None
    stack = fields[mask_key]
    read_masks: Any = read_stack if isinstance(stack, (np.ndarray, Tensor)) else read_collection
    mask_set, write_masks = read_masks(stack, options)
    masks = mask_set.masks
    count = len(masks)
    scores = None
    if score_key is not None:
        scores = convert_scores("open_masks", score_key, fields[score_key], count).to(masks.device)
    classes = None
    if class_key is not None:
        classes = read_classes("open_masks", class_key, fields[class_key], count).to(masks.device)
    mask_set = MaskSet(masks, None if scores is None else scores.float(), classes)

    def write(result: MaskSet, best: list[int]) -> Any:
        written = {key: _pick(value, best, count) for key, value in fields.items()}
        written[mask_key] = write_masks(result, best)
        if score_key is not None and scores is not None:
            values, like = update_scores(scores, mask_set, result, best), fields[score_key]
            is_array = isinstance(like, (np.ndarray, Tensor))
            written[score_key] = convert_like(values, like) if is_array else values.tolist()
        changed = [k for k, one in enumerate(find_changed(mask_set, result, best)) if one]
        boxes = mask_boxes(result.masks, last=True)
        for key in BOX_FIELDS:
            if key in fields:
                for k in changed:
                    written[key][k] = convert_like(boxes[k], written[key][k])
        if RLE_FIELD in fields:
            encoded = rle.encode_rles("open_masks", result.masks.cpu().numpy())
            for k in changed:
                counts = rle.decode_run_lengths(encoded[k]).tolist()
                written[RLE_FIELD][k] = {"size": list(masks.shape[1:]), "counts": counts}
        return written

    return mask_set, write


def is_outputs(masks: Any) -> bool:
    """Tell whether an object is the dictionary that detectron2's or transformers' models return for an image."""
    return isinstance(masks, Mapping) and any(key in masks for key in OUTPUT_FIELDS)


def read_outputs(outputs: Mapping[str, Any], options: Options) -> tuple[MaskSet, Write]:
    """Read a dictionary that holds `Instances`, or a map and its segments; other fields are kept as they are."""
    key = next(key for key in OUTPUT_FIELDS if key in outputs)
    inner = outputs[key]
    if key == "segmentation":
        segments = outputs.get("segments_info")
        if not isinstance(inner, (np.ndarray, Tensor)) or not isinstance(segments, list):
            raise ValueError("open_masks: masks must have a segmentation (H, W) and segments_info, got others")
        # transformers' ids are floats in some models
        labels = inner if dtype_name(inner) in INTEGER_DTYPES else _round(inner)
        mask_set, write = read_panoptic((labels, segments), options)
    else:
        mask_set, write = (read_instances if key == "instances" else read_panoptic)(inner, options)

    def write_outputs(result: MaskSet, best: list[int]) -> Any:
        written = write(result, best)
        if key != "segmentation":
            return {**outputs, key: written}
        segment_map = torch.as_tensor(written[0])
        return {**outputs, "segmentation": convert_like(segment_map, inner), "segments_info": written[1]}

    return mask_set, write_outputs


def is_detections(masks: Any) -> bool:
    """Tell whether an object is `supervision.Detections`."""
    return is_instance(masks, "supervision", "Detections")


def read_detections(detections: Any, options: Options) -> tuple[MaskSet, Write]:
    """Read `supervision.Detections`."""
    dense = detections.mask
    if dense is None:
        if len(detections):
            raise ValueError("open_masks: masks must be Detections with a mask, got boxes alone")
        dense = np.zeros((0, *(options.size or (0, 0))), dtype=bool)
    masks = read_stack(np.asarray(dense), options)[0].masks
    scores = None
    if detections.confidence is not None:
        scores = convert_scores("open_masks", "confidence", detections.confidence, len(masks))
    classes = (
        None if detections.class_id is None else read_classes("open_masks", "class_id", detections.class_id, len(masks))
    )
    mask_set = MaskSet(masks, None if scores is None else scores.float(), classes)

    def write(result: MaskSet, best: list[int]) -> Any:
        fields = {"xyxy": convert_like(mask_boxes(result.masks, last=True), detections.xyxy)}
        if scores is not None:
            fields["confidence"] = convert_like(update_scores(scores, mask_set, result, best), detections.confidence)
        if isinstance(detections.mask, np.ndarray):
            fields["mask"] = convert_like(result.masks, detections.mask)
        elif detections.mask is not None:  # a CompactMask
            fields["mask"] = type(detections.mask).from_dense(
                result.masks.cpu().numpy(), fields["xyxy"], tuple(result.masks.shape[1:])
            )
        if detections.tracker_id is not None:
            fields["tracker_id"] = _number_tracks(detections.tracker_id, best)
        return replace(detections[np.array(best, dtype=np.int64)], **fields)

    return mask_set, write


def is_instances(masks: Any) -> bool:
    """Tell whether an object is detectron2's `Instances`, or one like it."""
    return hasattr(masks, "image_size") and hasattr(masks, "get_fields")


def read_instances(instances: Any, options: Options) -> tuple[MaskSet, Write]:
    """Read detectron2's `Instances`."""
    fields = instances.get_fields()
    stack = fields.get("pred_masks")
    if not isinstance(stack, Tensor):
        raise TypeError(f"open_masks: masks must be Instances with a tensor pred_masks, got {type(stack).__name__}")
    masks = read_stack(stack, options)[0].masks
    if masks.shape[1:] != tuple(instances.image_size):
        raise ValueError(
            f"open_masks: pred_masks must be of image_size {tuple(instances.image_size)}, got {tuple(masks.shape[1:])}"
        )
    scores = convert_scores("open_masks", "scores", fields["scores"], len(masks)) if "scores" in fields else None
    classes = None
    if "pred_classes" in fields:
        classes = read_classes("open_masks", "pred_classes", fields["pred_classes"], len(masks))
    mask_set = MaskSet(masks, None if scores is None else scores.float(), classes)

    def write(result: MaskSet, best: list[int]) -> Any:
        chosen = instances[torch.tensor(best, dtype=torch.int64, device=stack.device)]
        chosen.pred_masks = convert_like(result.masks, stack)
        if scores is not None:
            chosen.scores = convert_like(update_scores(scores, mask_set, result, best), fields["scores"])
        if "pred_boxes" in fields:
            boxes = mask_boxes(result.masks).to(stack.device, torch.float32)
            chosen.pred_boxes = type(fields["pred_boxes"])(boxes)
        return chosen

    return mask_set, write


def is_bit_masks(masks: Any) -> bool:
    """Tell whether an object is detectron2's `BitMasks`, or one like it."""
    return hasattr(masks, "image_size") and isinstance(getattr(masks, "tensor", None), Tensor)


def read_bit_masks(bit_masks: Any, options: Options) -> tuple[MaskSet, Write]:
    """Read detectron2's `BitMasks`."""
    mask_set, write = read_stack(bit_masks.tensor, options)
    return mask_set, lambda result, best: type(bit_masks)(write(result, best))


def _pick(value: Any, best: list[int], count: int) -> Any:
    """Return the entries of a field for each mask, or what is no such field as it is."""
    if isinstance(value, Tensor) and value.ndim and len(value) == count:
        return value[torch.tensor(best, dtype=torch.int64, device=value.device)]
    if isinstance(value, np.ndarray) and value.ndim and len(value) == count:
        return value[np.array(best, dtype=np.int64)]
    if isinstance(value, list) and len(value) == count:
        return [value[index] for index in best]
    return value


def _number_tracks(tracker_ids: np.ndarray, best: list[int]) -> np.ndarray:
    """Return a tracker_id for each part: the first of a detection keeps it, and others have new ones."""
    fresh = int(tracker_ids.max(initial=-1)) + 1
    written = tracker_ids[np.array(best, dtype=np.int64)]
    used: set[int] = set()
    for k, index in enumerate(best):
        if index in used:
            written[k] = fresh
            fresh += 1
        used.add(index)
    return written


def _round(labels: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Convert a map of floats that are whole numbers to integers."""
    whole: Any = labels.long() if isinstance(labels, Tensor) else labels.astype(np.int64)
    if not (whole == labels).all():
        raise ValueError("open_masks: segmentation must be of whole numbers, got others")
    return whole
