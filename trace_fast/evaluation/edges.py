"""Scores of edge maps: ODS, OIS and AP by one-to-one matching, clDice, and recall by what a contour separates.

As in the benchmark of BSDS500: ridges of the map (`ops.suppress_nonmaxima`) at 99 thresholds, thinned, matched with the
contours within 0.0075 of the image's diagonal. Counts are kept for each image, so that scores of any set of images
follow from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trace_fast import ops
from trace_fast.evaluation.data import GROUPS, NEIGHBORS, SIDES, SIZES, Contours
from trace_fast.extras import require
from trace_fast.io.arrays import array_to_tensor

__all__ = [
    "DISTANCE",
    "RESAMPLES",
    "SUPPRESSION",
    "THRESHOLDS",
    "Counts",
    "EdgeScores",
    "cldice",
    "compare_edges",
    "count_edges",
    "score_edges",
]

THRESHOLDS = tuple(k / 100 for k in range(1, 100))
DISTANCE = 0.0075  # of the diagonal
SUPPRESSION = "bsds"
RESAMPLES = 1000


@dataclass(frozen=True)
class Counts:
    """Pixels of one image at each of T thresholds; see `ops.count_matches`.

    Attributes:
        matches: (T, 6) int64.
        matched_by_group: (T, G) int64, contour pixels with a partner by GROUPS; G = 0 where segments are unknown.
        pixels_by_group: (G,) int64, contour pixels by group.
    """

    matches: np.ndarray
    matched_by_group: np.ndarray
    pixels_by_group: np.ndarray


@dataclass(frozen=True)
class EdgeScores:
    """Scores of one method on n images.

    Attributes:
        images: n.
        ods: best F of one threshold for all images.
        ois: F of each image's own best threshold.
        ap: area under the curve of precision over recall.
        cldice: mean over images at `threshold`; lines grow by the matching distance either way.
        threshold: of ODS.
        precision, recall: (T,) at all thresholds, of all images together.
        f_per_image: (n,) F of each image at `threshold`.
        intervals: 95 % of bootstrap resamples of the images, (low, high) of ods, ois, ap and cldice.
        by: share of the contour pixels that were detected at `threshold`, and the number of contour pixels, by side
            (each of SIDES), size of the smaller segment (each of SIZES) and neighbors that it touches (each of
            NEIGHBORS); empty where segments are unknown.
        resamples: (R,) each, ods, ois, ap and cldice of every resample, for `compare_edges`.
    """

    images: int
    ods: float
    ois: float
    ap: float
    cldice: float
    threshold: float
    precision: np.ndarray
    recall: np.ndarray
    f_per_image: np.ndarray
    intervals: dict[str, tuple[float, float]]
    by: dict[str, dict[str, tuple[float, int]]]
    resamples: dict[str, np.ndarray] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures of a report, for JSON: all but the curves and the images."""
        names = ("images", "ods", "ois", "ap", "cldice", "threshold", "intervals", "by")
        return {name: getattr(self, name) for name in names}


def count_edges(
    edges: np.ndarray,
    contours: Contours,
    *,
    distance: float = DISTANCE,
    thresholds: Sequence[float] = THRESHOLDS,
    suppression: str | None = SUPPRESSION,
) -> Counts:
    """Match an edge map with the contours of its image, one to one, and count the pixels.

    Args:
        edges: (H, W) float32 in [0, 1].
        contours: ground truth of the same size.
        distance: largest distance of a pair, as a share of the image's diagonal.
        thresholds: T strengths from which a pixel is a detection.
        suppression: how the ridges of the map are found, a method of `ops.suppress_nonmaxima`; None where the map holds
            lines already.

    Returns:
        Counts of this image, for `score_edges`.

    Raises:
        ValueError: the size of the map is not that of the contours, or there is no such method.

    Example:
        >>> contours = find_contours(np.repeat([[1, 1, 2, 2]], 3, axis=0))
        >>> edges = np.float32([[0, 0.9, 0, 0]] * 3)
        >>> score_edges([count_edges(edges, contours, suppression=None)]).ods
        1.0
    """
    shape = contours.ignored.shape
    if edges.shape != shape:
        raise ValueError(f"count_edges: edges must be of the ground truth's size {shape}, got {edges.shape}")
    ridges = array_to_tensor(np.asarray(edges, np.float32))
    if suppression is not None:
        ridges = ops.suppress_nonmaxima(ridges[None], suppression)[0]
    groups = contours.groups
    matches, by_group = ops.count_matches(
        ridges,
        array_to_tensor(contours.lines),
        thresholds,
        distance * float(np.hypot(*shape)),
        ignored=array_to_tensor(contours.ignored),
        groups=None if groups is None else array_to_tensor(groups),
        num_groups=len(GROUPS),
    )
    if groups is None:
        return Counts(matches.numpy(), by_group.numpy()[:, :0], np.zeros(0, np.int64))
    return Counts(matches.numpy(), by_group.numpy(), np.bincount(groups[contours.lines], minlength=len(GROUPS)))


