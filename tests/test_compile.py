"""Every op under torch.compile, and the checks that torch has for registered ops, on the native core and on Triton."""

import pytest
import torch
from op_examples import COPIED_OPS, CPU_OPS, EACH_BACKEND, NATIVE_OPS, TRITON_OPS, example
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from trace_fast import ops
from trace_fast.testing import random_features, random_maps


class Recorder(TorchDispatchMode):
    """Records the calls of registered ops, with arguments as they are before the call."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "trace_fast":
            self.calls.append((function, tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)))
        return function(*arguments, **options or {})


def strided(tensor):
    """Return the same values with other strides."""
    return tensor.mT.contiguous().mT


def inputs(device):
    """Return arguments other than those of the examples: strides, half precision and options."""
    previous, current = (maps.to(device) for maps in random_maps(2, 6))
    query, key = (features.to(device) for features in random_features(2, 3, 6, 4))
    total, fine = torch.zeros(2, 6, 6, device=device), torch.zeros(2, 24, 24, device=device)
    masks = (torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(0)) < 0.6).to(device)
    edges = torch.linspace(0, 1, 21, device=device).view(3, 7)
    values = torch.randn(6, 9, device=device, dtype=torch.float16)
    return {
        "accumulate_attention strided": (total, strided(query), strided(key), 0.5, 0.25),
        "accumulate_attention half": (total.bfloat16(), query.half(), key.bfloat16(), 0.5, 0.25),
        "attend": (query, key, query),
        "attend half": (query.half(), strided(key).half(), query.half(), total.bfloat16(), 0.5, 0.25),
        "attend part": (query, key, query, total[:, :4, :4].contiguous(), 0.5, None, 2),
        "accumulate_resized strided": (fine.bfloat16(), current.mT, (2, 3), (4, 6), 0.5),
        "step_kl strided": (previous.mT, current.bfloat16()),
        "abdiv strided": (current.mT, 3, 2),
        "step_kl_abdiv half": (previous.bfloat16(), current.bfloat16(), 2, 3),
        "readout half": (query.half(), strided(key).half(), values, -0.5),
        "label_regions strided": (masks.mT, 8),
        "flood_fill strided": (masks.int().mT, ~masks.mT, 8, True),
        "random_walk batched": (masks.float().mT[:, None], edges.mT.expand(2, 7, 3), 5, 10.0, 3),
        "watershed strided": (masks.float().mT,),
        "merge_tree strided": (masks[0].int().mT + 1, edges.mT),
        "merge_masks strided": (masks.mT, 0.1, torch.ones(2, device=device)),
    }


@pytest.mark.slow
@EACH_BACKEND
@pytest.mark.parametrize("case", [*TRITON_OPS, *NATIVE_OPS, *COPIED_OPS, *inputs("cpu")])
def test_opcheck(case, device, request):
    op = case.split()[0]
    if op not in TRITON_OPS and "triton" in request.node.name:
        pytest.skip("there is no triton kernel")
    arguments, options = (inputs(device)[case], {}) if case != op else example(op, device)
    with Recorder() as recorder:
        getattr(ops, op)(*arguments, **options)
    assert recorder.calls
    for function, registered_arguments in recorder.calls:
        torch.library.opcheck(function, registered_arguments)


@pytest.mark.parametrize("op", CPU_OPS)
def test_ops_for_scoring_are_not_registered(op):
    arguments, options = example(op)
    with Recorder() as recorder:
        getattr(ops, op)(*arguments, **options)
    assert recorder.calls == []


@pytest.mark.slow
@EACH_BACKEND
@pytest.mark.parametrize("op", [*TRITON_OPS, *NATIVE_OPS, *COPIED_OPS])
def test_compiled_without_a_graph_break(op, device, request):
    if op not in TRITON_OPS and "triton" in request.node.name:
        pytest.skip("there is no triton kernel")
    # how many unions there are depends on the masks, and how many nodes on the labels
    fullgraph = op not in ("merge_masks", "merge_tree")
    (arguments, options), (copies, _) = example(op, device), example(op, device)
    compiled = torch.compile(getattr(ops, op), fullgraph=fullgraph, backend="aot_eager", dynamic=False)
    results = compiled(*arguments, **options), arguments
    # the same kernel on the same numbers
    torch.testing.assert_close(results, (getattr(ops, op)(*copies, **options), copies), rtol=0, atol=0)


@pytest.mark.slow
def test_regions_compiled_by_inductor():
    def stage(masks, edges):
        barrier = (edges > 0.5)[None]
        labels, counts = ops.label_regions(barrier, 8)
        filled = ops.flood_fill(labels * (labels > 1), barrier, claim_barrier=True)
        return labels, counts, filled, ops.random_walk(masks, edges, 3, 2, 4)

    masks = torch.rand(2, 9, 7, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(stage, fullgraph=True, backend="inductor")
    torch.testing.assert_close(compiled(masks, masks[0]), stage(masks, masks[0]), rtol=0, atol=0)


@pytest.mark.slow
@EACH_BACKEND
def test_attention_compiled_by_inductor(device):
    def stage(before, query, key):
        current = ops.attention_map(query, key)
        ops.accumulate_attention(current, query, key, 0.5)
        current = current / 1.5
        ops.accumulate_resized(current, before, (2, 3), (2, 3), 0.5)
        fine = ops.resize_attention(current, (2, 3), (4, 6))
        return fine, *ops.step_kl_abdiv(before, current, 2, 3), ops.step_kl(before, current), ops.abdiv(current, 2, 3)

    arguments = [tensor.to(device) for tensor in (random_maps(2, 6)[0], *random_features(2, 3, 6, 4))]
    compiled = torch.compile(stage, fullgraph=True, backend="inductor")
    # between the ops inductor has its own code, whose last bits the divergences of peaked maps magnify
    torch.testing.assert_close(compiled(*arguments), stage(*arguments), rtol=1e-5, atol=1e-6)
