"""rounding.py: results move by a unit in the last place, always in the same way, and what is exact stays."""

import os

import pytest
import rounding
import torch

pytestmark = pytest.mark.skipif("TRACE_FAST_TEST_ULP" in os.environ, reason="results are moved already")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_move_by_at_most_one_unit_in_both_directions(dtype):
    values = torch.randn(3, 700, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    moved = rounding.shift(values, 5)
    whole = rounding.BITS[dtype][0]
    steps = moved.view(whole).long() - values.view(whole).long()
    assert set(steps.unique().tolist()) == {-1, 0, 1}
    assert 0.5 < (steps != 0).float().mean() < 0.7
    assert moved.dtype == dtype
    assert torch.equal(rounding.shift(values, 5), moved)
    assert not torch.equal(rounding.shift(values, 6), moved)
    assert not torch.equal(rounding.shift(values.view(700, 3), 5), moved.view(700, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_results_stay(dtype):
    exact = torch.tensor([0.0, -0.0, 1.0, -2.0, 0.5, 12.0, torch.inf, -torch.inf], dtype=dtype)
    assert torch.equal(rounding.shift(exact, 5), exact)
    assert rounding.shift(torch.full((3,), torch.nan, dtype=dtype), 5).isnan().all()
    assert rounding.shift(torch.zeros(0, dtype=dtype), 5).shape == (0,)


def test_a_function_of_a_rounded_value_is_rounded():
    results = [
        rounding.perturbed(torch.sqrt, "sqrt", seed)(torch.tensor([1 - 2.0**-24, 1.0, 4.0])) for seed in range(9)
    ]
    assert {result[0].item() for result in results} <= {1 - 2.0**-23, 1 - 2.0**-24, 1.0}
    assert len({result[0].item() for result in results}) > 1
    assert all(result[1:].tolist() == [1, 2] for result in results)


def test_other_results_stay():
    for result in (
        torch.arange(3),
        torch.ones(2, dtype=torch.bool),
        None,
        (torch.rand(2),),
        torch.rand(2, device="meta"),
    ):
        assert rounding.shift(result, 5) is result


def test_strides_and_gradients_are_kept():
    values = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)).T
    assert rounding.shift(values, 5).stride() == values.stride()
    leaf = torch.full((2, 3), 0.3, requires_grad=True)
    moved = rounding.perturbed(torch.exp, "exp", 1)(leaf)
    moved.sum().backward()
    torch.testing.assert_close(leaf.grad, leaf.detach().exp(), rtol=1e-6, atol=0)


def test_every_operation_exists():
    for owner, names in rounding.OPERATIONS.items():
        assert [name for name in names.split() if not callable(getattr(owner, name, None))] == []


def test_the_mode_that_fills_memory_does_not_warn():
    assert torch.empty(3).isnan().all()
    target = torch.zeros(4)
    target.put_(torch.tensor([1]), torch.ones(1))  # not deterministic, on the CPU either
    assert target.tolist() == [0, 1, 0, 0]
