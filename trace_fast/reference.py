"""Every op in plain torch, on any device and in any floating dtype: the specification, and its documentation.

`trace_fast.ops` has the same functions, checked and fast; `help()` there adds the dtypes and errors of each.

"The paper" is "TRACE: Your Diffusion Model is Secretly an Instance Edge Detector" (ICLR 2026, arXiv 2503.07982).
Sizes: B batch, H heads, d channels per head, h x w token grid, N = h * w tokens; M masks, H x W pixels of an image.
Half precision is computed in float32.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trace_fast.extras import require

__all__ = [
    "abdiv",
    "accumulate_attention",
    "accumulate_resized",
    "attend",
    "attention_map",
    "count_matches",
    "flood_fill",
    "label_regions",
    "match_contours",
    "merge_masks",
    "merge_tree",
    "random_walk",
    "readout",
    "resize_attention",
    "step_kl",
    "step_kl_abdiv",
    "suppress_nonmaxima",
    "thin",
    "watershed",
]

# probabilities are clamped to it from below, so that their logarithms are finite
TINY = 2.0**-126

# edge strengths of hierarchies are counted in units of 1 / STRENGTHS, so that sums do not depend on their order
STRENGTHS = 2**16


def attention_map(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """Compute the self-attention map of one block, averaged over heads.

    SA = 1/H sum over heads of softmax(scale Q K^T), from which the paper reads edges.

    Args:
        query: (B, H, N, d) float.
        key: (B, H, N, d) float.
        scale: factor of the logits; None is 1 / sqrt(d).

    Returns:
        (B, N, N), float32 or wider; row i is what token i attends to, and sums to 1.

    Example:
        >>> query, key = torch.randn(2, 1, 4, 6, 8)
        >>> attention_map(query, key).shape
        torch.Size([1, 6, 6])
    """
    batch, _, tokens, _ = query.shape
    total = torch.zeros(batch, tokens, tokens, dtype=_sum_dtype(query), device=query.device)
    accumulate_attention(total, query, key, 1.0, scale)
    return total


def accumulate_attention(
    total: Tensor,
    query: Tensor,
    key: Tensor,
    weight: float,
    scale: float | None = None,
    lse: Tensor | None = None,
    others: Tensor | None = None,
) -> None:
    """Add the head-mean attention map of one block to a running total, in place.

    total += weight * 1/H sum over heads of softmax(scale Q K^T). With weight 1/K for each of K blocks, the total is
    the paper's aggregated map, and one (N, N) buffer serves all blocks. What a network's own attention knows of the
    rows, `lse` and `others`, saves a pass over the keys on a GPU, and does not change what is computed.

    Args:
        total: (B, N, N) float, updated in place; half precision is rounded once per call, after the mean over heads.
        query: (B, H, N, d) float.
        key: (B, H, N, d) float.
        weight: factor of this block.
        scale: factor of the logits; None is 1 / sqrt(d).
        lse: (B, H, N) float, the logarithm of the sum of exp(scale Q K^T) over the keys of `key` and `others`; None
            where it is not known.
        others: (B, H, T, d), dtype of key, keys that attention has beside `key`; None where it has none.

    Example:
        >>> total = torch.zeros(1, 6, 6)
        >>> query, key = torch.randn(2, 1, 4, 6, 8)
        >>> accumulate_attention(total, query, key, weight=0.5)
    """
    heads, channels = query.shape[1], query.shape[3]
    scale = channels**-0.5 if scale is None else scale
    query, key = query.to(_sum_dtype(query)) * scale, key.to(_sum_dtype(key))
    wide_total = total.to(_sum_dtype(total))
    # one head at a time: two maps of memory instead of 2 H, and faster for it
    for head in range(heads):
        wide_total.add_((query[:, head] @ key[:, head].mT).softmax(-1), alpha=weight / heads)
    if wide_total is not total:
        total.copy_(wide_total)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    total: Tensor | None = None,
    weight: float = 1.0,
    scale: float | None = None,
    first: int = 0,
) -> Tensor:
    """Compute the self-attention of one block, and add its map to a running total, from the same probabilities.

    softmax(scale Q K^T) V of every head, as `scaled_dot_product_attention` returns it. With a total, the map of a block
    costs little more than the block itself, where `accumulate_attention` computes logits and exponentials once more.

    Args:
        query: (B, H, N, d) float.
        key: (B, H, N, d) float.
        value: (B, H, N, d) float.
        total: (B, T, T) float, updated in place as by `accumulate_attention` with the query and key of T of the tokens;
            None adds no map.
        weight: factor of this block in the total.
        scale: factor of the logits; None is 1 / sqrt(d).
        first: position of the first of the T tokens; they stand together, and others, such as those of a text, have no
            part in the map.

    Returns:
        (B, H, N, d), dtype of query.

    Example:
        >>> query, key, value = torch.randn(3, 1, 4, 6, 8)
        >>> attend(query, key, value, total=torch.zeros(1, 6, 6), weight=0.5).shape
        torch.Size([1, 4, 6, 8])
    """
    if total is not None:
        mapped = slice(first, first + total.shape[1])
        accumulate_attention(total, query[:, :, mapped], key[:, :, mapped], weight, scale)
    wide = _sum_dtype(query)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    logits = query.to(wide) * scale @ key.to(wide).mT
    return (logits.softmax(-1) @ value.to(wide)).to(query.dtype)


def readout(query: Tensor, key: Tensor, values: Tensor, scale: float | None = None) -> Tensor:
    """Multiply the head-mean attention map of one block by a matrix.

    SA V with SA = 1/H sum over heads of softmax(scale Q K^T). Every linear readout of the map has this form: a 3 x 3
    convolution that reads the map as N channels, as the paper's decoder does, is nine columns of V, shifted and summed.
    Half precision is computed as `scaled_dot_product_attention` does: probabilities and V are rounded to the dtype of
    query before they are multiplied; sums are float32.

    Args:
        query: (B, H, N, d) float.
        key: (B, H, N, d), dtype of query.
        values: (N, C) float, the same for every head and image.
        scale: factor of the logits; None is 1 / sqrt(d).

    Returns:
        (B, N, C), float32 or wider. Differentiable with respect to query, key and values.

    Example:
        >>> query, key = torch.randn(2, 1, 4, 6, 8)
        >>> readout(query, key, torch.randn(6, 9)).shape
        torch.Size([1, 6, 9])
    """
    heads, channels = query.shape[1], query.shape[3]
    scale = channels**-0.5 if scale is None else scale
    narrow, wide = query.dtype, _sum_dtype(query)
    query, key, values = query.to(wide) * scale, key.to(wide), values.to(narrow).to(wide)
    products = [(query[:, head] @ key[:, head].mT).softmax(-1).to(narrow).to(wide) @ values for head in range(heads)]
    return torch.stack(products).mean(0)


def resize_attention(attention: Tensor, size: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Resample an attention map to a finer grid, so that maps of different blocks can be averaged.

    SA' = U SA diag(1/c) U^T, where U (target, size) interpolates grids bilinearly (align_corners=False) and c are its
    column sums: queries are interpolated, and the mass of each coarse key is spread over the fine keys that it covers.
    Rows sum to 1 exactly, at every ratio.

    Args:
        attention: (B, N, N) float, rows sum to 1.
        size: (height, width) of the grid of attention, in tokens, with N = height * width.
        target: (height, width) of the finer grid, in tokens, at least `size` in both.

    Returns:
        (B, M, M), M = tokens of `target`, float32 or wider; rows sum to 1.

    Example:
        >>> resize_attention(torch.full((1, 6, 6), 1 / 6), (2, 3), (4, 6)).shape
        torch.Size([1, 24, 24])
    """
    attention = attention.to(_sum_dtype(attention))
    sums_down, sums_across = bilinear_sums(size, target, attention)
    spread = attention / (sums_down[:, None] * sums_across).reshape(-1)

    def interpolate(maps: Tensor) -> Tensor:
        return F.interpolate(maps.unflatten(-1, size), target, mode="bilinear", align_corners=False).flatten(-2)

    return interpolate(interpolate(spread.mT).mT)


