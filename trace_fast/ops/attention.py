"""Self-attention maps: head mean, accumulated over blocks, carried between grids."""

import torch
from torch import Tensor

from trace_fast import _backend, _checks, reference

__all__ = ["accumulate_attention", "attention_map", "resize_attention"]

_FEATURES = (torch.float32, torch.float16, torch.bfloat16)


def attention_map(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """Self-attention map of one block, averaged over heads.

    SA = 1/H sum over heads of softmax(scale Q K^T), which the paper reads its edges from.

    Args:
        query: (B, H, N, d) float32, float16 or bfloat16, any strides.
        key: (B, H, N, d) as query.
        scale: factor of the logits; None is 1 / sqrt(d).

    Returns:
        (B, N, N) float32; row i is what token i attends to and sums to 1.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes or devices differ from each other.
        RuntimeError: query or key requires grad; there is no gradient.

    Example:
        >>> query, key = torch.randn(2, 1, 4, 6, 8)
        >>> attention_map(query, key).shape
        torch.Size([1, 6, 6])
    """
    batch, tokens = _check_features("attention_map", query, key, scale)
    total = torch.zeros(batch, tokens, tokens, device=query.device)
    accumulate_attention(total, query, key, 1.0, scale)
    return total


def accumulate_attention(total: Tensor, query: Tensor, key: Tensor, weight: float, scale: float | None = None) -> None:
    """Add one block's head-mean attention map to a running total, in place.

    total += weight * 1/H sum over heads of softmax(scale Q K^T), computed in float32 without a map per head.

    Args:
        total: (B, N, N) float32, contiguous, updated in place.
        query: (B, H, N, d) float32, float16 or bfloat16, any strides.
        key: (B, H, N, d) as query.
        weight: factor of this block, such as 1/K for each of K blocks.
        scale: factor of the logits; None is 1 / sqrt(d).

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes or devices differ from each other, or total is not contiguous.
        RuntimeError: query or key requires grad; there is no gradient.

    Example:
        >>> total = torch.zeros(1, 6, 6)
        >>> query, key = torch.randn(2, 1, 4, 6, 8)
        >>> accumulate_attention(total, query, key, weight=0.5)
    """
    op = "accumulate_attention"
    batch, tokens = _check_features(op, query, key, scale)
    _checks.tensor(op, "total", total, "B N N", {"B": batch, "N": tokens}, torch.float32)
    _checks.same_device(op, query=query, total=total)
    _checks.contiguous(op, "total", total)
    _checks.number(op, "weight", weight)
    if _backend.choose(op, query.device.type) == "reference":
        reference.accumulate_attention(total, query, key, weight, scale)
    else:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        _accumulate_attention(total, query, key, float(weight), float(scale))


def resize_attention(attention: Tensor, size: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Carry an attention map to a finer grid, so that maps of different blocks can be averaged.

    SA' = U SA diag(1/c) U^T, U (target, size) the bilinear interpolation of grids and c its column sums: queries are
    interpolated, and each coarse key's mass is spread over the fine keys that it covers.

    Args:
        attention: (B, N, N) float32, rows sum to 1.
        size: (height, width) of the grid, in tokens, with N = height * width.
        target: (height, width) of the finer grid, in tokens, at least `size` in both.

    Returns:
        (B, M, M) float32, M = tokens of `target`; rows sum to 1.

    Raises:
        TypeError: attention is not a float32 tensor.
        ValueError: attention is not (B, N, N) with N = height * width, or target is coarser than size.

    Example:
        >>> resize_attention(torch.full((1, 6, 6), 1 / 6), (2, 3), (4, 6)).shape
        torch.Size([1, 24, 24])
    """
    op = "resize_attention"
    _checks.tensor(op, "attention", attention, "B N N", {}, torch.float32)
    _checks.grid(op, *size, attention.shape[1])
    if target[0] < size[0] or target[1] < size[1]:
        raise ValueError(f"{op}: target must be at least {tuple(size)}, got {tuple(target)}")
    _backend.choose(op, attention.device.type)
    return reference.resize_attention(attention, size, target)


def _check_features(op: str, query: Tensor, key: Tensor, scale: float | None) -> tuple[int, int]:
    """Check query, key and scale; return batch and tokens."""
    sizes: dict[str, int] = {}
    _checks.tensor(op, "query", query, "B H N d", sizes, *_FEATURES)
    _checks.tensor(op, "key", key, "B H N d", sizes, *_FEATURES)
    _checks.same_device(op, query=query, key=key)
    if scale is not None:
        _checks.number(op, "scale", scale)
    # an update in place would drop the gradient without a word
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        raise RuntimeError(f"{op}: there is no gradient; detach query and key or call under torch.no_grad()")
    return sizes["B"], sizes["N"]


@torch.library.custom_op("trace_fast::accumulate_attention", mutates_args=("total",), device_types="cpu")
def _accumulate_attention(total: Tensor, query: Tensor, key: Tensor, weight: float, scale: float) -> None:
    from trace_fast import _C

    # small beside the map, and copied only where they are strided or in half precision
    query, key = query.float().contiguous(), key.float().contiguous()
    batch, heads, tokens, channels = query.shape
    pointers = total.data_ptr(), query.data_ptr(), key.data_ptr()
    threads = torch.get_num_threads()
    _C.accumulate_attention(*pointers, batch, heads, tokens, channels, weight, scale, threads)


@_accumulate_attention.register_fake
def _(total: Tensor, query: Tensor, key: Tensor, weight: float, scale: float) -> None:
    pass
