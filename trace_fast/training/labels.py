"""Pseudo labels: the student's targets, computed from the divergences of the teacher (TRACE, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trace_fast.io.images import resize
from trace_fast.training.scenes import IGNORED

__all__ = ["LABELS", "gradient_ridges", "label_scene", "make_labels", "pseudo_labels"]

LABELS = ("ternary", "binary", "soft", "sharpened", "binarized", "combined")
# a sharpened probability of MIDDLE becomes 0.5 in binarized labels, with a slope of STEEPNESS / 4
MIDDLE, STEEPNESS = 0.42, 12.0
# of pixels near the border of two regions of a scene that are no instances: annotators differ about such borders
STUFF_WEIGHT = 0.25


def pseudo_labels(
    abdiv: Tensor, kind: str = "ternary", interior: float = 0.16, scale: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Return the labels of every token: TRACE's ternary labels, or simpler ones.

    In ternary labels, tokens above the image's mean plus one standard deviation are edge, those below the mean minus
    one are interior, and the others have no label. ABDiv is skewed to the right, so that few tokens or none may be
    below. Therefore at least the share `interior` with the lowest ABDiv is interior; in a normal distribution 0.16 are
    below.

    Args:
        abdiv: (B, h, w) float, in nats.
        kind: "ternary", "binary" (all other tokens are interior, too), or another one of `LABELS`, which gives
            1 - exp(-abdiv / scale).
        interior: smallest share of interior tokens in ternary labels, from 0 to 1.
        scale: s, in nats.

    Returns:
        label: (B, h, w) float32 in [0, 1], 1 is edge.
        valid: (B, h, w) float32, 1 where there is a label, else 0.

    Example:
        >>> label, valid = pseudo_labels(torch.rand(2, 3, 4))
        >>> label.shape
        torch.Size([2, 3, 4])
    """
    abdiv = abdiv.float()
    if kind not in ("ternary", "binary"):
        label = 1 - torch.exp(-abdiv.clamp(min=0) / scale)
        return label, torch.ones_like(label)
    tokens = abdiv.flatten(1)
    mean, deviation = tokens.mean(1)[:, None, None], tokens.std(1, correction=0)[:, None, None]
    edge = (abdiv > mean + deviation).float()
    if kind == "binary":
        return edge, torch.ones_like(edge)
    low = torch.maximum(mean - deviation, torch.quantile(tokens, interior, dim=1)[:, None, None])
    inside = (abdiv <= low).float() * (1 - edge)
    return edge, edge + inside


