"""A scene: what is behind, objects that occlude one another from far to near, the camera, and the instance map."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from trace_fast.io.pictures import read_picture
from trace_fast.ops import checks
from trace_fast.training.scenes.camera import encode, expose
from trace_fast.training.scenes.dataset import IGNORED
from trace_fast.training.scenes.fields import Colors, blur, load_ndimage, make_colors, make_noise
from trace_fast.training.scenes.outlines import THIN, Part, make_outline, rasterize
from trace_fast.training.scenes.shading import (
    Surface,
    cast_shadow,
    inflate,
    make_light,
    make_surface,
    shade,
    show_through,
)
from trace_fast.training.scenes.textures import make_texture

__all__ = ["Scene", "draw_scene"]

SIDE = 256  # sizes in pixels below are those of a picture with this shorter side
LEAST_AREA = 14  # pieces of objects with fewer visible pixels are given to what surrounds them


@dataclass(frozen=True)
class Scene:
    """A scene that was drawn.

    Attributes:
        image: (H, W, 3) uint8, as it is in the JPEG file.
        instances: (H, W) uint16: 0 no object, 1 to K objects, IGNORED.
        jpeg: the image as a file.
    """

    image: np.ndarray
    instances: np.ndarray
    jpeg: bytes


@dataclass(frozen=True)
class Kind:
    """Properties that objects of one kind share.

    Attributes:
        name: key of OUTLINES.
        parts: of one object; None draws the parts of each object anew.
        textures: (h, w, 3) tiles that parts take their color from, by the number of their material.
        surface: what it does with light.
        ragged: strength of fur or frayed borders, in pixels; 0 is smooth.
    """

    name: str
    parts: list[Part] | None
    textures: list[np.ndarray]
    surface: Surface
    ragged: float


@dataclass(frozen=True)
class Placement:
    """Where an object is.

    Attributes:
        x: of its middle, in pixels.
        y: likewise.
        radius: half its size, in pixels.
        depth: 0 is far, 1 near.
        kind: index of its kind.
    """

    x: float
    y: float
    radius: float
    depth: float
    kind: int


def draw_scene(random: np.random.Generator, size: tuple[int, int], photos: np.ndarray | None = None) -> Scene:
    """Draw a scene of objects that occlude one another, with its exact instance map.

    Every surface is a texture, and never a picture of something: nothing but the outlines of the objects in the map is
    the edge of an object. Borders of regions that are no objects (ground, sky, walls) are thin bands of IGNORED.

    Args:
        random: source of random numbers; equal states give equal scenes.
        size: (height, width) in pixels, each at least 32.
        photos: (P, S, S, 3) uint8, from which colors and spectra are taken; None draws palettes.

    Returns:
        The scene.

    Raises:
        ValueError: a side is below 32.

    Example:
        >>> scene = draw_scene(np.random.default_rng(5), (96, 144))
        >>> scene.image.shape, scene.instances.shape, scene.instances.dtype
        ((96, 144, 3), (96, 144), dtype('uint16'))
    """
    for name, side in zip(("height", "width"), size, strict=True):
        checks.integer("draw_scene", name, side, 32)
    painter = _Painter(random, size, make_colors(random, photos))
    painter.paint_background()
    placements = painter.plan()
    for placement in placements:
        painter.paint_object(placement)
    jpeg = encode(random, expose(random, painter.canvas))
    with read_picture("draw_scene: image", io.BytesIO(jpeg)) as picture:
        image = np.asarray(picture.convert("RGB"))
    return Scene(image, painter.finish_instances(), jpeg)


class _Painter:
    """The state of a scene while it is drawn."""

    def __init__(self, random: np.random.Generator, size: tuple[int, int], colors: Colors):
        self.random, self.size, self.colors = random, size, colors
        self.scale = min(size) / SIDE
        self.light = make_light(random)
        self.canvas = np.empty((*size, 3), np.float32)
        self.instances = np.zeros(size, np.int32)
        self.borders = np.zeros(size, bool)  # of regions that are no objects
        self.count = 0
        self.kinds: list[Kind] = []
        # depth of field: standard deviation of the blur per unit of distance from the focus
        self.focus = random.uniform(0.5, 1)
        self.defocus = 0.0 if random.random() < 0.5 else np.exp(random.uniform(np.log(0.5), np.log(6))) * self.scale
        self.horizon = random.uniform(0.1, 0.75) if random.random() < 0.5 else None

    # --- plan

    def plan(self) -> list[Placement]:
        """Choose kinds and places of all objects, from far to near."""
        random, side = self.random, min(self.size)
        layout = random.choice(["bare", "few", "many", "group", "close"], p=[0.12, 0.37, 0.14, 0.26, 0.11])
        placements: list[Placement] = []
        if layout == "bare":
            if random.random() < 0.4:
                placements = self._scatter(1, 0.03, 0.15)
        elif layout == "few":
            placements = self._scatter(int(random.integers(1, 7)), 0.15, 1.3)
        elif layout == "many":
            placements = self._scatter(int(random.integers(7, 22)), 0.04, 0.5)
        elif layout == "group":
            placements = self._gather() + self._scatter(int(random.integers(0, 4)), 0.04, 0.5)
        else:
            radius = side * random.uniform(0.35, 0.65)
            middle = random.uniform(0.1, 0.9, 2) * self.size
            self._add_kind(radius)
            placements = [
                Placement(middle[1], middle[0], radius, 0.9, 0),
                *self._scatter(int(random.integers(0, 8)), 0.04, 0.5),
            ]
        return sorted(placements, key=lambda placement: placement.depth)

    def _scatter(self, count: int, least: float, most: float) -> list[Placement]:
        """Place objects anywhere, of sizes between two shares of the shorter side; near ones are lower and larger."""
        random, (height, width) = self.random, self.size
        first, own = len(self.kinds), max(1, min(count, int(random.integers(1, 5))))
        sizes = np.exp(random.uniform(np.log(least), np.log(most), count)) / 2
        for number in range(own if count else 0):
            self._add_kind(float(sizes[number]) * min(self.size) * 1.5)
        depths = np.sort(random.random(count))
        central = random.random() < 0.4  # photos are taken of something
        placements = []
        for number, (half, depth) in enumerate(zip(sizes, depths, strict=True)):
            x, y = random.uniform(-0.02, 1.02) * width, random.uniform(-0.02, 1.02) * height
            if central:
                x, y = random.normal(0.5, 0.2) * width, random.normal(0.5, 0.15) * height
            if self.horizon is not None:  # it stands on the ground
                y = (self.horizon + (1.05 - self.horizon) * depth) * height - half * height * random.uniform(0.2, 1)
                half = half * (0.5 + depth)
            kind = first + (number if number < own else int(random.integers(own)))
            placements.append(Placement(x, y, max(float(half) * min(self.size), 3.0), float(depth), kind))
        return placements

    def _gather(self) -> list[Placement]:
        """Place things of one kind so that they touch: in a heap, a row, or a grid."""
        random, (height, width), side = self.random, self.size, min(self.size)
        count = int(np.exp(random.uniform(np.log(3), np.log(31))))
        radius = side * min(random.uniform(0.4, 1.5) * 0.42 / np.sqrt(count), 0.35)
        self._add_kind(radius)
        if random.random() < 0.2:
            self._add_kind(radius)
        x, y = random.uniform(0.2, 0.8, 2) * (width, height)
        form, pitch = random.integers(3), radius * random.uniform(0.9, 2)
        angle = random.normal(0, 0.3)
        if form == 0:  # heap
            places = random.normal(0, 1, (count, 2)) * pitch * np.sqrt(count) * 0.45
        else:
            columns = count if form == 1 else int(np.ceil(np.sqrt(count)))
            numbers = np.arange(count)
            places = (
                np.stack([numbers % columns - (columns - 1) / 2, numbers // columns - (count // columns) / 2], 1)
                * pitch
            )
            places = places + random.normal(0, pitch * random.uniform(0, 0.25), (count, 2))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        depth = random.random()
        radii = radius * np.exp(random.normal(0, random.uniform(0.03, 0.3), count))
        return [
            Placement(
                x + dx, y + dy, max(float(r), 3.0), depth + dy / (20 * height), int(random.integers(len(self.kinds)))
            )
            for (dx, dy), r in zip(places @ turn, radii, strict=True)
        ]

    def _add_kind(self, radius: float) -> None:
        """Add a kind of objects of about that radius, in pixels."""
        random = self.random
        name, parts = make_outline(random)
        side = int(np.clip(radius * 2.2, 16, max(self.size)))
        textures = [make_texture(random, self.colors, (side, side))]
        if random.random() < 0.7 and np.abs(textures[0].mean((0, 1)) - self.canvas.mean((0, 1))).max() < 0.12:
            textures = [make_texture(random, self.colors, (side, side))]  # hardly visible: draw again
        materials = max(part.material for part in parts) + 1
        while len(textures) < max(materials, 2):
            if random.random() < 0.3:
                textures.append(textures[0])
            else:
                small = min(side, 48)
                textures.append(
                    make_texture(random, self.colors, (small, small), "plain" if random.random() < 0.4 else None)
                )
        ragged = random.uniform(0.5, 3) * self.scale if random.random() < 0.12 and name not in THIN else 0.0
        self.kinds.append(Kind(name, parts if random.random() < 0.5 else None, textures, make_surface(random), ragged))

    # --- paint

    def paint_background(self) -> None:
        """Fill the canvas with up to four regions that are no objects."""
        random, (height, width) = self.random, self.size
        self.canvas[:] = make_texture(random, self.colors, self.size)
        regions = [] if self.horizon is None else [self._make_ground(self.horizon)]
        for _ in range(int(random.choice([0, 0, 1, 2]))):
            if random.random() < 0.65:
                regions.append(self._make_ground(random.uniform(0.05, 0.95), wall=random.random() < 0.6))
            else:
                _, parts = make_outline(random, "blob" if random.random() < 0.6 else "polygon")
                points = parts[0].points * max(self.size) * random.uniform(0.15, 0.6) + random.random(2) * [
                    width,
                    height,
                ]
                regions.append(rasterize(points, self.size))
        for weights in regions:
            weights = blur(weights, random.uniform(0, 2.5) * self.scale)
            mix_in = make_texture(random, self.colors, self.size)
            if random.random() < 0.3:  # it darkens towards its border
                mix_in = mix_in * (0.6 + 0.4 * blur(weights, 12 * self.scale))[..., None]
            self.canvas += (mix_in - self.canvas) * weights[..., None]
            inside = weights > 0.5
            self.borders[:, 1:] |= inside[:, 1:] != inside[:, :-1]
            self.borders[1:] |= inside[1:] != inside[:-1]
        if random.random() < 0.25:  # shadows of what is not in the picture
            _, parts = make_outline(random)
            scale = max(self.size) * random.uniform(0.05, 0.4)
            for part in parts[:2]:
                shadow = rasterize(part.points * scale + random.random(2) * [width, height], self.size)
                shadow = blur(shadow, random.uniform(1, 10) * self.scale)
                self.canvas *= (1 - shadow * random.uniform(0.15, 0.6))[..., None]
        if self.defocus:
            self.canvas = np.array(blur(self.canvas, self.defocus * self.focus))

    def _make_ground(self, horizon: float, wall: bool = False) -> np.ndarray:
        """Return what lies below an uneven line, (H, W) in [0, 1]; right of it for a wall."""
        random = self.random
        height, width = self.size[::-1] if wall else self.size
        steps = random.normal(0, random.choice([0.0, 0.0, 0.3, 1.2]), width)
        line = horizon * height + np.cumsum(steps) + np.linspace(-1, 1, width) * random.normal(0, 0.05) * height
        below = np.clip(np.arange(height, dtype=np.float32)[:, None] - line.astype(np.float32), 0, 1)
        return below.T if wall else below

    def paint_object(self, placement: Placement) -> None:
        """Paint an object over what is there, with its shadow, and write its instance."""
        random, kind = self.random, self.kinds[placement.kind]
        parts = kind.parts or make_outline(random, kind.name)[1]
        points = self._pose(parts, placement, upright=kind.name not in THIN)
        blur_sigma = self.defocus * abs(placement.depth - self.focus)
        margin = 2 + int(2 * blur_sigma + kind.ragged)
        corners = np.concatenate(points)
        left, top = (max(0, int(value) - margin) for value in corners.min(0))
        right = min(self.size[1], int(corners[:, 0].max()) + margin + 1)
        bottom = min(self.size[0], int(corners[:, 1].max()) + margin + 1)
        if right - left < 3 or bottom - top < 3:
            return
        size = (bottom - top, right - left)
        alpha, picture, seams = self._paint_parts(kind, parts, [p - [left, top] for p in points], size)
        if kind.ragged:
            frayed = blur(alpha, kind.ragged) + (make_noise(random, size, 5, 0.75) - 0.5) * 0.7
            alpha = np.clip((frayed - 0.5) * 2.5 * max(kind.ragged, 1) + 0.5, 0, 1)
        solid = alpha > 0.5
        if np.count_nonzero(solid) < LEAST_AREA:
            return
        if kind.surface.bulge or kind.surface.opacity < 1:
            picture, slopes = shade(random, picture, inflate(alpha * (1 - seams)), kind.surface, self.light)
            if kind.surface.opacity < 1:
                picture = show_through(self.canvas, top, left, picture, slopes, kind.surface)
        if random.random() < 0.75:
            length = placement.radius * random.uniform(0.05, 0.6)
            cast_shadow(self.canvas, alpha, top, left, self.light, length)
        if blur_sigma > 0.3:
            picture = blur(np.clip(picture, 0, 1), blur_sigma)
        weights = blur(alpha, float(np.hypot(blur_sigma, random.uniform(0, 0.7))))[..., None]
        view = self.canvas[top:bottom, left:right]
        view += (picture - view) * weights
        self.count += 1
        self.instances[top:bottom, left:right][solid] = self.count

    def _pose(self, parts: list[Part], placement: Placement, upright: bool) -> list[np.ndarray]:
        """Return the points of parts in pixels of the canvas: turned, squeezed, mirrored and moved."""
        random = self.random
        turned = random.random() < (0.25 if self.horizon is None else 0.08) or not upright
        angle = random.uniform(0, 2 * np.pi) if turned else random.normal(0, 0.12)
        aspect = np.exp(random.normal(0, 0.2))
        squeeze = np.array([aspect * random.choice([-1, 1]), 1 / aspect])
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        return [(part.points * squeeze) @ turn * placement.radius + [placement.x, placement.y] for part in parts]

    def _paint_parts(
        self, kind: Kind, parts: list[Part], points: list[np.ndarray], size: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the coverage of an object (H, W), its color (H, W, 3), and the lines between its parts (H, W)."""
        random = self.random
        alpha, seams = np.zeros(size, np.float32), np.zeros(size, np.float32)
        picture = np.zeros((*size, 3), np.float32)
        brightness = np.exp(random.normal(0, 0.15))
        for part, corners in zip(parts, points, strict=True):
            low = np.clip(np.floor(corners.min(0)).astype(int) - 1, 0, None)
            high = np.minimum(np.ceil(corners.max(0)).astype(int) + 2, size[::-1])
            if (high - low < 1).any():
                continue
            box = (slice(low[1], high[1]), slice(low[0], high[0]))
            weights = rasterize(corners - low, (int(high[1] - low[1]), int(high[0] - low[0])))
            if part.role == "hole":
                alpha[box] *= 1 - weights
                continue
            if part.role == "print":
                weights = weights * alpha[box]
            else:
                # parts bulge apart: the line where one ends on another lies low
                if len(parts) > 1:
                    seams[box] = np.where(weights > 0.9, 0, np.maximum(seams[box], (weights > 0.05) * alpha[box]))
                alpha[box] = np.maximum(alpha[box], weights)
            color = self._crop_texture(kind.textures[part.material % len(kind.textures)], weights.shape)
            view = picture[box]
            first = part.role != "print" and not view.any()
            if first:  # no black border where the coverage is partial
                view[:] = color * (part.tone * brightness)
            else:
                view += (color * (part.tone * brightness) - view) * np.where(alpha[box] > weights, weights, 1)[
                    ..., None
                ]
        return alpha, picture, seams

    def _crop_texture(self, texture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Return a crop of a texture that is mirrored where it is too small."""
        while texture.shape[0] < size[0]:
            texture = np.concatenate([texture, texture[::-1]])
        while texture.shape[1] < size[1]:
            texture = np.concatenate([texture, texture[:, ::-1]], 1)
        top = int(self.random.integers(texture.shape[0] - size[0] + 1))
        left = int(self.random.integers(texture.shape[1] - size[1] + 1))
        return texture[top : top + size[0], left : left + size[1]]

    # --- instances

    def finish_instances(self) -> np.ndarray:
        """Return the instance map (H, W) uint16 without tiny pieces, numbered from 1, with borders ignored."""
        ndimage = load_ndimage()
        instances = _remove_pieces(self.instances)
        borders = self.borders
        if borders.any():
            near = ndimage.maximum_filter((instances > 0).view(np.uint8), 5)
            borders = (ndimage.maximum_filter(borders.view(np.uint8), 3) > 0) & (near == 0)
        numbers = np.zeros(self.count + 1, np.uint16)
        visible = np.flatnonzero(np.bincount(instances.ravel(), minlength=self.count + 1)[1:]) + 1
        numbers[visible] = np.arange(1, len(visible) + 1)
        result = numbers[instances]
        result[borders] = IGNORED
        return result


def _remove_pieces(instances: np.ndarray) -> np.ndarray:
    """Give pieces of objects that are hardly visible to what surrounds them most."""
    ndimage = load_ndimage()
    for number, box in enumerate(ndimage.find_objects(instances), 1):
        if box is None:
            continue
        labels, count = ndimage.label(instances[box] == number)
        areas = np.bincount(labels.ravel())
        for piece in [piece for piece in range(1, count + 1) if areas[piece] < LEAST_AREA]:
            wide = tuple(slice(max(0, part.start - 1), part.stop + 1) for part in box)
            inside = np.pad(labels == piece, [(p.start - w.start, 1) for p, w in zip(box, wide, strict=True)])
            view = instances[wide]
            inside = inside[: view.shape[0], : view.shape[1]]
            around = view[ndimage.binary_dilation(inside) & ~inside]
            view[inside] = np.bincount(around).argmax() if len(around) else 0
    return instances
