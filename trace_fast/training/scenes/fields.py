"""Random fields, blurs and colors: what textures, outlines, shading and camera are made of.

Fields are (H, W) and pictures (H, W, 3), float32 in [0, 1]; sizes are (height, width) in pixels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from trace_fast.extras import require

__all__ = [
    "Colors",
    "blur",
    "crop_periodic",
    "load_ndimage",
    "make_colors",
    "make_noise",
    "mix",
    "resize_field",
    "to_bytes",
]

TILE = 512  # side of the periodic tiles that all noise is cropped from, in pixels
CELLS = (16, 64)  # distance between the largest features of a tile, in pixels
ROUGHNESS = (0.35, 0.5, 0.62, 0.75)  # factor of the amplitude from one octave to the next


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Return values in [0, 1] as uint8, rounded and clamped."""
    return (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)


def blur(values: np.ndarray, sigma: float) -> np.ndarray:
    """Blur a field or a picture with a Gaussian, to a precision of 1 / 255.

    Args:
        values: (H, W) or (H, W, 3) in [0, 1].
        sigma: standard deviation in pixels.
    """
    if sigma < 0.15:
        return values
    picture = Image.fromarray(to_bytes(values)).filter(ImageFilter.GaussianBlur(float(sigma)))
    return np.asarray(picture, np.float32) * np.float32(1 / 255)


def resize_field(values: np.ndarray, size: tuple[int, int], smooth: bool = True) -> np.ndarray:
    """Resample a field (h, w) with a bicubic filter, or a bilinear one that does not overshoot."""
    filter = Image.Resampling.BICUBIC if smooth else Image.Resampling.BILINEAR
    picture = Image.fromarray(np.ascontiguousarray(values, np.float32))
    return np.array(picture.resize((size[1], size[0]), filter))


