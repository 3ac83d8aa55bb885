"""step_kl_abdiv, the work of one step of the search for the Instance Emergence Point, beside what bounds it.

On the CPU two floors that do less than the op must: `sum` reads the same two maps, `log` takes as many logarithms into
memory that is already there. On a GPU the floor is the two maps at the copy bandwidth measured in the same run.
"""

import functools

import pytest
import torch

from trace_fast import ops, reference
from trace_fast.testing import assert_no_worse

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@functools.lru_cache(maxsize=2)
def maps(device, side, dtype):
    """Two related maps of a side x side grid, as flat as those of a diffusion model."""
    generator = torch.Generator().manual_seed(0)
    logits, change = torch.randn(2, 1, side**2, side**2, generator=generator)
    return tuple(x.softmax(-1).to(device, dtype) for x in (2 * logits, 2 * logits + 0.2 * change))


@functools.lru_cache(maxsize=2)
def truth(device, side, dtype):
    previous, current = maps(device, side, dtype)
    exact = reference.step_kl_abdiv(previous.double(), current.double(), side, side)
    return exact, reference.step_kl_abdiv(previous, current, side, side)


PROVIDERS = {
    "eager": reference.step_kl_abdiv,
    "compiled": torch.compile(reference.step_kl_abdiv, dynamic=False),
    "ours": ops.step_kl_abdiv,
}


def title(device, side, dtype):
    """Name of a group."""
    return f"step_kl_abdiv, N = {side**2}" + (f", {dtype}" if device == "cuda" else "")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def bench_step_kl_abdiv(device, dtype, side, provider, measure):
    if device == "cpu" and dtype != torch.float32:
        pytest.skip("the native core widens half precision first")
    previous, current = maps(device, side, dtype)
    call = functools.partial(PROVIDERS[provider], previous, current, side, side)
    for out, exact, eager in zip(call(), *truth(device, side, dtype), strict=True):
        assert_no_worse(out, exact, eager, magnitude=1.0)
    work = {"bytes": 2 * current.nbytes}
    if device == "cuda":
        from ceilings import measured

        work["floor"] = measured().traffic(work["bytes"])
    name = ("native" if device == "cpu" else "triton") if provider == "ours" else provider
    measure(title(device, side, dtype), name, call, device=device, **work)


@pytest.mark.parametrize("floor", ["sum", "log"])
@pytest.mark.parametrize("side", [32, 64])
def bench_floor(side, floor, measure):
    previous, current = maps("cpu", side, torch.float32)
    out = torch.zeros(2, *current.shape)

    def log():
        torch.log(previous, out=out[0])
        torch.log(current, out=out[1])

    def sums():
        previous.sum()
        current.sum()

    call = {"sum": sums, "log": log}[floor]
    measure(title("cpu", side, None), f"floor: {floor}", call, bytes=2 * current.nbytes)
