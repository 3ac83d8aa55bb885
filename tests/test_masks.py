"""AP and AR of masks: by hand, both engines against pycocotools used directly, and the bootstrap."""

import contextlib
import copy
import io
import math
import sys
from dataclasses import astuple

import numpy as np
import pytest

pytest.importorskip("pycocotools", reason="needs pycocotools: pip install 'trace_fast[eval]'")
pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval: pip install 'trace_fast[eval]'")
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from trace_fast.evaluation import masks
from trace_fast.evaluation.masks import MaskScores, compare_masks, mask_ap
from trace_fast.masks.coco import ImageInstances, Instance, Instances, encode_masks, read_instances, read_results

HEIGHT, WIDTH = 110, 130  # room for a large instance


def boxes(random, count):
    """Make boxes of all three sizes, (count, H, W) bool."""
    stack = np.zeros((count, HEIGHT, WIDTH), dtype=bool)
    for mask in stack:
        share = random.choice([0.15, 0.5, 0.95])
        height, width = (share * random.uniform(0.8, 1, 2) * [HEIGHT, WIDTH]).astype(int)
        top, left = random.integers(0, [HEIGHT - height + 1, WIDTH - width + 1])
        mask[top : top + height, left : left + width] = True
    return stack


def random_case(seed, images=6, ties=True):
    """Make a truth with crowds and empty images; results near it and elsewhere, their scores of a few values."""
    random = np.random.default_rng(seed)
    truth, results = {}, {}
    for number in random.permutation(images * 3)[:images].tolist():
        stack = boxes(random, random.integers(0, 6))
        truth[number] = encode_masks(stack, iscrowd=random.random(len(stack)) < 0.2, id=number)
        near = np.roll(stack, random.integers(-3, 4, 2), (1, 2))[random.random(len(stack)) < 0.8]
        detections = np.concatenate([near, stack[:1], boxes(random, random.integers(0, 14))])
        detections = detections[random.permutation(len(detections))]
        if random.random() < 0.8:
            scores = random.integers(0, 5, len(detections)) / 4 if ties else random.random(len(detections))
            results[number] = encode_masks(detections, scores, id=number)
    return Instances(truth, {}), Instances(results, {})


def as_json(truth, results, classes=1):
    """Return the contents of COCO's files; the results alternate between classes."""
    data = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}, {"id": 2, "name": "y"}]}
    detections = []
    for image in truth.images.values():
        data["images"].append({"id": image.id, "height": image.height, "width": image.width})
        for instance, rle in zip(image.instances, image.rles(), strict=True):
            annotation = {"id": len(data["annotations"]) + 1, "image_id": image.id, "segmentation": rle}
            annotation |= {"area": instance.area, "iscrowd": int(instance.iscrowd), "category_id": 1}
            data["annotations"].append(annotation)
    for image in results.images.values():
        for instance, rle in zip(image.instances, image.rles(), strict=True):
            entry = {"image_id": image.id, "category_id": 1 + len(detections) % classes, "score": instance.score}
            detections.append({**entry, "segmentation": rle})
    return data, detections


def original(truth, results, classes=1):
    """Return the twelve figures of pycocotools used directly, without classes; -1 for none."""
    data, detections = as_json(truth, results, classes)
    with contextlib.redirect_stdout(io.StringIO()):
        coco, none = COCO(), COCO()  # loadRes takes no empty list
        coco.dataset, none.dataset = copy.deepcopy(data), {**data, "annotations": []}
        coco.createIndex()
        none.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(detections) if detections else none, "segm")
        evaluator.params.useCats = 0
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats


def figures(scores):
    return np.nan_to_num(astuple(scores)[:12], nan=-1)


@pytest.fixture(params=["faster-coco-eval", "pycocotools"])
def engine(request):
    return request.param


