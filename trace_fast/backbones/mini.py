"""The embedded backbone: a pixel-space diffusion transformer small enough for two CPU cores."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from trace_fast import ops
from trace_fast.backbones.base import Backbone, Settings, get_dtype, load_weights
from trace_fast.backbones.capture import AttentionLayout
from trace_fast.backbones.rotary import apply_rotary, rotary_embedding
from trace_fast.backbones.schedule import VariancePreserving
from trace_fast.ops import checks

__all__ = ["Mini", "MiniBackbone", "MiniConfig"]

Layer = TypeVar("Layer", bound=nn.Module)


@dataclass(frozen=True)
class MiniConfig:
    """Architecture of `Mini`. Sizes in channels, `patch` in pixels.

    `patch` is the side of one token, `heads` must divide `dim`, and the head dimension must be a multiple of 4
    (half of it encodes the row, half the column). All are from 1 to 4096.
    """

    dim: int = 160
    depth: int = 6
    heads: int = 4
    patch: int = 4
    expansion: int = 4

    def __post_init__(self) -> None:
        for name, value in self.to_dict().items():
            checks.integer("mini", name, value, 1, 4096)

    def to_dict(self) -> dict[str, int]:
        """Values for a configuration file."""
        return asdict(self)


class Attention(nn.Module):
    """Self-attention with normalized queries and keys; attribute names are those of diffusers' attention classes."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.norm_q = nn.RMSNorm(dim // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(dim // heads, eps=1e-6)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, hidden_states: Tensor, image_rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = (  # (B, N, H, d)
            project(hidden_states).unflatten(-1, (self.heads, -1)) for project in (self.to_q, self.to_k, self.to_v)
        )
        query = apply_rotary(self.norm_q(query), image_rotary_emb)
        key = apply_rotary(self.norm_k(key), image_rotary_emb)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, H, N, d)
        if self.training and not query.is_cuda:
            # written out: there and back in less than half the time of flash attention on a CPU, compiled, 256 tokens
            mixed = (query * query.shape[-1] ** -0.5 @ key.mT).softmax(-1) @ value
        elif query.device.type == "cpu" and not query.requires_grad:
            mixed = ops.attend(query, key, value)  # a capture lets it add its map to a total
        else:
            mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.to_out[0](mixed.transpose(1, 2).flatten(2))


