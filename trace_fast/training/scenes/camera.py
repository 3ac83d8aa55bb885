"""Camera: what lies between the scene and the file: patches of light, exposure, colors, blur, noise and JPEG."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from trace_fast.training.scenes.fields import blur, make_noise, to_bytes
from trace_fast.training.scenes.outlines import make_outline, rasterize

__all__ = ["EFFECTS", "encode", "expose"]

QUALITY = 95  # of the files whose scene has no visible compression
Effect = Callable[[np.random.Generator, np.ndarray], np.ndarray]


def expose(random: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Apply each effect of EFFECTS with its probability.

    Args:
        random: source of random numbers.
        picture: (H, W, 3) float32, about in [0, 1].

    Returns:
        (H, W, 3) uint8.
    """
    for effect, probability in EFFECTS.values():
        if random.random() < probability:
            picture = effect(random, picture)
    return to_bytes(picture)


def encode(random: np.random.Generator, pixels: np.ndarray) -> bytes:
    """Encode pixels (H, W, 3) uint8 as JPEG, of a quality that is visible at times."""
    quality = int(random.integers(35, QUALITY)) if random.random() < 0.6 else QUALITY
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0 if quality == QUALITY else 2)
    return file.getvalue()


def add_gradient(random: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Light one side more than the other."""
    weights = make_noise(random, picture.shape[:2], max(picture.shape) * random.uniform(0.5, 1), 0.35)
    return picture * (1 + (weights - 0.5) * random.uniform(0, 2))[..., None]


def add_patch(random: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Lay patches of light or shadow over everything, as windows and trees cast them."""
    height, width = picture.shape[:2]
    shadow = np.zeros((height, width), np.float32)
    for _ in range(random.integers(1, 4)):
        _, parts = make_outline(random, "blob" if random.random() < 0.5 else "polygon")
        points = parts[0].points * max(height, width) * random.uniform(0.1, 0.6) + random.random(2) * [width, height]
        shadow = np.maximum(shadow, rasterize(points, (height, width)))
    shadow = blur(shadow, np.exp(random.uniform(np.log(0.5), np.log(12))))
    return picture * (1 - shadow * random.uniform(-0.5, 0.55))[..., None]


def add_vignette(random: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Darken the corners."""
    rows, columns = (np.linspace(-1, 1, side, dtype=np.float32) ** 2 for side in picture.shape[:2])
    return picture * (1 - (rows[:, None] + columns) * random.uniform(0.05, 0.3))[..., None]


def add_haze(random: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Lower or raise the contrast."""
    gain = random.uniform(0.55, 1.35)
    level = random.uniform(0.3, 0.8)
    return picture * gain + level * (1 - gain)


def change_gamma(random: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Brighten or darken by a power."""
    return np.clip(picture, 0, 1) ** np.float32(np.exp(random.normal(0, 0.25)))


def cast_color(random: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Scale the colors, as a wrong white balance does."""
    return picture * np.exp(random.normal(0, 0.08, 3)).astype(np.float32)


def remove_color(random: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Take colors away, in whole or in part."""
    gray = picture @ np.array([0.3, 0.59, 0.11], np.float32)
    weight = 1.0 if random.random() < 0.4 else random.random()
    return picture + (gray[..., None] - picture) * np.float32(weight)


def add_blur(random: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Blur as a lens does."""
    return blur(picture, np.exp(random.uniform(np.log(0.3), np.log(1.3))))


def sharpen(random: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Sharpen as cameras do: edges get bright and dark borders."""
    picture = np.clip(picture, 0, 1)
    return picture + (picture - blur(picture, random.uniform(0.7, 1.5))) * random.uniform(0.2, 1)


def add_noise(random: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Add noise, in gray or in color."""
    channels = 3 if random.random() < 0.5 else 1
    noise = random.standard_normal((*picture.shape[:2], channels), dtype=np.float32)
    return picture + noise * np.float32(np.exp(random.uniform(np.log(0.004), np.log(0.05))))


# in the order of application, with their probabilities
EFFECTS: dict[str, tuple[Effect, float]] = {
    "gradient": (add_gradient, 0.5),
    "patch": (add_patch, 0.25),
    "vignette": (add_vignette, 0.2),
    "haze": (add_haze, 0.5),
    "gamma": (change_gamma, 0.7),
    "color cast": (cast_color, 0.5),
    "gray": (remove_color, 0.08),
    "blur": (add_blur, 0.5),
    "sharpening": (sharpen, 0.3),
    "noise": (add_noise, 0.5),
}
