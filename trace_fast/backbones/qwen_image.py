"""Qwen-Image: double blocks alone, an autoencoder of films, and a vision-language model for the prompt."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from trace_fast.backbones.base import get_device
from trace_fast.backbones.capture import AttentionLayout
from trace_fast.backbones.latent import OTHERS, PROJECTIONS, LatentBackbone, check_text_encoders

__all__ = ["QwenImageBackbone"]

PATCH = 2  # latents along a side of a token, packed outside the network
SIZE = 1024  # pixels
CONDITIONED = ("Edit", "Layered")  # in the names of pipelines whose network also receives another image


class QwenImageBackbone(LatentBackbone):
    """`QwenImageTransformer2DModel`, whose attention modules project image and text apart."""

    LAYOUTS: ClassVar = (AttentionLayout("norm_q", "norm_k", OTHERS, PROJECTIONS, rotary="image_rotary_emb"),)
    AUTOENCODERS: ClassVar = ("AutoencoderKLQwenImage",)

    @classmethod
    def from_pipeline(
        cls, pipe: Any, empty_prompt: dict[str, Tensor] | None, size: tuple[int, int] | None
    ) -> LatentBackbone:
        """Return a backbone of the modules of a pipeline.

        Raises:
            ValueError: the network needs another image beside the noisy one.
        """
        name = getattr(pipe, "config", {}).get("_class_name", type(pipe).__name__)
        config = pipe.transformer.config
        needs_image = config.get("zero_cond_t") or config.get("use_additional_t_cond") or config.get("use_layer3d_rope")
        if needs_image or any(word in name for word in CONDITIONED):
            raise ValueError(
                f"from_pipeline: pipe must make images of text alone, got {name}, whose network also receives an image "
                "to edit or to divide; take Qwen/Qwen-Image"
            )
        return super().from_pipeline(pipe, empty_prompt, size)

    @staticmethod
    def encode_empty_prompt(pipe: Any) -> dict[str, Tensor]:
        """Return the embedding of the empty prompt, which stands in the template of the text encoder."""
        check_text_encoders(pipe, "text_encoder")
        embeds, _ = pipe.encode_prompt("", device=get_device(pipe.transformer))  # one prompt alone has no padding
        return {"encoder_hidden_states": embeds}

    @classmethod
    def native_size(cls, pipe: Any) -> tuple[int, int]:
        """Return the height and width in pixels that the model was made for."""
        return SIZE, SIZE

    @staticmethod
    def pixels_per_latent(vae: Any) -> int:
        """Return how many pixels along a side one latent stands for."""
        return int(2 ** len(vae.config.temperal_downsample))

    def latent_channels(self) -> int:
        """Return the channels of a patch of latents."""
        return self.vae.config.z_dim * PATCH**2

    def patch(self) -> int:
        """Return the side of a token in latents."""
        return PATCH

    def attentions(self) -> list[nn.Module]:
        """Return the attention of every block."""
        return [block.attn for block in self.network.transformer_blocks]

    def attention_inputs(self, module: Any, query: Tensor, key: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        """Return query and key (B, H, N, d) of the image, their positions applied by the model's own function."""
        from diffusers.models.transformers import transformer_qwenimage

        apply: Any = transformer_qwenimage.apply_rotary_emb_qwen
        image, _ = rotary  # the other is of the text
        query, key = (apply(x, image, use_real=False).transpose(1, 2) for x in (query, key))
        return query, key

    def encode_pixels(self, vae: Any, pixels: Tensor) -> Tensor:
        """Return the mode of the latents of pixels (B, 3, H, W) in [-1, 1], which are films of one frame."""
        return super().encode_pixels(vae, pixels[:, :, None])[:, :, 0]

    def call(self, sample: Tensor, timestep: Tensor, empty_prompt: dict[str, Tensor]) -> Tensor:
        """Return the predicted velocity; the network's own timesteps go from 0 to 1."""
        height, width = (side // PATCH for side in sample.shape[-2:])
        text = empty_prompt["encoder_hidden_states"]
        lengths = {}
        # diffusers 0.35 needs the lengths of prompts; later releases take them from the embeddings
        if "max_txt_seq_len" not in inspect.signature(self.network.pos_embed.forward).parameters:
            lengths["txt_seq_lens"] = [text.shape[1]] * len(sample)
        packed = self.network(
            hidden_states=functional.pixel_unshuffle(sample, PATCH).flatten(2).mT,  # (B, N, 4 C)
            encoder_hidden_states=text,
            **lengths,
            encoder_hidden_states_mask=None,
            timestep=timestep.to(sample.dtype) / 1000,
            img_shapes=[[(1, height, width)]] * len(sample),
            return_dict=False,
        )[0]
        return functional.pixel_shuffle(packed.mT.unflatten(2, (height, width)), PATCH)
