"""The interface of a network that can be traced: the base class of every family."""

from __future__ import annotations

import abc
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trace_fast.backbones.capture import AttendBlock, AttentionLayout, Capture, CaptureError, OnAttention
from trace_fast.backbones.schedule import Schedule
from trace_fast.io.pictures import MAX_PIXELS
from trace_fast.ops import checks
from trace_fast.ops.constants import cache_constants
from trace_fast.ops.dispatch import LEAST_CAPABILITY, get_capability

__all__ = [
    "NOISINGS",
    "STEPS",
    "Backbone",
    "Settings",
    "check_noising",
    "check_timestep",
    "constant",
    "default_dtype",
    "get_device",
    "get_dtype",
    "load_weights",
]

STEPS = 1000  # timesteps are 0 .. STEPS - 1, from image to noise
NOISINGS = ("inversion", "gaussian")


def check_timestep(timestep: Any) -> int | None:
    """Return a timestep as an integer, or None for "iep".

    Raises:
        TypeError: it is neither.
        ValueError: it is not from 0 to STEPS - 1.
    """
    if isinstance(timestep, str) and timestep == "iep":
        return None
    try:
        value = operator.index(timestep)
    except TypeError:
        value = None
    if value is None or isinstance(timestep, bool):
        raise TypeError(f"trace: timestep must be 'iep' or an integer, got {timestep!r}")
    if not 0 <= value < STEPS:
        raise ValueError(f"trace: timestep must be from 0 to {STEPS - 1}, got {value}")
    return value


def check_noising(noising: Any) -> str:
    """Return a way of noising, one of `NOISINGS`; raise ValueError for another."""
    checks.choice("trace", "noising", noising, *NOISINGS)
    return str(noising)


@dataclass(frozen=True)
class Settings:
    """How a backbone prefers to be traced. A call may choose another timestep, noising or blocks.

    Attributes:
        size: processing size in pixels, (height, width); images are squashed to it and edges stretched back.
        timestep: "iep" for the peak of the KL curve, or a fixed timestep.
        noising: "inversion" (deterministic) or "gaussian" (independent timesteps).
        blocks: indices of the self-attention blocks that are averaged; None for all of them.
        edge_scale: s of the edge probability 1 - exp(-ABDiv / s), in nats, from 1e-6 to 1e6.
        contour_threshold: edge probability from which a pixel is best called a contour.
        region_threshold: mean edge probability from which a boundary best separates two regions.
        reason: why a preference differs from the paper's, with the figure that decided it.

    Raises:
        TypeError, ValueError: a value is not what is said above.
    """

    size: tuple[int, int]
    timestep: str | int = "iep"
    noising: str = "inversion"
    blocks: tuple[int, ...] | None = None
    edge_scale: float = 0.1
    contour_threshold: float = 0.5
    region_threshold: float = 0.5
    reason: str = ""

    def __post_init__(self) -> None:
        size = self.size
        if not isinstance(size, tuple) or len(size) != 2 or not all(isinstance(s, Integral) and s > 0 for s in size):
            raise ValueError(f"settings: size must be a tuple (height, width) of positive integers, got {size!r}")
        if size[0] * size[1] > MAX_PIXELS:
            raise ValueError(f"settings: size must be at most {MAX_PIXELS} pixels, got {size[0]} x {size[1]}")
        # a divergence is divided by it in float32
        if not isinstance(self.edge_scale, Real) or not 1e-6 <= self.edge_scale <= 1e6:
            raise ValueError(f"settings: edge_scale must be from 1e-6 to 1e6, got {self.edge_scale!r}")
        for name in ("contour_threshold", "region_threshold"):
            threshold = getattr(self, name)
            if not isinstance(threshold, Real) or not 0 < threshold <= 1:
                raise ValueError(f"settings: {name} must be above 0 and at most 1, got {threshold!r}")
        check_timestep(self.timestep)
        check_noising(self.noising)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """Return settings of JSON values; raise TypeError for unknown names."""
        known = {entry.name for entry in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise TypeError(f"unknown tracing settings {unknown}, known are {sorted(known)}")
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists})


