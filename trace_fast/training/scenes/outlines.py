"""Outlines: what objects look like from outside.

An object is a list of parts, drawn in order; the outline of all together is its only edge. A new kind of object is a
function here that returns its parts in a square from -1 to 1, and a line with its share in OUTLINES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["OUTLINES", "THIN", "Part", "make_outline", "rasterize"]

ANGLES = np.linspace(0, 2 * np.pi, 72, endpoint=False)


@dataclass(frozen=True)
class Part:
    """A part of an object.

    Attributes:
        points: (P, 2), corners (x, y) of a polygon; y points down.
        material: parts of equal numbers have the same material.
        tone: factor of the brightness.
        role: "solid" adds to the object, "print" lies on it and is cut off at its outline, "hole" is cut out of it.
    """

    points: np.ndarray
    material: int = 0
    tone: float = 1.0
    role: str = "solid"


Outline = Callable[[np.random.Generator], list[Part]]


def make_outline(random: np.random.Generator, name: str | None = None) -> tuple[str, list[Part]]:
    """Make the parts of an object, in a square from -1 to 1.

    Args:
        random: source of random numbers.
        name: key of OUTLINES; None draws one according to the shares.

    Returns:
        The name and the parts.
    """
    if name is None:
        names = list(OUTLINES)
        shares = np.cumsum([OUTLINES[key][1] for key in names])
        name = names[int(np.searchsorted(shares, random.random() * shares[-1]))]
    return name, OUTLINES[name][0](random)


def rasterize(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return how much of each pixel a polygon covers, (H, W) float32 in [0, 1].

    Args:
        points: (P, 2), corners (x, y) in pixels, of the upper left corner of the picture.
        size: (height, width) in pixels.
    """
    factor = 4 if max(size) <= 160 else 2
    canvas = Image.new("L", (size[1] * factor, size[0] * factor))
    # a polygon of Pillow includes its border, which adds half a pixel on every side
    ImageDraw.Draw(canvas).polygon((points * factor - 0.5).ravel().tolist(), fill=255)
    return np.asarray(canvas.reduce(factor), np.float32) * np.float32(1 / 255)


# --- curves: (P, 2) points


def _polar(radii: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(ANGLES) * radii, np.sin(ANGLES) * radii], 1)


def _ellipse(x: float, y: float, width: float, height: float, turn: float = 0.0) -> np.ndarray:
    """Return an ellipse of half axes, turned by an angle."""
    across, down = np.cos(ANGLES) * width, np.sin(ANGLES) * height
    cosine, sine = np.cos(turn), np.sin(turn)
    return np.stack([x + across * cosine - down * sine, y + across * sine + down * cosine], 1)


def _box(left: float, top: float, right: float, bottom: float, slant: float = 0.0) -> np.ndarray:
    """Return a rectangle whose upper side is moved by `slant`."""
    return np.array([(left + slant, top), (right + slant, top), (right, bottom), (left, bottom)])


