"""Attention that adds its map to a total, on every instruction set, against the reference in float64."""

import math

import pytest
import torch
from op_examples import NATIVE
from torch.nn import functional
from torch.testing import assert_close

from trace_fast import ops, reference
from trace_fast.testing import assert_no_worse, random_features, random_maps

pytestmark = pytest.mark.parametrize("device", NATIVE, indirect=True)


def random_inputs(batch, heads, tokens, channels):
    """Return query, key and value."""
    return *random_features(batch, heads, tokens, channels), random_features(batch, heads, tokens, channels, 1)[1]


def check(query, key, value, scale=None):
    """Compare what is mixed, and the total, with the reference; the total is the same as without mixing."""
    before = random_maps(len(query), query.shape[2], seed=3)[0]
    mixed, total = (), ()
    for dtype in (torch.float64, torch.float32):
        sums = before.to(dtype, copy=True)
        mixed += (reference.attend(*(x.to(dtype) for x in (query, key, value)), sums, 0.3, scale),)
        total += (sums,)
    sums, map_only = before.clone(), before.clone()
    result = ops.attend(query, key, value, sums, 0.3, scale)
    assert result.dtype == query.dtype
    # a rounded logit of size L changes probabilities by up to L eps / 4: see test_attention. A logit is a sum of
    # products, one after the other here, whose rounding grows with the root of their number
    largest = float((query.double() @ key.double().mT).abs().max())
    steps = max(1.0, query.shape[-1] ** 0.5 / 4)
    magnitude = steps * largest * (query.shape[-1] ** -0.5 if scale is None else abs(scale)) / 4
    assert_no_worse(result.float(), *mixed, magnitude=magnitude * float(value.abs().max()))
    assert_no_worse(sums, *total, magnitude=magnitude)
    ops.accumulate_attention(map_only, query, key, 0.3, scale)
    assert torch.equal(sums, map_only)
    assert torch.equal(ops.attend(query, key, value, scale=scale), result)


# a single token, fewer than a panel of keys, whole panels, and numbers that no panel or block of rows divides
@pytest.mark.parametrize("tokens", [1, 6, 64, 131, 300])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (3, 5)], ids=str)
def test_no_worse_than_eager(batch, heads, tokens, device):
    check(*random_inputs(batch, heads, tokens, 13))


# every number of vectors in the last tile of values, on every instruction set
@pytest.mark.parametrize("channels", [1, 4, 8, 16, 20, 24, 40, 48, 64, 72, 100, 160, 256])
def test_channels(channels, device):
    check(*random_inputs(2, 2, 51, channels))


@pytest.mark.parametrize(("tokens", "first", "mapped"), [(52, 1, 51), (131, 0, 77), (131, 40, 64), (9, 8, 1)], ids=str)
def test_the_map_of_a_part_of_the_tokens(tokens, first, mapped, device):
    query, key, value = random_inputs(2, 3, tokens, 13)
    part = slice(first, first + mapped)
    key[:, :, tokens - 1 if part.stop < tokens else 0] *= 100  # one of the others takes all of the mass of many rows
    total = random_maps(2, mapped, seed=3)[0]
    expected = total.clone()
    mixed = ops.attend(query, key, value, total, 0.3, first=first)
    assert torch.equal(mixed, ops.attend(query, key, value))
    ops.accumulate_attention(expected, query[:, :, part], key[:, :, part], 0.3)
    assert torch.equal(total, expected) and total.isfinite().all()


def test_by_hand(device):
    query = torch.tensor([[[[math.log(3)], [0]], [[0], [0]]]])
    key = torch.tensor([[[[1.0], [0]], [[5], [7]]]])
    value = torch.tensor([[[[4.0], [8]], [[1], [3]]]])
    total = torch.ones(1, 2, 2)
    mixed = ops.attend(query, key, value, total, weight=0.5, scale=1.0)
    assert_close(mixed, torch.tensor([[[[5.0], [6]], [[2], [2]]]]))
    assert_close(total, 1 + 0.5 * torch.tensor([[[0.625, 0.375], [0.5, 0.5]]]))


def test_is_the_attention_of_torch(device):
    query, key, value = random_inputs(2, 3, 77, 40)
    query = query / 20  # so that rounded logits change little
    expected = functional.scaled_dot_product_attention(query, key, value)
    assert_close(ops.attend(query, key, value), expected, rtol=0, atol=1e-5)


def test_heads_are_joined_without_a_copy(device):
    mixed = ops.attend(*random_inputs(2, 3, 51, 8)).transpose(1, 2)
    assert mixed.is_contiguous()


def test_strides_and_half_precision(device):
    query, key, value = random_inputs(2, 3, 51, 8)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    assert torch.equal(ops.attend(*strided), ops.attend(query, key, value))
    total = torch.zeros(2, 51, 51, dtype=torch.bfloat16)
    half = query.half(), key.half(), value.half()
    mixed = ops.attend(*half, total)
    wide_total = torch.zeros(2, 51, 51)
    assert torch.equal(mixed, ops.attend(*(x.float() for x in half), wide_total).half())
    assert torch.equal(total, wide_total.bfloat16())


def test_a_value_that_is_not_finite_stays_in_its_channel(device):
    query, key, value = random_inputs(1, 2, 51, 20)
    expected = ops.attend(query, key, value)
    value[0, 0, 7, 3] = math.inf
    mixed = ops.attend(query, key, value)
    assert (mixed[0, 0, :, 3] == math.inf).all()
    mixed[0, 0, :, 3] = expected[0, 0, :, 3]
    assert torch.equal(mixed, expected)


def test_has_no_gradient(device):
    query, key, value = random_inputs(1, 2, 6, 4)
    with pytest.raises(RuntimeError, match="attend: there is no gradient; detach value or call"):
        ops.attend(query, key, value.requires_grad_())


def test_refuses_other_shapes(device):
    query, key, value = random_inputs(1, 2, 6, 4)
    with pytest.raises(ValueError, match="attend: value must be"):
        ops.attend(query, key, value[:, :, 1:])
    with pytest.raises(ValueError, match="attend: total must be"):
        ops.attend(query, key, value, torch.zeros(1, 5, 6))
    with pytest.raises(ValueError, match="attend: total must be of at most 6 tokens, got 7"):
        ops.attend(query, key, value, torch.zeros(1, 7, 7))
    with pytest.raises(ValueError, match="attend: first must be from 0 to 3, got 4"):
        ops.attend(query, key, value, torch.zeros(1, 3, 3), first=4)
    with pytest.raises(TypeError, match="attend: value must be float32 like query, got float16"):
        ops.attend(query, key, value.half())
