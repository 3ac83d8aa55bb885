"""The attention ops that write maps, on every implementation, against the reference in float64."""

import itertools
import math
import os

import pytest
import torch
from op_examples import TRITON
from torch.testing import assert_close

from trace_fast import _C, ops, reference
from trace_fast.testing import assert_no_worse, random_features, random_maps

SHAPES = [
    *itertools.product((1, 3), (1, 5), [(1, 1), (2, 3), (3, 7)]),
    *[(3, 1, (16, 24)), (1, 5, (16, 24)), (1, 5, (31, 17)), (3, 1, (31, 17))],
]
HALVES = [torch.float16, torch.bfloat16]
EPS = torch.finfo(torch.float32).eps


def assert_map_no_worse(device, query, key, scale=None):
    exact = reference.attention_map(query.double(), key.double(), scale)
    eager = reference.attention_map(query, key, scale)
    out = ops.attention_map(query.to(device), key.to(device), scale)
    assert out.device == device
    assert_no_worse(out, exact, eager, magnitude=logit_rounding(query, key, scale))


def logit_rounding(query, key, scale=None):
    """Return the largest error of a probability that the rounding of logits causes, in units of eps.

    A logit of size L has an error of L eps / 2 as a float32, and if two keys share a row, an error in the difference of
    their logits changes both probabilities by a quarter of it. Plain torch rounds in the same way, but in a small map
    its largest error depends on the rounding of a single row.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else abs(scale)
    return float((query.double() @ key.double().mT).abs().max()) * scale / 4


def shifted_view(tensor, offset, fill):
    """Return a copy of a tensor at an offset into a buffer of `fill`, and the buffer."""
    buffer = torch.full((tensor.numel() + 64,), fill, dtype=tensor.dtype, device=tensor.device)
    return buffer[offset : offset + tensor.numel()].view_as(tensor).copy_(tensor), buffer


def assert_untouched(buffer, offset, size):
    assert (buffer[:offset] == -7).all()
    assert (buffer[offset + size :] == -7).all()


@pytest.mark.parametrize(("batch", "heads", "grid"), SHAPES, ids=str)
def test_no_worse_than_eager(batch, heads, grid, device, tiles):
    tokens = grid[0] * grid[1]
    if tokens > 100:
        tiles(256, 256, interpreted_only=True)
    query, key = random_features(batch, heads, tokens, 13)
    assert_map_no_worse(device, query, key)
    # the same features with flat attention
    assert_map_no_worse(device, query / 20, key)


@pytest.fixture(scope="module")
def large_grid():
    """Return features of 64 x 96 tokens, their map in float64, and their map by plain torch."""
    query, key = random_features(1, 1, 64 * 96, 16)
    return query, key, reference.attention_map(query.double(), key.double()), reference.attention_map(query, key)


@pytest.mark.slow
def test_no_worse_than_eager_on_a_large_grid(device, tiles, large_grid):
    tiles(512, 2048, interpreted_only=True)
    query, key, exact, eager = large_grid
    out = ops.attention_map(query.to(device), key.to(device))
    assert_no_worse(out, exact, eager, magnitude=logit_rounding(query, key))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("channels", [1, 13, 40, 64, 72, 80, 128, 160, 256])
def test_channels(channels, dtype, device):
    query, key = random_features(2, 2, 51, channels)
    assert_map_no_worse(device, query.to(dtype), key.to(dtype))


def test_features_of_two_dtypes(device):
    query, key = random_features(2, 3, 51, 40)
    assert_map_no_worse(device, query.half(), key)
    assert_map_no_worse(device, query, key.bfloat16())
    assert_map_no_worse(device, query.half(), key.bfloat16())


def test_by_hand(device):
    query = torch.tensor([[[[math.log(3)], [0]], [[0], [0]]]], device=device)
    key = torch.tensor([[[[1.0], [0]], [[5], [7]]]], device=device)
    expected = torch.tensor([[[0.625, 0.375], [0.5, 0.5]]], device=device)
    assert_close(ops.attention_map(query, key, scale=1.0), expected)
    total = torch.ones(1, 2, 2, device=device)
    ops.accumulate_attention(total, query, key, weight=0.5, scale=1.0)
    assert_close(total, 1 + 0.5 * expected)


@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (16, 64)], ids=str)
def test_tokens_that_no_tile_divides(tile, device, tiles):
    tiles(*tile)
    assert_map_no_worse(device, *random_features(2, 3, 51, 24))
    # and a number that every tile divides, so that loads and stores are not masked
    assert_map_no_worse(device, *random_features(2, 3, 64, 24))


def test_more_rows_of_tiles_than_in_a_group(device, tiles):
    # 12 rows of tiles: a group of 8 and one of 4, which is not full
    tiles(16, 16)
    assert_map_no_worse(device, *random_features(1, 1, 16 * 11 + 5, 8))


def test_accumulates_blocks(device):
    blocks = [random_features(2, 3, 51, 8, seed) for seed in range(4)]
    total = torch.zeros(2, 51, 51, device=device)
    eager, exact = torch.zeros(2, 51, 51), torch.zeros(2, 51, 51, dtype=torch.float64)
    for query, key in blocks:
        ops.accumulate_attention(total, query.to(device), key.to(device), 0.25)
        reference.accumulate_attention(eager, query, key, 0.25)
        reference.accumulate_attention(exact, query.double(), key.double(), 0.25)
    assert_no_worse(total, exact, eager, magnitude=max(logit_rounding(*block) for block in blocks))


@pytest.mark.parametrize("heads", [1, 5])
def test_bfloat16_total_is_rounded_once(heads, device):
    query, key = random_features(3, heads, 51, 8)
    before = random_maps(3, 51)[0].bfloat16()
    exact, total = before.double(), before.to(device)
    ops.accumulate_attention(total, query.to(device), key.to(device), 0.3)
    assert total.dtype == torch.bfloat16
    reference.accumulate_attention(exact, query.double(), key.double(), 0.3)
    # half a unit in the last place, plus the error of the float32 sum before it is rounded
    error = 0.3 * EPS * max(1.0, 2 * logit_rounding(query, key))
    assert_close(total.double().cpu(), exact, rtol=2.0**-8, atol=error)


def test_scale_and_default_scale(device):
    query, key = random_features(1, 2, 6, 16)
    assert_close(
        ops.attention_map(query.to(device), key.to(device)),
        ops.attention_map(query.to(device), key.to(device), scale=0.25),
    )
    assert_map_no_worse(device, query, key, scale=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_negative_scale_and_zero(dtype, device):
    query, key = (x.to(dtype) for x in random_features(2, 2, 51, 16))
    assert_map_no_worse(device, query, key, scale=-0.3)
    assert_map_no_worse(device, query, key, scale=0.0)


def test_shift_of_all_logits_changes_nothing(device):
    # 5 tokens do not fill a vector: if the padding counted, its logit of 0 would outweigh -10,000
    query, key = torch.full((2, 1, 1, 5, 1), 100.0, device=device)
    expected = torch.full((1, 5, 5), 0.2, device=device)
    assert_close(ops.attention_map(-query, key), expected, rtol=0, atol=1e-7)
    assert_close(ops.attention_map(query, key), expected, rtol=0, atol=1e-7)


def test_a_certain_row(device):
    query = torch.tensor([[[[1e4], [0.0]]]], device=device)
    key = torch.tensor([[[[1.0], [0.0]]]], device=device)
    # the reciprocal of the sum of a row may be rounded before it is multiplied; all other operations are exact
    expected = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]], device=device)
    assert_close(ops.attention_map(query, key), expected, rtol=EPS, atol=0)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maximum; that of a device ignores NaN too
@pytest.mark.parametrize("polynomial", [0, 2, 4])
def test_nan_is_propagated(polynomial, device, tiles):
    tiles(16, 32, polynomial)
    for poisoned in range(2):
        features = random_features(2, 3, 51, 8)
        features[poisoned][1, 2, 20, 4] = math.nan
        expected = reference.attention_map(*features)
        assert expected[1, 20].isnan().all()
        out = ops.attention_map(*(x.to(device) for x in features))
        assert torch.equal(out.isnan().cpu(), expected.isnan())


def log_sum_exp(query, keys, scale=None):
    """Return the logarithm of the sum of exp(logit) of each row, in float64."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return (query.double() @ keys.double().mT * scale).logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("channels", [1, 13, 40, 72, 128])
