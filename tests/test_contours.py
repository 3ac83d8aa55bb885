"""Ridges, thinning and matching of contours, on each instruction set, against the reference and libraries."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from skimage import morphology

from trace_fast import ops, reference
from trace_fast.ops.contours import SUPPRESSIONS
from trace_fast.testing import assert_no_worse

SHAPES = [
    (1, 1),
    (2, 3),
    (3, 7),
    (16, 24),
    (31, 17),
    (64, 96),
    (5, 64),
    (7, 63),
    (9, 65),
    (40, 128),
    (1, 200),
    (200, 1),
]


def random_mask(*shape, density=0.5, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def blobs(height, width, seed=0):
    """Return an edge map like those of detectors: smooth, with ridges of several widths."""
    noise = torch.rand(1, 1, height // 6 + 2, width // 6 + 2, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic")[0, 0]
    return (1 - 6 * (smooth - 0.5).abs()).clamp(0, 1)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.1, 0.5, 0.8, 1.0])
def test_thin_equals_libraries(shape, density):
    masks = random_mask(3, *shape, density=density)
    thinned = ops.thin(masks)
    assert torch.equal(thinned, reference.thin(masks))
    for mask, ours in zip(masks.numpy(), thinned.numpy(), strict=True):
        np.testing.assert_array_equal(ours, morphology.thin(mask))


@pytest.mark.usefixtures("instruction_set")
def test_thin_takes_many_passes_on_thick_shapes():
    mask = torch.zeros(2, 150, 170, dtype=torch.bool)
    mask[0, 5:140, 8:160] = True
    mask[1] = torch.from_numpy(morphology.disk(60)[:, :120]).bool().new_zeros(150, 170)
    mask[1, 10:131, 20:141] = torch.from_numpy(morphology.disk(60)).bool()
    for thick, ours in zip(mask.numpy(), ops.thin(mask).numpy(), strict=True):
        np.testing.assert_array_equal(ours, morphology.thin(thick))


def test_thin_of_views_and_empty_batch(threads):
    wide = random_mask(4, 20, 70)
    view = wide[::2, 3:17, 1:67:2]
    assert torch.equal(ops.thin(view), reference.thin(view))
    assert ops.thin(wide[:0]).shape == (0, 20, 70)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", SUPPRESSIONS)
def test_suppress_nonmaxima_keeps_what_the_reference_keeps(method, shape, threads):
    edges = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))
    if min(shape) >= 16:
        edges[1] = blobs(*shape)
    wide, narrow = (reference.suppress_nonmaxima(maps, method) for maps in (edges.double(), edges))
    ours = ops.suppress_nonmaxima(edges, method)
    # rounding may decide between neighbors of equal strength, but nowhere else
    differs = (ours > 0) != (wide > 0)
    assert differs.float().mean() <= 0.005
    agree = ~differs & ((narrow > 0) == (wide > 0))
    assert_no_worse(ours * agree, exact=wide * agree, eager=narrow * agree)


def suppress_plainly(edges):
    """Suppress as the benchmark of BSDS500 does, (H, W) float64, by libraries."""
    weights = [1, 2, 3, 4, 5, 4, 3, 2, 1]
    for axis in (0, 1):
        edges = ndimage.correlate1d(edges, np.array([1, 2, 1]) / 4, axis, mode="reflect")
    blurred = ndimage.correlate(edges, np.outer(weights, weights) / 625, mode="reflect")
    down, across = np.gradient(blurred)
    (xy, xx), yy = np.gradient(across), np.gradient(down, axis=0)
    angle = np.arctan(yy * np.where(xy > 0, -1, 1) / (xx + 1e-5)) % np.pi
    at = np.indices(edges.shape)
    ridges = edges.copy()
    for side in (-1, 1):
        beside = ndimage.map_coordinates(
            edges, at + side * np.stack([np.sin(angle), np.cos(angle)]), order=1, mode="nearest"
        )
        ridges[edges * 1.01 < beside] = 0
    for distance in range(5):
        for lines in (ridges, ridges.T):
            for line in (lines[distance], lines[-1 - distance]):
                line *= distance / 5
    return ridges


@pytest.mark.parametrize("shape", [(31, 17), (10, 60), (64, 96)])
def test_suppress_nonmaxima_agrees_with_a_plain_implementation(shape):
    for seed in range(3):
        edges = blobs(*shape, seed)[None].double()
        plain = suppress_plainly(edges[0].numpy())
        assert 0.02 < np.count_nonzero(plain) / plain.size < 0.8
        for ridges in (reference.suppress_nonmaxima(edges), ops.suppress_nonmaxima(edges.float())):
            differs = (ridges[0].numpy() > 0) != (plain > 0)
            assert differs.mean() <= 0.005
            np.testing.assert_allclose(ridges[0].numpy()[~differs], plain[~differs], atol=1e-6)


@pytest.mark.parametrize("suppress", [ops.suppress_nonmaxima, reference.suppress_nonmaxima])
def test_suppress_nonmaxima_by_hand(suppress):
    # one row or column has no other direction, and is too narrow to fade
    line = torch.tensor([0, 0.2, 0.6, 1, 0.99, 0.61, 0.1])
    smoothed = torch.tensor([0.05, 0.25, 0.6, 0.8975, 0.8975, 0.5775, 0.2275])
    ridge = torch.tensor([0, 0, 0, 0.8975, 0.8975, 0, 0])
    assert torch.equal(smoothed * (smoothed > 0.8), ridge)
    for method in SUPPRESSIONS:
        torch.testing.assert_close(suppress(line[None, None], method), ridge[None, None])
        torch.testing.assert_close(suppress(line[None, :, None], method), ridge[None, :, None])
        torch.testing.assert_close(suppress(torch.tensor([[[0.3]]]), method), torch.tensor([[[0.3]]]))
    # a pixel that is less than 1 % weaker than its neighbor stays
    line = torch.tensor([0, 0.2, 0.6, 1, 0.98, 0.6, 0.1])
    ridge = torch.tensor([0, 0, 0, 0.895, 0.89, 0, 0])
    torch.testing.assert_close(suppress(line[None, None]), ridge[None, None])
    line[4] = 0.9
    assert suppress(line[None, None]).nonzero().tolist() == [[0, 0, 3]]
    # a flat map has no ridge, and fades over half of its 6 rows, and over as many columns
    rows, columns = torch.tensor([0, 1, 2, 2, 1, 0]) / 3, torch.tensor([0, 1, 2, 3, 3, 3, 2, 1, 0]) / 3
    flat = torch.full((1, 6, 9), 0.5)
    torch.testing.assert_close(suppress(flat)[0], 0.5 * rows[:, None] * columns)
    torch.testing.assert_close(suppress(flat, "hessian"), flat)


@pytest.mark.parametrize("method", SUPPRESSIONS)
def test_suppress_nonmaxima_thins_a_ridge_in_every_direction(method):
    rows, columns = torch.meshgrid(torch.arange(61.0), torch.arange(61.0), indexing="ij")
    for angle in torch.arange(0, 180, 15).deg2rad():
        offset = (rows - 30) * angle.sin() + (columns - 30) * angle.cos()  # distance from a line through the center
        ridge = torch.exp(-(offset**2) / 18)
        thinned = ops.suppress_nonmaxima(ridge[None], method)[0] > 0.05
        inner = (slice(8, -8),) * 2
        assert offset[inner][thinned[inner]].abs().max() <= 1
        assert thinned[inner].sum() >= 45


@pytest.mark.parametrize("method", SUPPRESSIONS)
def test_suppress_nonmaxima_of_views_and_empty_batch(method, threads):
    wide = torch.rand(4, 20, 70, generator=torch.Generator().manual_seed(2))
    view = wide[::2, 3:17, 1:67:2]
    torch.testing.assert_close(ops.suppress_nonmaxima(view, method), ops.suppress_nonmaxima(view.clone(), method))
    assert ops.suppress_nonmaxima(wide[:0], method).shape == (0, 20, 70)


def cardinality(a, b, distance):
    """Return the largest number of pairs, by a library, from masks as arrays."""
    p, q = np.argwhere(a), np.argwhere(b)
    if not len(p) or not len(q):
        return 0
    near = ((p[:, None] - q) ** 2).sum(-1) <= distance**2
    return int((maximum_bipartite_matching(coo_matrix(near).tocsr(), perm_type="column") >= 0).sum())


def total_length(a, b, distance):
    """Return the smallest sum of distances of this number of pairs, by a library that solves the dense problem."""
    from scipy.optimize import linear_sum_assignment

    p, q = np.argwhere(a), np.argwhere(b)
    lengths = np.sqrt(((p[:, None] - q) ** 2).sum(-1))
    cost = np.where(lengths <= distance, lengths, 1e6)
    lengths = cost[linear_sum_assignment(cost)]
    return lengths[lengths < 1e6].sum()


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("distance", [0, 1, 1.5, 2.9, 4.33])
@pytest.mark.parametrize("densities", [(0.05, 0.05), (0.3, 0.1), (0.1, 0.4), (0.6, 0.6), (0.0, 0.5), (0.5, 0.0)])
def test_match_contours_finds_as_many_pairs_as_there_are(distance, densities):
    for seed, shape in enumerate([(1, 1), (3, 7), (12, 17), (20, 66), (1, 90), (25, 24)]):
        a, b = (
            random_mask(1, *shape, density=densities[0], seed=seed),
            random_mask(1, *shape, density=densities[1], seed=seed + 99),
        )
        of_a, of_b = ops.match_contours(a, b, distance)
        assert not (of_a & ~a).any() and not (of_b & ~b).any()
        assert of_a.sum() == of_b.sum() == cardinality(a[0].numpy(), b[0].numpy(), distance)
        # the matched ones can be matched with each other, at the smallest sum of distances
        if of_a.any():
            least = total_length(a[0].numpy(), b[0].numpy(), distance)
            assert total_length(of_a[0].numpy(), of_b[0].numpy(), distance) == pytest.approx(least, abs=0.01)


def test_match_contours_beyond_a_word():
    a, b = random_mask(1, 3, 400, density=0.02, seed=3), random_mask(1, 3, 400, density=0.02, seed=4)
    for distance in (63, 64, 70, 130, 1000):
        assert ops.match_contours(a, b, distance)[0].sum() == cardinality(a[0].numpy(), b[0].numpy(), distance)


def test_match_contours_of_a_crowded_line():
    """Check augmenting paths along a whole line of pixels."""
    a, b = torch.zeros(2, 1, 3, 200, dtype=torch.bool)
    a[0, 1, 50:150] = True
    b[0, 1, 51:151] = True
    assert [x.sum().item() for x in ops.match_contours(a, b, 1)] == [100, 100]
    b[0, 1, 49] = True
    b[0, 0, 60] = True
    assert [x.sum().item() for x in ops.match_contours(a, b, 1)] == [100, 100]


@pytest.mark.slow
@pytest.mark.usefixtures("instruction_set")
def test_count_matches_equals_the_reference(threads):
    edges = torch.round(blobs(24, 40) * 8) / 8
    truths = ops.thin(torch.stack([blobs(24, 40, seed) > 0.7 for seed in (0, 0, 5)]))
    thresholds = [0.125, 0.5, 0.51, 0.9, 2.0]
    options = {
        "ignored": random_mask(24, 40, density=0.2),
        "groups": torch.randint(3, truths.shape, generator=torch.Generator().manual_seed(0)).byte(),
        "num_groups": 4,
    }
    for thinning in (True, False):
        counts, by_group = ops.count_matches(edges, truths, thresholds, 2.3, thinning=thinning, **options)
        expected, by_group_expected = reference.count_matches(
            edges, truths, torch.tensor(thresholds), 2.3, thinning=thinning, **options
        )
        unique = [0, 1, 4, 5]  # which detection has a partner is not always unique
        assert torch.equal(counts[:, unique], expected[:, unique])
        assert torch.equal(by_group.sum(1), counts[:, 0])
        assert (counts[:, 2:4] - expected[:, 2:4]).abs().max() <= 2
        assert (by_group - by_group_expected).abs().max() <= 2
        assert counts[-1].tolist() == [0, counts[0, 1], 0, 0, 0, 0]


def test_count_matches_of_one_annotator_counts_pairs():
    edges, truth = blobs(40, 70), ops.thin(blobs(40, 70, 1)[None] > 0.6)
    thresholds = [k / 100 for k in range(1, 100)]
    counts, _ = ops.count_matches(edges, truth, thresholds, 3.0)
    assert torch.equal(counts[:, 0], counts[:, 2])
    for threshold, row in zip(thresholds, counts.tolist(), strict=True):
        detected = morphology.thin((edges >= threshold).numpy())
        assert row[0] == cardinality(detected, truth[0].numpy(), 3.0)
        assert row[3] == detected.sum()


def test_ignored_detections_are_not_counted():
    edges, truth = torch.zeros(2, 20, 30)
    edges[5, 2:20] = edges[12, 2:20] = truth[5, 2:20] = 1
    ignored = torch.zeros(20, 30, dtype=torch.bool)
    ignored[10:15] = True
    counts = [ops.count_matches(edges, truth[None] > 0, [0.5], 1.0, ignored=where)[0] for where in (None, ignored)]
    assert [row.tolist() for row in counts] == [[[18, 18, 18, 36, 18, 18]], [[18, 18, 18, 18, 18, 18]]]
    # but they are counted if they have a partner
    ignored[:] = True
    assert ops.count_matches(edges, truth[None] > 0, [0.5], 1.0, ignored=ignored)[0].tolist() == [[18] * 6]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.thin(torch.ones(3, 4, dtype=torch.bool)), ValueError, r"thin: mask must be \(B, H, W\)"),
        (lambda: ops.thin(torch.ones(1, 3, 4)), TypeError, "thin: mask must be bool, got float32"),
        (lambda: ops.suppress_nonmaxima(torch.ones(1, 3, 4).double()), TypeError, "edges must be float32, got float64"),
        (lambda: ops.suppress_nonmaxima(torch.ones(1, 3, 4, device="meta")), ValueError, "edges must be on the cpu"),
        (
            lambda: ops.suppress_nonmaxima(torch.ones(1, 3, 4), "sobel"),
            ValueError,
            "suppress_nonmaxima: method must be 'bsds' or 'hessian', got 'sobel'",
        ),
        (
            lambda: ops.match_contours(random_mask(1, 3, 4), random_mask(1, 3, 5), 1),
            ValueError,
            r"match_contours: truth must be \(B, H, W\)",
        ),
        (
            lambda: ops.match_contours(random_mask(1, 3, 4), random_mask(1, 3, 4), -1.0),
            ValueError,
            r"distance must be finite and >= 0, got -1\.0",
        ),
        (
            lambda: ops.match_contours(random_mask(1, 3, 4), random_mask(1, 3, 4), "2"),
            TypeError,
            "distance must be a number, got str",
        ),
        (
            lambda: ops.count_matches(
                torch.ones(3, 4), random_mask(1, 3, 4), [0.5], 1, groups=torch.full((1, 3, 4), 9).byte()
            ),
            ValueError,
            "groups must be below num_groups = 1, got 9",
        ),
        (
            lambda: ops.count_matches(torch.ones(3, 4), random_mask(1, 4, 3), [0.5], 1),
            ValueError,
            r"truths must be \(A, H, W\) with H = 3, W = 4, got \(1, 4, 3\)",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_forced_backends(monkeypatch):
    mask = random_mask(1, 9, 9)
    expected = ops.thin(mask)
    monkeypatch.setenv("TRACE_FAST_BACKEND", "reference")
    monkeypatch.setattr("trace_fast._C.cpu.thin", None)
    assert torch.equal(ops.thin(mask), expected)
    monkeypatch.setenv("TRACE_FAST_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="thin: there is no triton kernel; unset TRACE_FAST_BACKEND"):
        ops.thin(mask)


@pytest.mark.parametrize("distance", [1e4, 1e9, 1e19, 1e300, 10**400])
def test_distances_beyond_the_diagonal_are_the_diagonal(distance):
    detected = torch.zeros(1, 12, 17, dtype=torch.bool)
    truth = detected.clone()
    detected[0, :3, :3], truth[0, -3:, -3:] = True, True
    expected = ops.match_contours(detected, truth, 20.9)
    assert [int(matched.sum()) for matched in expected] == [9, 9]
    for matched, other in zip(ops.match_contours(detected, truth, distance), expected, strict=True):
        assert torch.equal(matched, other)
    counts, _ = ops.count_matches(detected[0].float(), truth, [0.5], distance, thinning=False)
    assert torch.equal(counts, ops.count_matches(detected[0].float(), truth, [0.5], 20.9, thinning=False)[0])


@pytest.mark.parametrize("groups", [0, 257, 2**63])
def test_numbers_of_groups_out_of_range(groups):
    edges, truths = torch.zeros(3, 4), torch.zeros(1, 3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"count_matches: num_groups must be from 1 to 256, got {groups}"):
        ops.count_matches(edges, truths, [0.5], 2, num_groups=groups)


@pytest.mark.parametrize("op", ["thin", "suppress_nonmaxima", "match_contours"])
def test_images_beyond_the_memory_are_refused(op):
    # they take no memory themselves
    for shape, message in (((1, 10**9, 10**9), "must be fewer than 2.31 pixels"), ((10**9, 1000, 1000), "of memory")):
        image = torch.zeros(1, dtype=torch.float32 if op == "suppress_nonmaxima" else torch.bool).expand(shape)
        more = (image, 1.0) if op == "match_contours" else ()
        with pytest.raises(ValueError, match=f"{op}: .*{message}"):
            getattr(ops, op)(image, *more)


@pytest.mark.parametrize(
    ("thresholds", "error", "message"),
    [
        (0.5, TypeError, "must be numbers, got float"),
        (["a"], TypeError, "must be a number, got str"),
        ([math.inf], ValueError, "must be finite"),
    ],
)
def test_thresholds_are_numbers(thresholds, error, message):
    with pytest.raises(error, match=f"count_matches: thresholds {message}"):
        ops.count_matches(torch.ones(3, 4), random_mask(1, 3, 4), thresholds, 1.0)
