"""Decoders, which turn the self-attention of a one-step student into edges without ever storing an attention map.

A decoder whose first layer is linear in the (N, N) map needs only the output of that layer. The mean over heads and
blocks is linear, and so is resizing the map of a block to the finest grid. The paper's decoder, a 3 x 3 convolution
over the map as an N-channel image, therefore needs nine numbers per token: attention with nine columns of kernel
weights in place of its values (`trace_fast.ops.readout`), shifted and summed.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from trace_fast import ops, reference
from trace_fast.attention import MeanAttention
from trace_fast.ops import checks

__all__ = [
    "DECODERS",
    "FORMAT",
    "AttentionReadout",
    "BoundaryReadout",
    "ConvDecoder",
    "Decoder",
    "PixelDecoder",
    "UNetDecoder",
    "dct_basis",
    "fold_kernel_columns",
    "make_decoder",
    "resample_values",
    "spread_values",
    "upgrade_student",
]

FORMAT = 3  # of a student's folder, in its config.json; see upgrade_student

Grid = tuple[int, int]


def spread_values(values: Tensor, size: Grid, target: Grid) -> Tensor:
    """Return values over the keys of a block, equivalent to values over the keys of a finer grid.

    Resizing a map SA to the finer grid gives SA' = U SA diag(1/c) U^T (`ops.resize_attention`), so that SA' V equals
    U SA V' with V' = diag(1/c) U^T V. This is the adjoint of the resizing of keys, not an interpolation.

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
    sums_down, sums_across = reference.attention.bilinear_sums(size, target, values)
    spread = torch.einsum("Hh,HWc,Ww->hwc", down, values.unflatten(0, target), across)
    return (spread / (sums_down[:, None] * sums_across)[..., None]).flatten(0, 1)


def bilinear(size: int, target: int, like: Tensor) -> Tensor:
    """Return the matrix (target, size) that interpolates `size` samples linearly at `target` positions."""
    basis = torch.eye(size, dtype=like.dtype, device=like.device)[None]
    return functional.interpolate(basis, target, mode="linear", align_corners=False)[0].T


def fold_kernel_columns(columns: Tensor, grid: Grid) -> Tensor:
    """Return the 3 x 3 convolution with zero padding over a map, from the products of the map and the kernel's columns.

    Args:
        columns: (B, N, 9) float; column 3 r + c is the map times the kernel's weights at row r, column c.
        grid: (h, w) in tokens, N = h * w.

    Returns:
        (B, 1, h, w) of the same dtype. Differentiable.

    Example:
        >>> fold_kernel_columns(torch.rand(2, 6, 9), (2, 3)).shape
        torch.Size([2, 1, 2, 3])
    """
    # row r of the kernel contributes to the output 1 - r rows below; fold adds it r - 1 rows below
    return functional.fold(columns.flip(-1).mT, grid, kernel_size=3, padding=1)


class AttentionReadout:
    """Products of the mean self-attention map of a forward pass and a matrix, accumulated block by block.

    Computes the mean over heads and blocks of U SA_k diag(1/c) U^T V with O(N) memory. Differentiable. Pass
    `on_attention` to the backbone's capture, run the network, and call `result`. A block that is captured again, as
    under gradient checkpointing, is computed again and counts once.

    Args:
        values: (N, C) float, over the keys of the finest grid.
        grids: (h, w) in tokens of every block that is captured, in order.

    Example:
        >>> readout = AttentionReadout(torch.rand(6, 9), [(2, 3)])
        >>> readout.on_attention(0, torch.rand(1, 4, 6, 8), torch.rand(1, 4, 6, 8))
        >>> readout.result().shape
        torch.Size([1, 6, 9])
    """

    def __init__(self, values: Tensor, grids: Sequence[Grid]):
        self.grids = list(grids)
        self.finest = max(self.grids, key=math.prod)
        self.values = {grid: spread_values(values, grid, self.finest) for grid in set(self.grids)}
        self.products: dict[int, Tensor] = {}

    def on_attention(self, index: int, query: Tensor, key: Tensor, *_: Tensor | None) -> None:
        """Multiply the attention of a block with the values.

        Args:
            index: of the block in `grids`.
            query: (B, H, N, d) float.
            key: (B, H, N, d) of the same dtype.
            _: what else a capture knows of the rows; one pass over the keys does without it.
        """
        product = ops.readout(query, key, self.values[self.grids[index]])
        self.products.setdefault(index, product)

    def result(self) -> Tensor:
        """Return the mean over all blocks, (B, N, C) float32 over the finest grid.

        Raises:
            KeyError: a block was not captured.
        """
        sums: dict[Grid, Tensor] = {}
        for index, grid in enumerate(self.grids):
            sums[grid] = self.products[index] + sums[grid] if grid in sums else self.products[index]
        resized = [
            functional.interpolate(part.mT.unflatten(2, grid), self.finest, mode="bilinear", align_corners=False)
            for grid, part in sums.items()
        ]
        return torch.stack(resized).sum(0).flatten(2).mT / len(self.grids)