def test_log_sum_exp_of_the_rows(channels, dtype, device):
    query, key = (x.to(dtype) for x in random_features(2, 3, 51, channels))
    lse = log_sum_exp(query, key)
    # its own rounding is a relative error of the probabilities
    error = EPS * float(lse.abs().max())
    exact = reference.attention_map(query.double(), key.double())
    eager = reference.attention_map(query, key)
    # rows of another memory layout, as attention on a CPU returns them
    lse = lse.float().mT.contiguous().mT.to(device)
    total = torch.zeros(2, 51, 51, device=device)
    ops.accumulate_attention(total, query.to(device), key.to(device), 1.0, lse=lse)
    assert_no_worse(total, exact, eager, magnitude=logit_rounding(query, key) + error / EPS)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("channels", "count"), [(13, 1), (40, 5), (72, 70), (128, 33)])
def test_log_sum_exp_over_other_keys_too(channels, count, dtype, device, tiles):
    tiles(16, 32)
    query, key = (x.to(dtype) for x in random_features(2, 3, 51, channels))
    # one tensor of all keys, as attention has them: others are a view
    keys = torch.cat([random_features(2, 3, count, channels, 1)[1].to(dtype), key], 2)
    lse = log_sum_exp(query, keys)
    exact = reference.attention_map(query.double(), key.double())
    eager = reference.attention_map(query, key)
    total = torch.zeros(2, 51, 51, device=device)
    query, keys, lse = query.to(device), keys.to(device), lse.float().to(device)
    ops.accumulate_attention(total, query, keys[:, :, count:], 1.0, lse=lse, others=keys[:, :, :count])
    magnitude = logit_rounding(query.cpu(), keys.cpu()) + float(lse.abs().max())
    assert_no_worse(total, exact, eager, magnitude=32 * magnitude)


