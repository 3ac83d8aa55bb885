"""Scores of edge maps: ODS, OIS and AP by one-to-one matching, clDice, and recall by what a contour separates.

As in the benchmark of BSDS500: ridges of the map at 99 thresholds, thinned, matched with the contours within 0.0075 of
the image's diagonal. Counts are kept for each image, so that scores of any set of images follow from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trace_fast import ops
from trace_fast.evaluation.data import GROUPS, NEIGHBOURS, SIDES, SIZES, Contours

__all__ = ["THRESHOLDS", "Counts", "EdgeScores", "cldice", "count", "score"]

THRESHOLDS = tuple(k / 100 for k in range(1, 100))
DISTANCE = 0.0075  # of the diagonal
RESAMPLES = 1000


@dataclass(frozen=True)
class Counts:
    """Pixels of one image at each of T thresholds; see `ops.count_matches`.

    Attributes:
        matches: (T, 6) int64.
        by_group: (T, G) int64, contour pixels with a partner by GROUPS; no groups, G = 0, where segments are unknown.
        drawn: (G,) int64, contour pixels by group.
    """

    matches: np.ndarray
    by_group: np.ndarray
    drawn: np.ndarray


def count(
    edges: np.ndarray,
    contours: Contours,
    *,
    distance: float = DISTANCE,
    thresholds: Sequence[float] = THRESHOLDS,
    suppress: bool = True,
) -> Counts:
    """Match an edge map with the contours of its image.

    Args:
        edges: (H, W) float32 in [0, 1].
        contours: ground truth.
        distance: largest distance of a pair, as a share of the image's diagonal.
        thresholds: T strengths from which a pixel is a detection.
        suppress: keep only the ridges of the map; False where it holds lines already.

    Returns:
        Counts of this image.

    Raises:
        ValueError: the size of the map is not that of the contours.
    """
    shape = contours.ignored.shape
    if edges.shape != shape:
        raise ValueError(f"count: edges must be of the ground truth's size {shape}, got {edges.shape}")
    ridges = torch.from_numpy(np.ascontiguousarray(edges, np.float32))
    if suppress:
        ridges = ops.suppress_nonmaxima(ridges[None])[0]
    groups = contours.groups
    matches, by_group = ops.count_matches(
        ridges,
        torch.from_numpy(contours.drawn),
        thresholds,
        distance * float(np.hypot(*shape)),
        ignored=torch.from_numpy(contours.ignored),
        groups=None if groups is None else torch.from_numpy(groups),
        num_groups=len(GROUPS),
    )
    if groups is None:
        return Counts(matches.numpy(), by_group.numpy()[:, :0], np.zeros(0, np.int64))
    return Counts(matches.numpy(), by_group.numpy(), np.bincount(groups[contours.drawn], minlength=len(GROUPS)))


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
        best: (n,) F of each image at `threshold`.
        intervals: 95 % of bootstrap resamples of the images, (low, high) of ods, ois, ap and cldice.
        by: share of contour pixels found at `threshold`, and their number, by each name of SIDES, SIZES (of the
            smaller segment) and NEIGHBOURS (that it touches); empty where segments are unknown.
    """

    images: int
    ods: float
    ois: float
    ap: float
    cldice: float
    threshold: float
    precision: np.ndarray
    recall: np.ndarray
    best: np.ndarray
    intervals: dict[str, tuple[float, float]]
    by: dict[str, dict[str, tuple[float, int]]]

    def summary(self) -> dict[str, Any]:
        """Figures of a report, for JSON."""
        names = ("images", "ods", "ois", "ap", "cldice", "threshold", "intervals", "by")
        return {name: getattr(self, name) for name in names}


