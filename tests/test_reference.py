"""The reference against numbers worked out by hand and against the definitions, written as loops."""

import math

import pytest
import torch
from torch.testing import assert_close

from trace_fast import reference
from trace_fast.testing import random_features, random_maps

GRIDS = [(1, 1), (1, 4), (5, 1), (2, 3), (3, 7)]


def test_attention_map_by_hand():
    # logits (ln 3, 0) and (0, 0) in the first head, all 0 in the second
    query = torch.tensor([[[[math.log(3)], [0]], [[0], [0]]]], dtype=torch.float64)
    key = torch.tensor([[[[1], [0]], [[5], [7]]]], dtype=torch.float64)
    expected = torch.tensor([[[0.625, 0.375], [0.5, 0.5]]], dtype=torch.float64)
    assert_close(reference.attention_map(query, key, scale=1.0), expected)
    total = torch.ones(1, 2, 2, dtype=torch.float64)
    reference.accumulate_attention(total, query, key, weight=0.5, scale=1.0)
    assert_close(total, 1 + 0.5 * expected)


def test_attention_map_default_scale():
    query, key = random_features(2, 3, 6, 16)
    assert_close(reference.attention_map(query, key), reference.attention_map(query, key, scale=0.25))


def test_step_kl_by_hand():
    previous = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]], dtype=torch.float64)
    current = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]], dtype=torch.float64)
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert_close(reference.step_kl(previous, current), torch.tensor([(first + math.log(2)) / 2], dtype=torch.float64))
    # in the other direction a probability of 1/2 is compared with 0, which counts as 2^-126
    other = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    certain = 0.5 * math.log(0.5) + 0.5 * (math.log(0.5) + 126 * math.log(2))
    assert_close(reference.step_kl(current, previous), torch.tensor([(other + certain) / 2], dtype=torch.float64))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_abdiv_is_its_definition(grid):
    height, width = grid
    rows = random_maps(2, height * width)[0].double().clamp_min(2.0**-126).unflatten(1, grid)

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return sum(p[:, k] * (p[:, k].log() - q[:, k].log()) for k in range(height * width))

    expected = torch.empty(2, height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            left, right = rows[:, y, max(x - 1, 0)], rows[:, y, min(x + 1, width - 1)]
            above, below = rows[:, max(y - 1, 0), x], rows[:, min(y + 1, height - 1), x]
            expected[:, y, x] = kl(right, left) + kl(below, above)
    assert_close(reference.abdiv(rows.flatten(1, 2), height, width), expected)


def test_step_kl_abdiv_is_both():
    previous, current = random_maps(2, 6)
    kl, scores = reference.step_kl_abdiv(previous, current, 2, 3)
    assert_close(kl, reference.step_kl(previous, current))
    assert_close(scores, reference.abdiv(current, 2, 3))


@pytest.mark.parametrize("target", [(2, 3), (3, 3), (3, 4), (4, 6), (7, 11), (16, 9)], ids=str)
def test_resize_attention_is_its_definition(target):
    size = (2, 3)
    attention = random_maps(2, 6)[0].double()
    attention /= attention.sum(-1, keepdim=True)
    # row j of the bilinear interpolation: the weight of each coarse token in fine token j
    eye = torch.eye(6, dtype=torch.float64).unflatten(1, size)
    bilinear = torch.nn.functional.interpolate(eye[None], target, mode="bilinear")[0].flatten(1).mT
    expected = bilinear @ (attention / bilinear.sum(0)) @ bilinear.mT
    resized = reference.resize_attention(attention, size, target)
    assert_close(resized, expected)
    assert_close(resized.sum(-1), torch.ones(2, target[0] * target[1], dtype=torch.float64), rtol=0, atol=1e-14)
    assert resized.is_contiguous()


def test_resize_attention_to_the_same_grid_changes_nothing():
    attention = random_maps(2, 6)[0]
    resized = reference.resize_attention(attention, (2, 3), (2, 3))
    torch.testing.assert_close(resized, attention, rtol=2 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    query, key = (x.to(dtype) for x in random_features(2, 3, 6, 8))
    attention = reference.attention_map(query, key)
    assert torch.equal(attention, reference.attention_map(query.float(), key.float()))
    half = attention.to(dtype)
    assert torch.equal(reference.abdiv(half, 2, 3), reference.abdiv(half.float(), 2, 3))
    assert torch.equal(
        reference.resize_attention(half, (2, 3), (4, 6)), reference.resize_attention(half.float(), (2, 3), (4, 6))
    )


def test_label_regions_by_hand():
    rows = ["..#.", "##..", ".###", "..#."]
    barrier = torch.tensor([[[pixel == "#" for pixel in row] for row in rows]])
    labels, counts = reference.label_regions(barrier)
    assert labels.tolist() == [[[1, 1, 0, 2], [0, 0, 2, 2], [3, 0, 0, 0], [3, 3, 0, 4]]]
    assert counts.tolist() == [4]
    # through corners, regions of connectivity 4 are united
    labels, counts = reference.label_regions(barrier, 8)
    assert labels.tolist() == [[[1, 1, 0, 1], [0, 0, 1, 1], [2, 0, 0, 0], [2, 2, 0, 3]]]
    assert counts.tolist() == [3]


def test_flood_fill_by_hand():
    seeds = torch.tensor([[[3, 0, 0, 0, 1], [0, 0, 0, 0, 0]]], dtype=torch.int32)
    barrier = torch.tensor([[[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]]).bool()
    # the pixel that is three steps from both seeds takes the lower label
    assert reference.flood_fill(seeds, barrier).tolist() == [[[3, 3, 0, 1, 1], [3, 3, 1, 1, 0]]]
    claimed = reference.flood_fill(seeds, barrier, claim_barrier=True)
    assert claimed.tolist() == [[[3, 3, 1, 1, 1], [3, 3, 1, 1, 1]]]


def test_random_walk_by_hand():
    masks = torch.tensor([[[1.0, 0.0, 0.0]]], dtype=torch.float64)
    edges = torch.tensor([[0.0, 0.5, 0.0]], dtype=torch.float64)
    # every affinity of two pixels is 1/2, since the middle pixel is on every path
    once = torch.tensor([[[1 / 2, 1 / 4, 1 / 4]]], dtype=torch.float64)
    assert_close(reference.random_walk(masks, edges, radius=3, beta=1, steps=1), once)
    twice = torch.tensor([[[3 / 8, 5 / 16, 5 / 16]]], dtype=torch.float64)
    assert_close(reference.random_walk(masks, edges, radius=3, beta=1, steps=2), twice)
    # neighbors are closer than the radius, and masks are multiplied by 1 - edges at the start
    assert_close(reference.random_walk(masks, edges, radius=1), masks)
    assert_close(reference.random_walk(torch.ones_like(masks), edges, steps=0), 1 - edges[None])


def test_merge_masks_by_hand():
    masks = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()[:, None]
    # two of the masks share one of three pixels
    merged, groups, scores = reference.merge_masks(masks, 0.3, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert groups.tolist() == [0, 1, 0, 2]
    assert merged[:, 0].int().tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    assert scores.tolist() == torch.tensor([0.3, 0.2, 0.4]).tolist()
    assert reference.merge_masks(masks, 1 / 3)[1].tolist() == [0, 1, 2, 3]


def test_gradients():
    previous, current = (x.double().requires_grad_() for x in random_maps(1, 6))
    attention = (previous.detach() + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, q: reference.step_kl_abdiv(p + 0.1, q + 0.1, 2, 3), (previous, current))
    assert torch.autograd.gradcheck(lambda p: reference.resize_attention(p, (2, 3), (4, 6)), (attention,))
    masks, edges = attention[:, :2, :3].detach().requires_grad_(), attention[0, 2:4, 3:].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda m, e: reference.random_walk(m, e, 2, 3, 2), (masks, edges))
