"""Contours of edge maps, for scoring them: ridges, thinning, and matching with a truth. On the CPU alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trace_fast import reference
from trace_fast.ops import checks, dispatch

__all__ = ["count_matches", "match_contours", "suppress_nonmaxima", "thin"]


def suppress_nonmaxima(edges: Tensor) -> Tensor:
    """Keep edges where they are strongest across themselves; 0 elsewhere.

    The map is smoothed by (1 2 1) / 4 along both axes. The normal of an edge is the direction in which the map,
    smoothed by a triangle of radius 4, has the largest second derivative by amount; a pixel stays unless the map one
    pixel away on either side along the normal, interpolated, is more than 1 % stronger. Such ridges are what benchmarks
    of edges threshold.

    Args:
        edges: (B, H, W) float32.

    Returns:
        (B, H, W) float32: the smoothed map, 0 where it yields to a neighbour.

    Raises:
        TypeError: edges is not a float32 tensor.
        ValueError: edges is not (B, H, W), or not on the CPU.

    Example:
        >>> suppress_nonmaxima(torch.rand(1, 6, 9)).shape
        torch.Size([1, 6, 9])
    """
    checks.tensor("suppress_nonmaxima", "edges", edges, "B H W", {}, torch.float32)
    if not _is_native("suppress_nonmaxima", edges=edges):
        return reference.suppress_nonmaxima(edges)
    from trace_fast import _C

    edges = edges.contiguous()
    batch, height, width = edges.shape
    suppressed = torch.empty_like(edges)
    threads = torch.get_num_threads()
    _C.suppress_nonmaxima(edges.data_ptr(), batch, height, width, suppressed.data_ptr(), threads)
    return suppressed


def thin(mask: Tensor) -> Tensor:
    """Thin a mask to lines of one pixel, by Guo and Hall; what was connected stays so (8-connectivity).

    Args:
        mask: (B, H, W) bool.

    Returns:
        (B, H, W) bool, part of the mask.

    Raises:
        TypeError: mask is not a bool tensor.
        ValueError: mask is not (B, H, W), or not on the CPU.

    Example:
        >>> thin(torch.ones(1, 3, 7, dtype=torch.bool)).int()[0, 1]
        tensor([0, 1, 1, 1, 1, 1, 0], dtype=torch.int32)
    """
    checks.tensor("thin", "mask", mask, "B H W", {}, torch.bool)
    if not _is_native("thin", mask=mask):
        return reference.thin(mask)
    from trace_fast import _C

    mask = mask.contiguous()
    batch, height, width = mask.shape
    thinned = torch.empty_like(mask)
    _C.thin(mask.data_ptr(), batch, height, width, thinned.data_ptr(), torch.get_num_threads())
    return thinned


def match_contours(detected: Tensor, truth: Tensor, distance: float) -> tuple[Tensor, Tensor]:
    """Pair pixels of two masks within a distance, one to one.

    As many pairs as there can be and, of all such choices, one with the smallest sum of distances: which pixels have a
    partner is not always unique, how many is.

    Args:
        detected: (B, H, W) bool.
        truth: (B, H, W) bool.
        distance: largest distance of a pair, in pixels, >= 0.

    Returns:
        Pixels of `detected`, and of `truth`, that have a partner, (B, H, W) bool each.

    Raises:
        TypeError: a mask is not a bool tensor, distance is no number.
        ValueError: shapes differ, a mask is not on the CPU, distance is negative or not finite.

    Example:
        >>> detected, truth = torch.eye(5).bool()[None], torch.eye(5).roll(1, 0).bool()[None]
        >>> [x.sum().item() for x in match_contours(detected, truth, 1.0)]
        [5, 5]
    """
    sizes: dict[str, int] = {}
    checks.tensor("match_contours", "detected", detected, "B H W", sizes, torch.bool)
    checks.tensor("match_contours", "truth", truth, "B H W", sizes, torch.bool)
    _check_distance("match_contours", distance)
    if not _is_native("match_contours", detected=detected, truth=truth):
        return reference.match_contours(detected, truth, distance)
    from trace_fast import _C

    detected, truth = detected.contiguous(), truth.contiguous()
    batch, height, width = truth.shape
    matched = torch.empty_like(detected), torch.empty_like(truth)
    inputs, outputs = (detected.data_ptr(), truth.data_ptr()), (matched[0].data_ptr(), matched[1].data_ptr())
    _C.match_contours(*inputs, batch, height, width, float(distance), *outputs, torch.get_num_threads())
    return matched


def count_matches(
    edges: Tensor,
    truths: Tensor,
    thresholds: Tensor | Sequence[float],
    distance: float,
    *,
    ignored: Tensor | None = None,
    groups: Tensor | None = None,
    num_groups: int = 1,
    thinning: bool = True,
) -> tuple[Tensor, Tensor]:
    """Count the pixels that match between an edge map, at each threshold, and the contours that annotators drew.

    At each threshold the pixels of at least that strength are thinned and matched with each annotator by
    `match_contours`. These counts, summed over images, are what ODS, OIS and AP of edges are made of.

    Args:
        edges: (H, W) float32, usually ridges (`suppress_nonmaxima`).
        truths: (A, H, W) bool, a contour map of each annotator.
        thresholds: (T,) float32, or a sequence.
        distance: largest distance of a pair, in pixels; the field uses 0.0075 of the image's diagonal.
        ignored: (H, W) bool, where a detection without a partner is no mistake; None for nowhere.
        groups: (A, H, W) uint8, a group for each contour pixel, to count the matched ones apart; None for one group.
        num_groups: G, more than any group.
        thinning: False where edges at every threshold are lines of one pixel already.

    Returns:
        Counts (T, 6) int64 and matched truth by group (T, G) int64. The columns of counts: truth pixels with a partner,
        and all, both summed over annotators; detected pixels with a partner in any annotator, and all that are not
        ignored; of the latter, those within the distance of any truth, whoever else is; truth pixels within the
        distance of any detection, summed over annotators. The last two are what clDice is made of.

    Raises:
        TypeError: a dtype differs from the above, distance is no number.
        ValueError: shapes differ, a tensor is not on the CPU, distance is negative, a group is not below num_groups.

    Example:
        >>> truth = torch.eye(9).bool()
        >>> counts, _ = count_matches(truth.float(), truth[None], [0.5], 1.0)
        >>> counts.tolist()
        [[9, 9, 9, 9, 9, 9]]
    """
    op = "count_matches"
    sizes: dict[str, int] = {}
    thresholds = torch.as_tensor(thresholds, dtype=torch.float32)
    checks.tensor(op, "edges", edges, "H W", sizes, torch.float32)
    checks.tensor(op, "truths", truths, "A H W", sizes, torch.bool)
    checks.tensor(op, "thresholds", thresholds, "T", sizes, torch.float32)
    _check_distance(op, distance)
    ignored = torch.zeros_like(edges, dtype=torch.bool) if ignored is None else ignored
    groups = torch.zeros_like(truths, dtype=torch.uint8) if groups is None else groups
    checks.tensor(op, "ignored", ignored, "H W", sizes, torch.bool)
    checks.tensor(op, "groups", groups, "A H W", sizes, torch.uint8)
    largest = int(groups.max())
    if largest >= num_groups:
        raise ValueError(f"{op}: groups must be below num_groups = {num_groups}, got {largest}")
    tensors = {"edges": edges, "truths": truths, "thresholds": thresholds, "ignored": ignored, "groups": groups}
    if not _is_native(op, **tensors):
        return reference.count_matches(
            edges,
            truths,
            thresholds,
            distance,
            ignored=ignored,
            groups=groups,
            num_groups=num_groups,
            thinning=thinning,
        )
    from trace_fast import _C

    counts = torch.empty(len(thresholds), 6, dtype=torch.int64)
    by_group = torch.empty(len(thresholds), num_groups, dtype=torch.int64)
    given = [x.contiguous() for x in (edges, truths, ignored, groups, thresholds)]
    annotators, height, width = truths.shape
    _C.count_matches(
        given[0].data_ptr(),
        given[1].data_ptr(),
        given[2].data_ptr(),
        given[3].data_ptr(),
        given[4].data_ptr(),
        annotators,
        height,
        width,
        len(thresholds),
        num_groups,
        float(distance),
        thinning,
        counts.data_ptr(),
        by_group.data_ptr(),
        torch.get_num_threads(),
    )
    return counts, by_group


def _is_native(op: str, **tensors: Tensor) -> bool:
    """Whether the native core serves; the reference is the other choice."""
    for name, value in tensors.items():
        if value.device.type != "cpu":
            raise ValueError(f"{op}: {name} must be on the cpu, got {value.device}")
    return dispatch.choose(op, "cpu") == "native"


def _check_distance(op: str, distance: float) -> None:
    """Require a finite length."""
    checks.number(op, "distance", distance)
    if not 0 <= distance < float("inf"):
        raise ValueError(f"{op}: distance must be finite and >= 0, got {distance}")
