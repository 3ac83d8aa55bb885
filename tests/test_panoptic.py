"""Panoptic quality: by hand, against sets of pixels, against torchmetrics, and from files."""

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from trace_fast.evaluation.panoptic import PanopticQuality, Quality, panoptic_quality
from trace_fast.masks.coco import read_panoptic

ISTHING = {1: True, 2: True, 3: False, 7: False}
many = settings(max_examples=400, deadline=None, derandomize=True, database=None)


def describe(ids, categories, crowds=()):
    """Return the segments_info of a map, from category and crowd by id."""
    numbers = np.unique(ids[ids != 0]).tolist()
    return [{"id": n, "category_id": categories[n], "iscrowd": int(n in crowds)} for n in numbers]


def find_pixels(ids, number):
    """Return the set of pixels of a segment."""
    return set(zip(*map(list, np.nonzero(ids == number)), strict=True))


def count_segments(truth, truth_segments, result, result_segments, counts):
    """Add the matches of an image to the sums of each category, one pixel set at a time."""
    void, matched = find_pixels(truth, 0), set()
    for expected in truth_segments:
        if not expected["iscrowd"]:
            inside = find_pixels(truth, expected["id"])
            rivals = [s for s in result_segments if s["category_id"] == expected["category_id"]]
            overlaps = {}
            for segment in rivals:
                other = find_pixels(result, segment["id"])
                overlaps[segment["id"]] = len(inside & other) / len((inside | other) - void)
            hits = {number: iou for number, iou in overlaps.items() if iou > 0.5}
            counts[expected["category_id"]] += [sum(hits.values()), len(hits), 0, not hits]
            matched |= set(hits)
    for segment in result_segments:
        other, excused = find_pixels(result, segment["id"]), set(void)
        for expected in truth_segments:
            if expected["iscrowd"] and expected["category_id"] == segment["category_id"]:
                excused |= find_pixels(truth, expected["id"])
        if segment["id"] not in matched and len(other & excused) <= len(other) / 2:
            counts[segment["category_id"]][2] += 1


def score_pixel_sets(images):
    """Return (PQ, SQ, RQ) by category that occurs, by the rules, one pixel set at a time."""
    counts = {category: np.zeros(4) for category in ISTHING}  # IoU of matches, TP, FP, FN
    for image in images:
        count_segments(*image, counts)
    qualities = {}
    for category, (overlap, hits, unmatched, missed) in counts.items():
        total = hits + unmatched / 2 + missed / 2
        if total:
            qualities[category] = (overlap / total, overlap / hits if hits else 0, hits / total)
    return qualities


def check(quality, expected):
    """Compare a quality with the mean of qualities of pixel sets."""
    assert quality.classes == len(expected)
    values = np.mean(expected, axis=0) if expected else [math.nan] * 3
    np.testing.assert_allclose((quality.pq, quality.sq, quality.rq), values, rtol=0, atol=1e-12)


@st.composite
def pictures(sample):
    """Make a truth with void and crowds, and a result that differs from it in some pixels."""
    shape = sample(arrays.array_shapes(min_dims=2, max_dims=2, max_side=7))
    truth = sample(arrays.arrays(np.int32, shape, elements=st.integers(0, 4)))
    change = sample(arrays.arrays(np.int32, shape, elements=st.integers(0, 4), fill=st.just(0)))
    unchanged = sample(arrays.arrays(np.bool_, shape, fill=st.just(True)))
    result = np.where(unchanged, truth, change)
    classes = st.lists(st.sampled_from(list(ISTHING)), min_size=5, max_size=5)
    categories = sample(classes)
    guessed = sample(st.one_of(st.just(categories), classes))
    crowds = sample(st.sets(st.integers(1, 4), max_size=3))
    # ids that are far apart, as those of colors
    spread = np.array([0, 16_000_000, 5, 300, 70_000], dtype=np.int32)
    named = dict(zip(spread.tolist(), categories, strict=True))
    renamed = dict(zip(spread.tolist(), guessed, strict=True))
    truth, result = spread[truth], spread[result]
    return truth, describe(truth, named, spread[list(crowds)]), result, describe(result, renamed)


class TestAgainstPixelSets:
    @pytest.mark.slow
    @many
    @given(st.lists(pictures(), min_size=1, max_size=3))
    def test_random_cases(self, images):
        quality = PanopticQuality(ISTHING)
        for image in images:
            quality.add(*image)
        scores, expected = quality.scores(), score_pixel_sets(images)
        check(scores.all, list(expected.values()))
        check(scores.things, [q for category, q in expected.items() if ISTHING[category]])
        check(scores.stuff, [q for category, q in expected.items() if not ISTHING[category]])
        assert list(scores.classes) == list(ISTHING)
        for category, quality in scores.classes.items():
            check(quality, [expected[category]] if category in expected else [])


