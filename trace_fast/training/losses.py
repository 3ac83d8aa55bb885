"""Losses of edge logits."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

__all__ = ["LOSSES", "compute_loss", "cross_entropy", "dice"]

LOSSES = ("dice", "cross-entropy")


def dice(prediction: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Return the Dice loss, 1 - (2 sum(p l) + 1) / (sum(p^2) + sum(l^2) + 1), averaged over images.

    With squares, as in V-Net, the best prediction of a soft label is the label itself, not 0 or 1.

    Args:
        prediction: (B, 1, h, w) float, p in [0, 1].
        label: (B, 1, h, w) float, l in [0, 1].
        weight: (B, 1, h, w) float in [0, 1], the factor of each pixel in the sums, 0 where there is no label.

    Returns:
        () float, from 0 (equal) to 1. Differentiable.

    Example:
        >>> dice(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4))
        tensor(0.)
    """
    prediction, label, weight = (maps.flatten(1) for maps in (prediction, label, weight))
    overlap, total = (weight * prediction * label).sum(1), (weight * (prediction**2 + label**2)).sum(1)
    return (1 - (2 * overlap + 1) / (total + 1)).mean()


def cross_entropy(logits: Tensor, label: Tensor, weight: Tensor, edge_weight: float = 1.0) -> Tensor:
    """Return the cross-entropy of edges, averaged over pixels, in which edges count `edge_weight` times.

    Few pixels are edges. Where these count more, a network learns them sooner, and gives too high probabilities: its
    odds p / (1 - p) are `edge_weight` times too high. Therefore the loss is computed from logits raised by
    log(edge_weight), so that sigmoid(logits) itself is the probability of an edge.

    Args:
        logits: (B, 1, h, w) float.
        label: (B, 1, h, w) float in [0, 1].
        weight: (B, 1, h, w) float in [0, 1], the factor of each pixel, 0 where there is no label.
        edge_weight: factor of edges, above 0.

    Returns:
        () float, in nats. Differentiable.

    Example:
        >>> loss = cross_entropy(torch.zeros(2, 1, 3, 4), torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4))
        >>> round(loss.item(), 4)  # log 2
        0.6931
    """
    losses = functional.binary_cross_entropy_with_logits(
        logits + math.log(edge_weight), label, reduction="none", pos_weight=logits.new_tensor(edge_weight)
    )
    return (losses * weight).mean()


def compute_loss(name: str, logits: Tensor, label: Tensor, weight: Tensor, edge_weight: float) -> Tensor:
    """Return the loss of a name in `LOSSES`; the arguments are those of `cross_entropy`."""
    if name == "dice":
        return dice(logits.sigmoid(), label, weight)
    return cross_entropy(logits, label, weight, edge_weight)
