"""Vision towers of vision-language models: CLIP's in LLaVA, and that of Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from trace_fast.backbones.base import Settings, constant, get_device
from trace_fast.backbones.capture import AttendBlock, Capture, OnAttention
from trace_fast.backbones.encoder import CLIP, EncoderBackbone, pair
from trace_fast.ops.constants import cache_constants

__all__ = ["CLIPBackbone", "QwenBackbone", "qwen_patches", "qwen_size"]


class CLIPBackbone(EncoderBackbone):
    """`CLIPVisionModel`, the tower of LLaVA; positions are interpolated to other sizes.

    All blocks are read, also the last, whose output LLaVA does not use.
    """

    COLORS: ClassVar = CLIP

    def call(self, pixels: Tensor) -> Tensor:
        """Return features of every token."""
        return self.network(pixels, interpolate_pos_encoding=True)[0]


class QwenBackbone(EncoderBackbone):
    """`Qwen2_5_VisionTransformerPretrainedModel`, the tower of Qwen2.5-VL, whose sequence is not the image's raster.

    Patches enter in units that are merged afterwards (2 x 2), and units are sorted by attention window; query and key
    are put back. Most blocks attend inside windows alone, so those of `fullatt_block_indexes` are read, and no other.
    The model was made for any size: 64 x 64 patches is the default here, the grid of the diffusion models. Its way of
    cutting windows makes the host wait for the device. It calls attention once for each image of a batch, so that only
    of a single image the call gives the log-sum-exp; of several, the projection is read, and rows are summed up again.
    """

    COLORS: ClassVar = CLIP

    def __init__(
        self,
        network: Any,
        settings: Settings,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__(network, settings, mean, std)
        self._check_blocks(settings.blocks or ())

    @staticmethod
    def default_blocks(network: Any) -> tuple[int, ...]:
        """Return the blocks of full attention; the others attend inside windows alone."""
        return tuple(network.config.fullatt_block_indexes)

    @classmethod
    def native_size(cls, network: Any) -> tuple[int, int]:
        """Return the size of 64 x 64 patches."""
        return qwen_size(network.config, 64)

    def step(self) -> tuple[int, int]:
        """Return the size of a unit of patches that are merged."""
        return qwen_size(self.network.config, self.network.config.spatial_merge_size)

    def call(self, pixels: Tensor) -> Tensor:
        """Return features of every patch, (B * N, C), in the order of the windows."""
        patches, grid = qwen_patches(pixels, self.network.config)
        return self.network(patches, grid_thw=grid)[0]

    def attention_inputs(self, module: Any, query: Tensor, key: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        """Return query and key (B, H, N, d), in the order of the windows, of a projection (B * N, 3 H d)."""
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

        query, key, _ = query.unflatten(-1, (3, module.num_heads, -1)).unbind(1)  # (B * N, H, d)
        query, key = apply_rotary_pos_emb_vision(query, key, *rotary)
        height, width = self.grids(self.settings.size)[0]
        query, key = (x.unflatten(0, (-1, height * width)).transpose(1, 2) for x in (query, key))
        return query, key

    def capture(
        self, on_attention: OnAttention, blocks: Sequence[int] | None = None, attend: AttendBlock | None = None
    ) -> Capture:
        """See `Backbone.capture`; tokens are passed on row by row. `attend` would see another order, and is not called.

        Raises:
            ValueError: a block attends inside windows alone.
        """
        chosen = self.settings.blocks if blocks is None else blocks
        self._check_blocks(range(len(self.attentions())) if chosen is None else chosen)
        config, merge = self.network.config, self.network.config.spatial_merge_size
        window = config.window_size // merge // self.token()[0]
        places = raster_places(*self.grids(self.settings.size)[0], merge, window, get_device(self.network))

        def in_raster(index: int, query: Tensor, key: Tensor, lse: Tensor | None, others: Tensor | None) -> None:
            rows = None if lse is None else lse[:, :, places]
            on_attention(index, query[:, :, places], key[:, :, places], rows, others)

        return super().capture(in_raster, blocks)

    def _check_blocks(self, blocks: Sequence[int]) -> None:
        full = tuple(self.network.config.fullatt_block_indexes)
        if not set(blocks) <= set(full):
            raise ValueError(
                f"trace: blocks must be among {full}, got {tuple(blocks)}: the others attend only inside windows of "
                f"{self.network.config.window_size} pixels"
            )


def qwen_size(config: Any, count: int) -> tuple[int, int]:
    """Return height and width in pixels of `count` patches along both sides."""
    height, width = pair(config.patch_size)
    return count * height, count * width


def qwen_patches(pixels: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Return images (B, 3, H, W) as Qwen2.5-VL takes them: patches (B * N, C), in units that it merges, and grids.

    Grids are (B, 3) int64: frames, rows and columns of patches. `config` is that of the tower.
    """
    (patch_height, patch_width), merge = pair(config.patch_size), config.spatial_merge_size
    height, width = pixels.shape[-2] // patch_height, pixels.shape[-1] // patch_width
    patches = (
        pixels.unflatten(3, (width // merge, merge, patch_width))
        .unflatten(2, (height // merge, merge, patch_height))  # (B, C, h / m, m, p, w / m, m, p)
        .permute(0, 2, 5, 3, 6, 1, 4, 7)
        .unsqueeze(6)
        .expand(*[-1] * 6, pair(config.temporal_patch_size)[0], -1, -1)  # an image is a film that stands still
    )
    grid = constant((1, height, width), pixels.device).expand(len(pixels), -1)
    return patches.flatten(5).flatten(0, 4), grid


@cache_constants(maxsize=16)
def raster_places(height: int, width: int, merge: int, window: int, device: torch.device) -> Tensor:
    """Return where each patch of the raster stands in Qwen2.5-VL's sequence of one image.

    The sequence goes through windows, in each through units, in each through patches, always row by row.

    Args:
        height: rows of patches, a multiple of `merge`.
        width: columns likewise.
        merge: patches along a side of a unit.
        window: units along a side of a window; windows at the right and lower border may be smaller.
        device: where to put them.

    Returns:
        (height * width,) int64.
    """
    row, column = torch.arange(height)[:, None], torch.arange(width)[None]
    unit_row, unit_column = row // merge, column // merge
    order = torch.zeros(height, width, dtype=torch.int64)
    for digit, base in (  # of a number that grows along the sequence
        (unit_row // window, height),
        (unit_column // window, width),
        (unit_row % window, window),
        (unit_column % window, window),
        (row % merge, merge),
        (column % merge, merge),
    ):
        order = order * base + digit
    return order.flatten().argsort().argsort().to(device)
