"""Masks as records, one mapping for each: those of SAM, of COCO's files and of transformers' pipelines."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trace_fast.io.arrays import mask_areas, mask_boxes
from trace_fast.masks import rle
from trace_fast.masks.formats.arrays import read_entries, write_entries
from trace_fast.masks.formats.base import (
    MaskSet,
    Options,
    Write,
    convert_scores,
    find_changed,
    read_classes,
    to_xywh,
    update_scores,
)

__all__ = ["MASK_KEYS", "is_records", "read_records"]

MASK_KEYS = ("segmentation", "mask")
SCORE_KEYS = ("predicted_iou", "score")


def is_records(masks: Any) -> bool:
    """Tell whether an object is a list of mappings, some of which hold a mask."""
    return isinstance(masks, (list, tuple)) and any(
        isinstance(entry, Mapping) and any(key in entry for key in MASK_KEYS) for entry in masks
    )


def read_records(records: Sequence[Mapping[str, Any]], options: Options) -> tuple[MaskSet, Write]:
    """Read records with a mask each."""
    mask_key = next(key for key in MASK_KEYS if any(isinstance(one, Mapping) and key in one for one in records))
    for index, record in enumerate(records):
        if not isinstance(record, Mapping) or mask_key not in record:
            raise ValueError(f"open_masks: masks[{index}] must have a {mask_key} like others, got none")
    segmentations = [record[mask_key] for record in records]
    masks = read_entries(segmentations, options, allow_polygons=True)
    score_key = next((key for key in SCORE_KEYS if _has_scores(records, key)), None)
    scores = None
    if score_key:
        scores = convert_scores("open_masks", score_key, _collect(records, score_key), len(records)).to(masks.device)
    mask_set = MaskSet(masks, None if scores is None else scores.float(), _read_record_classes(records, masks.device))

    def write(result: MaskSet, best: list[int]) -> Any:
        is_changed = find_changed(mask_set, result, best)
        values = None if scores is None else update_scores(scores, mask_set, result, best).tolist()
        # other encodings of a mask stay as they are, where it does
        encodings = [segmentations[index] for index in best]
        chosen = [k for k, old in enumerate(encodings) if is_changed[k] or isinstance(old, (np.ndarray, Tensor))]
        written_masks = write_entries([result.masks[k] for k in chosen], [encodings[k] for k in chosen])
        rewritten = dict(zip(chosen, written_masks, strict=True))
        areas = mask_areas(result.masks).tolist()
        boxes = to_xywh(mask_boxes(result.masks, last=score_key == "predicted_iou")).tolist()
        used: set[int] = set()
        written = []
        for k, index in enumerate(best):
            record = {**records[index], mask_key: rewritten[k] if k in rewritten else copy.deepcopy(encodings[k])}
            if score_key and values is not None:
                record[score_key] = values[k]
            if is_changed[k]:
                record |= {key: value for key, value in (("area", areas[k]), ("bbox", boxes[k])) if key in record}
                # it was measured on the mask as it was
                record.pop("stability_score", None)
                if "point_coords" in record:
                    record["point_coords"] = find_inner_points(result.masks[k], record["point_coords"])
            if index in used:
                # ids are unique in a file, whose others are not known here
                record.pop("id", None)
            used.add(index)
            written.append(record)
        return tuple(written) if isinstance(records, tuple) else written

    return mask_set, write


def find_inner_points(mask: Tensor, points: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the points (x, y) that are inside a mask (H, W); if there are none, the pixel nearest to its center."""
    height, width = mask.shape
    inner = [
        list(point)
        for point in points
        if 0 <= point[0] < width and 0 <= point[1] < height and mask[int(point[1]), int(point[0])]
    ]
    pixels = mask.nonzero().flip(1).double()  # (n, 2) of (x, y)
    if inner or not len(pixels):
        return inner
    nearest = (pixels - pixels.mean(0)).square().sum(1).argmin()
    return [pixels[nearest].tolist()]


def _has_scores(records: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Tell whether records have a score; transformers' pipelines write None where there is none."""
    return key in records[0] and (key != "score" or any(record.get(key) is not None for record in records))


def _read_record_classes(records: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor | None:
    """Read the category_id of each record; or number the labels, which are names, where there are some."""
    if "category_id" in records[0]:
        numbers = [_read_category(record, index) for index, record in enumerate(records)]
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    if "label" in records[0]:
        return read_classes("open_masks", "label", _collect(records, "label"), len(records)).to(device)
    return None


def _collect(records: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    """Collect a field that every record must have."""
    for index, record in enumerate(records):
        if key not in record:
            raise ValueError(f"open_masks: masks[{index}] must have a {key} like masks[0], got none")
    return [record[key] for record in records]


def _read_category(record: Mapping[str, Any], index: int) -> int:
    """Read the category_id of a record."""
    try:
        return rle.read_integer(record, "category_id")
    except ValueError as problem:
        raise ValueError(f"open_masks: masks[{index}]: {problem}") from problem
