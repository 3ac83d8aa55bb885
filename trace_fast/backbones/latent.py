"""What the diffusers families share: an autoencoder before the network, and the embedding of the empty prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trace_fast.backbones.base import Settings
from trace_fast.backbones.capture import Capture
from trace_fast.backbones.schedule import Schedule

__all__ = ["LatentBackbone"]


class LatentBackbone:
    """A diffusers network that denoises the latents of an autoencoder; families say how it is called.

    Modules are used as they are, on their device and in their dtype; levels and latents between calls are float32.

    Args:
        network: a UNet or transformer.
        vae: `AutoencoderKL` of its pipeline.
        schedule: what its levels mean.
        null_text: what it takes for the empty prompt, by name, each with a batch of 1.
        settings: how it is traced.
    """

    capture: ClassVar = Capture

    def __init__(
        self,
        network: Any,
        vae: Any,
        schedule: Schedule,
        null_text: Mapping[str, Tensor],
        settings: Settings,
    ):
        self.network, self.vae, self.schedule, self.settings = network, vae, schedule, settings
        self.null_text = dict(null_text)
        self.grids(settings.size)  # refuse a size that the network does not allow

    def attentions(self) -> list[nn.Module]:
        """The self-attention modules, in the order in which they run."""
        raise NotImplementedError

    def grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Token grid of every self-attention at a processing size in pixels."""
        raise NotImplementedError

    def call(self, sample: Tensor, timestep: Tensor, null_text: dict[str, Tensor]) -> Tensor:
        """One call of the network, all of it in the network's dtype."""
        raise NotImplementedError

    @property
    def factor(self) -> int:
        """Pixels along a side of one latent."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def latent_size(self, size: tuple[int, int], multiple: int = 1) -> tuple[int, int]:
        """Height and width of the latent; ValueError where its sides are not multiples of `multiple`."""
        step = self.factor * multiple
        if min(size) < step or size[0] % step or size[1] % step:
            raise ValueError(f"{type(self).__name__}: size must be positive multiples of {step} pixels, got {size}")
        return size[0] // self.factor, size[1] // self.factor

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to clean latents (B, C, h, w) float32: the mode, shifted and scaled."""
        config = self.vae.config
        with upcast(self.vae) as vae:
            latent = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist.mode().float()
        return (latent - (config.shift_factor or 0)) * config.scaling_factor

    def predict(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """One call of the network at levels (B,): the prediction, float32, shaped like `sample`."""
        dtype = next(self.network.parameters()).dtype
        for name, x in self.null_text.items():  # moved once, where the network was moved
            self.null_text[name] = x.to(sample.device, dtype if x.is_floating_point() else x.dtype)
        null_text = {name: x.expand(len(sample), *x.shape[1:]) for name, x in self.null_text.items()}
        return self.call(sample.to(dtype), timestep, null_text).float()


@contextlib.contextmanager
def upcast(vae: Any) -> Iterator[Any]:
    """An autoencoder that overflows in half precision, as its configuration says, in float32 for the while."""
    before = vae.dtype
    if before != torch.float16 or not vae.config.get("force_upcast", False):
        yield vae
        return
    vae.to(torch.float32)
    try:
        yield vae
    finally:
        vae.to(before)  # exact: every float16 is a float32
