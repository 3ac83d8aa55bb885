"""Vision transformers trained without labels: DINOv2, with and without registers, and DINOv3."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trace_fast.backbones.encoder import EncoderBackbone

__all__ = ["DINOv2Backbone", "DINOv3Backbone"]


class DINOv2Backbone(EncoderBackbone):
    """`Dinov2Model` and `Dinov2WithRegistersModel`: the model itself interpolates its positions to other sizes."""


class DINOv3Backbone(EncoderBackbone):
    """`DINOv3ViTModel`: positions are rotary, of the patches alone, and go with any size."""

    def product(self, module: nn.Module, query: Tensor, key: Tensor, position: Any) -> tuple[Tensor, Tensor]:
        """Query and key of the product, (B, H, T, d), turned by the model's own function."""
        from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

        return apply_rotary_pos_emb(*super().product(module, query, key, position), *position)
