"""Models known by a short name: where they live, what they are traced at, and on what terms."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MODELS", "Model"]


@dataclass(frozen=True)
class Model:
    """A model of a hub.

    Attributes:
        repo: repository of the hub.
        size: native processing size, a square of so many pixels.
        grid: tokens along a side of its finest attention at that size.
        parameters: of the network that is traced, in billions.
        licence: its terms, in short; gated repositories must be accepted on the hub first.
        gated: whether they must.
        encoder: whether it has no noise levels, so that ABDiv alone is read.
    """

    repo: str
    size: int
    grid: int
    parameters: float
    licence: str
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
    "dinov2-b": Model("facebook/dinov2-base", 518, 37, 0.09, "Apache-2.0", encoder=True),
    "dinov2-g": Model("facebook/dinov2-giant", 518, 37, 1.14, "Apache-2.0", encoder=True),
    "dinov3-l": Model("facebook/dinov3-vitl16-pretrain-lvd1689m", 224, 14, 0.3, "DINOv3", True, encoder=True),
    "dinov3-7b": Model("facebook/dinov3-vit7b16-pretrain-lvd1689m", 224, 14, 6.72, "DINOv3", True, encoder=True),
    "eva02-l": Model("timm/eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", 448, 32, 0.31, "MIT", encoder=True),
    "eva02-e": Model("timm/eva02_enormous_patch14_clip_224.laion2b_plus", 224, 16, 4.35, "MIT", encoder=True),
    "llava-1.5-7b": Model("llava-hf/llava-1.5-7b-hf", 336, 24, 0.3, "Llama 2 Community", encoder=True),
    "qwen2.5-vl-7b": Model("Qwen/Qwen2.5-VL-7B-Instruct", 896, 64, 0.68, "Apache-2.0", encoder=True),
}
