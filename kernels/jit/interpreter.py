"""Two mends of Triton 3.7's interpreter, which gets bfloat16 wrong: imported where kernels are interpreted."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

__all__: list[str] = []

_create_dot, _cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl


def _multiply_numbers(self: Any, a: Any, b: Any, *arguments: Any) -> Any:
    """Products of bfloat16 are those of numbers; as it is, bit patterns are multiplied."""
    a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _create_dot(self, a, b, *arguments)


def _round(self: Any, source: Any, target: Any) -> Any:
    """float32 is rounded to bfloat16, as devices do; as it is, the last bits are cut off."""
    if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
        return _cast(self, source, target)
    values = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
    return TensorHandle(values.view(torch.uint16).numpy().reshape(source.data.shape), target.scalar)


InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = _multiply_numbers, _round