class TestAgainstTorchmetrics:
    # it knows no crowd, and treats void as we do only where there is none
    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(30))
    def test_without_crowd_and_void(self, seed):
        detection = pytest.importorskip("torchmetrics.detection", reason="needs torchmetrics")
        random = np.random.default_rng(seed)
        theirs = detection.PanopticQuality(things={1, 2}, stuffs={3, 7}, return_sq_and_rq=True, return_per_class=True)
        mean = detection.PanopticQuality(things={1, 2}, stuffs={3, 7}, return_sq_and_rq=True)
        ours = PanopticQuality(ISTHING)
        for _ in range(4):
            classes = random.choice(list(ISTHING), 8)
            truth = np.sort(random.integers(1, 7, 12 * 9)).reshape(12, 9)
            result = np.where(random.random(truth.shape) < 0.8, truth, random.integers(1, 8, truth.shape))
            # stuff is one segment of an image there
            truth, result = (np.where(classes[ids] > 2, classes[ids] + 100, ids) for ids in (truth, result))
            names = {**dict(enumerate(classes.tolist())), 103: 3, 107: 7}
            ours.add(truth, describe(truth, names), result, describe(result, names))
            maps = (np.stack([np.vectorize(names.get)(ids), ids], axis=-1) for ids in (result, truth))
            pair = [torch.tensor(ids)[None] for ids in maps]
            theirs.update(*pair)
            mean.update(*pair)
        scores = ours.scores()
        qualities = [astuple(quality)[:3] for quality in scores.classes.values()]
        np.testing.assert_allclose(np.nan_to_num(qualities), theirs.compute().numpy(), rtol=0, atol=1e-6)
        if scores.all.classes == 4:
            np.testing.assert_allclose(astuple(scores.all)[:3], mean.compute().numpy(), rtol=0, atol=1e-6)


def single(truth, result, crowd=(), categories=None):
    """Return the scores of one row of pixels; segments are of category 1 unless `categories` has another."""
    truth, result = np.array([truth]), np.array([result])
    names = dict.fromkeys(range(20), 1) | (categories or {})
    quality = PanopticQuality(ISTHING)
    quality.add(truth, describe(truth, names, crowd), result, describe(result, names))
    return quality.scores()


class TestByHand:
    def test_perfect(self):
        scores = single([1, 1, 2, 3], [5, 5, 6, 7], categories={3: 3, 7: 3})
        assert scores.all == Quality(1, 1, 1, 2)
        assert scores.things == scores.stuff == scores.classes[1] == scores.classes[3] == Quality(1, 1, 1, 1)
        assert scores.classes[2].classes == 0 and math.isnan(scores.classes[2].pq)

    def test_one_match_one_missed_one_unmatched(self):
        # segment 1: IoU 3/4; 2 is covered by half, so 2 is missed and 6 is unmatched
        scores = single([1, 1, 1, 1, 2, 2], [5, 5, 5, 6, 6, 0])
        assert astuple(scores.all) == pytest.approx((0.75 / 2, 0.75, 1 / 2, 1))

    def test_half_is_no_match(self):
        assert single([1, 1], [5, 0]).all == Quality(0, 0, 0, 1)

    def test_the_class_must_agree(self):
        scores = single([1, 1], [5, 5], categories={5: 2})
        assert scores.all == Quality(0, 0, 0, 2)

    def test_void_is_not_in_the_union(self):
        assert single([1, 1, 0, 0, 0], [5, 5, 5, 5, 5]).all == Quality(1, 1, 1, 1)

    @pytest.mark.parametrize(("under", "rq"), [([0, 0, 2, 2], 1 / 1.5), ([0, 0, 0, 2], 1)])
    def test_a_segment_mostly_on_void_is_no_false_positive(self, under, rq):
        # half is not enough
        assert single([1, *under], [5, 6, 6, 6, 6], categories={2: 2}).classes[1].rq == pytest.approx(rq)

    def test_a_crowd_is_neither_missed_nor_matched(self):
        assert single([1, 2, 2], [5, 0, 0], crowd={2}).all == Quality(1, 1, 1, 1)
        assert single([1, 2, 2], [5, 6, 6], crowd={2}).all == Quality(1, 1, 1, 1)
        assert single([2, 2], [6, 6], crowd={2}).all.classes == 0

    def test_a_crowd_of_another_class_excuses_nothing(self):
        scores = single([1, 2, 2], [5, 6, 6], crowd={2}, categories={2: 2})
        assert scores.classes[1].rq == pytest.approx(1 / 1.5) and scores.classes[2].classes == 0

    @pytest.mark.parametrize(("category", "rq"), [(1, 1), (2, 1 / 1.5)])
    def test_void_and_crowds_are_added(self, category, rq):
        # of five pixels two are void and one is of a crowd
        scores = single([1, 0, 0, 2, 3, 3], [5, 6, 6, 6, 6, 6], crowd={2}, categories={2: category, 3: 2})
        assert scores.classes[1].rq == pytest.approx(rq)

    def test_nothing(self):
        scores = single([0, 0], [0, 0])
        assert scores.all.classes == scores.things.classes == scores.stuff.classes == 0
        assert all(map(math.isnan, astuple(scores.all)[:3]))