def with_share(share):
    """Return query, key, one other key that takes this share of each row's mass at scale 1, and the log-sum-exp."""
    query, key = random_features(1, 2, share.numel(), 16)
    query /= 80  # flat attention, whose probabilities are all compared
    wanted = log_sum_exp(query, key, 1.0) + torch.log(share / (1 - share))
    # a channel more, of which the key has nothing
    query = torch.cat([query, wanted.clamp(min=-1e3)[..., None].float()], -1)
    key = torch.cat([key, torch.zeros(*key.shape[:3], 1)], -1)
    other = torch.zeros(1, 2, 1, 17)
    other[..., -1] = 1
    return query, key, other, log_sum_exp(query, torch.cat([other, key], 2), 1.0)


def test_share_of_other_keys(device, tiles):
    """The error of a row grows by 1 / (1 - f) for a share f of other keys, up to 32, and not at all beyond."""
    tiles(16, 32)
    share = torch.cat([torch.linspace(0, 0.96, 40), torch.linspace(0.968, 0.9999, 11)]).double()
    query, key, other, lse = with_share(share)
    exact = reference.attention_map(query.double(), key.double(), scale=1.0)
    total = torch.zeros(1, 51, 51, device=device)
    arguments = (x.to(device) for x in (query, key))
    ops.accumulate_attention(total, *arguments, 1.0, scale=1.0, lse=lse.float().to(device), others=other.to(device))
    error = ((total.cpu().double() - exact) / exact).abs().amax(-1)[0]
    rounding = EPS * (lse.abs().amax(1)[0] + logit_rounding(query, key, 1.0) + 8)
    assert (error <= 2 * rounding / (1 - share).clamp(min=1 / 32)).all()
    assert (error[share > 0.97] <= 2 * rounding[share > 0.97]).all()


