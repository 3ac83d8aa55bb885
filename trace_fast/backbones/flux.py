"""FLUX.1: double blocks with image and text apart, single blocks with both in one sequence, rotary positions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from trace_fast.backbones.base import get_device
from trace_fast.backbones.capture import AttentionLayout
from trace_fast.backbones.latent import OTHERS, PROJECTIONS, LatentBackbone, check_text_encoders
from trace_fast.backbones.rotary import apply_rotary

__all__ = ["FluxBackbone"]

PATCH = 2  # latents along a side of a token, packed outside the network
SIZE = 1024  # pixels


class FluxBackbone(LatentBackbone):
    """`FluxTransformer2DModel`; the image's tokens are the last of every sequence.

    The softmax over image keys alone is the image part of the joint softmax, every row divided by its sum.

    Attributes:
        guidance: strength that guidance-distilled models (dev) receive; 1 means none, as fits the empty prompt.
    """

    LAYOUTS: ClassVar = (AttentionLayout("norm_q", "norm_k", OTHERS, PROJECTIONS, rotary="image_rotary_emb"),)
    guidance: float = 1.0

    @staticmethod
    def encode_empty_prompt(pipe: Any) -> dict[str, Tensor]:
        """Return the embedding of the empty prompt by the pipeline's text encoders."""
        check_text_encoders(pipe, "text_encoder", "text_encoder_2")
        embeds, pooled, _ = pipe.encode_prompt("", "", device=get_device(pipe.transformer))
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def attentions(self) -> list[nn.Module]:
        """Return the attention of double blocks, then that of single blocks."""
        return [block.attn for block in (*self.network.transformer_blocks, *self.network.single_transformer_blocks)]

    def attention_inputs(self, module: Any, query: Tensor, key: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        """Return query and key (B, H, T, d): of the image in double blocks, of text and image in single blocks."""
        if type(module).__name__ == "Attention":  # of earlier releases of diffusers: heads stand before tokens
            query, key = query.transpose(1, 2), key.transpose(1, 2)
        count = query.shape[1]
        rotary = tuple(part[-count:] for part in rotary)  # of text and image
        query, key = (apply_rotary(x, rotary).transpose(1, 2) for x in (query, key))
        return query, key

    @classmethod
    def native_size(cls, pipe: Any) -> tuple[int, int]:
        """Return the height and width in pixels that the model was made for."""
        return SIZE, SIZE

    def prompt_names(self) -> tuple[str, ...]:
        """Return the names of what the network receives for a prompt."""
        return "encoder_hidden_states", "pooled_projections"

    def latent_channels(self) -> int:
        """Return the channels of a token: PATCH x PATCH latents."""
        return super().latent_channels() * PATCH**2

    def patch(self) -> int:
        """Return the side of a token in latents; the network's own configuration says 1."""
        return PATCH

    def call(self, sample: Tensor, timestep: Tensor, empty_prompt: dict[str, Tensor]) -> Tensor:
        """Return the predicted velocity; the network's own timesteps go from 0 to 1."""
        height, width = (side // PATCH for side in sample.shape[-2:])
        positions = torch.zeros(height, width, 3, dtype=torch.float32, device=sample.device)
        positions[..., 1] = torch.arange(height, device=sample.device)[:, None]
        positions[..., 2] = torch.arange(width, device=sample.device)
        text = empty_prompt["encoder_hidden_states"]
        guidance = None
        if self.network.config.guidance_embeds:
            guidance = torch.full((len(sample),), self.guidance, dtype=torch.float32, device=sample.device)
        packed = self.network(
            hidden_states=functional.pixel_unshuffle(sample, PATCH).flatten(2).mT,  # (B, N, 4 C)
            encoder_hidden_states=text,
            pooled_projections=empty_prompt["pooled_projections"],
            timestep=timestep.to(sample.dtype) / 1000,
            img_ids=positions.flatten(0, 1).to(sample.dtype),
            txt_ids=sample.new_zeros(text.shape[1], 3),
            guidance=guidance,
            return_dict=False,
        )[0]
        return functional.pixel_shuffle(packed.mT.unflatten(2, (height, width)), PATCH)