class BoundaryReadout:
    """The edge probability of the mean self-attention map of a forward pass, 1 - exp(-ABDiv / scale).

    Used as `AttentionReadout` is. It has no gradient, and takes the memory of one map.

    Args:
        grids: (h, w) in tokens of every block that is captured, in order.
        edge_scale: s of the edge probability, in nats.

    Example:
        >>> readout = BoundaryReadout([(2, 3)], edge_scale=0.1)
        >>> readout.on_attention(0, torch.rand(1, 4, 6, 8), torch.rand(1, 4, 6, 8))
        >>> readout.result().shape
        torch.Size([1, 6, 1])
    """

    def __init__(self, grids: Sequence[Grid], edge_scale: float):
        self.grids, self.edge_scale = list(grids), edge_scale
        self.mean: MeanAttention | None = None

    def on_attention(self, index: int, query: Tensor, key: Tensor, *statistics: Tensor | None) -> None:
        """Add the map of a block; the arguments are those of `MeanAttention.on_attention`."""
        self._open(query).on_attention(index, query.detach(), key.detach(), *statistics)

    def attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, first: int) -> Tensor:
        """Attend in the place of a block, and add its map on the way; see `ops.attend`."""
        return self._open(query).attend(index, query, key, value, first)

    def _open(self, query: Tensor) -> MeanAttention:
        """Return the sum of the maps, which begins with the first block."""
        if self.mean is None:
            tokens = max(map(math.prod, self.grids))
            checks.memory("student", "images", query, 4 * len(query) * tokens**2)
            total = torch.empty(len(query), tokens, tokens, dtype=torch.float32, device=query.device)
            self.mean = MeanAttention(total, self.grids)
            self.mean.clear()
        return self.mean

    def result(self) -> Tensor:
        """Return the edge probability (B, N, 1) float32 over the finest grid.

        Raises:
            KeyError: no block was captured.
        """
        if self.mean is None:
            raise KeyError(0)
        abdiv = ops.abdiv(self.mean.finish(), *self.mean.finest)
        return (1 - torch.exp(-abdiv.clamp(min=0) / self.edge_scale)).flatten(1)[..., None]


class Decoder(nn.Module):
    """The interface of a decoder, as `Detector` and `distill` use it.

    Attributes:
        name: its key in `DECODERS`.
        grid: (h, w) of the map in tokens. It is fixed, since there are values for every key.
        values: (N, C) float, multiplied with the map.
    """

    name: str
    grid: Grid
    values: nn.Parameter

    def options(self) -> dict[str, Any]:
        """Return the arguments of `make_decoder` without the grid."""
        raise NotImplementedError

    def photo_size(self, photo: Grid, size: Grid) -> Grid | None:
        """Return the (height, width) in pixels at which the decoder sees a photo, or None if it does not see it.

        Args:
            photo: (height, width) of the photo in pixels.
            size: (height, width) in pixels that the network works at.
        """
        raise NotImplementedError

    def open_readout(self, grids: Sequence[Grid], edge_scale: float) -> AttentionReadout | BoundaryReadout:
        """Return what reads the attention of one forward pass for this decoder.

        Args:
            grids: (h, w) in tokens of every block that is captured, in order.
            edge_scale: s of the edge probability 1 - exp(-ABDiv / s), in nats.
        """
        return AttentionReadout(self.values, grids)

    def standardized(self) -> list[nn.Conv2d]:
        """Return the convolutions whose kernels are standardized in training: see `trace_fast.training`."""
        return []

    def forward(self, readout: Tensor | None, photo: Tensor | None, windows: Tensor | None = None) -> Tensor:
        """Return edge logits (B, 1, h', w'): at the size of the photo if the decoder sees it, else on the grid.

        Args:
            readout: (B, N, C) float, the mean attention map times `values`; see `AttentionReadout`. None leaves
                attention out.
            photo: (B, 3, H, W) float in [0, 1], or None; see `photo_size`.
            windows: (B, 4) float, top, left, bottom and right of what `photo` shows, as shares of the whole photo;
                None where it is whole.
        """
        raise NotImplementedError


