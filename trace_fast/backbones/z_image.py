"""Z-Image: one sequence of image and text, the image first, each padded to a multiple of 32 tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trace_fast.backbones.base import get_device
from trace_fast.backbones.capture import AttentionLayout
from trace_fast.backbones.latent import OTHERS, PROJECTIONS, LatentBackbone, check_text_encoders

__all__ = ["ZImageBackbone"]

PATCH = 2  # latents along a side of a token
SIZE = 1024  # pixels


class ZImageBackbone(LatentBackbone):
    """`ZImageTransformer2DModel`: blocks of the image alone (the noise refiner), then blocks of image and text.

    The blocks of the text alone (the context refiner) are not read. The network's own timesteps go from 0 (noise) to 1
    (image), and it predicts image minus noise; both are turned around here.
    """

    LAYOUTS: ClassVar = (
        AttentionLayout("norm_q", "norm_k", OTHERS, PROJECTIONS, rotary="freqs_cis"),
        AttentionLayout("to_q", "to_k", OTHERS, PROJECTIONS, rotary="freqs_cis"),
    )

    @staticmethod
    def encode_empty_prompt(pipe: Any) -> dict[str, Tensor]:
        """Return the embedding of the empty prompt, which stands in the template of the text encoder."""
        check_text_encoders(pipe, "text_encoder")
        (embeds,), _ = pipe.encode_prompt("", device=get_device(pipe.transformer), do_classifier_free_guidance=False)
        return {"cap_feats": embeds[None]}

    @classmethod
    def native_size(cls, pipe: Any) -> tuple[int, int]:
        """Return the height and width in pixels that the model was made for."""
        return SIZE, SIZE

    def prompt_names(self) -> tuple[str, ...]:
        """Return the names of what the network receives for a prompt."""
        return ("cap_feats",)

    def check_parts(self) -> None:
        """Refuse the models that receive other images, too."""
        super().check_parts()
        if self.network.config.get("siglip_feat_dim") is not None:
            raise ValueError(
                "from_pipeline: network must make images of text alone, got one that also receives features of images "
                "(siglip_feat_dim); take Tongyi-MAI/Z-Image-Turbo"
            )

    def attentions(self) -> list[nn.Module]:
        """Return the attention of the noise refiner, then that of the blocks of image and text."""
        return [block.attention for block in (*self.network.noise_refiner, *self.network.layers)]

    def attention_inputs(self, module: Any, query: Tensor, key: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        """Return query and key (B, H, T, d), each pair of channels turned as one complex number."""
        query, key = (apply_complex_rotary(split_heads(x, module.heads), rotary) for x in (query, key))
        return query.transpose(1, 2), key.transpose(1, 2)

    def image_tokens(self, count: int) -> slice:
        """Return where the image's tokens stand: before their padding and the text."""
        return slice(0, count)

    def patch(self) -> int:
        """Return the side of a token in latents."""
        return PATCH

    def grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the grid of tokens, along each side of which there are only as many as there are positions."""
        grids = super().grids(size)
        _, rows, columns = self.network.config.axes_lens
        if grids[0][0] > rows or grids[0][1] > columns:
            step = PATCH * self.pixels_per_latent(self.vae)
            raise ValueError(
                f"{type(self).__name__}: size must be at most {rows * step} x {columns * step} pixels, got {size}"
            )
        return grids

    def call(self, sample: Tensor, timestep: Tensor, empty_prompt: dict[str, Tensor]) -> Tensor:
        """Return the predicted velocity, noise minus image."""
        predictions = self.network(
            list(sample[:, :, None].unbind()),  # films of one frame
            (1000 - timestep.float()) / 1000,
            list(empty_prompt["cap_feats"].unbind()),
            return_dict=False,
        )[0]
        return -torch.stack(predictions)[:, :, 0]


def split_heads(output: Tensor, heads: int) -> Tensor:
    """Return (B, T, H, d) of a norm, which has this shape already, or of a projection (B, T, H * d)."""
    return output if output.dim() == 4 else output.unflatten(-1, (heads, -1))


def apply_complex_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    """Multiply pairs of channels of x (B, T, H, d) by complex numbers (B, T, d / 2), in float32."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotary.unsqueeze(2)).flatten(3).type_as(x)