def score(counts: Sequence[Counts], *, thresholds: Sequence[float] = THRESHOLDS, seed: int = 0) -> EdgeScores:
    """Scores of a method from the counts of its images.

    Args:
        counts: of n images, n >= 1, all at the same thresholds.
        thresholds: those.
        seed: of the 1,000 resamples behind the intervals.

    Returns:
        Scores; ODS is interpolated between thresholds, AP at recalls 0, 0.01, .., 1, both as BSDS500 does.

    Raises:
        ValueError: there are no images, or thresholds differ.
    """
    if not counts or any(len(each.matches) != len(thresholds) for each in counts):
        raise ValueError(f"score: counts must be of at least one image at {len(thresholds)} thresholds each")
    matches = np.stack([each.matches for each in counts])  # (n, T, 6)
    images = len(matches)
    best = f_measure(matches).argmax(1)  # (n,)
    own = np.take_along_axis(matches, best[:, None, None], 1)[:, 0]  # (n, 6)

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        """Scores of R weightings (R, n) of the images, (R,) each."""
        total = np.einsum("rn,ntc->rtc", weights, matches)
        ods, level = _best(total, np.asarray(thresholds))[:2]
        return {
            "ods": ods,
            "ois": f_measure(weights @ own),
            "ap": np.array([_average_precision(each) for each in total]),
            "cldice": (weights.T * line_overlap(matches[:, level])).sum(0) / weights.sum(1),
        }

    whole = np.ones((1, images))
    total = matches.sum(0)
    figures = {name: float(values[0]) for name, values in measure(whole).items()}
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), RESAMPLES).astype(float)
    resampled = measure(draws)
    intervals = {
        name: (float(low), float(high))
        for name, values in resampled.items()
        for low, high in [np.percentile(values, [2.5, 97.5])]
    }
    _, level, threshold = _best(total[None], np.asarray(thresholds))
    by: dict[str, dict[str, tuple[float, int]]] = {}
    if counts[0].drawn.size:
        found = np.sum([each.by_group[level[0]] for each in counts], axis=0)
        drawn = np.sum([each.drawn for each in counts], axis=0)
        for axis, (name, values) in enumerate([("side", SIDES), ("size", SIZES), ("neighbours", NEIGHBOURS)]):
            by[name] = {}
            for value in values:
                members = [i for i, group in enumerate(GROUPS) if group[axis] == value]
                pixels = int(np.sum(drawn[members]))
                by[name][value] = (float(np.sum(found[members]) / max(pixels, 1)), pixels)
    recall, precision = _rates(total)
    return EdgeScores(
        images=images,
        **figures,
        threshold=float(threshold[0]),
        precision=precision,
        recall=recall,
        best=f_measure(matches[:, level[0]]),
        intervals=intervals,
        by=by,
    )


def cldice(prediction: np.ndarray, target: np.ndarray, tolerance: float = 0.0) -> float:
    """Overlap of centre lines (Shit et al., CVPR 2021): each mask's skeleton against the other mask.

    Tprec = |S_P in V_L| / |S_P|, Tsens = |S_L in V_P| / |S_L|, clDice = 2 Tprec Tsens / (Tprec + Tsens). Skeletons are
    those of `ops.thin`.

    Args:
        prediction: (H, W) bool.
        target: (H, W) bool.
        tolerance: how far the masks V are grown, in pixels, so that lines may differ by as much.

    Returns:
        clDice in [0, 1]; 1 where both are empty, 0 where one is.

    Raises:
        ValueError: shapes differ.
    """
    if prediction.shape != target.shape or prediction.ndim != 2:
        raise ValueError(f"cldice: target must be {prediction.shape} like prediction, got {target.shape}")
    from scipy.ndimage import distance_transform_edt

    masks = [np.ascontiguousarray(mask, bool) for mask in (prediction, target)]
    if not all(mask.any() for mask in masks):
        return float(not any(mask.any() for mask in masks))
    lines = [ops.thin(torch.from_numpy(mask)[None])[0].numpy() for mask in masks]
    grown = [distance_transform_edt(~mask) <= tolerance for mask in masks]
    precision, sensitivity = grown[1][lines[0]].mean(), grown[0][lines[1]].mean()
    return float(harmonic(precision, sensitivity))


def f_measure(counts: np.ndarray) -> np.ndarray:
    """Harmonic mean of precision and recall: (...) of counts (..., 6)."""
    return harmonic(*_rates(counts))


def line_overlap(counts: np.ndarray) -> np.ndarray:
    """ClDice of lines grown by the matching distance: (...) of counts (..., 6)."""
    return harmonic(counts[..., 5] / np.maximum(counts[..., 1], 1), counts[..., 4] / np.maximum(counts[..., 3], 1))


def _rates(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision; 0 where nothing is there."""
    recall, precision = (counts[..., i] / np.maximum(counts[..., i + 1], 1) for i in (0, 2))
    return recall, precision


def harmonic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Harmonic mean, element by element; 0 where both are."""
    return 2 * a * b / np.maximum(a + b, np.finfo(float).tiny)


def _best(counts: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best F between thresholds (R,), the index of the best threshold itself, and where F is best; of (R, T, 6)."""
    recall, precision = _rates(counts)
    level = harmonic(recall, precision).argmax(1)
    if len(thresholds) == 1:
        return harmonic(recall, precision)[:, 0], level, thresholds[level]
    share = np.linspace(0, 1, 100)

    def between(values: np.ndarray) -> np.ndarray:
        return values[..., 1:, None] * share + values[..., :-1, None] * (1 - share)

    best = np.empty(len(counts))
    where = np.empty(len(counts))
    for index, pair in enumerate(zip(recall, precision, strict=True)):
        f = harmonic(*(between(values) for values in pair))
        best[index], where[index] = f.max(), between(thresholds).ravel()[f.argmax()]
    return best, level, where


def _average_precision(counts: np.ndarray) -> float:
    """Area under precision over recall of (T, 6): linear between thresholds, 0 beyond the recalls that were reached."""
    recall, precision = _rates(counts)
    recalls, first = np.unique(recall, return_index=True)
    if len(recalls) < 2:
        return 0.0
    return float(np.interp(np.linspace(0, 1, 101), recalls, precision[first], left=0, right=0).sum() / 100)
