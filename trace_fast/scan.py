"""The measurements of the search at every timestep of one image: the KL curve, its peak t*, and ABDiv."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trace_fast.tracer import TIMESTEPS, TraceOutput, Tracer, edge_probability

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Scan", "draw_abdiv", "scan_photo"]


@dataclass(frozen=True)
class Scan:
    """The measurements of the search at every timestep of one image.

    Attributes:
        output: of the search: the KL curve, its peak t*, and all timesteps.
        abdiv: (T, h, w) float32, nats, at every timestep.
        scale: s of the edge probability 1 - exp(-ABDiv / s), in nats.
    """

    output: TraceOutput
    abdiv: Tensor
    scale: float

    @property
    def timesteps(self) -> list[int]:
        """All timesteps, rising."""
        return [int(timestep) for timestep in self.output.timesteps]

    @property
    def read(self) -> int:
        """Index of the timestep that the model reads edges at."""
        return self.timesteps.index(int(self.output.timestep))

    @property
    def peak(self) -> int | None:
        """Index of t*, where the KL curve peaks; None of an encoder, which has no curve."""
        return None if self.output.kl is None else 1 + int(self.output.kl[0].argmax())

    def describe(self, index: int) -> str:
        """Return a line on a timestep: its number, the KL of the step to it, and whether it is t*."""
        text = f"t = {self.timesteps[index]}"
        if self.output.kl is not None and index:
            text += f", KL {float(self.output.kl[0, index - 1]):.3f}"
        return text + (", t*" if index == self.peak else "")


def scan_photo(tracer: Tracer, photo: Tensor, seed: int = 0) -> Scan:
    """Run the network at every timestep of the search, and measure KL and ABDiv.

    Args:
        tracer: the search.
        photo: (1, 3, H, W) float32 in [0, 1].
        seed: seed of the Gaussian noise, where the search draws any.

    Example:
        >>> scan_photo(Tracer.from_pretrained("mini", device="cpu"), torch.rand(1, 3, 48, 64)).abdiv.shape
        torch.Size([11, 32, 32])
    """
    settings, schedule = tracer.backbone.settings, tracer.backbone.schedule
    fixed = None if settings.timestep == "iep" else int(settings.timestep)
    timesteps = (0,) if schedule is None else tuple(sorted({*TIMESTEPS, *([] if fixed is None else [fixed])}))
    kl, abdiv = (part.cpu() for part in tracer.scan(photo, timesteps=timesteps, seed=seed))
    chosen = int(kl[0].argmax()) + 1 if fixed is None else timesteps.index(fixed)
    output = TraceOutput(
        edges=edge_probability(abdiv[:, chosen], settings.edge_scale, photo.shape[-2:]),
        timestep=torch.tensor([timesteps[chosen]]),
        timesteps=torch.tensor(timesteps),
        kl=kl if len(timesteps) > 1 else None,
        abdiv=abdiv[:, chosen],
        model=tracer.name,
        noising="none" if schedule is None else settings.noising,
        size=settings.size,
    )
    return Scan(output, abdiv[0], settings.edge_scale)


def draw_abdiv(scan: Scan, index: int, size: Sequence[int] | None = None) -> Image.Image:
    """Draw ABDiv at a timestep as edge probability, black for 0 and white for 1.

    Args:
        scan: of the image.
        index: of the timestep.
        size: (H, W) of the picture in pixels; None is the token grid.

    Example:
        >>> scan = scan_photo(Tracer.from_pretrained("mini", device="cpu"), torch.rand(1, 3, 48, 64))
        >>> draw_abdiv(scan, 0).size
        (32, 32)
    """
    from PIL import Image

    strength = scan.abdiv[None, index]
    edges = edge_probability(strength, scan.scale, strength.shape[1:] if size is None else size)
    return Image.fromarray((edges[0, 0] * 255).round().to(torch.uint8).numpy())
