"""Hierarchies of regions against the reference, numbers worked out by hand, scikit-image and higra."""

import numpy as np
import pytest
import scipy.ndimage
import skimage.segmentation
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_examples import NATIVE

from trace_fast import ops, reference

native = pytest.mark.parametrize("device", NATIVE, indirect=True)
EXAMPLES = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
KINDS = ["noise", "steps", "smooth", "smooth steps", "lines"]


def make_edges(kind, height, width, seed, batch=1):
    """Return edge maps of a kind, (batch, H, W) float32."""
    rng = np.random.default_rng(seed)
    edges = rng.random((batch, height, width))
    if "smooth" in kind:
        edges = scipy.ndimage.gaussian_filter(edges, (0, 1.5, 1.5))
    if "steps" in kind:
        edges = np.floor(edges * rng.integers(1, 30)) / 30
    if kind == "lines":
        edges = 0.75 * (scipy.ndimage.gaussian_filter(edges - 0.5, (0, 2, 2)) > 0.02)
    return torch.tensor(edges, dtype=torch.float32)


def make_labels(height, width, seed):
    """Return scattered labels from 1 on, each present, (H, W) int32."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 1 + height * width // rng.integers(1, 9), (height, width))
    return torch.tensor(np.unique(values, return_inverse=True)[1].reshape(height, width) + 1, dtype=torch.int32)


def test_watershed_by_hand():
    # two minima, and a ridge pixel at the same distance from both
    edges = torch.tensor([[[0.25, 0.5, 0.75, 0.5, 0.0]]], dtype=torch.float64)
    labels, counts = reference.watershed(edges)
    assert labels.tolist() == [[[1, 1, 1, 2, 2]]] and counts.tolist() == [2]
    # the plateau of 0.5 belongs to no minimum: each pixel takes the nearest, the middle one the lower label
    edges = torch.tensor([[[0.0, 0.5, 0.5, 0.5, 0.0]]], dtype=torch.float64)
    assert reference.watershed(edges)[0].tolist() == [[[1, 1, 1, 2, 2]]]
    # a pixel between two basins belongs to the lower side
    edges = torch.tensor([[[0.25, 0.75, 0.5, 0.0]], [[0.0, 0.75, 0.25, 0.25]]], dtype=torch.float64)
    assert reference.watershed(edges)[0].tolist() == [[[1, 1, 2, 2]], [[1, 1, 2, 2]]]
    # an image of one strength is one basin
    assert reference.watershed(torch.full((2, 3, 4), 0.5))[0].unique().tolist() == [1]


def test_a_gap_in_a_line_is_a_ridge():
    edges = torch.zeros(1, 5, 7)
    edges[0, :, 3] = 1
    edges[0, 2, 3] = 0
    labels, counts = ops.watershed(edges)
    assert counts.tolist() == [2]
    assert labels[0, :, :3].unique().tolist() == [1] and labels[0, :, 4:].unique().tolist() == [2]
    # four of the five pairs along the boundary are strong
    parents, levels = ops.merge_tree(labels[0], edges[0])
    assert parents.tolist() == [2, 2, 2]
    assert levels.tolist() == pytest.approx([0, 0, 0.8])


def test_merge_tree_by_hand():
    labels = torch.tensor([[1, 1, 2], [3, 3, 2], [3, 3, 4]], dtype=torch.int32)
    edges = torch.tensor([[0.0, 0.5, 0.5], [0.25, 0.25, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    # 1|2 0.5, 1|3 (0.25 + 0.5) / 2, 2|3 0.25, 2|4 1, 3|4 1; after 2 and 3: 1|(2, 3) (0.5 + 0.75) / 3
    parents, levels = reference.merge_tree(labels, edges)
    assert parents.tolist() == [5, 4, 4, 6, 5, 6, 6]
    assert levels.tolist() == pytest.approx([0, 0, 0, 0, 0.25, 1.25 / 3, 1])
    # where all are equal, the first pair in raster order goes first, the right one before the one below
    assert reference.merge_tree(labels, torch.zeros(3, 3))[0].tolist() == [4, 5, 4, 6, 5, 6, 6]


@native
@settings(EXAMPLES, max_examples=60)
@given(kind=st.sampled_from(KINDS), height=st.integers(1, 17), width=st.integers(1, 17), seed=st.integers(0, 2**32 - 1))
def test_results_are_those_of_the_reference(device, kind, height, width, seed):
    edges = make_edges(kind, height, width, seed, batch=2)
    labels, counts = ops.watershed(edges)
    assert labels.dtype == counts.dtype == torch.int32
    for result, expected in zip((labels, counts), reference.watershed(edges.double()), strict=True):
        assert torch.equal(result, expected)
    for regions in (labels[0], make_labels(height, width, seed)):
        parents, levels = ops.merge_tree(regions, edges[0])
        expected_parents, expected_levels = reference.merge_tree(regions, edges[0].double())
        assert parents.dtype == torch.int32 and torch.equal(parents, expected_parents)
        torch.testing.assert_close(levels, expected_levels)
        assert (levels.diff() >= 0).all()


@native
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 3), (31, 17), (64, 96)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_basins_are_connected_and_have_one_minimum(kind, shape, device):
    edges = make_edges(kind, *shape, seed=3)
    labels, counts = ops.watershed(edges)
    present = np.unique(labels)
    assert present.tolist() == list(range(1, int(counts) + 1))
    assert all(scipy.ndimage.label(labels[0].numpy() == label)[1] == 1 for label in present)


def test_basins_are_those_of_scikit_image(instruction_set):
    edges = scipy.ndimage.gaussian_filter(np.random.default_rng(5).random((90, 70)), 6)
    edges = torch.tensor((edges - edges.min()) / np.ptp(edges), dtype=torch.float32)[None]
    labels, counts = ops.watershed(edges)
    others = skimage.segmentation.watershed(edges[0].double().numpy(), connectivity=1)
    assert others.max() == int(counts)
    # on a ridge of rounded strengths it depends on the order of visits which basin takes a pixel
    assert np.mean(others == labels[0].numpy()) > 0.98


def test_merge_tree_is_that_of_higra(instruction_set):
    higra = pytest.importorskip("higra", reason="needs higra, an independent implementation")
    edges = (make_edges("smooth", 45, 61, 6) * 2**16).round() / 2**16
    basins, counts = ops.watershed(edges)
    graph = higra.get_4_adjacency_graph(edges.shape[1:])
    regions = higra.make_region_adjacency_graph_from_labelisation(graph, basins[0].numpy())
    strengths = higra.weight_graph(graph, edges[0].double().numpy(), higra.WeightFunction.max)
    pairs = higra.rag_accumulate_on_edges(regions, higra.Accumulators.sum, np.ones_like(strengths))
    means = higra.rag_accumulate_on_edges(regions, higra.Accumulators.mean, strengths)
    tree, heights = higra.binary_partition_tree_average_linkage(regions, means, pairs)
    # higra numbers the regions anew
    numbers = higra.CptRegionAdjacencyGraph.construct(regions)["vertex_map"].reshape(edges.shape[1:])
    parents, levels = ops.merge_tree(torch.from_numpy(numbers).int() + 1, edges[0])
    assert parents.tolist() == tree.parents().tolist()
    np.testing.assert_allclose(levels.numpy(), heights, rtol=0, atol=1e-6)
    assert len(parents) == 2 * int(counts) - 1 > 100


@native
def test_strided_inputs_and_views(device):
    edges = make_edges("smooth steps", 19, 34, 1, batch=3)
    labels, counts = ops.watershed(edges)
    expected = [labels, counts, *ops.merge_tree(labels[1], edges[1])]
    guarded = torch.full((3, 25, 40), torch.nan)
    guarded[:, 3:22, 5:39] = edges
    for others in (edges.mT.contiguous().mT, guarded[:, 3:22, 5:39]):
        assert not others.is_contiguous()
        before = others.clone()
        results = [*ops.watershed(others), *ops.merge_tree(labels.mT.contiguous().mT[1], others[1])]
        assert all(torch.equal(result, value) for result, value in zip(results, expected, strict=True))
        assert torch.equal(others, before)


@native
def test_edges_are_clamped(device):
    edges = make_edges("noise", 7, 11, 2)
    edges[0, 0, :4] = torch.tensor([-1, 0, 1, 0])
    wild = edges.clone()
    wild[0, 0, :4] = torch.tensor([-torch.inf, torch.nan, torch.inf, -3])
    edges[0, 0, 0] = 0
    for results in zip(ops.watershed(wild), ops.watershed(edges), reference.watershed(wild), strict=True):
        assert all(torch.equal(result, results[0]) for result in results)


def test_native_results_do_not_depend_on_threads(instruction_set, threads):
    edges = make_edges("smooth", 130, 70, 3, batch=5)
    several = ops.watershed(edges)
    torch.set_num_threads(1)
    for result, value in zip(ops.watershed(edges), several, strict=True):
        assert torch.equal(result, value)


@native
def test_empty_batches(device):
    labels, counts = ops.watershed(torch.zeros(0, 3, 4))
    assert labels.shape == (0, 3, 4) and counts.shape == (0,)


@pytest.mark.gpu
def test_tensors_of_a_gpu_come_back():
    edges = make_edges("smooth", 19, 34, 1)
    labels, counts = ops.watershed(edges.cuda())
    parents, levels = ops.merge_tree(labels[0], edges[0].cuda())
    assert all(result.is_cuda for result in (labels, counts, parents, levels))
    assert torch.equal(labels.cpu(), ops.watershed(edges)[0])
    assert torch.equal(parents.cpu(), ops.merge_tree(labels[0].cpu(), edges[0])[0])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda e, r: ops.watershed(e.double()), TypeError, "watershed: edges must be float32, got float64"),
        (lambda e, r: ops.watershed(e[0]), ValueError, r"watershed: edges must be \(B, H, W\), got \(2, 3\)"),
        (lambda e, r: ops.merge_tree(r.long(), e[0]), TypeError, "merge_tree: labels must be int32, got int64"),
        (lambda e, r: ops.merge_tree(r, e[0].half()), TypeError, "merge_tree: edges must be float32, got float16"),
        (
            lambda e, r: ops.merge_tree(r, e[0, :1]),
            ValueError,
            r"edges must be \(H, W\) with H = 2, W = 3, got \(1, 3\)",
        ),
        (lambda e, r: ops.merge_tree(r, e[0].to("meta")), ValueError, "edges must be on cpu like labels, got meta"),
        (lambda e, r: ops.merge_tree(r - 1, e[0]), ValueError, "labels must be from 1 to n, got 0 to 1 on 6 pixels"),
        (lambda e, r: ops.merge_tree(r + 9, e[0]), ValueError, "labels must be from 1 to n, got 10 to 11 on 6 pixels"),
        (lambda e, r: ops.merge_tree(2 * r, e[0]), ValueError, "labels must have each of 1 to 4, got none of 1"),
    ],
)
def test_errors(call, error, match):
    regions = torch.tensor([[1, 1, 2], [1, 2, 2]], dtype=torch.int32)
    with pytest.raises(error, match=match):
        call(torch.zeros(1, 2, 3), regions)


def test_images_of_too_many_pixels_are_refused():
    pixels = torch.zeros(()).expand(1, 2**16, 2**15)
    with pytest.raises(ValueError, match=r"watershed: edges must be fewer than 2\^31 pixels, got 65536 \* 32768"):
        ops.watershed(pixels)
    with pytest.raises(ValueError, match=r"merge_tree: labels must be fewer than 2\^30 pixels, got 65536 \* 32768"):
        ops.merge_tree(torch.ones((), dtype=torch.int32).expand(2**16, 2**15), pixels[0])
