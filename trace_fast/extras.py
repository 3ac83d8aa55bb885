"""Packages that the core does without: the extra that brings each, and the error where one is missing."""

from __future__ import annotations

import importlib.util

__all__ = ["EXTRAS", "require"]

# name of the import -> name in the package registry, extra of trace_fast
EXTRAS = {
    "accelerate": ("accelerate", "diffusion"),
    "cv2": ("opencv-python-headless", "eval"),
    "diffusers": ("diffusers", "diffusion"),
    "gradio": ("gradio", "app"),
    "faster_coco_eval": ("faster-coco-eval", "eval"),
    "huggingface_hub": ("huggingface_hub", "diffusion"),
    "matplotlib": ("matplotlib", "eval"),
    "pandas": ("pandas", "eval"),
    "peft": ("peft", "train"),
    "pillow_heif": ("pillow-heif", "heif"),
    "pyarrow": ("pyarrow", "data"),
    "pycocotools": ("pycocotools", "eval"),
    "ray": ("ray", "ray"),
    "scipy": ("scipy", "eval"),
    "skimage": ("scikit-image", "eval"),
    "starlette": ("gradio", "app"),  # which is made of it
    "timm": ("timm", "encoders"),
    "transformers": ("transformers", "encoders"),
    "typer": ("typer", "cli"),
}


def require(op: str, *packages: str, extra: str | None = None) -> None:
    """Refuse an operation whose packages are not installed.

    Args:
        op: named in the error.
        packages: names of imports, all of `EXTRAS`.
        extra: to name in the error; None is the one of the package in `EXTRAS`.

    Raises:
        RuntimeError: a package is missing; the message ends in the command that installs it.

    Example:
        >>> require("edges", "typer")
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            name, usual = EXTRAS[package]
            raise RuntimeError(f"{op}: {name} must be installed: pip install 'trace_fast[{extra or usual}]'")
