"""Textures: the surfaces of objects and of what is behind them. None has an object in it.

A texture is a function of random numbers, colors and a size that returns a picture (H, W, 3) float32 in [0, 1]. A new
one is a function here and a line with its share in TEXTURES.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from trace_fast.training.scenes.fields import Colors, blur, crop_periodic, make_noise, mix

__all__ = ["TEXTURES", "make_texture"]

Size = tuple[int, int]
Texture = Callable[[np.random.Generator, Colors, Size], np.ndarray]


def make_texture(random: np.random.Generator, colors: Colors, size: Size, name: str | None = None) -> np.ndarray:
    """Make a texture, (H, W, 3) float32 in [0, 1].

    Args:
        random: source of random numbers.
        colors: of the scene.
        size: (height, width) in pixels.
        name: key of TEXTURES; None draws one according to the shares.
    """
    if name is None:
        names = list(TEXTURES)
        shares = np.cumsum([TEXTURES[key][1] for key in names])
        name = names[int(np.searchsorted(shares, random.random() * shares[-1]))]
    picture = TEXTURES[name][0](random, colors, size)
    if random.random() < 0.55:  # most surfaces differ less from their mean
        mean = picture.reshape(-1, 3).mean(0)  # several times as fast as over two axes
        picture = mean + (picture - mean) * np.float32(random.uniform(0.15, 0.8))
    if random.random() < 0.35:
        grain = make_noise(random, size, random.uniform(5, 60), random.uniform(0.5, 0.8))
        picture = picture + (grain - 0.5)[..., None] * random.uniform(0, 0.2)
    if random.random() < 0.15:
        picture = picture + random.normal(0, 0.15, 3).astype(np.float32)
    if random.random() < 0.3:
        picture = blur(picture, random.uniform(0.4, 1.6))
    return np.clip(picture, 0, 1).astype(np.float32, copy=False)


def make_plain(random: np.random.Generator, colors: Colors, size: Size) -> np.ndarray:
    """Fill with one color, often with a gradient or a slow variation towards a second."""
    first, second = colors.pick(random, 2)
    if random.random() < 0.5:
        weights = make_noise(random, size, max(size) * random.uniform(0.5, 1.5), 0.35)
    else:
        rows, columns = _make_axes(random, size)
        weights = rows * random.normal() / max(size) + columns * random.normal() / max(size)
    return np.clip(mix(first, second, (weights * random.uniform(0, 0.8)).astype(np.float32)), 0, 1)


def make_fractal(random: np.random.Generator, colors: Colors, size: Size) -> np.ndarray:
    """Vary between three colors by fractal noise."""
    first, second, third = colors.pick(random, 3)
    cell = np.exp(random.uniform(np.log(6), np.log(160)))
    weights = make_noise(random, size, cell, random.uniform(0.35, 0.8), (random.uniform(0.5, 1), 1))
    contrast = random.uniform(0.5, 2.5)
    picture = mix(first, second, np.clip((weights - 0.5) * contrast + 0.5, 0, 1))
    return mix(picture, third, np.clip((weights - 0.7) * 3, 0, 1) * random.uniform(0, 1))


def make_random_phase(random: np.random.Generator, colors: Colors, size: Size) -> np.ndarray:
    """Give a crop of a photo random phases: the same spectrum and colors, no structure."""
    side = 64
    crop = Image.fromarray(colors.crop(random, 0.2, 0.9)).resize((side, side), Image.Resampling.BILINEAR)
    pixels = np.asarray(crop, np.float32) / 255
    mean = pixels.mean((0, 1))
    # a window hides the jump between opposite sides, which would draw a cross
    window = np.hanning(side + 2)[1:-1].astype(np.float32)
    spectrum = np.fft.rfft2((pixels - mean) * (window[:, None] * window)[..., None] * 2, axes=(0, 1))
    phases = np.exp(2j * np.pi * np.fft.rfft2(random.standard_normal((side, side))).real / side)
    tile = np.fft.irfft2(spectrum * phases[..., None], s=(side, side), axes=(0, 1)).astype(np.float32)
    zoom = random.uniform(0.8, 3)
    inner = (int(size[0] / zoom) + 2, int(size[1] / zoom) + 2)
    crop = crop_periodic(tile, inner, random) * random.uniform(0.6, 1.3) + mean
    picture = Image.fromarray((np.clip(crop, 0, 1) * 255).astype(np.uint8))
    return np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC), np.float32) / 255


def make_enlarged(random: np.random.Generator, colors: Colors, size: Size) -> np.ndarray:
    """Enlarge a small crop of a photo so far that no edge is left."""
    crop = Image.fromarray(colors.crop(random, 0.1, 0.35))
    side = int(random.integers(3, 8))
    small = crop.resize((side, side), Image.Resampling.BOX)
    return np.asarray(small.resize(size[::-1], Image.Resampling.BICUBIC), np.float32) / 255


def make_stripes(random: np.random.Generator, colors: Colors, size: Size) -> np.ndarray:
    """Print stripes, checks, dots or tiles with joints, straight or bent."""
    first, second, third = colors.pick(random, 3)
    rows, columns = _make_axes(random, size, upright=0.5)
    if random.random() < 0.4:
        rows = rows + (make_noise(random, size, 60, 0.35) - 0.5) * random.uniform(0, 40)
    period = np.exp(random.uniform(np.log(3), np.log(30)))
    down, across = (
        np.sin(rows * (2 * np.pi / period)),
        np.sin(columns * (2 * np.pi / (period * random.uniform(0.5, 2.5)))),
    )
    kind = random.integers(6)
    if kind == 0:
        weights = down * 0.5 + 0.5
    elif kind == 1:
        weights = np.clip((down - random.uniform(-0.7, 0.7)) * period / 4 + 0.5, 0, 1)
    elif kind == 2:
        weights = np.clip(down * across * period / 4 + 0.5, 0, 1)
    elif kind == 3:  # tartan
        picture = mix(first, second, (down > 0.2) * np.float32(0.5))
        return mix(picture, third, (across > 0.5) * np.float32(0.5))
    elif kind == 4:  # dots
        weights = np.clip((down + across - random.uniform(0.3, 1.5)) * period / 5 + 0.5, 0, 1)
    else:  # joints of tiles and planks
        width = random.uniform(0.93, 0.99)
        weights = np.clip((np.maximum(down, across) - width) * 40, 0, 1)
    return mix(first, second, (weights * random.uniform(0.15, 1)).astype(np.float32))


def make_gravel(random: np.random.Generator, colors: Colors, size: Size) -> np.ndarray:
    """Scatter many small stones, leaves or petals that are one texture."""
    shape = int(random.integers(3))
    radius = random.uniform(1.2, 3.6)
    spread = random.uniform(0.1, 0.4)
    slender = random.uniform(1, 3) if shape else 1.0
    palette = colors.pick(random, int(random.integers(2, 7)))

    def add(canvas: ImageDraw.ImageDraw, side: int) -> None:
        count = int(min(700, side * side / (radius * radius * 4) * random.uniform(0.4, 1.4)))
        places = random.random((count, 2)) * side
        radii = radius * np.exp(random.normal(0, 0.35, count))
        angles = random.uniform(0, 2 * np.pi, count)
        tones = np.clip(
            palette[random.integers(len(palette), size=count)] * (1 + random.normal(0, spread, (count, 1))), 0, 1
        )
        for (x, y), r, angle, tone in zip(places * 2, radii * 2, angles, (tones * 255).astype(int), strict=True):
            u, v = np.cos(angle) * r, np.sin(angle) * r
            s, t = u / slender, v / slender
            dark = tuple(tone // 2)
            for dx, dy, color in ((1, 1, dark), (0, 0, tuple(tone))):
                corners = [(x + u, y + v), (x - t, y + s), (x - u, y - v), (x + t, y - s)]
                if shape < 2:  # eight corners instead of four
                    k = 0.75
                    corners = [
                        corners[0], (x + k * (u - t), y + k * (v + s)), corners[1], (x - k * (u + t), y - k * (v - s)),
                        corners[2], (x - k * (u - t), y - k * (v + s)), corners[3], (x + k * (u + t), y + k * (v - s)),
                    ]  # fmt: skip
                canvas.polygon([(a + dx, b + dy) for a, b in corners], fill=color)

    picture = _tile(random, size, palette[0] * random.uniform(0.3, 1), add)
    return picture * (0.5 + make_noise(random, size, 50, 0.5))[..., None]


def make_strokes(random: np.random.Generator, colors: Colors, size: Size) -> np.ndarray:
    """Draw strokes of about one direction: hair, grass, fur, straw."""
    palette = colors.pick(random, 3)
    angle, disorder = random.uniform(0, np.pi), random.uniform(0.05, 0.7)
    length, width = random.uniform(6, 50), int(random.integers(1, 4))

    def add(canvas: ImageDraw.ImageDraw, side: int) -> None:
        count = int(random.integers(80, 350) * (side / 80))
        starts = random.random((count, 2)) * side * 2
        angles = angle + random.normal(0, disorder, count)
        ends = starts + np.stack([np.cos(angles), np.sin(angles)], 1) * length * 2
        tones = mix(palette[1], palette[2], random.random(count).astype(np.float32)) * random.uniform(
            0.6, 1.2, (count, 1)
        )
        for start, end, tone in zip(starts, ends, (np.clip(tones, 0, 1) * 255).astype(int), strict=True):
            canvas.line([*start, *end], fill=tuple(tone), width=width)

    return _tile(random, size, palette[0], add)


def make_wood(random: np.random.Generator, colors: Colors, size: Size) -> np.ndarray:
    """Draw the grain of wood: long fibers, and rings that are cut lengthwise."""
    first, second = colors.pick(random, 2)
    along = random.uniform(6, 20)
    scales = (1.0, along) if random.random() < 0.5 else (along, 1.0)
    fibers = make_noise(random, size, random.uniform(5, 12), 0.6, scales)
    rings = np.sin(make_noise(random, size, random.uniform(30, 90), 0.35, scales) * random.uniform(20, 90))
    weights = fibers * 0.6 + (rings * 0.5 + 0.5) * random.uniform(0, 0.5)
    return mix(first, second, np.clip(weights * random.uniform(0.2, 1), 0, 1).astype(np.float32))


def make_ridges(random: np.random.Generator, colors: Colors, size: Size) -> np.ndarray:
    """Draw ridges of noise: folds, bark, cracks, marble, branches."""
    first, second = colors.pick(random, 2)
    scales = (1.0, random.uniform(1, 4)) if random.random() < 0.5 else (random.uniform(1, 4), 1.0)
    noise = make_noise(random, size, np.exp(random.uniform(np.log(12), np.log(100))), random.uniform(0.35, 0.7), scales)
    ridges = np.clip(1 - np.abs(noise - 0.5) * 4, 0, 1) ** random.uniform(0.7, 6)
    return mix(first, second, ridges * random.uniform(0.3, 1))


def make_folds(random: np.random.Generator, colors: Colors, size: Size) -> np.ndarray:
    """Shade folds of cloth or crumpled paper, or dunes, under a light from one side."""
    color = colors.pick(random, 1)[0]
    cell = np.exp(random.uniform(np.log(20), np.log(120)))
    scales = (1.0, random.uniform(1, 3)) if random.random() < 0.5 else (random.uniform(1, 3), 1.0)
    noise = make_noise(random, size, cell, 0.5 if random.random() < 0.3 else 0.35, scales)
    slopes = np.gradient(noise, axis=int(random.integers(2))) * cell
    return color * (1 + np.clip(slopes * random.uniform(0.5, 2.5), -0.6, 0.8))[..., None]


def make_clouds(random: np.random.Generator, colors: Colors, size: Size) -> np.ndarray:
    """Draw clouds, smoke or mist on a gradient from the top to the bottom."""
    top, bottom = colors.pick(random, 2)
    if random.random() < 0.5:
        top, bottom = (
            np.array([0.3, 0.5, 0.8], np.float32) * random.uniform(0.5, 1.2),
            np.array([0.8, 0.87, 0.95], np.float32),
        )
    white = np.float32(random.uniform(0.6, 1)) * np.ones(3, np.float32)
    heights = np.linspace(0, 1, size[0], dtype=np.float32)[:, None].repeat(size[1], 1)
    noise = make_noise(random, size, random.uniform(40, 200), 0.5, (0.5, 1))
    weights = np.clip((noise - random.uniform(0.4, 0.65)) * random.uniform(1.5, 5), 0, 1)
    return mix(mix(top, bottom, heights * random.uniform(0.3, 1)), white, weights * random.uniform(0.2, 1))


def make_water(random: np.random.Generator, colors: Colors, size: Size) -> np.ndarray:
    """Draw waves that are wide and flat, smaller towards the top, with glitter."""
    first, second = colors.pick(random, 2)
    cell, flat = random.uniform(4, 16), random.uniform(2, 6)
    tall = (max(8, size[0] // 2), size[1])
    noise = make_noise(random, tall, cell, random.uniform(0.35, 0.6), (1, flat))
    # rows of the noise are packed towards the top, as perspective does
    rows = (np.linspace(0, 1, size[0]) ** random.uniform(0.4, 1) * (tall[0] - 1)).astype(int)
    noise = noise[rows]
    picture = mix(first, second, np.clip((noise - 0.5) * random.uniform(0.5, 2.5) + 0.5, 0, 1))
    return picture + (np.clip(noise - 0.75, 0, 1) * random.uniform(0, 6))[..., None]


def make_foliage(random: np.random.Generator, colors: Colors, size: Size) -> np.ndarray:
    """Draw layers of leaves, light in front of dark."""
    palette = colors.pick(random, 3)
    if random.random() < 0.6:
        green = np.array([random.uniform(0.25, 0.6), random.uniform(0.4, 0.7), random.uniform(0.05, 0.35)], np.float32)
        palette = palette * 0.35 + green * 0.65
    palette = palette * np.linspace(random.uniform(0.15, 0.5), 1.1, 3, dtype=np.float32)[:, None]
    picture = np.broadcast_to(palette[0], (*size, 3))
    cell = random.uniform(4, 22)
    for color in palette[1:]:
        noise = make_noise(random, size, cell, random.uniform(0.5, 0.8))
        picture = mix(picture, color, np.clip((noise - random.uniform(0.45, 0.6)) * random.uniform(4, 14), 0, 1))
    return picture * (0.4 + 1.1 * make_noise(random, size, 60, 0.5))[..., None]


def make_fabric(random: np.random.Generator, colors: Colors, size: Size) -> np.ndarray:
    """Weave threads over and under each other, on soft folds."""
    first, second = colors.pick(random, 2)
    rows, columns = _make_axes(random, size, upright=0.3)
    period = random.uniform(2.2, 7)
    down, across = np.sin(rows * (2 * np.pi / period)), np.sin(columns * (2 * np.pi / period))
    weave = (
        down * across
        if random.random() < 0.5
        else np.sin((rows + columns * random.uniform(0.3, 1)) * (2 * np.pi / period))
    )
    picture = mix(first, second, np.clip(make_noise(random, size, 80, 0.35) * random.uniform(0, 0.5), 0, 1))
    folds = 0.75 + 0.5 * make_noise(random, size, random.uniform(30, 120), 0.35)
    return picture * (folds * (1 + weave * random.uniform(0.05, 0.35)))[..., None]


def make_writing(random: np.random.Generator, colors: Colors, size: Size) -> np.ndarray:
    """Draw lines of marks that look like letters."""
    paper, ink = colors.pick(random, 2)
    if random.random() < 0.4:
        paper, ink = np.array([0.9, 0.9, 0.88], np.float32), np.array([0.12, 0.1, 0.12], np.float32)
    height = random.uniform(3, 16)

    def add(canvas: ImageDraw.ImageDraw, side: int) -> None:
        color = tuple((ink * 255).astype(int))
        y = random.uniform(0, height) * 2
        while y < side * 2:
            x = random.uniform(0, height) * 2
            while x < side * 2:
                width = height * random.uniform(0.7, 1.3)
                marks = random.random((3, 4)) * [width, 2 * height, width, 2 * height] + [x, y, x, y]
                for mark in marks:
                    canvas.line(list(mark), fill=color, width=max(1, int(height / 3)))
                x += width * 1.5 + (width * 1.5 if random.random() < 0.2 else 0)
            y += height * random.uniform(2.6, 4)

    return _tile(random, size, paper, add)


def make_patches(random: np.random.Generator, colors: Colors, size: Size) -> np.ndarray:
    """Separate few colors by hard, winding lines: hides, camouflage, lichen, printed flowers."""
    palette = colors.pick(random, int(random.integers(2, 5)))
    picture = np.broadcast_to(palette[0], (*size, 3))
    cell = np.exp(random.uniform(np.log(8), np.log(70)))
    for color in palette[1:]:
        noise = make_noise(random, size, cell, random.uniform(0.35, 0.6))
        picture = mix(picture, color, np.clip((noise - random.uniform(0.45, 0.7)) * cell / 2 + 0.5, 0, 1))
    return np.array(picture)


def _make_axes(random: np.random.Generator, size: Size, upright: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return two axes at right angles, in pixels: turned at random, or upright with that probability."""
    angle = random.uniform(0, np.pi) if random.random() >= upright else random.normal(0, 0.05)
    rows, columns = np.ogrid[: size[0], : size[1]]
    rows, columns = rows.astype(np.float32), columns.astype(np.float32)
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return rows * cosine + columns * sine, columns * cosine - rows * sine


