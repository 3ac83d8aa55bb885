"""Language models of vision-language models, as they read an image: LLaVA and Qwen2.5-VL."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trace_fast.backbones.base import constant
from trace_fast.backbones.encoder import CLIP, EncoderBackbone
from trace_fast.backbones.vlm import qwen_patches, qwen_size

__all__ = ["LlavaLanguageBackbone", "QwenLanguageBackbone"]


class LanguageBackbone(EncoderBackbone):
    """The base class of language models: the image's tokens pass through them behind a single token of text.

    That token is the one that stands before an image or a text in the model's own prompts: a language model attends to
    the first token of a sequence whatever it is, so it had better not be the image's. Nothing follows the image, since
    what comes before does not see it. The network runs as it is, with its causal mask; the map is the softmax over all
    keys of the image without that mask. Under it a token sees only what is above it and to its left, and the rows of
    opposite neighbors could not be compared. The paper does not say which it takes.

    `network` is the whole model. Its way of making masks makes the host wait for the device.
    """

    COLORS: ClassVar = CLIP

    @staticmethod
    def config(network: Any) -> Any:
        """Return the tower's configuration."""
        return network.config.vision_config

    def attentions(self) -> list[nn.Module]:
        """Return the attention of every layer of the language model."""
        return [layer.self_attn for layer in self.network.model.language_model.layers]

    def first(self) -> int:
        """Return the token before the image."""
        raise NotImplementedError

    def features(self, pixels: Tensor) -> Tensor:
        """Return the image's tokens as the language model takes them, (B, N, C)."""
        raise NotImplementedError

    def positions(self, device: torch.device) -> Tensor | None:
        """Return the positions of all tokens, or None for 0, 1, 2 and so on."""
        return None

    def call(self, pixels: Tensor) -> Tensor:
        """Return the logits of what would follow the image."""
        features = self.features(pixels)
        first = self.network.get_input_embeddings()(constant((self.first(),), pixels.device))
        return self.network(
            inputs_embeds=torch.cat([first.expand(len(features), 1, -1), features], 1),
            position_ids=self.positions(pixels.device),
            use_cache=False,
            logits_to_keep=1,
        )[0]

    def attention_inputs(self, module: Any, query: Tensor, key: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        """Return query and key (B, H, T, d), their positions applied by the model's own function."""
        model: Any = sys.modules[type(module).__module__]
        return model.apply_rotary_pos_emb(*super().attention_inputs(module, query, key, rotary), *rotary)


class LlavaLanguageBackbone(LanguageBackbone):
    """`LlavaForConditionalGeneration`: one token a patch, behind the token that begins a text."""

    def first(self) -> int:
        """Return the token that begins a text."""
        return self.network.config.text_config.bos_token_id

    def features(self, pixels: Tensor) -> Tensor:
        """Return patches behind the projector, (B, N, C); the tower interpolates its positions to other sizes."""
        output = self.network.model.get_image_features(pixels, interpolate_pos_encoding=True, return_dict=True)
        return torch.stack(tuple(output.pooler_output))


class QwenLanguageBackbone(LanguageBackbone):
    """`Qwen2_5_VLForConditionalGeneration`: one token a unit of 2 x 2 patches, with a row and a column for a position.

    The model was made for any size: 64 x 64 patches is the default here, 32 x 32 tokens.
    """

    @classmethod
    def native_size(cls, network: Any) -> tuple[int, int]:
        """Return the size of 64 x 64 patches."""
        return qwen_size(cls.config(network), 64)

    def token(self) -> tuple[int, int]:
        """Return the size of a unit of patches that are merged."""
        config = self.config(self.network)
        return qwen_size(config, config.spatial_merge_size)

    def first(self) -> int:
        """Return the token that begins an image."""
        return self.network.config.vision_start_token_id

    def features(self, pixels: Tensor) -> Tensor:
        """Return merged patches, row by row, (B, N, C)."""
        patches, grid = qwen_patches(pixels, self.config(self.network))
        return torch.stack(self.network.model.get_image_features(patches, grid, return_dict=True).pooler_output)

    def positions(self, device: torch.device) -> Tensor:
        """Return time, row and column of all tokens, (3, 1, 1 + N): an image begins where the text before it ends."""
        height, width = self.grids(self.settings.size)[0]
        row, column = torch.meshgrid(
            torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
        )
        places = torch.stack([torch.zeros_like(row), row, column]).flatten(1) + 1
        return torch.cat([torch.zeros_like(places[:, :1]), places], 1)[:, None]
