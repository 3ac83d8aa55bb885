"""Every op in plain torch, on any device and in any floating dtype: the specification.

"The paper" is "TRACE: Your Diffusion Model is Secretly an Instance Edge Detector" (ICLR 2026, arXiv 2503.07982).
Sizes: B batch, H heads, d channels per head, h x w token grid, N = h * w tokens. Half precision is computed in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "abdiv",
    "accumulate_attention",
    "accumulate_resized",
    "attention_map",
    "count_matches",
    "match_contours",
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
    thresholds: Tensor,
    distance: float,
    *,
    ignored: Tensor,
    groups: Tensor,
    num_groups: int,
    thinning: bool,
) -> tuple[Tensor, Tensor]:
    """See `ops.count_matches`.

    Args:
        edges: (H, W) float.
        truths: (A, H, W) bool.
        thresholds: (T,) float.
        distance: in pixels.
        ignored: (H, W) bool.
        groups: (A, H, W) uint8.
        num_groups: G.
        thinning: whether pixels above a threshold are thinned.

    Returns:
        (T, 6) int64 and (T, G) int64.
    """

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
