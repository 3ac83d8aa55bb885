"""Self-attention maps: head mean, accumulated over blocks, carried between grids; and read-outs without the map."""

import functools
from typing import Any

import torch
from torch import Tensor

from trace_fast import reference
from trace_fast.ops import checks, dispatch

__all__ = ["accumulate_attention", "accumulate_resized", "attention_map", "readout", "resize_attention"]

_FEATURES = (torch.float32, torch.float16, torch.bfloat16)
_TOTALS = (torch.float32, torch.bfloat16)


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
    sizes = _check_features("attention_map", query, key, scale)
    total = torch.zeros(sizes["B"], sizes["N"], sizes["N"], dtype=torch.float32, device=query.device)
    accumulate_attention(total, query, key, 1.0, scale)
    return total


def accumulate_attention(total: Tensor, query: Tensor, key: Tensor, weight: float, scale: float | None = None) -> None:
    """Add one block's head-mean attention map to a running total, in place.

    total += weight * 1/H sum over heads of softmax(scale Q K^T), computed in float32 without a map per head.

    Args:
        total: (B, N, N) float32 or bfloat16, contiguous, updated in place; bfloat16 is rounded once a call.
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
    sizes = _check_features(op, query, key, scale)
    checks.tensor(op, "total", total, "B N N", {x: sizes[x] for x in "BN"}, *_TOTALS)
    checks.same_device(op, query=query, total=total)
    checks.contiguous(op, "total", total)
    checks.number(op, "weight", weight)
    _check_no_gradient(op, query=query, key=key)
    if dispatch.choose(op, query.device.type) == "reference":
        reference.accumulate_attention(total, query, key, weight, scale)
    else:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        _accumulate_attention(total, query, key, float(weight), float(scale))


def readout(query: Tensor, key: Tensor, values: Tensor, scale: float | None = None) -> Tensor:
    """Head-mean attention map of one block times a matrix, without the map.

    SA V with SA = 1/H sum over heads of softmax(scale Q K^T), in O(N) memory, forward and backward. Every linear
    read-out of the map is of this form: a 3 x 3 convolution that reads the map as N channels, as the paper's decoder
    does, is nine columns of V, shifted and summed. In half precision probabilities and V may be rounded to the dtype of
    query before they meet, as in `scaled_dot_product_attention`; sums are float32.

    Args:
        query: (B, H, N, d) float32, float16 or bfloat16, d at most 256, any strides.
        key: (B, H, N, d) as query, of the same dtype.
        values: (N, C) float32, float16 or bfloat16, C from 1 to 64, the same for every head and image.
        scale: factor of the logits; None is 1 / sqrt(d).

    Returns:
        (B, N, C) float32. Differentiable once in query, key and values.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes or devices differ from each other, or d or C is too large.

    Example:
        >>> query, key = torch.randn(2, 1, 4, 6, 8)
        >>> readout(query, key, torch.randn(6, 9)).shape
        torch.Size([1, 6, 9])
    """
    op = "readout"
    sizes = _check_features(op, query, key, scale)
    if query.dtype != key.dtype:
        expected, found = (str(x.dtype).removeprefix("torch.") for x in (query, key))
        raise TypeError(f"{op}: key must be {expected} like query, got {found}")
    checks.tensor(op, "values", values, "N C", sizes, *_FEATURES)
    checks.same_device(op, query=query, values=values)
    if sizes["C"] > 64:
        raise ValueError(f"{op}: values must be at most 64 columns, got {sizes['C']}")
    if dispatch.choose(op, query.device.type) == "reference":
        return reference.readout(query, key, values, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _readout(query, key, values, float(scale))[0]


def accumulate_resized(
    total: Tensor, attention: Tensor, size: tuple[int, int], target: tuple[int, int], weight: float
) -> None:
    """Add an attention map of a coarser grid to a running total, in place.

    total += weight * U SA diag(1/c) U^T, U (target, size) the bilinear interpolation of grids and c its column sums:
    queries are interpolated, and each coarse key's mass is spread over the fine keys that it covers. The blocks of a
    UNet have several grids: one total for each, and every level of noise ends with one call for each of the coarser
    ones. No other map of the finer grid is made.

    Args:
        total: (B, M, M) float32 or bfloat16, contiguous, updated in place; bfloat16 is rounded once a call.
        attention: (B, N, N) float32, rows sum to 1; copied first unless contiguous.
        size: (height, width) of the grid of attention, in tokens, with N = height * width.
        target: (height, width) of the finer grid, in tokens, at least `size` in both, with M = height * width.
        weight: factor of the map.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes or devices differ from each other, target is coarser than size, or total is not contiguous.
        RuntimeError: attention requires grad; there is no gradient.

    Example:
        >>> total = torch.zeros(1, 24, 24)
        >>> accumulate_resized(total, torch.full((1, 6, 6), 1 / 6), (2, 3), (4, 6), weight=0.5)
    """
    op = "accumulate_resized"
    sizes = _check_map(op, attention, size, target)
    checks.tensor(op, "total", total, "B M M", {"B": sizes["B"]}, *_TOTALS)
    checks.grid(op, *target, total.shape[1])
    checks.same_device(op, attention=attention, total=total)
    checks.contiguous(op, "total", total)
    checks.number(op, "weight", weight)
    if dispatch.choose(op, attention.device.type) == "reference":
        reference.accumulate_resized(total, attention, size, target, weight)
    else:
        _accumulate_resized(total, attention, *size, *target, float(weight))


def resize_attention(attention: Tensor, size: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Carry an attention map to a finer grid, so that maps of different blocks can be averaged.

    SA' = U SA diag(1/c) U^T; see `accumulate_resized`, which adds it to a map that is there already.

    Args:
        attention: (B, N, N) float32, rows sum to 1; copied first unless contiguous.
        size: (height, width) of the grid, in tokens, with N = height * width.
        target: (height, width) of the finer grid, in tokens, at least `size` in both.

    Returns:
        (B, M, M) float32, M = tokens of `target`; rows sum to 1.

    Raises:
        TypeError: attention is not a float32 tensor.
        ValueError: attention is not (B, N, N) with N = height * width, or target is coarser than size.
        RuntimeError: attention requires grad; there is no gradient.

    Example:
        >>> resize_attention(torch.full((1, 6, 6), 1 / 6), (2, 3), (4, 6)).shape
        torch.Size([1, 24, 24])
    """
    _check_map("resize_attention", attention, size, target)
    fine = target[0] * target[1]
    total = attention.new_zeros(len(attention), fine, fine)
    accumulate_resized(total, attention, size, target, 1.0)
    return total


