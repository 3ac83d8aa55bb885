"""Shapes that the kernels are measured on, the self-attention of the backbones, and more tiles to try."""

from __future__ import annotations

from typing import NamedTuple

from trace_fast.kernels.launch import Config

__all__ = ["EXTRA", "SHAPES", "Shape"]


class Shape(NamedTuple):
    """A number of blocks of one shape in one forward pass."""

    blocks: int
    heads: int
    tokens: int
    channels: int


# per image and network call, at the paper's null prompt; joint attention: image tokens alone
SHAPES: dict[str, tuple[Shape, ...]] = {
    "SD1.5 @512": (Shape(5, 8, 4096, 40), Shape(5, 8, 1024, 80), Shape(5, 8, 256, 160), Shape(1, 8, 64, 160)),
    "SDXL @1024": (Shape(10, 10, 4096, 64), Shape(60, 20, 1024, 64)),
    "PixArt @512": (Shape(28, 16, 1024, 72),),
    "PixArt @1024": (Shape(28, 16, 4096, 72),),
    "SD3.5-L @512": (Shape(38, 38, 1024, 64),),
    "SD3.5-L @1024": (Shape(38, 38, 4096, 64),),
    "FLUX.1 @1024": (Shape(57, 24, 4096, 128),),
}

# tuning candidates in half precision, up to 80 channels, beside the configurations that are shipped
EXTRA: dict[str, tuple[Config, ...]] = {
    "row_statistics": (
        Config(128, 64, 4, 3),
        Config(128, 128, 4, 3),
        Config(128, 128, 8, 3, 8),
        Config(128, 128, 8, 3, 4),
        Config(64, 128, 4, 3, 8),
    ),
    "add_probabilities": (
        Config(64, 128, 4, 3),
        Config(64, 256, 8, 2),
        Config(128, 64, 4, 3),
        Config(128, 128, 8, 3, 8),
        Config(128, 128, 8, 3, 4),
        Config(64, 128, 4, 3, 8),
    ),
    "readout": (Config(64, 128, 4, 3), Config(128, 128, 8, 3, 8)),
    "readout_keys": (Config(64, 64, 4, 2),),
    "readout_queries": (Config(64, 64, 4, 2),),
}
