"""Self-attention maps, averaged over heads and blocks or resampled; and readouts that never form the map."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function_variadic

from trace_fast import reference
from trace_fast.ops import checks, dispatch
from trace_fast.ops.constants import cache_constants
from trace_fast.ops.dispatch import register

__all__ = ["accumulate_attention", "accumulate_resized", "attend", "attention_map", "readout", "resize_attention"]

_FEATURES = (torch.float32, torch.float16, torch.bfloat16)
_TOTALS = (torch.float32, torch.bfloat16)
_FACTORS = (torch.finfo(torch.float32).min, torch.finfo(torch.float32).max)  # kernels take them as float32


@register(cuda="triton")
def attention_map(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """Run the fastest implementation of `trace_fast.reference.attention_map`.

    Note:
        query and key are float32, float16 or bfloat16 with any strides, d at most 256; the map is float32.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes or devices differ from each other, or d is too large.
        RuntimeError: query or key requires grad; there is no gradient.
    """
    op = "attention_map"
    sizes = _check_features(op, query, key, scale)
    _check_no_gradient(op, query=query, key=key)
    checks.memory(op, "query", query, 4 * sizes["B"] * sizes["N"] ** 2)
    total = query.new_zeros(sizes["B"], sizes["N"], sizes["N"], dtype=torch.float32)
    accumulate_attention(total, query, key, 1.0, scale)
    return total


@register(cuda="triton")
def accumulate_attention(
    total: Tensor,
    query: Tensor,
    key: Tensor,
    weight: float,
    scale: float | None = None,
    lse: Tensor | None = None,
    others: Tensor | None = None,
) -> None:
    """Run the fastest implementation of `trace_fast.reference.accumulate_attention`.

    Note:
        query and key are float32, float16 or bfloat16 with any strides, d at most 256. total is float32 or bfloat16,
        and contiguous. Sums are float32, and no map of a single head is formed. lse is float32, and its error, half a
        unit in its last place or more, is a relative error of the row's probabilities. The mass of others is subtracted
        where it leaves a 32nd of the row's, by which errors grow at most 32 times; other rows are summed up as if lse
        were not given. On a CPU, where it saves nothing, neither is used.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes or devices differ from each other, d is too large, or total is not contiguous.
        RuntimeError: query, key or total requires grad; there is no gradient.
    """
    op = "accumulate_attention"
    sizes = _check_features(op, query, key, scale)
    checks.tensor(op, "total", total, "B N N", {letter: sizes[letter] for letter in "BN"}, *_TOTALS)
    checks.same_device(op, query=query, total=total)
    checks.contiguous(op, "total", total)
    checks.number(op, "weight", weight, *_FACTORS)
    if lse is not None:
        checks.tensor(op, "lse", lse, "B H N", sizes, torch.float32)
        checks.same_device(op, query=query, lse=lse)
    if others is not None:
        checks.tensor(op, "others", others, "B H T d", sizes, key.dtype)
        checks.same_device(op, query=query, others=others)
    _check_no_gradient(op, query=query, key=key, total=total)
    backend = dispatch.choose(op, query.device)
    if backend == "reference":
        reference.accumulate_attention(total, query, key, weight, scale, lse, others)
    else:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        _accumulate_attention(total, query, key, float(weight), float(scale), backend, lse, others)


@register(cuda="triton")
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    total: Tensor | None = None,
    weight: float = 1.0,
    scale: float | None = None,
    first: int = 0,
) -> Tensor:
    """Run the fastest implementation of `trace_fast.reference.attend`.

    Note:
        query, key and value are of one dtype, float32, float16 or bfloat16, with any strides, d at most 256. total is
        float32 or bfloat16, and contiguous. Sums are float32, and memory beside total and the result is O(N). On a CPU
        nothing is rounded to half precision but the result, a view of (B, N, H, d): a network joins the heads without a
        copy. On a GPU `scaled_dot_product_attention` computes the result, and `accumulate_attention` the map.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes or devices differ from each other, d is too large, or total is not contiguous, or of more
            tokens than there are from `first` on.
        RuntimeError: query, key, value or total requires grad; there is no gradient.
    """
    if has_torch_function_variadic(query, key, value):  # a capture lets the call add its map to a total
        return handle_torch_function(attend, (query, key, value), query, key, value, total, weight, scale, first)
    op = "attend"
    sizes = _check_features(op, query, key, scale)
    checks.tensor(op, "value", value, "B H N d", sizes, *_FEATURES)
    _check_dtypes(op, query, key=key, value=value)
    checks.same_device(op, query=query, value=value)
    if total is not None:
        checks.tensor(op, "total", total, "B T T", {"B": sizes["B"]}, *_TOTALS)
        checks.same_device(op, query=query, total=total)
        checks.contiguous(op, "total", total)
        if total.shape[1] > sizes["N"]:
            raise ValueError(f"{op}: total must be of at most {sizes['N']} tokens, got {total.shape[1]}")
        checks.integer(op, "first", first, 0, sizes["N"] - total.shape[1])
        _check_no_gradient(op, total=total)
    checks.number(op, "weight", weight, *_FACTORS)
    _check_no_gradient(op, query=query, key=key, value=value)
    backend = dispatch.choose(op, query.device)
    if backend == "reference":
        return reference.attend(query, key, value, total, weight, scale, first)
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    if backend == "triton":
        if total is not None:
            mapped = slice(first, first + total.shape[1])
            _accumulate_attention(total, query[:, :, mapped], key[:, :, mapped], float(weight), scale, backend)
        return functional.scaled_dot_product_attention(query, key, value, scale=scale)
    if total is None:
        return _attend(query, key, value, scale)
    return _attend_and_accumulate(total, query, key, value, float(weight), scale, int(first))


@register(cuda="triton")
def readout(query: Tensor, key: Tensor, values: Tensor, scale: float | None = None) -> Tensor:
    """Run the fastest implementation of `trace_fast.reference.readout`.

    Note:
        query, key and values are float32, float16 or bfloat16; query and key have any strides, one dtype and d at most
        256; C is from 1 to 64. The result is float32, differentiable once. The map is never formed: memory is O(N),
        forward and backward. On a CPU nothing is rounded to half precision.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes or devices differ from each other, or d or C is too large.
    """
    op = "readout"
    sizes = _check_features(op, query, key, scale)
    _check_dtypes(op, query, key=key)
    checks.tensor(op, "values", values, "N C", sizes, *_FEATURES)
    checks.same_device(op, query=query, values=values)
    if sizes["C"] > 64:
        raise ValueError(f"{op}: values must be at most 64 columns wide, got {sizes['C']}")
    checks.memory(op, "query", query, 4 * math.prod(query.shape[:3]) * (sizes["C"] + 1))
    backend = dispatch.choose(op, query.device)
    if backend == "reference":
        return reference.readout(query, key, values, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _readout(query, key, values, float(scale), backend)[0]


@register(cuda="triton")
def accumulate_resized(
    total: Tensor, attention: Tensor, size: tuple[int, int], target: tuple[int, int], weight: float
) -> None:
    """Run the fastest implementation of `trace_fast.reference.accumulate_resized`.

    Note:
        total is float32 or bfloat16, and contiguous; attention is float32, and is copied first unless contiguous. No
        other map of the finer grid is formed.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes or devices differ from each other, target is coarser than size, or total is not contiguous.
        RuntimeError: attention or total requires grad; there is no gradient.
    """
    op = "accumulate_resized"
    sizes = _check_map(op, attention, size, target)
    checks.tensor(op, "total", total, "B M M", {"B": sizes["B"]}, *_TOTALS)
    checks.grid(op, *target, total.shape[1])
    checks.same_device(op, attention=attention, total=total)
    checks.contiguous(op, "total", total)
    checks.number(op, "weight", weight, *_FACTORS)
    _check_no_gradient(op, total=total)
    backend = dispatch.choose(op, attention.device)
    if backend == "reference":
        reference.accumulate_resized(total, attention, size, target, weight)
    else:
        _accumulate_resized(total, attention, *size, *target, float(weight), backend)


@register(cuda="triton")
def resize_attention(attention: Tensor, size: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Run the fastest implementation of `trace_fast.reference.resize_attention`.

    Note:
        attention is float32, and is copied first unless contiguous; the result is float32.

    Raises:
        TypeError: attention is not a float32 tensor.
        ValueError: attention is not (B, N, N) with N = height * width, or target is coarser than size.
        RuntimeError: attention requires grad; there is no gradient.
    """
    _check_map("resize_attention", attention, size, target)
    fine_tokens = target[0] * target[1]
    checks.memory("resize_attention", "attention", attention, 4 * len(attention) * fine_tokens**2)
    total = attention.new_zeros(len(attention), fine_tokens, fine_tokens)
    accumulate_resized(total, attention, size, target, 1.0)
    return total