@pytest.mark.parametrize("device", [TRITON], indirect=True)
def test_the_log_sum_exp_is_used(device, tiles):
    tiles(16, 32)
    share = torch.linspace(0, 0.9999, 51).double()
    query, key, other, lse = (x.to(device) for x in with_share(share))
    lse = lse.float()
    for others in (None, other):
        maps = []
        for moved in (lse, lse + 1e-3):
            maps.append(torch.zeros(1, 51, 51, device=device))
            ops.accumulate_attention(maps[-1], query, key, 1.0, scale=1.0, lse=moved, others=others)
        used = ((maps[0] / maps[1]).amin(-1) > 1.0005)[0].cpu()
        # rows of which other keys have more than 31 in 32 are summed up
        assert torch.equal(used, torch.full_like(used, True) if others is None else share < 31 / 32)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_log_sum_exp_with_a_negative_scale_and_zero(scale, device):
    query, key = random_features(2, 2, 51, 16)
    keys = torch.cat([key, 2 * key[:, :, :9]], 2)
    lse = log_sum_exp(query, keys, scale).float()
    exact = reference.attention_map(query.double(), key.double(), scale)
    eager = reference.attention_map(query, key, scale)
    total = torch.zeros(2, 51, 51, device=device)
    query, key, lse, others = (x.to(device) for x in (query, key, lse, keys[:, :, 51:]))
    ops.accumulate_attention(total, query, key, 1.0, scale, lse, others)
    magnitude = logit_rounding(query.cpu(), keys, scale) + float(lse.abs().max())
    assert_no_worse(total, exact, eager, magnitude=32 * magnitude)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_nan_is_propagated_past_the_log_sum_exp(device, tiles):
    tiles(16, 32)
    query, key = random_features(2, 3, 51, 8)
    query[1, 2, 20, 4] = math.nan
    others = key[:, :, :5].clone()
    lse = log_sum_exp(query, torch.cat([key, others], 2)).float()
    total = torch.zeros(2, 51, 51, device=device)
    query, key, lse, others = (x.to(device) for x in (query, key, lse, others))
    ops.accumulate_attention(total, query, key, 1.0, lse=lse, others=others)
    assert total[1, 20].isnan().all() and not total[0].isnan().any() and not total[1, :20].isnan().any()


@pytest.mark.parametrize("polynomial", [2, 4])
def test_polynomial_exponentials_no_worse_than_eager(polynomial, device, tiles):
    tiles(16, 32, polynomial)
    query, key = random_features(2, 2, 51, 24)
    assert_map_no_worse(device, query, key)
    assert_map_no_worse(device, query / 20, key)


@pytest.mark.parametrize("polynomial", [0, 1, 2, 4, 8])
def test_exponentials_far_below_the_maximum(polynomial, device, tiles):
    tiles(16, 16, polynomial)
    # exponents of 2 in every part of a tile; both sides of a rounding to an integer
    exponents = torch.tensor([0.0, -0.49, -0.51, -1.5, -100.3, -125.9, -127.0, -1e30]).repeat(4)
    exponents[16:] = exponents[16:].roll(4)
    query = torch.ones(1, 1, 32, 1, device=device)
    out = ops.attention_map(query, exponents.view(1, 1, 32, 1).to(device), scale=math.log(2)).cpu()
    exact = 2 ** exponents.double() / (2 ** exponents.double()).sum()
    above = exponents > -126
    # rounding of the exponential, of the sum of the row and of the quotient, and of a logit of this size
    allowed = (8 + exponents.abs() / 2) * EPS * exact
    assert ((out[0] - exact).abs() <= allowed)[:, above].all()
    assert (out[0, :, ~above] <= 2.0**-126).all()
    if polynomial and os.environ["TRACE_FAST_BACKEND"] == "triton":
        # the last columns of each tile of 16
        by_polynomials = ~above & (torch.arange(32) % 16 >= 16 - 16 // polynomial)
        assert by_polynomials.any()
        assert (out[0, :, by_polynomials] == 0).all()


def test_strided_features_give_the_same_bits(device):
    query, key = (x.to(device) for x in random_features(2, 3, 51, 8))
    expected = ops.attention_map(query, key)
    # the layout of projections: (B, N, H * d) viewed as (B, H, N, d)
    spread = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    assert not spread[0].is_contiguous()
    assert torch.equal(ops.attention_map(*spread), expected)
    # query, key and value from one projection
    packed = torch.stack((query, key, key)).permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4)
    assert torch.equal(ops.attention_map(packed[0], packed[1]), expected)


