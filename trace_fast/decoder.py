"""What turns the attention of a one-step student into edges: read-outs of the map that never make the map.

A decoder that begins with a linear reading of the (N, N) map needs only that reading. The mean over heads and blocks is
linear, and so is carrying a block's map to the finest grid: a 3 x 3 convolution over the map as an N-channel picture,
the paper's decoder, is nine columns that attention takes for its values (`trace_fast.ops.readout`), shifted and summed.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trace_fast import ops, reference
from trace_fast.ops import checks

__all__ = ["DECODERS", "ConvDecoder", "Decoder", "PixelDecoder", "Taps", "fold_taps", "make_decoder", "spread_values"]

Grid = tuple[int, int]


def spread_values(values: Tensor, size: Grid, target: Grid) -> Tensor:
    """Values over the keys of the finest grid, as a block of a coarser grid must read them.

    SA' V with SA' = U SA diag(1/c) U^T, the map carried to the finer grid (`ops.resize_attention`), is U SA V' with
    V' = diag(1/c) U^T V: the adjoint of the spreading of keys, not an interpolation.

    Args:
        values: (M, C) float, M = tokens of `target`.
        size: (height, width) of the block's grid, in tokens.
        target: (height, width) of the finest grid, in tokens, at least `size` in both.

    Returns:
        (N, C) of the same dtype, N = tokens of `size`. Differentiable.

    Example:
        >>> spread_values(torch.rand(24, 9), (2, 3), (4, 6)).shape
        torch.Size([6, 9])
    """
    if size == target:
        return values
    down, across = (bilinear(*pair, like=values) for pair in zip(size, target, strict=True))
    sums_down, sums_across = reference.bilinear_sums(size, target, values)
    spread = torch.einsum("Hh,HWc,Ww->hwc", down, values.unflatten(0, target), across)
    return (spread / (sums_down[:, None] * sums_across)[..., None]).flatten(0, 1)


def bilinear(size: int, target: int, like: Tensor) -> Tensor:
    """Linear interpolation of `size` samples at `target` places, as a matrix (target, size)."""
    basis = torch.eye(size, dtype=like.dtype, device=like.device)[None]
    return functional.interpolate(basis, target, mode="linear", align_corners=False)[0].T


def fold_taps(taps: Tensor, grid: Grid) -> Tensor:
    """What a 3 x 3 convolution with zero padding makes of a map whose taps are given.

    Args:
        taps: (B, N, 9) float: column 3 r + c is the map times the kernel's weights at row r, column c.
        grid: (h, w), N = h * w.

    Returns:
        (B, 1, h, w) of the same dtype. Differentiable.

    Example:
        >>> fold_taps(torch.rand(2, 6, 9), (2, 3)).shape
        torch.Size([2, 1, 2, 3])
    """
    # a tap at row r of the kernel belongs to the output 1 - r rows below it; fold puts it r - 1 below
    return functional.fold(taps.flip(-1).mT, grid, kernel_size=3, padding=1)


class Taps:
    """What values read from the mean self-attention map of a pass, heard block by block.

    The mean over heads and blocks of U SA_k diag(1/c) U^T V, with O(N) memory and differentiable. Give `hear` to the
    backbone's capture, run the network, and ask for `total`. A block that is heard again, as under gradient
    checkpointing, is read again and counts once.

    Args:
        values: (N, C) float, over the keys of the finest grid.
        grids: (h, w) of every block that will be heard, in order.
    """

    def __init__(self, values: Tensor, grids: Sequence[Grid]):
        self.grids = list(grids)
        self.finest = max(self.grids, key=math.prod)
        self.values = {grid: spread_values(values, grid, self.finest) for grid in set(self.grids)}
        self.read: dict[int, Tensor] = {}

    def hear(self, index: int, query: Tensor, key: Tensor) -> None:
        """Read one block: query and key are (B, H, N, d)."""
        read = ops.readout(query, key, self.values[self.grids[index]])
        self.read.setdefault(index, read)

    def total(self) -> Tensor:
        """(B, N, C) float32 over the finest grid, when every block has been heard."""
        sums: dict[Grid, Tensor] = {}
        for index, grid in enumerate(self.grids):
            sums[grid] = self.read[index] + sums[grid] if grid in sums else self.read[index]
        carried = [
            functional.interpolate(part.mT.unflatten(2, grid), self.finest, mode="bilinear", align_corners=False)
            for grid, part in sums.items()
        ]
        return torch.stack(carried).sum(0).flatten(2).mT / len(self.grids)


class Decoder(nn.Module):
    """What `Detector` and `distill` need of a decoder.

    Attributes:
        name: in `DECODERS`.
        detail: the photograph's side as it is looked at, as a multiple of the processing size's; 0 where it is not.
        grid: (h, w), the tokens that the map has; fixed, since every key has values of its own.
        values: (N, C) float, what is read from the map.
    """

    name: str
    detail: int
    grid: Grid
    values: nn.Parameter

    def options(self) -> dict[str, Any]:
        """What `make_decoder` needs beside the grid."""
        raise NotImplementedError

    def forward(self, taps: Tensor, photograph: Tensor | None) -> Tensor:
        """Taps (B, N, C) and a photograph (B, 3, H, W) in [0, 1] to logits (B, 1, h', w')."""
        raise NotImplementedError


class ConvDecoder(Decoder):
    """The paper's: one 3 x 3 convolution that reads the map as a picture of N channels, 9 N + 1 parameters.

    Args:
        grid: (h, w), the tokens that the map has; fixed, since every key has weights of its own.
    """

    name = "conv"
    detail = 0  # the photograph itself is not looked at

    def __init__(self, grid: Grid):
        super().__init__()
        self.grid = grid
        self.values = nn.Parameter(torch.randn(math.prod(grid), 9) * 0.1)  # row: key, column: 3 r + c of the kernel
        self.bias = nn.Parameter(torch.zeros(1))

    def options(self) -> dict[str, Any]:
        """What `make_decoder` needs beside the grid."""
        return {"name": self.name}

    def forward(self, taps: Tensor, photograph: Tensor | None) -> Tensor:
        """(B, N, 9) read by `values` to logits (B, 1, h, w)."""
        return fold_taps(taps, self.grid) + self.bias


class PixelDecoder(Decoder):
    """A small network over what the map says of each token and the photograph's own pixels.

    Attention tells which of the contrasts are boundaries, pixels tell where they are. Both meet at the processing size,
    and what is found there is drawn out with the photograph's pixels, of which there are `detail` times as many a side.

    Args:
        grid: (h, w), the tokens that the map has; fixed, since every key has values of its own.
        columns: numbers read from each row of the map, at most 64 and fewer than tokens.
        channels: of its convolutions; half as many at full detail.
        detail: the photograph's side as it is looked at, and that of the logits, as a multiple of the processing
            size's.
    """

    name = "pixels"

    def __init__(self, grid: Grid, columns: int = 16, channels: int = 16, detail: int = 2):
        super().__init__()
        for name, value in {"columns": columns, "channels": channels, "detail": detail}.items():
            checks.integer("decoder pixels", name, value, 1)
        most = min(64, math.prod(grid) - 1)  # of the read-out, and of the waves
        if columns > most:
            raise ValueError(f"decoder pixels: columns must be from 1 to {most}, got {columns}")
        self.grid, self.columns, self.channels, self.detail = grid, columns, channels, detail
        self.values = nn.Parameter(waves(grid, columns))
        few = max(1, channels // 2)
        self.tokens = nn.Sequential(Around(columns, 2 * channels), nn.GELU(), Around(2 * channels, channels))
        self.fine = Around(3, few, 5)
        self.coarse = Around(few, channels, 2 * detail + 1, stride=detail)
        self.join = nn.Sequential(
            nn.GELU(), Around(2 * channels, channels), nn.GELU(), Around(channels, channels), nn.GELU()
        )
        # activates once more what `join` found: so the embedded student was trained
        self.draw = nn.Sequential(nn.GELU(), Around(channels + few, few), nn.GELU(), Around(few, 1))

    def options(self) -> dict[str, Any]:
        """What `make_decoder` needs beside the grid."""
        return {"name": self.name, "columns": self.columns, "channels": self.channels, "detail": self.detail}

    def forward(self, taps: Tensor, photograph: Tensor | None) -> Tensor:
        """(B, N, columns) and (B, 3, detail * H, detail * W) in [0, 1] to logits (B, 1, detail * H, detail * W)."""
        assert photograph is not None  # detail is not 0
        fine = self.fine(photograph * 2 - 1)
        pixels = self.coarse(functional.gelu(fine))
        found = self.join(torch.cat([stretch(self.tokens(taps.mT.unflatten(2, self.grid)), pixels), pixels], 1))
        return self.draw(torch.cat([stretch(found, fine), fine], 1))


class Around(nn.Conv2d):
    """A convolution that keeps the size, the picture going on beyond its border as it ends there: zeros are edges."""

    def __init__(self, channels: int, outputs: int, kernel: int = 3, stride: int = 1):
        super().__init__(channels, outputs, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, outputs, H / stride, W / stride)."""
        count = self.kernel_size[0] // 2
        for axis in (2, 3):  # padding_mode="replicate" cannot be compiled with a whole student by torch 2.13
            first, last = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
            x = torch.cat([*[first] * count, x, *[last] * count], axis)
        return super().forward(x)


