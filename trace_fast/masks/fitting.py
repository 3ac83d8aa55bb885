"""Masks that are fitted to edges, each on its own: the default mode of `trace_fast.propagate`.

A mask takes regions of the hierarchy of edges that it covers well, is split where edges are strong, and stays as it is
where there are none. All constants were chosen on 67 photographs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trace_fast import ops
from trace_fast.masks.formats import MaskSet
from trace_fast.masks.hierarchy import Hierarchy, Nodes

__all__ = ["THRESHOLD", "Part", "draw_parts", "fit_masks"]

Box = tuple[slice, slice]

THRESHOLD = 0.15  # mean strength from which a boundary separates regions: it may be weak, since masks confirm it
SHARE = 0.7  # of a region, from which a mask takes it; a mask leaves a region of which it covers 1 - SHARE or less
COARSE = 5.0  # mean length of the straight pieces of an outline from which it was drawn on a coarse grid, in pixels
REACH = 0.75  # farthest that a coarse outline moves, in such lengths
FARTHEST = 0.02  # farthest that any outline moves, as a share of the image's diagonal
CERTAIN = 0.98  # mean strength from which a boundary separates objects, which split and join masks: few are certain
COVERED = 0.5  # smallest share of an object inside a mask, for it to be split off


@dataclass(frozen=True)
class Part:
    """A part of a mask, or what several have become, within its box.

    Attributes:
        box: rows and columns of the box in the image.
        bits: the pixels of the box in raster order, eight to a byte.
        home: number of the object that holds more of it than any other, or -1 if more lies in no object.
        score: the score of the mask times the part's share of its area.
        sources: indices of the masks that it comes from.
    """

    box: Box
    bits: np.ndarray
    home: int
    score: float
    sources: list[int]

    def pixels(self) -> np.ndarray:
        """Return the part as (height, width) bool."""
        height, width = (side.stop - side.start for side in self.box)
        return np.unpackbits(self.bits, count=height * width).view(bool).reshape(height, width)


class Fitter:
    """The regions and the objects of an edge map, to which masks are fitted.

    Args:
        edges: (H, W) float32 in [0, 1], on the CPU.
        threshold: mean strength from which a boundary separates regions.
        min_area: area of the smallest part, in pixels.
    """

    def __init__(self, edges: Tensor, threshold: float, min_area: int):
        basins, tree = Hierarchy.of(edges)
        self.threshold, self.min_area = threshold, min_area
        self.farthest = max(1, round(FARTHEST * float(np.hypot(*edges.shape))))
        self.nodes = nodes = Nodes.of(basins, tree)
        # the regions of the cut are numbered from 0
        _, numbers = tree.cut(threshold).unique(return_inverse=True)
        self.regions = numbers.to(torch.int32)[basins].numpy()  # (H, W)
        self.areas = np.bincount(self.regions.ravel())
        # a pixel of an edge itself may lie on the other side of an outline
        self.strength = functional.max_pool2d(edges[None], 3, 1, 1)[0].numpy()
        objects = tree.cut(CERTAIN).unique().numpy()
        # the last node is the whole image
        self.objects = objects[(nodes.areas[objects] >= min_area) & (objects < len(nodes.areas) - 1)]

    def fit(self, mask: np.ndarray, score: float, source: int) -> list[Part]:
        """Fit a mask (H, W) bool of a score, and return its parts."""
        if not mask.any():
            return [Part(np.s_[0:0, 0:0], np.zeros(0, np.uint8), -1, score, [source])]
        (top, bottom), (left, right) = _find_box(mask)
        y, x = max(0, top - self.farthest), max(0, left - self.farthest)
        box = np.s_[y : bottom + self.farthest, x : right + self.farthest]
        moved = self._move_outline(mask[box], box)
        parts, area = self._split(moved, box), np.count_nonzero(moved)
        # the same floats for a mask that is not split
        shares = [np.count_nonzero(part) / area for part in parts]
        return [self._crop(part, y, x, score * share, source) for part, share in zip(parts, shares, strict=True)]

    def find_covered(self, parts: Sequence[Part], cover: float) -> set[int]:
        """Return the numbers of the objects of which all parts together cover a share."""
        covered = np.zeros(self.regions.shape, bool)
        for part in parts:
            covered[part.box] |= part.pixels()
        shares = self.nodes.count(covered, np.s_[:, :], self.objects) / self.nodes.areas[self.objects]
        return set(np.flatnonzero(shares >= cover).tolist())

    def unite(self, parts: Sequence[Part]) -> Part:
        """Return the object that is the home of all parts, as one part."""
        whole = self.nodes.make_mask(self.objects[parts[0].home])
        united = self._crop(whole, 0, 0, max(part.score for part in parts), 0)
        return replace(united, sources=sorted({source for part in parts for source in part.sources}))

    def _move_outline(self, mask: np.ndarray, box: Box) -> np.ndarray:
        """Move the outline of a coarse mask, cropped to a box, to that of the regions which it covers."""
        length = _measure_pieces(mask)
        if length < COARSE:
            return mask
        regions = self.regions[box]
        covered = np.bincount(regions[mask], minlength=len(self.areas))
        present = np.bincount(regions.ravel(), minlength=len(self.areas))
        taken = (covered >= SHARE * self.areas) & (present == self.areas)
        left = (covered <= (1 - SHARE) * self.areas) & (covered > 0)
        # a mask that covers no region well is a part of one
        if 2 * covered[left].sum() > covered.sum():
            left[:] = False
        changed = np.where(mask, left[regions], taken[regions])
        # in a region all changes are near the outline, or none is made
        far = changed & ~_is_near_outline(mask, min(round(REACH * length), self.farthest))
        unchanged = np.zeros(len(self.areas), bool)
        unchanged[regions[far]] = True
        moved = mask ^ (changed & ~unchanged[regions])
        return moved if moved.any() else mask

    def _split(self, mask: np.ndarray, box: Box) -> list[np.ndarray]:
        """Return the objects in a mask, cropped to a box, and the parts of the rest."""
        inside = self.nodes.count(mask, box, self.objects)
        rest, left, parts = mask, np.count_nonzero(mask), []
        for number in np.flatnonzero(inside >= COVERED * self.nodes.areas[self.objects]):
            # what is left is a part, too
            if left - inside[number] >= self.min_area:
                part = rest & self.nodes.make_mask(self.objects[number], box)
                rest, left = rest & ~part, left - inside[number]
                parts.append(part)
        return parts + self._separate(rest, box)

    def _separate(self, mask: np.ndarray, box: Box) -> list[np.ndarray]:
        """Return the connected parts of a mask that are large and have edges around; the others go to the largest."""
        numbered, counts = ops.label_regions(torch.from_numpy(~mask)[None])
        count, labels = int(counts), numbered[0].numpy()
        if count == 1:
            return [mask]
        areas = np.bincount(labels[mask], minlength=count + 1)
        outline = mask & ~_erode(mask)
        strengths = np.bincount(labels[outline], self.strength[box][outline], minlength=count + 1)
        lengths = np.bincount(labels[outline], minlength=count + 1)
        apart = (areas >= self.min_area) & (strengths >= self.threshold * lengths) & (lengths > 0)
        apart[areas.argmax()] = False
        return [mask & ~apart[labels], *(labels == label for label in np.flatnonzero(apart))]

    def _crop(self, mask: np.ndarray, y: int, x: int, score: float, source: int) -> Part:
        """Return a part, cropped to a box that begins at (y, x)."""
        (top, bottom), (left, right) = _find_box(mask)
        pixels, box = mask[top:bottom, left:right], np.s_[y + top : y + bottom, x + left : x + right]
        # the pixels in no object come first
        inside = np.insert(self.nodes.count(pixels, box, self.objects), 0, 0)
        inside[0] = np.count_nonzero(pixels) - inside.sum()
        home = int(inside.argmax()) - 1
        return Part(box, np.packbits(pixels), home, score, [source])


def fit_masks(
    mask_set: MaskSet, classes: Tensor | None, edges: Tensor, threshold: float, min_area: int, cover: float
) -> list[Part]:
    """Fit masks to edges, as `trace_fast.propagate` does by default.

    Args:
        mask_set: masks (M, H, W) and perhaps scores.
        classes: (M,) int64; parts of different classes do not become one.
        edges: (H, W) float32 in [0, 1], on the CPU.
        threshold: mean strength from which a boundary separates regions.
        min_area: area of the smallest part, in pixels.
        cover: share of an object that all parts of a class cover together, if those at home in it become the object.

    Returns:
        The parts in the order of the masks, each with the score of a mask times its share of it, or 1 times it.
    """
    fitter = Fitter(edges, threshold, min_area)
    scores = [1.0] * len(mask_set.masks) if mask_set.scores is None else mask_set.scores.tolist()
    labels = [0] * len(scores) if classes is None else classes.tolist()
    parts = [
        part
        for index, mask in enumerate(mask_set.masks)
        for part in fitter.fit(mask.cpu().numpy(), scores[index], index)
    ]
    of_class: dict[int, list[Part]] = {}
    for part in parts:
        of_class.setdefault(labels[part.sources[0]], []).append(part)
    covered = {label: fitter.find_covered(members, cover) for label, members in of_class.items()}
    groups: dict[tuple[int, int], list[Part]] = {}
    for number, part in enumerate(parts):
        label = labels[part.sources[0]]
        key = (label, part.home) if part.home in covered[label] else (number, -1)
        groups.setdefault(key, []).append(part)
    return [members[0] if home < 0 else fitter.unite(members) for (_, home), members in groups.items()]


def draw_parts(parts: Sequence[Part], size: tuple[int, int]) -> Tensor:
    """Draw parts as masks of a size, (K, height, width) bool on the CPU."""
    # pages without a mask are never touched
    masks = np.zeros((len(parts), *size), bool)
    for mask, part in zip(masks, parts, strict=True):
        mask[part.box] = part.pixels()
    return torch.from_numpy(masks)


def _find_box(mask: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the first row of a mask and the one behind its last, and likewise for columns."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)


def _measure_pieces(mask: np.ndarray) -> float:
    """Return the mean length of the straight pieces of the outline of a mask, in pixels."""
    across, down = mask[:, 1:] ^ mask[:, :-1], mask[1:] ^ mask[:-1]
    corners = np.count_nonzero(across[1:] ^ across[:-1])
    return (np.count_nonzero(across) + np.count_nonzero(down)) / max(int(corners), 1)


def _is_near_outline(mask: np.ndarray, reach: int) -> np.ndarray:
    """Return the pixels that have both the mask and its outside within a reach along each axis."""
    # the border of the image is no outline
    counts, size = np.pad(mask, reach, mode="edge").astype(np.int32), 2 * reach + 1
    for axis in (0, 1):
        sums = np.insert(counts.cumsum(axis), 0, 0, axis)
        count = sums.shape[axis]
        counts = sums.take(np.arange(size, count), axis) - sums.take(np.arange(count - size), axis)
    return (counts > 0) & (counts < size**2)


def _erode(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of a mask whose neighbors along the axes are in it, too, or beyond the box."""
    padded = np.pad(mask, 1, constant_values=True)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
