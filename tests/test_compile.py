"""The ops under torch.compile and the checks torch has for registered ops, on every path, but for `readout`."""

import pytest
import torch

from trace_fast import ops
from trace_fast.testing import random_features, random_maps

REGISTERED = torch.ops.trace_fast


def samples(device="cpu"):
    previous, current = (x.to(device) for x in random_maps(2, 6))
    query, key = (x.to(device) for x in random_features(2, 3, 6, 4))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    total, fine = torch.zeros(2, 6, 6, device=device), torch.zeros(2, 24, 24, device=device)
    return [
        (REGISTERED.accumulate_attention, (total, query, key, 0.5, 0.25)),
        (REGISTERED.accumulate_attention, (total, *strided, 0.5, 0.25)),
        (REGISTERED.accumulate_attention, (total.bfloat16(), query.half(), key.bfloat16(), 0.5, 0.25)),
        (REGISTERED.accumulate_resized, (fine, current, 2, 3, 4, 6, 0.5)),
        (REGISTERED.accumulate_resized, (fine.bfloat16(), current.mT, 2, 3, 4, 6, 0.5)),
        (REGISTERED.step_kl, (previous, current)),
        (REGISTERED.step_kl, (previous.mT, current.bfloat16())),
        (REGISTERED.abdiv, (current, 2, 3)),
        (REGISTERED.abdiv, (current.mT, 3, 2)),
        (REGISTERED.step_kl_abdiv, (previous, current, 2, 3)),
        (REGISTERED.step_kl_abdiv, (previous.bfloat16(), current.bfloat16(), 2, 3)),
    ]


@pytest.mark.parametrize("sample", range(len(samples())))
def test_opcheck(sample, device):
    op, arguments = samples(device)[sample]
    torch.library.opcheck(op.default, arguments)


def region_samples():
    masks = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(0)) < 0.6
    seeds, edges = masks.flip(-1).int(), torch.linspace(0, 1, 21).view(3, 7)
    groups = torch.tensor([0, 0])
    return [
        (REGISTERED.label_regions, (masks, 4)),
        (REGISTERED.label_regions, (masks.mT, 8)),
        (REGISTERED.flood_fill, (seeds, masks, 4, False)),
        (REGISTERED.flood_fill, (seeds.mT, masks.mT, 8, True)),
        (REGISTERED.random_walk, (masks.float()[None], edges[None], 3, 2.0, 4)),
        (REGISTERED.random_walk, (masks.float().mT[:, None], edges.mT.expand(2, 7, 3), 5, 10.0, 3)),
        (REGISTERED.merge_masks, (masks, 0.1)),
        (REGISTERED.merge_masks, (masks.mT, 0.1)),
        (REGISTERED.unite_masks, (masks.mT, groups, 1)),
    ]


@pytest.mark.parametrize("sample", range(len(region_samples())))
def test_opcheck_of_regions(sample):
    op, arguments = region_samples()[sample]
    torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_regions_compiled_without_a_graph_break(backend):
    def stage(masks, edges):
        barrier = (edges > 0.5)[None]
        labels, counts = ops.label_regions(barrier, 8)
        filled = ops.flood_fill(labels * (labels > 1), barrier, claim_barrier=True)
        return labels, counts, filled, ops.random_walk(masks, edges, 3, 2, 4)

    masks = torch.rand(2, 9, 7, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(stage, fullgraph=True, backend=backend)
    for result, expected in zip(compiled(masks, masks[0]), stage(masks, masks[0]), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_a_graph_break(backend, device):
    def stage(before, query, key):
        current = ops.attention_map(query, key)
        ops.accumulate_attention(current, query, key, 0.5)
        current = current / 1.5
        ops.accumulate_resized(current, before, (2, 3), (2, 3), 0.5)
        fine = ops.resize_attention(current, (2, 3), (4, 6))
        return fine, *ops.step_kl_abdiv(before, current, 2, 3), ops.step_kl(before, current), ops.abdiv(current, 2, 3)

    arguments = [x.to(device) for x in (random_maps(2, 6)[0], *random_features(2, 3, 6, 4))]
    compiled = torch.compile(stage, fullgraph=True, backend=backend)
    for result, expected in zip(compiled(*arguments), stage(*arguments), strict=True):
        assert torch.equal(result, expected)
