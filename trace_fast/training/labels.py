"""Pseudo labels: what the student learns, made of the divergences that the search gave (TRACE, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trace_fast.io.images import resize

__all__ = ["LABELS", "crests", "draw_labels", "pseudo_labels"]

LABELS = ("ternary", "binary", "soft", "sharp", "crisp")
CRISP = (0.42, 12.0)  # the sharp probability that crisp labels make 0.5, and how steeply they rise there


def pseudo_labels(abdiv: Tensor, kind: str = "ternary", interior: float = 0.16, scale: float = 0.1) -> Tensor:
    """Pseudo edges from the divergence of each image: TRACE's ternary labels, or simpler ones.

    Above the image's mean plus one standard deviation is edge, below the mean minus one is interior, the rest is left
    out. ABDiv leans to the right, so that few cells or none may lie below: at least the lowest share `interior` is
    interior. Of a normal distribution 0.16 lie below.

    Args:
        abdiv: (B, h, w) float, nats.
        kind: "ternary"; "binary", where the rest is interior, too; or "soft", 1 - exp(-abdiv / scale). "sharp" and
            "crisp" are soft here: `draw_labels` draws them to the crests.
        interior: share of the cells, from 0 to 1.
        scale: s, in nats.

    Returns:
        (2, B, h, w) float32: the label in [0, 1], and 1 where it counts, else 0.

    Example:
        >>> label, counts = pseudo_labels(torch.rand(2, 3, 4))
    """
    abdiv = abdiv.float()
    if kind not in ("ternary", "binary"):
        label = 1 - torch.exp(-abdiv.clamp(min=0) / scale)
        return torch.stack([label, torch.ones_like(label)])
    cells = abdiv.flatten(1)
    mean, deviation = cells.mean(1)[:, None, None], cells.std(1, correction=0)[:, None, None]
    edge = (abdiv > mean + deviation).float()
    if kind == "binary":
        return torch.stack([edge, torch.ones_like(edge)])
    low = torch.maximum(mean - deviation, torch.quantile(cells, interior, dim=1)[:, None, None])
    inside = (abdiv <= low).float() * (1 - edge)
    return torch.stack([edge, edge + inside])


def draw_labels(
    abdiv: Tensor, size: Sequence[int], photographs: Tensor, kind: str, interior: float, scale: float
) -> Tensor:
    """Pseudo labels at another size; thresholds are those of the grid.

    Args:
        abdiv: (B, h, w) float, nats.
        size: (height, width).
        photographs: (B, 3, H, W) in [0, 1], to whose crests at that size sharp and crisp labels are drawn.
        kind: one of LABELS.
        interior: see `pseudo_labels`.
        scale: likewise.

    Returns:
        (2, B, 1, *size) float32: the label in [0, 1], and 1 where it counts, else 0.
    """
    label, counts = pseudo_labels(abdiv, kind, interior, scale)
    size = (size[0], size[1])

    def carry(x: Tensor) -> Tensor:
        return functional.interpolate(x, size, mode="bilinear", align_corners=False)

    if kind not in ("ternary", "binary"):
        label = carry(label[:, None])
        if kind != "soft":
            label = label * crests(resize(photographs, size)).sqrt()
        if kind == "crisp":
            middle, steepness = CRISP
            label = torch.sigmoid(steepness * (label - middle))
        return torch.stack([label, torch.ones_like(label)])
    if size == tuple(abdiv.shape[1:]):
        return torch.stack([label, counts])[:, :, None]
    stretched = carry(torch.stack([label * counts, (1 - label) * counts], 1))
    edge, inside = stretched[:, :1] > 0.5, stretched[:, 1:] > 0.5
    return torch.stack([edge.float(), (edge | inside).float()])


def crests(photograph: Tensor, radius: int = 3) -> Tensor:
    """Where the contrast of a picture peaks among its surroundings, whatever its strength: about 1 on an outline.

    The gradient's length over its average maximum, of the picture smoothed by one pixel. Attention tells what is a
    boundary in tokens of several pixels; this tells in which of the pixels it lies.

    Args:
        photograph: (B, C, H, W) float in [0, 1].
        radius: of the surroundings, in pixels.

    Returns:
        (B, 1, H, W) of the same dtype, in [0, 1]; 0 where nothing changes.

    Example:
        >>> crests(torch.rand(2, 3, 24, 32)).shape
        torch.Size([2, 1, 24, 32])
    """

    def average(x: Tensor, kernel: Tensor) -> Tensor:
        rows, columns = kernel.shape
        padded = functional.pad(x, (columns // 2, columns // 2, rows // 2, rows // 2), mode="replicate")
        return functional.conv2d(padded, kernel.expand(x.shape[1], 1, rows, columns), groups=x.shape[1])

    smooth = photograph.new_tensor([[1, 4, 6, 4, 1]]) / 16  # sigma = 1
    slope = photograph.new_tensor([[-1, 0, 1]]) / 2
    softened = average(average(photograph, smooth), smooth.T)
    steepness = (average(softened, slope) ** 2 + average(softened, slope.T) ** 2).sum(1, keepdim=True).sqrt()
    side = 2 * radius + 1
    highest = functional.max_pool2d(steepness, side, 1, radius)
    box = photograph.new_full((1, side), 1 / side)
    return (steepness / (average(average(highest, box), box.T) + 1e-3)).clamp(max=1)
