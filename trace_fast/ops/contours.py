"""Contours of edge maps, for scoring: ridges, thinning, and matching with a truth. On the CPU alone."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from trace_fast import reference
from trace_fast.ops import checks, dispatch
from trace_fast.ops.dispatch import register

__all__ = ["count_matches", "match_contours", "suppress_nonmaxima", "thin"]

SUPPRESSIONS = ("bsds", "hessian")  # methods of `suppress_nonmaxima`


@register(cuda="unavailable")
def suppress_nonmaxima(edges: Tensor, method: str = "bsds") -> Tensor:
    """Run the fastest implementation of `trace_fast.reference.suppress_nonmaxima`.

    Note:
        edges are float32, on the CPU.

    Raises:
        TypeError: edges is not a float32 tensor.
        ValueError: edges is not (B, H, W), or not on the CPU, or there is no such method.
    """
    checks.tensor("suppress_nonmaxima", "edges", edges, "B H W", {}, torch.float32)
    checks.choice("suppress_nonmaxima", "method", method, *SUPPRESSIONS)
    checks.image("suppress_nonmaxima", "edges", edges)
    # the result, and four maps of one image
    checks.memory("suppress_nonmaxima", "edges", edges, 4 * edges.numel() + 16 * edges[0].numel() if len(edges) else 0)
    if _choose("suppress_nonmaxima", edges=edges) == "reference":
        return reference.suppress_nonmaxima(edges, method)
    from trace_fast import _C

    edges = edges.contiguous()
    batch, height, width = edges.shape
    suppressed = torch.empty_like(edges)
    threads = dispatch.count_threads()
    like_bsds = method == "bsds"
    _C.cpu.suppress_nonmaxima(edges.data_ptr(), batch, height, width, like_bsds, suppressed.data_ptr(), threads)
    return suppressed


@register(cuda="unavailable")
def thin(mask: Tensor) -> Tensor:
    """Run the fastest implementation of `trace_fast.reference.thin`.

    Note:
        mask is on the CPU.

    Raises:
        TypeError: mask is not a bool tensor.
        ValueError: mask is not (B, H, W), or not on the CPU.
    """
    checks.tensor("thin", "mask", mask, "B H W", {}, torch.bool)
    checks.image("thin", "mask", mask)
    checks.memory("thin", "mask", mask, mask.numel())
    if _choose("thin", mask=mask) == "reference":
        return reference.thin(mask)
    from trace_fast import _C

    mask = mask.contiguous()
    batch, height, width = mask.shape
    thinned = torch.empty_like(mask)
    _C.cpu.thin(mask.data_ptr(), batch, height, width, thinned.data_ptr(), dispatch.count_threads())
    return thinned


@register(cuda="unavailable")
def match_contours(detected: Tensor, truth: Tensor, distance: float) -> tuple[Tensor, Tensor]:
    """Run the fastest implementation of `trace_fast.reference.match_contours`.

    Note:
        Masks are on the CPU. The reference needs scipy, and memory for the distances of all pairs of pixels.

    Raises:
        TypeError: a mask is not a bool tensor, or distance is not a number.
        ValueError: shapes differ, a mask is not on the CPU, or distance is negative or not finite.
    """
    op = "match_contours"
    sizes: dict[str, int] = {}
    checks.tensor(op, "detected", detected, "B H W", sizes, torch.bool)
    checks.tensor(op, "truth", truth, "B H W", sizes, torch.bool)
    checks.image(op, "detected", detected)
    distance = _limit_distance(op, distance, sizes["H"], sizes["W"])
    checks.memory(op, "detected", detected, 2 * detected.numel() + _matching_bytes(sizes["H"], sizes["W"], distance))
    if _choose(op, detected=detected, truth=truth) == "reference":
        return reference.match_contours(detected, truth, distance)
    from trace_fast import _C

    detected, truth = detected.contiguous(), truth.contiguous()
    batch, height, width = truth.shape
    matched = torch.empty_like(detected), torch.empty_like(truth)
    inputs, outputs = (detected.data_ptr(), truth.data_ptr()), (matched[0].data_ptr(), matched[1].data_ptr())
    _C.cpu.match_contours(*inputs, batch, height, width, distance, *outputs, dispatch.count_threads())
    return matched


@register(cuda="unavailable")
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
    """Run the fastest implementation of `trace_fast.reference.count_matches`.

    Note:
        edges and thresholds are float32. All tensors are on the CPU. The reference needs scipy.

    Raises:
        TypeError: a tensor has another dtype, or distance is not a number.
        ValueError: shapes differ, a tensor is not on the CPU, distance is negative or not finite, or a group is not
            below num_groups, which is from 1 to 256.
    """
    op = "count_matches"
    sizes: dict[str, int] = {}
    if not isinstance(thresholds, Tensor):
        if not isinstance(thresholds, Iterable):
            raise TypeError(f"{op}: thresholds must be numbers, got {type(thresholds).__name__}")
        for threshold in thresholds:
            checks.number(op, "thresholds", threshold)
        thresholds = torch.tensor(list(thresholds), dtype=torch.float32)
    checks.tensor(op, "edges", edges, "H W", sizes, torch.float32)
    checks.tensor(op, "truths", truths, "A H W", sizes, torch.bool)
    checks.tensor(op, "thresholds", thresholds, "T", sizes, torch.float32)
    checks.image(op, "edges", edges)
    distance = _limit_distance(op, distance, sizes["H"], sizes["W"])
    # a byte of the groups and a bit for each pixel of the annotators
    needed = truths.numel() + truths.numel() // 8 + _matching_bytes(sizes["H"], sizes["W"], distance)
    checks.memory(op, "truths", truths, needed)
    checks.integer(op, "num_groups", num_groups, 1, 256)
    checks.choice(op, "thinning", thinning, False, True)
    ignored = torch.zeros_like(edges, dtype=torch.bool) if ignored is None else ignored
    groups = torch.zeros_like(truths, dtype=torch.uint8) if groups is None else groups
    checks.tensor(op, "ignored", ignored, "H W", sizes, torch.bool)
    checks.tensor(op, "groups", groups, "A H W", sizes, torch.uint8)
    backend = _choose(op, edges=edges, truths=truths, thresholds=thresholds, ignored=ignored, groups=groups)
    largest = int(groups.max())
    if largest >= num_groups:
        raise ValueError(f"{op}: groups must be below num_groups = {num_groups}, got {largest}")
    if backend == "reference":
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
    edges, truths, ignored, groups, thresholds = (
        tensor.contiguous() for tensor in (edges, truths, ignored, groups, thresholds)
    )
    maps = edges.data_ptr(), truths.data_ptr(), ignored.data_ptr(), groups.data_ptr(), thresholds.data_ptr()
    annotators, height, width = truths.shape
    lengths = annotators, height, width, len(thresholds), num_groups
    outputs = counts.data_ptr(), by_group.data_ptr()
    _C.cpu.count_matches(*maps, *lengths, distance, thinning, *outputs, dispatch.count_threads())
    return counts, by_group


def _choose(op: str, **tensors: Tensor) -> str:
    """Require tensors, given by name, on the CPU, and return the implementation."""
    for name, value in tensors.items():
        if value.device.type != "cpu":
            raise ValueError(f"{op}: {name} must be on the cpu, got {value.device}")
    checks.values(op, **tensors)
    return dispatch.choose(op, "cpu")


def _limit_distance(op: str, distance: float, height: int, width: int) -> float:
    """Require a finite length, and return it or, if it is less, the image's diagonal, which no pair exceeds."""
    diagonal = math.hypot(height, width)
    # an integer may be beyond all floats
    if isinstance(distance, int) and distance > diagonal:
        return diagonal
    if isinstance(distance, float) and not 0 <= distance < float("inf"):
        raise ValueError(f"{op}: distance must be finite and >= 0, got {distance}")
    checks.number(op, "distance", distance, 0)
    return float(min(distance, diagonal))


def _matching_bytes(height: int, width: int, distance: float) -> int:
    """Return the bytes that the matching of two images takes: 48 for a pixel, and 8 for a pixel of the disc."""
    return 48 * height * width + 8 * (2 * int(distance) + 1) ** 2
