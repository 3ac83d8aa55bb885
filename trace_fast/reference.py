"""Every op in plain torch, on any device and in any floating dtype: the specification.

"The paper" is "TRACE: Your Diffusion Model is Secretly an Instance Edge Detector" (ICLR 2026, arXiv 2503.07982).
Sizes: B batch, H heads, d channels per head, h x w token grid, N = h * w tokens. Half precision is computed in float32.
Regions and masks: M masks, H x W pixels.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

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

# probabilities are clamped to it from below, so that their logarithms are finite
TINY = 2.0**-126


def attention_map(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """Self-attention map of one block, averaged over heads.

    SA = 1/H sum over heads of softmax(scale Q K^T), which the paper reads its edges from.

    Args:
        query: (B, H, N, d) float.
        key: (B, H, N, d) float.
        scale: factor of the logits; None is 1 / sqrt(d).

    Returns:
        (B, N, N), float32 or wider; row i is what token i attends to and sums to 1.

    Example:
        >>> query, key = torch.randn(2, 1, 4, 6, 8)
        >>> attention_map(query, key).shape
        torch.Size([1, 6, 6])
    """
    batch, _, tokens, _ = query.shape
    total = torch.zeros(batch, tokens, tokens, dtype=_wide(query), device=query.device)
    accumulate_attention(total, query, key, 1.0, scale)
    return total


def accumulate_attention(total: Tensor, query: Tensor, key: Tensor, weight: float, scale: float | None = None) -> None:
    """Add one block's head-mean attention map to a running total, in place.

    total += weight * 1/H sum over heads of softmax(scale Q K^T). With weight 1/K for each of K blocks, the total is
    the paper's aggregated map, and one (N, N) buffer serves all blocks.

    Args:
        total: (B, N, N) float, updated in place; half precision is rounded once, after the mean over heads.
        query: (B, H, N, d) float.
        key: (B, H, N, d) float.
        weight: factor of this block.
        scale: factor of the logits; None is 1 / sqrt(d).

    Example:
        >>> total = torch.zeros(1, 6, 6)
        >>> query, key = torch.randn(2, 1, 4, 6, 8)
        >>> accumulate_attention(total, query, key, weight=0.5)
    """
    heads, channels = query.shape[1], query.shape[3]
    scale = channels**-0.5 if scale is None else scale
    query, key = query.to(_wide(query)) * scale, key.to(_wide(key))
    wide = total.to(_wide(total))
    # one head at a time: two maps of memory instead of 2 H, and faster for it
    for head in range(heads):
        wide.add_((query[:, head] @ key[:, head].mT).softmax(-1), alpha=weight / heads)
    if wide is not total:
        total.copy_(wide)


def readout(query: Tensor, key: Tensor, values: Tensor, scale: float | None = None) -> Tensor:
    """Head-mean attention map of one block times a matrix.

    SA V with SA = 1/H sum over heads of softmax(scale Q K^T). Every linear read-out of the map is of this form: a 3 x 3
    convolution that reads the map as N channels is nine columns of V, shifted and summed. Half precision is computed
    as `scaled_dot_product_attention` does: probabilities and V are rounded to the dtype of query before they meet.

    Args:
        query: (B, H, N, d) float.
        key: (B, H, N, d) as query.
        values: (N, C) float, the same for every head and image.
        scale: factor of the logits; None is 1 / sqrt(d).

    Returns:
        (B, N, C), float32 or wider. Differentiable in query, key and values.

    Example:
        >>> query, key = torch.randn(2, 1, 4, 6, 8)
        >>> readout(query, key, torch.randn(6, 9)).shape
        torch.Size([1, 6, 9])
    """
    heads, channels = query.shape[1], query.shape[3]
    scale = channels**-0.5 if scale is None else scale
    narrow, wide = query.dtype, _wide(query)
    query, key, values = query.to(wide) * scale, key.to(wide), values.to(narrow).to(wide)
    products = [(query[:, head] @ key[:, head].mT).softmax(-1).to(narrow).to(wide) @ values for head in range(heads)]
    return torch.stack(products).mean(0)


def resize_attention(attention: Tensor, size: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Carry an attention map to a finer grid, so that maps of different blocks can be averaged.

    SA' = U SA diag(1/c) U^T, U (target, size) the bilinear interpolation of grids (align_corners=False) and c its
    column sums: queries are interpolated, and each coarse key's mass is spread over the fine keys that it covers.
    Rows sum to 1 exactly, at every ratio.

    Args:
        attention: (B, N, N) float, rows sum to 1.
        size: (height, width) of the grid, in tokens, with N = height * width.
        target: (height, width) of the finer grid, in tokens, at least `size` in both.

    Returns:
        (B, M, M), M = tokens of `target`, float32 or wider.

    Example:
        >>> resize_attention(torch.full((1, 6, 6), 1 / 6), (2, 3), (4, 6)).shape
        torch.Size([1, 24, 24])
    """
    attention = attention.to(_wide(attention))
    down, across = bilinear_sums(size, target, attention)
    spread = attention / (down[:, None] * across).reshape(-1)

    def interpolate(maps: Tensor) -> Tensor:
        return F.interpolate(maps.unflatten(-1, size), target, mode="bilinear", align_corners=False).flatten(-2)

    return interpolate(interpolate(spread.mT).mT)