def mix(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return a picture between two pictures or colors.

    Args:
        first: (H, W, 3) or (3,), where the weight is 0.
        second: likewise, where it is 1.
        weights: (H, W).
    """
    return first + (second - first) * weights[..., None]


def load_ndimage() -> Any:
    """Return scipy.ndimage, which is imported when it is needed.

    Raises:
        RuntimeError: scipy is not installed.
    """
    require("scenes", "scipy", extra="train")
    from scipy import ndimage

    return ndimage


@functools.lru_cache(maxsize=1)
def _make_tiles() -> dict[tuple[int, int], np.ndarray]:
    """Make the periodic tiles of noise of zero mean and unit variance, by indices into CELLS and ROUGHNESS."""
    generator = np.random.default_rng(0)
    frequencies = np.hypot(np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE)[None])
    tiles = {}
    for c, cell in enumerate(CELLS):
        for r, roughness in enumerate(ROUGHNESS):
            # amplitudes fall by `roughness` from octave to octave, and by as much again for each octave's area
            octaves = np.log2(np.maximum(frequencies * cell, 1e-6))
            amplitudes = np.where(octaves > 0, (roughness / 2) ** octaves, 4.0**octaves)
            amplitudes[0, 0] = 0
            spectrum = np.fft.rfft2(generator.standard_normal((TILE, TILE))) * amplitudes
            tile = np.fft.irfft2(spectrum, s=(TILE, TILE))
            tiles[c, r] = (tile / tile.std()).astype(np.float32)
    return tiles


def crop_periodic(tile: np.ndarray, size: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """Return a crop at a random place of a tile that continues periodically; a view where that is possible."""
    top, left = (int(random.integers(side)) for side in tile.shape[:2])
    if top + size[0] <= tile.shape[0] and left + size[1] <= tile.shape[1]:
        return tile[top : top + size[0], left : left + size[1]]
    rows = np.arange(top, top + size[0]) % tile.shape[0]
    columns = np.arange(left, left + size[1]) % tile.shape[1]
    return tile[rows[:, None], columns[None]]


def make_noise(
    random: np.random.Generator,
    size: tuple[int, int],
    cell: float,
    roughness: float = 0.5,
    scales: tuple[float, float] = (1, 1),
) -> np.ndarray:
    """Make fractal noise.

    Args:
        random: source of random numbers.
        size: (height, width) in pixels.
        cell: distance between the largest features, in pixels.
        roughness: factor of the amplitude from one octave to the next.
        scales: factors of the cell along the two axes.

    Returns:
        (H, W) float32 in [0, 1] with a mean of about 0.5 and a standard deviation of about 0.2.
    """
    c = int(cell >= 40)
    r = int(np.argmin([abs(value - roughness) for value in ROUGHNESS]))
    factors = [CELLS[c] / (cell * factor) for factor in scales]
    inner = tuple(min(TILE, max(2, round(side * factor) + 1)) for side, factor in zip(size, factors, strict=True))
    crop = crop_periodic(_make_tiles()[c, r], (inner[0], inner[1]), random)
    if random.random() < 0.5:
        crop = crop[::-1]
    if random.random() < 0.5:
        crop = crop[:, ::-1]
    return np.clip(0.5 + 0.2 * resize_field(crop, size), 0, 1)


@dataclass(frozen=True)
class Colors:
    """Colors and pictures that one scene is painted with.

    Attributes:
        picture: (S, S, 3) uint8, a photo, or a picture of palettes when there are no photos.
        others: (P, S, S, 3) uint8, the pictures of other scenes, for a part of the crops.
    """

    picture: np.ndarray
    others: np.ndarray

    def pick(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Return colors (count, 3) float32 in [0, 1] at random places of the picture."""
        rows, columns = random.integers(0, self.picture.shape[0], (2, count))
        return self.picture[rows, columns].astype(np.float32) / 255

    def crop(self, random: np.random.Generator, least: float, most: float) -> np.ndarray:
        """Return a square crop (s, s, 3) uint8, of a side from `least` to `most` of the picture's."""
        own = len(self.others) == 0 or random.random() < 0.7
        picture = self.picture if own else self.others[random.integers(len(self.others))]
        side = int(self.picture.shape[0] * random.uniform(least, most))
        top, left = random.integers(0, self.picture.shape[0] - side + 1, 2)
        return picture[top : top + side, left : left + side]


def make_colors(random: np.random.Generator, photos: np.ndarray | None, side: int = 96) -> Colors:
    """Choose the colors of a scene.

    Args:
        random: source of random numbers.
        photos: (P, S, S, 3) uint8; None makes a picture of a random palette.
        side: of the picture that is made, in pixels.
    """
    if photos is not None:
        return Colors(photos[random.integers(len(photos))], photos)
    palette = _make_palette(random, 6)
    picture = np.empty((side, side, 3), np.float32)
    picture[:] = palette[0]
    for color in palette[1:]:
        weights = make_noise(random, (side, side), side * random.uniform(0.1, 0.8), random.uniform(0.4, 0.8))
        picture = mix(picture, color, np.clip((weights - random.uniform(0.4, 0.6)) * random.uniform(2, 9) + 0.5, 0, 1))
    return Colors(to_bytes(picture * make_noise(random, (side, side), 40, 0.6)[..., None] * 2), np.empty(0))


def _make_palette(random: np.random.Generator, count: int) -> np.ndarray:
    """Make colors (count, 3) as photos have them: mostly dull, of neighboring hues, and one that differs."""
    hues = random.choice([0.07, 0.1, 0.28, 0.58, random.random()]) + random.normal(0, 0.06, count)
    hues[-1] = random.random()
    saturations = random.beta(1.3, 2.5, count)
    values = random.beta(1.3, 1.3, count) * 0.9 + 0.05
    phases = (hues[:, None] * 6 + (5, 3, 1)) % 6
    colors = values[:, None] * (1 - saturations[:, None] * np.clip(np.minimum(phases, 4 - phases), 0, 1))
    return colors.astype(np.float32)