class TestAgainstPycocotools:
    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(25))
    def test_random_cases(self, seed, engine):
        truth, results = random_case(seed)
        np.testing.assert_allclose(
            figures(mask_ap(truth, results, engine=engine)), original(truth, results), rtol=0, atol=1e-12
        )

    @pytest.mark.parametrize("seed", range(5))
    def test_classes_are_ignored(self, seed, engine):
        # pycocotools puts equal scores in the order of their classes: here are none
        truth, results = random_case(seed, ties=False)
        read = mask_ap(truth, read_results(as_json(truth, results, classes=2)[1]), engine=engine)
        np.testing.assert_allclose(figures(read), original(truth, results, classes=2), rtol=0, atol=1e-12)

    def test_more_than_a_hundred_masks_of_an_image(self, engine):
        random = np.random.default_rng(0)
        stack = boxes(random, 30)
        truth = Instances({1: encode_masks(stack, id=1)}, {})
        detections = np.concatenate([boxes(random, 120), stack])
        results = Instances({1: encode_masks(detections, random.random(150), id=1)}, {})
        expected = original(truth, results)
        assert 0 < expected[8] < 1
        np.testing.assert_allclose(figures(mask_ap(truth, results, engine=engine)), expected, rtol=0, atol=1e-12)

    def test_stated_areas_decide_the_size_of_truth(self, engine):
        stack = boxes(np.random.default_rng(3), 2)
        image = encode_masks(stack, id=1)
        stated = [Instance(instance.counts, 1, area) for instance, area in zip(image.instances, (1e4, 5), strict=True)]
        truth = Instances({1: ImageInstances(1, HEIGHT, WIDTH, "", stated)}, {})
        results = Instances({1: image}, {})
        scores = mask_ap(truth, results, engine=engine)
        assert (scores.ar_small, scores.ar_large) == pytest.approx((1, 1)) and math.isnan(scores.ar_medium)
        np.testing.assert_allclose(figures(scores), original(truth, results), rtol=0, atol=1e-12)

    def test_files(self, engine):
        truth, results = random_case(1)
        data, detections = as_json(truth, results)
        # areas of boxes, which loadRes would take for those of masks
        entries = [{**entry, "bbox": [0, 0, 130, 110]} for entry in detections]
        read = mask_ap(read_instances(data), read_results(entries), engine=engine)
        assert figures(read).tolist() == figures(mask_ap(truth, results, engine=engine)).tolist()


def square(top, left, side=10):
    mask = np.zeros((1, 30, 40), dtype=bool)
    mask[0, top : top + side, left : left + side] = True
    return mask


def score(truth, results, engine):
    """Return the scores of one image from lists of masks and of (mask, score)."""
    detections = np.concatenate([np.zeros((0, 30, 40), bool), *(mask for mask, _ in results)])
    stack = np.concatenate([np.zeros((0, 30, 40), bool), *truth])
    return mask_ap([stack], [(detections, np.array([value for _, value in results], float))], engine=engine)


class TestByHand:
    def test_all_found(self, engine):
        scores = score([square(0, 0)], [(square(0, 0), 0.1)], engine)
        assert (scores.ap, scores.ap50, scores.ap75, scores.ap_small) == pytest.approx((1, 1, 1, 1))
        assert (scores.ar1, scores.ar10, scores.ar100, scores.ar_small) == pytest.approx((1, 1, 1, 1))
        assert all(math.isnan(x) for x in (scores.ap_medium, scores.ap_large, scores.ar_medium, scores.ar_large))
        assert scores.intervals is None

    def test_half_found(self, engine):
        scores = score([square(0, 0), square(15, 15)], [(square(0, 0), 0.1)], engine)
        assert scores.ap == pytest.approx(51 / 101)  # of recalls 0, 0.01 ... 1, those up to 0.5
        assert (scores.ar1, scores.ar100) == pytest.approx((0.5, 0.5))

    def test_a_wrong_mask_with_a_higher_score(self, engine):
        scores = score([square(0, 0)], [(square(15, 15), 0.9), (square(0, 0), 0.1)], engine)
        assert scores.ap == pytest.approx(0.5)
        assert (scores.ar1, scores.ar10) == pytest.approx((0, 1))

    def test_an_overlap_reaches_some_thresholds(self, engine):
        narrow = square(0, 0).copy()
        narrow[0, 8:] = narrow[0, 7, 3:] = False  # IoU 0.73: 0.50 ... 0.70 of the ten
        scores = score([square(0, 0)], [(narrow, 1)], engine)
        assert (scores.ap50, scores.ap75, scores.ap, scores.ar100) == pytest.approx((1, 0, 0.5, 0.5))

    def test_a_second_mask_of_an_instance_is_wrong(self, engine):
        truth = [square(0, 0), square(15, 15)]
        scores = score(truth, [(square(0, 0), 0.9), (square(0, 0), 0.8), (square(15, 15), 0.7)], engine)
        assert scores.ap == pytest.approx((51 + 50 * 2 / 3) / 101)

    def test_masks_on_a_crowd_are_ignored(self, engine):
        crowd = encode_masks(np.concatenate([square(0, 0), square(15, 15, 15)]), iscrowd=np.array([False, True]))
        detections = np.concatenate([square(16, 16, 5), square(20, 20, 5), square(0, 0)])
        detections = encode_masks(detections, np.array([0.9, 0.8, 0.1]))
        scores = mask_ap(Instances({0: crowd}, {}), Instances({0: detections}, {}), engine=engine)
        assert (scores.ap, scores.ar100, scores.ar1) == pytest.approx((1, 1, 0))

    def test_nothing_found(self, engine):
        for results in ([], [(np.zeros((0, 30, 40), bool), np.zeros(0))]):
            scores = mask_ap([square(0, 0)], results, engine=engine)
            assert (scores.ap, scores.ap_small, scores.ar100) == pytest.approx((0, 0, 0))
            assert math.isnan(scores.ap_large)

    def test_no_instances(self, engine):
        for results in ([], [(square(0, 0), np.ones(1))]):
            scores = mask_ap([np.zeros((0, 30, 40), bool)], results, engine=engine)
            assert all(map(math.isnan, astuple(scores)[:12]))


