"""Scores of edges, masks and panoptic segmentations: `evaluate`, and the metrics by themselves."""

from trace_fast.evaluation.api import evaluate
from trace_fast.evaluation.data import Contours, DataSet, Photo, find_contours, open_dataset
from trace_fast.evaluation.edges import Counts, EdgeScores, cldice, compare_edges, count_edges, score_edges
from trace_fast.evaluation.masks import MaskScores, compare_masks, mask_ap
from trace_fast.evaluation.methods import Method, open_method, read_map
from trace_fast.evaluation.panoptic import PanopticQuality, PanopticScores, Quality, panoptic_quality
from trace_fast.evaluation.report import Report

__all__ = [
    "Contours",
    "Counts",
    "DataSet",
    "EdgeScores",
    "MaskScores",
    "Method",
    "PanopticQuality",
    "PanopticScores",
    "Photo",
    "Quality",
    "Report",
    "cldice",
    "compare_edges",
    "compare_masks",
    "count_edges",
    "evaluate",
    "find_contours",
    "mask_ap",
    "open_dataset",
    "open_method",
    "panoptic_quality",
    "read_map",
    "score_edges",
]
