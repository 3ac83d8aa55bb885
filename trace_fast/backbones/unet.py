"""Stable Diffusion 1.5 and SDXL: a UNet whose self-attention has several grids."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from trace_fast.backbones.base import constant, device_of
from trace_fast.backbones.latent import LatentBackbone, factor
from trace_fast.backbones.schedule import VariancePreserving

__all__ = ["UNetBackbone"]

ATTENTION = re.compile(r"(down_blocks\.(\d+)|mid_block|up_blocks\.(\d+))\..*transformer_blocks\.\d+\.attn1")


class UNetBackbone(LatentBackbone):
    """`UNet2DConditionModel`: the first attention of every transformer block is self-attention.

    Down and up blocks attend at the latent's resolution halved once a level, rounded up.
    """

    @staticmethod
    def schedule_of(pipe: Any) -> VariancePreserving:
        """The scheduler's own levels."""
        return VariancePreserving.from_config(pipe.scheduler.config)

    @staticmethod
    def null_text_of(pipe: Any) -> dict[str, Tensor]:
        """SD: the embedding of "". SDXL: zeros where its pipeline says so, as for an empty negative prompt."""
        config = pipe.unet.config
        if config.addition_embed_type != "text_time":
            embeds, _ = pipe.encode_prompt("", device_of(pipe.unet), 1, False)
            return {"encoder_hidden_states": embeds}
        if pipe.config.get("force_zeros_for_empty_prompt", True):
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            tokens = 77  # of CLIP
            return {
                "encoder_hidden_states": torch.zeros(1, tokens, config.cross_attention_dim),
                "text_embeds": torch.zeros(1, pooled),
            }
        embeds, _, pooled, _ = pipe.encode_prompt("", device=device_of(pipe.unet), do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def attentions(self) -> list[nn.Module]:
        """Down, middle and up, in the order in which they run."""
        return [module for module, _ in self._located()]

    def grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """The latent's grid, halved once for every level down."""
        grids = [self.latent_size(size)]
        for _ in self.network.config.block_out_channels[1:]:
            grids.append((-(-grids[-1][0] // 2), -(-grids[-1][1] // 2)))
        return [grids[level] for _, level in self._located()]

    def _located(self) -> list[tuple[nn.Module, int]]:
        """Self-attention modules with their level, 0 for the finest."""
        deepest = len(self.network.config.block_out_channels) - 1
        found = []
        for order, (name, module) in enumerate(self.network.named_modules()):
            if match := ATTENTION.fullmatch(name):
                _, down, up = match.groups()
                # down blocks, then the middle, then up blocks, whatever the order of attributes
                stage = int(down) if down else deepest + 1 + int(up) if up else deepest + 0.5
                level = int(down) if down else deepest - int(up) if up else deepest
                found.append((stage, order, module, level))
        return [(module, level) for _, _, module, level in sorted(found, key=lambda entry: entry[:2])]

    def call(self, sample: Tensor, timestep: Tensor, null_text: dict[str, Tensor]) -> Tensor:
        """The predicted noise or velocity."""
        added = None
        if "text_embeds" in null_text:
            height, width = (side * factor(self.vae) for side in sample.shape[-2:])
            # size of the original, offset of the crop, size of the target
            sizes = constant((height, width, 0, 0, height, width), sample.device).to(sample.dtype)
            added = {"text_embeds": null_text["text_embeds"], "time_ids": sizes.expand(len(sample), -1)}
        return self.network(
            sample,
            timestep,
            encoder_hidden_states=null_text["encoder_hidden_states"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