def test_features_with_strided_channels_give_the_same_bits(device):
    query, key = (x.to(device) for x in random_features(2, 3, 51, 8))
    spread = [x.mT.contiguous().mT for x in (query, key)]
    assert spread[0].stride(-1) != 1
    assert torch.equal(ops.attention_map(*spread), ops.attention_map(query, key))


def test_features_shared_by_heads_and_images(device):
    query, key = (x.to(device) for x in random_features(2, 3, 51, 8))
    shared = key[:1, :1].expand_as(key)
    assert torch.equal(ops.attention_map(query, shared), ops.attention_map(query, shared.contiguous()))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [5, 8])
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 7, 8, 15])
def test_views_at_any_offset(offset, channels, dtype, device):
    query, key = (x.to(device, dtype) for x in random_features(2, 3, 21, channels))
    expected = torch.zeros(2, 21, 21, dtype=dtype, device=device)
    ops.accumulate_attention(expected, query, key, 1.0)
    query, key = (shifted_view(x, offset, math.nan)[0] for x in (query, key))
    total, buffer = shifted_view(torch.zeros_like(expected), offset, -7.0)
    ops.accumulate_attention(total, query, key, 1.0)
    assert torch.equal(total, expected)
    assert_untouched(buffer, offset, total.numel())


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_views_of_several_tiles(offset, device, tiles):
    tiles(16, 32)
    query, key = (x.to(device) for x in random_features(2, 3, 51, 24))
    expected = ops.attention_map(query, key)
    query, key = (shifted_view(x, offset, math.nan)[0] for x in (query, key))
    total, buffer = shifted_view(torch.zeros_like(expected), offset, -7.0)
    ops.accumulate_attention(total, query, key, 1.0)
    assert torch.equal(total, expected)
    assert_untouched(buffer, offset, total.numel())


def test_inputs_are_not_changed(device):
    query, key = (x.to(device) for x in random_features(2, 3, 51, 8))
    before = query.clone(), key.clone()
    ops.attention_map(query, key, scale=-0.3)
    assert torch.equal(query, before[0])
    assert torch.equal(key, before[1])


def test_bits_depend_neither_on_the_run_nor_on_threads(threads):
    query, key = random_features(1, 2, 384, 40)
    first = torch.zeros(1, 384, 384)
    _C.cpu.accumulate_attention(first.data_ptr(), query.data_ptr(), key.data_ptr(), 1, 2, 384, 40, 1.0, 40**-0.5, 1)
    for _ in range(5):
        assert torch.equal(ops.attention_map(query, key), first)


def test_bits_are_the_same_in_every_run(device, tiles):
    tiles(32, 128)
    query, key = (x.to(device) for x in random_features(2, 3, 51, 40))
    attention = ops.attention_map(query, key)
    resized = ops.resize_attention(attention, (3, 17), (5, 18))
    for _ in range(3):
        assert torch.equal(ops.attention_map(query, key), attention)
        assert torch.equal(ops.resize_attention(attention, (3, 17), (5, 18)), resized)


def test_rows_sum_to_one(device, tiles):
    tiles(128, 1024, interpreted_only=True)
    attention = ops.attention_map(*(x.to(device) for x in random_features(1, 4, 384, 40)))
    assert_close(attention.sum(-1).cpu(), torch.ones(1, 384), rtol=0, atol=2e-6)
    resized = ops.resize_attention(attention, (16, 24), (31, 24))
    assert_close(resized.sum(-1).cpu(), torch.ones(1, 31 * 24), rtol=0, atol=5e-6)


