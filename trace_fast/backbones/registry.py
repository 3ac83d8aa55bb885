"""Tables of known names: network classes with the families that read them, and models of the hub.

A new family is one line in a table of families, a new model of the hub is one line in `MODELS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "EMBEDDED",
    "ENCODER_FAMILIES",
    "LANGUAGE_FAMILIES",
    "MODELS",
    "NETWORK_FAMILIES",
    "PIPELINE_FAMILIES",
    "UNSUPPORTED",
    "Model",
    "embedded_models",
    "explain_refusal",
    "find_family",
    "models",
]

EMBEDDED = Path(__file__).parent.parent / "weights"  # one folder per embedded model

# "module:class" in this package, by the class of the network that a diffusers pipeline holds
PIPELINE_FAMILIES: dict[str, str] = {
    "UNet2DConditionModel": "unet:UNetBackbone",
    "PixArtTransformer2DModel": "pixart:PixArtBackbone",
    "SD3Transformer2DModel": "sd3:SD3Backbone",
    "FluxTransformer2DModel": "flux:FluxBackbone",
    "Flux2Transformer2DModel": "flux2:Flux2Backbone",
    "QwenImageTransformer2DModel": "qwen_image:QwenImageBackbone",
    "ZImageTransformer2DModel": "z_image:ZImageBackbone",
}
# by the class of an encoder of transformers or timm
ENCODER_FAMILIES: dict[str, str] = {
    "Dinov2Model": "vit:DINOv2Backbone",
    "Dinov2WithRegistersModel": "vit:DINOv2Backbone",
    "DINOv3ViTModel": "vit:DINOv3Backbone",
    "Eva": "vit:EvaBackbone",
    "CLIPVisionModel": "vlm:CLIPBackbone",
    "Qwen2_5_VisionTransformerPretrainedModel": "vlm:QwenBackbone",
}
# by the class of a whole vision-language model, whose language model is read
LANGUAGE_FAMILIES: dict[str, str] = {
    "LlavaForConditionalGeneration": "language:LlavaLanguageBackbone",
    "Qwen2_5_VLForConditionalGeneration": "language:QwenLanguageBackbone",
}
# by the name that the config.json of a network of this package gives its family
NETWORK_FAMILIES: dict[str, str] = {"mini": "mini:MiniBackbone"}
# why a class of network that is known cannot be read
UNSUPPORTED: dict[str, str] = {
    "SanaTransformer2DModel": "its attention is linear, which computes no attention map",
}


@dataclass(frozen=True)
class Model:
    """A model of the hub.

    Attributes:
        repository: its name on the hub, owner/name.
        size: side of the square that it was trained on, in pixels.
        grid: tokens along a side of its finest self-attention at that size.
        billions: parameters of the network that is read, in billions.
        license: its terms, in short.
        gated: whether the terms must be accepted on the hub before a download.
        encoder: whether it is an encoder, which has no timesteps: ABDiv alone is read.
    """

    repository: str
    size: int
    grid: int
    billions: float
    license: str
    gated: bool = False
    encoder: bool = False


MODELS: dict[str, Model] = {
    "sd15": Model("stable-diffusion-v1-5/stable-diffusion-v1-5", 512, 64, 0.86, "CreativeML Open RAIL-M"),
    "sdxl": Model("stabilityai/stable-diffusion-xl-base-1.0", 1024, 64, 2.57, "CreativeML Open RAIL++-M"),
    "pixart": Model("PixArt-alpha/PixArt-XL-2-1024-MS", 1024, 64, 0.61, "CreativeML Open RAIL++-M"),
    "pixart-512": Model("PixArt-alpha/PixArt-XL-2-512x512", 512, 32, 0.61, "CreativeML Open RAIL++-M"),
    "sd3.5-medium": Model("stabilityai/stable-diffusion-3.5-medium", 1024, 64, 2.24, "Stability Community", True),
    "sd3.5-large": Model("stabilityai/stable-diffusion-3.5-large", 1024, 64, 8.06, "Stability Community", True),
    "flux.1-schnell": Model("black-forest-labs/FLUX.1-schnell", 1024, 64, 11.9, "Apache-2.0", True),
    "flux.1-dev": Model("black-forest-labs/FLUX.1-dev", 1024, 64, 11.9, "FLUX.1 dev Non-Commercial", True),
    "flux.2-dev": Model("black-forest-labs/FLUX.2-dev", 1024, 64, 32.2, "FLUX Non-Commercial", True),
    "qwen-image": Model("Qwen/Qwen-Image", 1024, 64, 20.4, "Apache-2.0"),
    "z-image-turbo": Model("Tongyi-MAI/Z-Image-Turbo", 1024, 64, 6.15, "Apache-2.0"),
    "dinov2-b": Model("facebook/dinov2-base", 518, 37, 0.09, "Apache-2.0", encoder=True),
    "dinov2-g": Model("facebook/dinov2-giant", 518, 37, 1.14, "Apache-2.0", encoder=True),
    "dinov3-l": Model("facebook/dinov3-vitl16-pretrain-lvd1689m", 224, 14, 0.3, "DINOv3", True, encoder=True),
    "dinov3-7b": Model("facebook/dinov3-vit7b16-pretrain-lvd1689m", 224, 14, 6.72, "DINOv3", True, encoder=True),
    "eva02-l": Model("timm/eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", 448, 32, 0.31, "MIT", encoder=True),
    "eva02-e": Model("timm/eva02_enormous_patch14_clip_224.laion2b_plus", 224, 16, 4.35, "MIT", encoder=True),
    "llava-1.5-7b": Model("llava-hf/llava-1.5-7b-hf", 336, 24, 0.3, "Llama 2 Community", encoder=True),
    "qwen2.5-vl-7b": Model("Qwen/Qwen2.5-VL-7B-Instruct", 896, 64, 0.68, "Apache-2.0", encoder=True),
}


def embedded_models() -> tuple[str, ...]:
    """Return the names of the models that are part of this package.

    Returns:
        Names in alphabetical order, each the name of a folder in `EMBEDDED`.
    """
    return tuple(sorted(path.parent.name for path in EMBEDDED.glob("*/config.json")))


def models() -> tuple[str, ...]:
    """Return the model names that `trace_fast.load` and `trace_fast.edges` know.

    Returns:
        The models that are part of this package, then those that are downloaded from the Hugging Face Hub.

    Example:
        >>> trace_fast.models()[:2]
        ('mini', 'sd15')
    """
    return (*embedded_models(), *MODELS)


def find_family(name: str, families: Mapping[str, str]) -> Any:
    """Return the class of the family that reads a network.

    Args:
        name: class of the network, or what else is a key of `families`.
        families: one of the tables of this module.

    Returns:
        The class, or None where the table does not have the name.
    """
    if name not in families:
        return None
    module, _, family = families[name].partition(":")
    return getattr(importlib.import_module(f"trace_fast.backbones.{module}"), family)


def explain_refusal(name: str, families: Mapping[str, str]) -> str:
    """Return the end of the error for a network that cannot be read: what it must be, and why it is not.

    Args:
        name: class of the network.
        families: the table that does not have it.

    Returns:
        "must hold ..., got ...".
    """
    if name in UNSUPPORTED:
        return f"must hold a network with attention maps, got {name}: {UNSUPPORTED[name]}"
    return f"must hold one of {', '.join(families)}, got {name}"
