"""FLUX.2: FLUX.1's two kinds of block with fused projections in the second, and latents normalized in patches."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from trace_fast.backbones.base import get_device
from trace_fast.backbones.capture import AttentionLayout
from trace_fast.backbones.latent import OTHERS, PROJECTIONS, LatentBackbone, check_text_encoders
from trace_fast.backbones.rotary import apply_rotary

__all__ = ["Flux2Backbone"]

PATCH = 2  # latents along a side of a token, packed before the network
SIZE = 1024  # pixels


class Flux2Backbone(LatentBackbone):
    """`Flux2Transformer2DModel` of FLUX.2 dev and klein; the image's tokens are the last of every sequence.

    Double blocks project image and text apart. Single blocks make query, key, value and the input of their MLP by one
    projection of both. A latent here is a patch of 2 x 2 of the autoencoder's, as its batch norm counts them.

    Attributes:
        guidance: strength that guidance-distilled models (dev) receive; 1 means none, as fits the empty prompt.
    """

    LAYOUTS: ClassVar = (
        AttentionLayout("norm_q", "norm_k", OTHERS, PROJECTIONS, rotary="image_rotary_emb"),
        AttentionLayout(
            "norm_q",
            "norm_k",
            others=frozenset(("to_qkv_mlp_proj", "mlp_act_fn", "to_out")),
            adapters=("to_qkv_mlp_proj", "to_out"),
            rotary="image_rotary_emb",
        ),
    )
    AUTOENCODERS: ClassVar = ("AutoencoderKLFlux2",)
    guidance: float = 1.0

    @staticmethod
    def encode_empty_prompt(pipe: Any) -> dict[str, Tensor]:
        """Return the embedding of the empty prompt, which stands in the template of the text encoder."""
        check_text_encoders(pipe, "text_encoder")
        embeds, _ = pipe.encode_prompt("", device=get_device(pipe.transformer))
        return {"encoder_hidden_states": embeds}

    @classmethod
    def native_size(cls, pipe: Any) -> tuple[int, int]:
        """Return the height and width in pixels that the model was made for."""
        return SIZE, SIZE

    def attentions(self) -> list[nn.Module]:
        """Return the attention of double blocks, then that of single blocks."""
        return [block.attn for block in (*self.network.transformer_blocks, *self.network.single_transformer_blocks)]

    def attention_inputs(self, module: Any, query: Tensor, key: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        """Return query and key (B, H, T, d): of the image in double blocks, of text and image in single blocks."""
        count = query.shape[1]
        rotary = tuple(part[-count:] for part in rotary)  # of text and image
        query, key = (apply_rotary(x, rotary).transpose(1, 2) for x in (query, key))
        return query, key

    def latent_channels(self) -> int:
        """Return the channels of a patch of latents."""
        return super().latent_channels() * PATCH**2

    def patch(self) -> int:
        """Return the side of a token in latents of the autoencoder; the network's own configuration says 1."""
        return PATCH

    def normalize(self, latent: Tensor) -> Tensor:
        """Return patches (B, 4 C, h / 2, w / 2) of latents, normalized by the statistics of the batch norm."""
        mean, variance = (x.float()[:, None, None] for x in (self.vae.bn.running_mean, self.vae.bn.running_var))
        deviation = (variance + self.vae.config.batch_norm_eps).sqrt()
        return (functional.pixel_unshuffle(latent, PATCH) - mean) / deviation

    def call(self, sample: Tensor, timestep: Tensor, empty_prompt: dict[str, Tensor]) -> Tensor:
        """Return the predicted velocity; the network's own timesteps go from 0 to 1."""
        text = empty_prompt["encoder_hidden_states"]
        height, width = sample.shape[-2:]
        # time, row, column, and place in the text
        image_positions = torch.zeros(height, width, 4, dtype=torch.int64, device=sample.device)
        image_positions[..., 1] = torch.arange(height, device=sample.device)[:, None]
        image_positions[..., 2] = torch.arange(width, device=sample.device)
        text_positions = torch.zeros(text.shape[1], 4, dtype=torch.int64, device=sample.device)
        text_positions[:, 3] = torch.arange(text.shape[1], device=sample.device)
        guidance = None
        if self.network.config.get("guidance_embeds", True):
            guidance = torch.full((len(sample),), self.guidance, dtype=torch.float32, device=sample.device)
        prediction = self.network(
            hidden_states=sample.flatten(2).mT,  # (B, N, 4 C)
            encoder_hidden_states=text,
            timestep=timestep.to(sample.dtype) / 1000,
            img_ids=image_positions.flatten(0, 1),
            txt_ids=text_positions,
            guidance=guidance,
            return_dict=False,
        )[0]
        return prediction.mT.unflatten(2, (height, width))
