"""Networks that TRACE can read, one file per family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from trace_fast.backbones.base import Backbone, Settings
from trace_fast.backbones.flux import FluxBackbone
from trace_fast.backbones.mini import MiniBackbone
from trace_fast.backbones.pixart import PixArtBackbone
from trace_fast.backbones.sd3 import SD3Backbone
from trace_fast.backbones.unet import UNetBackbone

__all__ = ["Backbone", "Settings", "backbone_of", "load_backbone", "models"]

FAMILIES = {"mini": MiniBackbone}
PIPELINES: dict[str, Any] = {  # by the class of a pipeline's network
    "UNet2DConditionModel": UNetBackbone,
    "PixArtTransformer2DModel": PixArtBackbone,
    "SD3Transformer2DModel": SD3Backbone,
    "FluxTransformer2DModel": FluxBackbone,
}
WEIGHTS = Path(__file__).parent.parent / "weights"  # the embedded models, one folder each


def models() -> tuple[str, ...]:
    """Names that `edges(model=...)` knows."""
    return tuple(sorted(path.parent.name for path in WEIGHTS.glob("*/config.json")))


def load_backbone(model: str | Path) -> Backbone:
    """Read a backbone from a known name or a local folder of config.json and model.safetensors.

    Raises:
        ValueError: the name is unknown, or the folder's configuration or weights are damaged or do not fit each other.
    """
    folder = WEIGHTS / model if model in models() else Path(model)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"load: model must be one of {', '.join(models())}, or a folder with config.json and model.safetensors, "
            f"got {str(model)!r}"
        )
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["family"] not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {config['family']!r}")
        return FAMILIES[config["family"]].from_folder(folder, config)
    except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"load: model must be a folder of matching files, got {str(folder)!r}: {error}") from error


def backbone_of(pipe: Any, null_text: dict[str, Tensor] | None = None, size: tuple[int, int] | None = None) -> Backbone:
    """A diffusers pipeline as a backbone; see `Tracer.from_pipeline`."""
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    # a compiled network is wrapped
    kind = type(getattr(network, "_orig_mod", network)).__name__
    if kind not in PIPELINES:
        raise TypeError(
            f"from_pipeline: pipe must hold one of {', '.join(PIPELINES)}, got {type(pipe).__name__} with {kind}"
        )
    return PIPELINES[kind].from_pipeline(pipe, null_text, size)
