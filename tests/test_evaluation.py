"""Scores of edges: a known answer on BSDS500, BSDS' formulas in loops, properties, and classical detectors.

The known answer is HED on the 200 test images of BSDS500 with the counts of the original benchmark. Twenty of the
images at a third of the thresholds are counted each time; all of them, which takes minutes, by

    pytest -m oracle tests/test_evaluation.py

The counts are not equal everywhere. Our matching finds as many pairs as there are; the original's, which may leave a
pixel alone at the cost of one of six random outliers only, sometimes finds fewer. So on no image and at no threshold do
we find fewer pixels of the truth than it does, and up to 30 more. Of detected pixels, which count where any annotator
has a partner, either may find more: 48 of 19,800 figures differ by more than 0.5 % and 5 pixels, 46 of them of image
69000.
"""

import io
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("skimage", reason="needs scikit-image: pip install 'trace_fast[eval]'")
from scipy import ndimage
from skimage import morphology

from trace_fast import cli, ops
from trace_fast.evaluation import (
    Contours,
    Counts,
    Photo,
    cldice,
    compare_edges,
    count_edges,
    find_contours,
    open_dataset,
    open_method,
    read_map,
    run,
    score_edges,
)
from trace_fast.evaluation.data import GROUPS
from trace_fast.evaluation.edges import THRESHOLDS, line_overlap

DATA = Path(__file__).parent.parent / "../shared/data/bsds_oracle"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/bsds_oracle")
few = settings(max_examples=40, deadline=None)


def f(recall, precision):
    return 2 * recall * precision / (recall + precision) if recall + precision else 0.0


def bsds(tables, thresholds):
    """Return ODS, its threshold, OIS and AP by the formulas of BSDS' benchmark.

    Tables (T, >= 4) of images: matched truth, truth, matched detections, detections at each threshold.
    """

    def rates(row):
        return [row[0] / row[1] if row[1] else 0.0, row[2] / row[3] if row[3] else 0.0]

    total = [rates([sum(table[t][c] for table in tables) for c in range(4)]) for t in range(len(thresholds))]
    ods, where = 0.0, None
    for (r1, p1), (r2, p2), t1, t2 in zip(total, total[1:], thresholds, thresholds[1:], strict=False):
        for share in np.linspace(0, 1, 100):
            value = f(r1 * (1 - share) + r2 * share, p1 * (1 - share) + p2 * share)
            if where is None or value > ods:
                ods, where = value, t1 * (1 - share) + t2 * share
    own = [max(table, key=lambda row: f(*rates(row))) for table in tables]  # the first of equals, as max takes it
    ois = f(*rates([sum(row[c] for row in own) for c in range(4)]))
    curve: dict[float, float] = {}
    for recall, precision in total:
        curve.setdefault(recall, precision)
    points = sorted(curve.items())
    area = 0.0
    for k in range(101):
        for (r1, p1), (r2, p2) in pairwise(points):
            if r1 <= k / 100 <= r2:
                area += p1 + (p2 - p1) * (k / 100 - r1) / (r2 - r1)
                break
    return ods, where, ois, area / 100


def random_counts(images, thresholds, seed=0, groups=0):
    """Return possible counts of images; more is detected at lower thresholds."""
    random = np.random.default_rng(seed)
    counts = []
    for _ in range(images):
        truth = random.integers(50, 500)
        detected = np.sort(random.integers(0, 600, thresholds))[::-1]
        hits = [random.integers(0, np.minimum(truth, detected) + 1) for _ in range(2)]
        near = [np.minimum(hit + random.integers(0, 9), most) for hit, most in ((hits[1], detected), (hits[0], truth))]
        matches = np.stack([hits[0], np.full(thresholds, truth), hits[1], detected, *near], 1)
        by_group = random.integers(0, 9, (thresholds, groups))
        counts.append(Counts(matches, by_group, by_group.max(0, initial=0) + random.integers(0, 9, groups)))
    return counts


def original(name):
    """Return the original benchmark's counts of an image, (99, 4)."""
    return np.loadtxt(DATA / "hed_counts" / f"{name}_ev1.txt")[:, 1:].astype(int)


