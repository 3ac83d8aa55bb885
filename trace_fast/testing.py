"""Tests of ops: inputs that resemble attention, and a tolerance that is measured instead of chosen."""

import torch
from torch import Tensor

__all__ = ["assert_no_worse", "random_features", "random_maps"]


def assert_no_worse(out: Tensor, exact: Tensor, eager: Tensor, magnitude: float = 0.0) -> None:
    """Assert that the error of `out` is at most twice that of plain torch in the same dtype.

    max |out - exact| <= 2 max |eager - exact| + floor, where floor is the rounding error of the largest number.

    Args:
        out: the result under test, finite, on any device; compared on the CPU.
        exact: float64 result of the reference, of the same shape.
        eager: result of the reference in the dtype of `out`, of the same shape.
        magnitude: largest absolute value of the terms of a sum, if the sum may be smaller than its terms.

    Raises:
        AssertionError: shape or dtype differ from those of eager, a value is not finite, or the error is larger.

    Example:
        >>> values = torch.rand(2, 3)
        >>> assert_no_worse(values.log(), values.double().log(), values.log())
    """
    out, exact, eager = out.cpu(), exact.cpu(), eager.cpu()
    assert out.shape == eager.shape == exact.shape, f"shape {tuple(out.shape)}, expected {tuple(exact.shape)}"
    assert out.dtype == eager.dtype, f"dtype {out.dtype}, expected {eager.dtype}"
    assert exact.dtype == torch.float64, f"exact is {exact.dtype}, expected float64"
    assert out.isfinite().all(), f"{int((~out.isfinite()).sum())} of {out.numel()} values are not finite"
    error, allowed = (float((result.double() - exact).abs().max()) for result in (out, eager))
    floor = torch.finfo(out.dtype).eps * max(float(exact.abs().max()), magnitude)
    assert error <= 2 * allowed + floor, f"error {error:.3g}, plain torch {allowed:.3g}, floor {floor:.3g}"


def random_features(batch: int, heads: int, tokens: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return features whose attention is peaked: logits are 20 times standard normal.

    Args:
        batch: B, number of images.
        heads: H.
        tokens: N.
        channels: d, channels per head.
        seed: of the random numbers.

    Returns:
        Query and key, (B, H, N, d) float32 each.

    Example:
        >>> query, key = random_features(1, 2, 6, 4)
        >>> query.shape
        torch.Size([1, 2, 6, 4])
    """
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, batch, heads, tokens, channels, generator=generator)
    return 20 * query, key


def random_maps(batch: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return two related attention maps with peaked rows and some exact zeros, as real maps have.

    Args:
        batch: B, number of images.
        tokens: N.
        seed: of the random numbers.

    Returns:
        Two maps, (B, N, N) float32 each; rows sum to 1.

    Example:
        >>> previous, current = random_maps(1, 6)
        >>> current.shape
        torch.Size([1, 6, 6])
    """
    generator = torch.Generator().manual_seed(seed)
    logits, change = torch.randn(2, batch, tokens, tokens, generator=generator)
    return (20 * logits).softmax(-1), (20 * logits + change).softmax(-1)
