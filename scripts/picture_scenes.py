"""Draw the pictures of docs/scenes.md, without photos: `python scripts/picture_scenes.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from trace_fast.training.scenes import IGNORED, draw_scene
from trace_fast.training.scenes.camera import EFFECTS
from trace_fast.training.scenes.fields import make_colors, mix, to_bytes
from trace_fast.training.scenes.outlines import OUTLINES, Part, make_outline, rasterize
from trace_fast.training.scenes.shading import Light, Surface, cast_shadow, inflate, shade, show_through
from trace_fast.training.scenes.textures import TEXTURES, make_texture

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "pictures"
GAP = 4  # between pictures, in pixels
# in the order of the columns: flat, inflated, bumps, highlight, translucent, mirrored
SURFACES = (
    Surface(bulge=0, bumps=0, gloss=0, sharpness=20, opacity=1, distortion=0),
    Surface(bulge=0.8, bumps=0, gloss=0, sharpness=20, opacity=1, distortion=0),
    Surface(bulge=0.8, bumps=0.5, gloss=0, sharpness=20, opacity=1, distortion=0),
    Surface(bulge=0.8, bumps=0, gloss=0.8, sharpness=30, opacity=1, distortion=0),
    Surface(bulge=0.8, bumps=0, gloss=0.8, sharpness=30, opacity=0.35, distortion=10),
    Surface(bulge=0.8, bumps=0, gloss=0.4, sharpness=30, opacity=0.3, distortion=-8),
)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    sheets = {
        "textures": picture_textures(),
        "outlines": picture_outlines(),
        "shading": picture_shading(),
        "camera": picture_camera(),
        "scenes": picture_scenes(),
    }
    for name, sheet in sheets.items():
        path = FOLDER / f"scenes_{name}.jpg"
        Image.fromarray(sheet).save(path, quality=72, optimize=True)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


def arrange(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Put pictures of one size, uint8 (H, W, 3), side by side and below one another, with white gaps."""
    height, width = rows[0][0].shape[:2]
    size = (len(rows) * (height + GAP) - GAP, max(map(len, rows)) * (width + GAP) - GAP, 3)
    sheet = np.full(size, 255, np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            top, left = y * (height + GAP), x * (width + GAP)
            sheet[top : top + height, left : left + width] = picture
    return sheet


def picture_textures(count: int = 4, size: tuple[int, int] = (76, 92)) -> np.ndarray:
    """Show each texture `count` times, two textures in a row."""
    rows = []
    for seed, name in enumerate(TEXTURES):
        random = np.random.default_rng(seed)
        rows.append([to_bytes(make_texture(random, make_colors(random, None), size, name)) for _ in range(count)])
    return arrange([first + second for first, second in zip(rows[::2], rows[1::2], strict=True)])


def picture_outlines(count: int = 4, side: int = 84) -> np.ndarray:
    """Show each kind of object `count` times, two kinds in a row, its parts in different colors."""
    rows = []
    for seed, name in enumerate(OUTLINES):
        random = np.random.default_rng(seed)
        rows.append([to_bytes(fill(make_outline(random, name)[1], side)[0]) for _ in range(count)])
    return arrange([first + second for first, second in zip(rows[::2], rows[1::2], strict=True)])


def fill(parts: list[Part], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the picture of an object in the middle of white, and its coverage."""
    palette = np.array(
        [(0.3, 0.45, 0.6), (0.85, 0.55, 0.3), (0.45, 0.65, 0.4), (0.75, 0.7, 0.4), (0.6, 0.4, 0.5)], np.float32
    )
    picture, alpha = np.ones((side, side, 3), np.float32), np.zeros((side, side), np.float32)
    for part in parts:
        weights = rasterize(part.points * side * 0.36 + side / 2, (side, side))
        if part.role == "hole":
            picture, alpha = mix(picture, np.ones(3, np.float32), weights), alpha * (1 - weights)
            continue
        if part.role == "print":
            weights = weights * alpha
        picture = mix(picture, palette[part.material % len(palette)] * part.tone, weights)
        alpha = np.maximum(alpha, weights)
    return picture, alpha


def picture_shading(side: int = 112) -> np.ndarray:
    """Show three objects with each of SURFACES, and their shadows."""
    light = Light(np.array([-0.5, -0.6, 0.62], np.float32), 0.35, 0.2)
    rows = []
    for seed, name in enumerate(("ball", "vessel", "animal")):
        row = []
        for surface in SURFACES:
            random = np.random.default_rng(seed + 3)
            canvas = np.array(make_texture(random, make_colors(random, None), (side, side), "wood"))
            picture, alpha = fill(make_outline(random, name)[1], side)
            picture, slopes = shade(random, picture, inflate(alpha), surface, light)
            if surface.opacity < 1:
                picture = show_through(canvas, 0, 0, picture, slopes, surface)
            cast_shadow(canvas, alpha, 0, 0, light, side / 10)
            row.append(to_bytes(mix(canvas, picture, alpha)))
        rows.append(row)
    return arrange(rows)


def picture_camera(size: tuple[int, int] = (108, 132)) -> np.ndarray:
    """Show a scene as it is, and with each of EFFECTS."""
    image = draw_scene(np.random.default_rng(87), size).image
    picture = image.astype(np.float32) / 255
    pictures = [image]
    for seed, (effect, _) in enumerate(EFFECTS.values()):
        pictures.append(to_bytes(effect(np.random.default_rng(seed), picture)))
    return arrange([pictures[:6], pictures[6:]])


def picture_scenes(count: int = 24, size: tuple[int, int] = (128, 128)) -> np.ndarray:
    """Show scenes, six in a row, and below each its edges: white of objects, orange what is ignored."""
    rows: list[list[np.ndarray]] = []
    for seed in range(count):
        scene = draw_scene(np.random.default_rng(seed), size)
        edges = np.zeros((*size, 3), np.uint8)
        edges[:, :-1][scene.instances[:, :-1] != scene.instances[:, 1:]] = 255
        edges[:-1][scene.instances[:-1] != scene.instances[1:]] = 255
        edges[scene.instances == IGNORED] = (200, 90, 20)
        if seed % 6 == 0:
            rows += [[], []]
        rows[-2].append(scene.image)
        rows[-1].append(edges)
    return arrange(rows)


if __name__ == "__main__":
    main()
