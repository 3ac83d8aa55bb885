"""The attention ops: on the CPU one block of SD 1.5 (8 heads of 40 channels), on a GPU the blocks of every backbone.

Half precision on a GPU, as networks run there. `floor` is the largest of products, of exponentials, both of two passes,
and of the traffic of the mean map, at the ceilings measured in the same run. "log-sum-exp given" is the second pass
alone: the cost of capture where the network's own attention provides the first.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from workload import SHAPES, Shape

from trace_fast import ops, reference
from trace_fast.testing import assert_no_worse

GPU = torch.cuda.is_available()
CASES = [("cpu", "SD1.5", Shape(1, 8, tokens, 40)) for tokens in (1024, 4096)]
CASES += [("cuda", model, shape) for model, shapes in SHAPES.items() for shape in shapes if GPU]


@functools.lru_cache(maxsize=2)
def features(device, shape):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, shape.heads, shape.tokens, shape.channels, generator=generator)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return query.to(device, dtype), key.to(device, dtype)


@functools.lru_cache(maxsize=2)
def truth(device, shape):
    query, key = features(device, shape)
    return reference.attention_map(query.double(), key.double()), reference.attention_map(query, key)


def half(total, query, key, weight):
    """Accumulate head by head like the reference, but with products in the dtype of the features: the fastest eager."""
    heads, scale = query.shape[1], query.shape[-1] ** -0.5
    for head in range(heads):
        logits = (query[:, head] * scale) @ key[:, head].mT
        total.add_(logits.softmax(-1, dtype=torch.float32), alpha=weight / heads)


def batched(total, query, key, weight):
    """Accumulate all heads at once, like an attention processor that keeps its probabilities."""
    total.add_((query @ key.mT).mul_(query.shape[-1] ** -0.5).softmax(-1).mean(1), alpha=weight)


# inductor of torch 2.13 fails on an update in place head by head; on the map alone it works
compiled_map = torch.compile(reference.attention_map, dynamic=False)


def compiled(total, query, key, weight):
    total.add_(compiled_map(query, key), alpha=weight)


PROVIDERS = {
    "cpu": {"eager": reference.accumulate_attention, "batched": batched, "compiled": compiled},
    "cuda": {"eager": half, "eager, float32": reference.accumulate_attention, "compiled": compiled},
}


@pytest.mark.parametrize("provider", ["eager", "eager, float32", "batched", "compiled", "ours", "log-sum-exp given"])
@pytest.mark.parametrize(("device", "model", "shape"), CASES, ids=str)
def bench_accumulate_attention(device, model, shape, provider, measure):
    skip_slow_compilation(device, shape, provider)
    query, key = features(device, shape)
    total = torch.zeros(1, shape.tokens, shape.tokens, device=device)
    work = {"flop": 2 * shape.heads * shape.tokens**2 * shape.channels}
    if provider == "ours":
        call = functools.partial(ops.accumulate_attention, total, query, key, 1.0)
    elif provider in PROVIDERS[device]:
        call = functools.partial(PROVIDERS[device][provider], total, query, key, 1.0)
    elif provider == "log-sum-exp given" and device == "cuda":
        lse = torch.ops.aten._scaled_dot_product_flash_attention(query, key, key)[1]
        call = functools.partial(ops.accumulate_attention, total, query, key, 1.0, lse=lse)
    else:
        pytest.skip(f"no such provider on {device}")
    call()
    if provider == "eager" and device == "cuda":  # its products are rounded, so it is only near
        torch.testing.assert_close(total.double(), truth(device, shape)[0], rtol=0.1, atol=1e-2)
    else:
        assert_no_worse(total, *truth(device, shape))
    if device == "cuda":
        from ceilings import measured

        floor = measured().attention(shape, 2, adds_map=True)
        work |= {"flop": 2 * work["flop"], "floor": floor, "blocks": shape.blocks}
    name = "native" if device == "cpu" and provider == "ours" else "triton" if provider == "ours" else provider
    measure(title("accumulate_attention", device, model, shape), name, call, device=device, graph=True, **work)


def skip_slow_compilation(device, shape, provider):
    """Skip all but two shapes on a GPU, where inductor takes longer to compile than all else takes to run."""
    compiled_shapes = SHAPES["SD1.5 @512"][0], SHAPES["SD3.5-L @1024"][0]
    if device == "cuda" and provider == "compiled" and shape not in compiled_shapes:
        pytest.skip("compiled at two shapes only")


def title(op, device, model, shape):
    """Return the name of a group."""
    if device == "cpu":
        return f"{op}, N = {shape.tokens}"
    return f"{op}, {model}: {shape.heads} x {shape.tokens} x {shape.channels}"


def attend_in_turn(query, key, value, total):
    """Attend with torch, and compute all logits again for the map."""
    ops.accumulate_attention(total, query, key, 1.0)
    return F.scaled_dot_product_attention(query, key, value)


def attend_eager(query, key, value, total):
    return reference.attend(query, key, value, total)


ATTENDS = {
    "eager": attend_eager,
    "accumulate_attention and scaled_dot_product_attention": attend_in_turn,
    "scaled_dot_product_attention, no map": lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v),
    "ours, no map": lambda q, k, v, _: ops.attend(q, k, v),
    "ours": ops.attend,
}


@pytest.mark.parametrize("provider", ATTENDS)
@pytest.mark.parametrize(("device", "model", "shape"), [case for case in CASES if case[0] == "cpu"], ids=str)
def bench_attend(device, model, shape, provider, measure):
    query, key = features(device, shape)
    total = torch.zeros(1, shape.tokens, shape.tokens)
    call = functools.partial(ATTENDS[provider], query, key, key, total)
    out, sums = call(), total.clone()
    exact, eager = (torch.zeros(total.shape, dtype=dtype) for dtype in (torch.float64, torch.float32))
    outs = reference.attend(*(x.double() for x in (query, key, key)), exact), attend_eager(query, key, key, eager)
    if "scaled" in provider:  # rounds in another order
        torch.testing.assert_close(out.double(), outs[0], rtol=1e-3, atol=1e-3)
    else:
        assert_no_worse(out, *outs)
    if "no map" not in provider:
        assert_no_worse(sums, exact, eager)
    work = {"flop": 4 * shape.heads * shape.tokens**2 * shape.channels}
    measure(title("attend", device, model, shape), provider.replace("ours", "native"), call, device=device, **work)


COLUMNS = 9  # a 3 x 3 convolution over the map


def readout_eager(query, key, values):
    return reference.readout(query, key, values)


def sdpa(query, key, values, width):
    """Attend with the same values in every head, padded to a width that fused kernels take."""
    padded = F.pad(values.to(query.dtype), (0, width - values.shape[1]))
    heads = padded.expand(*query.shape[:2], -1, -1)
    return F.scaled_dot_product_attention(query, key, heads)[..., : values.shape[1]].float().mean(1)


READOUTS = {
    "eager": readout_eager,
    "compiled": torch.compile(readout_eager, dynamic=False),
    "scaled_dot_product_attention": lambda q, k, v: sdpa(q, k, v, q.shape[-1]),
    "scaled_dot_product_attention, 16 wide": lambda q, k, v: sdpa(q, k, v, 16),
    "ours": ops.readout,
}


@pytest.mark.parametrize("provider", READOUTS)
@pytest.mark.parametrize(("device", "model", "shape"), CASES, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def bench_readout(device, model, shape, backward, provider, measure):
    skip_slow_compilation(device, shape, provider)
    query, key = features(device, shape)
    values = torch.randn(shape.tokens, COLUMNS, generator=torch.Generator().manual_seed(1)).to(device)
    inputs = [x.detach().requires_grad_(backward) for x in (query, key, values)]
    forward = functools.partial(READOUTS[provider], *inputs)
    out = forward()
    with torch.no_grad():
        exact, eager = reference.readout(query.double(), key.double(), values.double()), readout_eager(*inputs)
    if provider.startswith("scaled"):  # rounds its result, too
        torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)
    else:
        assert_no_worse(out.detach(), exact, eager)
    work, call = {"flop": 2 * shape.heads * shape.tokens**2 * (shape.channels + COLUMNS)}, forward
    if backward:
        grad = torch.randn_like(out)

        def call():
            return torch.autograd.grad(forward(), inputs, grad)

        assert all(x.isfinite().all() for x in call())
    elif device == "cuda":
        from ceilings import measured

        work |= {"floor": measured().attention(shape, 1), "blocks": shape.blocks}
    name = ("native" if device == "cpu" else "triton") if provider == "ours" else provider
    op = "readout and its gradients" if backward else "readout"
    measure(title(op, device, model, shape), name, call, device=device, graph=True, **work)


def resize_eager(total, attention, size, target):
    reference.accumulate_resized(total, attention, size, target, 0.1)


def resize_ours(total, attention, size, target):
    ops.accumulate_resized(total, attention, size, target, 0.1)


RESIZES = {"eager": resize_eager, "compiled": torch.compile(resize_eager, dynamic=False), "ours": resize_ours}


@pytest.mark.parametrize("provider", RESIZES)
@pytest.mark.parametrize("side", [8, 16, 32])
@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if GPU else [])])
def bench_accumulate_resized(device, side, provider, measure):
    """Time the maps of a UNet's coarser grids, resized to 64 x 64."""
    size, target = (side, side), (64, 64)
    attention = torch.randn(1, side**2, side**2, generator=torch.Generator().manual_seed(0)).softmax(-1).to(device)
    total = torch.zeros(1, 4096, 4096, device=device)
    call = functools.partial(RESIZES[provider], total, attention, size, target)
    call()
    exact, eager = torch.zeros_like(total, dtype=torch.float64), torch.zeros_like(total)
    reference.accumulate_resized(exact, attention.double(), size, target, 0.1)
    resize_eager(eager, attention, size, target)
    assert_no_worse(total, exact, eager)
    name = ("native" if device == "cpu" else "triton") if provider == "ours" else provider
    work = {"bytes": 2 * total.nbytes}
    if device == "cuda":
        from ceilings import measured

        work["floor"] = measured().traffic(work["bytes"])
    measure(f"accumulate_resized, {side} x {side} to 64 x 64 ({device})", name, call, device=device, graph=True, **work)
