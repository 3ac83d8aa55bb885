"""Boundary-Guided Propagation (BGP): split masks at edges, complete them up to the edges, and merge them.

This is the third stage of TRACE, on masks of any origin. Pixels whose edges are at or above a threshold form a barrier.
It divides the image into regions; masks are split along the barrier and grow within the regions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, TypeVar, Unpack, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trace_fast import ops
from trace_fast.extras import require
from trace_fast.io.arrays import mask_areas, mask_boxes
from trace_fast.io.images import read_edge_map
from trace_fast.masks.fitting import THRESHOLD, Part, draw_parts, fit_masks
from trace_fast.masks.formats import MaskSet, keep_visible, open_masks
from trace_fast.masks.formats.base import read_classes
from trace_fast.masks.hierarchy import Hierarchy, Nodes
from trace_fast.ops import checks
from trace_fast.reference.hierarchy import STRENGTHS, whole_strengths

__all__ = ["Seeds", "instances", "propagate", "seeds"]

RADIUS, BETA, STEPS = 5, 10.0, 256  # IRNet's random walk
WALK_SIZE = 128  # longer side of the image at which random walks are computed, in pixels
MIN_SHARE = 0.0005  # smallest fragment or region, as a share of the image
DUPLICATE = 0.7  # IoU above which one of two ranked masks is left out
CUT_OFF = 0.5  # factor of the score of a ranked mask at the image's border: part of its outline is unknown
NEIGHBORS = ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1]))  # all pixels that have one before them, and those

Item = TypeVar("Item")  # of lists of masks or records


@dataclass(frozen=True)
class Seeds:
    """Point and box prompts for promptable segmentation models, in SAM's convention.

    Attributes:
        points: (k, 2) float32, (x, y) in pixels: the pixel of each region that is farthest from its outline.
        boxes: (k, 4) float32, (x0, y0, x1, y1) in pixels: the first and last column and row of each region.
        radius: (k,) float32, distance from the point to the outline, in pixels; largest first.
    """

    points: Tensor
    boxes: Tensor
    radius: Tensor


class PropagateOptions(TypedDict, total=False):
    """Keyword arguments of `propagate`, none of which decides what it returns."""

    threshold: float | None
    mode: str
    iou: float
    classes: Sequence[int] | Tensor | None
    min_area: int | None
    cover: float
    exclusive: bool
    ignore: int | Iterable[int] | None
    label_divisor: int | None
    cut: float | None


@overload
def propagate(masks: Tensor, edges: Any, **options: Unpack[PropagateOptions]) -> Tensor: ...


@overload
def propagate(masks: np.ndarray, edges: Any, **options: Unpack[PropagateOptions]) -> np.ndarray: ...


@overload
def propagate(masks: MaskSet, edges: Any, **options: Unpack[PropagateOptions]) -> MaskSet: ...


@overload
def propagate(masks: list[Item], edges: Any, **options: Unpack[PropagateOptions]) -> list[Item]: ...


@overload
def propagate(masks: Any, edges: Any, **options: Unpack[PropagateOptions]) -> Any: ...


def propagate(
    masks: Any,
    edges: Any,
    *,
    threshold: float | None = None,
    mode: str = "fit",
    iou: float = 0.5,
    classes: Sequence[int] | Tensor | None = None,
    min_area: int | None = None,
    cover: float = 0.7,
    exclusive: bool = False,
    ignore: int | Iterable[int] | None = None,
    label_divisor: int | None = None,
    cut: float | None = None,
) -> Any:
    """Split, complete and merge masks along the edges of their image.

    Boundary-Guided Propagation, the third stage of TRACE. By default each mask is decided on its own, by the hierarchy
    of regions that `instances` ranks, and edges change it only where they contradict it:

    1. Its outline moves to edges nearby if it was drawn on a coarse grid, as those of vision transformers are: if the
       straight pieces of the outline are 5 pixels long on average. The mask takes the regions of which it covers 70 %
       and leaves those of which it covers no more than 30 %, where this moves the outline by at most 3/4 of such a
       piece and 2 % of the image's diagonal.
    2. It is split into its unconnected parts, where edges are around them, and at objects: the regions between
       boundaries that are at least 0.98 strong, as only edges that are certain are.
    3. Where masks cover a share of `cover` of an object together, the parts that lie mostly in it become the object.

    The paper's steps are those of the modes "flood" and "walk":

    1. Each mask is split into its connected parts off the edges. Parts smaller than `min_area` are joined to the
       nearest larger part.
    2. Each part is completed up to the edges, by flood fill or by random walk.
    3. Masks whose IoU is above `iou` are united until there are none (`ops.merge_masks`).

    The score of a part is its mask's score times its share of the mask's area; masks that become one keep the highest.

    Args:
        masks: masks of one image in any format that `trace_fast.masks.open_masks` reads, such as a (M, H, W) bool array
            or tensor, a list of masks, a label map or COCO results.
        edges: (H, W), (1, H, W) or (1, 1, H, W) float array or tensor in [0, 1], such as `trace_fast.edges` returns.
        threshold: edge strength, above 0 and at most 1, from which an edge separates. None is 0.15 with "fit", where
            masks confirm an edge, which may be weak. The other modes need it, for example the one of ODS that
            `trace-fast evaluate` reports.
        mode: "fit", "flood" or "walk". "flood" fills the region that the edges enclose if all parts together cover a
            share of `cover` of it. "walk" spreads each part by IRNet's random walk (radius 5, beta 10, 256 steps, on an
            image of at most 128 pixels a side): it passes through gaps in the edges, but no farther than the walk goes.
            Where no edge divides two classes, pixels of neither class go to the class whose walk is denser there.
        iou: intersection over union above which "flood" and "walk" unite masks, in [0, 1].
        classes: (M,) integers; masks are completed and united within a class only. None takes the classes of the masks,
            if they have any.
        min_area: area of the smallest part, in pixels; None is 0.05 % of the image.
        cover: smallest covered share of an object or, with "flood", of a region that is filled, in [0, 1]. A gap in the
            edges joins an object to its surroundings, and the masks cover little of such a region.
        exclusive: remove overlaps, as `trace_fast.masks.keep_visible` does: smaller masks lie on top.
        ignore: labels of a label map that are void; see `trace_fast.masks.open_masks`.
        label_divisor: of a label map whose labels are class * label_divisor + instance; see `open_masks`.
        cut: value above which a pixel of soft masks is inside; see `open_masks`.

    Returns:
        The masks in the format and on the device of `masks`. There may be more or fewer than before, and they may
        overlap unless `exclusive` is set.

    Raises:
        TypeError: masks have a format that is not listed, edges are not a float array or tensor, or an option has
            another type.
        ValueError: masks or edges are malformed, their sizes differ, or an option is out of range.

    Example:
        >>> mask, edges = np.ones((1, 9, 7), bool), np.zeros((9, 7), np.float32)
        >>> edges[4] = 1
        >>> propagate(mask, edges, min_area=1).sum((1, 2))
        array([35, 28])
    """
    edge_map = read_edge_map("propagate", edges)
    threshold = _choose_threshold(mode, threshold)
    barrier, min_area = _find_barrier("propagate", edge_map, threshold, min_area)
    for name, value in (("iou", iou), ("cover", cover)):
        checks.number("propagate", name, value, 0, 1)
    size = edge_map.shape[0], edge_map.shape[1]
    mask_set, restore = open_masks(masks, size, ignore=ignore, label_divisor=label_divisor, cut=cut)
    count, device = len(mask_set.masks), mask_set.masks.device
    mask_classes = mask_set.classes
    if classes is not None:
        mask_classes = read_classes("propagate", "classes", classes, count).to(device)
    if not count:
        return restore(mask_set, [])
    if mode == "fit":
        parts = fit_masks(mask_set, mask_classes, edge_map.cpu(), float(threshold), min_area, float(cover))
        scored = mask_set.scores is not None
        # the result takes as much memory
        del mask_set
        result, sources = _draw_parts(parts, size, scored, mask_classes, device)
    else:
        edge_map, barrier = edge_map.to(device), barrier.to(device)
        result, sources = _propagate_fragments(
            mask_set, mask_classes, edge_map, barrier, mode=mode, iou=iou, min_area=min_area, cover=float(cover)
        )
    return restore(*_remove_overlaps(result, sources) if exclusive else (result, sources))


def _draw_parts(
    parts: Sequence[Part], size: tuple[int, int], scored: bool, classes: Tensor | None, device: torch.device
) -> tuple[MaskSet, list[list[int]]]:
    """Return fitted masks of a size, with scores if asked for, and the indices of the masks that each comes from."""
    scores = torch.tensor([part.score for part in parts], dtype=torch.float32, device=device) if scored else None
    firsts = torch.tensor([part.sources[0] for part in parts], dtype=torch.int64, device=device)
    masks = draw_parts(parts, size).to(device)
    return MaskSet(masks, scores, None if classes is None else classes[firsts]), [part.sources for part in parts]


def _remove_overlaps(result: MaskSet, sources: Sequence[list[int]]) -> tuple[MaskSet, list[list[int]]]:
    """Return masks without overlaps, those that are hidden left out, and the sources of the others."""
    visible, indices = keep_visible(result.masks)
    fields = (None if field is None else field[indices] for field in (result.scores, result.classes))
    return MaskSet(visible, *fields), [sources[index] for index in indices.tolist()]


def _propagate_fragments(
    mask_set: MaskSet,
    classes: Tensor | None,
    edges: Tensor,
    barrier: Tensor,
    *,
    mode: str,
    iou: float,
    min_area: int,
    cover: float,
) -> tuple[MaskSet, list[list[int]]]:
    """Propagate masks as the paper does, and return the indices of the masks that each of the result comes from."""
    fragments = split_masks(mask_set.masks, barrier, min_area)
    sources = fragments.sources
    scores = mask_areas(fragments.masks).float() / mask_areas(mask_set.masks)[sources].clamp(min=1)
    if mask_set.scores is not None:
        scores = scores * mask_set.scores[sources]
    labels = torch.zeros_like(sources) if classes is None else classes[sources]
    if mode == "walk":
        fragments = replace(fragments, masks=complete_by_walk(fragments.masks, edges, labels))
    # once for all classes
    regions = find_regions(barrier) if mode == "flood" else None
    united_masks: list[Tensor] = []
    united_scores: list[Tensor] = []
    groups: list[Tensor] = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        parts = fragments.masks[members]
        if regions is not None:
            parts = complete_by_flood(parts, regions, cover)
        united, group, best = ops.merge_masks(parts, iou, scores[members].float())
        assert best is not None
        united_masks.append(united)
        united_scores.append(best)
        groups += [members[group == k] for k in range(len(united))]
    # in the order of their first parts
    order = sorted(range(len(groups)), key=lambda k: int(groups[k][0]))
    result = MaskSet(
        torch.cat(united_masks)[order],
        None if mask_set.scores is None else torch.cat(united_scores)[order],
        None if classes is None else torch.stack([labels[groups[k][0]] for k in order]),
    )
    return result, [sources[groups[k]].unique().tolist() for k in order]


def instances(
    edges: Any, *, threshold: float | None = None, k: int = 100, min_area: int | None = None
) -> tuple[Tensor, Tensor]:
    """Find masks from edges alone: the regions that they enclose.

    They come from a hierarchy: the basins of the edges merge at the weakest boundary until one is left
    (`ops.watershed`, `ops.merge_tree`). The strength of a boundary is a mean, so that a gap does not open it.

    Args:
        edges: (H, W), (1, H, W) or (1, 1, H, W) float array or tensor in [0, 1].
        threshold: None, for masks of all levels of the hierarchy; or the mean edge strength, above 0 and at most 1,
            from which a boundary separates regions, for a partition of the image.
        k: largest number of masks; without effect on a partition.
        min_area: area of the smallest region, in pixels; None is 0.05 % of the image. In a partition it counts pixels
            whose edges are below `threshold`.

    Returns:
        Masks (M, H, W) bool and their scores (M,) float32 in [0, 1], sorted by score, largest first, and on the device
        of edges.

        Without a threshold the score of a mask is the mean edge strength along the boundary at which it merges, minus
        that of its pixels: how much stronger its outline is than what is inside. At the border of the image, where
        most of the background is, it is half of that. Masks lie beside or within each other, and of two whose IoU is
        above 0.7 the one with the higher score is there. The whole image is never one of them.

        With a threshold the masks do not overlap, and they cover the image, if there are any: regions that are too
        small go to those nearest. The score is the mean edge strength along the outline of the mask.

    Raises:
        TypeError: edges are not a float array or tensor, or an option has another type.
        ValueError: edges are not of one image or not in [0, 1], or an option is out of range.

    Example:
        >>> edges = torch.zeros(9, 7)
        >>> edges[4, 1:] = 1  # there is a gap at the left
        >>> masks, scores = instances(edges, threshold=0.5, min_area=1)
        >>> masks.flatten(1).sum(1).tolist()
        [35, 28]
        >>> masks, scores = instances(edges, min_area=1)
        >>> masks.flatten(1).sum(1).tolist(), [round(score, 2) for score in scores.tolist()]
        ([28, 35], [0.43, 0.34])
    """
    edge_map = read_edge_map("instances", edges)
    checks.integer("instances", "k", k, 1)
    if threshold is None:
        return _rank_regions(edge_map, int(k), _smallest_area("instances", edge_map, min_area))
    barrier, min_area = _find_barrier("instances", edge_map, threshold, min_area)
    regions = cut_regions(edge_map, threshold, barrier, min_area)
    labels, count = regions.filled, len(regions.areas)
    # the outline of a mask is its pixels beside another mask
    outline = torch.zeros_like(barrier)
    for one, other in NEIGHBORS:
        change = labels[one] != labels[other]
        outline[one] |= change
        outline[other] |= change
    # the edge pixel itself may belong to the mask on the other side
    strength = functional.max_pool2d(edge_map[None], 3, 1, 1)[0]
    total = torch.bincount(labels[outline], strength[outline].double(), minlength=count)
    scores = (total / torch.bincount(labels[outline], minlength=count).clamp(min=1)).float()
    chosen = regions.areas.nonzero()[:, 0]
    chosen = chosen[torch.argsort(scores[chosen], descending=True, stable=True)]
    return labels == chosen[:, None, None], scores[chosen]


def seeds(edges: Any, k: int, *, threshold: float, min_area: int | None = None) -> Seeds:
    """Find point and box prompts for SAM and similar models: one for each region that the edges enclose.

    The regions are those of `instances` with the same threshold, without the pixels of edges at or above it.

    Args:
        edges: (H, W), (1, H, W) or (1, 1, H, W) float array or tensor in [0, 1].
        k: largest number of seeds; regions with the largest inscribed circles come first.
        threshold: mean edge strength, above 0 and at most 1, from which a boundary separates regions.
        min_area: area of the smallest region, in pixels; None is 0.05 % of the image.

    Returns:
        At most k seeds, on the device of edges; none if the edges leave no region.

    Raises:
        TypeError: edges are not a float array or tensor, or an option has another type.
        ValueError: edges are not of one image or not in [0, 1], or an option is out of range.
        RuntimeError: scipy is not installed.

    Example:
        >>> edges = torch.zeros(9, 21)
        >>> edges[:, 9] = 1
        >>> seeds(edges, 2, threshold=0.5).points.tolist()
        [[4.0, 4.0], [14.0, 4.0]]
    """
    edge_map = read_edge_map("seeds", edges)
    checks.integer("seeds", "k", k, 1)
    barrier, min_area = _find_barrier("seeds", edge_map, threshold, min_area)
    require("seeds", "scipy")
    from scipy import ndimage

    regions = cut_regions(edge_map, threshold, barrier, min_area)
    # in a gap, where two regions touch, their outlines are the pixels on both sides
    outside = regions.labels == 0
    for one, other in NEIGHBORS:
        touching = (regions.labels[one] != regions.labels[other]) & ~barrier[one] & ~barrier[other]
        outside[one] |= touching
        outside[other] |= touching
    # the border of the image counts as a barrier
    distance = torch.from_numpy(ndimage.distance_transform_edt(np.pad(~outside.cpu().numpy(), 1))[1:-1, 1:-1])
    distance, flat_labels = distance.flatten().to(barrier.device), regions.labels.flatten()
    radius = distance.new_zeros(len(regions.areas)).scatter_reduce(0, flat_labels, distance, "amax")
    order = torch.argsort(radius, descending=True, stable=True)[: int(k)]
    order = order[radius[order] > 0]
    points, boxes = [], []
    for region in order.tolist():
        pixels = (regions.labels == region).nonzero()  # (n, 2) of (y, x)
        y, x = pixels[distance[flat_labels == region].argmax()].tolist()
        top, left = pixels.amin(0).tolist()
        bottom, right = pixels.amax(0).tolist()
        points.append((x, y))
        boxes.append((left, top, right, bottom))
    options: dict[str, Any] = {"dtype": torch.float32, "device": edge_map.device}
    return Seeds(
        torch.tensor(points, **options).reshape(-1, 2),
        torch.tensor(boxes, **options).reshape(-1, 4),
        radius[order].float(),
    )


@dataclass(frozen=True)
class Fragments:
    """Parts of masks.

    Attributes:
        masks: (F, H, W) bool.
        sources: (F,) int64, index of the mask that each part comes from.
    """

    masks: Tensor
    sources: Tensor


@dataclass(frozen=True)
class Regions:
    """Regions of an image that a barrier separates, R of them, numbered from 1.

    Attributes:
        labels: (H, W) int64, the region of each pixel, 0 on the barrier.
        filled: (H, W) int64, likewise, with each barrier pixel in the region nearest to it.
        areas: (R + 1,) int64, pixels of each region in `labels`; areas[0] is 0.
    """

    labels: Tensor
    filled: Tensor
    areas: Tensor


def find_regions(barrier: Tensor) -> Regions:
    """Find the regions that a barrier (H, W) bool separates."""
    labels, counts = ops.label_regions(barrier[None])
    filled = ops.flood_fill(labels, barrier[None], claim_barrier=True)
    areas = torch.bincount(labels.flatten(), minlength=int(counts) + 1)
    areas[0] = 0
    return Regions(labels[0].long(), filled[0].long(), areas)


def cut_regions(edges: Tensor, threshold: float, barrier: Tensor, min_area: int) -> Regions:
    """Find the regions between boundaries whose mean edge strength is at least a threshold.

    Args:
        edges: (H, W) float32 in [0, 1].
        threshold: strength from which a boundary separates.
        barrier: (H, W) bool, the pixels of edges that are as strong.
        min_area: area of the smallest region off the barrier, in pixels; smaller ones go to those nearest, in steps
            along the axes.

    Returns:
        The regions; none if all are too small.
    """
    basins, tree = Hierarchy.of(edges)
    # strengths are rounded, and an edge as strong as the threshold separates
    least = round(float(threshold) * STRENGTHS) / STRENGTHS
    tops = tree.cut(least).to(edges.device)
    _, parts = tops[basins].unique(return_inverse=True)
    areas = torch.bincount(parts[~barrier], minlength=int(parts.max()) + 1)
    large = areas >= min_area
    numbers = torch.where(large, large.cumsum(0), 0)
    filled = ops.flood_fill(numbers[parts].int()[None], torch.zeros_like(barrier)[None])[0].long()
    labels = filled.masked_fill(barrier, 0)
    sizes = torch.bincount(labels.flatten(), minlength=int(large.sum()) + 1)
    sizes[0] = 0
    return Regions(labels, filled, sizes)


def _rank_regions(edges: Tensor, k: int, min_area: int) -> tuple[Tensor, Tensor]:
    """Return at most k nodes of the hierarchy of edges as masks, and their scores; see `instances`."""
    basins, tree = Hierarchy.of(edges)
    nodes = Nodes.of(basins, tree)
    areas, start, stop = (torch.from_numpy(values) for values in (nodes.areas, nodes.start, nodes.stop))
    # sums of whole strengths are exact
    strengths = torch.from_numpy(nodes.sums(whole_strengths(edges).cpu().numpy()))
    scores = (tree.levels[tree.parents] - strengths / (areas * STRENGTHS).double()).clamp(0, 1).float()
    border = np.ones(nodes.places.shape, bool)
    border[1:-1, 1:-1] = False
    scores[torch.from_numpy(nodes.sums(border) > 0)] *= CUT_OFF
    # the last node is the whole image
    candidates = ((areas >= min_area) & (scores > 0))[:-1].nonzero()[:, 0]
    candidates = candidates[torch.argsort(scores[candidates], descending=True, stable=True)]
    chosen: list[int] = []
    while len(candidates) and len(chosen) < k:
        best = candidates[0]
        chosen.append(int(best))
        # nodes lie within each other or do not overlap
        nested = (start[candidates] <= start[best]) & (stop[best] <= stop[candidates])
        nested |= (start[best] <= start[candidates]) & (stop[candidates] <= stop[best])
        smaller, larger = areas[candidates].minimum(areas[best]), areas[candidates].maximum(areas[best])
        candidates = candidates[~nested | (smaller <= DUPLICATE * larger)]
        candidates = candidates[candidates != best]
    return torch.from_numpy(nodes.make_masks(chosen)).to(edges.device), scores[chosen].to(edges.device)


def split_masks(masks: Tensor, barrier: Tensor, min_area: int) -> Fragments:
    """Split masks where a barrier crosses them.

    A fragment is a connected part of a mask off the barrier, of at least `min_area` pixels. The other pixels of the
    mask, on the barrier or in smaller parts, go to the fragment nearest within the mask, so that no pixel is lost. A
    mask without a fragment of that size is kept whole.

    Args:
        masks: (M, H, W) bool, M at least 1.
        barrier: (H, W) bool.
        min_area: in pixels, at least 1.

    Returns:
        At least one fragment of each mask, in the order of the masks; those of one mask do not overlap.
    """
    pieces: list[Tensor] = []
    sources: list[int] = []
    for index, (mask, (left, top, right, bottom)) in enumerate(zip(masks, mask_boxes(masks).tolist(), strict=True)):
        inside = mask[top:bottom, left:right]
        fragments = _split_mask(inside, barrier[top:bottom, left:right], min_area) if inside.numel() else [inside]
        for fragment in fragments:
            piece = mask
            if len(fragments) > 1:
                piece = torch.zeros_like(mask)
                piece[top:bottom, left:right] = fragment
            pieces.append(piece)
            sources.append(index)
    return Fragments(torch.stack(pieces), torch.tensor(sources, dtype=torch.int64, device=masks.device))


def _split_mask(mask: Tensor, barrier: Tensor, min_area: int) -> list[Tensor]:
    """Split one mask (H, W), within its box; see `split_masks`."""
    parts, counts = ops.label_regions((~mask | barrier)[None])
    count, labels = int(counts), parts[0]
    areas = torch.bincount(labels.flatten(), minlength=count + 1)
    areas[0] = 0
    large = (areas >= min_area).nonzero()[:, 0]
    if len(large) < 2:
        return [mask]
    numbers = areas.new_zeros(count + 1)
    numbers[large] = torch.arange(1, len(large) + 1, device=large.device)
    grown = ops.flood_fill(numbers[labels.long()].int()[None], ~mask[None])[0]
    # pixels of the mask that no fragment reaches within it go to the first
    grown = torch.where(mask & (grown == 0), 1, grown)
    return [grown == k for k in range(1, len(large) + 1)]


def complete_by_flood(fragments: Tensor, regions: Regions, cover: float) -> Tensor:
    """Let each fragment fill the region that holds most of it.

    Args:
        fragments: (F, H, W) bool.
        regions: those of the barrier.
        cover: smallest share of a region that all fragments together must cover for it to be filled; a gap in the
            barrier joins an object to its surroundings, and fragments cover little of such a region.

    Returns:
        (F, H, W) bool: each fragment with its region, if that is filled, and without the barrier pixels that are nearer
        to another region.
    """
    count = len(regions.areas)
    inside = torch.stack([torch.bincount(regions.labels[mask], minlength=count) for mask in fragments])  # (F, R + 1)
    inside[:, 0] = 0
    covered = torch.bincount(regions.labels[fragments.any(0)], minlength=count)
    is_filled = covered >= cover * regions.areas.float()
    largest, home = inside.max(1)  # (F,)
    completed = ((largest > 0) & is_filled[home])[:, None, None]
    off_barrier = fragments & (regions.labels > 0)
    return torch.where(completed, off_barrier | (regions.filled == home[:, None, None]), fragments)


def complete_by_walk(fragments: Tensor, edges: Tensor, classes: Tensor, size: int = WALK_SIZE) -> Tensor:
    """Let each fragment spread by a random walk that edges hold back, as far as half of its greatest density.

    Args:
        fragments: (F, H, W) bool.
        edges: (H, W) float32 in [0, 1].
        classes: (F,) integers; a fragment does not spread to pixels of another class, or where another is denser.
        size: longer side at which the walk is computed, in pixels; larger images are reduced to it.

    Returns:
        (F, H, W) bool; each fragment keeps all its pixels.
    """
    height, width = edges.shape
    scale = min(1.0, size / max(height, width))
    small = max(1, round(height * scale)), max(1, round(width * scale))
    # the maximum keeps thin edges closed
    reduced = functional.adaptive_max_pool2d(edges[None], small)[0]
    density = ops.random_walk(functional.adaptive_avg_pool2d(fragments.float(), small), reduced, RADIUS, BETA, STEPS)
    density = functional.interpolate(density[None], (height, width), mode="bilinear")[0]
    reached = density > density.amax((1, 2), keepdim=True) / 2
    labels, index = classes.unique(return_inverse=True)
    # the pixels of a class are its own
    claims = [
        density[index == k].amax(0).masked_fill(fragments[index == k].any(0), torch.inf) for k in range(len(labels))
    ]
    return fragments | (reached & (torch.stack(claims).argmax(0) == index[:, None, None]))


def _choose_threshold(mode: str, threshold: float | None) -> float:
    """Return the threshold of a mode, both checked."""
    checks.choice("propagate", "mode", mode, "fit", "flood", "walk")
    if threshold is None and mode != "fit":
        raise ValueError(f"propagate: threshold must be given with mode {mode}, got None")
    return THRESHOLD if threshold is None else threshold


def _find_barrier(op: str, edges: Tensor, threshold: float, min_area: int | None) -> tuple[Tensor, int]:
    """Return the pixels of edges that separate, (H, W) bool, and the smallest area in pixels, both checked."""
    checks.number(op, "threshold", threshold)
    if not 0 < threshold <= 1:
        raise ValueError(f"{op}: threshold must be above 0 and at most 1, got {threshold}")
    return edges >= float(threshold), _smallest_area(op, edges, min_area)


def _smallest_area(op: str, edges: Tensor, min_area: int | None) -> int:
    """Return the smallest area of a region of edges in pixels, checked."""
    if min_area is None:
        min_area = max(1, round(edges.numel() * MIN_SHARE))
    checks.integer(op, "min_area", min_area, 1)
    # an area beyond the image is as good as any other
    return min(int(min_area), edges.numel() + 1)
