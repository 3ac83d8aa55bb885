"""Panoptic quality, by the rules of COCO (Kirillov et al., "Panoptic Segmentation", CVPR 2019)."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trace_fast.masks.coco import Panoptic

__all__ = ["PanopticQuality", "PanopticScores", "Quality", "panoptic_quality"]


@dataclass(frozen=True)
class Quality:
    """Quality of a class, or its mean over classes, in [0, 1]; nan where no class occurs.

    Attributes:
        pq: panoptic quality: sum of the IoU of matches / (TP + FP / 2 + FN / 2), which is sq * rq of a class.
        sq: segmentation quality: mean IoU of matches; 0 without a match.
        rq: recognition quality: TP / (TP + FP / 2 + FN / 2).
        classes: number of classes that occur in truth or results and are averaged.
    """

    pq: float
    sq: float
    rq: float
    classes: int


@dataclass(frozen=True)
class PanopticScores:
    """Panoptic quality of a set of images.

    Attributes:
        all: mean over all classes that occur.
        things: mean over those that are things.
        stuff: mean over those that are not.
        classes: of each class by id; nan for one that does not occur.
    """

    all: Quality
    things: Quality
    stuff: Quality
    classes: dict[int, Quality]


class PanopticQuality:
    """Panoptic quality of images that are added one by one; it holds four sums of each class.

    Truth and result of one class match where their IoU exceeds 0.5; pixels that the truth leaves void are taken out of
    the union. A crowd matches nothing and is not missed, and a result is no false positive where more than half of it
    is void or crowd of its class. (panopticapi regards one crowd of a class and image, and COCO has no more.)

    Args:
        isthing: for each category id, whether it is a thing; other categories are stuff.

    Example:
        >>> quality = PanopticQuality({1: True, 2: False})
        >>> segments = [{"id": 7, "category_id": 1}, {"id": 9, "category_id": 2}]
        >>> quality.add(np.array([[7, 7, 9, 9]]), segments, np.array([[7, 7, 7, 9]]), segments)
        >>> quality.scores().all.rq  # IoU 2/3 and 1/2
        0.5
    """

    def __init__(self, isthing: Mapping[int, bool]):
        self.isthing = dict(isthing)
        self._rows = {category: row for row, category in enumerate(self.isthing)}
        self._sums = np.zeros((len(self._rows), 4))  # IoU of matches, TP, FP, FN

    def add(
        self,
        truth: np.ndarray,
        truth_segments: Iterable[Mapping[str, Any]],
        result: np.ndarray,
        result_segments: Iterable[Mapping[str, Any]],
    ) -> None:
        """Add an image.

        Args:
            truth: (H, W) integers, the segment id of each pixel, 0 for void.
            truth_segments: "id" and "category_id" of each segment, and "iscrowd" where it is 1, as in COCO's
                segments_info.
            result: (H, W) integers likewise, of the same size.
            result_segments: "id" and "category_id" of each segment.

        Raises:
            TypeError: a map does not hold integers.
            ValueError: sizes differ; a map and its list of segments do not agree; a category is unknown.
        """
        places, classes, crowd = self._index("truth", truth, truth_segments)
        result_places, result_classes, _ = self._index("result", result, result_segments)
        if places.shape != result_places.shape:
            raise ValueError(
                f"panoptic_quality: result must be of the truth's size {places.shape}, got {result_places.shape}"
            )
        shape = len(classes) + 1, len(result_classes) + 1
        overlap = np.bincount((places * shape[1] + result_places).ravel(), minlength=shape[0] * shape[1])
        overlap = overlap.reshape(shape)  # pixels of each pair; row 0 and column 0 are void
        shared, void = overlap[1:, 1:], overlap[0, 1:]
        area, result_area = overlap.sum(1)[1:, None], overlap.sum(0)[1:]
        union = area + result_area - shared - void
        same = classes[:, None] == result_classes
        match = same & ~crowd[:, None] & (2 * shared > union)
        ignored = void + (shared * (same & crowd[:, None])).sum(0)
        unmatched = ~match.any(0) & (2 * ignored <= result_area)
        missed = ~match.any(1) & ~crowd
        np.add.at(self._sums[:, 0], classes, (match * shared / union).sum(1))
        np.add.at(self._sums[:, 1], classes, match.sum(1))
        np.add.at(self._sums[:, 2], result_classes, unmatched)
        np.add.at(self._sums[:, 3], classes, missed)

    def scores(self) -> PanopticScores:
        """Return the panoptic quality of all images that were added."""
        classes = {category: _quality(self._sums[row]) for category, row in self._rows.items()}
        things = [quality for category, quality in classes.items() if self.isthing[category]]
        stuff = [quality for category, quality in classes.items() if not self.isthing[category]]
        return PanopticScores(_mean(things + stuff), _mean(things), _mean(stuff), classes)

    def _index(
        self, name: str, ids: np.ndarray, segments: Iterable[Mapping[str, Any]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the place (H, W) of each pixel's segment, 0 for void; class and iscrowd (S,) of places from 1 on."""
        op = "panoptic_quality"
        if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu":
            got = ids.dtype if isinstance(ids, np.ndarray) else type(ids).__name__
            raise TypeError(f"{op}: {name} must be an integer array, got {got}")
        if ids.ndim != 2 or ids.size == 0:
            raise ValueError(f"{op}: {name} must be (H, W), got {ids.shape}")
        ordered = sorted(segments, key=lambda segment: segment["id"])
        known = np.array([0, *(segment["id"] for segment in ordered)])
        if (np.diff(known) <= 0).any():
            raise ValueError(
                f"{op}: {name}_segments must have distinct ids above 0, got {reprlib.repr(known[1:].tolist())}"
            )
        foreign = {segment["category_id"] for segment in ordered} - self._rows.keys()
        if foreign:
            raise ValueError(f"{op}: {name}_segments must be of known categories, got {reprlib.repr(sorted(foreign))}")
        places = np.searchsorted(known, ids).clip(max=len(known) - 1)
        right = known[places] == ids
        unlisted = np.unique(ids[~right]).tolist()
        unused = known[1:][np.bincount(places[right], minlength=len(known))[1:] == 0].tolist()
        if unlisted or unused:
            raise ValueError(
                f"{op}: {name} and {name}_segments must hold the same segments, got {reprlib.repr(unlisted)} in the "
                f"map alone and {reprlib.repr(unused)} in the list alone"
            )
        classes = np.array([self._rows[segment["category_id"]] for segment in ordered], dtype=np.intp)
        return places, classes, np.array([segment.get("iscrowd", 0) == 1 for segment in ordered], dtype=bool)


