"""PixArt-alpha: a diffusion transformer with cross-attention to text, whose self-attention sees the image alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trace_fast.backbones.base import constant, get_device
from trace_fast.backbones.latent import LatentBackbone, check_text_encoders
from trace_fast.backbones.schedule import VariancePreserving

__all__ = ["PixArtBackbone"]


class PixArtBackbone(LatentBackbone):
    """`PixArtTransformer2DModel`: one grid, the first attention of every block is self-attention."""

    @staticmethod
    def make_schedule(pipe: Any) -> VariancePreserving:
        """Return the schedule that the scheduler describes."""
        return VariancePreserving.from_scheduler(pipe.scheduler)

    @staticmethod
    def encode_empty_prompt(pipe: Any) -> dict[str, Tensor]:
        """Return the embedding of the empty prompt by the pipeline's text encoders."""
        check_text_encoders(pipe, "text_encoder")
        device = get_device(pipe.transformer)
        embeds, mask, *_ = pipe.encode_prompt("", do_classifier_free_guidance=False, device=device)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def prompt_names(self) -> tuple[str, ...]:
        """Return the names of the embeddings, and of the mask that says which of them are of the prompt."""
        return "encoder_hidden_states", "encoder_attention_mask"

    def attentions(self) -> list[nn.Module]:
        """Return the first attention of every block."""
        return [block.attn1 for block in self.network.transformer_blocks]

    def call(self, sample: Tensor, timestep: Tensor, empty_prompt: dict[str, Tensor]) -> Tensor:
        """Return the predicted noise; the second half of the network's channels is the predicted variance."""
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.network.use_additional_conditions:  # of the models of 1024 pixels
            size = tuple(side * self.pixels_per_latent(self.vae) for side in sample.shape[-2:])
            pixels = constant(size, sample.device).to(sample.dtype)
            added = {
                "resolution": pixels.expand(len(sample), -1),
                "aspect_ratio": (pixels[:1] / pixels[1:]).expand(len(sample), -1),
            }
        prediction = self.network(
            sample,
            encoder_hidden_states=empty_prompt["encoder_hidden_states"],
            encoder_attention_mask=empty_prompt["encoder_attention_mask"],
            timestep=timestep,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return prediction[:, : sample.shape[1]]
