"""Other last bits: torch with a math library that rounds differently, for `TRACE_FAST_TEST_ULP=1`, or 2, 3, ...

Results of float operations differ by a unit in the last place between processors, instruction sets and libraries, and
a test that compares them exactly passes on one machine and fails on the next. Here every result of the operations below
moves by -1, 0 or +1 unit. The step is drawn from the value, the operation and the shape, so that a call repeated with
the same input gives the same bits, as it does on every machine, and another way to the same value gives others. Values
that use few bits of their mantissa (counts, halves, the exponential of 0) are exact everywhere and stay. The number of
the variable is a seed: each gives another library.
"""

import functools
import threading
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["install"]

# what differs between machines: transcendental functions, and sums, whose order does
MATH = "cos exp exp2 expm1 log log10 log1p log2 rsqrt sigmoid sin sqrt tanh"
SUMS = "cumprod cumsum log_softmax logsumexp mean norm prod softmax std sum var"
OPERATIONS = {
    torch: f"{MATH} {SUMS} bmm einsum linspace logspace matmul mm pow rand rand_like randn randn_like vdot",
    Tensor: f"{MATH} {SUMS} bmm matmul mm pow __matmul__ __pow__ __rmatmul__ __rpow__",
    functional: "adaptive_avg_pool2d avg_pool2d batch_norm conv2d conv_transpose2d gelu group_norm interpolate "
    "layer_norm linear log_softmax sigmoid silu softmax softplus tanh",
}
# integers of the same size, and the number of last bits of the mantissa that are 0 in an exact value
BITS = {torch.float64: (torch.int64, 17), torch.float32: (torch.int32, 7), torch.float16: (torch.int16, 3)}
BITS[torch.bfloat16] = (torch.int16, 2)

_state = threading.local()


def install(seed: int) -> None:
    """Replace the operations for the rest of the process; compiled code is not changed."""
    for owner, names in OPERATIONS.items():
        for name in names.split():
            setattr(owner, name, perturbed(getattr(owner, name), name, seed))


def perturbed(operation: Callable[..., Any], name: str, seed: int) -> Callable[..., Any]:
    """Return the operation with another last bit in its results."""
    salt = zlib.crc32(f"{seed} {name.strip('_')}".encode())

    @functools.wraps(operation)
    def call(*arguments: Any, **keywords: Any) -> Any:
        # an operation may call another, or itself under a mode of torch: the outermost result moves, once
        if torch.compiler.is_compiling() or "out" in keywords or getattr(_state, "inside", False):
            return operation(*arguments, **keywords)
        _state.inside = True
        try:
            result = operation(*arguments, **keywords)
            # a function of a rounded value is rounded, even if it comes out as 1
            return shift(result, salt, arguments[0] if name in MATH.split() else result)
        finally:
            _state.inside = False

    return call


def shift(result: Any, salt: int, source: Any = None) -> Any:
    """Move the values of a dense tensor by at most one unit in the last place, gradients as they were.

    Values stay where both they and those of `source`, of the same shape, use few bits; 0 stays, and 1 moves towards 0.
    """
    if type(result) is not Tensor or result.dtype not in BITS or result.is_meta or not result.numel():
        return result
    whole = BITS[result.dtype][0]
    with torch.no_grad():
        values = result.detach()
        bits = values.view(whole)
        # a multiplicative hash of value, operation and shape; its upper bits are as good as random
        key = (salt + zlib.crc32(repr(tuple(result.shape)).encode())) & 0x7FFF
        mixed = (bits.long() * 0x9E3779B1 + key * 0x85EBCA6B) >> 13 & 0xFFFF
        step = (mixed % 3 - 1).to(whole)
        step = torch.where(values.abs() == 1, -step.abs(), step)
        rounded = uses_last_bits(values)
        if isinstance(source, Tensor) and source.shape == result.shape and source.dtype in BITS:
            rounded = rounded | uses_last_bits(source.detach())
        moved = torch.where(rounded & values.isfinite() & (values != 0), bits + step, bits).view(result.dtype)
        change = moved - values
    return result + change if result.requires_grad else moved


def uses_last_bits(values: Tensor) -> Tensor:
    """Return where one of the last bits of the mantissa is set."""
    whole, low = BITS[values.dtype]
    return (values.view(whole) & ((1 << low) - 1)) != 0
