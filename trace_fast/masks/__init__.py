"""Masks: their formats, COCO files, propagation inside edges, and export."""

from trace_fast.masks import coco, export, formats, propagation

__all__ = ["coco", "export", "formats", "propagation"]
