"""The base class of diffusers families: an autoencoder before the network, and the embedding of the empty prompt."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from trace_fast.backbones.base import Backbone, Settings, constant, get_dtype
from trace_fast.backbones.capture import AttentionLayout, network_lock, unwrap_compiled
from trace_fast.backbones.schedule import RectifiedFlow, Schedule
from trace_fast.ops import checks

__all__ = ["OTHERS", "PROJECTIONS", "LatentBackbone", "check_text_encoders", "get_network"]

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
# layers of diffusers' attention classes that do not lie between the last of query and key and the attention itself
OTHERS = frozenset(
    (
        *("to_q", "to_k", "to_v", "to_out", "to_qkv", "to_kv"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_added_qkv", "norm_added_q", "norm_added_k"),
        *("group_norm", "spatial_norm", "norm_cross", "processor"),
    )
)


class LatentBackbone(Backbone):
    """A diffusers network that denoises the latents of an autoencoder. A family says how its network is called.

    Modules are used as they are, on their device and in their dtype; timesteps and latents between calls are float32.

    Args:
        network: a UNet or transformer.
        vae: the autoencoder of its pipeline.
        schedule: what its timesteps mean.
        empty_prompt: what the network receives for the empty prompt, by name, each with a batch of 1.
        settings: how the network is traced.

    Raises:
        TypeError: the autoencoder is of a class that the family does not know.
        ValueError: the parts do not fit each other, or the network does not allow the size.
    """

    LAYOUTS: ClassVar[tuple[AttentionLayout, ...]] = (
        AttentionLayout("norm_q", "norm_k", OTHERS, PROJECTIONS),
        AttentionLayout("to_q", "to_k", OTHERS, PROJECTIONS, fused="fused_projections"),
    )
    AUTOENCODERS: ClassVar[tuple[str, ...]] = ("AutoencoderKL", "AutoencoderTiny")

    def __init__(
        self,
        network: Any,
        vae: Any,
        schedule: Schedule,
        empty_prompt: Mapping[str, Tensor],
        settings: Settings,
    ):
        self.network, self.vae, self.schedule, self.settings = network, vae, schedule, settings
        self.empty_prompt = dict(empty_prompt)
        self.check_parts()
        self.grids(settings.size)  # refuse a size that the network does not allow

    @classmethod
    def from_pipeline(
        cls, pipe: Any, empty_prompt: dict[str, Tensor] | None, size: tuple[int, int] | None
    ) -> LatentBackbone:
        """Return a backbone of the modules of a diffusers pipeline, as they are."""
        if getattr(pipe, "vae", None) is None:
            raise ValueError(f"from_pipeline: pipe must hold a vae, got {type(pipe).__name__} without")
        schedule = cls.make_schedule(pipe)
        if empty_prompt is None:
            empty_prompt = cls.encode_empty_prompt(pipe)
        settings = Settings(size=size or cls.native_size(pipe))
        return cls(get_network(pipe), pipe.vae, schedule, empty_prompt, settings)

    @staticmethod
    def needs_text_encoders(pipe: Any) -> bool:
        """Return whether `encode_empty_prompt` runs the pipeline's text encoders."""
        return True

    @staticmethod
    def encode_empty_prompt(pipe: Any) -> dict[str, Tensor]:
        """Return what the network receives for the empty prompt, from the pipeline's own text encoders."""
        raise NotImplementedError

    @staticmethod
    def make_schedule(pipe: Any) -> Schedule:
        """Return what the timesteps mean: the straight line between image and noise."""
        return RectifiedFlow()

    @classmethod
    def native_size(cls, pipe: Any) -> tuple[int, int]:
        """Return the height and width in pixels that the model was made for."""
        sample = get_network(pipe).config.sample_size
        if sample is None:
            raise ValueError("from_pipeline: size must be given for a network that does not know its own, got None")
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return height * cls.pixels_per_latent(pipe.vae), width * cls.pixels_per_latent(pipe.vae)

    @staticmethod
    def pixels_per_latent(vae: Any) -> int:
        """Return how many pixels along a side one latent stands for."""
        return int(2 ** (len(vae.config.block_out_channels) - 1))

    def prompt_names(self) -> tuple[str, ...]:
        """Return the names of what the network receives for a prompt."""
        return ("encoder_hidden_states",)

    def latent_channels(self) -> int:
        """Return how many channels of a latent the network receives."""
        return self.vae.config.latent_channels

    def check_parts(self) -> None:
        """Raise TypeError or ValueError where the parts are not those of a plain text-to-image pipeline."""
        kind = type(unwrap_compiled(self.vae)).__name__
        if kind not in self.AUTOENCODERS:
            raise TypeError(f"from_pipeline: vae must be one of {', '.join(self.AUTOENCODERS)}, got {kind}")
        if self.network.config.in_channels != self.latent_channels():
            raise ValueError(
                f"from_pipeline: network must take the {self.latent_channels()} channels of a latent alone, got one of "
                f"{self.network.config.in_channels} (for inpainting, depth or another condition); take its plain model"
            )
        checks.number("from_pipeline", "scaling_factor", self.vae.config.get("scaling_factor", 1))
        checks.number("from_pipeline", "shift_factor", self.vae.config.get("shift_factor") or 0)
        shapes = {name: tuple(x.shape) for name, x in self.empty_prompt.items()}
        if shapes.keys() != set(self.prompt_names()) or any(shape[:1] != (1,) for shape in shapes.values()):
            names = " and ".join(self.prompt_names())
            raise ValueError(f"from_pipeline: empty_prompt must be {names}, each with a batch of 1, got {shapes}")

    def attention_inputs(self, module: Any, query: Tensor, key: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        """Return query and key (B, H, T, d) of diffusers' `Attention`; all of its tokens are the image's."""
        return heads_before_tokens(module, query), heads_before_tokens(module, key)

    def patch(self) -> int:
        """Return how many latents along a side make one token."""
        return self.network.config.patch_size

    def grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the grid of tokens, which is the same in every block."""
        patch = self.patch()
        height, width = self.latent_size(size, patch)
        return [(height // patch, width // patch)] * len(self.attentions())

    def latent_size(self, size: tuple[int, int], multiple: int = 1) -> tuple[int, int]:
        """Return height and width of the latent.

        Args:
            size: (height, width) in pixels.
            multiple: what the sides of the latent must be multiples of.

        Raises:
            ValueError: they are not, or a side is no whole number of latents.
        """
        side = self.pixels_per_latent(self.vae)
        step = side * multiple
        if min(size) < step or size[0] % step or size[1] % step:
            raise ValueError(f"{type(self).__name__}: size must be positive multiples of {step} pixels, got {size}")
        return size[0] // side, size[1] // side

    def encode(self, images: Tensor) -> Tensor:
        """Return clean latents (B, C, h, w) float32 of images (B, 3, H, W) in [0, 1]: the mode, normalized."""
        with network_lock(self.vae), upcast(self.vae) as vae:
            latent = self.encode_pixels(vae, (images * 2 - 1).to(vae.dtype)).float()
        return self.normalize(latent)

    def encode_pixels(self, vae: Any, pixels: Tensor) -> Tensor:
        """Return the mode of the latents of pixels (B, 3, H, W) in [-1, 1]."""
        output = vae.encode(pixels)
        return output.latents if hasattr(output, "latents") else output.latent_dist.mode()

    def normalize(self, latent: Tensor) -> Tensor:
        """Return latents as the network receives them, shifted and scaled by the autoencoder's configuration."""
        config = self.vae.config
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:  # one for each channel
            mean, std = (
                constant(tuple(config[name]), latent.device, torch.float32)[:, None, None]  # (C, 1, 1)
                for name in ("latents_mean", "latents_std")
            )
            return (latent - mean) * (config.get("scaling_factor", 1) / std)
        return (latent - (config.shift_factor or 0)) * config.scaling_factor

    def predict(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Call the network at timesteps (B,) and return its prediction, float32, shaped like `sample`."""
        dtype = get_dtype(self.network)
        for name, x in self.empty_prompt.items():  # moved once, to where the network was moved
            self.empty_prompt[name] = x.to(sample.device, dtype if x.is_floating_point() else x.dtype)
        empty_prompt = {name: x.expand(len(sample), *x.shape[1:]) for name, x in self.empty_prompt.items()}
        return self.call(sample.to(dtype), timestep, empty_prompt).float()

    @abc.abstractmethod
    def call(self, sample: Tensor, timestep: Tensor, empty_prompt: dict[str, Tensor]) -> Tensor:
        """Call the network on a sample and a prompt in its dtype, and return what `Schedule` calls the prediction."""


def get_network(pipe: Any) -> Any:
    """Return the network of a pipeline, or None where it has none."""
    unet = getattr(pipe, "unet", None)
    return getattr(pipe, "transformer", None) if unet is None else unet


def check_text_encoders(pipe: Any, *names: str) -> None:
    """Raise ValueError where a pipeline lacks a text encoder that its empty prompt needs."""
    missing = [name for name in names if getattr(pipe, name, None) is None]
    if missing or not hasattr(pipe, "encode_prompt"):
        raise ValueError(
            f"from_pipeline: pipe must hold {' and '.join(names)} to embed the empty prompt, got "
            f"{type(pipe).__name__} without {' and '.join(missing) or 'encode_prompt'}; or give empty_prompt"
        )


def heads_before_tokens(module: Any, output: Tensor) -> Tensor:
    """Return (B, H, T, d) of what a layer of diffusers' `Attention` gives, whose shape depends on its processor."""
    if output.dim() == 4:  # a norm of (B, H, T, d)
        return output
    if output.shape[-1] == module.inner_dim:  # a projection, (B, T, H * d)
        return output.unflatten(-1, (module.heads, -1)).transpose(1, 2)
    return output.unflatten(0, (-1, module.heads))  # a norm of (B * H, T, d)


@contextlib.contextmanager
def upcast(vae: Any) -> Iterator[Any]:
    """Keep an autoencoder in float32 during the context, if its configuration says that it overflows in half."""
    before = vae.dtype
    if before != torch.float16 or not vae.config.get("force_upcast", False):
        yield vae
        return
    vae.to(torch.float32)
    try:
        yield vae
    finally:
        vae.to(before)  # exact: every float16 is a float32
