"""The measured limits of a GPU: products, copies and exponentials a second. Floors of kernels are counted in them."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from workload import Shape

__all__ = ["Ceilings", "event_times", "measured", "replay", "timed"]


class Ceilings:
    """Rates of one GPU, and the time that work takes at them, in seconds.

    Attributes:
        flops: bf16 products of 8192 x 8192 matrices, operations a second.
        bandwidth: copy of 1 GiB, bytes read and written a second.
        exponentials: 2^x of numbers in registers, a second.
    """

    def __init__(self, flops: float, bandwidth: float, exponentials: float):
        self.flops, self.bandwidth, self.exponentials = flops, bandwidth, exponentials

    def attention(self, shape: Shape, passes: int, *, adds_map: bool = False) -> float:
        """Return the time of passes over the maps of all heads of one block: products or exponentials, the longer.

        With `adds_map` it is no less than the time to read and write the float32 map that their mean is added to.
        """
        entries = passes * shape.heads * shape.tokens**2
        traffic = self.traffic(8 * shape.tokens**2) if adds_map else 0.0
        return max(2 * entries * shape.channels / self.flops, entries / self.exponentials, traffic)

    def traffic(self, size: float) -> float:
        """Return the time to read and write this many bytes."""
        return size / self.bandwidth


@triton.jit
def exp2_kernel(out, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Compute COUNT exponentials of each of BLOCK numbers, one after another; numbers do not wait for one another."""
    x = tl.arange(0, BLOCK) * 1e-3
    for _ in range(COUNT):
        x = tl.exp2(-x)
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), x)


SLOW = 0.05  # seconds; a longer call is timed a few times, and a full cache makes no difference


def event_times(call: Callable[[], object], milliseconds: int = 200) -> list[float]:
    """Return seconds of a call by the clock of the GPU, three at least, the L2 cache flushed before each."""
    if timed(call) > SLOW:
        return [timed(call) for _ in range(3)]
    times = triton.testing.do_bench(call, warmup=50, rep=milliseconds, return_mode="all")
    return [time / 1e3 for time in times]


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of one call on the GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def replay(call: Callable[[], object]) -> Callable[[], object]:
    """Record a call as a CUDA graph, so that small kernels are timed without Python; outputs are dropped."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@functools.cache
def measured() -> Ceilings:
    """Measure the ceilings of the present GPU, once a process."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    programs, block, count = 132 * 64, 2048, 4096
    out = torch.empty(programs * block, device="cuda")
    times = [
        statistics.median(event_times(call))
        for call in (
            lambda: a @ b,
            lambda: target.copy_(source),
            lambda: exp2_kernel[(programs,)](out, COUNT=count, BLOCK=block, num_warps=4),
        )
    ]
    return Ceilings(2 * 8192**3 / times[0], 2 * source.nbytes / times[1], programs * block * count / times[2])
