"""Masks: formats, COCO files, propagation along edges, and export."""

from trace_fast.masks.coco import (
    ImageInstances,
    ImageSegments,
    Instance,
    Instances,
    Panoptic,
    encode_masks,
    read_annotations,
    read_instances,
    read_panoptic,
    read_results,
)
from trace_fast.masks.export import (
    make_panoptic_segments,
    make_predictor_prompts,
    make_sam_prompts,
    refine_results,
    write_coco_results,
    write_palette,
    write_panoptic,
)
from trace_fast.masks.formats import MaskSet, keep_visible, open_masks, paint_labels, semantic_masks
from trace_fast.masks.propagation import Seeds, instances, propagate, seeds

__all__ = [
    "ImageInstances",
    "ImageSegments",
    "Instance",
    "Instances",
    "MaskSet",
    "Panoptic",
    "Seeds",
    "encode_masks",
    "instances",
    "keep_visible",
    "make_panoptic_segments",
    "make_predictor_prompts",
    "make_sam_prompts",
    "open_masks",
    "paint_labels",
    "propagate",
    "read_annotations",
    "read_instances",
    "read_panoptic",
    "read_results",
    "refine_results",
    "seeds",
    "semantic_masks",
    "write_coco_results",
    "write_palette",
    "write_panoptic",
]
