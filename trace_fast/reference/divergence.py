"""Divergences of attention: between steps, and between the neighbors of a token."""

import torch
from torch import Tensor

from trace_fast.reference.precision import sum_dtype

__all__ = ["abdiv", "step_kl", "step_kl_abdiv"]

# probabilities are clamped to it from below, so that their logarithms are finite
TINY = 2.0**-126


def step_kl(previous: Tensor, current: Tensor) -> Tensor:
    """Compute the divergence between the attention maps of two timesteps.

    KL(SA(X_t_prev) || SA(X_t)), mean over query rows; the map with less noise comes first. The timestep where it is
    largest is the paper's Instance Emergence Point.

    Args:
        previous: (B, N, N) float, rows sum to 1.
        current: (B, N, N) float, rows sum to 1.

    Returns:
        (B,), float32 or wider, in nats, >= 0 up to rounding. Probabilities are clamped below at 2^-126.

    Example:
        >>> previous, current = torch.rand(2, 1, 6, 6).softmax(-1)
        >>> step_kl(previous, current).shape
        torch.Size([1])
    """
    return _kl(previous, _log(previous), _log(current)).mean(-1)


def abdiv(attention: Tensor, height: int, width: int) -> Tensor:
    """Compute the boundary strength of every token from the divergence between its opposite neighbors.

    ABDiv = KL(right || left) + KL(below || above) of the attention rows around each token (the paper's Attention
    Boundary Divergence).

    Args:
        attention: (B, N, N) float, rows sum to 1, N = height * width; row i is what token i attends to.
        height: grid rows, in tokens.
        width: grid columns, in tokens.

    Returns:
        (B, height, width), float32 or wider, in nats, >= 0 up to rounding; neighbors are clamped to the grid at the
        border, probabilities below at 2^-126.

    Example:
        >>> abdiv(torch.rand(1, 6, 6).softmax(-1), 2, 3).shape
        torch.Size([1, 2, 3])
    """
    return _abdiv(attention, _log(attention), height, width)


def step_kl_abdiv(previous: Tensor, current: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Compute `step_kl` of two maps and `abdiv` of the second, reading each map once.

    Args:
        previous: (B, N, N) float, rows sum to 1, N = height * width.
        current: (B, N, N) float, rows sum to 1.
        height: grid rows, in tokens.
        width: grid columns, in tokens.

    Returns:
        `step_kl(previous, current)`, (B,), and `abdiv(current, height, width)`, (B, height, width); both float32 or
        wider, in nats.

    Example:
        >>> previous, current = torch.rand(2, 1, 6, 6).softmax(-1)
        >>> kl, scores = step_kl_abdiv(previous, current, 2, 3)
        >>> kl.shape, scores.shape
        (torch.Size([1]), torch.Size([1, 2, 3]))
    """
    log_current = _log(current)
    kl = _kl(previous, _log(previous), log_current).mean(-1)
    return kl, _abdiv(current, log_current, height, width)


def _log(p: Tensor) -> Tensor:
    """Return the logarithm of probabilities, finite at 0."""
    return p.to(sum_dtype(p)).clamp_min(TINY).log()


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the sum over the last axis of p (log p - log q); the difference comes first, or the sums would cancel."""
    return (log_p - log_q).mul_(p).sum(-1)


def _abdiv(p: Tensor, log_p: Tensor, height: int, width: int) -> Tensor:
    """Return the ABDiv of maps (B, N, N) from the maps and their logarithms."""
    p, log_p = p.unflatten(1, (height, width)), log_p.unflatten(1, (height, width))

    def kl(axis: int, ahead: int, behind: int, count: int) -> Tensor:
        p_ahead, log_ahead = p.narrow(axis, ahead, count), log_p.narrow(axis, ahead, count)
        return _kl(p_ahead, log_ahead, log_p.narrow(axis, behind, count))

    def along(axis: int) -> Tensor:
        last = p.size(axis) - 1
        if last == 0:
            return kl(axis, 0, 0, 1)
        # first point, interior, last point
        return torch.cat([kl(axis, 1, 0, 1), kl(axis, 2, 0, last - 1), kl(axis, last, last - 1, 1)], axis)

    return along(2) + along(1)
