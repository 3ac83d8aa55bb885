"""The attention ops against the reference in float64."""

import math

import pytest
import torch
from torch.testing import assert_close

from trace_fast import _C, ops, reference
from trace_fast.testing import assert_no_worse, random_features, random_maps

GRIDS = [(1, 1), (2, 3), (3, 7), (16, 24), (31, 17)]


def assert_map_no_worse(query, key):
    exact = reference.attention_map(query.double(), key.double())
    assert_no_worse(ops.attention_map(query, key), exact, reference.attention_map(query, key))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_worse_than_eager(grid, batch, instruction_set):
    query, key = random_features(batch, 5, grid[0] * grid[1], 13)
    assert_map_no_worse(query, key)
    # the same features with flat attention
    assert_map_no_worse(query / 20, key)


def test_no_worse_than_eager_on_a_large_grid():
    assert_map_no_worse(*random_features(1, 2, 64 * 96, 40))


@pytest.mark.parametrize("channels", [1, 40, 64, 160])
def test_channels(channels, instruction_set):
    assert_map_no_worse(*random_features(2, 2, 51, channels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_features(dtype):
    query, key = random_features(2, 3, 51, 40)
    assert_map_no_worse(query.to(dtype), key)
    assert_map_no_worse(query.to(dtype), key.to(dtype))


def test_by_hand(instruction_set):
    query = torch.tensor([[[[math.log(3)], [0]], [[0], [0]]]])
    key = torch.tensor([[[[1.0], [0]], [[5], [7]]]])
    expected = torch.tensor([[[0.625, 0.375], [0.5, 0.5]]])
    assert_close(ops.attention_map(query, key, scale=1.0), expected)
    total = torch.ones(1, 2, 2)
    ops.accumulate_attention(total, query, key, weight=0.5, scale=1.0)
    assert_close(total, 1 + 0.5 * expected)


def test_accumulates_blocks(instruction_set):
    blocks = [random_features(2, 3, 51, 8, seed) for seed in range(4)]
    total, eager, exact = torch.zeros(2, 51, 51), torch.zeros(2, 51, 51), torch.zeros(2, 51, 51, dtype=torch.float64)
    for query, key in blocks:
        ops.accumulate_attention(total, query, key, 0.25)
        reference.accumulate_attention(eager, query, key, 0.25)
        reference.accumulate_attention(exact, query.double(), key.double(), 0.25)
    assert_no_worse(total, exact, eager)


def test_scale_and_default_scale():
    query, key = random_features(1, 2, 6, 16)
    assert torch.equal(ops.attention_map(query, key), ops.attention_map(query, key, scale=0.25))
    exact, eager = reference.attention_map(query.double(), key.double(), 0.1), reference.attention_map(query, key, 0.1)
    assert_no_worse(ops.attention_map(query, key, scale=0.1), exact, eager)


def test_shift_of_all_logits_changes_nothing(instruction_set):
    # 5 tokens fill no vector: were the padding counted, a logit of 0 would outweigh -10,000
    query, key = torch.full((1, 1, 5, 1), -100.0), torch.full((1, 1, 5, 1), 100.0)
    assert_close(ops.attention_map(query, key), torch.full((1, 5, 5), 0.2), rtol=0, atol=1e-7)
    assert_close(ops.attention_map(-query, key), torch.full((1, 5, 5), 0.2), rtol=0, atol=1e-7)


def test_a_certain_row(instruction_set):
    query, key = torch.tensor([[[[1e4], [0.0]]]]), torch.tensor([[[[1.0], [0.0]]]])
    assert torch.equal(ops.attention_map(query, key), torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]))


def test_nan_is_handed_on(instruction_set):
    for poisoned in range(2):
        features = random_features(2, 3, 51, 8)
        features[poisoned][1, 2, 20, 4] = math.nan
        expected = reference.attention_map(*features)
        assert expected[1, 20].isnan().all()
        assert torch.equal(ops.attention_map(*features).isnan(), expected.isnan())


def test_strided_features_give_the_same_bits():
    query, key = random_features(2, 3, 51, 8)
    expected = ops.attention_map(query, key)
    # as projections leave them: (B, N, H * d) seen as (B, H, N, d)
    spread = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    assert not spread[0].is_contiguous()
    assert torch.equal(ops.attention_map(*spread), expected)