def accumulate_resized(
    total: Tensor, attention: Tensor, size: tuple[int, int], target: tuple[int, int], weight: float
) -> None:
    """Add an attention map of a coarser grid to a running total, in place.

    total += weight * `resize_attention(attention, size, target)`. The blocks of a UNet have several grids: each grid
    has its own total, and at the end of every timestep the coarser totals are added to the finest one.

    Args:
        total: (B, M, M) float, updated in place, M = tokens of `target`; half precision is rounded once per call.
        attention: (B, N, N) float, rows sum to 1, N = tokens of `size`.
        size: (height, width) of the grid of attention, in tokens.
        target: (height, width) of the finer grid, in tokens, at least `size` in both.
        weight: factor of the map.

    Example:
        >>> total = torch.zeros(1, 24, 24)
        >>> accumulate_resized(total, torch.full((1, 6, 6), 1 / 6), (2, 3), (4, 6), weight=0.5)
    """
    total.add_(resize_attention(attention, size, target), alpha=weight)


def step_kl(previous: Tensor, current: Tensor) -> Tensor:
    """Compute the divergence between the attention maps of two timesteps.

    KL(SA(X_t_prev) || SA(X_t)), mean over query rows; the map with less noise comes first. The timestep where it is
    largest is the paper's Instance Emergence Point.

    Args:
        previous: (B, N, N) float, rows sum to 1.
        current: (B, N, N) float, rows sum to 1.

    Returns:
        (B,), float32 or wider, in nats, >= 0 up to rounding. Probabilities are clamped below at 2^-126.

    Example:
        >>> previous, current = torch.rand(2, 1, 6, 6).softmax(-1)
        >>> step_kl(previous, current).shape
        torch.Size([1])
    """
    return _kl(previous, _log(previous), _log(current)).mean(-1)


