"""Regions between edges, and masks over them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trace_fast.reference.precision import sum_dtype

__all__ = ["flood_fill", "label_regions", "merge_masks", "random_walk"]


def label_regions(barrier: Tensor, connectivity: int = 4) -> tuple[Tensor, Tensor]:
    """Label the connected regions that a barrier separates.

    Two pixels off the barrier belong to one region if a path of steps off the barrier connects them. A step of
    connectivity 8 may pass between two barrier pixels that touch at a corner.

    Args:
        barrier: (B, H, W) bool.
        connectivity: 4, steps along the axes, or 8, diagonal steps too.

    Returns:
        Labels (B, H, W) int32, 0 on the barrier, else 1 to n in the raster order of each region's first pixel; and n,
        the number of regions, (B,) int32.

    Example:
        >>> label_regions(torch.tensor([[[False, True, False], [False, True, True]]]))[0]
        tensor([[[1, 0, 2],
                 [1, 0, 0]]], dtype=torch.int32)
    """
    batch, outside = len(barrier), barrier.shape[1] * barrier.shape[2]
    roots, changed = torch.arange(outside, device=barrier.device).repeat(batch, 1), True
    # each root is linked to the lowest one next to its region, then every pixel moves up, until nothing changes
    while changed:
        neighbor_roots = roots.view_as(barrier).masked_fill(barrier, outside)
        lowest = lowest_neighbor(neighbor_roots, connectivity, outside)
        lowest = torch.where(barrier, outside, lowest).flatten(1)
        linked = roots.scatter_reduce(1, roots, lowest, "amin")
        moved = linked.gather(1, linked)
        changed = not torch.equal(moved, roots)
        roots = moved
    return number_roots(roots.view_as(barrier), barrier)


def flood_fill(seeds: Tensor, barrier: Tensor, connectivity: int = 4, claim_barrier: bool = False) -> Tensor:
    """Grow labeled seeds until they meet each other or a barrier.

    Every pixel off the barrier takes the label of the seed that is the fewest steps off the barrier away, and the
    lowest label among seeds at the same distance.

    Args:
        seeds: (B, H, W) int32 labels, at least 1; a pixel with a lower value is not a seed, nor is one on the barrier.
        barrier: (B, H, W) bool.
        connectivity: 4, steps along the axes, or 8, diagonal steps too.
        claim_barrier: whether the labels finally grow over the barrier too, from all pixels labeled so far and by the
            same rule, but in steps on the barrier alone.

    Returns:
        (B, H, W) int32, 0 where no seed can reach.

    Example:
        >>> barrier = torch.tensor([[[False, False, True, False]]])
        >>> flood_fill(torch.tensor([[[7, 0, 0, 0]]], dtype=torch.int32), barrier)
        tensor([[[7, 7, 0, 0]]], dtype=torch.int32)
    """
    labels = grow(seeds.clamp_min(0).masked_fill(barrier, 0), ~barrier, connectivity)
    return grow(labels, barrier, connectivity) if claim_barrier else labels


def random_walk(masks: Tensor, edges: Tensor, radius: int = 5, beta: float = 10, steps: int = 256) -> Tensor:
    """Spread masks by a random walk that edges impede (IRNet, Ahn et al., CVPR 2019).

    vec(M (1 - E))^T T^steps with T_ij = a_ij / sum_i a_ij: each step replaces pixel j by the average of the pixels
    closer than `radius`, weighted by affinities a_ij = (1 - max E on the path from i to j)^beta, a_jj = 1. Pixels
    outside the image count as edges, so a constant mask stays constant where there are no edges. The path consists of
    the pixels in the rectangle spanned by i and j that are less than one pixel from the line through both; no line of
    edge pixels that touch at corners lets it through.

    Args:
        masks: (M, H, W) or (B, M, H, W) float.
        edges: (H, W), shared by all masks, or (B, H, W), one per image; probabilities, clamped to [0, 1].
        radius: in pixels, at least 1; neighbors are closer than it.
        beta: sharpness of the affinity, at least 0.
        steps: number of steps, at least 0.

    Returns:
        Shape of masks, float32 or wider.

    Example:
        >>> random_walk(torch.ones(2, 3, 4), torch.zeros(3, 4)).shape
        torch.Size([2, 3, 4])
    """
    height, width = edges.shape[-2:]
    passing = (1 - edges.to(sum_dtype(edges)).clamp(0, 1))[..., None, :, :]  # the same for all masks of an image
    state = masks.to(sum_dtype(masks)) * passing
    conductance = passing**beta

    links = []
    for dy, dx in neighbor_steps(radius):
        if dy < height and abs(dx) < width:
            rows, columns, left = height - dy, width - abs(dx), max(-dx, 0)
            # windows in which pixel i, its neighbor j = i + (dy, dx) and every pixel between are inside the image
            window = [(y, left + x) for y, x in ((0, 0), (dy, dx), *path_pixels(dy, dx))]
            i, j, *between = ((..., slice(y, y + rows), slice(x, x + columns)) for y, x in window)
            links.append((i, j, torch.stack([conductance[pixel] for pixel in between]).amin(0)))

    def gather(values: Tensor) -> Tensor:
        total = values.clone()
        for i, j, affinity in links:
            total[i].addcmul_(affinity, values[j])
            total[j].addcmul_(affinity, values[i])
        return total

    degree = gather(torch.ones_like(conductance))
    for _ in range(steps):
        state = gather(state) / degree
    return state


def merge_masks(masks: Tensor, iou: float = 0.5, scores: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Unite masks that overlap, until no two do.

    In each round every connected component of the graph "intersection over union > iou" becomes one mask, the union;
    rounds repeat until the graph has no edge. The result does not depend on the order of the masks. An empty mask
    overlaps nothing, not even another empty one.

    Args:
        masks: (M, H, W) bool.
        iou: masks overlap above it; in [0, 1].
        scores: (M,) float, or None.

    Returns:
        The unions (K, H, W) bool, in the order of their first masks; the index of the union that contains each mask,
        (M,) int64; and the highest score in each union, (K,), or None without scores.

    Example:
        >>> merged, groups, _ = merge_masks(torch.tensor([[[1, 1, 0]], [[0, 0, 1]], [[0, 1, 0]]]).bool(), iou=0.4)
        >>> merged.shape, groups
        (torch.Size([2, 1, 3]), tensor([0, 1, 0]))
    """

    def shared_pixels(masks: Tensor) -> Tensor:
        # sums of ones are exact up to 2^24 in float32, and tensor cores do not round them
        pixels = masks.flatten(1).to(torch.float32 if masks[:1].numel() <= 2**24 else torch.float64)
        return pixels @ pixels.mT

    groups = group_masks(masks, iou, shared_pixels)
    merged = unite(masks, groups)
    return merged, groups, None if scores is None else highest(scores, groups, len(merged))