RESIZES = [
    *[((2, 3), (2, 3)), ((2, 3), (4, 6)), ((2, 3), (8, 12)), ((2, 3), (5, 4)), ((1, 1), (3, 2)), ((1, 1), (1, 1))],
    *[((1, 4), (1, 9)), ((5, 1), (11, 1)), ((1, 4), (3, 4)), ((3, 7), (4, 7)), ((3, 7), (16, 24)), ((7, 5), (31, 17))],
]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("size", "target"), RESIZES, ids=str)
def test_resized_maps_no_worse_than_eager(size, target, batch, device, tiles):
    tiles(128, 1024, interpreted_only=True)
    attention = random_maps(batch, size[0] * size[1])[0]
    exact = reference.resize_attention(attention.double(), size, target)
    eager = reference.resize_attention(attention, size, target)
    assert_no_worse(ops.resize_attention(attention.to(device), size, target), exact, eager)

    total = random_maps(batch, target[0] * target[1])[0]
    exact, eager, out = total.double(), total.clone(), total.to(device)
    reference.accumulate_resized(exact, attention.double(), size, target, 0.3)
    reference.accumulate_resized(eager, attention, size, target, 0.3)
    ops.accumulate_resized(out, attention.to(device), size, target, 0.3)
    assert_no_worse(out, exact, eager)


@pytest.mark.parametrize("tile", [(16, 16), (32, 64), (8, 256)], ids=str)
def test_resized_maps_that_no_tile_divides(tile, device, tiles):
    tiles(*tile)
    attention = random_maps(3, 6)[0]
    exact = reference.resize_attention(attention.double(), (2, 3), (5, 7))
    eager = reference.resize_attention(attention, (2, 3), (5, 7))
    assert_no_worse(ops.resize_attention(attention.to(device), (2, 3), (5, 7)), exact, eager)


@pytest.mark.parametrize(("size", "target"), [((2, 3), (4, 6)), ((3, 7), (5, 18)), ((2, 3), (2, 3))], ids=str)
def test_bfloat16_total_of_resized_maps_is_rounded_once(size, target, device, tiles):
    tiles(128, 1024, interpreted_only=True)
    attention = random_maps(3, size[0] * size[1])[0]
    before = random_maps(3, target[0] * target[1])[0].bfloat16()
    exact, total = before.double(), before.to(device)
    ops.accumulate_resized(total, attention.to(device), size, target, 0.3)
    assert total.dtype == torch.bfloat16
    reference.accumulate_resized(exact, attention.double(), size, target, 0.3)
    # half a unit in the last place, plus the error of the float32 sum before it is rounded
    assert_close(total.double().cpu(), exact, rtol=2.0**-8, atol=8 * EPS)


def test_resized_by_hand(device):
    # the middle one of three fine points is the mean of both coarse points, the others are equal to one of them
    attention = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]], device=device)
    across = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    expected = across @ attention[0].cpu() @ (across / across.sum(0)).mT
    assert_close(ops.resize_attention(attention, (1, 2), (1, 3))[0].cpu(), expected)
    assert_close(ops.resize_attention(attention, (2, 1), (3, 1))[0].cpu(), expected)


def test_non_contiguous_maps_are_resized_to_the_same_bits(device, tiles):
    tiles(64, 64, interpreted_only=True)
    attention = random_maps(2, 21)[0].to(device)
    expected = ops.resize_attention(attention, (3, 7), (5, 9))
    for spread in (attention.mT.contiguous().mT, torch.stack((attention, attention), 1)[:, 0]):
        assert not spread.is_contiguous()
        assert torch.equal(ops.resize_attention(spread, (3, 7), (5, 9)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 4, 7])
def test_resized_views_at_any_offset(offset, dtype, device, tiles):
    tiles(128, 64, interpreted_only=True)
    attention = random_maps(2, 6)[0].to(device)
    before = torch.ones(2, 81, 81, dtype=dtype, device=device)
    expected = before.clone()
    ops.accumulate_resized(expected, attention, (2, 3), (9, 9), 0.5)
    total, buffer = shifted_view(before, offset, -7.0)
    ops.accumulate_resized(total, shifted_view(attention, offset, math.nan)[0], (2, 3), (9, 9), 0.5)
    assert torch.equal(total, expected)
    assert_untouched(buffer, offset, total.numel())