@pytest.mark.parametrize("offset", range(0, 20))
def test_views_at_any_offset(offset, instruction_set):
    query, key = random_features(2, 3, 21, 5)
    expected = ops.attention_map(query, key)
    shifted = []
    for features in (query, key):
        buffer = torch.full((features.numel() + 64,), math.nan)
        shifted.append(buffer[offset : offset + features.numel()].view_as(features).copy_(features))
    buffer = torch.full((expected.numel() + 64,), -7.0)
    total = buffer[offset : offset + expected.numel()].view_as(expected).zero_()
    ops.accumulate_attention(total, *shifted, 1.0)
    assert torch.equal(total, expected)
    assert (buffer[:offset] == -7).all()
    assert (buffer[offset + expected.numel() :] == -7).all()


def test_bits_depend_neither_on_the_run_nor_on_threads(threads):
    query, key = random_features(1, 2, 384, 40)
    first = torch.zeros(1, 384, 384)
    _C.accumulate_attention(first.data_ptr(), query.data_ptr(), key.data_ptr(), 1, 2, 384, 40, 1.0, 40**-0.5, 1)
    for _ in range(5):
        assert torch.equal(ops.attention_map(query, key), first)


def test_rows_sum_to_one():
    attention = ops.attention_map(*random_features(1, 4, 384, 40))
    assert_close(attention.sum(-1), torch.ones(1, 384), rtol=0, atol=2e-6)
    resized = ops.resize_attention(attention, (16, 24), (31, 24))
    assert_close(resized.sum(-1), torch.ones(1, 31 * 24), rtol=0, atol=5e-6)


def test_resize_attention_no_worse_than_eager():
    attention = random_maps(2, 6)[0]
    exact = reference.resize_attention(attention.double(), (2, 3), (5, 4))
    assert_no_worse(
        ops.resize_attention(attention, (2, 3), (5, 4)), exact, reference.resize_attention(attention, (2, 3), (5, 4))
    )


def test_empty_batch():
    assert ops.attention_map(*torch.empty(2, 0, 2, 6, 4)).shape == (0, 6, 6)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (
            {"query": 1},
            TypeError,
            "accumulate_attention: query must be a float32 or float16 or bfloat16 tensor, got int",
        ),
        ({"key": torch.ones(1, 2, 6, 4).double()}, TypeError, "accumulate_attention: key must be .*, got float64"),
        ({"query": torch.ones(2, 6, 4)}, ValueError, r"query must be \(B, H, N, d\), got \(2, 6, 4\)"),
        (
            {"key": torch.ones(1, 2, 5, 4)},
            ValueError,
            r"key must be \(B, H, N, d\) with B = 1, H = 2, N = 6, d = 4, got \(1, 2, 5, 4\)",
        ),
        ({"query": torch.ones(1, 2, 0, 4)}, ValueError, r"query must be \(B, H, N, d\), got \(1, 2, 0, 4\)"),
        ({"key": torch.ones(1, 2, 6, 4, device="meta")}, ValueError, "key must be on cpu like query, got meta"),
        ({"total": torch.ones(1, 6, 6).half()}, TypeError, "total must be float32, got float16"),
        (
            {"total": torch.ones(1, 6, 5)},
            ValueError,
            r"total must be \(B, N, N\) with B = 1, N = 6, got \(1, 6, 5\)",
        ),
        ({"total": torch.ones(1, 6, 6).mT}, ValueError, r"total must be contiguous, got strides \(36, 1, 6\)"),
        ({"weight": "1"}, TypeError, "weight must be a number, got str"),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
        (
            {"query": torch.ones(1, 2, 6, 4).requires_grad_()},
            RuntimeError,
            "there is no gradient; detach query and key",
        ),
    ],
)
def test_errors(change, error, match):
    arguments = {"total": torch.zeros(1, 6, 6), "query": torch.ones(1, 2, 6, 4), "key": torch.ones(1, 2, 6, 4)}
    with pytest.raises(error, match=match):
        ops.accumulate_attention(**{**arguments, "weight": 1.0, **change})


@pytest.mark.parametrize(
    ("size", "target", "match"),
    [
        ((2, 2), (4, 4), r"resize_attention: height \* width must be N = 6, got 2 \* 2"),
        ((2, 3), (2, 2), r"resize_attention: target must be at least \(2, 3\), got \(2, 2\)"),
    ],
)
def test_resize_attention_errors(size, target, match):
    with pytest.raises(ValueError, match=match):
        ops.resize_attention(torch.full((1, 6, 6), 1 / 6), size, target)


def test_gradients_are_off_under_no_grad():
    query, key = random_features(1, 2, 6, 4)
    with torch.no_grad():
        assert not ops.attention_map(query.requires_grad_(), key).requires_grad
