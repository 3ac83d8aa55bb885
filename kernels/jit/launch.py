"""Shared by the launchers: tile configurations, the choice of one, and the device on which a kernel runs."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["INTERPRETED", "Config", "alignment", "on_device", "pick"]

# TRITON_INTERPRET=1 runs the kernels in numpy, on tensors on the CPU
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

MULTIPROCESSORS = 132  # of an H100 or H200, assumed where there is no device


if INTERPRETED:
    from trace_fast.kernels import interpreter  # noqa: F401


class Config(NamedTuple):
    """Tile of one program, in rows and columns of the map, and its compile options."""

    rows: int
    columns: int
    warps: int
    stages: int
    polynomial: int = 0  # one exponential in this many is a polynomial; 0 for none


def pick(configs: Sequence[Config], programs: Callable[[Config], int], device: torch.device) -> Config:
    """Return the first configuration (large tiles come first) whose grid fills the device, or the last."""
    needed = _multiprocessors(device)
    return next((config for config in configs if programs(config) >= needed), configs[-1])


def alignment(*tensors: Tensor) -> int:
    """Return the number of elements in 16 bytes if every row of the tensors starts at a multiple of it, else 1."""
    elements = 16 // tensors[0].element_size()
    aligned = all(x.data_ptr() % 16 == 0 and all(stride % elements == 0 for stride in x.stride()[:-1]) for x in tensors)
    return elements if aligned else 1


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU the current one, on whose current stream Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else MULTIPROCESSORS
