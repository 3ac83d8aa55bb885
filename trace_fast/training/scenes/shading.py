"""Shading: how light falls on objects, what shines through them or is mirrored in them, and their shadows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trace_fast.training.scenes.fields import blur, load_ndimage, make_noise, resize_field

__all__ = ["Light", "Surface", "cast_shadow", "inflate", "make_light", "make_surface", "shade", "show_through"]

INFLATED = 40  # longest side of the grid on which surfaces are inflated, in cells


@dataclass(frozen=True)
class Light:
    """The light of a scene.

    Attributes:
        direction: (3,) float32, unit vector to the light: right, down, towards the viewer.
        ambient: share of the light that comes from everywhere, in [0, 1].
        softness: standard deviation of the border of shadows, relative to their length.
    """

    direction: np.ndarray
    ambient: float
    softness: float


@dataclass(frozen=True)
class Surface:
    """Optical properties of a surface.

    Attributes:
        bulge: height of the inflated surface, relative to half the object's width; 0 is flat.
        bumps: height of small bumps, likewise.
        gloss: strength of the highlight.
        sharpness: exponent of the highlight.
        opacity: share of the object's own color; the rest is what is behind or mirrored.
        distortion: shift of what is behind or mirrored per unit of slope, in pixels; negative values mirror.
    """

    bulge: float
    bumps: float
    gloss: float
    sharpness: float
    opacity: float
    distortion: float


def make_light(random: np.random.Generator) -> Light:
    """Draw the light of a scene: mostly from above."""
    angle, height = random.normal(-np.pi / 2, 0.9), random.uniform(0.35, 1.3)
    direction = [np.cos(angle) * np.cos(height), np.sin(angle) * np.cos(height), np.sin(height)]
    return Light(
        np.array(direction, np.float32), random.uniform(0.25, 0.8), np.exp(random.uniform(np.log(0.05), np.log(0.8)))
    )


def make_surface(random: np.random.Generator) -> Surface:
    """Draw a surface: most are opaque, some shiny, a few translucent or mirrored."""
    glass = random.random() < 0.07
    return Surface(
        bulge=0.0 if random.random() < 0.25 else random.uniform(0.2, 1),
        bumps=random.uniform(0, 0.5) if random.random() < 0.25 else 0.0,
        gloss=random.uniform(0.15, 1) if glass or random.random() < 0.3 else 0.0,
        sharpness=np.exp(random.uniform(np.log(6), np.log(100))),
        opacity=random.uniform(0.25, 0.75) if glass else 1.0,
        distortion=random.uniform(2, 14) * (1 if random.random() < 0.6 else -1),
    )


def inflate(solid: np.ndarray) -> np.ndarray:
    """Inflate a flat object to a round one, on a coarse grid.

    Args:
        solid: (H, W) float in [0, 1]; 0 also along borders between parts that bulge apart.

    Returns:
        (H, W) float32 height, in pixels, at most half the object's width.
    """
    ndimage = load_ndimage()
    factor = max(1.0, max(solid.shape) / INFLATED)
    coarse = (max(2, round(solid.shape[0] / factor)), max(2, round(solid.shape[1] / factor)))
    small = resize_field(solid, coarse, smooth=False)
    # a border of zeros would press down objects that continue outside the picture
    distances = ndimage.distance_transform_edt(np.pad(small > 0.5, 4, "edge"))[4:-4, 4:-4]
    most = max(float(distances.max()), 1.0)
    heights = np.sqrt(np.clip(1 - (1 - distances / most) ** 2, 0, 1)) * most * factor
    heights = ndimage.gaussian_filter(heights, 0.8)
    return resize_field(heights, (solid.shape[0], solid.shape[1]))


def shade(
    random: np.random.Generator, picture: np.ndarray, heights: np.ndarray, surface: Surface, light: Light
) -> tuple[np.ndarray, np.ndarray]:
    """Light a surface.

    Args:
        random: source of random numbers.
        picture: (H, W, 3), the color of the surface.
        heights: (H, W) of `inflate`.
        surface: what it does with light.
        light: of the scene.

    Returns:
        The lit picture (H, W, 3), not clamped, and the slopes (2, H, W), down and right.
    """
    relief = heights * surface.bulge
    if surface.bumps:
        relief = relief + (make_noise(random, heights.shape, 20, 0.5) - 0.5) * (surface.bumps * 12)
    slopes = np.stack([np.gradient(relief, axis=0), np.gradient(relief, axis=1)])
    x, y, z = (float(value) for value in light.direction)
    lengths = 1 / np.sqrt(1 + slopes[0] ** 2 + slopes[1] ** 2)
    cosines = np.clip((z - slopes[1] * x - slopes[0] * y) * lengths, 0, 1)
    # a flat surface keeps its color
    lit = picture * (light.ambient + (1 - light.ambient) / max(z, 0.4) * cosines)[..., None]
    if surface.gloss:
        middle = np.array([x, y, z + 1]) / np.sqrt(x * x + y * y + (z + 1) ** 2)
        facing = np.clip((middle[2] - slopes[1] * middle[0] - slopes[0] * middle[1]) * lengths, 0, 1)
        lit = lit + (surface.gloss * facing ** np.float32(surface.sharpness))[..., None]
    return lit.astype(np.float32, copy=False), slopes


def show_through(
    canvas: np.ndarray, top: int, left: int, picture: np.ndarray, slopes: np.ndarray, surface: Surface
) -> np.ndarray:
    """Mix an object's color with what is behind it, bent by its slopes, or mirrored in it.

    Args:
        canvas: (H, W, 3), what is drawn so far.
        top: row of the object's box on the canvas.
        left: its column.
        picture: (h, w, 3), the object's color.
        slopes: (2, h, w) of `shade`.
        surface: with the opacity and the distortion.
    """
    rows, columns = np.ogrid[top : top + picture.shape[0], left : left + picture.shape[1]]
    if surface.distortion < 0:
        rows, columns = 2 * top + picture.shape[0] - rows, canvas.shape[1] - 1 - columns
    rows = np.clip((rows + slopes[0] * surface.distortion).astype(int), 0, canvas.shape[0] - 1)
    columns = np.clip((columns + slopes[1] * surface.distortion).astype(int), 0, canvas.shape[1] - 1)
    behind = canvas[rows, columns]
    return behind + (picture - behind) * np.float32(surface.opacity)


def cast_shadow(canvas: np.ndarray, alpha: np.ndarray, top: int, left: int, light: Light, length: float) -> None:
    """Darken a canvas where an object is between it and the light.

    Args:
        canvas: (H, W, 3), changed in place.
        alpha: (h, w), the object's coverage.
        top: row of the object's box on the canvas; the box may reach outside.
        left: its column.
        light: of the scene.
        length: distance between the object and its shadow on the canvas, in pixels.
    """
    shift_x, shift_y = (-light.direction[:2] * length).round().astype(int)
    sigma = max(0.6, length * light.softness)
    margin = int(min(2 * sigma, 40)) + 1
    y, x = top + shift_y - margin, left + shift_x - margin
    shadow = np.pad(alpha, margin)
    y_low, x_low = max(0, -y), max(0, -x)
    y_high, x_high = min(shadow.shape[0], canvas.shape[0] - y), min(shadow.shape[1], canvas.shape[1] - x)
    if y_low >= y_high or x_low >= x_high:
        return
    shadow = blur(shadow, sigma)[y_low:y_high, x_low:x_high]
    view = canvas[y + y_low : y + y_high, x + x_low : x + x_high]
    view *= (1 - shadow * np.float32(1 - light.ambient))[..., None]