class Backbone(abc.ABC):
    """A denoising network, or an encoder, whose self-attention can be read. A family is a subclass in its own file.

    A family declares what the attention modules of its networks are made of; `registry` names it.

    Attributes:
        LAYOUTS: the kinds of self-attention module that these networks have.
        network: the module that is run; it stays in evaluation mode and needs no gradients.
        settings: how it prefers to be traced.
        schedule: what its timesteps mean; None for an encoder, which has none and is read at 0 alone.
    """

    LAYOUTS: ClassVar[tuple[AttentionLayout, ...]]
    network: Any
    settings: Settings
    schedule: Schedule | None

    @abc.abstractmethod
    def attentions(self) -> list[nn.Module]:
        """Return the self-attention modules, in the order in which they run."""

    @abc.abstractmethod
    def grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the token grid (h, w) of every self-attention, in the same order.

        Args:
            size: processing size in pixels, (height, width).

        Raises:
            ValueError: the network does not allow the size.
        """

    def read_grids(self, size: tuple[int, int] | None = None) -> list[tuple[int, int]]:
        """Return the token grids (h, w) of the blocks that are read, in order.

        Args:
            size: processing size in pixels, (height, width); None is that of the settings.

        Raises:
            ValueError: the network does not allow the size.
        """
        grids, blocks = self.grids(size or self.settings.size), self.settings.blocks
        return grids if blocks is None else [grids[block] for block in blocks]

    def finest_grid(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Return the token grid (h, w) of the map that is averaged over the blocks: the finest of `read_grids`."""
        return max(self.read_grids(size), key=math.prod)

    @abc.abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Return clean latents (B, C, ...) of images (B, 3, H, W) in [0, 1]."""

    @abc.abstractmethod
    def predict(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Call the network at timesteps (B,): the prediction, shaped like `sample`, or an encoder's features."""

    @abc.abstractmethod
    def attention_inputs(self, module: nn.Module, query: Tensor, key: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        """Return query and key (B, H, T, d) exactly as attention receives them.

        Args:
            module: a self-attention module.
            query: what its layer `AttentionLayout.query` returned.
            key: what its layer `AttentionLayout.key` returned.
            rotary: the rotary embedding that the module received; None if there is none.

        Returns:
            Query, of T tokens in the order of the module's sequence, and key, of which several heads may share one.
        """

    def image_tokens(self, count: int) -> slice:
        """Return where the image's tokens stand, at the start or at the end of what attention receives.

        `attention_inputs` returns all of it, or the part that the image's own layers make.
        """
        return slice(-count, None)

    def find_layout(self, module: nn.Module) -> AttentionLayout:
        """Return the layout of a self-attention module.

        Raises:
            CaptureError: it has other layers than the family declares.
        """
        for layout in self.LAYOUTS:
            if layout.fits(module):
                return layout
        declared = " or ".join(" and ".join(dict.fromkeys((layout.query, layout.key))) for layout in self.LAYOUTS)
        others = sorted(set().union(*(layout.others for layout in self.LAYOUTS)))
        children = ", ".join(sorted(name for name, _ in module.named_children()))
        raise CaptureError(
            f"Capture: every self-attention must have the layers {declared}, and beside them none but "
            f"{', '.join(others)}, got {type(module).__name__} with {children or 'no layers'}; this version of "
            f"{type(module).__module__.partition('.')[0]} may be too old or too new"
        )

    def capture(
        self, on_attention: OnAttention, blocks: Sequence[int] | None = None, attend: AttendBlock | None = None
    ) -> Capture:
        """Return the context in which blocks pass their query and key to `on_attention`; see `Capture`.

        Args:
            on_attention: called as on_attention(index, query, key, lse, others).
            blocks: indices of the blocks that are read; None for those of the settings.
            attend: called as attend(index, query, key, value, first) where one pass attends and makes the map.
        """
        return Capture(self, on_attention, self.settings.blocks if blocks is None else blocks, attend)


@cache_constants(maxsize=64)
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return numbers (N,) on a device, copied there once: a copy makes the host wait, and breaks a graph."""
    return torch.tensor(values, dtype=dtype, device=device)


def get_device(network: nn.Module) -> torch.device:
    """Return the device that a network runs on: its own, or the one that accelerate or diffusers move it to."""
    resting = next(network.parameters()).device
    offloaded = hasattr(network, "_hf_hook") or resting.type in ("cpu", "meta")  # or weights would not rest there
    for module in network.modules() if offloaded else ():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        registry: Any = getattr(module, "_diffusers_hook", None)
        if registry is not None and (hook := registry.get_hook("group_offloading")) is not None:
            device = hook.group.onload_device
        if device is not None:
            return torch.device(device)
    return resting


def default_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of weights on a device: bfloat16 on a GPU, float16 on one without bfloat16, else float32."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if get_capability(device) >= LEAST_CAPABILITY else torch.float16


def get_dtype(network: Any) -> torch.dtype:
    """Return the dtype that a network computes in, which it may say itself: weights may be kept in fewer bits."""
    dtype = getattr(network, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else next(network.parameters()).dtype


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file as float32.

    Raises:
        ValueError: the file is damaged, or holds a number that is not finite.
    """
    try:
        weights = {name: value.float() for name, value in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
    if broken := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise ValueError(f"{path.name} holds numbers that are not finite in {broken[0]}")
    return weights
