"""What the diffusers families share: an autoencoder before the network, and the embedding of the empty prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trace_fast.backbones.base import Settings
from trace_fast.backbones.capture import Capture
from trace_fast.backbones.schedule import RectifiedFlow, Schedule

__all__ = ["LatentBackbone", "factor"]


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

    @classmethod
    def from_pipeline(
        cls, pipe: Any, null_text: dict[str, Tensor] | None, size: tuple[int, int] | None
    ) -> LatentBackbone:
        """Modules of the family's diffusers pipeline, as they are."""
        network = getattr(pipe, "unet", None) or pipe.transformer
        if null_text is None:
            null_text = cls.null_text_of(pipe)
        return cls(network, pipe.vae, cls.schedule_of(pipe), null_text, Settings(size=size or cls.native_size(pipe)))

    @staticmethod
    def null_text_of(pipe: Any) -> dict[str, Tensor]:
        """What stands for the empty prompt, by the pipeline's own text encoders."""
        raise NotImplementedError

    @staticmethod
    def schedule_of(pipe: Any) -> Schedule:
        """What the levels mean: the straight line between image and noise."""
        return RectifiedFlow()

    @staticmethod
    def native_size(pipe: Any) -> tuple[int, int]:
        """Height and width in pixels that the model was made for."""
        network = getattr(pipe, "unet", None) or pipe.transformer
        side = network.config.sample_size * factor(pipe.vae)
        return side, side

    def attentions(self) -> list[nn.Module]:
        """The self-attention modules, in the order in which they run."""
        raise NotImplementedError

    def patch(self) -> int:
        """Latents along a side of a token."""
        return self.network.config.patch_size

    def grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Patches of the latent, the same in every block."""
        patch = self.patch()
        height, width = self.latent_size(size, patch)
        return [(height // patch, width // patch)] * len(self.attentions())

    def call(self, sample: Tensor, timestep: Tensor, null_text: dict[str, Tensor]) -> Tensor:
        """One call of the network, all of it in the network's dtype."""
        raise NotImplementedError

    def latent_size(self, size: tuple[int, int], multiple: int = 1) -> tuple[int, int]:
        """Height and width of the latent; ValueError where its sides are not multiples of `multiple`."""
        step = factor(self.vae) * multiple
        if min(size) < step or size[0] % step or size[1] % step:
            raise ValueError(f"{type(self).__name__}: size must be positive multiples of {step} pixels, got {size}")
        return size[0] // factor(self.vae), size[1] // factor(self.vae)

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


def factor(vae: Any) -> int:
    """Pixels along a side of one latent."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


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
