"""step_kl_abdiv, the work of one step of the search, beside its floors; on a GPU its halves, too.

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
    """Return two related maps of a side x side grid, as flat as those of a diffusion model."""
    generator = torch.Generator().manual_seed(0)
    logits, change = torch.randn(2, 1, side**2, side**2, generator=generator)
    return tuple(x.softmax(-1).to(device, dtype) for x in (2 * logits, 2 * logits + 0.2 * change))


def call_op(module, op, previous, current, side):
    """Call an op of `ops` or `reference`; return a tuple of results."""
    if op == "step_kl_abdiv":
        return module.step_kl_abdiv(previous, current, side, side)
    return (module.step_kl(previous, current) if op == "step_kl" else module.abdiv(current, side, side),)


PROVIDERS = {
    "eager": functools.partial(call_op, reference),
    "compiled": torch.compile(functools.partial(call_op, reference), dynamic=False),
    "ours": functools.partial(call_op, ops),
}


def title(device, side, dtype, op="step_kl_abdiv"):
    """Return the name of a group."""
    return f"{op}, N = {side**2}" + (f", {dtype}" if device == "cuda" else "")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["step_kl_abdiv", "step_kl", "abdiv"])
@pytest.mark.parametrize("device", DEVICES)
def bench_divergence(device, op, dtype, side, provider, measure):
    if device == "cpu" and (dtype != torch.float32 or op != "step_kl_abdiv"):
        pytest.skip("the native core widens half precision first, and its sweep is one for all three")
    if device == "cuda" and provider == "compiled" and (op, side) != ("step_kl_abdiv", 64):
        pytest.skip("inductor takes longer to compile a shape than all else takes to run")
    previous, current = maps(device, side, dtype)
    call = functools.partial(PROVIDERS[provider], op, previous, current, side)
    exact = call_op(reference, op, previous.double(), current.double(), side)
    for triple in zip(call(), exact, call_op(reference, op, previous, current, side), strict=True):
        assert_no_worse(*triple, magnitude=1.0)
    work = {"bytes": current.nbytes if op == "abdiv" else 2 * current.nbytes}
    if device == "cuda":
        from ceilings import measured

        work["floor"] = measured().traffic(work["bytes"])
    name = ("native" if device == "cpu" else "triton") if provider == "ours" else provider
    measure(title(device, side, dtype, op), name, call, device=device, graph=True, **work)


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
