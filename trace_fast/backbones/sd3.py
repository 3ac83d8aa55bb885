"""Stable Diffusion 3 and 3.5: joint attention of image and text; the map is that of image queries over image keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trace_fast.backbones.base import Settings, device_of
from trace_fast.backbones.latent import LatentBackbone
from trace_fast.backbones.schedule import RectifiedFlow

__all__ = ["SD3Backbone"]


class SD3Backbone(LatentBackbone):
    """`SD3Transformer2DModel`: image projections are apart from text's. 3.5-medium has image-only attention besides.

    The softmax over image keys alone is the image part of the joint softmax, every row divided by its sum.
    """

    @classmethod
    def from_pipeline(cls, pipe: Any, null_text: dict[str, Tensor] | None, size: tuple[int, int] | None) -> SD3Backbone:
        """Modules of a StableDiffusion3Pipeline, as they are; without its third encoder the text is zeros, as there."""
        if null_text is None:
            null_text = cls.null_text_of(pipe)
        side = pipe.transformer.config.sample_size * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        return cls(pipe.transformer, pipe.vae, RectifiedFlow(), null_text, Settings(size=size or (side, side)))

    @staticmethod
    def null_text_of(pipe: Any) -> dict[str, Tensor]:
        """The embedding of the empty prompt by the pipeline's text encoders."""
        device = device_of(pipe.transformer)
        embeds, _, pooled, _ = pipe.encode_prompt("", "", "", device=device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def attentions(self) -> list[nn.Module]:
        """Joint attention of every block, followed by image-only attention where the block has it."""
        blocks = self.network.transformer_blocks
        return [
            module for block in blocks for module in (block.attn, getattr(block, "attn2", None)) if module is not None
        ]

    def grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Patches of the latent."""
        patch = self.network.config.patch_size
        height, width = self.latent_size(size, patch)
        limit = self.network.config.pos_embed_max_size * patch
        if max(height, width) > limit:
            raise ValueError(f"{type(self).__name__}: size must be at most {limit * self.factor} pixels, got {size}")
        return [(height // patch, width // patch)] * len(self.attentions())

    def call(self, sample: Tensor, timestep: Tensor, null_text: dict[str, Tensor]) -> Tensor:
        """The predicted velocity."""
        return self.network(
            hidden_states=sample,
            encoder_hidden_states=null_text["encoder_hidden_states"],
            pooled_projections=null_text["pooled_projections"],
            timestep=timestep,
            return_dict=False,
        )[0]