def _check_features(op: str, query: Tensor, key: Tensor, scale: float | None) -> dict[str, int]:
    """Check query, key and scale, and return the sizes."""
    sizes: dict[str, int] = {}
    checks.tensor(op, "query", query, "B H N d", sizes, *_FEATURES)
    checks.tensor(op, "key", key, "B H N d", sizes, *_FEATURES)
    checks.same_device(op, query=query, key=key)
    if sizes["d"] > 256:
        raise ValueError(f"{op}: query must be at most 256 channels per head, got {sizes['d']}")
    if scale is not None:
        checks.number(op, "scale", scale, *_FACTORS)
    # both, and a packed copy of one, in float32
    checks.memory(op, "query", query, 12 * query.numel())
    return sizes


def _check_dtypes(op: str, query: Tensor, **others: Tensor) -> None:
    """Require other features of the dtype of query."""
    expected = str(query.dtype).removeprefix("torch.")
    for name, features in others.items():
        if features.dtype != query.dtype:
            actual = str(features.dtype).removeprefix("torch.")
            raise TypeError(f"{op}: {name} must be {expected} like query, got {actual}")


def _check_map(op: str, attention: Tensor, size: tuple[int, int], target: tuple[int, int]) -> dict[str, int]:
    """Check a map, its grid and a finer grid, and return the sizes."""
    sizes: dict[str, int] = {}
    checks.tensor(op, "attention", attention, "B N N", sizes, torch.float32)
    checks.pair(op, "size", size)
    checks.pair(op, "target", target)
    checks.grid(op, *size, attention.shape[1])
    if target[0] < size[0] or target[1] < size[1]:
        raise ValueError(f"{op}: target must be at least {tuple(size)}, got {tuple(target)}")
    _check_no_gradient(op, attention=attention)
    return sizes


