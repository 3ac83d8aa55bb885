"""Class-agnostic average precision and recall of masks, by the protocol of COCO."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from trace_fast.extras import require
from trace_fast.masks.coco import ImageInstances, Instances, encode_masks
from trace_fast.ops import checks

__all__ = ["MaskScores", "compare_masks", "mask_ap"]

FASTER, ORIGINAL = "faster-coco-eval", "pycocotools"


@dataclass(frozen=True)
class MaskScores:
    """Average precision and recall, in [0, 1]; nan where the truth has nothing of that size.

    Averages are over the IoU thresholds 0.50, 0.55 ... 0.95 and at most 100 masks of an image, unless the name says
    otherwise. Small is up to 32^2 pixels, medium up to 96^2, large beyond.

    Attributes:
        ap: average precision, AP^mk.
        ap50: average precision at IoU 0.50.
        ap75: average precision at IoU 0.75.
        ap_small: average precision of small instances.
        ap_medium: average precision of medium instances.
        ap_large: average precision of large instances.
        ar1: average recall with the one mask of each image that has the highest score.
        ar10: average recall with the ten highest.
        ar100: average recall with the hundred highest, AR^mk.
        ar_small: average recall of small instances.
        ar_medium: average recall of medium instances.
        ar_large: average recall of large instances.
        intervals: (low, high) of each by name, 95 % of the bootstrap over images; None unless asked for.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    intervals: dict[str, tuple[float, float]] | None = None


NAMES = tuple(field.name for field in fields(MaskScores) if field.name != "intervals")  # in the order of COCO


def mask_ap(
    truth: Instances | Iterable[np.ndarray],
    results: Instances | Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    resamples: int = 0,
    seed: int = 0,
    engine: str | None = None,
) -> MaskScores:
    """Return average precision and recall of masks, whatever their class (AP^mk, AR^mk).

    By the rules of COCO: the 100 masks of an image with the highest scores are matched one to one, in descending order,
    each to the free instance that it overlaps most; a mask that matches only a crowd is ignored. The size of an
    instance is the area that the truth states, that of an unmatched mask its own area (pycocotools takes that of a box
    where results have one).

    Args:
        truth: instances of all images; or for each image a stack (M, H, W) bool, in order. Stacks may come from a
            generator: they are encoded one by one.
        results: instances of some or all of these images; or for each image a pair (masks, scores), (M, H, W) bool and
            (M,) float, in order.
        resamples: number of resamples of the images, drawn with replacement, for the intervals; 0 gives none. Masks are
            matched once more, by pycocotools, and not for each resample.
        seed: seed of the resamples.
        engine: "faster-coco-eval" or "pycocotools", which agree; None is the first where it is installed.

    Returns:
        The twelve figures of COCO, and their intervals where `resamples` is above 0.

    Raises:
        ValueError: there is no image; results are of images that the truth lacks, or of another size; `engine` or
            `resamples` is not allowed.
        TypeError: a stack is not a bool array.
        RuntimeError: the engine is not installed.

    Example:
        >>> whole = np.ones((1, 2, 3), dtype=bool)
        >>> scores = mask_ap([whole, whole], [(whole, np.array([0.5]))])
        >>> round(scores.ap, 3), scores.ar100  # precision is 1 up to recall 0.5, 51 of 101 recalls
        (0.505, 0.5)
    """
    if engine is None:
        engine = FASTER if importlib.util.find_spec("faster_coco_eval") else ORIGINAL
    checks.choice("mask_ap", "engine", engine, FASTER, ORIGINAL)
    if resamples < 0:
        raise ValueError(f"mask_ap: resamples must be at least 0, got {resamples}")
    if not isinstance(truth, Instances):
        truth = _index_images(encode_masks(masks, id=index) for index, masks in enumerate(truth))
    if not isinstance(results, Instances):
        results = _index_images(encode_masks(*pair, id=index) for index, pair in enumerate(results))
    _check_images(truth, results)

    # in the order of their ids, which decides between equal scores
    pairs = [(truth.images[number], results.images.get(number)) for number in sorted(truth.images)]
    stats = _evaluate(pairs, engine).stats
    intervals = _intervals(_evaluate(pairs, ORIGINAL), resamples, seed) if resamples else None
    figures = np.where(stats < 0, np.nan, stats).tolist()
    return MaskScores(**dict(zip(NAMES, figures, strict=True)), intervals=intervals)


