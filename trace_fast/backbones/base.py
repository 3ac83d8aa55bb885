"""What the tracer needs to know of a network: the one protocol every family implements."""

from __future__ import annotations

import functools
import math
import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trace_fast.backbones.capture import Capture
from trace_fast.backbones.schedule import Schedule

__all__ = [
    "NOISINGS",
    "STEPS",
    "Backbone",
    "Settings",
    "Turns",
    "check_noising",
    "check_timestep",
    "constant",
    "device_of",
    "dtype_of",
    "load_weights",
]

STEPS = 1000  # noise levels are 0 .. STEPS - 1, from image to noise
NOISINGS = ("inversion", "gaussian")


class Turns:
    """A lock for calls from several threads; what holds it can be copied and pickled, with one of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()


def check_timestep(timestep: Any) -> int | None:
    """A fixed level as an integer, or None for "iep"."""
    if isinstance(timestep, str) and timestep == "iep":
        return None
    try:
        level = operator.index(timestep)
    except TypeError:
        level = None
    if level is None or isinstance(timestep, bool):
        raise TypeError(f"trace: timestep must be 'iep' or an integer level, got {timestep!r}")
    if not 0 <= level < STEPS:
        raise ValueError(f"trace: timestep must be from 0 to {STEPS - 1}, got {level}")
    return level


def check_noising(noising: Any) -> str:
    """One of `NOISINGS`."""
    if noising not in NOISINGS:
        raise ValueError(f"trace: noising must be one of {', '.join(NOISINGS)}, got {noising!r}")
    return str(noising)


@dataclass(frozen=True)
class Settings:
    """How a backbone prefers to be traced. A call may choose another timestep, noising or blocks.

    Attributes:
        size: processing size in pixels, (height, width); images are squashed to it and edges stretched back.
        timestep: "iep" for the peak of the KL curve, or a fixed noise level.
        noising: "inversion" (deterministic) or "gaussian" (independent levels).
        blocks: indices of the self-attention blocks that are averaged; None for all of them.
        edge_scale: s of the edge probability 1 - exp(-ABDiv / s), in nats.
        reason: why a preference differs from the paper's, with the figure that decided it.

    Raises:
        TypeError, ValueError: a value is not what is said above.
    """

    size: tuple[int, int]
    timestep: str | int = "iep"
    noising: str = "inversion"
    blocks: tuple[int, ...] | None = None
    edge_scale: float = 0.1
    reason: str = ""

    def __post_init__(self) -> None:
        size = self.size
        if not isinstance(size, tuple) or len(size) != 2 or not all(isinstance(s, Integral) and s > 0 for s in size):
            raise ValueError(f"settings: size must be (height, width), positive integers, got {size!r}")
        if not isinstance(self.edge_scale, Real) or not 0 < self.edge_scale < math.inf:
            raise ValueError(f"settings: edge_scale must be a positive number, got {self.edge_scale!r}")
        check_timestep(self.timestep)
        check_noising(self.noising)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """Settings from JSON values; unknown names raise TypeError."""
        known = {entry.name for entry in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise TypeError(f"unknown tracing settings {unknown}, known are {sorted(known)}")
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists})


class Backbone(Protocol):
    """A denoising network, or an encoder, whose self-attention can be read.

    Attributes:
        network: the module that is run; it stays in evaluation mode and needs no gradients.
        settings: how it prefers to be traced.
        schedule: what its noise levels mean; None for an encoder, which has none and is read at 0 alone.
    """

    settings: Settings

    @property
    def schedule(self) -> Schedule | None:
        """What its noise levels mean; None for an encoder."""

    @property
    def network(self) -> nn.Module:
        """The module that is run."""

    def attentions(self) -> list[nn.Module]:
        """The self-attention modules, in the order in which they run."""

    def grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Token grid (h, w) of every self-attention, in the same order, at a processing size (height, width) in pixels.

        Raises ValueError where the network does not allow the size.
        """

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to clean latents (B, C, ...)."""

    def predict(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """One call of the network at levels (B,): the prediction, shaped like `sample`, or an encoder's features."""

    @property
    def capture(
        self,
    ) -> Callable[[Sequence[nn.Module], Callable[[int, Tensor, Tensor], None], Sequence[int]], Capture]:
        """Makes the context in which modules hand query and key to a sink, from (modules, sink, tokens): `Capture`."""


@functools.lru_cache(maxsize=64)
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers (N,) where they are used, copied there once: a copy makes the host wait, and breaks a graph."""
    return torch.tensor(values, dtype=dtype, device=device)


def device_of(network: nn.Module) -> torch.device:
    """Where a network runs: where it is, or where accelerate or diffusers bring it or its layers."""
    resting = next(network.parameters()).device
    offloaded = hasattr(network, "_hf_hook") or resting.type in ("cpu", "meta")  # or weights would not rest there
    for module in network.modules() if offloaded else ():
        place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        registry: Any = getattr(module, "_diffusers_hook", None)
        if registry is not None and (hook := registry.get_hook("group_offloading")) is not None:
            place = hook.group.onload_device
        if place is not None:
            return torch.device(place)
    return resting


def dtype_of(network: Any) -> torch.dtype:
    """What a network computes in: its own word where it has one, since weights may be kept in fewer bits."""
    dtype = getattr(network, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else next(network.parameters()).dtype


def load_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file as float32; ValueError where it is damaged or holds a number that is not finite."""
    try:
        weights = {name: value.float() for name, value in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
    if broken := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise ValueError(f"{path.name} holds numbers that are not finite in {broken[0]}")
    return weights
