"""The ops under torch.compile and the checks torch has for registered ops."""

import pytest
import torch

from trace_fast import ops
from trace_fast.testing import random_features, random_maps

REGISTERED = torch.ops.trace_fast


def samples():
    previous, current = random_maps(2, 6)
    query, key = random_features(2, 3, 6, 4)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    return [
        (REGISTERED.accumulate_attention, (torch.zeros(2, 6, 6), query, key, 0.5, 0.25)),
        (REGISTERED.accumulate_attention, (torch.zeros(2, 6, 6), *strided, 0.5, 0.25)),
        (REGISTERED.accumulate_attention, (torch.zeros(2, 6, 6), query.half(), key.bfloat16(), 0.5, 0.25)),
        (REGISTERED.step_kl, (previous, current)),
        (REGISTERED.step_kl, (previous.mT, current)),
        (REGISTERED.abdiv, (current, 2, 3)),
        (REGISTERED.abdiv, (current.mT, 3, 2)),
        (REGISTERED.step_kl_abdiv, (previous, current, 2, 3)),
    ]


@pytest.mark.parametrize("sample", samples(), ids=lambda sample: str(sample[0]).removeprefix("trace_fast."))
def test_opcheck(sample):
    op, arguments = sample
    torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_a_graph_break(backend):
    def stage(before, query, key):
        current = ops.attention_map(query, key)
        ops.accumulate_attention(current, query, key, 0.5)
        current = current / 1.5
        return *ops.step_kl_abdiv(before, current, 2, 3), ops.step_kl(before, current), ops.abdiv(current, 2, 3)

    arguments = random_maps(2, 6)[0], *random_features(2, 3, 6, 4)
    compiled = torch.compile(stage, fullgraph=True, backend=backend)
    for result, expected in zip(compiled(*arguments), stage(*arguments), strict=True):
        assert torch.equal(result, expected)
