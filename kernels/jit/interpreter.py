"""Two corrections of bfloat16 in the interpreter of Triton 3.7, imported if kernels are interpreted."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

__all__: list[str] = []

_create_dot, _cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl


def _multiply(self: Any, a: Any, b: Any, *arguments: Any) -> Any:
    """Multiply bfloat16 as numbers; uncorrected, the interpreter multiplies their bit patterns."""
    a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _create_dot(self, a, b, *arguments)


def _round(self: Any, source: Any, target: Any) -> Any:
    """Round float32 to bfloat16, as devices do; uncorrected, the interpreter cuts the last bits off."""
    if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
        return _cast(self, source, target)
    values = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
    return TensorHandle(values.view(torch.uint16).numpy().reshape(source.data.shape), target.scalar)


InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = _multiply, _round