def _tile(
    random: np.random.Generator, size: Size, color: np.ndarray, add: Callable[[ImageDraw.ImageDraw, int], None]
) -> np.ndarray:
    """Draw marks on a square at twice the resolution, and repeat it, mirrored, over the size."""
    side = int(min(176, max(size)))
    canvas = Image.new("RGB", (2 * side, 2 * side), tuple(int(value * 255) for value in np.clip(color, 0, 1)))
    add(ImageDraw.Draw(canvas), side)
    pixels = np.asarray(canvas.reduce(2), np.float32) * np.float32(1 / 255)
    if max(size) <= side:  # a crop that wraps around would have a seam
        top, left = int(random.integers(side - size[0] + 1)), int(random.integers(side - size[1] + 1))
        return pixels[top : top + size[0], left : left + size[1]]
    pixels = np.concatenate([pixels, pixels[:, ::-1]], 1)
    pixels = np.concatenate([pixels, pixels[::-1]], 0)
    return crop_periodic(pixels, size, random)


# share: of all textures, relative
TEXTURES: dict[str, tuple[Texture, float]] = {
    "plain": (make_plain, 32),
    "fractal": (make_fractal, 11),
    "random phase": (make_random_phase, 14),
    "enlarged": (make_enlarged, 7),
    "stripes": (make_stripes, 7),
    "gravel": (make_gravel, 7),
    "strokes": (make_strokes, 6),
    "wood": (make_wood, 5),
    "ridges": (make_ridges, 5),
    "folds": (make_folds, 5),
    "clouds": (make_clouds, 3),
    "water": (make_water, 4),
    "foliage": (make_foliage, 8),
    "fabric": (make_fabric, 5),
    "writing": (make_writing, 3),
    "patches": (make_patches, 3.5),
}