def accumulate_resized(
    total: Tensor, attention: Tensor, size: tuple[int, int], target: tuple[int, int], weight: float
) -> None:
    """Add an attention map of a coarser grid to a running total, in place.

    total += weight * `resize_attention(attention, size, target)`. The blocks of a UNet have several grids: one total
    for each, and every level of noise ends with one call for each of the coarser ones.

    Args:
        total: (B, M, M) float, updated in place, M = tokens of `target`.
        attention: (B, N, N) float, N = tokens of `size`.
        size: (height, width) of the grid of attention, in tokens.
        target: (height, width) of the finer grid, in tokens, at least `size` in both.
        weight: factor of the map.

    Example:
        >>> total = torch.zeros(1, 24, 24)
        >>> accumulate_resized(total, torch.full((1, 6, 6), 1 / 6), (2, 3), (4, 6), weight=0.5)
    """
    total.add_(resize_attention(attention, size, target), alpha=weight)


def step_kl(previous: Tensor, current: Tensor) -> Tensor:
    """Divergence between the attention maps of two noise levels, whose maximum is the Instance Emergence Point.

    KL(SA(X_t_prev) || SA(X_t)) (the paper's IEP), mean over query rows; the less noisy map comes first.

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
    """Boundary strength from the divergence between opposite neighbours.

    ABDiv = KL(right || left) + KL(below || above) of the attention rows around each token (the paper's Attention
    Boundary Divergence).

    Args:
        attention: (B, N, N) float, rows sum to 1, N = height * width; row i is what token i attends to.
        height: grid rows, in tokens.
        width: grid columns, in tokens.

    Returns:
        (B, height, width), float32 or wider, in nats, >= 0 up to rounding; neighbours are clamped to the grid at the
        border, probabilities below at 2^-126.

    Example:
        >>> abdiv(torch.rand(1, 6, 6).softmax(-1), 2, 3).shape
        torch.Size([1, 2, 3])
    """
    return _abdiv(attention, _log(attention), height, width)


def step_kl_abdiv(previous: Tensor, current: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """`step_kl` of a pair of maps and `abdiv` of the second, from one read of each.

    Args:
        previous: (B, N, N) float, rows sum to 1, N = height * width.
        current: (B, N, N) float, rows sum to 1.
        height: grid rows, in tokens.
        width: grid columns, in tokens.

    Returns:
        `step_kl(previous, current)`, (B,), and `abdiv(current, height, width)`, (B, height, width), in nats.

    Example:
        >>> previous, current = torch.rand(2, 1, 6, 6).softmax(-1)
        >>> [x.shape for x in step_kl_abdiv(previous, current, 2, 3)]
        [torch.Size([1]), torch.Size([1, 2, 3])]
    """
    log_current = _log(current)
    kl = _kl(previous, _log(previous), log_current).mean(-1)
    return kl, _abdiv(current, log_current, height, width)


def label_regions(barrier: Tensor, connectivity: int = 4) -> tuple[Tensor, Tensor]:
    """Number the connected regions that a barrier leaves.

    Pixels off the barrier belong together where a path of steps between them stays off it. A step of connectivity 8
    may pass between two barrier pixels that touch at a corner.

    Args:
        barrier: (B, H, W) bool.
        connectivity: 4, steps along the axes, or 8, diagonal steps too.

    Returns:
        (B, H, W) int32, 0 on the barrier, else 1 to n in the raster order of each region's first pixel; and n, the
        number of regions, (B,) int32.

    Example:
        >>> label_regions(torch.tensor([[[False, True, False], [False, True, True]]]))[0]
        tensor([[[1, 0, 2],
                 [1, 0, 0]]], dtype=torch.int32)
    """
    batch, outside = len(barrier), barrier.shape[1] * barrier.shape[2]
    roots, changed = torch.arange(outside, device=barrier.device).repeat(batch, 1), True
    # each root is hung below the lowest one beside its region, then every pixel moves up, until nothing changes
    while changed:
        around = _lowest_neighbour(roots.view_as(barrier).masked_fill(barrier, outside), connectivity, outside)
        lowest = torch.where(barrier, outside, around).flatten(1)
        hung = roots.scatter_reduce(1, roots, lowest, "amin")
        moved = hung.gather(1, hung)
        changed = not torch.equal(moved, roots)
        roots = moved
    return number_roots(roots.view_as(barrier), barrier)


def flood_fill(seeds: Tensor, barrier: Tensor, connectivity: int = 4, claim_barrier: bool = False) -> Tensor:
    """Grow labels until they meet each other or a barrier.

    Every pixel off the barrier takes the label of the seed that the fewest steps off the barrier lead to, the lowest
    label where several are as near.

    Args:
        seeds: (B, H, W) int32 labels, at least 1; below that a pixel is no seed, and neither is one on the barrier.
        barrier: (B, H, W) bool.
        connectivity: 4, steps along the axes, or 8, diagonal steps too.
        claim_barrier: let the labels grow over the barrier, too, at the end: from the pixels labelled so far and by
            the same rule, but in steps on the barrier alone.

    Returns:
        (B, H, W) int32, 0 where no seed leads.

    Example:
        >>> barrier = torch.tensor([[[False, False, True, False]]])
        >>> flood_fill(torch.tensor([[[7, 0, 0, 0]]], dtype=torch.int32), barrier)
        tensor([[[7, 7, 0, 0]]], dtype=torch.int32)
    """
    labels = _grow(seeds.clamp_min(0).masked_fill(barrier, 0), ~barrier, connectivity)
    return _grow(labels, barrier, connectivity) if claim_barrier else labels


def random_walk(masks: Tensor, edges: Tensor, radius: int = 5, beta: float = 10, steps: int = 256) -> Tensor:
    """Spread masks by a random walk that edges hold back (IRNet, Ahn et al., CVPR 2019).

    vec(M (1 - E))^T T^steps with T_ij = a_ij / sum_i a_ij: each step averages a pixel j with those closer than `radius`
    by their affinities a_ij = (1 - max E on the path from i to j)^beta, a_jj = 1. Pixels outside the image count as
    edges, so a constant mask stays constant where there are none. `path` says which pixels lie on a path.

    Args:
        masks: (M, H, W) or (B, M, H, W) float.
        edges: (H, W), of all masks, or (B, H, W), of each image; probabilities, clamped to [0, 1].
        radius: in pixels, at least 1; neighbours are closer.
        beta: sharpness of the affinity, at least 0.
        steps: of the walk, at least 0.

    Returns:
        As masks, float32 or wider.

    Example:
        >>> random_walk(torch.ones(2, 3, 4), torch.zeros(3, 4)).shape
        torch.Size([2, 3, 4])
    """
    height, width = edges.shape[-2:]
    passing = (1 - edges.to(_wide(edges)).clamp(0, 1))[..., None, :, :]  # the same for all masks of an image
    state = masks.to(_wide(masks)) * passing
    conductance = passing**beta

    links = []
    for dy, dx in neighbours(radius):
        if dy < height and abs(dx) < width:
            rows, columns, left = height - dy, width - abs(dx), max(-dx, 0)
            # windows in which pixel i and its neighbour j = i + (dy, dx), and every pixel between, are inside
            window = [(y, left + x) for y, x in ((0, 0), (dy, dx), *path(dy, dx))]
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
    overlaps nothing, another empty one included.

    Args:
        masks: (M, H, W) bool.
        iou: masks overlap above it; in [0, 1].
        scores: (M,) float, or None.

    Returns:
        The unions (K, H, W) bool, by the lowest index of their masks; the union that each mask is in, (M,) int64; and
        the highest score in each union, (K,), or None without scores.

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


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype sums are taken in: float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def bilinear_sums(size: tuple[int, int], target: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """How much each point of a grid gives to all points of a finer one, by axis: (h,) and (w,), as `like`."""

    def along(points: int, finer: int) -> Tensor:
        eye = torch.eye(points, dtype=like.dtype, device=like.device)
        return F.interpolate(eye[None], finer, mode="linear", align_corners=False)[0].sum(-1)

    return along(size[0], target[0]), along(size[1], target[1])


def _log(p: Tensor) -> Tensor:
    """Logarithm of probabilities, finite at 0."""
    return p.to(_wide(p)).clamp_min(TINY).log()


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum over the last axis of p (log p - log q); the difference comes first, or the sums would cancel."""
    return (log_p - log_q).mul_(p).sum(-1)