def _check_features(op: str, query: Tensor, key: Tensor, scale: float | None) -> dict[str, int]:
    """Check query, key and scale; return the sizes."""
    sizes: dict[str, int] = {}
    checks.tensor(op, "query", query, "B H N d", sizes, *_FEATURES)
    checks.tensor(op, "key", key, "B H N d", sizes, *_FEATURES)
    checks.same_device(op, query=query, key=key)
    if sizes["d"] > 256:
        raise ValueError(f"{op}: query must be at most 256 channels a head, got {sizes['d']}")
    if scale is not None:
        checks.number(op, "scale", scale)
    return sizes


def _check_map(op: str, attention: Tensor, size: tuple[int, int], target: tuple[int, int]) -> dict[str, int]:
    """Check a map, its grid and a finer one; return the sizes."""
    sizes: dict[str, int] = {}
    checks.tensor(op, "attention", attention, "B N N", sizes, torch.float32)
    checks.grid(op, *size, attention.shape[1])
    if target[0] < size[0] or target[1] < size[1]:
        raise ValueError(f"{op}: target must be at least {tuple(size)}, got {tuple(target)}")
    _check_no_gradient(op, attention=attention)
    return sizes


def _check_no_gradient(op: str, **tensors: Tensor) -> None:
    """An update in place would drop a gradient without a word."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values()):
        names = " and ".join(tensors)
        raise RuntimeError(f"{op}: there is no gradient; detach {names} or call under torch.no_grad()")


def _narrow(wide: Tensor, total: Tensor) -> None:
    """Give an updated total back its dtype, where it had to be widened for the native core."""
    if wide is not total:
        total.copy_(wide)


@torch.library.custom_op("trace_fast::accumulate_attention", mutates_args=("total",))
def _accumulate_attention(total: Tensor, query: Tensor, key: Tensor, weight: float, scale: float) -> None:
    if dispatch.choose("accumulate_attention", total.device.type) == "triton":
        from trace_fast.kernels import attention as kernels

        kernels.accumulate_attention(total, query, key, weight, scale)
    else:
        from trace_fast import _C

        # small beside the map, and copied only where they are strided or in half precision
        query, key, wide = query.float().contiguous(), key.float().contiguous(), total.float()
        batch, heads, tokens, channels = query.shape
        pointers = wide.data_ptr(), query.data_ptr(), key.data_ptr()
        threads = torch.get_num_threads()
        _C.accumulate_attention(*pointers, batch, heads, tokens, channels, weight, scale, threads)
        _narrow(wide, total)


@_accumulate_attention.register_fake
def _(total: Tensor, query: Tensor, key: Tensor, weight: float, scale: float) -> None:
    pass


@torch.library.custom_op("trace_fast::accumulate_resized", mutates_args=("total",))
def _accumulate_resized(
    total: Tensor, attention: Tensor, height: int, width: int, target_height: int, target_width: int, weight: float
) -> None:
    size, target, attention = (height, width), (target_height, target_width), attention.contiguous()
    if dispatch.choose("accumulate_resized", total.device.type) == "triton":
        from trace_fast.kernels import attention as kernels

        sums = _bilinear_sums(size, target, total.device)
        kernels.accumulate_resized(total, attention, size, target, weight, sums)
    else:
        from trace_fast import _C

        wide, threads = total.float(), torch.get_num_threads()
        _C.accumulate_resized(wide.data_ptr(), attention.data_ptr(), len(total), *size, *target, weight, threads)
        _narrow(wide, total)


@_accumulate_resized.register_fake
def _(
    total: Tensor, attention: Tensor, height: int, width: int, target_height: int, target_width: int, weight: float
) -> None:
    pass


@functools.lru_cache(maxsize=64)
def _bilinear_sums(size: tuple[int, int], target: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """`reference.bilinear_sums` in float32, kept: they are the same at every level of noise."""
    return reference.bilinear_sums(size, target, torch.empty(0, dtype=torch.float32, device=device))


@torch.library.custom_op("trace_fast::readout", mutates_args=())
def _readout(query: Tensor, key: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The read-out; for its gradient, every head's own (B, H, N, C) and log2 of row sums of exp(logits) (B, H, N)."""
    if dispatch.choose("readout", query.device.type) == "triton":
        from trace_fast.kernels import attention as kernels

        parts, lse = kernels.readout(query, key, values, scale)
    else:
        from trace_fast import _C

        (batch, heads, tokens, channels), columns = query.shape, values.shape[1]
        parts = values.new_empty((batch, heads, tokens, columns), dtype=torch.float32)
        lse = parts.new_empty(batch, heads, tokens)
        query, key, values = (x.float().contiguous() for x in (query, key, values))
        inputs, outputs = (query.data_ptr(), key.data_ptr(), values.data_ptr()), (parts.data_ptr(), lse.data_ptr())
        threads = torch.get_num_threads()
        _C.readout(*inputs, batch, heads, tokens, channels, columns, scale, *outputs, threads)
    return parts.mean(1), parts, lse


