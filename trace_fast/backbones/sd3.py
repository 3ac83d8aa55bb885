"""Stable Diffusion 3 and 3.5: joint attention of image and text; the map is that of image queries over image keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trace_fast.backbones.base import get_device
from trace_fast.backbones.latent import LatentBackbone, check_text_encoders

__all__ = ["SD3Backbone"]


class SD3Backbone(LatentBackbone):
    """`SD3Transformer2DModel`: image projections are apart from text's. 3.5-medium has image-only attention besides.

    The softmax over image keys alone is the image part of the joint softmax, every row divided by its sum.
    """

    @staticmethod
    def encode_empty_prompt(pipe: Any) -> dict[str, Tensor]:
        """Return the embedding of the empty prompt by the pipeline's text encoders."""
        check_text_encoders(pipe, "text_encoder", "text_encoder_2")  # the third may be left out
        device = get_device(pipe.transformer)
        embeds, _, pooled, _ = pipe.encode_prompt("", "", "", device=device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def prompt_names(self) -> tuple[str, ...]:
        """Return the names of what the network receives for a prompt."""
        return "encoder_hidden_states", "pooled_projections"

    def attentions(self) -> list[nn.Module]:
        """Return the joint attention of every block, followed by image-only attention where the block has it."""
        blocks = self.network.transformer_blocks
        return [
            module for block in blocks for module in (block.attn, getattr(block, "attn2", None)) if module is not None
        ]

    def image_tokens(self, count: int) -> slice:
        """Return where the image's tokens stand: before the text."""
        return slice(0, count)

    def grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the grid of tokens, along each side of which there are only as many as there are positions."""
        grids = super().grids(size)
        limit = self.network.config.pos_embed_max_size
        if max(grids[0]) > limit:
            most = limit * self.patch() * self.pixels_per_latent(self.vae)
            raise ValueError(f"{type(self).__name__}: size must be at most {most} pixels, got {size}")
        return grids

    def call(self, sample: Tensor, timestep: Tensor, empty_prompt: dict[str, Tensor]) -> Tensor:
        """Return the predicted velocity."""
        return self.network(
            hidden_states=sample,
            encoder_hidden_states=empty_prompt["encoder_hidden_states"],
            pooled_projections=empty_prompt["pooled_projections"],
            timestep=timestep,
            return_dict=False,
        )[0]