def _abdiv(p: Tensor, log_p: Tensor, height: int, width: int) -> Tensor:
    """ABDiv of maps (B, N, N) given with their logarithms."""
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


def suppress_nonmaxima(edges: Tensor) -> Tensor:
    """See `ops.suppress_nonmaxima`.

    Args:
        edges: (B, H, W) float.

    Returns:
        (B, H, W) in the same dtype.
    """
    height, width = edges.shape[1:]
    strength, blurred = _smooth(edges, 1), _smooth(edges, 4)
    across, down = _slope(blurred, 2), _slope(blurred, 1)
    xx, xy, yy = _slope(across, 2), _slope(across, 1), _slope(down, 1)
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

    beside = [interpolate(rows + sign * normal_y, columns + sign * normal_x) for sign in (1, -1)]
    return torch.where(strength * 1.01 < torch.maximum(*beside), 0, strength)


def thin(mask: Tensor) -> Tensor:
    """See `ops.thin`: passes from either side remove what is no end, no bridge and not inside, until nothing changes.

    Args:
        mask: (B, H, W) bool.

    Returns:
        (B, H, W) bool.
    """
    mask = mask.clone()
    quiet, second = 0, False
    while quiet < 2:
        padded = F.pad(mask, (1, 1, 1, 1))
        # neighbours from the east, counter-clockwise
        steps = [(1, 2), (0, 2), (0, 1), (0, 0), (1, 0), (2, 0), (2, 1), (2, 2)]
        x = [padded[:, y : y + mask.shape[1], x : x + mask.shape[2]] for y, x in steps]
        runs = sum((~x[i] & (x[i + 1] | x[(i + 2) % 8])).int() for i in (0, 2, 4, 6))
        pairs = sum((x[i] | x[i + 1]).int() for i in (0, 2, 4, 6))
        others = sum((x[i + 1] | x[(i + 2) % 8]).int() for i in (0, 2, 4, 6))
        fewest = torch.minimum(torch.as_tensor(pairs), torch.as_tensor(others))
        held = (x[5] | x[6] | ~x[3]) & x[4] if second else (x[1] | x[2] | ~x[7]) & x[0]
        removed = mask & (runs == 1) & (fewest >= 2) & (fewest <= 3) & ~held
        mask &= ~removed
        quiet, second = 0 if removed.any() else quiet + 1, not second
    return mask