def _limb(points: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Return the outline of a line of given half widths with round ends.

    Args:
        points: (P, 2), at least 2.
        widths: (P,).
    """
    directions = np.gradient(points, axis=0)
    directions /= np.maximum(np.hypot(directions[:, 0], directions[:, 1])[:, None], 1e-6)
    normals = np.stack([-directions[:, 1], directions[:, 0]], 1)
    turns = np.linspace(0, np.pi, 7)[1:-1, None]
    last = points[-1] + widths[-1] * (normals[-1] * np.cos(turns) + directions[-1] * np.sin(turns))
    first = points[0] - widths[0] * (normals[0] * np.cos(turns) + directions[0] * np.sin(turns))
    left, right = points + normals * widths[:, None], points - normals * widths[:, None]
    return np.concatenate([left, last, right[::-1], first])


def _arm(
    random: np.random.Generator, start: tuple[float, float], angle: float, length: float, width: float
) -> np.ndarray:
    """Return a limb with a joint in its middle, thinner towards its end."""
    bend = random.normal(0, 0.5)
    first = np.array([np.cos(angle), np.sin(angle)]) * length / 2
    second = np.array([np.cos(angle + bend), np.sin(angle + bend)]) * length / 2
    points = np.array(start) + np.stack([0 * first, first, first + second])
    return _limb(points, width * np.array([1, 0.85, 0.65]))


def _wobble(random: np.random.Generator, strength: float) -> np.ndarray:
    """Return radii around 1 of smooth random deviations."""
    orders = np.arange(2, random.integers(4, 10))
    heights = random.normal(0, strength, len(orders)) / orders**1.1
    phases = random.uniform(0, 2 * np.pi, (len(orders), 1))
    return np.clip(1 + (heights[:, None] * np.cos(orders[:, None] * ANGLES + phases)).sum(0), 0.25, 1.8)


def _prints(random: np.random.Generator, least: int = 0, most: int = 5) -> list[Part]:
    """Return patterns that are printed on an object."""
    parts = []
    for number in range(random.integers(least, most)):
        x, y = random.uniform(-0.7, 0.7, 2)
        width, height = random.uniform(0.08, 0.6, 2)
        kind = random.integers(4)
        if kind == 0:
            points = _ellipse(x, y, width, height, random.uniform(0, np.pi))
        elif kind == 1:
            points = _box(x - width, y - height, x + width, y + height, random.normal(0, 0.1))
        elif kind == 2:
            points = _polar(_wobble(random, 0.5)) * width + [x, y]
        else:  # a band
            points = _box(-2, y, 2, y + height * 0.6, random.normal(0, 0.5))
        parts.append(Part(points, 3 + number % 2, role="print"))
    return parts


# --- objects


def make_blob(random: np.random.Generator) -> list[Part]:
    """Make a bent round thing: stone, fruit, potato, cushion, fish."""
    radii = _wobble(random, random.choice([0.06, 0.15, 0.35]))
    parts = [Part(_polar(radii))]
    if random.random() < 0.25:
        parts += _prints(random, 1, 4)
    if random.random() < 0.15:  # stalk
        parts.append(Part(_limb(np.array([(0, -0.85), (0.05, -1.1), (0.15, -1.3)]), np.full(3, 0.06)), 1))
    return parts


def make_ball(random: np.random.Generator) -> list[Part]:
    """Make a disk, an ellipse or a superellipse: ball, plate, egg, button, pillow."""
    exponent = random.choice([2.0, 2.0, random.uniform(1.2, 5)])
    radii = (np.abs(np.cos(ANGLES)) ** exponent + np.abs(np.sin(ANGLES)) ** exponent) ** (-1 / exponent)
    parts = [Part(_polar(radii))]
    if random.random() < 0.3:  # rim of a plate or a bowl
        parts.append(Part(_polar(radii * random.uniform(0.5, 0.9)), 1, random.uniform(0.7, 1.1), "print"))
    if random.random() < 0.3:
        parts += _prints(random, 1, 4)
    return parts


def make_polygon(random: np.random.Generator) -> list[Part]:
    """Make a polygon of straight sides: shard, roof, kite, sail, sign."""
    count = int(random.integers(3, 8))
    angles = np.sort(random.uniform(0, 2 * np.pi, count))
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * random.uniform(0.6, 1.2, (count, 1))
    return [Part(points), *(_prints(random) if random.random() < 0.4 else [])]


def make_sheet(random: np.random.Generator) -> list[Part]:
    """Make a rectangle with printing: book, screen, picture, card, phone."""
    width = random.uniform(0.4, 1)
    outer = _box(-width, -1, width, 1) + random.normal(0, 0.06, (4, 2))
    parts = [Part(outer)]
    if random.random() < 0.6:  # frame
        parts.append(Part(outer * random.uniform(0.7, 0.95), 1, role="print"))
    return parts + (_prints(random) if random.random() < 0.6 else [])


def make_block(random: np.random.Generator) -> list[Part]:
    """Make a block of three visible faces: box, case, building, car from afar, cupboard."""
    width, height = random.uniform(0.4, 0.9), random.uniform(0.3, 0.8)
    deep, rise = random.uniform(0.1, 0.5) * random.choice([-1, 1]), random.uniform(0.08, 0.4)
    tones = random.uniform(0.5, 1.2, 3)
    corner = width if deep > 0 else -width
    front = _box(-width, -height, width, height)
    top = np.array(
        [(-width, -height), (width, -height), (width + deep, -height - rise), (-width + deep, -height - rise)]
    )
    side = np.array(
        [(corner, -height), (corner + deep, -height - rise), (corner + deep, height - rise), (corner, height)]
    )
    parts = [Part(top, 0, tones[0]), Part(side, 0, tones[1]), Part(front, 0, tones[2])]
    if random.random() < 0.5:  # windows or drawers
        rows, columns = random.integers(1, 5, 2)
        steps_y, steps_x = np.linspace(-height, height, rows + 1), np.linspace(-width, width, columns + 1)
        gap = random.uniform(0.1, 0.3)
        for y, next_y in pairwise(steps_y):
            for x, next_x in pairwise(steps_x):
                dx, dy = (next_x - x) * gap, (next_y - y) * gap
                parts.append(Part(_box(x + dx, y + dy, next_x - dx, next_y - dy), 1, role="print"))
    elif random.random() < 0.4:
        parts += _prints(random)
    return parts


def make_vessel(random: np.random.Generator) -> list[Part]:
    """Make a vessel of mirrored profile: bottle, vase, cup, lamp, bell, with a handle at times."""
    heights = np.linspace(-1, 1, 24)
    knots = random.uniform(0.15, 0.8, random.integers(2, 6))
    widths = np.interp(heights, np.linspace(-1, 1, len(knots)), knots)
    if random.random() < 0.6:
        widths = np.convolve(np.pad(widths, 3, "edge"), np.full(7, 1 / 7), "valid")
    profile = np.stack([widths, heights], 1)
    parts = []
    if random.random() < 0.3:  # handle
        x, y, r = widths[12] * 0.95, random.uniform(-0.3, 0.3), random.uniform(0.25, 0.45)
        parts += [Part(_ellipse(x, y, r, r * 1.2)), Part(_ellipse(x, y, r * 0.6, r * 0.8), role="hole")]
    parts.append(Part(np.concatenate([profile, profile[::-1] * [-1, 1]])))
    if random.random() < 0.5:  # label
        top, bottom = np.sort(random.uniform(-0.7, 0.9, 2))
        parts.append(Part(_box(-1, top, 1, bottom), 1, role="print"))
    if random.random() < 0.4:  # mouth or cap
        parts.append(Part(_ellipse(0, -1, widths[0], widths[0] * random.uniform(0.1, 0.35)), 2, random.uniform(0.4, 1)))
    return parts


def make_person(random: np.random.Generator) -> list[Part]:
    """Make a figure with head, body, arms and legs; hair and clothes have their own materials."""
    wide, hip = random.uniform(0.16, 0.3), random.uniform(0.1, 0.3)
    legs = [_arm(random, (s * wide * 0.5, hip), np.pi / 2 + random.normal(0, 0.3), 0.9, wide * 0.5) for s in (-1, 1)]
    arms = [
        _arm(random, (s * wide, -0.42), np.pi / 2 - s * random.uniform(-0.2, 1.8), 0.75, wide * 0.32) for s in (-1, 1)
    ]
    body = _limb(np.array([(0, -0.4), (0, 0), (0, hip)]), wide * np.array([1, 0.9, 1]) * random.uniform(0.9, 1.3))
    size = random.uniform(0.13, 0.2)
    head = _ellipse(random.normal(0, 0.05), -0.75, size * 0.85, size)
    sleeves = 1 if random.random() < 0.5 else 0
    parts = [Part(legs[0], 2, 0.85), Part(legs[1], 2), Part(arms[0], sleeves, 0.9), Part(body, 1)]
    parts += [
        Part(arms[1], sleeves),
        Part(_limb(np.array([(0, -0.62), (0, -0.5)]), np.full(2, size * 0.5)), 0),
        Part(head, 0),
    ]
    if random.random() < 0.7:  # hair or hat
        parts.append(
            Part(_ellipse(head[:, 0].mean(), -0.75 - size * 0.5, size * 0.95, size * random.uniform(0.5, 0.9)), 3)
        )
    if random.random() < 0.3:
        parts.append(Part(_box(-1, -0.3, 1, random.uniform(-0.2, 0.1)), 4, role="print"))
    return parts[random.integers(3) :] if random.random() < 0.3 else parts


def make_animal(random: np.random.Generator) -> list[Part]:
    """Make a figure of a lying body, legs, neck, head and tail: dog, horse, cow, bird."""
    thick, leg = random.uniform(0.2, 0.42), random.uniform(0.3, 0.9)
    legs = [
        _arm(random, (x, thick * 0.4), np.pi / 2 + random.normal(0, 0.2), leg, random.uniform(0.05, 0.11))
        for x in (-0.55, -0.45, 0.42, 0.55)[random.choice([0, 0, 2]) :]
    ]
    body = _limb(np.array([(-0.5, 0), (0, random.normal(0, 0.06)), (0.5, 0)]), thick * random.uniform(0.75, 1.15, 3))
    reach, high = random.uniform(0.7, 1), -random.uniform(0, 0.7)
    neck = _limb(np.array([(0.5, -0.05), (reach, high)]), thick * np.array([0.7, 0.45]))
    size = random.uniform(0.14, 0.26)
    head = _ellipse(reach + size * 0.5, high, size * random.uniform(1, 1.7), size, random.normal(0.2, 0.3))
    ear = np.array(
        [(reach, high - size * 0.5), (reach + size * 0.6, high - size * 0.6), (reach + 0.05, high - size * 1.9)]
    )
    tail = _arm(
        random, (-0.6, -0.05), np.pi + random.normal(0, 0.6), random.uniform(0.2, 0.8), random.uniform(0.04, 0.1)
    )
    parts = [
        Part(tail),
        *(Part(points, tone=0.85) for points in legs),
        Part(body),
        Part(neck),
        Part(head),
        Part(ear, 1),
    ]
    spots = _prints(random, 1, 6) if random.random() < 0.3 else []
    eye = Part(_ellipse(reach + size * 0.7, high - size * 0.2, 0.03, 0.03), 2, 0.3, "print")
    return [*parts, *spots, eye]


def make_vehicle(random: np.random.Generator) -> list[Part]:
    """Make a body on wheels with windows: car, bus, cart, train."""
    low, roof = random.uniform(0.1, 0.3), -random.uniform(0.35, 0.75)
    front, back = random.uniform(-0.6, -0.1), random.uniform(0.2, 0.9)
    cabin = np.array([(front - 0.2, 0), (front, roof), (back - 0.1, roof), (min(back + 0.2, 1), 0)])
    hull = np.array([(-1, low), (-0.97, -0.05), (-0.8, -0.1), (0.9, -0.12), (1, 0), (1, low)])
    parts = [Part(cabin), Part(hull)]
    inner = (cabin - cabin.mean(0)) * [0.85, 0.7] + cabin.mean(0)
    parts.append(Part(inner, 1, 0.6, "print"))
    if random.random() < 0.7:
        middle = random.uniform(front + 0.1, back - 0.1)
        parts.append(Part(_box(middle - 0.02, roof, middle + 0.02, 0), 0, role="print"))
    radius = random.uniform(0.14, 0.24)
    for x in (-0.6, 0.62):
        parts += [Part(_ellipse(x, low, radius, radius), 2, 0.4), Part(_ellipse(x, low, radius / 2, radius / 2), 3)]
    return parts + [Part(part.points, 4, role="print") for part in _prints(random, 0, 3)]


def make_tree(random: np.random.Generator) -> list[Part]:
    """Make a trunk with a crown, or a plant in a pot."""
    width, height = random.uniform(0.05, 0.14), random.uniform(0.1, 0.9)
    trunk = _limb(np.array([(0, 1), (random.normal(0, 0.05), 0.3), (0, -0.2)]), width * np.array([1.2, 1, 0.7]))
    ragged = _wobble(random, 0.3) * (1 + random.normal(0, random.uniform(0.03, 0.12), len(ANGLES)))
    crown = _polar(ragged) * [random.uniform(0.4, 0.9), 0.35 + height * 0.4] + [0, -0.35]
    parts = [Part(trunk, 1), Part(crown, 0)]
    if random.random() < 0.3:
        parts.append(Part(np.array([(-0.35, 0.5), (0.35, 0.5), (0.25, 1.05), (-0.25, 1.05)]), 2))
    return parts


def make_leaf(random: np.random.Generator) -> list[Part]:
    """Make a ragged or toothed outline: leaf, flower, splash, bush, flame, star."""
    teeth = int(random.integers(4, 16))
    radii = 1 + random.uniform(0.05, 0.45) * np.sin(ANGLES * teeth + random.uniform(0, 6))
    radii = radii * _wobble(random, 0.2) * (1 + random.normal(0, 0.05, len(ANGLES)))
    parts = [Part(_polar(np.clip(radii, 0.2, 1.6)))]
    if random.random() < 0.4:
        size = random.uniform(0.2, 0.4)
        parts.append(Part(_ellipse(0, 0, size, size), 1))
    return parts


def make_rod(random: np.random.Generator) -> list[Part]:
    """Make a long thing: stick, pen, knife, branch, banana, spoon."""
    thick, bend = random.uniform(0.05, 0.2), random.normal(0, 0.25)
    x = np.linspace(-1, 1, 9)
    points = np.stack([x, bend * (1 - x * x)], 1)
    parts = [Part(_limb(points, thick * np.interp(x, [-1, 0, 1], random.uniform(0.5, 1.2, 3))))]
    if random.random() < 0.3:
        parts.append(
            Part(
                _ellipse(1, 0, thick * random.uniform(1.5, 3), thick * random.uniform(1.2, 2)), int(random.integers(2))
            )
        )
    if random.random() < 0.3:
        parts.append(Part(_box(random.uniform(-0.9, 0), -1, random.uniform(0, 0.9), 1), 1, role="print"))
    return parts


def make_wire(random: np.random.Generator) -> list[Part]:
    """Make a pole, a rope, a cable or a rail: far longer than wide."""
    count = int(random.integers(3, 7))
    x = np.linspace(-2.5, 2.5, 24)
    y = np.interp(x, np.linspace(-2.5, 2.5, count), random.normal(0, random.choice([0.0, 0.05, 0.4]), count))
    y = np.convolve(np.pad(y, 4, "edge"), np.full(9, 1 / 9), "valid")
    return [Part(_limb(np.stack([x, y], 1), np.full(24, random.uniform(0.025, 0.06))))]


def make_ring(random: np.random.Generator) -> list[Part]:
    """Make a ring or a frame with a hole that shows what is behind: tire, window frame, link, handle."""
    inner = random.uniform(0.45, 0.88)
    outer = _ellipse(0, 0, 1, random.uniform(0.5, 1)) if random.random() < 0.6 else _box(-1, -0.8, 1, 0.8)
    parts = [Part(outer), Part(outer * inner, role="hole")]
    if random.random() < 0.35:  # spokes
        for angle in np.arange(0, np.pi, np.pi / random.integers(1, 6)):
            end = np.array([np.cos(angle), np.sin(angle)]) * 0.9 * [1, np.ptp(outer[:, 1]) / 2]
            parts.append(Part(_limb(np.stack([-end, end]), np.full(2, random.uniform(0.02, 0.05))), 1))
    return parts


def make_furniture(random: np.random.Generator) -> list[Part]:
    """Make a seat or a board on thin legs: chair, table, stool, rack."""
    top, thick, leg = random.uniform(-0.3, 0.3), random.uniform(0.05, 0.25), random.uniform(0.03, 0.09)
    parts = []
    for x in (-0.8, -0.5, 0.5, 0.8):
        end = x + random.normal(0, 0.06)
        parts.append(Part(_limb(np.array([(x, top), (end, 1.0 - 0.15 * (abs(x) < 0.6))]), np.full(2, leg)), 1, 0.8))
    if random.random() < 0.6:  # back
        high = -random.uniform(0.6, 1.2)
        parts.append(Part(_box(-0.85, high, 0.85, top), 0, 0.9))
        if random.random() < 0.5:
            parts.append(Part(_box(-0.7, high + 0.12, 0.7, top - 0.1), role="hole"))
            for x in np.linspace(-0.6, 0.6, random.integers(2, 6)):
                parts.append(Part(_box(x - leg * 0.6, high, x + leg * 0.6, top), 1))
    slant = random.uniform(0, 0.3)
    seat = np.array(
        [(-0.9 + slant, top - thick), (0.9 - slant, top - thick), (0.95, top + thick), (-0.95, top + thick)]
    )
    return [*parts, Part(seat, 0)]


def make_cluster(random: np.random.Generator) -> list[Part]:
    """Make one thing of several lumps: toy, shoe, cloud of smoke, coral, bag."""
    parts = [Part(_polar(_wobble(random, 0.2)) * 0.6, 0)]
    for _ in range(random.integers(1, 5)):
        x, y = random.normal(0, 0.5, 2)
        parts.append(Part(_polar(_wobble(random, 0.2)) * random.uniform(0.2, 0.55) + [x, y], int(random.integers(3))))
    return parts + (_prints(random) if random.random() < 0.3 else [])


# share: of all objects, relative
OUTLINES: dict[str, tuple[Outline, float]] = {
    "blob": (make_blob, 14),
    "ball": (make_ball, 10),
    "polygon": (make_polygon, 5),
    "sheet": (make_sheet, 8),
    "block": (make_block, 8),
    "vessel": (make_vessel, 9),
    "person": (make_person, 12),
    "animal": (make_animal, 9),
    "vehicle": (make_vehicle, 6),
    "tree": (make_tree, 4),
    "leaf": (make_leaf, 4),
    "rod": (make_rod, 6),
    "wire": (make_wire, 3),
    "ring": (make_ring, 4),
    "furniture": (make_furniture, 5),
    "cluster": (make_cluster, 6),
}
# these look alike whatever their angle, and are never as large as the picture
THIN = ("rod", "wire", "ring")
