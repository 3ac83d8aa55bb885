"""Vision transformers: DINOv2, with and without registers, and DINOv3 of transformers; EVA02 of timm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from trace_fast.backbones.base import Settings
from trace_fast.backbones.capture import AttentionLayout
from trace_fast.backbones.encoder import CLIP, EncoderBackbone, pair

__all__ = ["DINOv2Backbone", "DINOv3Backbone", "EvaBackbone"]


class DINOv2Backbone(EncoderBackbone):
    """`Dinov2Model` and `Dinov2WithRegistersModel`: the model itself interpolates its positions to other sizes."""


class DINOv3Backbone(EncoderBackbone):
    """`DINOv3ViTModel`: positions are rotary, of the patches alone, and go with any size."""

    def attention_inputs(self, module: Any, query: Tensor, key: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        """Return query and key (B, H, T, d), their positions applied by the model's own function."""
        from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

        return apply_rotary_pos_emb(*super().attention_inputs(module, query, key, rotary), *rotary)


class EvaBackbone(EncoderBackbone):
    """`timm.models.eva.Eva`: EVA02, and what else is of that class.

    Query and key are read from their norms, which are there, as identities, also where a model has none: fused
    projections are not called as layers. Without `dynamic_img_size` the model takes one size. Means and deviations are
    those of its `pretrained_cfg`.
    """

    LAYOUTS: ClassVar = (
        AttentionLayout(
            "q_norm",
            "k_norm",
            others=frozenset(("qkv", "q_proj", "k_proj", "v_proj", "attn_drop", "norm", "gate", "proj", "proj_drop")),
            rotary="rope",
        ),
    )
    COLORS: ClassVar = CLIP

    def __init__(
        self,
        network: Any,
        settings: Settings,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        config = getattr(network, "pretrained_cfg", {})
        mean, std = (config.get(name) if x is None else x for name, x in (("mean", mean), ("std", std)))
        super().__init__(network, settings, mean, std)

    @classmethod
    def native_size(cls, network: Any) -> tuple[int, int]:
        """Return the height and width in pixels that the model was made for."""
        return pair(network.patch_embed.img_size)

    def attentions(self) -> list[nn.Module]:
        """Return the attention of every block."""
        return [block.attn for block in self.network.blocks]

    def token(self) -> tuple[int, int]:
        """Return the height and width of a patch in pixels."""
        return pair(self.network.patch_embed.patch_size)

    def grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the grid of patches, which is the same in every block."""
        native = self.native_size(self.network)
        if size != native and not self.network.dynamic_img_size:
            raise ValueError(
                f"EvaBackbone: size must be {native}, got {size}; timm.create_model(..., dynamic_img_size=True) takes "
                "others"
            )
        return super().grids(size)

    def call(self, pixels: Tensor) -> Tensor:
        """Return features of the image, or logits where the model has a head."""
        return self.network(pixels)

    def attention_inputs(self, module: Any, query: Tensor, key: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        """Return query and key of the patches, (B, H, N, d), their positions applied by the model's own function."""
        first = module.num_prefix_tokens  # class and register tokens have no position
        query, key = query[:, :, first:], key[:, :, first:]
        if rotary is not None:
            from timm.layers.pos_embed_sincos import apply_rot_embed_cat

            query, key = (apply_rot_embed_cat(x, rotary, half=module.rotate_half).type_as(x) for x in (query, key))
        return query, key