def match_contours(detected: Tensor, truth: Tensor, distance: float) -> tuple[Tensor, Tensor]:
    """See `ops.match_contours`; needs scipy, and memory for the distances of all pairs.

    Args:
        detected: (B, H, W) bool.
        truth: (B, H, W) bool.
        distance: in pixels.

    Returns:
        Two (B, H, W) bool.
    """
    from scipy.optimize import linear_sum_assignment

    matched = torch.zeros_like(detected), torch.zeros_like(truth)
    for index, pair in enumerate(zip(detected, truth, strict=True)):
        pixels = [mask.nonzero() for mask in pair]
        lengths = torch.cdist(*(x.double() for x in pixels))
        never = (distance + 1) * (min(lengths.shape) + 1)  # one more pair is worth any distances
        cost = torch.where(lengths <= distance, lengths, never)
        rows, columns = (torch.from_numpy(x) for x in linear_sum_assignment(cost.numpy()))
        within = cost[rows, columns] < never
        for image, found, chosen in zip(matched, pixels, (rows, columns), strict=True):
            image[index][tuple(found[chosen[within]].T)] = True
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
    """See `ops.count_matches`.

    Args:
        edges: (H, W) float.
        truths: (A, H, W) bool.
        thresholds: (T,) float, or a sequence.
        distance: in pixels.
        ignored: (H, W) bool; None for nowhere.
        groups: (A, H, W) uint8; None for one group.
        num_groups: G.
        thinning: whether pixels above a threshold are thinned.

    Returns:
        (T, 6) int64 and (T, G) int64.
    """
    ignored = torch.zeros_like(edges, dtype=torch.bool) if ignored is None else ignored
    groups = torch.zeros_like(truths, dtype=torch.uint8) if groups is None else groups
    thresholds = torch.as_tensor(thresholds, dtype=edges.dtype)

    def near(mask: Tensor) -> Tensor:
        lengths = torch.cdist(torch.ones_like(mask).nonzero().double(), mask.nonzero().double())
        return (lengths <= distance).any(1).reshape(mask.shape)

    counts, by_group = [], []
    for threshold in thresholds:
        found = edges >= threshold
        found = thin(found[None])[0] if thinning else found
        pairs = [match_contours(found[None], truth[None], distance) for truth in truths]
        matched = torch.stack([of_found[0] for of_found, _ in pairs]).any(0)
        hits = torch.stack([of_truth[0] for _, of_truth in pairs])
        counted = matched | (found & ~ignored)
        images = hits, truths, matched, counted, counted & near(truths.any(0)), truths & near(found)
        counts.append(torch.stack([image.sum() for image in images]))
        by_group.append(torch.bincount(groups[hits].long(), minlength=num_groups))
    return torch.stack(counts), torch.stack(by_group)