class TestAccumulation:
    def test_images_are_summed_not_averaged(self):
        quality = PanopticQuality({1: True})
        row = [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 1}]
        for _ in range(3):
            quality.add(np.array([[1, 2]]), row, np.array([[1, 2]]), row)
        quality.add(np.array([[1]]), row[:1], np.array([[0]]), [])
        assert quality.scores().all.rq == pytest.approx(6 / 6.5)

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, np.uint64, ">i4"])
    def test_any_integers(self, dtype):
        quality = PanopticQuality({1: True})
        ids = np.array([[0, 200, 200], [7, 7, 0]], dtype=dtype).T
        segments = [{"id": 200, "category_id": 1}, {"id": 7, "category_id": 1}]
        quality.add(ids, segments, ids, segments)
        assert quality.scores().all == Quality(1, 1, 1, 1)

    @pytest.mark.parametrize(
        ("name", "value", "error", "message"),
        [
            ("truth", np.ones((1, 2)), TypeError, "truth must be an integer array, got float64"),
            ("result", [[1, 2]], TypeError, "result must be an integer array, got list"),
            ("truth", np.ones((1, 2, 1), int), ValueError, r"truth must be \(H, W\), got \(1, 2, 1\)"),
            ("truth", np.ones((0, 2), int), ValueError, r"truth must be \(H, W\), got \(0, 2\)"),
            ("result", np.array([[1], [2]]), ValueError, r"result must be of the truth's size \(1, 2\), got \(2, 1\)"),
            (
                "result",
                np.array([[1, 3]]),
                ValueError,
                r"result and result_segments must hold the same segments, got \[3\] in the map alone and \[2\] in the "
                "list alone",
            ),
            ("truth", np.array([[-1, 2]]), ValueError, r"truth and .* got \[-1\] in the map alone and \[1\] in"),
            (
                "truth_segments",
                [{"id": 1, "category_id": 1}] * 2,
                ValueError,
                r"truth_segments must have distinct ids above 0, got \[1, 1\]",
            ),
            ("result_segments", [{"id": 0, "category_id": 1}], ValueError, r"distinct ids above 0, got \[0\]"),
            (
                "result_segments",
                [{"id": 1, "category_id": 4}],
                ValueError,
                r"result_segments must be of known categories, got \[4\]",
            ),
        ],
    )
    def test_refuses(self, name, value, error, message):
        ids, segments = np.array([[1, 2]]), [{"id": n, "category_id": 1} for n in (1, 2)]
        image = {"truth": ids, "truth_segments": segments, "result": ids, "result_segments": segments}
        quality = PanopticQuality({1: True})
        with pytest.raises(error, match=f"^panoptic_quality: .*{message}"):
            quality.add(**image | {name: value})
        assert quality.scores().all.classes == 0  # nothing was counted


def write(folder, maps, categories, crowds=()):
    """Write a panoptic file of segment maps, and read it."""
    folder.mkdir()
    data = {
        "images": [],
        "annotations": [],
        "categories": [{"id": n, "name": str(n), "isthing": int(thing)} for n, thing in ISTHING.items()],
    }
    for number, ids in enumerate(maps):
        colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
        Image.fromarray(colors).save(folder / f"{number}.png")
        data["images"].append({"id": number, "height": ids.shape[0], "width": ids.shape[1]})
        segments = describe(ids, categories, crowds)
        data["annotations"].append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
    return read_panoptic(data, folder)


class TestFiles:
    def test_equals_maps_in_memory(self, tmp_path):
        random = np.random.default_rng(0)
        spread = np.array([0, 16_000_000, 5, 300, 70_000, 256])
        categories = dict(zip(spread.tolist(), (0, 1, 1, 2, 3, 7), strict=True))
        truth = [spread[random.integers(0, 6, (4, side))] for side in (1, 5, 9)]
        result = [np.where(random.random(ids.shape) < 0.8, ids, 5) for ids in truth]
        files = [write(tmp_path / "a", truth, categories, {300}), write(tmp_path / "b", result, categories)]
        expected = score_pixel_sets(
            (a, describe(a, categories, {300}), b, describe(b, categories)) for a, b in zip(truth, result, strict=True)
        )
        check(panoptic_quality(*files).all, list(expected.values()))

    def test_both_sides_must_have_the_same_images(self, tmp_path):
        ids = np.array([[1, 1]])
        one, three = (write(tmp_path / str(n), [ids] * n, {1: 1}) for n in (1, 3))
        message = r"^panoptic_quality: {} must have every image of the other side, got none for 2: \[1, 2\]$"
        with pytest.raises(ValueError, match=message.format("results")):
            panoptic_quality(three, one)
        with pytest.raises(ValueError, match=message.format("truth")):
            panoptic_quality(one, three)

    def test_the_image_of_a_problem_is_named(self, tmp_path):
        files = [write(tmp_path / str(n), [np.ones((1, n), int)], {1: 1}) for n in (1, 2)]
        with pytest.raises(ValueError, match=r"result must be of the truth's size .* \(image 0\)$"):
            panoptic_quality(*files)
