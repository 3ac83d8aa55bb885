"""The divergence ops, on every implementation, against the reference in float64."""

import math

import pytest
import torch
from torch.testing import assert_close

from trace_fast import _C, ops, reference
from trace_fast.testing import assert_no_worse, random_maps

# the last two have more than the 16 grid rows of a Triton program, and no strip of columns divides them
GRIDS = [(1, 1), (1, 4), (5, 1), (2, 3), (3, 7), (16, 24), (31, 17), (33, 5)]
DTYPES = [torch.float32, torch.bfloat16]


def outputs(module, previous, current, height, width):
    """Return all results of the family, from `ops` or from `reference`."""
    return [
        module.step_kl(previous, current),
        module.abdiv(current, height, width),
        *module.step_kl_abdiv(previous, current, height, width),
    ]


def assert_all_no_worse(results, exact, eager):
    for triple in zip(results, exact, eager, strict=True):
        # a divergence sums logarithms of either sign, of order 1
        assert_no_worse(*triple, magnitude=1.0)


def assert_outputs_no_worse(device, previous, current, *grid):
    exact = outputs(reference, previous.double(), current.double(), *grid)
    results = outputs(ops, previous.to(device), current.to(device), *grid)
    assert all(result.device == device for result in results)
    assert_all_no_worse(results, exact, outputs(reference, previous, current, *grid))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_worse_than_eager(grid, batch, device, tiles):
    if grid[0] * grid[1] > 100:
        tiles(32, 1024, interpreted_only=True)
    assert_outputs_no_worse(device, *random_maps(batch, grid[0] * grid[1]), *grid)


@pytest.fixture(scope="module")
def large_grid():
    """Return maps of 64 x 96 tokens, their divergences in float64, and their divergences by plain torch."""
    maps = random_maps(1, 64 * 96)
    exact = reference.step_kl_abdiv(*(x.double() for x in maps), 64, 96)
    return maps, exact, reference.step_kl_abdiv(*maps, 64, 96)


@pytest.mark.slow
def test_no_worse_than_eager_on_a_large_grid(device, tiles, large_grid):
    tiles(32, 2048, interpreted_only=True)
    maps, exact, eager = large_grid
    assert_all_no_worse(ops.step_kl_abdiv(*(x.to(device) for x in maps), 64, 96), exact, eager)


def test_no_worse_than_eager_on_flat_maps(device, tiles):
    tiles(32, 1024, interpreted_only=True)
    previous, current = torch.randn(2, 2, 384, 384, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert_outputs_no_worse(device, previous, current, 16, 24)


@pytest.mark.parametrize("grid", [(2, 3), (3, 17), (19, 3)], ids=str)
def test_bfloat16_maps(grid, device):
    maps = [x.bfloat16() for x in random_maps(3, grid[0] * grid[1])]
    assert_outputs_no_worse(device, *maps, *grid)
    # a map in half precision and a map in float32
    assert_outputs_no_worse(device, maps[0].float(), maps[1], *grid)


@pytest.mark.parametrize("tile", [(4, 32), (16, 64)], ids=str)
@pytest.mark.parametrize("grid", [(3, 17), (17, 5)], ids=str)
def test_grids_that_no_tile_divides(grid, tile, device, tiles):
    tiles(*tile)
    assert_outputs_no_worse(device, *random_maps(2, grid[0] * grid[1]), *grid)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 131])
def test_step_of_any_number_of_tokens(tokens, device):
    previous, current = random_maps(3, tokens)
    exact = reference.step_kl(previous.double(), current.double())
    out = ops.step_kl(previous.to(device), current.to(device))
    assert_no_worse(out, exact, reference.step_kl(previous, current), magnitude=1.0)


def test_by_hand(device):
    previous = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]], device=device)
    current = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]], device=device)
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert_close(ops.step_kl(previous, current).cpu(), torch.tensor([(first + math.log(2)) / 2]))
    # two tokens side by side: both compare the right one with the left one
    right_left = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert_close(ops.abdiv(current, 1, 2).cpu(), torch.full((1, 1, 2), right_left))
    assert_close(ops.abdiv(current, 2, 1).cpu(), torch.full((1, 2, 1), right_left))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_and_denormals_count_as_the_smallest_normal(dtype, device):
    small = torch.tensor([[[1.0, 0.0], [1.0, 1e-40]]], dtype=dtype, device=device)
    assert_close(ops.step_kl(small, small).cpu(), torch.zeros(1), rtol=0, atol=1e-6)
    assert_close(ops.step_kl(small.flip(-1), small).cpu(), torch.tensor([126 * math.log(2)]))
    assert_close(ops.abdiv(small, 1, 2).cpu(), torch.zeros(1, 1, 2), rtol=0, atol=1e-6)


def test_equal_maps_diverge_by_zero(device):
    attention = random_maps(2, 51)[0].to(device)
    assert_close(ops.step_kl(attention, attention.clone()).cpu(), torch.zeros(2), rtol=0, atol=1e-6)
    scores = ops.abdiv(attention[:, :1].expand(-1, 51, -1), 3, 17).cpu()
    assert_close(scores, torch.zeros(2, 3, 17), rtol=0, atol=1e-6)