class TestInputs:
    def test_stacks_of_a_generator(self, engine):
        random = np.random.default_rng(0)
        stacks = [boxes(random, count) for count in (2, 0, 5)]
        scores = [random.random(len(stack)) for stack in stacks]
        pairs = list(zip(stacks, scores, strict=True))
        truth = Instances({n: encode_masks(stack, id=n) for n, stack in enumerate(stacks)}, {})
        forms = ((stacks, pairs), (iter(stacks), iter(pairs)), (truth, pairs))
        first, second, third = (figures(mask_ap(*arguments, engine=engine)).tolist() for arguments in forms)
        assert first == second == third

    def test_the_faster_engine_is_the_default(self, monkeypatch):
        used = []
        evaluate = masks._evaluate
        monkeypatch.setattr(masks, "_evaluate", lambda pairs, engine: used.append(engine) or evaluate(pairs, engine))
        mask_ap([square(0, 0)], [])
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
        mask_ap([square(0, 0)], [])
        assert used == ["faster-coco-eval", "pycocotools"]

    def test_nothing_is_printed_and_the_input_is_unchanged(self, engine, capsys):
        truth, results = random_case(0)
        before = copy.deepcopy((truth, results))
        mask_ap(truth, results, engine=engine)
        assert (truth, results) == before
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("truth", "results", "keywords", "message"),
        [
            ([], [], {}, "truth must have at least one image, got none"),
            (
                [square(0, 0)],
                [(square(0, 0), [1])] * 3,
                {},
                "results must be of images of the truth, got 2 others: 1, 2",
            ),
            (
                [square(0, 0)],
                [(square(0, 0)[:, :-1], [1])],
                {},
                r"results must be of the truth's size, \(30, 40\) for image 0, got \(29, 40\)",
            ),
            (
                [square(0, 0)],
                [],
                {"engine": "numpy"},
                "engine must be 'faster-coco-eval' or 'pycocotools', got 'numpy'",
            ),
            ([square(0, 0)], [], {"resamples": -1}, "resamples must be at least 0, got -1"),
        ],
    )
    def test_refuses(self, truth, results, keywords, message):
        with pytest.raises(ValueError, match=f"^mask_ap: {message}$"):
            mask_ap(truth, results, **keywords)

    def test_a_missing_engine_is_named(self, engine, monkeypatch):
        monkeypatch.setitem(sys.modules, engine.replace("-", "_"), None)
        with pytest.raises(RuntimeError, match=rf"^\w+: {engine} must be installed"):
            mask_ap([square(0, 0)], [], engine=engine)


def matches(truth, results):
    pairs = [(truth.images[number], results.images.get(number)) for number in sorted(truth.images)]
    evaluator = masks._evaluate(pairs, "pycocotools")
    return [masks._Matches(evaluator, size) for size in range(4)]