def _smooth(image: Tensor, radius: int) -> Tensor:
    """Weights 1, .., radius + 1, .., 1 over their sum along both axes of (B, H, W), mirrored at the border."""
    weights = radius + 1 - torch.arange(-radius, radius + 1).abs().to(image)
    for axis in (1, 2):
        size = image.shape[axis]
        at = (torch.arange(size)[:, None] + torch.arange(-radius, radius + 1)) % (2 * size)
        at = torch.minimum(at, 2 * size - 1 - at)  # (size, 2 * radius + 1)
        image = (image.movedim(axis, -1)[..., at] @ weights / weights.sum()).movedim(-1, axis)
    return image


def _slope(image: Tensor, axis: int) -> Tensor:
    """Half the difference of the neighbours along an axis; the whole one at either end."""
    size = image.shape[axis]
    before, after = (torch.arange(size) - 1).clamp(min=0), (torch.arange(size) + 1).clamp(max=size - 1)
    shape = [-1 if i == axis else 1 for i in range(image.ndim)]
    steps = (after - before).clamp(min=1).to(image).reshape(shape)
    return (image.index_select(axis, after) - image.index_select(axis, before)) / steps


def number_roots(roots: Tensor, barrier: Tensor) -> tuple[Tensor, Tensor]:
    """`label_regions` from the index, in its image, of the first pixel of every pixel's region; free on the barrier."""
    roots = roots.flatten(1).long()
    index = torch.arange(roots.shape[1], device=roots.device)
    first = (roots == index) & ~barrier.flatten(1)
    labels = first.cumsum(1).gather(1, roots).view_as(barrier).masked_fill(barrier, 0)
    return labels.int(), first.sum(1).int()