@pytest.mark.parametrize("poisoned", ["previous", "current"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_nan_and_infinity_are_propagated(poisoned, value, device):
    maps = dict(zip(("previous", "current"), random_maps(2, 51), strict=True))
    maps[poisoned][1, 20, 33] = value
    results = outputs(ops, *(x.to(device) for x in maps.values()), 3, 17)
    for result, expected in zip(results, outputs(reference, *maps.values(), 3, 17), strict=True):
        assert torch.equal(result.isfinite().cpu(), expected.isfinite())
    assert not results[0][1].isfinite()
    assert results[0][0].isfinite()


def test_non_contiguous_maps_give_the_same_bits(device):
    previous, current = (x.to(device) for x in random_maps(3, 51))
    expected = outputs(ops, previous, current, 3, 17)
    for spread in (previous.mT.contiguous().mT, torch.stack((previous, current), 1)[:, 0]):
        assert not spread.is_contiguous()
        for result, value in zip(outputs(ops, spread, current, 3, 17), expected, strict=True):
            assert torch.equal(result, value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 7, 8, 15])
def test_views_at_any_offset(offset, dtype, device):
    previous, current = (x.to(device, dtype) for x in random_maps(2, 21))
    expected = outputs(ops, previous, current, 3, 7)
    shifted = []
    for attention in (previous, current):
        buffer = torch.full((attention.numel() + 64,), math.nan, dtype=dtype, device=device)
        shifted.append(buffer[offset : offset + attention.numel()].view_as(attention).copy_(attention))
    for result, value in zip(outputs(ops, *shifted, 3, 7), expected, strict=True):
        assert torch.equal(result, value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", [(3, 7), (17, 3)], ids=str)
def test_nothing_else_is_written(grid, dtype, device, tiles, guards):
    tiles(4, 32)
    previous, current = (x.to(device, dtype) for x in random_maps(2, grid[0] * grid[1]))
    before = previous.clone(), current.clone()
    assert all(result.isfinite().all() for result in ops.step_kl_abdiv(previous, current, *grid))
    assert torch.equal(previous, before[0])
    assert torch.equal(current, before[1])


def test_bits_are_the_same_in_every_run(device, tiles):
    tiles(4, 64)
    maps = [x.to(device) for x in random_maps(2, 85)]
    first = ops.step_kl_abdiv(*maps, 17, 5)
    for _ in range(2):
        for result, value in zip(ops.step_kl_abdiv(*maps, 17, 5), first, strict=True):
            assert torch.equal(result, value)


def test_bits_depend_neither_on_the_run_nor_on_threads(threads):
    previous, current = random_maps(1, 1024)
    kl, scores = torch.empty(1), torch.empty(1, 32, 32)
    _C.cpu.step_kl_abdiv(previous.data_ptr(), current.data_ptr(), 1, 32, 32, kl.data_ptr(), scores.data_ptr(), 1)
    for _ in range(5):
        again = ops.step_kl_abdiv(previous, current, 32, 32)
        assert torch.equal(again[0], kl)
        assert torch.equal(again[1], scores)


def test_empty_batch(device):
    kl, scores = ops.step_kl_abdiv(*torch.empty(2, 0, 6, 6, device=device), 2, 3)
    assert kl.shape == (0,)
    assert scores.shape == (0, 2, 3)
    assert ops.step_kl(*torch.empty(2, 0, 6, 6, device=device)).shape == (0,)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda p: ops.step_kl([p], p), TypeError, "step_kl: previous must be a float32 or bfloat16 tensor, got list"),
        (lambda p: ops.step_kl(p, p.double()), TypeError, "step_kl: current must be float32 or bfloat16, got float64"),
        (lambda p: ops.abdiv(p.half(), 2, 3), TypeError, "abdiv: attention must be float32 or bfloat16, got float16"),
        (
            lambda p: ops.step_kl(p[0], p),
            ValueError,
            r"step_kl: previous must be \(B, N, N\), got \(6, 6\)",
        ),
        (
            lambda p: ops.step_kl(p, p[:, :5, :5]),
            ValueError,
            r"step_kl: current must be \(B, N, N\) with B = 1, N = 6, got \(1, 5, 5\)",
        ),
        (
            lambda p: ops.step_kl(p, p.to("meta")),
            ValueError,
            "step_kl: current must be on {device} like previous, got meta",
        ),
        (lambda p: ops.abdiv(p[:, :5], 2, 3), ValueError, r"abdiv: attention must be \(B, N, N\), got \(1, 5, 6\)"),
        (lambda p: ops.abdiv(p, 2, 2), ValueError, r"abdiv: height \* width must be N = 6, got 2 \* 2"),
        (lambda p: ops.abdiv(p, -2, -3), ValueError, "abdiv: height must be at least 1, got -2"),
        (lambda p: ops.abdiv(p, 2, 3.0), TypeError, "abdiv: width must be an int, got float"),
        (lambda p: ops.step_kl_abdiv(p, p, 6, 2), ValueError, r"step_kl_abdiv: height \* width must be N = 6"),
        (
            lambda p: ops.abdiv(p[:, :0, :0], 1, 1),
            ValueError,
            r"abdiv: attention must be \(B, N, N\), got \(1, 0, 0\)",
        ),
    ],
)
def test_errors(call, error, match, device):
    with pytest.raises(error, match=match.replace("{device}", str(device))):
        call(torch.full((1, 6, 6), 1 / 6, device=device))


def test_null_pointers_and_no_threads_are_refused():
    attention = random_maps(1, 6)[0]
    with pytest.raises(ValueError, match=r"_C: addresses of \w+ must not be null"):
        _C.cpu.step_kl(attention.data_ptr(), 0, 1, 6, attention.data_ptr(), 1)
    with pytest.raises(ValueError, match="_C: num_threads must be at least 1, got 0"):
        _C.cpu.step_kl(attention.data_ptr(), attention.data_ptr(), 1, 6, attention.data_ptr(), 0)


def test_there_is_no_gradient(device):
    previous, current = (x.to(device) for x in random_maps(1, 6))
    for result in outputs(ops, previous, current.requires_grad_(), 2, 3):
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            result.sum().backward()
