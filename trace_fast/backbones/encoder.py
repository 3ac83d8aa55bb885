"""The base class of encoders: no timesteps, and attention modules as transformers writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trace_fast.backbones.base import Backbone, Settings, get_dtype
from trace_fast.backbones.capture import AttentionLayout

__all__ = ["CLIP", "EncoderBackbone", "pair"]

# mean and standard deviation of pixels, red, green, blue
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
OTHERS = frozenset(("v_proj", "o_proj", "out_proj", "proj"))


class EncoderBackbone(Backbone):
    """An encoder as the tracer sees it: the sample is the normalized image, the timestep always 0.

    The network is used as it is, on its device and in its dtype. Families say how large its patches are and how it is
    called.

    Where attention is not read from its call, the layers between projection and attention are replayed by the model's
    own functions, locally to each module: whichever attention implementation the user chose (eager, sdpa, flash, flex,
    a kernel of the hub) is called under its own name. An entry in transformers' `AttentionInterface` would receive the
    arguments of attention themselves, but the interface belongs to the process, its names decide elsewhere which masks
    are made and whether windows are cut, and eager attention does not ask it in every version.

    Attributes:
        COLORS: mean and standard deviation of the pixels that the family was trained on.

    Args:
        network: the vision model alone.
        settings: how it is traced; `timestep` is 0.
        mean: of the pixels it was trained on, red, green, blue, in [0, 1]; None is the family's default.
        std: standard deviation likewise.

    Raises:
        ValueError: the network does not allow the size.
    """

    LAYOUTS: ClassVar[tuple[AttentionLayout, ...]] = (
        AttentionLayout("q_proj", "k_proj", OTHERS, rotary="position_embeddings"),
        AttentionLayout("qkv", "qkv", OTHERS, rotary="position_embeddings"),
    )
    COLORS: ClassVar = IMAGENET
    schedule = None  # there are no timesteps

    def __init__(
        self,
        network: Any,
        settings: Settings,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        self.network, self.settings = network, settings
        self.mean, self.std = (
            torch.tensor(default if values is None else values, dtype=torch.float32).reshape(-1, 1, 1)  # (3, 1, 1)
            for values, default in zip((mean, std), self.COLORS, strict=True)
        )
        self.grids(settings.size)  # refuse a size that the network does not allow

    @classmethod
    def from_model(
        cls,
        network: Any,
        *,
        size: tuple[int, int] | None = None,
        blocks: Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> EncoderBackbone:
        """Return a backbone of a loaded network at a size, its own if None; `blocks` are read, or `default_blocks`."""
        chosen = cls.default_blocks(network) if blocks is None else tuple(blocks)
        return cls(network, Settings(size=size or cls.native_size(network), timestep=0, blocks=chosen), mean, std)

    @staticmethod
    def default_blocks(network: Any) -> tuple[int, ...] | None:
        """Return the indices of the blocks that are averaged, or None for all of them."""
        return None

    @staticmethod
    def config(network: Any) -> Any:
        """Return the part of a network's configuration that describes its images."""
        return network.config

    @classmethod
    def native_size(cls, network: Any) -> tuple[int, int]:
        """Return the height and width in pixels that the model was made for."""
        return pair(cls.config(network).image_size)

    def attentions(self) -> list[nn.Module]:
        """Return the self-attention modules, in the order in which they run."""
        return [
            module
            for module in self.network.modules()
            if any(hasattr(module, layout.query) and hasattr(module, layout.key) for layout in self.LAYOUTS)
        ]

    def token(self) -> tuple[int, int]:
        """Return the height and width in pixels of what a token stands for: a patch."""
        return pair(self.config(self.network).patch_size)

    def step(self) -> tuple[int, int]:
        """Return what height and width must be multiples of, in pixels: a token, or those that the network merges."""
        return self.token()

    def grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the grid of tokens, which is the same in every block."""
        step, token = self.step(), self.token()
        if any(side < one or side % one for side, one in zip(size, step, strict=True)):
            raise ValueError(
                f"{type(self).__name__}: size must be positive multiples of {step[0]} x {step[1]} pixels, got {size}"
            )
        return [(size[0] // token[0], size[1] // token[1])] * len(self.attentions())

    def encode(self, images: Tensor) -> Tensor:
        """Return (image - mean) / std of images (B, 3, H, W) in [0, 1], by the data that the model was trained on."""
        self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)  # moved once
        return (images - self.mean) / self.std

    def predict(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Call the network and return features of every token; `timestep` is ignored, since it has none."""
        return self.call(sample.to(get_dtype(self.network)))

    def call(self, pixels: Tensor) -> Tensor:
        """Return the network's features of normalized images in its dtype."""
        return self.network(pixels)[0]

    def attention_inputs(self, module: Any, query: Tensor, key: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        """Return query and key (B, H, T, d), here of projections (B, T, H * d) without positions."""
        query, key = (x.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for x in (query, key))
        return query, key


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of a configuration's side or sides."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