def _lowest_neighbour(values: Tensor, connectivity: int, outside: int) -> Tensor:
    """Minimum over the pixels one step away and the pixel itself, where those outside the image are `outside`."""
    height, width = values.shape[-2:]
    padded = F.pad(values, (1, 1, 1, 1), value=outside)
    steps = [(y, x) for y in range(3) for x in range(3) if connectivity == 8 or y == 1 or x == 1]
    return torch.stack([padded[..., y : y + height, x : x + width] for y, x in steps]).amin(0)


def _grow(labels: Tensor, ground: Tensor, connectivity: int) -> Tensor:
    """Labels, 0 for none, after they have grown over the ground, one step of all at a time."""
    labels, none = labels.long(), 2**31
    while True:
        lowest = _lowest_neighbour(torch.where(labels > 0, labels, none), connectivity, none)
        grown = torch.where(ground & (labels == 0) & (lowest < none), lowest, labels)
        if torch.equal(grown, labels):
            return labels.int()
        labels = grown


def neighbours(radius: int) -> list[tuple[int, int]]:
    """Steps (dy, dx) to the pixels closer than radius that follow in raster order; the others are their opposites."""
    steps = [(dy, dx) for dy in range(radius) for dx in range(-radius + 1, radius) if (dy, dx) > (0, 0)]
    return [(dy, dx) for dy, dx in steps if dy**2 + dx**2 < radius**2]


def path(dy: int, dx: int) -> list[tuple[int, int]]:
    """Pixels on the path of a step (dy, dx), from its start at (0, 0), both ends included; dy >= 0.

    They are those of the rectangle that the ends span whose distance from the line through both is less than one pixel
    (IRNet's choice). No line of edge pixels that touch at corners lets such a path through.
    """
    pixels = [(y, x) for y in range(dy + 1) for x in range(min(dx, 0), max(dx, 0) + 1)]
    return [(y, x) for y, x in pixels if (dy * x - dx * y) ** 2 < dy**2 + dx**2]


def group_masks(masks: Tensor, iou: float, shared_pixels: Callable[[Tensor], Tensor]) -> Tensor:
    """`merge_masks` without the unions; shared_pixels(masks) says how many pixels each mask shares with each."""
    groups = torch.arange(len(masks), device=masks.device)
    while True:
        shared = shared_pixels(unite(masks, groups)).double()
        areas, count = shared.diagonal(), len(shared)
        joined = shared > iou * (areas[:, None] + areas - shared)
        joined.fill_diagonal_(True)
        # the lowest index that each component has, reached in ever longer steps
        lowest, before = torch.arange(count, device=masks.device), None
        while count and (before is None or not torch.equal(lowest, before)):
            before = lowest
            lowest = torch.where(joined, lowest, count).amin(1)
            lowest = lowest[lowest]
        roots, numbers = lowest.unique(return_inverse=True)
        if len(roots) == count:
            return groups
        groups = numbers[groups]


def unite(masks: Tensor, groups: Tensor) -> Tensor:
    """Union of the masks (M, H, W) of each group (M,), which are numbered by their first masks."""
    merged = masks.new_zeros((len(groups.unique()), *masks.shape[1:]))
    for index, group in enumerate(groups.tolist()):
        merged[group] |= masks[index]
    return merged


def highest(scores: Tensor, groups: Tensor, count: int) -> Tensor:
    """Maximum of the scores (M,) of each group (M,)."""
    return scores.new_empty(count).scatter_reduce(0, groups, scores, "amax", include_self=False)