def zeros(module: Layer) -> Layer:
    """Set weight and bias of a layer to zero, so that training starts from a network that does nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Block(nn.Module):
    """Self-attention, then a depthwise 3 x 3 convolution and an MLP, both modulated by the timestep.

    The convolution does the local part of denoising, so that attention need not.
    """

    def __init__(self, config: MiniConfig):
        super().__init__()
        dim, hidden = config.dim, config.dim * config.expansion
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, config.heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.local = zeros(nn.Conv2d(dim, dim, 3, padding=1, groups=dim))
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim))
        self.scale_shift_table = nn.Parameter(torch.zeros(6, dim))

    def forward(self, x: Tensor, conditioning: Tensor, grid: tuple[int, int], rotary: tuple[Tensor, Tensor]) -> Tensor:
        modulation = (conditioning + self.scale_shift_table)[:, :, None]  # (B, 6, 1, C)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, image_rotary_emb=rotary)
        y = self.norm2(x) * (1 + scale2) + shift2
        y = y + self.local(y.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        return x + gate2 * self.mlp(y)


class Mini(nn.Module):
    """Pixel-space diffusion transformer with v-prediction.

    An overlapping stem makes one token of every `patch` x `patch` pixels; every block attends over the whole grid.
    The grid follows the input: any height and width that are multiples of `patch`.
    """

    def __init__(self, config: MiniConfig | None = None):
        super().__init__()
        self.config = config = config or MiniConfig()
        dim, patch = config.dim, config.patch
        if dim % config.heads or (dim // config.heads) % 4:
            raise ValueError(f"Mini: dim / heads must be a multiple of 4, got dim {dim} and heads {config.heads}")
        self.stem = nn.Conv2d(3, dim, 2 * patch, stride=patch, padding=patch // 2)
        modulation = zeros(nn.Linear(dim, 6 * dim))
        modulation.bias.data.view(6, dim)[[2, 5]] = 1 / config.depth  # gates: every block counts from the first step
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), modulation)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.head = zeros(nn.Linear(dim, 3 * patch * patch))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Predict v from a noisy image.

        Args:
            sample: (B, 3, H, W) float, pixels in [-1, 1] mixed with unit noise; H and W multiples of `patch`.
            timestep: (B,), 0 (image) to 999 (noise).

        Returns:
            (B, 3, H, W), v = sqrt(abar) noise - sqrt(1 - abar) image.
        """
        config = self.config
        grid = (sample.shape[-2] // config.patch, sample.shape[-1] // config.patch)
        rotary = rotary_embedding(*grid, config.dim // config.heads, sample.device)
        conditioning = self.time(sinusoidal_embedding(timestep, config.dim).to(self.stem.weight.dtype)).unflatten(
            1, (6, -1)
        )
        # a token's channels side by side, as the layers read them: else every norm copies, and every sum is strided
        x = self.stem(sample).flatten(2).transpose(1, 2).contiguous()  # (B, N, C)
        for block in self.blocks:
            x = block(x, conditioning, grid, rotary)
        patches = self.head(self.norm(x)).transpose(1, 2)  # (B, 3 * patch * patch, N)
        return functional.pixel_shuffle(patches.unflatten(2, grid), config.patch)


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Return cosines and sines (B, dim) float32 of timesteps (B,), wavelengths from 2 pi to 10,000 times that."""
    steps = torch.linspace(0, -math.log(10_000), dim // 2, dtype=torch.float32, device=timestep.device)
    frequencies = torch.exp(steps)
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class MiniBackbone(Backbone):
    """`Mini` as the tracer sees it: pixels are the latent, every block's attention is read."""

    LAYOUTS: ClassVar = (
        AttentionLayout(
            "norm_q",
            "norm_k",
            others=frozenset(("to_q", "to_k", "to_v", "to_out")),
            adapters=("to_q", "to_k", "to_v", "to_out.0"),
            rotary="image_rotary_emb",
        ),
    )

    def __init__(self, network: Mini, settings: Settings):
        self.network = network
        self.settings = settings
        self.schedule = VariancePreserving()
        self.grid(settings.size)  # refuse a size that the patches do not fill

    @classmethod
    def from_folder(cls, folder: Path, config: dict[str, Any]) -> MiniBackbone:
        """Read the weights beside a configuration; raises what `load_backbone` turns into one error."""
        with torch.device("cpu"):  # whatever torch's default is
            network = Mini(MiniConfig(**config["architecture"]))
        network.load_state_dict(load_weights(folder / "model.safetensors"))
        side = 32 * network.config.patch
        return cls(network, Settings.from_dict({"size": [side, side], **config.get("tracing", {})}))

    def attentions(self) -> list[nn.Module]:
        """Return the attention of every block."""
        return [module for module in self.network.modules() if isinstance(module, Attention)]

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the grid of tokens of `patch` x `patch` pixels; raise ValueError for a size that they do not fill."""
        patch = self.network.config.patch
        if min(size) < patch or size[0] % patch or size[1] % patch:
            raise ValueError(f"mini: size must be positive multiples of {patch} pixels, got {size}")
        return size[0] // patch, size[1] // patch

    def grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the grid of tokens, which is the same in every block."""
        return [self.grid(size)] * self.network.config.depth

    def attention_inputs(self, module: nn.Module, query: Tensor, key: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        """Return query and key (B, H, N, d), with their positions."""
        query, key = (apply_rotary(x, rotary).transpose(1, 2) for x in (query, key))
        return query, key

    def encode(self, images: Tensor) -> Tensor:
        """Return pixels in [-1, 1] of pixels in [0, 1]."""
        return images * 2 - 1

    def predict(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Return the predicted v, in the dtype of the sample."""
        return self.network(sample.to(get_dtype(self.network)), timestep).to(sample.dtype)
