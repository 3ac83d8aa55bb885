"""Rotary position embedding as diffusers' transformers apply it: interleaved pairs, after the norms."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_rotary", "rotary_embedding"]


def rotary_embedding(height: int, width: int, dim: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of a two-dimensional rotary position embedding.

    Args:
        height: grid rows, in tokens.
        width: grid columns, in tokens.
        dim: channels of one head; the first half encodes the row, the second the column.
        device: where to make them.

    Returns:
        (cos, sin), each (height * width, dim) float32, pairs of equal angles interleaved.
    """
    shares = torch.linspace(0, 1, dim // 4, dtype=torch.float32, device=device)
    frequencies = 0.01**shares  # radians per token, from 1 to 1/100
    rows = torch.arange(height, device=device)[:, None, None] * frequencies  # (h, 1, dim / 4)
    columns = torch.arange(width, device=device)[None, :, None] * frequencies  # (1, w, dim / 4)
    shape = (height, width, dim // 4)
    angles = torch.cat([rows.expand(shape), columns.expand(shape)], dim=-1)
    angles = angles.flatten(0, 1).repeat_interleave(2, dim=-1)  # (N, dim)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate channel pairs of x (B, N, H, d) by the angles of `rotary`, two (N, d) tensors, in float32."""
    cos, sin = (part[:, None, :] for part in rotary)  # (N, 1, d)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x.float() * cos + rotated * sin).to(x.dtype)