def _check_no_gradient(op: str, **tensors: Tensor) -> None:
    """Require tensors without a gradient, which an update in place would drop silently."""
    names = [name for name, value in tensors.items() if value.requires_grad]
    if names and torch.is_grad_enabled():
        raise RuntimeError(f"{op}: there is no gradient; detach {' and '.join(names)} or call under torch.no_grad()")


def _round_total(wide_total: Tensor, total: Tensor) -> None:
    """Round an updated total back to its dtype, if it had to be widened for the native core."""
    if wide_total is not total:
        total.copy_(wide_total)


@dispatch.custom_op("trace_fast::accumulate_attention", mutates_args=("total",))
def _accumulate_attention(
    total: Tensor,
    query: Tensor,
    key: Tensor,
    weight: float,
    scale: float,
    backend: str,
    lse: Tensor | None = None,
    others: Tensor | None = None,
) -> None:
    if backend == "triton":
        from trace_fast.kernels import attention as kernels

        kernels.accumulate_attention(total, query, key, weight, scale, lse, others)
    else:
        from trace_fast import _C

        # copies are small compared with the map, and made only of what is strided or in half precision
        query, key, wide_total = query.float().contiguous(), key.float().contiguous(), total.float()
        batch, heads, tokens, channels = query.shape
        pointers = wide_total.data_ptr(), query.data_ptr(), key.data_ptr()
        threads = dispatch.count_threads()
        _C.cpu.accumulate_attention(*pointers, batch, heads, tokens, channels, weight, scale, threads)
        _round_total(wide_total, total)


@_accumulate_attention.register_fake
def _(
    total: Tensor,
    query: Tensor,
    key: Tensor,
    weight: float,
    scale: float,
    backend: str,
    lse: Tensor | None = None,
    others: Tensor | None = None,
) -> None:
    pass


@dispatch.custom_op("trace_fast::attend")
def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    from trace_fast import _C

    mixed, features = _widen(query, key, value)
    pointers = (tensor.data_ptr() for tensor in features)
    _C.cpu.attend(*pointers, *query.shape, scale, mixed.data_ptr(), dispatch.count_threads())
    return mixed.to(query.dtype).transpose(1, 2)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)


@dispatch.custom_op("trace_fast::attend_and_accumulate", mutates_args=("total",))
def _attend_and_accumulate(
    total: Tensor, query: Tensor, key: Tensor, value: Tensor, weight: float, scale: float, first: int
) -> Tensor:
    from trace_fast import _C

    (mixed, features), wide_total = _widen(query, key, value), total.float()
    pointers = (tensor.data_ptr() for tensor in (wide_total, *features))
    sizes = *query.shape, total.shape[1], first + total.shape[1]
    _C.cpu.attend_and_accumulate(*pointers, *sizes, weight, scale, mixed.data_ptr(), dispatch.count_threads())
    _round_total(wide_total, total)
    return mixed.to(query.dtype).transpose(1, 2)


@_attend_and_accumulate.register_fake
def _(total: Tensor, query: Tensor, key: Tensor, value: Tensor, weight: float, scale: float, first: int) -> Tensor:
    return query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)


