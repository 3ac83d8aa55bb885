"""Stable Diffusion 1.5 and SDXL: a UNet whose self-attention has several grids."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from trace_fast.backbones.base import constant, get_device
from trace_fast.backbones.capture import unwrap_compiled
from trace_fast.backbones.latent import LatentBackbone, check_text_encoders
from trace_fast.backbones.schedule import VariancePreserving

__all__ = ["UNetBackbone"]

SIZES = 6  # numbers that SDXL receives of an image's size
ATTENTION = re.compile(r"(down_blocks\.(\d+)|mid_block|up_blocks\.(\d+))\..*transformer_blocks\.\d+\.attn1")


class UNetBackbone(LatentBackbone):
    """`UNet2DConditionModel`: the first attention of every transformer block is self-attention.

    Down and up blocks attend at the latent's resolution halved once a level, rounded up.
    """

    @staticmethod
    def make_schedule(pipe: Any) -> VariancePreserving:
        """Return the schedule that the scheduler describes."""
        return VariancePreserving.from_scheduler(pipe.scheduler)

    @staticmethod
    def needs_text_encoders(pipe: Any) -> bool:
        """Return False where SDXL receives zeros, else True."""
        zeros = getattr(pipe, "config", {}).get("force_zeros_for_empty_prompt", True)
        return pipe.unet.config.addition_embed_type != "text_time" or not zeros

    @staticmethod
    def encode_empty_prompt(pipe: Any) -> dict[str, Tensor]:
        """Return the embedding of ""; of SDXL zeros where its pipeline says so, as for an empty negative prompt."""
        config = pipe.unet.config
        if config.addition_embed_type != "text_time":
            check_text_encoders(pipe, "text_encoder")
            embeds, _ = pipe.encode_prompt("", get_device(pipe.unet), 1, False)
            return {"encoder_hidden_states": embeds}
        if getattr(pipe, "config", {}).get("requires_aesthetics_score"):
            raise ValueError("from_pipeline: pipe must be of a base model, got a refiner, which receives a score, too")
        if not UNetBackbone.needs_text_encoders(pipe):
            pooled = config.projection_class_embeddings_input_dim - SIZES * config.addition_time_embed_dim
            tokens = 77  # of CLIP
            return {
                "encoder_hidden_states": torch.zeros(1, tokens, config.cross_attention_dim),
                "text_embeds": torch.zeros(1, pooled),
            }
        check_text_encoders(pipe, "text_encoder_2")  # the refiner has no other
        embeds, _, pooled, _ = pipe.encode_prompt("", device=get_device(pipe.unet), do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def prompt_names(self) -> tuple[str, ...]:
        """Return the names of the embeddings, and of SDXL that of the pooled one."""
        pooled = self.network.config.addition_embed_type == "text_time"
        return ("encoder_hidden_states", "text_embeds") if pooled else ("encoder_hidden_states",)

    def check_parts(self) -> None:
        """Also refuse networks that need more than a timestep and a prompt."""
        super().check_parts()
        config = self.network.config
        if config.encoder_hid_dim_type not in (None, "text_proj"):
            raise ValueError(
                f"from_pipeline: unet must take text alone, got one with {config.encoder_hid_dim_type}; remove an "
                "adapter of images with pipe.unload_ip_adapter()"
            )
        conditions = {
            "addition_embed_type": config.addition_embed_type not in (None, "text_time"),
            "class_embed_type": config.class_embed_type is not None,
            "num_class_embeds": config.num_class_embeds is not None,
        }
        if more := [f"{name} = {config[name]!r}" for name, present in conditions.items() if present]:
            raise ValueError(
                f"from_pipeline: unet must need nothing but a timestep and a prompt, got one with {more[0]}"
            )
        if config.addition_embed_type == "text_time":
            sizes = config.projection_class_embeddings_input_dim - self.empty_prompt["text_embeds"].shape[1]
            if sizes != SIZES * config.addition_time_embed_dim:
                raise ValueError(
                    f"from_pipeline: unet must take {SIZES} numbers for the size, got one of "
                    f"{sizes // config.addition_time_embed_dim} (a refiner); take its base model"
                )

    def attentions(self) -> list[nn.Module]:
        """Return the attention of down, middle and up blocks, in the order in which they run."""
        return [module for module, _ in self._located()]

    def grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the latent's grid, halved once for every level down."""
        grids = [self.latent_size(size)]
        for _ in self.network.config.block_out_channels[1:]:
            grids.append((-(-grids[-1][0] // 2), -(-grids[-1][1] // 2)))
        return [grids[level] for _, level in self._located()]

    def _located(self) -> list[tuple[nn.Module, int]]:
        """Return the self-attention modules with their level in the UNet, 0 for the finest."""
        deepest = len(self.network.config.block_out_channels) - 1
        located = []
        for order, (name, module) in enumerate(unwrap_compiled(self.network).named_modules()):
            if match := ATTENTION.fullmatch(name):
                _, down, up = match.groups()
                # down blocks, then the middle, then up blocks, whatever the order of attributes
                stage = int(down) if down else deepest + 1 + int(up) if up else deepest + 0.5
                level = int(down) if down else deepest - int(up) if up else deepest
                located.append((stage, order, module, level))
        return [(module, level) for _, _, module, level in sorted(located, key=lambda entry: entry[:2])]

    def call(self, sample: Tensor, timestep: Tensor, empty_prompt: dict[str, Tensor]) -> Tensor:
        """Return the predicted noise or velocity."""
        added = None
        if "text_embeds" in empty_prompt:
            height, width = (side * self.pixels_per_latent(self.vae) for side in sample.shape[-2:])
            # size of the original, offset of the crop, size of the target
            sizes = constant((height, width, 0, 0, height, width), sample.device).to(sample.dtype)
            added = {"text_embeds": empty_prompt["text_embeds"], "time_ids": sizes.expand(len(sample), -1)}
        guidance = None
        if width := self.network.config.time_cond_proj_dim:  # of consistency models: sines and cosines of none, 0
            guidance = sample.new_zeros(len(sample), width)
            guidance[:, width // 2 : width // 2 * 2] = 1
        return self.network(
            sample,
            timestep,
            timestep_cond=guidance,
            encoder_hidden_states=empty_prompt["encoder_hidden_states"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
