"""step_kl_abdiv, the work of one step of the search for the Instance Emergence Point, beside two floors.

The floors do less than the op must: `sum` reads the same two maps, `log` takes as many logarithms into memory that is
already there.
"""

import functools

import pytest
import torch

from trace_fast import ops, reference
from trace_fast.testing import assert_no_worse


@functools.cache
def maps(side):
    """Two related maps of a side x side grid, as flat as those of a diffusion model."""
    generator = torch.Generator().manual_seed(0)
    logits, change = torch.randn(2, 1, side**2, side**2, generator=generator)
    return (2 * logits).softmax(-1), (2 * logits + 0.2 * change).softmax(-1)


@functools.cache
def truth(side):
    exact = reference.step_kl_abdiv(*(x.double() for x in maps(side)), side, side)
    return exact, reference.step_kl_abdiv(*maps(side), side, side)


PROVIDERS = {
    "eager": reference.step_kl_abdiv,
    "compiled": torch.compile(reference.step_kl_abdiv, dynamic=False),
    "native": ops.step_kl_abdiv,
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("side", [32, 64])
def bench_step_kl_abdiv(side, provider, measure):
    previous, current = maps(side)
    call = functools.partial(PROVIDERS[provider], previous, current, side, side)
    for out, exact, eager in zip(call(), *truth(side), strict=True):
        assert_no_worse(out, exact, eager, magnitude=1.0)
    measure(f"step_kl_abdiv, N = {side**2}", provider, call, bytes=2 * current.nbytes)


@pytest.mark.parametrize("floor", ["sum", "log"])
@pytest.mark.parametrize("side", [32, 64])
def bench_floor(side, floor, measure):
    previous, current = maps(side)
    out = torch.zeros(2, *current.shape)

    def log():
        torch.log(previous, out=out[0])
        torch.log(current, out=out[1])

    def sums():
        previous.sum()
        current.sum()

    call = {"sum": sums, "log": log}[floor]
    measure(f"step_kl_abdiv, N = {side**2}", f"floor: {floor}", call, bytes=2 * current.nbytes)