def test_nan_is_propagated_by_resizing(device, tiles):
    tiles(64, 64, interpreted_only=True)
    attention = random_maps(2, 21)[0]
    attention[1, 4, 5] = math.nan
    expected = reference.resize_attention(attention, (3, 7), (5, 9)).isnan()
    assert expected.any() and not expected.all()
    assert torch.equal(ops.resize_attention(attention.to(device), (3, 7), (5, 9)).isnan().cpu(), expected)


def test_empty_batch(device):
    features, attention = torch.empty(2, 0, 2, 6, 4, device=device), torch.empty(0, 6, 6, device=device)
    assert ops.attention_map(*features).shape == (0, 6, 6)
    assert ops.resize_attention(attention, (2, 3), (4, 6)).shape == (0, 24, 24)


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
        (
            {"query": torch.ones(1, 2, 6, 257), "key": torch.ones(1, 2, 6, 257)},
            ValueError,
            "query must be at most 256 channels per head, got 257",
        ),
        ({"key": torch.ones(1, 2, 6, 4, device="meta")}, ValueError, "key must be on {device} like query, got meta"),
        ({"total": torch.ones(1, 6, 6, device="meta")}, ValueError, "total must be on {device} like query, got meta"),
        ({"total": torch.ones(1, 6, 6).half()}, TypeError, "total must be float32 or bfloat16, got float16"),
        (
            {"total": torch.ones(1, 6, 5)},
            ValueError,
            r"total must be \(B, N, N\) with B = 1, N = 6, got \(1, 6, 5\)",
        ),
        ({"total": torch.ones(1, 6, 6).mT}, ValueError, r"total must be contiguous, got strides \(36, 1, 6\)"),
        ({"lse": torch.ones(1, 2, 6).half()}, TypeError, "lse must be float32, got float16"),
        (
            {"lse": torch.ones(1, 2, 5)},
            ValueError,
            r"lse must be \(B, H, N\) with B = 1, H = 2, N = 6, got \(1, 2, 5\)",
        ),
        ({"lse": torch.ones(1, 2, 6, device="meta")}, ValueError, "lse must be on {device} like query, got meta"),
        ({"others": torch.ones(1, 2, 3, 4).half()}, TypeError, "others must be float32, got float16"),
        (
            {"others": torch.ones(1, 2, 3, 5)},
            ValueError,
            r"others must be \(B, H, T, d\) with B = 1, H = 2, d = 4, got \(1, 2, 3, 5\)",
        ),
        ({"others": torch.ones(1, 2, 3, 4, device="meta")}, ValueError, "others must be on {device} like query"),
        ({"weight": "1"}, TypeError, "weight must be a number, got str"),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
        (
            {"query": torch.ones(1, 2, 6, 4).requires_grad_()},
            RuntimeError,
            "there is no gradient; detach query or call",
        ),
    ],
)
def test_errors(change, error, match, device):
    arguments = {"total": torch.zeros(1, 6, 6), "query": torch.ones(1, 2, 6, 4), "key": torch.ones(1, 2, 6, 4)}
    arguments = {name: move(value, device) for name, value in {**arguments, "weight": 1.0, **change}.items()}
    with pytest.raises(error, match=match.replace("{device}", str(device))):
        ops.accumulate_attention(**arguments)


