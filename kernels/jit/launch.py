"""Shared by the launchers: tile configurations, the choice of one, and the device on which a kernel runs."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

__all__ = ["INTERPRETED", "Config", "alignment", "check_grid", "on_device", "pick"]

# TRITON_INTERPRET=1 runs the kernels in numpy, on tensors on the CPU
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

MOST_PROGRAMS = 65535  # along the second and the third axis of a grid

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


def pick(
    configs: Sequence[Config],
    grid: Callable[[Config], tuple[int, ...]],
    size: tuple[int, int],
    device: torch.device,
    resident: int = 1,
) -> Config:
    """Return the configuration whose programs are through first; of equal ones the first, as large tiles come first.

    Args:
        configs: tiles that cover a map.
        grid: the programs of a configuration, which share the entries of the map equally.
        size: rows and columns of the map.
        device: a GPU, whose multiprocessors take the programs in turn.
        resident: programs that a multiprocessor needs at once to be busy.
    """
    places = _multiprocessors(device) * resident

    def time(config: Config) -> float:
        programs = max(1, math.prod(grid(config)))  # an empty batch has none
        # entries outside the map are computed, too
        entries = math.prod(triton.cdiv(length, side) * side for length, side in zip(size, config[:2], strict=True))
        return triton.cdiv(programs, places) * entries / programs

    return min(configs, key=time)


def check_grid(op: str, *grid: int) -> None:
    """Require a grid that a GPU can launch."""
    if max(grid[1:]) > MOST_PROGRAMS:
        raise ValueError(
            f"{op}: a batch must be at most {MOST_PROGRAMS} programs along an axis of the GPU's grid, got {grid}; "
            "split it"
        )


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