def check_counts(ours, theirs, share):
    """Compare counts (images, T, 4) with the original's; a `share` of the figures of matched detections may differ."""
    apart = np.abs(ours - theirs)
    # sums over images at each threshold
    assert (np.abs((ours - theirs).sum(0)) <= 0.005 * theirs.sum(0)).all()
    assert (ours[..., 1] == theirs[..., 1]).all()  # pixels of the truth
    assert (ours[..., 3] == theirs[..., 3]).all()  # and of thinned detections
    assert (ours[..., 0] >= theirs[..., 0]).all()
    outside = apart > np.maximum(0.005 * theirs, 5)
    assert not outside[..., 0].any()
    assert outside[..., 2].mean() <= share
    assert apart[..., 2].max() <= 25
    assert (apart <= np.maximum(0.015 * theirs, 5)).all()


@needs_data
class TestKnownAnswer:
    def test_scores_from_the_original_counts(self):
        """Score all 200 images from counts in files."""
        names = sorted(path.stem for path in (DATA / "hed_thinned").glob("*.png"))
        tables = [original(name) for name in names]
        scores = score_edges(
            [Counts(np.pad(table, ((0, 0), (0, 2))), np.zeros((99, 0)), np.zeros(0)) for table in tables]
        )
        threshold, _, _, ods, _, _, ois, ap = np.loadtxt(DATA / "hed_counts" / "eval_bdry.txt")
        assert len(names) == scores.images == 200
        assert (scores.ods, scores.ois, scores.ap) == pytest.approx((ods, ois, ap), abs=2e-6)
        assert (scores.ods, scores.ois, scores.ap) == pytest.approx((0.7888, 0.8058, 0.8100), abs=1e-4)
        assert scores.threshold == pytest.approx(threshold, abs=1e-6)
        assert bsds(tables, THRESHOLDS) == pytest.approx((ods, threshold, ois, ap), abs=2e-6)  # and so does the loop

    @pytest.mark.slow
    def test_twenty_images(self, tmp_path):
        thresholds = THRESHOLDS[::3]
        photos = open_dataset(DATA).photos[::10]
        assert len(photos) == 20 and "69000" in {photo.name for photo in photos}
        counts = run.count_all(photos, open_method(f"lines:{DATA / 'hed_thinned'}"), tmp_path, thresholds=thresholds)
        theirs = np.stack([original(photo.name)[::3] for photo in photos])
        # one of the twenty is 69000
        check_counts(np.stack([image.matches[:, :4] for image in counts]), theirs, share=0.03)
        scores = score_edges(counts, thresholds=thresholds)
        ods, threshold, ois, ap = bsds(theirs.tolist(), thresholds)
        assert (scores.ods, scores.ois, scores.ap) == pytest.approx((ods, ois, ap), abs=0.002)
        assert scores.threshold == pytest.approx(threshold, abs=0.03)

    @pytest.mark.oracle
    def test_all_images(self, tmp_path, request):
        if "oracle" not in request.config.getoption("-m"):
            pytest.skip("takes minutes: pytest -m oracle tests/test_evaluation.py")
        method = f"HED=lines:{DATA / 'hed_thinned'}"
        result = CliRunner().invoke(cli.app, ["evaluate", "--data", str(DATA), "--method", method, "-o", str(tmp_path)])
        assert result.exit_code == 0, result.output
        scores = json.loads((tmp_path / "report.json").read_text())["methods"]["HED"]
        assert scores["images"] == 200
        assert [scores[name] for name in ("ods", "ois", "ap")] == pytest.approx([0.7888, 0.8058, 0.8100], abs=0.002)
        files = sorted((tmp_path / "counts").glob("*/*.npz"))
        ours = np.stack([np.load(path)["matches"][:, :4] for path in files])
        check_counts(ours, np.stack([original(path.stem) for path in files]), share=0.003)


