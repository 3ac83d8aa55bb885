"""The ops: checked, and served by the implementation that `trace_fast.backends()` names, registered with torch.

Those on contours are for scoring, on the CPU alone: plain functions of the native core or the reference. Same names and
signatures as `trace_fast.reference`, which is their specification.
"""

from trace_fast.ops.attention import (
    accumulate_attention,
    accumulate_resized,
    attention_map,
    readout,
    resize_attention,
)
from trace_fast.ops.contours import count_matches, match_contours, suppress_nonmaxima, thin
from trace_fast.ops.divergence import abdiv, step_kl, step_kl_abdiv
from trace_fast.ops.regions import flood_fill, label_regions, merge_masks, random_walk

__all__ = [
    "abdiv",
    "accumulate_attention",
    "accumulate_resized",
    "attention_map",
    "count_matches",
    "flood_fill",
    "label_regions",
    "match_contours",
    "merge_masks",
    "random_walk",
    "readout",
    "resize_attention",
    "step_kl",
    "step_kl_abdiv",
    "suppress_nonmaxima",
    "thin",
]
