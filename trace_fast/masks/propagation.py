"""Boundary-Guided Propagation: masks are split where edges cross them, completed up to the edges, and merged.

The paper's third step (BGP), on masks of any origin. Edges at or above a threshold are a barrier; the regions that it
leaves, each with the barrier pixels nearest to it, are what masks are split along and grow into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trace_fast import ops
from trace_fast.io.arrays import array_to_tensor, mask_areas
from trace_fast.masks.formats import MaskSet, open_masks
from trace_fast.ops import checks

__all__ = ["Seeds", "instances", "propagate", "seeds"]

RADIUS, BETA, STEPS = 5, 10.0, 256  # IRNet's walk
WALK_SIZE = 128  # pixels of the longer side that walks take place at
MIN_SHARE = 0.0005  # of the image: the smallest fragment or region


@dataclass(frozen=True)
class Seeds:
    """Prompts for models that segment what is pointed at, in SAM's convention.

    Attributes:
        points: (k, 2) float32, (x, y) in pixels: of each region the pixel farthest from its outline.
        boxes: (k, 4) float32, (x0, y0, x1, y1) in pixels, of the region's first and last column and row.
        radius: (k,) float32, how far the point is from the outline, in pixels; largest first.
    """

    points: Tensor
    boxes: Tensor
    radius: Tensor


def propagate(
    masks: Any,
    edges: Any,
    *,
    threshold: float,
    mode: str = "flood",
    iou: float = 0.5,
    classes: Sequence[int] | Tensor | None = None,
    min_area: int | None = None,
    cover: float = 0.7,
) -> Any:
    """Split, complete and merge masks by the edges of their image (BGP, the paper's third step).

    1. A mask is split into its connected parts off the edges; parts below `min_area` go to the nearest larger one. A
       part keeps that share of its mask's score which it has of its area.
    2. Each part is completed up to the edges: filled or walked, see `mode`.
    3. Masks whose IoU is above `iou` are united until none are left (`ops.merge_masks`); the highest score stays.

    Args:
        masks: of one image, in any kind that `formats.open_masks` reads: (M, H, W) bool array or tensor, lists of
            masks, a label map, SAM's records, COCO RLE or results, `supervision.Detections`, detectron2 `Instances`,
            `MaskSet`.
        edges: (H, W) or (1, 1, H, W) float array or tensor in [0, 1], such as `trace_fast.edges` gives.
        threshold: strength from which an edge separates, such as the one of ODS that `trace-fast evaluate` reports.
        mode: "flood" fills the region that the edges enclose, if parts together cover `cover` of it; "walk" spreads a
            part by IRNet's random walk (radius 5, beta 10, 256 steps, on at most 128 pixels a side), which goes round
            gaps in edges but no farther than the walk does. Where no edge divides two classes, pixels that neither mask
            had go to the class whose walk brings more there.
        iou: above which masks are united, in [0, 1].
        classes: (M,) integers; masks are completed and united within a class alone. None takes those that the masks
            have, if they have any.
        min_area: smallest part, in pixels; None is 0.05 % of the image.
        cover: of "flood", share of a region in [0, 1]; a gap in the edges joins an object to its surroundings, and
            those are covered by little.

    Returns:
        The kind that came in, on its device. Masks may be more or fewer than before, and may overlap.

    Raises:
        TypeError, ValueError: an argument is not what is said above, or sizes differ.

    Example:
        >>> mask, edges = np.ones((1, 9, 9), bool), np.zeros((9, 9), np.float32)
        >>> edges[4] = 1
        >>> propagate(mask, edges, threshold=0.5, min_area=1).sum((1, 2))
        array([45, 36])
    """
    edges = check_edges("propagate", edges)
    barrier, min_area = _barrier("propagate", edges, threshold, min_area)
    if mode not in ("flood", "walk"):
        raise ValueError(f"propagate: mode must be flood or walk, got {mode!r}")
    for name, value in (("iou", iou), ("cover", cover)):
        checks.number("propagate", name, value, 0, 1)
    found, close = open_masks(masks, tuple(edges.shape))
    if classes is None:
        kinds = found.classes
    else:
        kinds = torch.as_tensor(classes, dtype=torch.int64, device=found.masks.device)
        if kinds.shape != (len(found.masks),):
            raise ValueError(f"propagate: classes must be ({len(found.masks)},), got {tuple(kinds.shape)}")
    edges, barrier = edges.to(found.masks.device), barrier.to(found.masks.device)

    fragments = split_masks(found.masks, barrier, min_area)
    sources = fragments.sources
    scores = mask_areas(fragments.masks).float() / mask_areas(found.masks)[sources].clamp(min=1)
    if found.scores is not None:
        scores = scores * found.scores[sources]
    labels = torch.zeros_like(sources) if kinds is None else kinds[sources]
    walked = complete_walk(fragments.masks, edges, labels) if mode == "walk" else None
    merged: list[Tensor] = []
    kept: list[Tensor] = []
    groups: list[Tensor] = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        parts = complete_flood(fragments.masks[members], barrier, float(cover)) if walked is None else walked[members]
        united, group, best = ops.merge_masks(parts, iou, scores[members].float())
        assert best is not None
        merged.append(united)
        kept.append(best)
        groups += [members[group == k] for k in range(len(united))]
    if not merged:
        return close(found, [])
    # in the order of their first parts
    order = sorted(range(len(groups)), key=lambda k: int(groups[k][0]))
    result = MaskSet(
        torch.cat(merged)[order],
        None if found.scores is None else torch.cat(kept)[order],
        None if kinds is None else torch.stack([labels[groups[k][0]] for k in order]),
    )
    return close(result, [sources[groups[k]].unique().tolist() for k in order])


def instances(edges: Any, *, threshold: float, min_area: int | None = None) -> tuple[Tensor, Tensor]:
    """Masks from an edge map alone: the regions that its edges enclose.

    Args:
        edges: (H, W) float array or tensor in [0, 1], or (1, 1, H, W).
        threshold: strength from which an edge is a barrier.
        min_area: smallest region, in pixels; None is 0.05 % of the image.

    Returns:
        Masks (M, H, W) bool, each with the barrier pixels nearest to it, so that they fill the image but for what is
        too small; and scores (M,) float32, the mean strength of the edges along each mask's outline. Largest score
        first. All on the device of edges.

    Raises:
        TypeError, ValueError: an argument is not what is said above.

    Example:
        >>> edges = torch.zeros(9, 9)
        >>> edges[4] = 1
        >>> masks, scores = instances(edges, threshold=0.5, min_area=1)
        >>> masks.flatten(1).sum(1).tolist(), scores.tolist()
        ([45, 36], [1.0, 1.0])
    """
    edges = check_edges("instances", edges)
    barrier, min_area = _barrier("instances", edges, threshold, min_area)
    regions, count, whole = partition(barrier)
    area = torch.bincount(regions.flatten(), minlength=count + 1)
    area[0] = 0
    # a mask's outline: its pixels beside those of another
    outline = torch.zeros_like(barrier)
    for one, other in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):
        change = whole[one] != whole[other]
        outline[one] |= change
        outline[other] |= change
    # the barrier may have been claimed by the other side
    near = functional.max_pool2d(edges[None], 3, 1, 1)[0]
    strength = torch.bincount(whole[outline], near[outline].double(), minlength=count + 1)
    scores = (strength / torch.bincount(whole[outline], minlength=count + 1).clamp(min=1)).float()
    chosen = (area >= min_area).nonzero()[:, 0]
    chosen = chosen[torch.argsort(scores[chosen], descending=True, stable=True)]
    return whole == chosen[:, None, None], scores[chosen]


def seeds(edges: Any, k: int, *, threshold: float, min_area: int | None = None) -> Seeds:
    """Points and boxes of the regions that edges enclose, for prompting SAM and its kin.

    Args:
        edges: (H, W) float array or tensor in [0, 1], or (1, 1, H, W).
        k: at most so many, those with the largest inscribed circles; none where the edges leave nothing.
        threshold: strength from which an edge is a barrier.
        min_area: smallest region, in pixels; None is 0.05 % of the image.

    Returns:
        Seeds on the device of edges.

    Raises:
        TypeError, ValueError: an argument is not what is said above.
        RuntimeError: scipy is not installed.

    Example:
        >>> edges = torch.zeros(9, 21)
        >>> edges[:, 9] = 1
        >>> seeds(edges, 2, threshold=0.5).points.tolist()
        [[4.0, 4.0], [14.0, 4.0]]
    """
    edges = check_edges("seeds", edges)
    checks.integer("seeds", "k", k, 1)
    barrier, min_area = _barrier("seeds", edges, threshold, min_area)
    try:
        from scipy import ndimage
    except ImportError as error:
        raise RuntimeError("seeds: needs scipy: pip install scipy") from error

    regions, count, _ = partition(barrier)
    area = torch.bincount(regions.flatten(), minlength=count + 1)
    # the image ends where a barrier would be
    depth = torch.from_numpy(ndimage.distance_transform_edt(np.pad(~barrier.cpu().numpy(), 1))[1:-1, 1:-1])
    depth, flat = depth.flatten().to(regions.device), regions.flatten()
    deepest = depth.new_zeros(count + 1).scatter_reduce(0, flat, depth, "amax")
    deepest[0] = 0
    deepest[area < min_area] = 0
    order = torch.argsort(deepest, descending=True, stable=True)[: int(k)]
    order = order[deepest[order] > 0]
    points, boxes = [], []
    for region in order.tolist():
        pixels = (regions == region).nonzero()  # (n, 2) of (y, x)
        inside = depth[flat == region]
        y, x = pixels[inside.argmax()].tolist()
        top, left = pixels.amin(0).tolist()
        bottom, right = pixels.amax(0).tolist()
        points.append((x, y))
        boxes.append((left, top, right, bottom))
    made = {"dtype": torch.float32, "device": edges.device}
    return Seeds(
        torch.tensor(points, **made).reshape(-1, 2),
        torch.tensor(boxes, **made).reshape(-1, 4),
        deepest[order].float(),
    )


@dataclass(frozen=True)
class Fragments:
    """Pieces of masks.

    Attributes:
        masks: (F, H, W) bool.
        sources: (F,) int64, the mask that each is a piece of.
    """

    masks: Tensor
    sources: Tensor


def split_masks(masks: Tensor, barrier: Tensor, min_area: int) -> Fragments:
    """Split masks where a barrier crosses them.

    A fragment is a connected part of a mask off the barrier, of at least `min_area` pixels; what is left of the mask,
    barrier and crumbs, goes to the fragment nearest within the mask, so that nothing is lost. A mask without a fragment
    of that size stays as it is.

    Args:
        masks: (M, H, W) bool.
        barrier: (H, W) bool.
        min_area: in pixels, at least 1.

    Returns:
        At least one fragment of each mask, in their order; those of one mask do not overlap.
    """
    parts, counts = ops.label_regions(~masks | barrier)
    pieces, sources = [], []
    for index, (mask, labels, count) in enumerate(zip(masks, parts, counts.tolist(), strict=True)):
        areas = torch.bincount(labels.flatten(), minlength=count + 1)
        areas[0] = 0
        large = (areas >= min_area).nonzero()[:, 0]
        if len(large) > 1:
            number = areas.new_zeros(count + 1)
            number[large] = torch.arange(1, len(large) + 1, device=large.device)
            grown = ops.flood_fill(number[labels.long()].int()[None], ~mask[None])[0]
            # parts of the mask that no fragment reaches within it stay with the first
            grown = torch.where(mask & (grown == 0), 1, grown)
            pieces += [grown == k for k in range(1, len(large) + 1)]
        else:
            pieces.append(mask)
        sources += [index] * max(len(large), 1)
    if not pieces:
        return Fragments(masks, torch.zeros(0, dtype=torch.int64, device=masks.device))
    return Fragments(torch.stack(pieces), torch.tensor(sources, dtype=torch.int64, device=masks.device))


def complete_flood(fragments: Tensor, barrier: Tensor, cover: float) -> Tensor:
    """Let fragments fill the region of the barrier that they lie in.

    Args:
        fragments: (F, H, W) bool.
        barrier: (H, W) bool.
        cover: a region is filled where all fragments together cover at least this share of it; a leak in the barrier
            joins an object to what is around it, and that is covered by little.

    Returns:
        (F, H, W) bool: each fragment; where the region that holds most of it is filled, with that, and of the barrier
        with those pixels alone that are nearest to the region.
    """
    regions, count, whole = partition(barrier)
    if not count or not len(fragments):
        return fragments
    inside = torch.stack([torch.bincount(regions[each], minlength=count + 1) for each in fragments])  # (F, R)
    inside[:, 0] = 0
    covered = torch.bincount(regions[fragments.any(0)], minlength=count + 1)
    fills = covered >= cover * torch.bincount(regions.flatten(), minlength=count + 1).float()
    most, home = inside.max(1)  # (F,)
    filled = ((most > 0) & fills[home])[:, None, None]
    return torch.where(filled, (fragments & ~barrier) | (whole == home[:, None, None]), fragments)


def complete_walk(fragments: Tensor, edges: Tensor, classes: Tensor, size: int = WALK_SIZE) -> Tensor:
    """Let fragments spread by the random walk that edges hold back, as far as half of their greatest density.

    Args:
        fragments: (F, H, W) bool.
        edges: (H, W) float32 in [0, 1].
        classes: (F,) integers; a fragment does not spread to where another class was, or is denser.
        size: of the longer side, in pixels, at which the walk takes place; larger images are reduced to it.

    Returns:
        (F, H, W) bool; a fragment keeps all that it had.
    """
    if not len(fragments):
        return fragments
    height, width = edges.shape
    scale = min(1.0, size / max(height, width))
    small = max(1, round(height * scale)), max(1, round(width * scale))
    # an edge stays an edge when it is reduced
    reduced = functional.adaptive_max_pool2d(edges[None], small)[0]
    density = ops.random_walk(functional.adaptive_avg_pool2d(fragments.float(), small), reduced, RADIUS, BETA, STEPS)
    density = functional.interpolate(density[None], (height, width), mode="bilinear")[0]
    reached = density > density.amax((1, 2), keepdim=True) / 2
    kinds, index = classes.unique(return_inverse=True)
    # what a class had is its own
    claims = [
        density[index == k].amax(0).masked_fill(fragments[index == k].any(0), torch.inf) for k in range(len(kinds))
    ]
    return fragments | (reached & (torch.stack(claims).argmax(0) == index[:, None, None]))


def partition(barrier: Tensor) -> tuple[Tensor, int, Tensor]:
    """Regions (H, W) int64 of a barrier, 0 on it; their number; and regions with the barrier nearest to each."""
    regions, counts = ops.label_regions(barrier[None])
    whole = ops.flood_fill(regions, barrier[None], claim_barrier=True)
    return regions[0].long(), int(counts), whole[0].long()


def check_edges(op: str, edges: Any) -> Tensor:
    """An edge map of one image as (H, W) float32, where it is."""
    if not isinstance(edges, (np.ndarray, Tensor)):
        raise TypeError(f"{op}: edges must be an array or a tensor, got {type(edges).__name__}")
    edges = edges if isinstance(edges, Tensor) else array_to_tensor(edges)
    if not edges.is_floating_point():
        raise TypeError(f"{op}: edges must be float, got {str(edges.dtype).removeprefix('torch.')}")
    plane = edges[0, 0] if edges.ndim == 4 and edges.shape[:2] == (1, 1) else edges
    if plane.ndim != 2 or not plane.numel():
        raise ValueError(f"{op}: edges must be (H, W) or (1, 1, H, W), none of them 0, got {tuple(edges.shape)}")
    low, high = (bound.item() for bound in plane.aminmax())
    if not (low >= 0 and high <= 1):  # a NaN fails, too
        raise ValueError(f"{op}: edges must be finite and in [0, 1], got values from {low:g} to {high:g}")
    return plane.float()


def _barrier(op: str, edges: Tensor, threshold: float, min_area: int | None) -> tuple[Tensor, int]:
    """Pixels of edges that are a barrier, and the smallest area."""
    checks.number(op, "threshold", threshold)
    if not 0 < threshold <= 1:
        raise ValueError(f"{op}: threshold must be above 0, at most 1, got {threshold}")
    if min_area is None:
        min_area = max(1, round(edges.numel() * MIN_SHARE))
    checks.integer(op, "min_area", min_area, 1)
    return edges >= float(threshold), int(min_area)
