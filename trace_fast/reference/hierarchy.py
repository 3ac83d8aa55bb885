"""Hierarchies of regions: the watershed of an edge map, and the tree in which regions merge at their boundaries."""

import torch
from torch import Tensor

from trace_fast.reference.precision import sum_dtype
from trace_fast.reference.regions import grow, label_regions, lowest_neighbor, number_roots

__all__ = ["merge_tree", "watershed"]

# edge strengths are counted in units of 1 / STRENGTHS, so that sums do not depend on their order
STRENGTHS = 2**16


def watershed(edges: Tensor) -> tuple[Tensor, Tensor]:
    """Divide edge maps into basins: one around each minimum, which meet on the ridges.

    Edges are clamped to [0, 1] and rounded to multiples of 2^-16, and are the heights of a relief. In a connected set
    of pixels of one height that touches no lower pixel, as the ground without an edge, a pixel is the lower the more
    steps it is away from the outside of the set, so that a gap in a line, where the ground is narrow, is a ridge. A
    minimum is a connected set of pixels of one height and depth that touches no lower pixel. Basins grow from the
    minima, from the lowest pixels to the highest: a pixel belongs to the basin of the lowest pixel that it touches, and
    one that touches no lower pixel to the basin that is the fewest steps over pixels of its height away; among equals
    it is the basin with the lowest label. Steps are along the axes. No pixel is left between the basins.

    Args:
        edges: (B, H, W) float.

    Returns:
        Labels (B, H, W) int32, 1 to n in the raster order of the first pixel of each minimum; and n, the number of
        basins, (B,) int32.

    Example:
        >>> watershed(torch.tensor([[[0.0, 0.5, 0.0], [0.0, 0.9, 0.2]]]))[0]
        tensor([[[1, 1, 2],
                 [1, 1, 2]]], dtype=torch.int32)
    """
    strengths = whole_strengths(edges)
    outside = edges.shape[1] * edges.shape[2]
    index = torch.arange(outside, device=edges.device).repeat(len(edges), 1)
    # until all are found, the label of a minimum is 1 plus the index of its first pixel
    labels = torch.zeros_like(strengths)
    ranks, rank = labels.long(), 0
    for strength in strengths.unique():
        ground = strengths == strength
        labels = _flood(labels, ranks, ground)
        lowest = ground & (labels == 0)
        for layer in _layers(lowest):
            labels = _flood(labels, ranks, layer)
            beyond = ~(layer & (labels == 0))
            parts = label_regions(beyond)[0].flatten(1).long()
            first = index.new_full((len(edges), outside + 1), outside).scatter_reduce(1, parts, index, "amin")
            labels = torch.where(beyond, labels, first.gather(1, parts).view_as(labels).int() + 1)
            ranks, rank = torch.where(layer, rank, ranks), rank + 1
        ranks, rank = torch.where(ground & ~lowest, rank, ranks), rank + 1
    roots = labels.flatten(1).long() - 1
    return number_roots(roots.view_as(labels), torch.zeros_like(ground))


def merge_tree(labels: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the regions of an image two by two, always at the weakest boundary, until one is left.

    The strength of a boundary is the mean, over all pairs of pixels beside each other along the axes that it separates,
    of the stronger of the two edges, clamped to [0, 1] and rounded to multiples of 2^-16. So a missing pixel weakens a
    boundary without opening it. Among boundaries of equal strength, the one whose first pair comes first in raster
    order goes first; the pair to the right of a pixel comes before the pair below it.

    Args:
        labels: (H, W) int32, 1 to n, each of them present.
        edges: (H, W) float.

    Returns:
        The nodes of a tree: n leaves, for the labels in order, and n - 1 unions in the order in which they arise.
        Parents (2n - 1,) int32, the node of which each is a part, always a later one; the last node, the whole image,
        is its own. And levels (2n - 1,) float32 in [0, 1], ascending: the strength of the boundary at which the two
        parts of a node merged, 0 for a leaf.

    Example:
        >>> merge_tree(torch.tensor([[1, 2, 2, 3]], dtype=torch.int32), torch.tensor([[0.0, 0.5, 0.0, 0.25]]))
        (tensor([4, 3, 3, 4, 4], dtype=torch.int32), tensor([0.0000, 0.0000, 0.0000, 0.2500, 0.5000]))
    """
    regions, strengths = (labels - 1).tolist(), whole_strengths(edges).tolist()
    height, width = labels.shape
    boundaries: dict[frozenset[int], list[int]] = {}  # sum of strengths, number of pairs and rank of the first
    for y in range(height):
        for x in range(width):
            for below, beside in ((y, x + 1), (y + 1, x)):
                if below == height or beside == width or regions[y][x] == regions[below][beside]:
                    continue
                pair = frozenset((regions[y][x], regions[below][beside]))
                boundary = boundaries.setdefault(pair, [0, 0, len(boundaries)])
                boundary[0] += max(strengths[y][x], strengths[below][beside])
                boundary[1] += 1

    count = int(labels.max())
    parents, levels = list(range(2 * count - 1)), [0.0] * (2 * count - 1)
    for node in range(count, 2 * count - 1):
        weakest = min(boundaries, key=lambda pair: (boundaries[pair][0] / boundaries[pair][1], boundaries[pair][2]))
        total, pairs, _ = boundaries.pop(weakest)
        levels[node] = total / pairs / STRENGTHS
        for part in weakest:
            parents[part] = node
        for pair in [pair for pair in boundaries if pair & weakest]:
            total, pairs, rank = boundaries.pop(pair)
            joined = boundaries.setdefault(pair - weakest | {node}, [0, 0, rank])
            joined[:] = joined[0] + total, joined[1] + pairs, min(joined[2], rank)
    parts, strength = torch.tensor(parents, dtype=torch.int32), torch.tensor(levels, dtype=torch.float32)
    return parts.to(labels.device), strength.to(labels.device)


def whole_strengths(edges: Tensor) -> Tensor:
    """Return edges in units of 1 / STRENGTHS, int32, rounded to the nearest and, between two, to the even one."""
    return (edges.to(sum_dtype(edges)).nan_to_num(0).clamp(0, 1) * STRENGTHS).round().int()


def _flood(labels: Tensor, ranks: Tensor, ground: Tensor) -> Tensor:
    """Grow labels, 0 for none, over the ground, at first from the pixels of the lowest rank."""
    none = 2**62
    lowest = lowest_neighbor(torch.where(labels > 0, ranks * 2**31 + labels, none), 4, none)
    reached = torch.where(ground & (labels == 0) & (lowest < none), lowest % 2**31, labels)
    return grow(reached, ground, 4)


def _layers(ground: Tensor) -> list[Tensor]:
    """Return the pixels of the ground by the number of steps to its outside, the farthest ones first."""
    layers = []
    while ground.any():
        outermost = ground & (lowest_neighbor(ground.int(), 4, 1) == 0)
        # a whole image has no outside
        layers.append(torch.where(outermost.flatten(1).any(1)[:, None, None], outermost, ground))
        ground = ground & ~layers[-1]
    return layers[::-1]