class TestBootstrap:
    @pytest.mark.parametrize("seed", range(15))
    def test_each_image_once_gives_the_figures_themselves(self, seed):
        truth, results = random_case(seed)
        computed = masks._figures(matches(truth, results), np.ones(len(truth.images), dtype=int))
        np.testing.assert_allclose(np.nan_to_num(computed, nan=-1), original(truth, results), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("seed", range(15))
    def test_images_taken_several_times_are_copies(self, seed):
        truth, results = random_case(seed, ties=False)
        times = np.random.default_rng(seed).permutation(np.arange(len(truth.images)) % 4)
        copies = {n: range(10 * n, 10 * n + count) for n, count in zip(sorted(truth.images), times, strict=True)}

        def repeat(instances):
            images = (
                (n, image) for number, image in instances.images.items() for n in copies[number] for image in [image]
            )
            return Instances({n: ImageInstances(n, HEIGHT, WIDTH, "", image.instances) for n, image in images}, {})

        computed = masks._figures(matches(truth, results), times)
        expected = original(repeat(truth), repeat(results))
        np.testing.assert_allclose(np.nan_to_num(computed, nan=-1), expected, rtol=0, atol=1e-12)

    @pytest.mark.slow
    def test_intervals(self, engine):
        truth, results = random_case(5, images=12)
        plain = mask_ap(truth, results, engine=engine)
        scores = mask_ap(truth, results, resamples=200, engine=engine)
        assert figures(scores).tolist() == figures(plain).tolist()
        assert list(scores.intervals) == list(masks.NAMES) == list(MaskScores.__annotations__)[:12]
        for name, (low, high) in scores.intervals.items():
            assert 0 <= low < getattr(scores, name) < high <= 1
        again = mask_ap(truth, results, resamples=200, engine=engine)
        assert again.intervals == scores.intervals
        assert mask_ap(truth, results, resamples=200, seed=1, engine=engine).intervals != scores.intervals

    def test_equal_images_have_intervals_of_one_point(self):
        truth, detection = np.concatenate([square(0, 0), square(15, 15)]), square(0, 0)
        scores = mask_ap([truth] * 5, [(detection, np.ones(1))] * 5, resamples=20)
        assert scores.intervals["ap"] == pytest.approx((51 / 101, 51 / 101))
        assert all(map(math.isnan, scores.intervals["ap_large"]))

    @pytest.mark.slow
    def test_width_equals_that_of_the_mean_over_images(self):
        # one instance an image, found or not, all with one score: recall is the share of images where it is found
        hits = np.arange(100) < 36
        results = [(square(0, 0) if hit else np.zeros((0, 30, 40), bool), np.ones(int(hit))) for hit in hits]
        low, high = mask_ap([square(0, 0)] * 100, results, resamples=2000).intervals["ar100"]
        assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.36 * 0.64 / 100), rel=0.06)


def test_differences_are_those_of_the_scores():
    random = np.random.default_rng(5)
    truth, before, after = {}, {}, {}
    for number in range(1, 9):
        masks = np.zeros((3, 40, 60), bool)
        for mask, (top, left) in zip(masks, random.integers(0, 20, (3, 2)), strict=True):
            mask[top : top + 15, left : left + 25] = True
        truth[number] = encode_masks(masks, id=number)
        before[number] = encode_masks(np.roll(masks, 4, 1), random.random(3), id=number)
        after[number] = encode_masks(np.roll(masks, number % 3, 2), random.random(3), id=number)
    truth, before, after = (Instances(images, {}) for images in (truth, before, after))
    changes = compare_masks(truth, before, after)
    for name, (change, low, high) in changes.items():
        assert change == pytest.approx(getattr(mask_ap(truth, after), name) - getattr(mask_ap(truth, before), name))
        assert 0 < low < change < high
    # resamples are paired: a result never differs from itself
    assert set(compare_masks(truth, before, before).values()) == {(0.0, 0.0, 0.0)}
    with pytest.raises(ValueError, match="compare_masks: resamples must be at least 1, got 0"):
        compare_masks(truth, before, after, resamples=0)
    with pytest.raises(ValueError, match="mask_ap: results must be of images of the truth"):
        compare_masks(Instances({1: truth.images[1]}, {}), before, after)