class TestScore:
    @pytest.mark.parametrize(("images", "steps"), [(1, 2), (1, 9), (4, 5), (7, 30)])
    def test_equals_loops(self, images, steps):
        thresholds = np.linspace(0.05, 0.95, steps)
        counts = random_counts(images, steps, seed=steps)
        tables = [image.matches.tolist() for image in counts]
        scores = score_edges(counts, thresholds=thresholds)
        ods, threshold, ois, ap = bsds(tables, thresholds)
        assert (scores.ods, scores.ois, scores.ap) == pytest.approx((ods, ois, ap), abs=1e-9)
        assert scores.threshold == pytest.approx(threshold, abs=1e-6)
        total = np.sum(tables, axis=0)
        values = [f(row[0] / row[1] if row[1] else 0.0, row[2] / row[3] if row[3] else 0.0) for row in total.tolist()]
        index = int(np.argmax(values))
        rows = [table[index] for table in tables]
        overlaps = [f(row[5] / row[1], row[4] / row[3] if row[3] else 0.0) for row in rows]
        assert scores.cldice == pytest.approx(np.mean(overlaps))
        assert scores.f_per_image == pytest.approx([f(r[0] / r[1], r[2] / r[3] if r[3] else 0.0) for r in rows])
        assert scores.recall == pytest.approx(total[:, 0] / total[:, 1])
        assert scores.precision == pytest.approx(total[:, 2] / np.maximum(total[:, 3], 1))
        assert scores.images == images and scores.by == {}

    def test_ods_is_interpolated(self):
        matches = np.zeros((2, 6), int)
        matches[0, :4] = 100, 100, 100, 200  # recall 1, precision 1 / 2
        matches[1, :4] = 50, 100, 50, 50  # recall 1 / 2, precision 1
        scores = score_edges([Counts(matches, np.zeros((2, 0)), np.zeros(0))], thresholds=(0.2, 0.6))
        # F is 2 / 3 at either threshold and 3 / 4 between them, of which the grid has 49 / 99
        assert scores.ods == pytest.approx(0.75, abs=1e-4)
        assert scores.threshold == pytest.approx(0.4, abs=0.01)
        assert (scores.ois, scores.f_per_image[0]) == pytest.approx((2 / 3, 2 / 3))
        assert scores.ap == pytest.approx(51 * 0.75 / 100)  # precision falls from 1 to 1 / 2 over 51 recalls

    def test_one_threshold(self):
        scores = score_edges(random_counts(3, 1), thresholds=[0.3])
        total = sum(image.matches[0] for image in random_counts(3, 1))
        assert scores.ods == pytest.approx(f(total[0] / total[1], total[2] / total[3]))
        assert scores.ois == pytest.approx(scores.ods) and scores.threshold == 0.3
        assert scores.ap == 0  # a curve of one point has no area, to BSDS

    def test_recall_by_group(self):
        thresholds = (0.2, 0.4, 0.6)
        counts = random_counts(3, 3, groups=len(GROUPS))
        scores = score_edges(counts, thresholds=thresholds)
        index = int(np.argmin(np.abs(np.subtract(thresholds, scores.threshold))))
        assert list(scores.by) == ["side", "size", "neighbors"]
        for axis, values in enumerate(scores.by.values()):
            for value, (recall, pixels) in values.items():
                members = [group[axis] == value for group in GROUPS]
                assert pixels == sum(image.pixels_by_group[members].sum() for image in counts)
                assert recall == pytest.approx(
                    sum(image.matched_by_group[index][members].sum() for image in counts) / pixels
                )

    def test_intervals_are_of_resampled_images(self):
        thresholds, counts = (0.2, 0.5, 0.8), random_counts(5, 3)
        intervals = score_edges(counts, thresholds=thresholds, resamples=40, seed=3).intervals
        draws = np.random.default_rng(3).multinomial(5, [0.2] * 5, 40)
        figures = []
        for times in draws:
            ods, _, ois, ap = bsds([counts[i].matches for i in np.arange(5).repeat(times)], thresholds)
            figures.append([ods, ois, ap])
        expected = np.percentile(figures, [2.5, 97.5], axis=0)
        assert np.transpose([intervals[name] for name in ("ods", "ois", "ap")]) == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("images", [2, 8, 60])
    def test_intervals_contain_the_figure_and_do_not_change(self, images):
        counts = random_counts(images, 9, seed=images)
        thresholds = np.linspace(0.1, 0.9, 9)
        scores = score_edges(counts, thresholds=thresholds)
        for name, (low, high) in scores.intervals.items():
            # a resample may be every image once, whose sums may differ in the last bits
            assert low - 1e-9 <= getattr(scores, name) <= high + 1e-9
            assert low < high
        assert score_edges(counts, thresholds=thresholds).intervals == scores.intervals
        if images > 2:  # two images can be drawn in three ways
            assert score_edges(counts, thresholds=thresholds, seed=1).intervals != scores.intervals

    def test_differences_are_of_the_same_resamples(self):
        counts, thresholds = random_counts(12, 4), (0.2, 0.4, 0.6, 0.8)
        others = [replace(image, matches=image.matches // 2) for image in counts]
        scores = score_edges(counts, thresholds=thresholds, resamples=50)
        reference = score_edges(others, thresholds=thresholds, resamples=50)
        for name, (difference, low, high) in compare_edges(scores, reference).items():
            assert difference == getattr(scores, name) - getattr(reference, name)
            paired = scores.resamples[name] - reference.resamples[name]
            assert (low, high) == pytest.approx(np.percentile(paired, [2.5, 97.5]), abs=1e-12)
        assert set(compare_edges(scores, scores).values()) == {(0.0, 0.0, 0.0)}

    def test_differences_of_other_images_are_refused(self):
        counts, thresholds = random_counts(12, 4), (0.2, 0.4, 0.6, 0.8)
        scores = [score_edges(part, thresholds=thresholds, resamples=9) for part in (counts, counts[1:])]
        with pytest.raises(ValueError, match=r"must have the same numbers of images and resamples, got \(12, 9\)"):
            compare_edges(*scores)

    def test_equal_images_have_intervals_of_one_point(self):
        scores = score_edges(random_counts(1, 4) * 3, thresholds=(0.2, 0.4, 0.6, 0.8))
        for name, interval in scores.intervals.items():
            assert interval == pytest.approx([getattr(scores, name)] * 2)

    def test_summary_is_for_json(self):
        scores = score_edges(random_counts(2, 99, groups=len(GROUPS)))
        assert json.loads(json.dumps(scores.to_dict()))["ods"] == scores.ods

    @pytest.mark.parametrize(("counts", "steps"), [([], 99), (random_counts(2, 4), 99), (random_counts(2, 4), 5)])
    def test_errors(self, counts, steps):
        with pytest.raises(ValueError, match=rf"^score_edges: counts must be of at least one image at {steps} thresh"):
            score_edges(counts, thresholds=THRESHOLDS[:steps])

    def test_resamples_are_checked(self):
        with pytest.raises(ValueError, match=r"^score_edges: resamples must be at least 1, got 0$"):
            score_edges(random_counts(2, 99), resamples=0)


def lines(height, width, seed=0, density=0.3):
    """Return lines of one pixel, not along the border, (H, W) bool."""
    noise = np.random.default_rng(seed).random((height, width))
    smooth = ndimage.gaussian_filter(noise, 1.5)
    mask = smooth > np.quantile(smooth, 1 - density)
    mask[:3] = mask[-3:] = mask[:, :3] = mask[:, -3:] = False
    return morphology.thin(mask)


def make_contours(*drawn, ignored=None):
    return Contours(np.stack(drawn), np.zeros(drawn[0].shape, bool) if ignored is None else ignored, None)


def score_pairs(pairs, distance=0.02):
    """Return the scores of pairs of maps and contours."""
    counts = [
        count_edges(np.float32(edges), contours, distance=distance, suppression=None) for edges, contours in pairs
    ]
    return score_edges(counts, resamples=5)


class TestProperties:
    @few
    @given(st.integers(0, 10**6), st.tuples(st.integers(8, 50), st.integers(8, 50)), st.sampled_from([0, 0.0075, 0.05]))
    def test_the_truth_itself_is_perfect(self, seed, shape, distance):
        drawn = lines(*shape, seed)
        assume(drawn.any())
        scores = score_pairs([(drawn, make_contours(drawn))], distance)
        figures = (scores.ods, scores.ois, scores.cldice, scores.f_per_image[0], *scores.intervals["ods"])
        assert figures == pytest.approx([1] * 6)
        assert scores.ap == 0  # as BSDS defines it: one recall, no area

    def test_area_of_the_truth_itself_by_strength(self):
        drawn = np.zeros((202, 30), bool)
        drawn[2::2, 5:25] = True  # 100 lines
        strength = drawn * (np.arange(202) // 2 / 100)[:, None]  # .01 to 1
        scores = score_pairs([(strength, make_contours(drawn))], 0)
        assert scores.recall == pytest.approx(np.linspace(1, 0.02, 99))
        assert scores.precision == pytest.approx(np.ones(99))
        assert (scores.ods, scores.ois) == pytest.approx((1, 1))
        assert scores.ap == pytest.approx(0.99)  # of the recalls 0, .01, .., 1 the first two are not reached

    @few
    @given(st.integers(0, 10**6), st.integers(-2, 2), st.integers(-2, 2))
    def test_a_shift_within_the_distance_is_none(self, seed, down, across):
        drawn = lines(40, 52, seed)  # 3 pixels from the border at least: nothing is shifted out
        assume(drawn.any())
        moved = np.roll(drawn, (down, across), (0, 1))
        length = np.hypot(down, across)
        exactly = length / np.hypot(*drawn.shape) * (1 + 1e-9)
        scores = score_pairs([(moved, make_contours(drawn))], exactly)
        assert (scores.ods, scores.ois, scores.cldice) == pytest.approx((1, 1, 1))

    def test_a_shift_beyond_the_distance_or_the_border_is_a_mistake(self):
        drawn = np.zeros((40, 60), bool)
        drawn[20, 5:55] = True
        pixel = 1 / np.hypot(*drawn.shape)
        assert score_pairs([(np.roll(drawn, 3, 0), make_contours(drawn))], 2.99 * pixel).ods == 0
        drawn[20] = True
        moved = np.zeros_like(drawn)
        moved[20, 5:] = True
        scores = score_pairs([(moved, make_contours(drawn))], 3.001 * pixel)
        assert scores.recall == pytest.approx(np.full(99, 55 / 60)) and scores.precision == pytest.approx(np.ones(99))
        assert scores.cldice == pytest.approx(f(58 / 60, 1))  # three of the five are near enough

    @few
    @given(
        arrays(np.int64, (24, 30), elements=st.integers(0, 4)),
        st.integers(0, 99),
        st.lists(st.integers(2, 97), min_size=3, max_size=3, unique=True),
    )
    def test_strengths_matter_by_their_order_alone(self, steps, seed, levels):
        """On lines, with the thresholds between the same neighbors: NMS smooths, and so is left out."""
        contours = make_contours(lines(24, 30, seed), lines(24, 30, seed + 1))
        assume(contours.lines.any() and steps.any())
        figures = []
        for values in ([0.25, 0.5, 0.75], np.sort(levels) / 100):
            scale = np.array([0, *values, 0.99])
            scores = score_pairs([(scale[steps], contours)])
            figures.append([scores.ods, scores.ois])
            if (steps == 4).any():  # else some thresholds find nothing, or not, and the curve begins at 0, or not
                figures[-1] += [scores.ap, *scores.f_per_image, scores.cldice]
        assert figures[0] == pytest.approx(figures[1], abs=1e-9)

    @few
    @given(st.integers(0, 10**6))
    def test_detections_in_ignored_areas_change_nothing(self, seed):
        strength, noise = np.random.default_rng(seed).random((2, 50, 60)).astype(np.float32)
        drawn, ignored = lines(50, 60, seed), np.zeros((50, 60), bool)
        ignored[35:] = True
        strength[34:], drawn[33:] = 0, False
        distance = 3 / np.hypot(50, 60)
        before = count_edges(strength, make_contours(drawn, ignored=ignored), distance=distance, suppression=None)
        strength[38:] = noise[38:]  # too far for a partner
        after = count_edges(strength, make_contours(drawn, ignored=ignored), distance=distance, suppression=None)
        np.testing.assert_array_equal(after.matches, before.matches)
        without = count_edges(strength, make_contours(drawn), distance=distance, suppression=None)
        np.testing.assert_array_equal(without.matches[:, [0, 1, 2, 4, 5]], before.matches[:, [0, 1, 2, 4, 5]])
        assert (without.matches[:, 3] >= before.matches[:, 3]).all()

    def test_counts_by_group_add_up(self):
        labels = np.zeros((60, 80), int)
        for label, (top, left) in enumerate([(5, 5), (5, 25), (30, 10), (40, 50)], 1):
            labels[top : top + 22, left : left + 20] = label
        contours = find_contours(labels)
        blurred = ndimage.gaussian_filter(np.float32(contours.lines[0]), 1.5) * 4
        counts = count_edges(blurred.clip(0, 1), contours, distance=0.02)
        np.testing.assert_array_equal(counts.matched_by_group.sum(1), counts.matches[:, 0])
        assert counts.pixels_by_group.sum() == counts.matches[0, 1] == contours.lines.sum()
        assert (counts.matched_by_group <= counts.pixels_by_group).all()
        by = score_edges([counts]).by
        assert {sum(pixels for _, pixels in values.values()) for values in by.values()} == {contours.lines.sum()}
        assert all(recall > 0.8 for values in by.values() for recall, pixels in values.values() if pixels)

    @pytest.mark.parametrize("suppression", ["bsds", "hessian"])
    def test_ridges_are_found_unless_maps_are_lines(self, suppression):
        drawn = np.zeros((40, 60), bool)
        drawn[20, 5:55] = True
        wide = ndimage.gaussian_filter(np.float32(drawn), 2) * 4
        lined, ridges = (
            count_edges(wide, make_contours(drawn), suppression=method).matches for method in (None, suppression)
        )
        assert np.count_nonzero(ops.suppress_nonmaxima(torch.from_numpy(wide)[None], suppression)) < np.count_nonzero(
            wide
        )
        assert ridges[:50, 0].min() > lined[:50, 0].max() * 0.9
        assert score_edges([Counts(ridges, np.zeros((99, 0)), np.zeros(0))]).ods > 0.95

    def test_a_map_of_another_size(self):
        with pytest.raises(
            ValueError, match=r"^count_edges: edges must be of the ground truth's size \(4, 5\), got \(5, 4\)"
        ):
            count_edges(np.zeros((5, 4), np.float32), make_contours(np.zeros((4, 5), bool)))


def naive_cldice(prediction, target, tolerance):
    """By skimage's thinning and scipy's dilation with a disc."""
    reach = int(tolerance)
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = rows**2 + columns**2 <= tolerance**2
    shares = []
    for one, other in ((prediction, target), (target, prediction)):
        line, grown = morphology.thin(one), ndimage.binary_dilation(other, disc)
        shares.append((line & grown).sum() / line.sum() if line.any() else 0)
    return f(*shares)


class TestClDice:
    @few
    @given(
        st.tuples(st.integers(1, 30), st.integers(1, 30)),
        st.integers(0, 10**6),
        st.sampled_from([0, 1, 2**0.5, 1.5, 2.9, 4.33]),
        st.sampled_from([0.02, 0.1, 0.5, 0.9]),
    )
    def test_equals_libraries(self, shape, seed, tolerance, density):
        prediction, target = np.random.default_rng(seed).random((2, *shape)) < density
        assume(prediction.any() and target.any())
        assert cldice(prediction, target, tolerance) == pytest.approx(naive_cldice(prediction, target, tolerance))
        assert cldice(target, prediction, tolerance) == pytest.approx(cldice(prediction, target, tolerance))

    def test_of_nothing(self):
        empty, some = np.zeros((3, 7), bool), np.eye(3, 7, dtype=bool)
        assert cldice(empty, empty) == cldice(some, some) == 1
        assert cldice(empty, some, 9) == cldice(some, empty, 9) == 0

    @few
    @given(st.integers(0, 10**6), st.floats(0, 6))
    def test_counts_of_lines_give_the_same_overlap(self, seed, pixels):
        truth, detected = lines(30, 44, seed), lines(30, 44, seed + 1)
        assume(truth.any() and detected.any())
        distance = pixels / np.hypot(30, 44)
        counts = count_edges(
            np.float32(detected), make_contours(truth), distance=distance, thresholds=[0.5], suppression=None
        )
        tolerance = distance * float(np.hypot(30, 44))
        assert line_overlap(counts.matches)[0] == pytest.approx(cldice(detected, truth, tolerance))

    @pytest.mark.parametrize("shapes", [((3, 4), (4, 3)), ((4,), (4,))])
    def test_errors(self, shapes):
        with pytest.raises(ValueError, match="cldice: target must be "):
            cldice(*(np.ones(shape, bool) for shape in shapes))


def make_photo(folder, gray):
    """Make a photo of a gray picture (H, W) uint8."""
    path = folder / "a.png"
    Image.fromarray(np.dstack([gray] * 3)).save(path)
    return Photo("a", path, path, lambda: make_contours(gray > 0))


class TestMethods:
    def step(self, contrast=255):
        gray = np.zeros((41, 58), np.uint8)
        gray[:, 30:] = contrast
        return gray

    @pytest.mark.parametrize("turned", [False, True])
    def test_sobel_of_a_step(self, tmp_path, turned):
        gray = self.step().T if turned else self.step()
        edges = open_method("sobel").edges(make_photo(tmp_path, np.ascontiguousarray(gray)))
        edges = edges.T if turned else edges
        assert edges.shape == (41, 58) and edges.dtype == np.float32
        assert 0.95 < edges.max() <= 1
        middle = edges[5:-5]
        assert np.allclose(middle, middle[0], atol=1e-5)
        assert set(np.flatnonzero(middle[0] > 0.9)) == {29, 30}  # either side of the step
        assert (middle[0, [0, 15, 44, 57]] < 0.01).all()

    def test_sobel_is_the_root_of_the_contrast(self, tmp_path):
        strong, weak = (open_method("sobel").edges(make_photo(tmp_path, self.step(c))).max() for c in (200, 50))
        assert strong == pytest.approx(2 * weak, rel=1e-3)

    @pytest.mark.parametrize("spec", ["sobel", "canny"])
    def test_nothing_on_a_flat_picture(self, tmp_path, spec):
        edges = open_method(spec).edges(make_photo(tmp_path, np.full((20, 30), 77, np.uint8)))
        assert edges.dtype == np.float32 and edges.max() < 1e-3

    def test_canny_of_a_step(self, tmp_path):
        levels = []
        for contrast in (255, 64):
            edges = open_method("canny").edges(make_photo(tmp_path, self.step(contrast)))
            assert (edges.argmax(1) == 29).all() and (np.count_nonzero(edges, axis=1) == 1).all()
            levels.append(edges.max())
        assert 0.5 < levels[0] < 1 and levels[0] == pytest.approx(2 * levels[1], abs=0.02)

    def test_canny_thresholds_are_nested(self, tmp_path):
        """Thresholding the map equals running Canny at that threshold."""
        cv2 = pytest.importorskip("cv2")
        random = np.random.default_rng(0)
        gray = ndimage.gaussian_filter(random.random((60, 90)), 2)
        gray = np.uint8(255 * (gray - gray.min()) / np.ptp(gray) * (1 + (np.arange(90) > 40)) / 2)
        method = open_method("canny")
        assert not method.suppress
        edges = method.edges(make_photo(tmp_path, gray))
        smooth = cv2.GaussianBlur(gray, (0, 0), 1.4)
        across, down = (cv2.Sobel(smooth, cv2.CV_16S, *order) for order in ((1, 0), (0, 1)))
        sizes = []
        for k in range(1, 100):
            high = (k / 100) ** 2 * 1443
            expected = cv2.Canny(across, down, 0.4 * high, high, L2gradient=True) > 0
            np.testing.assert_array_equal(edges >= np.float32(k / 100), expected)
            sizes.append(expected.sum())
        assert sizes[0] > sizes[10] > sizes[20] > 0 and sizes == sorted(sizes, reverse=True)

    def test_maps_and_lines(self, tmp_path):
        levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
        photo = make_photo(tmp_path, levels)
        for kind, pixels in (("maps", levels), ("lines", levels.astype(np.uint16) * 257)):
            folder = tmp_path / f"k=3 {kind}"
            folder.mkdir()
            Image.fromarray(pixels).save(folder / "a.png")
            for name in ("", "HED="):
                method = open_method(f"{name}{kind}:{folder}")
                assert method.name == (name[:-1] or f"{kind}:{folder}")
                assert method.suppress == (kind == "maps")
                assert method.source(photo) == folder / "a.png"
                edges = method.edges(photo)
                assert edges.dtype == np.float32
                np.testing.assert_array_equal(edges, np.float32(levels) / np.float32(255))

    @pytest.mark.parametrize("mode", ["1", "LA", "RGB", "RGBA", "P"])
    def test_maps_of_another_kind(self, tmp_path, mode):
        Image.new(mode, (4, 3)).save(tmp_path / "a.png")
        with pytest.raises(ValueError, match=f"maps must be of one channel with 8 or 16 bits, got mode {mode}"):
            read_map(tmp_path / "a.png")

    def test_names(self):
        named = open_method("a b/c=sobel")
        assert (named.name, named.slug, named.identity) == ("a b/c", "a_b_c", "sobel")
        assert open_method("sobel").name == "sobel"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "maps:/no/such/folder",
                r"evaluate: method maps:/no/such/folder must name a folder of maps, or a tar .* file, got '/no/such",
            ),
            (
                "x=lines:/no/such",
                "evaluate: method x must name a folder of maps, or a tar or parquet file, got '/no/such'",
            ),
            ("mini@potato", "evaluate: timestep of method mini@potato must be iep or an integer, got 'potato'"),
            ("mini@-1", "evaluate: timestep of method mini@-1 must be iep or an integer, got '-1'"),
            ("sobbel", "load: model must be one of .* got 'sobbel'"),
            ("", "load: model must be one of .* got ''"),
        ],
    )
    def test_errors(self, text, message):
        with pytest.raises(ValueError, match=message):
            open_method(text)


