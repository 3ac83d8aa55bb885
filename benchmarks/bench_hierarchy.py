"""Hierarchies of regions beside libraries that a user would choose, on edges of smooth blobs with noise."""

import functools

import numpy as np
import pytest
import scipy.ndimage
import skimage.graph
import torch
from skimage.segmentation import watershed

import trace_fast
from trace_fast import ops, reference


@functools.lru_cache(maxsize=2)
def make_edges(side):
    """Return an edge map (side, side) float32, in whole strengths."""
    rng = np.random.default_rng(0)
    field = scipy.ndimage.zoom(rng.standard_normal((side // 32 + 2,) * 2), 34, order=3)[:side, :side]
    contours = scipy.ndimage.morphological_gradient(np.floor(2 * field), 3) > 0
    strengths = scipy.ndimage.gaussian_filter(0.8 * contours + 0.4 * rng.random((side, side)), 1)
    return torch.from_numpy(strengths / strengths.max() * 2**16).round().float() / 2**16


@pytest.mark.parametrize("provider", ["native", "skimage"])
@pytest.mark.parametrize("side", [512, 2048])
def bench_watershed(side, provider, measure):
    edges = make_edges(side)
    heights = edges.double().numpy()
    call = {
        "native": lambda: ops.watershed(edges[None])[0][0].numpy(),
        "skimage": lambda: watershed(heights, connectivity=1),
    }[provider]
    labels, corner = call(), edges[None, :60, :40]
    assert torch.equal(ops.watershed(corner)[0], reference.watershed(corner)[0])
    # the same minima, and the same basins but for ridges of one height
    assert np.mean(labels == ops.watershed(edges[None])[0][0].numpy()) > 0.95
    measure(f"watershed, {side} x {side}", provider, call, bytes=8 * edges.numel())


def merge_by_higra(labels, heights):
    """Return the levels of the tree that higra makes."""
    higra = pytest.importorskip("higra", reason="needs higra, an independent implementation")
    graph = higra.get_4_adjacency_graph(heights.shape)
    regions = higra.make_region_adjacency_graph_from_labelisation(graph, labels)
    strengths = higra.weight_graph(graph, heights, higra.WeightFunction.max)
    pairs = higra.rag_accumulate_on_edges(regions, higra.Accumulators.sum, np.ones_like(strengths))
    means = higra.rag_accumulate_on_edges(regions, higra.Accumulators.mean, strengths)
    return higra.binary_partition_tree_average_linkage(regions, means, pairs)[1]


@pytest.mark.parametrize("provider", ["native", "higra"])
@pytest.mark.parametrize("side", [512, 2048])
def bench_merge_tree(side, provider, measure):
    edges = make_edges(side)
    labels, heights = ops.watershed(edges[None])[0][0], edges.double().numpy()
    call = {
        "native": lambda: ops.merge_tree(labels, edges)[1].numpy(),
        "higra": lambda: merge_by_higra(labels.numpy(), heights),
    }[provider]
    np.testing.assert_allclose(np.sort(call()), np.sort(merge_by_higra(labels.numpy(), heights)), atol=1e-3)
    measure(f"merge_tree, {side} x {side}", provider, call)


def make_masks(count, height, width):
    """Return boxes (count, height, width) bool on a grid of 16 pixels."""
    masks, rng = np.zeros((count, height, width), bool), np.random.default_rng(0)
    for mask in masks:
        top, left = rng.integers(0, min(height, width) // 16 - 10, 2)
        rows, columns = rng.integers(3, 15, 2)
        mask[16 * top : 16 * (top + rows), 16 * left : 16 * (left + columns)] = True
    return masks


@pytest.mark.parametrize("mode", ["fit", "flood"])
def bench_propagate(mode, measure):
    edges, masks = make_edges(640)[:480], make_masks(20, 480, 640)
    options = {"threshold": 0.4} if mode == "flood" else {}
    call = functools.partial(trace_fast.propagate, masks, edges, mode=mode, **options)
    result = call()
    assert result.dtype == bool
    assert result.any((1, 2)).all()
    assert mode == "flood" or np.array_equal(trace_fast.propagate(masks, 0 * edges), masks)
    measure("propagate, 20 masks, 480 x 640", mode, call)


def bench_propagate_many(measure):
    edges, masks = make_edges(1024), make_masks(1000, 1024, 1024)
    call = functools.partial(trace_fast.propagate, masks, edges)
    assert len(call()) > 900
    # the masks themselves are 1000 MiB beside the peak
    measure("propagate, 1,000 masks, 1024 x 1024", "fit", call)


@pytest.mark.parametrize("provider", ["native", "scikit-image, RAG"])
def bench_instances(provider, measure):
    edges = make_edges(512)
    heights = edges.double().numpy()

    def cut_graph():
        labels = watershed(heights, connectivity=1)
        graph = skimage.graph.rag_boundary(labels, heights)
        return skimage.graph.cut_threshold(labels, graph, 0.3)

    call = {"native": lambda: trace_fast.instances(edges)[0], "scikit-image, RAG": cut_graph}[provider]
    assert len(call()) > 1
    measure("instances, 512 x 512", provider, call)