def make_labels(
    abdiv: Tensor,
    size: Sequence[int],
    images: Tensor,
    kind: str,
    interior: float,
    scale: float,
    student: Tensor | None = None,
    student_weight: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Return pseudo labels at the size of a decoder's output; thresholds are computed on the tokens.

    Args:
        abdiv: (B, h, w) float, in nats.
        size: (height, width) of the labels.
        images: (B, 3, H, W) float32 in [0, 1], whose gradient ridges sharpen "sharpened" and "binarized" labels.
        kind: one of `LABELS`.
        interior: see `pseudo_labels`.
        scale: see `pseudo_labels`.
        student: (B, 1, h', w') float32 in [0, 1], the edges of a student. "combined" labels are the weighted geometric
            mean of these and of soft labels.
        student_weight: weight of the student's edges, from 0 to 1.

    Returns:
        label: (B, 1, *size) float32 in [0, 1], 1 is edge.
        valid: (B, 1, *size) float32, 1 where there is a label, else 0.

    Example:
        >>> label, valid = make_labels(torch.rand(2, 3, 4), (6, 8), torch.rand(2, 3, 24, 32), "sharpened", 0.16, 0.1)
        >>> label.shape
        torch.Size([2, 1, 6, 8])
    """
    label, valid = pseudo_labels(abdiv, kind, interior, scale)
    size = (size[0], size[1])

    def enlarge(maps: Tensor) -> Tensor:
        return functional.interpolate(maps, size, mode="bilinear", align_corners=False)

    if kind not in ("ternary", "binary"):
        label = enlarge(label[:, None])
        if kind == "combined":
            assert student is not None
            label = resize(student, size).clamp(0, 1) ** student_weight * label ** (1 - student_weight)
        elif kind != "soft":
            label = label * gradient_ridges(resize(images, size)).sqrt()
        if kind == "binarized":
            label = torch.sigmoid(STEEPNESS * (label - MIDDLE))
        return label, torch.ones_like(label)
    if size == tuple(abdiv.shape[1:]):
        return label[:, None], valid[:, None]
    shares = enlarge(torch.stack([label * valid, (1 - label) * valid], 1))
    edge, inside = shares[:, :1] > 0.5, shares[:, 1:] > 0.5
    return edge.float(), (edge | inside).float()


def label_scene(instances: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return exact labels of a drawn scene: pixels where one instance ends and another, or none, begins.

    A pixel is edge if the pixel to its right or below belongs to another instance. Its neighbors that are not edge have
    no label. The borders of what is no instance, such as ground and sky, count little.

    Args:
        instances: (H, W) integers, 0 for none, k for an instance, `scenes.IGNORED` near the border of two
            regions that are no instances.
        size: (height, width) of the labels.

    Returns:
        label: (1, 1, *size) float32, 0 or 1.
        weight: (1, 1, *size) float32 in [0, 1].

    Example:
        >>> instances = torch.zeros(4, 6, dtype=torch.int32)
        >>> instances[:, :3] = 1
        >>> label, weight = label_scene(instances, (4, 6))
        >>> label[0, 0, 1].tolist(), weight[0, 0, 1].tolist()
        ([0.0, 0.0, 1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    """
    maps = instances[None, None].float()
    if instances.shape != size:
        maps = functional.interpolate(maps, [max(pair) for pair in zip(instances.shape, size, strict=True)])
    stuff = (maps == IGNORED).float()
    maps = torch.where(stuff > 0, 0, maps)
    edge = torch.zeros_like(maps)
    edge[..., :-1] += maps[..., :-1] != maps[..., 1:]
    edge[..., :-1, :] += maps[..., :-1, :] != maps[..., 1:, :]
    edge = functional.adaptive_max_pool2d(edge.clamp(max=1), size)
    stuff = functional.adaptive_max_pool2d(stuff, size)
    near = functional.max_pool2d(edge, 3, 1, 1) * (1 - edge)
    weight = torch.where(stuff * (1 - edge) > 0, STUFF_WEIGHT, 1 - near)
    return edge, weight


def gradient_ridges(images: Tensor, radius: int = 3) -> Tensor:
    """Return the gradient of images relative to its maximum nearby: about 1 on an outline, however weak it is.

    The gradient's length, of the image smoothed by one pixel, is divided by the average over the neighborhood of its
    local maximum. Attention tells in which tokens of several pixels a boundary is; this tells in which of the pixels.

    Args:
        images: (B, C, H, W) float in [0, 1].
        radius: of the neighborhood, in pixels.

    Returns:
        (B, 1, H, W) of the same dtype, in [0, 1]; 0 where the image is constant.

    Example:
        >>> gradient_ridges(torch.rand(2, 3, 24, 32)).shape
        torch.Size([2, 1, 24, 32])
    """

    def convolve(maps: Tensor, kernel: Tensor) -> Tensor:
        rows, columns = kernel.shape
        padded = functional.pad(maps, (columns // 2, columns // 2, rows // 2, rows // 2), mode="replicate")
        return functional.conv2d(padded, kernel.expand(maps.shape[1], 1, rows, columns), groups=maps.shape[1])

    smooth = images.new_tensor([[1, 4, 6, 4, 1]]) / 16  # sigma = 1
    slope = images.new_tensor([[-1, 0, 1]]) / 2
    softened = convolve(convolve(images, smooth), smooth.T)
    gradient = (convolve(softened, slope) ** 2 + convolve(softened, slope.T) ** 2).sum(1, keepdim=True).sqrt()
    side = 2 * radius + 1
    highest = functional.max_pool2d(gradient, side, 1, radius)
    box = images.new_full((1, side), 1 / side)
    return (gradient / (convolve(convolve(highest, box), box.T) + 1e-3)).clamp(max=1)
