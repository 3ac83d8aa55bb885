"""The interface that `Tracer` and `Detector` share: a backbone, its device and size, and `edges`."""

from __future__ import annotations

import abc
import copy
import hashlib
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from trace_fast.backbones import Backbone
from trace_fast.backbones.base import get_device, get_dtype
from trace_fast.io.images import check_channel_order
from trace_fast.io.notebook import format_html
from trace_fast.ops import checks

__all__ = ["EdgeModel", "require_finite"]

SAMPLED = 4096  # numbers of each tensor, at most twice as many, that identify a model's weights


def require_finite(edges: Tensor, name: str) -> Tensor:
    """Return edges, and refuse those that are not numbers.

    Edges on a GPU are returned as they are, since the host must not wait for them; they are checked when they come to
    the host as an array or a picture.

    Args:
        edges: of any shape, float.
        name: of the model, for the message.

    Raises:
        RuntimeError: a value is not finite.
    """
    if edges.device.type == "cpu" and not edges.isfinite().all():
        raise RuntimeError(
            f"edges: model must give finite numbers, got NaN from {name}; its weights are damaged, or too large for "
            "its dtype: load it with dtype=torch.float32"
        )
    return edges


class EdgeModel(abc.ABC):
    """A model that turns images into instance edges.

    Args:
        backbone: the network whose self-attention is read.
        name: of the model, for outputs and messages.

    Attributes:
        channel_order: order of the color channels in the arrays and tensors that the model is called with, "rgb" or
            "bgr"; see `reordered`.
    """

    def __init__(self, backbone: Backbone, name: str):
        self.backbone = backbone
        self.name = name
        self.channel_order = "rgb"

    @abc.abstractmethod
    def edges(self, pixels: Tensor, *, seed: int = 0) -> Tensor:
        """Return the edge probability of a batch of images.

        Args:
            pixels: (B, 3, H, W) float32 in [0, 1], RGB whatever `channel_order` is.
            seed: seed of the Gaussian noise, where the model draws any.

        Returns:
            (B, 1, H, W) float32 in [0, 1], on the device of `pixels`.
        """

    @property
    def device(self) -> torch.device:
        """The device that the network runs on, which is not where offloaded weights are kept."""
        return get_device(self.backbone.network)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the network computes in."""
        return get_dtype(self.backbone.network)

    @property
    def size(self) -> tuple[int, int]:
        """The processing size in pixels, (height, width), that images are resized to."""
        return self.backbone.settings.size

    @property
    @abc.abstractmethod
    def timestep(self) -> int | str:
        """The timestep whose attention is read: an integer from 0 to 999, or "iep" where it is searched."""

    @property
    def contour_threshold(self) -> float:
        """The edge probability from which a pixel is best called a contour; 0.5 if that was not measured."""
        return self.backbone.settings.contour_threshold

    @property
    def region_threshold(self) -> float:
        """The mean edge probability from which a boundary best separates two regions; 0.5 if that was not measured."""
        return self.backbone.settings.region_threshold

    def hash_weights(self) -> str:
        """Return a text that identifies the weights: the SHA-256 of a sample of each tensor, in hexadecimal.

        It differs between a model and the same one with other weights, trained further for example. Of layers whose
        weights are elsewhere, as of a model that is offloaded layer by layer, it holds the shapes alone.
        """
        modules = [self.backbone.network, *([self.decoder] if hasattr(self, "decoder") else [])]
        tensors = [parameter for module in modules for parameter in module.parameters()]
        digest = hashlib.sha256()
        for tensor in (*tensors, *getattr(self.backbone, "empty_prompt", {}).values()):
            # a part of billions identifies them
            sample = tensor.detach().flatten()[:: max(1, tensor.numel() // SAMPLED)]
            digest.update(
                str(tuple(tensor.shape)).encode() if tensor.is_meta else sample.float().cpu().numpy().tobytes()
            )
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Self:
        """Move all modules to a device, in place, and return the model.

        Args:
            device: where to run from now on.

        Raises:
            TypeError: `device` is a dtype; choose a dtype when you load the model.
            ValueError: `device` is no torch device.
            RuntimeError: the device is not present, or the model is offloaded, so that its place is managed already.
        """
        if isinstance(device, torch.dtype):
            raise TypeError(f"to: device must be a torch device, got {device}; give `dtype` when the model is loaded")
        target = checks.device("to", device)
        if any(hasattr(module, "_hf_hook") for module in self._modules()):
            raise RuntimeError("to: the model must not be offloaded; load it again with the device that you want")
        for module in self._modules():
            module.to(target)
        return self

    def resized(self, size: tuple[int, int]) -> Self:
        """Return the same model at another processing size; weights are shared.

        Args:
            size: (height, width) in pixels, in multiples that the network allows.

        Raises:
            ValueError: the network does not allow the size.
        """
        if size == self.size:
            return self
        model = copy.copy(self)
        model.backbone = copy.copy(self.backbone)
        model.backbone.settings = replace(self.backbone.settings, size=size)
        model.backbone.grids(size)  # refuses a size that the network does not allow
        return model

    def reordered(self, channel_order: str) -> Self:
        """Return the same model for arrays and tensors of another order of color channels; weights are shared.

        Args:
            channel_order: "rgb" or "bgr", for calls that do not state it. `edges` takes RGB in any case.

        Raises:
            ValueError: the order is unknown.
        """
        check_channel_order(channel_order)
        if channel_order == self.channel_order:
            return self
        model = copy.copy(self)
        model.channel_order = channel_order
        return model

    def _modules(self) -> list[nn.Module]:
        """Return the modules that run."""
        parts = [self.backbone.network, getattr(self.backbone, "vae", None)]
        return [part for part in parts if part is not None]

    def _repr_html_(self) -> str:
        """Return what a notebook shows: a table of what the model is and where it runs."""
        facts = {
            "model": self.name,
            "processing size": self.size,
            "timestep": self.timestep,
            "device": self.device,
            "dtype": self.dtype,
            "channel order": self.channel_order,
            "contour threshold": self.contour_threshold,
            "region threshold": self.region_threshold,
        }
        return format_html(type(self).__name__, facts)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name!r}, size={self.size}, timestep={self.timestep!r}, "
            f"device='{self.device}', dtype={self.dtype})"
        )