def panoptic_quality(truth: Panoptic, results: Panoptic) -> PanopticScores:
    """Return the panoptic quality of results; which classes are things, and crowds, is taken from the truth.

    Args:
        truth: panoptic segments as `read_panoptic` returns them; results may have its categories alone.
        results: panoptic segments of the same images.

    Returns:
        PQ, SQ and RQ: of all classes, of things, of stuff and of each class.

    Raises:
        ValueError: an image of one side is missing on the other, sizes differ, or a category of the results is unknown.

    Example:
        >>> truth = read_panoptic("panoptic_val2017.json", "panoptic_val2017")  # doctest: +SKIP
        >>> scores = panoptic_quality(truth, read_panoptic("results.json", "results"))  # doctest: +SKIP
        >>> print(scores.all.pq, scores.things.pq, scores.stuff.pq)  # doctest: +SKIP
    """
    for name, images, others in (("truth", truth.images, results.images), ("results", results.images, truth.images)):
        missing = sorted(others.keys() - images.keys())
        if missing:
            raise ValueError(
                f"panoptic_quality: {name} must have every image of the other side, "
                f"got none for {len(missing)}: {reprlib.repr(missing)}"
            )
    quality = PanopticQuality(truth.isthing)
    for number, image in truth.images.items():
        other = results.images[number]
        try:
            quality.add(image.segment_map(), image.segments, other.segment_map(), other.segments)
        except ValueError as error:
            raise ValueError(f"{error} (image {number})") from error
    return quality.scores()


def _quality(sums: np.ndarray) -> Quality:
    """Return the quality of a class from its four sums."""
    overlap, hits, unmatched, missed = sums.tolist()
    total = hits + unmatched / 2 + missed / 2
    if total == 0:
        return Quality(math.nan, math.nan, math.nan, 0)
    return Quality(overlap / total, overlap / hits if hits else 0.0, hits / total, 1)


def _mean(classes: Sequence[Quality]) -> Quality:
    """Return the mean over the classes that occur."""
    qualities = [(quality.pq, quality.sq, quality.rq) for quality in classes if quality.classes]
    if not qualities:
        return Quality(math.nan, math.nan, math.nan, 0)
    pq, sq, rq = np.mean(qualities, axis=0).tolist()
    return Quality(pq, sq, rq, len(qualities))