class TestKeptCounts:
    def test_damage_is_detected(self, tmp_path, caplog):
        """Whatever bytes are cut off or changed, counts are the same as before, or they are computed again."""
        (counts,) = random_counts(1, 99, groups=len(GROUPS))
        stream = io.BytesIO()
        np.savez_compressed(stream, stamp="x", **vars(counts))
        whole = stream.getvalue()
        random = np.random.default_rng(0)
        damaged = [whole[:length] for length in (0, 1, 10, *random.integers(0, len(whole), 60))]
        for index in (*range(30), *random.integers(0, len(whole), 300)):
            changed = bytearray(whole)
            changed[index] ^= random.integers(1, 256)
            damaged.append(bytes(changed))
        path = tmp_path / "a.npz"
        detected = 0
        for data in damaged:
            path.write_bytes(data)
            cached = run.read_counts(path, "x")
            detected += cached is None
            if cached is not None:
                for name, value in vars(counts).items():
                    np.testing.assert_array_equal(getattr(cached, name), value)
        assert detected > len(damaged) // 2
        assert f"{path} is damaged and computed again: " in caplog.text
        caplog.clear()
        path.write_bytes(whole)
        assert run.read_counts(path, "x") is not None and run.read_counts(path, "y") is None
        assert run.read_counts(tmp_path / "none.npz", "x") is None
        assert not caplog.messages
