"""Divergence of attention maps: over time between noise levels, over space between neighbours."""

import torch
from torch import Tensor

from trace_fast import reference
from trace_fast.ops import checks, dispatch

__all__ = ["abdiv", "step_kl", "step_kl_abdiv"]

_MAPS = (torch.float32, torch.bfloat16)


def step_kl(previous: Tensor, current: Tensor) -> Tensor:
    """Divergence between the attention maps of two noise levels, whose maximum is the Instance Emergence Point.

    KL(SA(X_t_prev) || SA(X_t)) (the paper's IEP), mean over query rows; the less noisy map comes first.

    Args:
        previous: (B, N, N) float32 or bfloat16, rows sum to 1; copied first unless contiguous.
        current: (B, N, N) as previous.

    Returns:
        (B,) float32, in nats, >= 0 up to rounding. Probabilities are clamped below at 2^-126.

    Raises:
        TypeError: an argument is not a float32 or bfloat16 tensor.
        ValueError: shapes or devices differ from each other.

    Example:
        >>> previous, current = torch.rand(2, 1, 6, 6).softmax(-1)
        >>> step_kl(previous, current).shape
        torch.Size([1])
    """
    _check_pair("step_kl", previous, current)
    if dispatch.choose("step_kl", current.device.type) == "reference":
        return reference.step_kl(previous, current)
    return _step_kl(previous, current)


def abdiv(attention: Tensor, height: int, width: int) -> Tensor:
    """Boundary strength from the divergence between opposite neighbours.

    ABDiv = KL(right || left) + KL(below || above) of the attention rows around each token (the paper's Attention
    Boundary Divergence).

    Args:
        attention: (B, N, N) float32 or bfloat16, rows sum to 1, N = height * width; row i is what token i attends to.
            Copied first unless contiguous.
        height: grid rows, in tokens.
        width: grid columns, in tokens.

    Returns:
        (B, height, width) float32, in nats, >= 0 up to rounding; neighbours are clamped to the grid at the border,
        probabilities below at 2^-126.

    Raises:
        TypeError: attention is not a float32 or bfloat16 tensor.
        ValueError: attention is not (B, N, N) or N differs from height * width.

    Example:
        >>> abdiv(torch.rand(1, 6, 6).softmax(-1), 2, 3).shape
        torch.Size([1, 2, 3])
    """
    checks.tensor("abdiv", "attention", attention, "B N N", {}, *_MAPS)
    checks.grid("abdiv", height, width, attention.shape[1])
    if dispatch.choose("abdiv", attention.device.type) == "reference":
        return reference.abdiv(attention, height, width)
    return _abdiv(attention, height, width)


def step_kl_abdiv(previous: Tensor, current: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """`step_kl` of a pair of maps and `abdiv` of the second, from one read of each.

    Args:
        previous: (B, N, N) float32 or bfloat16, rows sum to 1, N = height * width; copied first unless contiguous.
        current: (B, N, N) as previous.
        height: grid rows, in tokens.
        width: grid columns, in tokens.

    Returns:
        `step_kl(previous, current)`, (B,), and `abdiv(current, height, width)`, (B, height, width), in nats.

    Raises:
        TypeError: a map is not a float32 or bfloat16 tensor.
        ValueError: shapes or devices differ from each other, or N differs from height * width.

    Example:
        >>> previous, current = torch.rand(2, 1, 6, 6).softmax(-1)
        >>> [x.shape for x in step_kl_abdiv(previous, current, 2, 3)]
        [torch.Size([1]), torch.Size([1, 2, 3])]
    """
    _check_pair("step_kl_abdiv", previous, current)
    checks.grid("step_kl_abdiv", height, width, current.shape[1])
    if dispatch.choose("step_kl_abdiv", current.device.type) == "reference":
        return reference.step_kl_abdiv(previous, current, height, width)
    return _step_kl_abdiv(previous, current, height, width)


def _check_pair(op: str, previous: Tensor, current: Tensor) -> None:
    """Check two maps of one shape on one device."""
    sizes: dict[str, int] = {}
    checks.tensor(op, "previous", previous, "B N N", sizes, *_MAPS)
    checks.tensor(op, "current", current, "B N N", sizes, *_MAPS)
    checks.same_device(op, previous=previous, current=current)


@torch.library.custom_op("trace_fast::step_kl", mutates_args=())
def _step_kl(previous: Tensor, current: Tensor) -> Tensor:
    if dispatch.choose("step_kl", current.device.type) == "triton":
        from trace_fast.kernels import divergence as kernels

        return kernels.divergence(previous.contiguous(), current.contiguous(), None)[0]
    from trace_fast import _C

    previous, current = previous.float().contiguous(), current.float().contiguous()
    batch, tokens, _ = current.shape
    kl = current.new_empty(batch)
    _C.step_kl(previous.data_ptr(), current.data_ptr(), batch, tokens, kl.data_ptr(), torch.get_num_threads())
    return kl


@_step_kl.register_fake
def _(previous: Tensor, current: Tensor) -> Tensor:
    return _empty(current, current.shape[0])


@torch.library.custom_op("trace_fast::abdiv", mutates_args=())
def _abdiv(attention: Tensor, height: int, width: int) -> Tensor:
    if dispatch.choose("abdiv", attention.device.type) == "triton":
        from trace_fast.kernels import divergence as kernels

        return kernels.divergence(None, attention.contiguous(), (height, width))[1]
    from trace_fast import _C

    attention = attention.float().contiguous()
    batch = attention.shape[0]
    scores = attention.new_empty(batch, height, width)
    _C.abdiv(attention.data_ptr(), batch, height, width, scores.data_ptr(), torch.get_num_threads())
    return scores


@_abdiv.register_fake
def _(attention: Tensor, height: int, width: int) -> Tensor:
    return _empty(attention, attention.shape[0], height, width)


@torch.library.custom_op("trace_fast::step_kl_abdiv", mutates_args=())
def _step_kl_abdiv(previous: Tensor, current: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    if dispatch.choose("step_kl_abdiv", current.device.type) == "triton":
        from trace_fast.kernels import divergence as kernels

        return kernels.divergence(previous.contiguous(), current.contiguous(), (height, width))
    from trace_fast import _C

    previous, current = previous.float().contiguous(), current.float().contiguous()
    batch = current.shape[0]
    kl, scores = current.new_empty(batch), current.new_empty(batch, height, width)
    threads = torch.get_num_threads()
    pointers = previous.data_ptr(), current.data_ptr()
    _C.step_kl_abdiv(*pointers, batch, height, width, kl.data_ptr(), scores.data_ptr(), threads)
    return kl, scores


@_step_kl_abdiv.register_fake
def _(previous: Tensor, current: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    return _empty(current, current.shape[0]), _empty(current, current.shape[0], height, width)


def _empty(like: Tensor, *shape: int) -> Tensor:
    """Room for a result."""
    return like.new_empty(shape, dtype=torch.float32)