def stretch(x: Tensor, like: Tensor) -> Tensor:
    """Interpolate to the size of another."""
    return functional.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def waves(grid: Grid, count: int) -> Tensor:
    """(N, count) smooth functions of the key's place, from long to short: where attention goes, told by a few numbers.

    Cosine transforms of the grid, the first ones but the constant.
    """
    rows, columns = ((torch.arange(side, dtype=torch.float32) + 0.5) / side for side in grid)
    orders = sorted(itertools.product(*map(range, grid)), key=lambda o: (sum(o), o))[1:]  # the grid has no shorter ones
    made = [torch.cos(math.pi * y * rows)[:, None] * torch.cos(math.pi * x * columns)[None] for y, x in orders[:count]]
    return torch.stack(made, -1).flatten(0, 1)


DECODERS: dict[str, type[Decoder]] = {"conv": ConvDecoder, "pixels": PixelDecoder}


def resample_values(values: Tensor, grid: Grid, target: Grid) -> Tensor:
    """Values of the keys of one grid, as those of another: (N, C) to (M, C), interpolated."""
    if grid == target:
        return values
    picture = functional.interpolate(values.mT.unflatten(1, grid)[None], target, mode="bilinear", align_corners=False)
    return picture[0].flatten(1).mT.contiguous()


def make_decoder(name: str, grid: Grid, **options: Any) -> Decoder:
    """A decoder by name; ValueError or TypeError where the name is unknown, or an option is or does not fit."""
    if name not in DECODERS:
        raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {name!r}")
    try:
        inspect.signature(DECODERS[name]).bind(grid, **options)
    except TypeError as error:
        raise ValueError(f"decoder {name} does not know these options: {error}") from error
    with torch.device("cpu"):  # whatever torch's defaults are
        return DECODERS[name](grid, **options).float()