def compare_masks(
    truth: Instances, before: Instances, after: Instances, *, resamples: int = 200, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Return by how much average precision and recall differ between two sets of masks of the same images.

    Args:
        truth: instances of all images.
        before: results of some or all of these images.
        after: other results.
        resamples: number of resamples of the images, drawn with replacement, each for both results.
        seed: seed of the resamples.

    Returns:
        The difference, after minus before, and the ends of its 95 % interval, for "ap" and "ar100".

    Raises:
        ValueError: results are of images that the truth lacks, or of another size; or `resamples` is below 1.

    Example:
        >>> whole = encode_masks(np.ones((1, 2, 3), dtype=bool), id=7)
        >>> truth, nothing = Instances({7: whole}, {}), Instances({}, {})
        >>> compare_masks(truth, nothing, truth)["ar100"]
        (1.0, 1.0, 1.0)
    """
    if resamples < 1:
        raise ValueError(f"compare_masks: resamples must be at least 1, got {resamples}")
    matches = []
    for results in (before, after):
        _check_images(truth, results)
        pairs = [(truth.images[number], results.images.get(number)) for number in sorted(truth.images)]
        matches.append(_Matches(_evaluate(pairs, ORIGINAL), 0))
    random, count = np.random.default_rng(seed), len(truth.images)
    draws = [np.ones(count, int), *(random.multinomial(count, np.full(count, 1 / count)) for _ in range(resamples))]
    figures = [[(one.precision(times).mean(), one.recall(times, 100)) for one in matches] for times in draws]
    differences = np.diff(np.array(figures), axis=1)[:, 0]  # (1 + resamples, 2)
    low, high = np.nanquantile(differences[1:], (0.025, 0.975), axis=0)
    return {name: (float(differences[0, k]), float(low[k]), float(high[k])) for k, name in enumerate(("ap", "ar100"))}


def _index_images(images: Iterable[ImageInstances]) -> Instances:
    """Return images as a set, by their ids."""
    return Instances({image.id: image for image in images}, {})


def _check_images(truth: Instances, results: Instances) -> None:
    """Require results of the truth's images, in their sizes."""
    if not truth.images:
        raise ValueError("mask_ap: truth must have at least one image, got none")
    foreign = sorted(results.images.keys() - truth.images.keys())
    if foreign:
        more = ", ..." if len(foreign) > 5 else ""
        raise ValueError(
            f"mask_ap: results must be of images of the truth, got {len(foreign)} others: "
            f"{', '.join(map(str, foreign[:5]))}{more}"
        )
    for number, image in results.images.items():
        expected, size = ((entry.height, entry.width) for entry in (truth.images[number], image))
        if size != expected:
            raise ValueError(f"mask_ap: results must be of the truth's size, {expected} for image {number}, got {size}")


def _evaluate(pairs: list[tuple[ImageInstances, ImageInstances | None]], engine: str) -> Any:
    """Run the engine and return its evaluator; `stats` are the twelve figures, -1 where there is no truth."""
    require("mask_ap", engine.replace("-", "_"))
    if engine == FASTER:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    truth, results = COCO(), COCO()
    truth.dataset, results.dataset = (_dataset(images) for images in zip(*pairs, strict=True))
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truth.createIndex()
        results.createIndex()
        evaluator = COCOeval(truth, results, "segm")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def _dataset(images: Iterable[ImageInstances | None]) -> dict[str, Any]:
    """Make the data set of an engine: one category, and images from 1 on, as the engines treat an id of 0 as none."""
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(images, 1):
        if image is None:
            continue
        listed.append({"id": number, "height": image.height, "width": image.width})
        for instance, rle in zip(image.instances, image.rles(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "segmentation": rle,
                    "area": instance.area,
                    "iscrowd": int(instance.iscrowd),
                    "score": instance.score,
                }
            )
    return {"images": listed, "annotations": annotations, "categories": [{"id": 1, "name": "instance"}]}


def _intervals(evaluator: Any, resamples: int, seed: int) -> dict[str, tuple[float, float]]:
    """Return the 95 % interval of each figure by the bootstrap over images, from pycocotools' matches."""
    sizes = [_Matches(evaluator, size) for size in range(4)]
    random, count = np.random.default_rng(seed), len(evaluator.params.imgIds)
    figures = [_figures(sizes, random.multinomial(count, np.full(count, 1 / count))) for _ in range(resamples)]
    intervals = {}
    for name, column in zip(NAMES, np.transpose(figures), strict=True):
        # a resample may miss all the truth of a size
        known = column[~np.isnan(column)]
        low, high = np.quantile(known, (0.025, 0.975)).tolist() if known.size else (math.nan, math.nan)
        intervals[name] = low, high
    return intervals


def _figures(sizes: list[_Matches], times: np.ndarray) -> list[float]:
    """Return the twelve figures where each image is taken `times` (I,): a second copy adds its masks once more."""
    average, small, medium, large = (size.precision(times) for size in sizes)
    precision = [average.mean(), average[0], average[5], small.mean(), medium.mean(), large.mean()]
    recall = [sizes[0].recall(times, detections) for detections in (1, 10, 100)]
    return precision + recall + [size.recall(times, 100) for size in sizes[1:]]


class _Matches:
    """The matches of pycocotools in one range of sizes, kept so that resampled images need no second matching."""

    def __init__(self, evaluator: Any, size: int):
        params = evaluator.params
        images = len(params.imgIds)
        evaluated = evaluator.evalImgs[size * images : (size + 1) * images]
        evaluated = [(index, image) for index, image in enumerate(evaluated) if image is not None]
        self.recalls = params.recThrs
        self.positives = np.zeros(images, dtype=np.int64)  # (I,) instances that count
        for index, image in evaluated:
            self.positives[index] = np.count_nonzero(image["gtIgnore"] == 0)
        thresholds = len(params.iouThrs)
        scores = np.concatenate([np.zeros(0), *(image["dtScores"] for _, image in evaluated)])
        order = np.argsort(-scores, kind="stable")
        rank = np.concatenate([np.zeros(0, int), *(np.arange(len(image["dtScores"])) for _, image in evaluated)])
        owners = (np.full(len(image["dtScores"]), index) for index, image in evaluated)
        empty = np.zeros((thresholds, 0), dtype=bool)
        matched = np.concatenate([empty, *(image["dtMatches"] > 0 for _, image in evaluated)], axis=1)
        ignored = np.concatenate([empty, *(image["dtIgnore"] for _, image in evaluated)], axis=1)
        self.image = np.concatenate([np.zeros(0, int), *owners])[order]  # (D,) in descending order of scores
        self.rank = rank[order]  # (D,) within the image
        self.hit = (matched & ~ignored)[:, order]  # (T, D)
        self.miss = (~matched & ~ignored)[:, order]

    def precision(self, times: np.ndarray) -> np.ndarray:
        """Return interpolated precision averaged over recalls 0, 0.01 ... 1, for each IoU threshold: (T,)."""
        positives = times @ self.positives
        if positives == 0:
            return np.full(len(self.hit), np.nan)
        weight = times[self.image]
        averages = []
        for hit, miss in zip(self.hit, self.miss, strict=True):
            # recall rises at hits alone, and precision is best there
            places = np.flatnonzero(hit)
            hits, misses = np.cumsum(weight[places]), np.cumsum(weight * miss)[places]
            envelope = np.maximum.accumulate((hits / (hits + misses + np.spacing(1)))[::-1])[::-1]
            first = np.searchsorted(hits / positives, self.recalls)
            averages.append(envelope[first[first < len(places)]].sum() / len(self.recalls))
        return np.array(averages)

    def recall(self, times: np.ndarray, detections: int) -> float:
        """Return recall averaged over IoU thresholds, with at most `detections` masks of an image."""
        positives = times @ self.positives
        if positives == 0:
            return math.nan
        return float((self.hit @ (times[self.image] * (self.rank < detections))).mean() / positives)