class ConvDecoder(Decoder):
    """The paper's decoder: one 3 x 3 convolution over the map as an image of N channels, 9 N + 1 parameters.

    Args:
        grid: (h, w) of the map in tokens. It is fixed, since there are weights for every key.
    """

    name = "conv"

    def __init__(self, grid: Grid):
        super().__init__()
        self.grid = grid
        self.values = nn.Parameter(torch.randn(math.prod(grid), 9) * 0.1)  # row: key, column: 3 r + c of the kernel
        self.bias = nn.Parameter(torch.zeros(1))

    def options(self) -> dict[str, Any]:
        """Return the arguments of `make_decoder` without the grid."""
        return {"name": self.name}

    def photo_size(self, photo: Grid, size: Grid) -> None:
        """Return None: the photo is not seen."""

    def forward(self, readout: Tensor | None, photo: Tensor | None, windows: Tensor | None = None) -> Tensor:
        """Return edge logits (B, 1, h, w) from (B, N, 9)."""
        assert readout is not None  # attention is all that there is
        return fold_kernel_columns(readout, self.grid) + self.bias


class PixelDecoder(Decoder):
    """A small convolutional network over features of the tokens and the image's own pixels.

    Attention tells which contrasts are boundaries, and pixels tell where these are. Both are fused at the processing
    size; the result is then refined with the pixels of an image that is `detail` times as high and wide.

    Args:
        grid: (h, w) of the map in tokens. It is fixed, since there are values for every key.
        columns: features per token that are read from the map, at most 64 and fewer than tokens.
        channels: of the convolutions; half as many at full detail.
        detail: height and width of the image that the decoder sees, and of the logits, as a multiple of the processing
            size.
    """

    name = "pixels"

    def __init__(self, grid: Grid, columns: int = 16, channels: int = 16, detail: int = 2):
        super().__init__()
        check_columns(self.name, grid, columns, channels=channels, detail=detail)
        self.grid, self.columns, self.channels, self.detail = grid, columns, channels, detail
        self.values = nn.Parameter(dct_basis(grid, columns))
        few = max(1, channels // 2)
        self.tokens = nn.Sequential(
            ReplicatePadConv(columns, 2 * channels), nn.GELU(), ReplicatePadConv(2 * channels, channels)
        )
        self.fine = ReplicatePadConv(3, few, 5)
        self.coarse = ReplicatePadConv(few, channels, 2 * detail + 1, stride=detail)
        self.fuse = nn.Sequential(
            nn.GELU(),
            ReplicatePadConv(2 * channels, channels),
            nn.GELU(),
            ReplicatePadConv(channels, channels),
            nn.GELU(),
        )
        self.refine = nn.Sequential(ReplicatePadConv(channels + few, few), nn.GELU(), ReplicatePadConv(few, 1))

    def options(self) -> dict[str, Any]:
        """Return the arguments of `make_decoder` without the grid."""
        return {"name": self.name, "columns": self.columns, "channels": self.channels, "detail": self.detail}

    def photo_size(self, photo: Grid, size: Grid) -> Grid:
        """Return `detail` times the size that the network works at, whatever the photo's own shape is."""
        return size[0] * self.detail, size[1] * self.detail

    def forward(self, readout: Tensor | None, photo: Tensor | None, windows: Tensor | None = None) -> Tensor:
        """Return edge logits (B, 1, detail * H, detail * W) from (B, N, columns) and (B, 3, detail * H, detail * W)."""
        assert photo is not None
        fine = self.fine(photo * 2 - 1)
        coarse = self.coarse(functional.gelu(fine))
        if readout is None:
            tokens = torch.zeros_like(coarse)
        else:
            tokens = cut_windows(self.tokens(readout.mT.unflatten(2, self.grid)), coarse, windows)
        fused = resize_like(self.fuse(torch.cat([tokens, coarse], 1)), fine)
        return self.refine(torch.cat([fused, fine], 1))


class UNetDecoder(Decoder):
    """A U-shaped network over the photo at its own aspect ratio, which attention joins.

    It sees far: every output depends on several hundred pixels of the photo. Padding is with zeros, in training as in
    use, so that the network knows where the image ends.

    Attention joins in one of two ways: as features of the tokens, inside the network, or as the edge probability of the
    map (`BoundaryReadout`) at its output, p' = p^(1 - w) q^w: what the photo and the attention both show.

    Args:
        grid: (h, w) of the map in tokens. It is fixed, since there are values for every key.
        columns: features per token that are read from the map, at most 64 and fewer than tokens; 0 where `abdiv` is
            given.
        channels: of the convolutions at half resolution; coarser levels have more.
        detail: the photo's longer side, as the decoder sees it, as a multiple of that of the processing size.
        abdiv: w, the weight of the edge probability of the map, from 0 to 1; 0 reads features of tokens.
    """

    name = "unet"
    MULTIPLE: ClassVar = 16  # sides of the photo, as the decoder sees it, are multiples of it
    WIDTHS: ClassVar = (1, 1.5, 3, 5, 5)  # channels of the levels at strides 2 to 32, as multiples of `channels`
    JOIN: ClassVar = 2  # the level that attention joins, of stride 8

    def __init__(
        self, grid: Grid, columns: int | None = None, channels: int = 24, detail: float = 2, abdiv: float = 0.0
    ):
        super().__init__()
        checks.number(f"decoder {self.name}", "abdiv", abdiv, 0, 1)
        checks.number(f"decoder {self.name}", "detail", detail, 1)
        columns = (0 if abdiv else 16) if columns is None else columns
        check_columns(self.name, grid, columns, 0 if abdiv else 1, channels=channels)
        if abdiv and columns:
            raise ValueError(f"decoder {self.name}: columns must be 0 where abdiv is given, got {columns}")
        self.grid, self.columns, self.channels, self.detail, self.abdiv = grid, columns, channels, detail, abdiv
        self.values = nn.Parameter(dct_basis(grid, columns))
        widths = [round(channels * width) for width in self.WIDTHS]
        inputs = [3, *widths[:-1]]
        self.down = nn.ModuleList(
            nn.Sequential(conv(few, many, stride=2), nn.ReLU(), conv(many, many), nn.ReLU())
            for few, many in zip(inputs, widths, strict=True)
        )
        if columns:
            self.tokens = nn.Sequential(
                conv(columns, widths[self.JOIN]), nn.ReLU(), conv(widths[self.JOIN], widths[self.JOIN])
            )
            # attention that joins later does not disturb what was learned from photos alone
            for parameter in self.tokens[2].parameters():
                nn.init.zeros_(parameter)
        self.up = nn.ModuleList(
            nn.Sequential(conv(few + many, few), nn.ReLU()) for few, many in itertools.pairwise(widths)
        )
        # four logits of each place at half resolution are the four pixels there
        self.head = conv(widths[0], 4)
        for convolution in self.standardized():  # keeps the variance from layer to layer, for ReLU and centered kernels
            nn.init.normal_(convolution.weight, std=math.sqrt(2 / (1 - 1 / math.pi) / convolution.weight[0].numel()))
        nn.init.constant_(self.head.get_parameter("bias"), -2.5)  # few pixels are edges

    def standardized(self) -> list[nn.Conv2d]:
        """Return the convolutions of both branches of the U."""
        return [module for part in (self.down, self.up) for module in part.modules() if isinstance(module, nn.Conv2d)]

    def options(self) -> dict[str, Any]:
        """Return the arguments of `make_decoder` without the grid."""
        return {
            "name": self.name,
            "columns": self.columns,
            "channels": self.channels,
            "detail": self.detail,
            "abdiv": self.abdiv,
        }

    def open_readout(self, grids: Sequence[Grid], edge_scale: float) -> AttentionReadout | BoundaryReadout:
        """Return what reads the attention of one forward pass; see `Decoder.open_readout`."""
        return BoundaryReadout(grids, edge_scale) if self.abdiv else super().open_readout(grids, edge_scale)

    def photo_size(self, photo: Grid, size: Grid) -> Grid:
        """Return the photo's own shape, its longer side that of `size` times `detail`, in multiples of 16 pixels."""
        scale = self.detail * max(size) / max(photo) / self.MULTIPLE
        return max(1, round(photo[0] * scale)) * self.MULTIPLE, max(1, round(photo[1] * scale)) * self.MULTIPLE

    def forward(self, readout: Tensor | None, photo: Tensor | None, windows: Tensor | None = None) -> Tensor:
        """Return edge logits (B, 1, H, W) from (B, N, columns), or (B, N, 1), and (B, 3, H, W), H and W even."""
        assert photo is not None
        features, levels = photo * 2 - 1, []
        for index, level in enumerate(self.down):
            features = level(features)
            if index == self.JOIN and self.columns and readout is not None:
                features = features + cut_windows(self.tokens(readout.mT.unflatten(2, self.grid)), features, windows)
            levels.append(features)
        for level, merge in zip(levels[-2::-1], self.up[::-1], strict=True):
            features = merge(torch.cat([level, resize_like(features, level)], 1))
        logits = functional.pixel_shuffle(self.head(features), 2)
        if not self.abdiv or readout is None:
            return logits
        boundary = cut_windows(readout.mT.unflatten(2, self.grid), logits, windows).clamp(1e-6, 1 - 1e-6)
        logs = (1 - self.abdiv) * functional.logsigmoid(logits.float()) + self.abdiv * boundary.float().log()
        return logs - torch.log(-torch.expm1(logs))


class ReplicatePadConv(nn.Conv2d):
    """A convolution that keeps the size by repeating border pixels: padding with zeros would add edges there.

    Args:
        channels: of the input.
        outputs: channels of the output.
        kernel: height and width of the kernel, odd.
        stride: of the output in both directions.
    """

    def __init__(self, channels: int, outputs: int, kernel: int = 3, stride: int = 1):
        super().__init__(channels, outputs, kernel, stride)

    def forward(self, features: Tensor) -> Tensor:
        """Convolve (B, C, H, W) to (B, outputs, H / stride, W / stride)."""
        count = self.kernel_size[0] // 2
        # padding_mode="replicate" cannot be compiled with a whole student by torch 2.13
        for axis in (2, 3):
            first, last = features.narrow(axis, 0, 1), features.narrow(axis, features.shape[axis] - 1, 1)
            features = torch.cat([*[first] * count, features, *[last] * count], axis)
        return super().forward(features)


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3 x 3 convolution that keeps the size, or divides it by the stride."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)


def check_columns(name: str, grid: Grid, columns: int, least: int = 1, **others: int) -> None:
    """Check the number of columns of a decoder, and that other options are integers of at least 1."""
    checks.integer(f"decoder {name}", "columns", columns, least)
    for option, value in others.items():
        checks.integer(f"decoder {name}", option, value, 1)
    most = min(64, math.prod(grid) - 1)  # limits of ops.readout and of dct_basis
    if columns > most:
        raise ValueError(f"decoder {name}: columns must be from 1 to {most}, got {columns}")


def resize_like(features: Tensor, like: Tensor) -> Tensor:
    """Interpolate features (B, C, h, w) to the height and width of others."""
    return functional.interpolate(features, like.shape[-2:], mode="bilinear", align_corners=False)


def cut_windows(features: Tensor, like: Tensor, windows: Tensor | None) -> Tensor:
    """Interpolate windows of features at the height and width of others.

    Args:
        features: (B, C, h, w) float.
        like: (B, C', H, W) float, whose height and width the result has.
        windows: (B, 4) float32, top, left, bottom and right, as shares of the features' height and width; None is all.

    Returns:
        (B, C, H, W) of the dtype of `features`. Differentiable.

    Example:
        >>> windows = torch.tensor([[0.0, 0.5, 0.5, 1.0]])
        >>> cut_windows(torch.rand(1, 3, 4, 6), torch.rand(1, 1, 8, 12), windows).shape
        torch.Size([1, 3, 8, 12])
    """
    if windows is None:
        return resize_like(features, like)
    top, left, bottom, right = windows.unbind(1)
    zero = torch.zeros_like(top)
    # from [-1, 1] across the window to [-1, 1] across the features
    across = torch.stack([right - left, zero, left + right - 1], 1)
    down = torch.stack([zero, bottom - top, top + bottom - 1], 1)
    size = [len(features), features.shape[1], *like.shape[-2:]]
    places = functional.affine_grid(torch.stack([across, down], 1), size, align_corners=False).to(features.dtype)
    return functional.grid_sample(features, places, padding_mode="border", align_corners=False)


def dct_basis(grid: Grid, count: int) -> Tensor:
    """Return the first functions of the grid's cosine transform, from low to high frequency, without the constant.

    Args:
        grid: (h, w) in tokens.
        count: number of functions, fewer than tokens.

    Returns:
        (N, count) float32 in [-1, 1], N = h * w.

    Example:
        >>> dct_basis((2, 3), 4).shape
        torch.Size([6, 4])
    """
    rows, columns = ((torch.arange(side, dtype=torch.float32) + 0.5) / side for side in grid)
    frequencies = sorted(itertools.product(*map(range, grid)), key=lambda pair: (sum(pair), pair))[1 : count + 1]
    basis = [torch.cos(math.pi * y * rows)[:, None] * torch.cos(math.pi * x * columns)[None] for y, x in frequencies]
    return torch.stack(basis, -1).flatten(0, 1) if basis else torch.empty(math.prod(grid), 0)


DECODERS: dict[str, type[Decoder]] = {"conv": ConvDecoder, "pixels": PixelDecoder, "unet": UNetDecoder}


def resample_values(values: Tensor, grid: Grid, target: Grid) -> Tensor:
    """Interpolate values over the keys of one grid at the keys of another.

    Args:
        values: (N, C) float, N = tokens of `grid`.
        grid: (height, width) in tokens.
        target: (height, width) in tokens.

    Returns:
        (M, C) of the same dtype, M = tokens of `target`.

    Example:
        >>> resample_values(torch.rand(6, 9), (2, 3), (4, 5)).shape
        torch.Size([20, 9])
    """
    if grid == target:
        return values
    if not values.shape[1]:
        return values.new_empty(math.prod(target), 0)
    image = functional.interpolate(values.mT.unflatten(1, grid)[None], target, mode="bilinear", align_corners=False)
    return image[0].flatten(1).mT.contiguous()


def make_decoder(name: str, grid: Grid, **options: Any) -> Decoder:
    """Create a decoder with random weights.

    Args:
        name: a key of `DECODERS`.
        grid: (h, w) of the map in tokens.
        options: other arguments of the decoder's class.

    Returns:
        The decoder, float32 on the CPU.

    Raises:
        ValueError: the name or an option is unknown, or an option is out of range.
        TypeError: an option is of another type.

    Example:
        >>> make_decoder("pixels", (4, 6), columns=8).options()
        {'name': 'pixels', 'columns': 8, 'channels': 16, 'detail': 2}
    """
    checks.choice("student", "decoder", name, *DECODERS)
    try:
        inspect.signature(DECODERS[name]).bind(grid, **options)
    except TypeError as error:
        raise ValueError(f"decoder {name} does not have these options: {error}") from error
    with torch.device("cpu"):  # whatever torch's default device is
        return DECODERS[name](grid, **options).float()


def upgrade_student(config: dict[str, Any], weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return configuration and decoder weights of a student's folder in the current format.

    In format 1, of folders without a format number, the timestep is called "level". Up to format 2 the decoder `pixels`
    had one activation more, so that its weights fit no longer.

    Args:
        config: content of config.json.
        weights: content of decoder.safetensors.

    Raises:
        ValueError: the format is not known, or the decoder is not that of today.
    """
    config = dict(config)
    version = config.get("format", 1)
    if version == FORMAT:
        return config, weights
    if version not in range(1, FORMAT):
        raise ValueError(f"its format must be 1 to {FORMAT}, got {version!r}; install a newer trace_fast")
    if config.get("decoder", {}).get("name") == "pixels":
        raise ValueError(
            f"its format must be {FORMAT}, got {version}, in which the decoder pixels had one activation more; distill "
            "it again"
        )
    config = {"timestep" if name == "level" else name: value for name, value in config.items()}
    return config | {"format": FORMAT}, weights