def abdiv(attention: Tensor, height: int, width: int) -> Tensor:
    """Compute the boundary strength of every token from the divergence between its opposite neighbors.

    ABDiv = KL(right || left) + KL(below || above) of the attention rows around each token (the paper's Attention
    Boundary Divergence).

    Args:
        attention: (B, N, N) float, rows sum to 1, N = height * width; row i is what token i attends to.
        height: grid rows, in tokens.
        width: grid columns, in tokens.

    Returns:
        (B, height, width), float32 or wider, in nats, >= 0 up to rounding; neighbors are clamped to the grid at the
        border, probabilities below at 2^-126.

    Example:
        >>> abdiv(torch.rand(1, 6, 6).softmax(-1), 2, 3).shape
        torch.Size([1, 2, 3])
    """
    return _abdiv(attention, _log(attention), height, width)


def step_kl_abdiv(previous: Tensor, current: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Compute `step_kl` of two maps and `abdiv` of the second, reading each map once.

    Args:
        previous: (B, N, N) float, rows sum to 1, N = height * width.
        current: (B, N, N) float, rows sum to 1.
        height: grid rows, in tokens.
        width: grid columns, in tokens.

    Returns:
        `step_kl(previous, current)`, (B,), and `abdiv(current, height, width)`, (B, height, width); both float32 or
        wider, in nats.

    Example:
        >>> previous, current = torch.rand(2, 1, 6, 6).softmax(-1)
        >>> kl, scores = step_kl_abdiv(previous, current, 2, 3)
        >>> kl.shape, scores.shape
        (torch.Size([1]), torch.Size([1, 2, 3]))
    """
    log_current = _log(current)
    kl = _kl(previous, _log(previous), log_current).mean(-1)
    return kl, _abdiv(current, log_current, height, width)


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
        lowest = _lowest_neighbor(neighbor_roots, connectivity, outside)
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
    labels = _grow(seeds.clamp_min(0).masked_fill(barrier, 0), ~barrier, connectivity)
    return _grow(labels, barrier, connectivity) if claim_barrier else labels


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
    passing = (1 - edges.to(_sum_dtype(edges)).clamp(0, 1))[..., None, :, :]  # the same for all masks of an image
    state = masks.to(_sum_dtype(masks)) * passing
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


def suppress_nonmaxima(edges: Tensor, method: str = "bsds") -> Tensor:
    """Keep an edge map where it is strongest across the edge, and set it to 0 elsewhere.

    The map is smoothed by (1 2 1) / 4 along both axes. A pixel stays unless the smoothed map, interpolated one pixel
    away along the normal of the edge on either side, is more than 1 % stronger. Normals follow from the second
    derivatives xx, xy, yy of a map smoothed by a triangle of radius 4. Benchmarks of edges threshold such ridges.

    Args:
        edges: (B, H, W) float.
        method: "bsds", with which scores on BSDS500 are published (the toolbox of Dollar and Zitnick, ICCV 2013): the
            derivatives are those of the smoothed map, normals have the angle atan(-sign(xy) yy / (xx + 0.00001)), and
            the outermost 5 pixels, at most half the image, fade linearly to 0 at the border. "hessian": the derivatives
            are those of the map itself, normals are the direction of the second derivative of the largest absolute
            value, and the border is as strong as the rest.

    Returns:
        (B, H, W) in the dtype of edges: the smoothed map, 0 where a neighbor is stronger.

    Example:
        >>> suppress_nonmaxima(torch.rand(1, 6, 9)).shape
        torch.Size([1, 6, 9])
    """
    height, width = edges.shape[1:]
    strength = _smooth(edges, 1)
    blurred = _smooth(strength if method == "bsds" else edges, 4)
    across, down = _slope(blurred, 2), _slope(blurred, 1)
    xx, xy, yy = _slope(across, 2), _slope(across, 1), _slope(down, 1)
    if method == "bsds":
        angle = torch.atan2(torch.where(xy > 0, -yy, yy), xx + 1e-5)
    else:
        # the eigenvector whose eigenvalue is the largest, or the smallest where the map bends down
        sign = torch.where(xx + yy > 0, 1, -1)
        angle = torch.atan2(2 * sign * xy, sign * (xx - yy)) / 2
    normal_y, normal_x = torch.sin(angle), torch.cos(angle)
    rows, columns = torch.meshgrid(torch.arange(height).to(edges), torch.arange(width).to(edges), indexing="ij")

    def interpolate(y: Tensor, x: Tensor) -> Tensor:
        y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
        top, left = y.long(), x.long()
        bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
        dy, dx = y - top, x - left
        batch = torch.arange(len(edges))[:, None, None]
        upper = (1 - dx) * strength[batch, top, left] + dx * strength[batch, top, right]
        lower = (1 - dx) * strength[batch, bottom, left] + dx * strength[batch, bottom, right]
        return (1 - dy) * upper + dy * lower

    sides = [interpolate(rows + sign * normal_y, columns + sign * normal_x) for sign in (1, -1)]
    ridges = torch.where(strength * 1.01 < torch.maximum(*sides), 0, strength)
    margin = min(5, height // 2, width // 2) if method == "bsds" else 0
    if margin:
        distances = [torch.minimum(position, position.amax() - position) for position in (rows, columns)]
        ridges = ridges * (distances[0] / margin).clamp(max=1) * (distances[1] / margin).clamp(max=1)
    return ridges


def thin(mask: Tensor) -> Tensor:
    """Thin a mask to lines one pixel wide (Guo and Hall, 1989).

    Passes from alternating sides remove the pixels that are neither an end, nor a bridge, nor inside, until nothing
    changes. Connected pixels stay connected (8-connectivity).

    Args:
        mask: (B, H, W) bool.

    Returns:
        (B, H, W) bool, a subset of the mask.

    Example:
        >>> thin(torch.ones(1, 3, 7, dtype=torch.bool)).int()[0, 1]
        tensor([0, 1, 1, 1, 1, 1, 0], dtype=torch.int32)
    """
    mask = mask.clone()
    unchanged_passes, second = 0, False
    while unchanged_passes < 2:
        padded = F.pad(mask, (1, 1, 1, 1))
        # neighbors from the east, counterclockwise
        steps = [(1, 2), (0, 2), (0, 1), (0, 0), (1, 0), (2, 0), (2, 1), (2, 2)]
        x = [padded[:, row : row + mask.shape[1], column : column + mask.shape[2]] for row, column in steps]
        runs = sum((~x[i] & (x[i + 1] | x[(i + 2) % 8])).int() for i in (0, 2, 4, 6))
        pairs = sum((x[i] | x[i + 1]).int() for i in (0, 2, 4, 6))
        shifted_pairs = sum((x[i + 1] | x[(i + 2) % 8]).int() for i in (0, 2, 4, 6))
        neighbors = torch.minimum(torch.as_tensor(pairs), torch.as_tensor(shifted_pairs))
        protected = (x[5] | x[6] | ~x[3]) & x[4] if second else (x[1] | x[2] | ~x[7]) & x[0]
        removed = mask & (runs == 1) & (neighbors >= 2) & (neighbors <= 3) & ~protected
        mask &= ~removed
        unchanged_passes, second = 0 if removed.any() else unchanged_passes + 1, not second
    return mask


def match_contours(detected: Tensor, truth: Tensor, distance: float) -> tuple[Tensor, Tensor]:
    """Pair the pixels of two masks within a distance, one to one.

    The number of pairs is the largest possible and, among all such pairings, the sum of distances is the smallest.
    Which pixels have a partner is not always unique; how many is.

    Args:
        detected: (B, H, W) bool.
        truth: (B, H, W) bool.
        distance: largest distance of a pair, in pixels, >= 0.

    Returns:
        The pixels of `detected`, and those of `truth`, that have a partner, (B, H, W) bool each.

    Example:
        >>> detected, truth = torch.eye(5).bool()[None], torch.eye(5).roll(1, 0).bool()[None]
        >>> [int(mask.sum()) for mask in match_contours(detected, truth, 1.0)]
        [4, 4]
    """
    # the distances of all pairs; the native op holds those within the distance alone
    require("match_contours", "scipy")
    from scipy.optimize import linear_sum_assignment

    matched = torch.zeros_like(detected), torch.zeros_like(truth)
    for index, pair in enumerate(zip(detected, truth, strict=True)):
        pixels = [mask.nonzero() for mask in pair]
        lengths = torch.cdist(*(points.double() for points in pixels))
        never = (distance + 1) * (min(lengths.shape) + 1)  # one more pair is worth any distances
        cost = torch.where(lengths <= distance, lengths, never)
        rows, columns = (torch.from_numpy(indices) for indices in linear_sum_assignment(cost.numpy()))
        within = cost[rows, columns] < never
        for mask, points, chosen in zip(matched, pixels, (rows, columns), strict=True):
            mask[index][tuple(points[chosen[within]].T)] = True
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
    """Count the pixels of an edge map that match the contours of its annotators, at each threshold.

    At each threshold the pixels of at least that strength are thinned and matched with each annotator's contours by
    `match_contours`. ODS, OIS and AP of edges are computed from these counts, summed over images; clDice from the last
    two columns.

    Args:
        edges: (H, W) float, usually ridges (`suppress_nonmaxima`).
        truths: (A, H, W) bool, one contour map per annotator.
        thresholds: (T,) float, or a sequence.
        distance: largest distance of a pair, in pixels, >= 0; 0.0075 of the image's diagonal is customary.
        ignored: (H, W) bool, where a detection without a partner is not counted; None for nowhere.
        groups: (A, H, W) uint8, the group of each contour pixel, to count matches by group; None for one group.
        num_groups: G, larger than any group.
        thinning: whether to thin; False where the edges are lines of one pixel at every threshold already.

    Returns:
        Counts (T, 6) int64, and the matched truth pixels by group, (T, G) int64. The columns of the counts are, in this
        order: truth pixels with a partner, summed over annotators; all truth pixels, summed over annotators; detected
        pixels with a partner in any annotator; all detected pixels that are matched or not ignored; those of them
        within the distance of any truth pixel; truth pixels within the distance of any detected pixel, summed over
        annotators.

    Example:
        >>> truth = torch.eye(9).bool()
        >>> counts, _ = count_matches(truth.float(), truth[None], [0.5], 1.0)
        >>> counts.tolist()
        [[9, 9, 9, 9, 9, 9]]
    """
    ignored = torch.zeros_like(edges, dtype=torch.bool) if ignored is None else ignored
    groups = torch.zeros_like(truths, dtype=torch.uint8) if groups is None else groups
    thresholds = torch.as_tensor(thresholds, dtype=edges.dtype)

    def near(mask: Tensor) -> Tensor:
        lengths = torch.cdist(torch.ones_like(mask).nonzero().double(), mask.nonzero().double())
        return (lengths <= distance).any(1).reshape(mask.shape)

    counts, by_group = [], []
    for threshold in thresholds:
        detected = edges >= threshold
        detected = thin(detected[None])[0] if thinning else detected
        pairs = [match_contours(detected[None], truth[None], distance) for truth in truths]
        matched = torch.stack([matched_detected[0] for matched_detected, _ in pairs]).any(0)
        hits = torch.stack([matched_truth[0] for _, matched_truth in pairs])
        counted = matched | (detected & ~ignored)
        columns = hits, truths, matched, counted, counted & near(truths.any(0)), truths & near(detected)
        counts.append(torch.stack([column.sum() for column in columns]))
        by_group.append(torch.bincount(groups[hits].long(), minlength=num_groups))
    return torch.stack(counts), torch.stack(by_group)


def bilinear_sums(size: tuple[int, int], target: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the total weight of each point of a grid when a finer grid is interpolated from it.

    Args:
        size: (height, width) of the coarse grid.
        target: (height, width) of the finer grid.
        like: a tensor whose dtype and device the result has.

    Returns:
        Sums along the rows, (height,), and along the columns, (width,); their products are the column sums of U.
    """

    def along(points: int, fine_points: int) -> Tensor:
        eye = torch.eye(points, dtype=like.dtype, device=like.device)
        return F.interpolate(eye[None], fine_points, mode="linear", align_corners=False)[0].sum(-1)

    return along(size[0], target[0]), along(size[1], target[1])


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


def whole_strengths(edges: Tensor) -> Tensor:
    """Return edges in units of 1 / STRENGTHS, int32, rounded to the nearest and, between two, to the even one."""
    return (edges.to(_sum_dtype(edges)).nan_to_num(0).clamp(0, 1) * STRENGTHS).round().int()


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


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which sums are taken: float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _log(p: Tensor) -> Tensor:
    """Return the logarithm of probabilities, finite at 0."""
    return p.to(_sum_dtype(p)).clamp_min(TINY).log()


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the sum over the last axis of p (log p - log q); the difference comes first, or the sums would cancel."""
    return (log_p - log_q).mul_(p).sum(-1)


def _abdiv(p: Tensor, log_p: Tensor, height: int, width: int) -> Tensor:
    """Return the ABDiv of maps (B, N, N) from the maps and their logarithms."""
    p, log_p = p.unflatten(1, (height, width)), log_p.unflatten(1, (height, width))

    def kl(axis: int, ahead: int, behind: int, count: int) -> Tensor:
        p_ahead, log_ahead = p.narrow(axis, ahead, count), log_p.narrow(axis, ahead, count)
        return _kl(p_ahead, log_ahead, log_p.narrow(axis, behind, count))

    def along(axis: int) -> Tensor:
        last = p.size(axis) - 1
        if last == 0:
            return kl(axis, 0, 0, 1)
        # first point, interior, last point
        return torch.cat([kl(axis, 1, 0, 1), kl(axis, 2, 0, last - 1), kl(axis, last, last - 1, 1)], axis)

    return along(2) + along(1)


def _smooth(image: Tensor, radius: int) -> Tensor:
    """Smooth (B, H, W) by weights 1, .., radius + 1, .., 1 over their sum along both axes, mirrored at the border."""
    weights = radius + 1 - torch.arange(-radius, radius + 1).abs().to(image)
    for axis in (1, 2):
        size = image.shape[axis]
        index = (torch.arange(size)[:, None] + torch.arange(-radius, radius + 1)) % (2 * size)
        index = torch.minimum(index, 2 * size - 1 - index)  # (size, 2 * radius + 1)
        image = (image.movedim(axis, -1)[..., index] @ weights / weights.sum()).movedim(-1, axis)
    return image


def _slope(image: Tensor, axis: int) -> Tensor:
    """Return half the difference of the neighbors along an axis, and the whole difference at either end."""
    size = image.shape[axis]
    before, after = (torch.arange(size) - 1).clamp(min=0), (torch.arange(size) + 1).clamp(max=size - 1)
    shape = [-1 if i == axis else 1 for i in range(image.ndim)]
    steps = (after - before).clamp(min=1).to(image).reshape(shape)
    return (image.index_select(axis, after) - image.index_select(axis, before)) / steps


def _flood(labels: Tensor, ranks: Tensor, ground: Tensor) -> Tensor:
    """Grow labels, 0 for none, over the ground, at first from the pixels of the lowest rank."""
    none = 2**62
    lowest = _lowest_neighbor(torch.where(labels > 0, ranks * 2**31 + labels, none), 4, none)
    reached = torch.where(ground & (labels == 0) & (lowest < none), lowest % 2**31, labels)
    return _grow(reached, ground, 4)


def _layers(ground: Tensor) -> list[Tensor]:
    """Return the pixels of the ground by the number of steps to its outside, the farthest ones first."""
    layers = []
    while ground.any():
        outermost = ground & (_lowest_neighbor(ground.int(), 4, 1) == 0)
        # a whole image has no outside
        layers.append(torch.where(outermost.flatten(1).any(1)[:, None, None], outermost, ground))
        ground = ground & ~layers[-1]
    return layers[::-1]


def _lowest_neighbor(values: Tensor, connectivity: int, outside: int) -> Tensor:
    """Return the minimum over a pixel and its neighbors, where those outside the image have the value `outside`."""
    height, width = values.shape[-2:]
    padded = F.pad(values, (1, 1, 1, 1), value=outside)
    steps = [(y, x) for y in range(3) for x in range(3) if connectivity == 8 or y == 1 or x == 1]
    return torch.stack([padded[..., y : y + height, x : x + width] for y, x in steps]).amin(0)


def _grow(labels: Tensor, ground: Tensor, connectivity: int) -> Tensor:
    """Grow labels, 0 for none, over the ground, all by one step at a time."""
    labels, none = labels.long(), 2**31
    while True:
        lowest = _lowest_neighbor(torch.where(labels > 0, labels, none), connectivity, none)
        grown = torch.where(ground & (labels == 0) & (lowest < none), lowest, labels)
        if torch.equal(grown, labels):
            return labels.int()
        labels = grown
