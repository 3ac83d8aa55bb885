"""How object-wise an attention map is, measured on drawn scenes, whose instances are known."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from trace_fast.tracer import Tracer
from trace_fast.training.scenes import IGNORED, SceneFile, read_scene

__all__ = ["attention_inside", "label_tokens", "measure_inside"]


def label_tokens(instances: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the instance of every token that lies in one instance.

    Args:
        instances: (H, W) integers: 0 for none, k for an instance, `scenes.IGNORED` to ignore.
        grid: (h, w) in tokens; H and W must be multiples of h and w.

    Returns:
        (h * w,) int64: k where all pixels of the token belong to instance k, else 0.

    Example:
        >>> instances = torch.tensor([[1, 1, 1, 2, 2, 2], [1, 1, 1, 2, 2, 2]])
        >>> label_tokens(instances, (1, 3)).tolist()
        [1, 0, 2]
    """
    kernel = (instances.shape[0] // grid[0], instances.shape[1] // grid[1])
    maps = instances[None, None].double()
    highest, lowest = functional.max_pool2d(maps, kernel), -functional.max_pool2d(-maps, kernel)
    whole = (highest == lowest) & (highest != IGNORED)
    return torch.where(whole, highest, 0).flatten().long()


def attention_inside(attention: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the share of attention that stays inside the instance of a token, averaged over tokens of instances.

    Args:
        attention: (N, N) float, rows sum to 1.
        labels: (N,) integers, the instance of each token, 0 for none; see `label_tokens`.

    Returns:
        inside: from 0 to 1.
        chance: what it would be if every token attended to all tokens alike.

    Raises:
        ValueError: no token belongs to an instance.

    Example:
        >>> attention_inside(torch.full((4, 4), 0.25), torch.tensor([1, 1, 2, 0]))
        (0.4166666666666667, 0.4166666666666667)
    """
    rows = labels > 0
    if not rows.any():
        raise ValueError("attention_inside: labels must have at least one token of an instance, got none")
    same = (labels[rows, None] == labels[None]).double()
    inside = (attention[rows].double() * same).sum(1).mean()
    return float(inside), float(same.mean(1).mean())


def measure_inside(tracer: Tracer, scenes: Iterable[SceneFile]) -> tuple[float, float]:
    """Return `attention_inside` of a model's mean attention map at timestep 0, averaged over scenes.

    Args:
        tracer: the model.
        scenes: those without an instance that fills a token are left out.

    Returns:
        inside, chance: see `attention_inside`.

    Raises:
        ValueError: no scene has such an instance.
    """
    height, width = grid = tracer.backbone.finest_grid()
    results = []
    for scene in scenes:
        pixels, instances = read_scene(scene)
        # 8 x 8 pixels a token, whatever the scene's size
        enlarged = functional.interpolate(instances[None, None].float(), (8 * height, 8 * width))[0, 0].int()
        labels = label_tokens(enlarged, grid)
        if labels.any():
            results.append(attention_inside(tracer.attention(pixels[None].float() / 255)[0], labels))
    if not results:
        raise ValueError("measure_inside: scenes must have an instance that fills a token, got none")
    inside, chance = torch.tensor(results, dtype=torch.float64).mean(0).tolist()
    return inside, chance