def move(value, device):
    """Return a tensor on the device, and return a meta tensor and what is not a tensor as they are."""
    return value.to(device) if isinstance(value, torch.Tensor) and value.device.type != "meta" else value


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"attention": None}, TypeError, "accumulate_resized: attention must be a float32 tensor, got NoneType"),
        ({"attention": torch.ones(1, 6, 6).bfloat16()}, TypeError, "attention must be float32, got bfloat16"),
        ({"attention": torch.ones(1, 6, 5)}, ValueError, r"attention must be \(B, N, N\), got \(1, 6, 5\)"),
        ({"size": (2, 2)}, ValueError, r"height \* width must be N = 6, got 2 \* 2"),
        ({"size": (2, 3.0)}, TypeError, "width must be an int, got float"),
        ({"target": (2, 2)}, ValueError, r"target must be at least \(2, 3\), got \(2, 2\)"),
        ({"target": (4, 5)}, ValueError, r"height \* width must be N = 24, got 4 \* 5"),
        ({"total": torch.zeros(2, 24, 24)}, ValueError, r"total must be \(B, M, M\) with B = 1, got \(2, 24, 24\)"),
        ({"total": torch.zeros(1, 24, 24).half()}, TypeError, "total must be float32 or bfloat16, got float16"),
        ({"total": torch.zeros(1, 24, 24).mT}, ValueError, r"total must be contiguous, got strides \(576, 1, 24\)"),
        ({"total": torch.ones(1, 24, 24, device="meta")}, ValueError, "total must be on {device} like attention"),
        ({"weight": None}, TypeError, "weight must be a number, got NoneType"),
        ({"attention": torch.ones(1, 6, 6).requires_grad_()}, RuntimeError, "there is no gradient; detach attention"),
    ],
)
def test_resize_errors(change, error, match, device):
    arguments = {"total": torch.zeros(1, 24, 24), "attention": torch.full((1, 6, 6), 1 / 6)}
    arguments |= {"size": (2, 3), "target": (4, 6), "weight": 1.0}
    arguments = {name: move(value, device) for name, value in {**arguments, **change}.items()}
    with pytest.raises(error, match=match.replace("{device}", str(device))):
        ops.accumulate_resized(**arguments)


@pytest.mark.parametrize(
    ("size", "target", "match"),
    [
        ((2, 2), (4, 4), r"resize_attention: height \* width must be N = 6, got 2 \* 2"),
        ((2, 3), (2, 2), r"resize_attention: target must be at least \(2, 3\), got \(2, 2\)"),
    ],
)
def test_resize_attention_errors(size, target, match, device):
    with pytest.raises(ValueError, match=match):
        ops.resize_attention(torch.full((1, 6, 6), 1 / 6, device=device), size, target)


def test_gradients_are_off_under_no_grad(device):
    query, key = (x.to(device) for x in random_features(1, 2, 6, 4))
    with torch.no_grad():
        assert not ops.attention_map(query.requires_grad_(), key).requires_grad


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (6, TypeError, r"size must be \(height, width\), got 6"),
        ((2, 3, 1), TypeError, r"size must be \(height, width\), got \(2, 3, 1\)"),
        ((2.0, 3), TypeError, "height must be an int, got float"),
        ((2, 2**64), ValueError, "width must be from 1 to 2147483647, got 18446744073709551616"),
    ],
)
def test_grids_are_two_integers(size, error, message):
    with pytest.raises(error, match=f"resize_attention: {message}"):
        ops.resize_attention(torch.eye(6)[None], size, (4, 6))


@pytest.mark.parametrize("number", [1e39, -1e39, math.inf, math.nan, 10**400])
@pytest.mark.parametrize("name", ["weight", "scale"])
def test_factors_are_finite_in_float32(number, name):
    query = torch.zeros(1, 1, 6, 2)
    factors = {"weight": 1.0, "scale": 1.0, name: number}
    with pytest.raises(ValueError, match=f"accumulate_attention: {name} must be"):
        ops.accumulate_attention(torch.zeros(1, 6, 6), query, query, **factors)


def test_maps_beyond_the_memory_are_refused():
    query = torch.zeros(1, 1, 1, 2).expand(1, 1, 10**8, 2)
    with pytest.raises(ValueError, match=r"attention_map: query must be small enough for .* of memory"):
        ops.attention_map(query, query)
    with pytest.raises(ValueError, match=r"resize_attention: attention must be small enough for .* of memory"):
        ops.resize_attention(torch.eye(6)[None], (2, 3), (20_000, 30_000))
