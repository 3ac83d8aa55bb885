"""Attention of a block: its mean map, its read-out, and maps of other grids."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trace_fast.reference.precision import sum_dtype

__all__ = ["accumulate_attention", "accumulate_resized", "attend", "attention_map", "readout", "resize_attention"]


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
    total = torch.zeros(batch, tokens, tokens, dtype=sum_dtype(query), device=query.device)
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
    query, key = query.to(sum_dtype(query)) * scale, key.to(sum_dtype(key))
    wide_total = total.to(sum_dtype(total))
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
    wide = sum_dtype(query)
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
    narrow, wide = query.dtype, sum_dtype(query)
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
    attention = attention.to(sum_dtype(attention))
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
