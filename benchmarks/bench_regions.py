"""The ops on regions and masks beside libraries that a user would choose, on realistic barriers and on the hard case.

`outlines` are the contours of smooth blobs, `gaps` the same with every tenth pixel missing, so that nearly all labels
compete in one region, and `noise` sets pixels at random, just enough to connect (site percolation).
"""

import functools

import cc3d
import cv2
import numpy as np
import pytest
import scipy.ndimage
import scipy.sparse
import torch
from pycocotools import mask as coco
from skimage.segmentation import watershed

from trace_fast import ops, reference
from trace_fast.testing import assert_no_worse

cv2.setNumThreads(torch.get_num_threads())


@functools.lru_cache(maxsize=2)
def make_barrier(kind, side):
    """Return a barrier (side, side) bool."""
    rng = np.random.default_rng(0)
    if kind == "noise":
        return rng.random((side, side)) > 0.593
    coarse = rng.standard_normal((side // 32 + 2,) * 2).astype(np.float32)
    levels = np.floor(2 * cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC))
    barrier = scipy.ndimage.maximum_filter(levels, 2) != scipy.ndimage.minimum_filter(levels, 2)
    return barrier & (rng.random((side, side)) < 0.9) if kind == "gaps" else barrier


@functools.lru_cache(maxsize=2)
def make_seeds(side):
    """Return seeds, a label for every 4,000 pixels, (side, side) int32."""
    rng, count = np.random.default_rng(1), side * side // 4000
    seeds = np.zeros((side, side), np.int32)
    seeds[rng.integers(0, side, count), rng.integers(0, side, count)] = np.arange(1, count + 1)
    return seeds


def same_regions(labels, others):
    """Return whether two label maps have the same regions, with 0 for 0."""
    names = np.zeros(labels.max() + 1, others.dtype)
    names[labels] = others
    return names[0] == 0 and len(np.unique(names)) == len(names) and np.array_equal(names[labels], others)


def label_scipy(free, connectivity):
    return scipy.ndimage.label(free, np.ones((3, 3)) if connectivity == 8 else None)[0]


def label_cv2(free, connectivity):
    return cv2.connectedComponents(free.view(np.uint8), connectivity=connectivity, ltype=cv2.CV_32S)[1]


PROVIDERS = {
    "eager": lambda barrier, connectivity: reference.label_regions(barrier, connectivity)[0],
    "native": lambda barrier, connectivity: ops.label_regions(barrier, connectivity)[0],
    "scipy": label_scipy,
    "cc3d": lambda free, connectivity: cc3d.connected_components(free, connectivity=connectivity),
    "OpenCV": label_cv2,
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("kind", ["outlines", "noise"])
@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("side", [512, 2048, 4096])
def bench_label_regions(side, connectivity, kind, provider, measure):
    if provider == "eager" and side > 512:
        pytest.skip("takes seconds")
    barrier = make_barrier(kind, side)
    ours = provider in ("eager", "native")
    image = torch.from_numpy(barrier)[None] if ours else ~barrier
    call = functools.partial(PROVIDERS[provider], image, connectivity)
    labels, expected = call(), label_scipy(~barrier, connectivity)
    if ours:
        assert np.array_equal(labels[0].numpy(), expected)
    else:
        assert same_regions(expected, labels)
    measure(f"label_regions, {connectivity}, {kind}, {side} x {side}", provider, call, bytes=5 * barrier.size)


@pytest.mark.parametrize("provider", ["native", "native, claim_barrier", "skimage watershed"])
@pytest.mark.parametrize("kind", ["outlines", "gaps", "noise"])
@pytest.mark.parametrize("side", [512, 2048, 4096])
def bench_flood_fill(side, kind, provider, measure):
    barrier, seeds = make_barrier(kind, side), make_seeds(side)
    inputs = torch.from_numpy(seeds)[None], torch.from_numpy(barrier)[None]
    flat, markers = np.zeros((side, side), np.uint8), seeds * ~barrier
    filled = ops.flood_fill(*inputs)
    call = {
        "native": lambda: ops.flood_fill(*inputs),
        "native, claim_barrier": lambda: ops.flood_fill(*inputs, claim_barrier=True),
        "skimage watershed": lambda: watershed(flat, markers, mask=~barrier),
    }[provider]
    if provider == "skimage watershed":
        # the same pixels, and the same labels except where two are equally near
        other = call()
        assert np.array_equal(other > 0, filled[0].numpy() > 0)
        assert np.mean(other == filled[0].numpy()) > 0.97
    else:
        # the reference takes a pass over the image for each distance
        corner, claim = [x[:, :150, :100] for x in inputs], "claim" in provider
        assert torch.equal(
            ops.flood_fill(*corner, claim_barrier=claim), reference.flood_fill(*corner, claim_barrier=claim)
        )
        assert torch.equal(call()[filled > 0], filled[filled > 0])
    measure(f"flood_fill, {kind}, {side} x {side}", provider, call)


@functools.lru_cache(maxsize=2)
def make_walk(side):
    """Return twenty discs and the edges around smooth blobs, float32."""
    rng = np.random.default_rng(2)
    edges = 0.2 * rng.random((side, side)) ** 2
    edges[scipy.ndimage.zoom(make_barrier("outlines", 256), side / 256, order=0)] = 0.9
    rows, columns = np.indices((side, side))
    centers = rng.integers(0, side, (20, 2, 1, 1))
    masks = (rows - centers[:, 0]) ** 2 + (columns - centers[:, 1]) ** 2 < (side / 6) ** 2
    return torch.from_numpy(masks).float(), torch.from_numpy(edges).float()


@functools.lru_cache(maxsize=2)
def make_transition(side, dtype):
    """Return the matrix of one step, (N, N) in CSR, which multiplies masks (N, M)."""
    edges = make_walk(side)[1].to(dtype)
    places = torch.arange(side * side).view(side, side)
    rows, columns, values = [places.flatten()], [places.flatten()], [torch.ones(side * side, dtype=dtype)]
    for dy, dx in reference.regions.neighbor_steps(5):
        height, width, left = side - dy, side - abs(dx), max(-dx, 0)
        window = [(y, left + x) for y, x in reference.regions.path_pixels(dy, dx)]
        path = torch.stack([edges[y : y + height, x : x + width] for y, x in window])
        here = places[:height, left : left + width].flatten()
        there = places[dy : dy + height, left + dx : left + dx + width].flatten()
        rows, columns = [*rows, here, there], [*columns, there, here]
        values += 2 * [(1 - path.amax(0)).flatten() ** 10]
    where = torch.cat(rows).numpy(), torch.cat(columns).numpy()
    affinity = scipy.sparse.csr_array((torch.cat(values).numpy(), where), (side * side, side * side))
    return scipy.sparse.csr_array(affinity.multiply(1 / affinity.sum(0))).T.tocsr()


def multiply(side, dtype):
    """Walk by products with the matrix of one step."""
    masks, edges = (x.to(dtype) for x in make_walk(side))
    transition, state = make_transition(side, dtype), (masks * (1 - edges)).flatten(1).numpy().T
    for _ in range(256):
        state = transition @ state
    return torch.from_numpy(state.T).reshape(masks.shape)


@pytest.mark.parametrize("provider", ["eager", "native", "torch, dense squaring", "scipy, CSR products"])
@pytest.mark.parametrize("side", [64, 128])
def bench_random_walk(side, provider, measure):
    if side > 64 and provider in ("eager", "torch, dense squaring"):
        pytest.skip("takes a minute")
    masks, edges = make_walk(side)
    # building the matrix is not timed
    transition = make_transition(side, torch.float32)
    dense = torch.from_numpy(transition.T.toarray()) if provider.startswith("torch") else None

    def square():
        power = dense
        for _ in range(8):
            power = power @ power
        return ((masks * (1 - edges)).flatten(1) @ power).view_as(masks)

    call = {
        "eager": lambda: reference.random_walk(masks, edges),
        "native": lambda: ops.random_walk(masks, edges),
        "torch, dense squaring": square,
        "scipy, CSR products": lambda: multiply(side, torch.float32),
    }[provider]
    exact, single = multiply(side, torch.float64), multiply(side, torch.float32)
    if provider == "native":
        assert_no_worse(call(), exact, single)
    else:
        assert (call() - exact).abs().max() < 1e-4
    flop = 2 * 256 * masks.numel() * 69
    measure(f"random_walk, 20 masks, {side} x {side}, 256 steps", provider, call, flop=flop)


@functools.lru_cache(maxsize=1)
def make_masks(count=500, side=512):
    """Return discs, two thirds of them close to the one before, (count, side, side) bool."""
    rng = np.random.default_rng(3)
    rows, columns = np.indices((side, side), dtype=np.int32)
    masks, center = np.empty((count, side, side), bool), np.zeros(2)
    for index in range(count):
        center = rng.integers(0, side, 2) if index % 3 == 0 else center + rng.integers(-6, 7, 2)
        masks[index] = (rows - center[0]) ** 2 + (columns - center[1]) ** 2 < rng.integers(15, 70) ** 2
    return masks


def merge(masks, overlaps):
    """Unite the components of a graph until it has no edge; overlaps(masks) is its matrix."""
    while True:
        count, component = scipy.sparse.csgraph.connected_components(overlaps(masks))
        if count == len(masks):
            return masks
        masks = np.stack([masks[component == index].any(0) for index in range(count)])


def overlaps_numpy(masks):
    """Compare one mask with all later ones at a time."""
    areas = masks.sum((1, 2))
    joined = np.zeros((len(masks), len(masks)), bool)
    for index in range(len(masks) - 1):
        shared = (masks[index] & masks[index + 1 :]).sum((1, 2))
        joined[index, index + 1 :] = shared > 0.5 * (areas[index] + areas[index + 1 :] - shared)
    return joined


def overlaps_coco(masks):
    """Compare run lengths."""
    runs = coco.encode(np.asfortranarray(masks.transpose(1, 2, 0).view(np.uint8)))
    return (coco.iou(runs, runs, [0] * len(runs)) > 0.5) & ~np.eye(len(runs), dtype=bool)


@pytest.mark.parametrize("provider", ["eager", "native", "numpy loop", "pycocotools"])
def bench_merge_masks(provider, measure):
    masks = make_masks()
    tensor = torch.from_numpy(masks)
    call = {
        "eager": lambda: reference.merge_masks(tensor)[0],
        "native": lambda: ops.merge_masks(tensor)[0],
        "numpy loop": lambda: merge(masks, overlaps_numpy),
        "pycocotools": lambda: merge(masks, overlaps_coco),
    }[provider]
    assert np.array_equal(np.asarray(call()), reference.merge_masks(tensor)[0].numpy())
    measure("merge_masks, 500 masks, 512 x 512", provider, call)
