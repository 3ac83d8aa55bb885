"""Divergence of attention maps: over time between timesteps, over space between neighbors."""

import torch
from torch import Tensor

from trace_fast import reference
from trace_fast.ops import checks, dispatch
from trace_fast.ops.dispatch import register

__all__ = ["abdiv", "step_kl", "step_kl_abdiv"]

_MAPS = (torch.float32, torch.bfloat16)


@register(cuda="triton")
def step_kl(previous: Tensor, current: Tensor) -> Tensor:
    """Run the fastest implementation of `trace_fast.reference.step_kl`.

    Note:
        Maps are float32 or bfloat16, and are copied first unless contiguous; the result is float32.

    Raises:
        TypeError: a map is not a float32 or bfloat16 tensor.
        ValueError: shapes or devices differ from each other.
    """
    _check_pair("step_kl", previous, current)
    backend = dispatch.choose("step_kl", current.device)
    if backend == "reference":
        return reference.step_kl(previous, current)
    return _step_kl(previous, current, backend)


@register(cuda="triton")
def abdiv(attention: Tensor, height: int, width: int) -> Tensor:
    """Run the fastest implementation of `trace_fast.reference.abdiv`.

    Note:
        Maps are float32 or bfloat16, and are copied first unless contiguous; the result is float32.

    Raises:
        TypeError: attention is not a float32 or bfloat16 tensor.
        ValueError: attention is not (B, N, N) or N differs from height * width.
    """
    checks.tensor("abdiv", "attention", attention, "B N N", {}, *_MAPS)
    checks.grid("abdiv", height, width, attention.shape[1])
    backend = dispatch.choose("abdiv", attention.device)
    if backend == "reference":
        return reference.abdiv(attention, height, width)
    return _abdiv(attention, height, width, backend)


@register(cuda="triton")
def step_kl_abdiv(previous: Tensor, current: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Run the fastest implementation of `trace_fast.reference.step_kl_abdiv`.

    Note:
        Maps are float32 or bfloat16, and are copied first unless contiguous; the results are float32.

    Raises:
        TypeError: a map is not a float32 or bfloat16 tensor.
        ValueError: shapes or devices differ from each other, or N differs from height * width.
    """
    _check_pair("step_kl_abdiv", previous, current)
    checks.grid("step_kl_abdiv", height, width, current.shape[1])
    backend = dispatch.choose("step_kl_abdiv", current.device)
    if backend == "reference":
        return reference.step_kl_abdiv(previous, current, height, width)
    return _step_kl_abdiv(previous, current, height, width, backend)


def _check_pair(op: str, previous: Tensor, current: Tensor) -> None:
    """Check two maps of one shape on one device."""
    sizes: dict[str, int] = {}
    checks.tensor(op, "previous", previous, "B N N", sizes, *_MAPS)
    checks.tensor(op, "current", current, "B N N", sizes, *_MAPS)
    checks.same_device(op, previous=previous, current=current)


@dispatch.custom_op("trace_fast::step_kl")
def _step_kl(previous: Tensor, current: Tensor, backend: str) -> Tensor:
    if backend == "triton":
        from trace_fast.kernels import divergence as kernels

        return kernels.measure_divergence(previous.contiguous(), current.contiguous(), None)[0]
    from trace_fast import _C

    previous, current = previous.float().contiguous(), current.float().contiguous()
    batch, tokens, _ = current.shape
    kl = current.new_empty(batch)
    _C.cpu.step_kl(previous.data_ptr(), current.data_ptr(), batch, tokens, kl.data_ptr(), dispatch.count_threads())
    return kl


@_step_kl.register_fake
def _(previous: Tensor, current: Tensor, backend: str) -> Tensor:
    return _empty(current, current.shape[0])


@dispatch.custom_op("trace_fast::abdiv")
def _abdiv(attention: Tensor, height: int, width: int, backend: str) -> Tensor:
    if backend == "triton":
        from trace_fast.kernels import divergence as kernels

        return kernels.measure_divergence(None, attention.contiguous(), (height, width))[1]
    from trace_fast import _C

    attention = attention.float().contiguous()
    batch = attention.shape[0]
    scores = attention.new_empty(batch, height, width)
    _C.cpu.abdiv(attention.data_ptr(), batch, height, width, scores.data_ptr(), dispatch.count_threads())
    return scores


@_abdiv.register_fake
def _(attention: Tensor, height: int, width: int, backend: str) -> Tensor:
    return _empty(attention, attention.shape[0], height, width)


@dispatch.custom_op("trace_fast::step_kl_abdiv")
def _step_kl_abdiv(previous: Tensor, current: Tensor, height: int, width: int, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from trace_fast.kernels import divergence as kernels

        return kernels.measure_divergence(previous.contiguous(), current.contiguous(), (height, width))
    from trace_fast import _C

    previous, current = previous.float().contiguous(), current.float().contiguous()
    batch = current.shape[0]
    kl, scores = current.new_empty(batch), current.new_empty(batch, height, width)
    threads = dispatch.count_threads()
    pointers = previous.data_ptr(), current.data_ptr()
    _C.cpu.step_kl_abdiv(*pointers, batch, height, width, kl.data_ptr(), scores.data_ptr(), threads)
    return kl, scores


@_step_kl_abdiv.register_fake
def _(previous: Tensor, current: Tensor, height: int, width: int, backend: str) -> tuple[Tensor, Tensor]:
    return _empty(current, current.shape[0]), _empty(current, current.shape[0], height, width)


def _empty(like: Tensor, *shape: int) -> Tensor:
    """Return an uninitialized result."""
    return like.new_empty(shape, dtype=torch.float32)