def score_edges(
    counts: Sequence[Counts],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> EdgeScores:
    """Return the scores of a method from the counts of its images.

    ODS is interpolated between thresholds, and AP is taken at recalls 0, 0.01, .., 1, both as BSDS500 does.

    Args:
        counts: of n images, n >= 1, all at the same thresholds; see `count_edges`.
        thresholds: those thresholds.
        resamples: of the images, drawn with replacement, for the intervals.
        seed: seed of the resamples.

    Returns:
        Scores of all images together.

    Raises:
        ValueError: there are no images, thresholds differ, or resamples is below 1.

    Example:
        >>> contours = find_contours(np.repeat([[1, 1, 2, 2]], 3, axis=0))
        >>> maps = [np.float32([[0, 0.9, 0, 0]] * 3), np.float32([[0, 0.2, 0, 0]] * 3)]
        >>> scores = score_edges([count_edges(edges, contours, suppression=None) for edges in maps])
        >>> scores.recall[[0, 29]].tolist()  # at thresholds 0.01 and 0.3
        [1.0, 0.5]
    """
    if not counts or any(len(image.matches) != len(thresholds) for image in counts):
        raise ValueError(f"score_edges: counts must be of at least one image at {len(thresholds)} thresholds each")
    if resamples < 1:
        raise ValueError(f"score_edges: resamples must be at least 1, got {resamples}")
    matches = np.stack([image.matches for image in counts])  # (n, T, 6)
    images = len(matches)
    best = f_measure(matches).argmax(1)  # (n,)
    own = np.take_along_axis(matches, best[:, None, None], 1)[:, 0]  # (n, 6)

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return the scores of R weightings (R, n) of the images, (R,) each."""
        total = np.einsum("rn,ntc->rtc", weights, matches)
        ods, index = _find_best(total, np.asarray(thresholds))[:2]
        return {
            "ods": ods,
            "ois": f_measure(weights @ own),
            "ap": np.array([_average_precision(table) for table in total]),
            "cldice": (weights.T * line_overlap(matches[:, index])).sum(0) / weights.sum(1),
        }

    whole = np.ones((1, images))
    total = matches.sum(0)
    figures = {name: float(values[0]) for name, values in measure(whole).items()}
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), resamples).astype(float)
    resampled = measure(draws)
    intervals = {name: _interval(values) for name, values in resampled.items()}
    _, index, threshold = _find_best(total[None], np.asarray(thresholds))
    recall, precision = _rates(total)
    return EdgeScores(
        images=images,
        **figures,
        threshold=float(threshold[0]),
        precision=precision,
        recall=recall,
        f_per_image=f_measure(matches[:, index[0]]),
        intervals=intervals,
        by=_recall_by_group(counts, index[0]),
        resamples=resampled,
    )


def compare_edges(scores: EdgeScores, reference: EdgeScores) -> dict[str, tuple[float, float, float]]:
    """Return how much better one method is than another on the same images.

    The difference is paired: both methods are scored on the same resamples of the images, so that images which are
    difficult for both do not widen its interval.

    Args:
        scores: of a method.
        reference: of another one, from the same images in the same order, by `score_edges` with the same `resamples`
            and `seed`.

    Returns:
        Difference, and the ends of its interval of 95 %, of ods, ois, ap and cldice.

    Raises:
        ValueError: numbers of images or resamples differ.

    Example:
        >>> contours = find_contours(np.repeat([[1, 1, 2, 2]], 3, axis=0))
        >>> right, wrong = np.float32([[0, 0.9, 0, 0]] * 3), np.float32([[0, 0, 0, 0]] * 3)
        >>> scores = [score_edges([count_edges(edges, contours, suppression=None)]) for edges in (right, wrong)]
        >>> compare_edges(*scores)["ods"]
        (1.0, 1.0, 1.0)
    """
    sizes = [(entry.images, len(entry.resamples["ods"])) for entry in (scores, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"compare_edges: scores and reference must have the same numbers of images and resamples, got {sizes[0]} "
            f"and {sizes[1]}"
        )
    differences = {}
    for name, values in scores.resamples.items():
        low, high = _interval(values - reference.resamples[name])
        differences[name] = getattr(scores, name) - getattr(reference, name), low, high
    return differences


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Return the interval that holds 95 % of the values (R,)."""
    low, high = np.percentile(values, [2.5, 97.5]).tolist()
    return low, high


def _recall_by_group(counts: Sequence[Counts], index: int) -> dict[str, dict[str, tuple[float, int]]]:
    """Return recall at one threshold, and the number of contour pixels, by side, size and neighbors."""
    if not counts[0].pixels_by_group.size:
        return {}
    matched = np.sum([image.matched_by_group[index] for image in counts], axis=0)
    pixels = np.sum([image.pixels_by_group for image in counts], axis=0)
    by: dict[str, dict[str, tuple[float, int]]] = {}
    for axis, (name, values) in enumerate([("side", SIDES), ("size", SIZES), ("neighbors", NEIGHBORS)]):
        by[name] = {}
        for value in values:
            members = [i for i, group in enumerate(GROUPS) if group[axis] == value]
            count = int(np.sum(pixels[members]))
            by[name][value] = (float(np.sum(matched[members]) / max(count, 1)), count)
    return by


def cldice(prediction: np.ndarray, target: np.ndarray, tolerance: float = 0.0) -> float:
    """Return the overlap of center lines (Shit et al., CVPR 2021): each mask's skeleton against the other mask.

    Tprec = |S_P in V_L| / |S_P|, Tsens = |S_L in V_P| / |S_L|, clDice = 2 Tprec Tsens / (Tprec + Tsens). Skeletons are
    those of `ops.thin`.

    Args:
        prediction: (H, W) bool.
        target: (H, W) bool.
        tolerance: distance in pixels by which the masks V are grown, so that lines may differ by as much.

    Returns:
        clDice in [0, 1]; 1 where both are empty, 0 where one is.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> prediction, target = np.zeros((2, 3, 7), bool)
        >>> prediction[1], target[1, :4] = True, True
        >>> round(cldice(prediction, target), 3)  # precision 4 / 7, sensitivity 1
        0.727
    """
    if prediction.shape != target.shape or prediction.ndim != 2:
        raise ValueError(f"cldice: target must be {prediction.shape} like prediction, got {target.shape}")
    require("cldice", "scipy")
    from scipy.ndimage import distance_transform_edt

    masks = [np.asarray(mask, bool) for mask in (prediction, target)]
    if not all(mask.any() for mask in masks):
        return float(not any(mask.any() for mask in masks))
    lines = [ops.thin(array_to_tensor(mask)[None])[0].numpy() for mask in masks]
    grown = [distance_transform_edt(~mask) <= tolerance for mask in masks]
    precision, sensitivity = grown[1][lines[0]].mean(), grown[0][lines[1]].mean()
    return float(harmonic(precision, sensitivity))


def f_measure(counts: np.ndarray) -> np.ndarray:
    """Return the harmonic mean of precision and recall, (...), of counts (..., 6)."""
    return harmonic(*_rates(counts))


def line_overlap(counts: np.ndarray) -> np.ndarray:
    """Return clDice of lines grown by the matching distance, (...), of counts (..., 6)."""
    return harmonic(counts[..., 5] / np.maximum(counts[..., 1], 1), counts[..., 4] / np.maximum(counts[..., 3], 1))


def _rates(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return recall and precision; 0 where there is nothing to count."""
    recall, precision = (counts[..., i] / np.maximum(counts[..., i + 1], 1) for i in (0, 2))
    return recall, precision


def harmonic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the harmonic mean, element by element; 0 where both are 0."""
    return 2 * a * b / np.maximum(a + b, np.finfo(float).tiny)


def _find_best(counts: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the best F between thresholds (R,), the index of the best threshold itself, and the threshold of that F.

    Counts are (R, T, 6).
    """
    recall, precision = _rates(counts)
    index = harmonic(recall, precision).argmax(1)
    if len(thresholds) == 1:
        return harmonic(recall, precision)[:, 0], index, thresholds[index]
    share = np.linspace(0, 1, 100)

    def between(values: np.ndarray) -> np.ndarray:
        return values[..., 1:, None] * share + values[..., :-1, None] * (1 - share)

    best_f = np.empty(len(counts))
    best_threshold = np.empty(len(counts))
    for row, pair in enumerate(zip(recall, precision, strict=True)):
        f = harmonic(*(between(values) for values in pair))
        best_f[row], best_threshold[row] = f.max(), between(thresholds).ravel()[f.argmax()]
    return best_f, index, best_threshold


def _average_precision(counts: np.ndarray) -> float:
    """Return the area under precision over recall of (T, 6): linear between thresholds, 0 beyond all recalls."""
    recall, precision = _rates(counts)
    recalls, first = np.unique(recall, return_index=True)
    if len(recalls) < 2:
        return 0.0
    return float(np.interp(np.linspace(0, 1, 101), recalls, precision[first], left=0, right=0).sum() / 100)