def number_roots(roots: Tensor, barrier: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `label_regions` does, from the root of each pixel.

    Args:
        roots: (B, H, W) int, index in its image of the first pixel of the pixel's region; arbitrary on the barrier.
        barrier: (B, H, W) bool.

    Returns:
        Labels (B, H, W) int32 and numbers of regions (B,) int32.
    """
    roots = roots.flatten(1).long()
    index = torch.arange(roots.shape[1], device=roots.device)
    first = (roots == index) & ~barrier.flatten(1)
    labels = first.cumsum(1).gather(1, roots).view_as(barrier).masked_fill(barrier, 0)
    return labels.int(), first.sum(1).int()


def neighbor_steps(radius: int) -> list[tuple[int, int]]:
    """Return the steps (dy, dx) to the pixels closer than radius that follow in raster order.

    The steps to the pixels before are their opposites.
    """
    steps = [(dy, dx) for dy in range(radius) for dx in range(-radius + 1, radius) if (dy, dx) > (0, 0)]
    return [(dy, dx) for dy, dx in steps if dy**2 + dx**2 < radius**2]


def path_pixels(dy: int, dx: int) -> list[tuple[int, int]]:
    """Return the pixels on the path of a step (dy, dx), dy >= 0, from its start at (0, 0), both ends included.

    They are the pixels in the rectangle spanned by the ends whose distance from the line through both is less than one
    pixel (IRNet's choice). No line of edge pixels that touch at corners lets such a path through.
    """
    pixels = [(y, x) for y in range(dy + 1) for x in range(min(dx, 0), max(dx, 0) + 1)]
    return [(y, x) for y, x in pixels if (dy * x - dx * y) ** 2 < dy**2 + dx**2]


def group_masks(masks: Tensor, iou: float, shared_pixels: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the groups of `merge_masks`.

    Args:
        masks: (M, H, W) bool.
        iou: masks overlap above it.
        shared_pixels: function from masks (M, H, W) to the number of pixels that each two share, (M, M).

    Returns:
        The index of the union that contains each mask, (M,) int64.
    """
    groups = torch.arange(len(masks), device=masks.device)
    while True:
        shared = shared_pixels(unite(masks, groups)).double()
        areas, count = shared.diagonal(), len(shared)
        overlapping = shared > iou * (areas[:, None] + areas - shared)
        overlapping.fill_diagonal_(True)
        # the lowest index in each component, reached in ever longer steps
        lowest, before = torch.arange(count, device=masks.device), None
        while count and (before is None or not torch.equal(lowest, before)):
            before = lowest
            lowest = torch.where(overlapping, lowest, count).amin(1)
            lowest = lowest[lowest]
        roots, numbers = lowest.unique(return_inverse=True)
        if len(roots) == count:
            return groups
        groups = numbers[groups]


def unite(masks: Tensor, groups: Tensor) -> Tensor:
    """Return the union of the masks (M, H, W) of each group (M,); groups are numbered by their first masks."""
    merged = masks.new_zeros((len(groups.unique()), *masks.shape[1:]))
    for index, group in enumerate(groups.tolist()):
        merged[group] |= masks[index]
    return merged


def highest(scores: Tensor, groups: Tensor, count: int) -> Tensor:
    """Return the maximum of the scores (M,) of each group (M,), (count,)."""
    return scores.new_empty(count).scatter_reduce(0, groups, scores, "amax", include_self=False)


def lowest_neighbor(values: Tensor, connectivity: int, outside: int) -> Tensor:
    """Return the minimum over a pixel and its neighbors, where those outside the image have the value `outside`."""
    height, width = values.shape[-2:]
    padded = F.pad(values, (1, 1, 1, 1), value=outside)
    steps = [(y, x) for y in range(3) for x in range(3) if connectivity == 8 or y == 1 or x == 1]
    return torch.stack([padded[..., y : y + height, x : x + width] for y, x in steps]).amin(0)


def grow(labels: Tensor, ground: Tensor, connectivity: int) -> Tensor:
    """Grow labels, 0 for none, over the ground, all by one step at a time."""
    labels, none = labels.long(), 2**31
    while True:
        lowest = lowest_neighbor(torch.where(labels > 0, labels, none), connectivity, none)
        grown = torch.where(ground & (labels == 0) & (lowest < none), lowest, labels)
        if torch.equal(grown, labels):
            return labels.int()
        labels = grown