def _widen(*features: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return memory for what attention mixes, (B, N, H, d), and features as the native core takes them."""
    mixed = torch.empty(features[0].transpose(1, 2).shape, dtype=torch.float32)
    return mixed, [tensor.float().contiguous() for tensor in features]


@dispatch.custom_op("trace_fast::accumulate_resized", mutates_args=("total",))
def _accumulate_resized(
    total: Tensor,
    attention: Tensor,
    height: int,
    width: int,
    target_height: int,
    target_width: int,
    weight: float,
    backend: str,
) -> None:
    size, target, attention = (height, width), (target_height, target_width), attention.contiguous()
    if backend == "triton":
        from trace_fast.kernels import attention as kernels

        sums = _bilinear_sums(size, target, total.device)
        kernels.accumulate_resized(total, attention, size, target, weight, sums)
    else:
        from trace_fast import _C

        wide_total, threads = total.float(), dispatch.count_threads()
        _C.cpu.accumulate_resized(
            wide_total.data_ptr(), attention.data_ptr(), len(total), *size, *target, weight, threads
        )
        _round_total(wide_total, total)


@_accumulate_resized.register_fake
def _(
    total: Tensor,
    attention: Tensor,
    height: int,
    width: int,
    target_height: int,
    target_width: int,
    weight: float,
    backend: str,
) -> None:
    pass


@cache_constants(maxsize=64)
def _bilinear_sums(size: tuple[int, int], target: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `reference.attention.bilinear_sums` in float32, cached: they are the same at every timestep."""
    return reference.attention.bilinear_sums(size, target, torch.empty(0, dtype=torch.float32, device=device))


@dispatch.custom_op("trace_fast::readout")
def _readout(query: Tensor, key: Tensor, values: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the readout and, for the gradient, that of each head and log2 of the row sums of exp(logits) (B, H, N)."""
    if backend == "triton":
        from trace_fast.kernels import attention as kernels

        parts, lse = kernels.readout(query, key, values, scale)
    else:
        from trace_fast import _C

        (batch, heads, tokens, channels), columns = query.shape, values.shape[1]
        parts = values.new_empty((batch, heads, tokens, columns), dtype=torch.float32)
        lse = parts.new_empty(batch, heads, tokens)
        query, key, values = (tensor.float().contiguous() for tensor in (query, key, values))
        inputs, outputs = (query.data_ptr(), key.data_ptr(), values.data_ptr()), (parts.data_ptr(), lse.data_ptr())
        threads = dispatch.count_threads()
        _C.cpu.readout(*inputs, batch, heads, tokens, channels, columns, scale, *outputs, threads)
    return parts.mean(1), parts, lse


@_readout.register_fake
def _(query: Tensor, key: Tensor, values: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    parts = values.new_empty((*query.shape[:3], values.shape[1]), dtype=torch.float32)
    return parts.mean(1), parts, parts.new_empty(query.shape[:3])


@dispatch.custom_op("trace_fast::readout_backward")
def _readout_backward(
    grad: Tensor, query: Tensor, key: Tensor, values: Tensor, parts: Tensor, lse: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and, in float32, values from the gradient of the readout (B, N, C)."""
    grad = (grad / query.shape[1]).contiguous()  # of the readout of each head
    if backend == "triton":
        from trace_fast.kernels import attention as kernels

        grad_query, grad_key, grad_values = kernels.readout_backward(grad, query, key, values, parts, lse, scale)
    else:
        from trace_fast import _C

        (batch, heads, tokens, channels), columns, dtype = query.shape, values.shape[1], query.dtype
        query, key, values = (tensor.float().contiguous() for tensor in (query, key, values))
        delta = (grad[:, None] * parts).sum(-1)  # (B, H, N)
        grad_query, grad_key, grad_values = (torch.empty_like(tensor) for tensor in (query, key, parts))
        features = query.data_ptr(), key.data_ptr(), values.data_ptr(), lse.data_ptr()
        outputs = grad_query.data_ptr(), grad_key.data_ptr(), grad_values.data_ptr()
        sizes = batch, heads, tokens, channels, columns
        threads = dispatch.count_threads()
        _C.cpu.readout_backward(grad.data_ptr(), delta.data_ptr(), *features, *sizes, scale, *outputs, threads)
        grad_query, grad_key = grad_query.to(dtype), grad_key.to(dtype)
    return grad_query, grad_key, grad_values.sum((0, 1))


@_readout_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, values: Tensor, parts: Tensor, lse: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), values.new_empty(values.shape, dtype=torch.float32)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, values, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(query, key, values, *output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    query, key, values, parts, lse = ctx.saved_tensors
    grads = _readout_backward(grad, query, key, values, parts, lse, ctx.scale, ctx.backend)
    return *grads[:2], grads[2].to(values.dtype), None, None


_readout.register_autograd(_differentiate, setup_context=_save_for_backward)
