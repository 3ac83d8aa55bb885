"""scripts/quality.py: metrics by hand, ground truth of a drawn map, other methods on real photographs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("skimage", reason="needs scikit-image: pip install trace_fast[eval]")
pytest.importorskip("matplotlib", reason="needs matplotlib: pip install trace_fast[eval]")

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared/data/dev_coco"
SPEC = importlib.util.spec_from_file_location("quality", ROOT / "scripts/quality.py")
quality = sys.modules.setdefault("quality", importlib.util.module_from_spec(SPEC))
SPEC.loader.exec_module(quality)


def truth(positive, valid=None):
    positive = np.array(positive, bool)
    valid = np.ones_like(positive) if valid is None else np.array(valid, bool)
    return quality.Truth(positive & valid, valid, positive.astype(float))


def test_average_precision_and_best_f_by_hand():
    scores, positive = np.array([0.9, 0.8, 0.7, 0.1]), np.array([True, False, True, False])
    # thresholds .9, .8, .7, .1: precision 1, 1/2, 2/3, 1/2; recall 1/2, 1/2, 1, 1
    ap, best_f = quality.ap_and_best_f(scores, positive)
    assert ap == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)
    assert best_f == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))


def test_equal_scores_are_one_threshold():
    # a constant map takes all or nothing: AP is the share of positives, whatever the order of the cells
    for positive in ([True, False, False, False], [False, False, False, True]):
        assert quality.ap_and_best_f(np.ones(4), np.array(positive)) == pytest.approx((1 / 4, 2 / 5))


@pytest.mark.parametrize("seed", range(3))
def test_metrics_agree_with_a_search_over_thresholds(seed):
    random = np.random.default_rng(seed)
    scores, positive = random.integers(0, 9, (3, 40)) / 8, random.random((3, 40)) < 0.3
    valid = random.random((3, 40)) < 0.8

    def search(s, p):
        taken = [s >= threshold for threshold in sorted(set(s), reverse=True)]
        return [(p[t].mean(), p[t].sum() / p.sum(), 2 * p[t].sum() / (t.sum() + p.sum())) for t in taken]

    steps = search(scores[0], positive[0])
    precision, recall, f = np.array(steps).T
    ap = (precision * (recall - np.append(0, recall[:-1]))).sum()
    assert quality.ap_and_best_f(scores[0], positive[0]) == pytest.approx((ap, f.max()))

    # few distinct scores: every one is a quantile, so the pooled F is exact, also when a photo is drawn twice
    rows = [0, 0, 2]
    cells = valid[rows].flatten()
    pooled = search(scores[rows].flatten()[cells], positive[rows].flatten()[cells])
    best_f = quality.pooled_best_f(scores, truth(positive, valid), np.array([[2, 0, 1]]))
    assert best_f == pytest.approx([max(f for *_, f in pooled)])


def test_measure_pairs_the_gap_by_photo():
    positive = [[1, 0, 0, 1], [0, 0, 1, 0]]
    # the control is constant: AP .5 and .25
    figures = quality.measure(np.array(positive, float), truth(positive), control=np.ones((2, 4)))
    assert figures["ap"] == figures["ois"] == figures["ods"] == 1
    assert figures["ap_interval"] == [1, 1]
    assert figures["gap"] == pytest.approx(0.625)
    assert figures["gap_error"] == pytest.approx(0.125)  # gaps .5 and .75: deviation .1768, over the root of 2


def test_boundaries_by_hand():
    labels = torch.tensor([[0, 0, 1], [0, 0, 1], [2, quality.CROWD, quality.CROWD]])
    # the border of the crowd does not count
    assert quality.boundaries(labels).int().tolist() == [[0, 1, 1], [1, 1, 1], [1, 0, 0]]
    assert not quality.boundaries(torch.zeros(1, 3, dtype=torch.int64)).any()


def test_target_of_a_drawn_map():
    labels = torch.zeros(quality.SIDE, quality.SIDE, dtype=torch.int64)
    labels[:, 100:] = 1  # boundary pixels are columns 99 and 100; grown: 96 to 103, which is the cell column 12
    labels[200:, :40] = quality.CROWD  # grown by 3: rows from 197 (cell 24), columns to 42 (cell 5)
    positive, valid, thin = quality.target(labels)
    expected = np.zeros((quality.GRID, quality.GRID), bool)
    expected[:, 12] = True
    assert (positive == expected).all()
    expected[:] = True
    expected[24:, :6] = False
    assert (valid == expected).all()
    assert thin[0, 12] == pytest.approx(2 / 8)
    assert thin.sum() == pytest.approx(32 * 2 / 8)


def test_control_is_abdiv_with_colors():
    image = torch.zeros(1, 3, 3, 4)
    image[0, 0, :, 2:] = 1.0
    image[0, 1, 2:] = 0.5
    # columns 1 and 2 see the step of 1; rows 1 and 2 see the step of a half
    expected = [[0.0, 1.0, 1.0, 0.0], [0.5, 1.5, 1.5, 0.5], [0.5, 1.5, 1.5, 0.5]]
    assert quality.color_difference(image)[0].tolist() == expected


@pytest.mark.parametrize("side", [8, 32, 48, 96])
def test_to_grid_keeps_the_mean(side):
    maps = torch.rand(2, side, side, generator=torch.Generator().manual_seed(0))
    grid = quality.to_grid(maps)
    assert grid.shape == (2, quality.GRID**2)
    assert grid.mean(1) == pytest.approx(maps.mean((1, 2)).numpy(), abs=0.02)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the development photographs in {DATA}")
def test_photographs_and_peers():
    photos = quality.Photos.read(DATA, (48, 64), (12, 16), limit=4)
    assert photos.images.shape == (4, 3, 48, 64)
    assert all(maps.shape == (4, quality.GRID**2) and np.isfinite(maps).all() for maps in photos.classics.values())
    ap = {name: quality.per_photo(maps, photos.truth)[0] for name, maps in photos.classics.items()}
    assert (ap[quality.CEILING] > 0.95).all()
    share = photos.truth.positive.sum(1) / photos.truth.valid.sum(1)
    assert ap["chance, random numbers"] == pytest.approx(share, abs=0.06)
    assert ap[quality.PIDINET].mean() > ap["chance, random numbers"].mean() + 0.1
    assert photos.segments.positive.shape == (len(photos.panoptic), quality.GRID**2)
