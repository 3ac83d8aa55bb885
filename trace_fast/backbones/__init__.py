"""Networks that TRACE can read, one file per family."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trace_fast.backbones.base import Backbone, Settings
from trace_fast.backbones.encoder import EncoderBackbone
from trace_fast.backbones.flux import FluxBackbone
from trace_fast.backbones.language import LlavaLanguageBackbone, QwenLanguageBackbone
from trace_fast.backbones.latent import get_network
from trace_fast.backbones.loading import OFFLOADS, is_encoder, is_student, load_encoder, load_pipeline, to_device
from trace_fast.backbones.mini import MiniBackbone
from trace_fast.backbones.pixart import PixArtBackbone
from trace_fast.backbones.registry import MODELS
from trace_fast.backbones.sd3 import SD3Backbone
from trace_fast.backbones.unet import UNetBackbone
from trace_fast.backbones.vit import DINOv2Backbone, DINOv3Backbone, EvaBackbone
from trace_fast.backbones.vlm import CLIPBackbone, QwenBackbone

__all__ = [
    "Backbone",
    "Settings",
    "has_student",
    "load_backbone",
    "models",
    "student_folder",
    "wrap_encoder",
    "wrap_pipeline",
]

FAMILIES = {"mini": MiniBackbone}
PIPELINES: dict[str, Any] = {  # by the class of a pipeline's network
    "UNet2DConditionModel": UNetBackbone,
    "PixArtTransformer2DModel": PixArtBackbone,
    "SD3Transformer2DModel": SD3Backbone,
    "FluxTransformer2DModel": FluxBackbone,
}
ENCODERS: dict[str, type[EncoderBackbone]] = {  # by the class of the encoder
    "Dinov2Model": DINOv2Backbone,
    "Dinov2WithRegistersModel": DINOv2Backbone,
    "DINOv3ViTModel": DINOv3Backbone,
    "Eva": EvaBackbone,
    "CLIPVisionModel": CLIPBackbone,
    "Qwen2_5_VisionTransformerPretrainedModel": QwenBackbone,
}
LANGUAGES: dict[str, type[EncoderBackbone]] = {  # by the class of the whole model
    "LlavaForConditionalGeneration": LlavaLanguageBackbone,
    "Qwen2_5_VLForConditionalGeneration": QwenLanguageBackbone,
}
READ = {"vision": ENCODERS, "language": LANGUAGES}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHTS = Path(__file__).parent.parent / "weights"  # the embedded models, one folder each


def models() -> tuple[str, ...]:
    """Names that `edges(model=...)` knows: those embedded in the package, then those of a hub."""
    return (*_embedded(), *MODELS)


def _embedded() -> tuple[str, ...]:
    return tuple(sorted(path.parent.name for path in WEIGHTS.glob("*/config.json")))


def student_folder(model: str | Path) -> Path | None:
    """Where the student of an embedded model lies, or of a folder: in itself or in its `student`; None without one."""
    folder = WEIGHTS / model if model in _embedded() else Path(model)
    return next((place for place in (folder, folder / "student") if (place / "decoder.safetensors").is_file()), None)


def has_student(model: str | Path) -> bool:
    """Whether a model has a student, or is one: an embedded model, a folder, or a repository of the hub."""
    if student_folder(model) is not None:
        return True
    name = str(model)
    known = name in models() or Path(model).exists() or REPOSITORY.fullmatch(name) is None
    return not known and is_student(name)


def load_backbone(
    model: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    size: tuple[int, int] | None = None,
    offload: str | None = None,
    empty_prompt: dict[str, Tensor] | None = None,
    **hub: Any,
) -> Backbone:
    """Read a backbone onto a device: see `Tracer.from_pretrained`.

    With `empty_prompt`, what stands for the empty prompt, the text encoders of a diffusers model are not needed.

    Raises:
        ValueError: the name is unknown, or the folder's configuration or weights are damaged or do not fit each other.
        RuntimeError: the model's repository or the memory does not allow it.
    """
    if dtype not in (None, *DTYPES):
        accepted = " or ".join(str(each) for each in DTYPES)
        raise TypeError(f"load: dtype must be {accepted}, got {dtype!r}")
    if offload not in (None, *OFFLOADS):
        raise ValueError(f"load: offload must be one of {', '.join(OFFLOADS)}, or None, got {offload!r}")
    folder = WEIGHTS / model if model in _embedded() else Path(model)
    if (folder / "config.json").is_file() and not _of_others(folder):
        backbone = _load_embedded(folder, size)
        backbone.network.eval().requires_grad_(False).to(dtype or torch.float32)
        return to_device(backbone, device, offload)
    if (
        str(model) not in MODELS
        and not any((folder / name).is_file() for name in ("config.json", "model_index.json"))
        and not REPOSITORY.fullmatch(str(model))
    ):
        raise ValueError(
            f"load: model must be one of {', '.join(models())}, a repository of the hub (owner/name), or a folder with "
            f"config.json and model.safetensors or in the layout of diffusers, got {str(model)!r}"
        )
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if is_encoder(str(model), **hub):
        network, colours = load_encoder(str(model), device=device, dtype=dtype, offload=offload, **hub)
        return to_device(wrap_encoder(network, size=size, **colours), device, offload)
    options: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "offload": offload,
        "empty_prompt": empty_prompt,
        **hub,
    }
    pipe, embedded = load_pipeline(str(model), PIPELINES, **options)
    return to_device(wrap_pipeline(pipe, embedded, size), device, offload)


def _of_others(folder: Path) -> bool:
    """Whether a config.json is that of transformers or timm, and not one of ours."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError:  # told when it is loaded
        return False
    return isinstance(config, dict) and not {"model_type", "architecture"}.isdisjoint(config) and "family" not in config


def _load_embedded(folder: Path, size: tuple[int, int] | None) -> Backbone:
    """A network of our own, from config.json and model.safetensors."""
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["family"] not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {config['family']!r}")
        backbone = FAMILIES[config["family"]].from_folder(folder, config)
    except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"load: model must be a folder of matching files, got {str(folder)!r}: {error}") from error
    return backbone if size is None else type(backbone)(backbone.network, replace(backbone.settings, size=size))


def wrap_pipeline(
    pipe: Any, empty_prompt: dict[str, Tensor] | None = None, size: tuple[int, int] | None = None
) -> Backbone:
    """A diffusers pipeline as a backbone; see `Tracer.from_pipeline`."""
    network = get_network(pipe)
    # a compiled network is wrapped
    kind = type(getattr(network, "_orig_mod", network)).__name__
    if kind not in PIPELINES:
        raise TypeError(
            f"from_pipeline: pipe must hold one of {', '.join(PIPELINES)}, got {type(pipe).__name__} with {kind}"
        )
    return PIPELINES[kind].from_pipeline(pipe, empty_prompt, size)


def wrap_encoder(
    model: Any,
    *,
    read: str = "vision",
    size: tuple[int, int] | None = None,
    blocks: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Backbone:
    """An encoder of transformers or timm, or what holds one, as a backbone; see `Tracer.from_encoder`."""
    if read not in READ:
        raise ValueError(f"from_encoder: read must be one of {', '.join(READ)}, got {read!r}")
    families = READ[read]
    for module in model.modules() if isinstance(model, nn.Module) else ():
        kind = type(getattr(module, "_orig_mod", module)).__name__  # a compiled network is wrapped
        if kind in families:
            return families[kind].from_model(module, size=size, blocks=blocks, mean=mean, std=std)
    raise TypeError(f"from_encoder: model must be or hold one of {', '.join(families)}, got {type(model).__name__}")