@_readout.register_fake
def _(query: Tensor, key: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    parts = values.new_empty((*query.shape[:3], values.shape[1]), dtype=torch.float32)
    return parts.mean(1), parts, parts.new_empty(query.shape[:3])


@torch.library.custom_op("trace_fast::readout_backward", mutates_args=())
def _readout_backward(
    grad: Tensor, query: Tensor, key: Tensor, values: Tensor, parts: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and values, in float32 for values, from that of the read-out (B, N, C)."""
    grad = (grad / query.shape[1]).contiguous()  # of every head's own
    if dispatch.choose("readout", query.device.type) == "triton":
        from trace_fast.kernels import attention as kernels

        grad_query, grad_key, grad_values = kernels.readout_backward(grad, query, key, values, parts, lse, scale)
    else:
        from trace_fast import _C

        (batch, heads, tokens, channels), columns, dtype = query.shape, values.shape[1], query.dtype
        query, key, values = (x.float().contiguous() for x in (query, key, values))
        delta = (grad[:, None] * parts).sum(-1)  # (B, H, N)
        grad_query, grad_key, grad_values = (torch.empty_like(x) for x in (query, key, parts))
        features = query.data_ptr(), key.data_ptr(), values.data_ptr(), lse.data_ptr()
        outputs = grad_query.data_ptr(), grad_key.data_ptr(), grad_values.data_ptr()
        sizes = batch, heads, tokens, channels, columns
        threads = torch.get_num_threads()
        _C.readout_backward(grad.data_ptr(), delta.data_ptr(), *features, *sizes, scale, *outputs, threads)
        grad_query, grad_key = grad_query.to(dtype), grad_key.to(dtype)
    return grad_query, grad_key, grad_values.sum((0, 1))


@_readout_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, values: Tensor, parts: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), values.new_empty(values.shape, dtype=torch.float32)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, values, ctx.scale = inputs
    ctx.save_for_backward(query, key, values, *output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    query, key, values, parts, lse = ctx.saved_tensors
    grads = _readout_backward(grad, query, key, values, parts, lse, ctx.scale)
    return *grads[:2], grads[2].to(values.dtype), None


_readout.register_autograd(_differentiate, setup_context=_save_for_backward)
