"""The ops on regions and masks against libraries, plain loops and the reference in float64."""

import ctypes
import functools
import heapq
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_examples import NATIVE

from trace_fast import _C, ops, reference
from trace_fast.ops import checks
from trace_fast.testing import assert_no_worse

ROOT = Path(__file__).resolve().parents[1]

native = pytest.mark.parametrize(
    "device",
    [*NATIVE, pytest.param("native-cuda", marks=pytest.mark.gpu)],
    indirect=True,
)
# the device is the same in all examples of a test
EXAMPLES = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PLUS = [(-1, 0), (0, -1), (0, 1), (1, 0)]
SQUARE = [*PLUS, (-1, -1), (-1, 1), (1, -1), (1, 1)]
CONNECTIVITY = pytest.mark.parametrize("connectivity", [4, 8])


def spiral(height, width):
    """Return a wall that winds inwards and leaves one long corridor."""
    barrier = np.zeros((height, width), bool)
    top, left, bottom, right = 1, -1, height - 2, width - 2
    while top <= bottom and left < right:
        barrier[top, max(left, 0) : right + 1] = True
        barrier[top : bottom + 1, right] = True
        if bottom - top < 2 or right - left < 4:
            break
        barrier[bottom, left + 2 : right + 1] = True
        barrier[top + 2 : bottom + 1, left + 2] = True
        top, left, bottom, right = top + 2, left + 2, bottom - 2, right - 2
    return barrier


def make_barrier(kind, height, width, seed):
    """Return a barrier (H, W) bool of a kind."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((height, width))
    if kind == "noise":
        return rng.random((height, width)) < rng.random()
    if kind == "blobs":
        field = scipy.ndimage.gaussian_filter(rng.standard_normal((height, width)), 2)
        levels = np.floor(field * 8)
        return scipy.ndimage.maximum_filter(levels, 2) != scipy.ndimage.minimum_filter(levels, 2)
    if kind == "comb":  # teeth that are connected at one end
        barrier = columns % 2 == 1
        barrier[rng.choice([0, -1])] = False
        return barrier
    if kind == "diagonals":
        return (rows + columns * rng.choice([-1, 1])) % rng.integers(2, 7) == 0
    if kind == "spiral":
        return np.rot90(spiral(*((height, width) if seed % 2 else (width, height))), 0 if seed % 2 else 1)
    if kind == "checkers":
        return (rows + columns) % 2 == seed % 2
    if kind == "stripes":
        return (rows if seed % 2 else columns) // 3 % 2 == 0
    return np.full((height, width), kind == "all")


KINDS = ["noise", "noise", "blobs", "comb", "diagonals", "spiral", "checkers", "stripes", "all", "none"]
sides = st.one_of(st.integers(1, 40), st.sampled_from([1, 2, 62, 63, 64, 65, 66, 127, 128, 129, 192]))
seeds_ = st.integers(0, 2**32 - 1)


def make_batch(height, width, seed, batch=3):
    """Return barriers of several kinds, (batch, H, W) bool."""
    chosen = np.random.default_rng(seed).choice(KINDS, batch)
    return torch.tensor(np.stack([make_barrier(kind, height, width, seed + i) for i, kind in enumerate(chosen)]))


def make_seeds(barrier, seed):
    """Return scattered labels, some of them equal, below 1 or on the barrier."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(-3, rng.choice([3, 6, 300, 2**31 - 1]), barrier.shape)
    return torch.tensor(labels * (rng.random(barrier.shape) < rng.choice([0.005, 0.05, 0.5])), dtype=torch.int32)


def grow(labels, ground, steps):
    """Grow labels over the ground by Dijkstra's search from all labeled pixels, ordered by distance, then by label."""
    height, width = labels.shape
    reached = {}
    queue = [(0, int(labels[y, x]), int(y), int(x)) for y, x in zip(*np.nonzero(labels), strict=True)]
    heapq.heapify(queue)
    while queue:
        distance, label, y, x = heapq.heappop(queue)
        if (y, x) in reached:
            continue
        reached[y, x] = label
        for dy, dx in steps:
            below, beside = y + dy, x + dx
            if 0 <= below < height and 0 <= beside < width and ground[below, beside] and not labels[below, beside]:
                heapq.heappush(queue, (distance + 1, label, below, beside))
    result = np.zeros_like(labels)
    for pixel, label in reached.items():
        result[pixel] = label
    return result


def fill_by_search(seeds, barrier, connectivity, claim_barrier):
    steps = PLUS if connectivity == 4 else SQUARE
    labels = grow(np.where(barrier, 0, seeds.clip(0)), ~barrier, steps)
    return grow(labels, barrier, steps) if claim_barrier else labels


def assert_labels(barrier, connectivity, device):
    labels, counts = ops.label_regions(barrier.to(device), connectivity)
    assert labels.dtype == counts.dtype == torch.int32
    assert labels.device == counts.device == device
    square = np.ones((3, 3)) if connectivity == 8 else None
    for image, result, count in zip(barrier.numpy(), labels.cpu().numpy(), counts.tolist(), strict=True):
        expected, regions = scipy.ndimage.label(~image, square)
        np.testing.assert_array_equal(result, expected)
        assert count == regions


@pytest.mark.slow
@native
@CONNECTIVITY
@settings(EXAMPLES, max_examples=150)
@given(height=sides, width=sides, seed=seeds_)
def test_labels_are_those_of_scipy(device, connectivity, height, width, seed):
    assert_labels(make_batch(height, width, seed, batch=4), connectivity, device)


@native
@CONNECTIVITY
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 64), (64, 2), (3, 4097), (1000, 3)], ids=str)
@pytest.mark.parametrize("kind", sorted(set(KINDS)))
def test_labels_of_every_kind(kind, shape, connectivity, device):
    assert_labels(torch.tensor(make_barrier(kind, *shape, 1).copy())[None], connectivity, device)


@native
@CONNECTIVITY
@settings(EXAMPLES, max_examples=50)
@given(height=sides, width=sides, seed=seeds_)
def test_regions_are_those_of_cc3d(device, connectivity, height, width, seed):
    cc3d = pytest.importorskip("cc3d")
    barrier = make_batch(height, width, seed, batch=1)
    labels = ops.label_regions(barrier.to(device), connectivity)[0].cpu().numpy()
    # as numbers: in a bool image of one row cc3d 4.1.1 also labels pixels that are not set
    others = cc3d.connected_components((~barrier[0].numpy()).astype(np.uint8), connectivity=connectivity)
    pairs = np.unique(np.stack([labels[0].ravel(), others.ravel()]), axis=1)
    # one to one, and 0 to 0
    assert pairs.shape[1] == len(np.unique(pairs[0])) == len(np.unique(pairs[1]))
    assert ((pairs[0] == 0) == (pairs[1] == 0)).all()


@settings(EXAMPLES, max_examples=50)
@given(height=st.integers(1, 20), width=st.integers(1, 20), seed=seeds_)
@CONNECTIVITY
def test_reference_of_labels(connectivity, height, width, seed):
    barrier = make_batch(height, width, seed)
    for result, expected in zip(
        reference.label_regions(barrier, connectivity), ops.label_regions(barrier, connectivity), strict=True
    ):
        assert torch.equal(result, expected)


@pytest.mark.slow
@native
@CONNECTIVITY
@pytest.mark.parametrize("claim_barrier", [False, True], ids="claim{}".format)
@settings(EXAMPLES, max_examples=40)
@given(height=st.integers(1, 24), width=st.one_of(st.integers(1, 24), st.integers(62, 67)), seed=seeds_)
def test_flood_is_a_search(device, connectivity, claim_barrier, height, width, seed):
    barrier = make_batch(height, width, seed)
    seeds = make_seeds(barrier, seed)
    filled = ops.flood_fill(seeds.to(device), barrier.to(device), connectivity, claim_barrier).cpu()
    assert filled.dtype == torch.int32
    for labels, image, result in zip(seeds.numpy(), barrier.numpy(), filled.numpy(), strict=True):
        np.testing.assert_array_equal(result, fill_by_search(labels, image, connectivity, claim_barrier))
    assert torch.equal(reference.flood_fill(seeds, barrier, connectivity, claim_barrier), filled)


@native
def test_flood_by_hand(device):
    def fill(seeds, barrier, **options):
        arrays = [torch.tensor([list(row)], device=device) for row in (seeds, barrier)]
        return ops.flood_fill(arrays[0].int()[None], arrays[1].bool()[None], **options)[0, 0].tolist()

    # the pixel in the middle is equally near to both, and takes the lower label, whichever side this comes from
    assert fill([2, 0, 0, 0, 1], [0, 0, 0, 0, 0]) == [2, 2, 1, 1, 1]
    assert fill([1, 0, 0, 0, 2], [0, 0, 0, 0, 0]) == [1, 1, 1, 2, 2]
    # a value on the barrier is not a seed, and pixels that no seed reaches stay 0
    assert fill([5, 0, 6, 0, 0], [0, 0, 1, 0, 0]) == [5, 5, 0, 0, 0]
    assert fill([5, 0, 0, 0, 9], [0, 1, 1, 1, 0], claim_barrier=True) == [5, 5, 5, 9, 9]
    # labels grow over the barrier, but not beyond it
    assert fill([5, 0, 0, 0, 0], [0, 0, 1, 0, 0], claim_barrier=True) == [5, 5, 5, 0, 0]


@native
def test_corners_connect_only_with_connectivity_8(device):
    barrier = torch.tensor([[[0, 1, 0], [1, 0, 1]]], device=device).bool()
    seeds = torch.tensor([[[0, 0, 0], [0, 4, 0]]], device=device, dtype=torch.int32)
    assert ops.label_regions(barrier, 4)[0].tolist() == [[[1, 0, 2], [0, 3, 0]]]
    assert ops.label_regions(barrier, 8)[0].tolist() == [[[1, 0, 1], [0, 1, 0]]]
    assert ops.flood_fill(seeds, barrier, 4).tolist() == [[[0, 0, 0], [0, 4, 0]]]
    assert ops.flood_fill(seeds, barrier, 8).tolist() == [[[4, 0, 4], [0, 4, 0]]]


@pytest.mark.parametrize("step", [(dy, dx) for dy in range(6) for dx in range(-5, 6) if (dy, dx) > (0, 0)], ids=str)
def test_path_is_a_line_of_pixels(step):
    dy, dx = step
    pixels = reference.regions.path_pixels(dy, dx)
    assert {(0, 0), (dy, dx)} <= set(pixels)
    # the same from the other end, and for a mirrored step
    assert {(dy - y, dx - x) for y, x in pixels} == set(pixels)
    assert {(y, -x) for y, x in reference.regions.path_pixels(dy, -dx)} == set(pixels)
    for y, x in pixels:
        assert abs(dy * x - dx * y) / math.hypot(dy, dx) < 1
    # the path does not pass through a wall that is connected at corners: its rows overlap
    assert len(pixels) >= max(dy, abs(dx)) + 1
    columns = {y: [x for z, x in pixels if z == y] for y in range(dy + 1)}
    for y in range(dy):
        if dx:
            assert set(columns[y]) & set(columns[y + 1])


def dense_walk(masks, edges, radius, beta, steps):
    """Return the walk as a power of the matrix of transitions, in float64; steps are a power of two."""
    height, width = edges.shape
    affinity = np.eye(height * width)
    for i in range(height * width):
        for j in range(i):
            (y, x), (v, u) = divmod(i, width), divmod(j, width)
            length = math.dist((y, x), (v, u))
            if length < radius:
                inside = [
                    edges[p, q]
                    for p in range(min(y, v), max(y, v) + 1)
                    for q in range(min(x, u), max(x, u) + 1)
                    if abs((v - y) * (q - x) - (u - x) * (p - y)) / length < 1 - 1e-9
                ]
                affinity[i, j] = affinity[j, i] = (1 - max(inside)) ** beta
    transition = affinity / affinity.sum(0)
    transition = np.linalg.matrix_power(transition, steps)
    return ((masks * (1 - edges)).reshape(-1, height * width) @ transition).reshape(masks.shape)


def make_edges(height, width, seed=0):
    """Return thin strong edges on a faint background, float32."""
    rng = np.random.default_rng(seed)
    edges = 0.2 * rng.random((height, width)) ** 2
    edges[make_barrier("blobs", height, width, seed)] = 0.95
    return torch.tensor(edges, dtype=torch.float32)


def make_values(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


WALKS = [
    (1, (1, 1), 5, 10, 256),
    (2, (1, 4), 5, 10, 256),
    (2, (5, 1), 5, 10, 256),
    (3, (2, 3), 5, 10, 16),
    (7, (3, 7), 5, 10, 256),
    (5, (9, 6), 2, 3.5, 8),
    (6, (4, 17), 3, 0, 4),
    (1, (6, 5), 1, 10, 4),
    (4, (7, 9), 9, 1, 2),
    (13, (8, 9), 5, 10, 1),
]


@native
@pytest.mark.parametrize(("count", "grid", "radius", "beta", "steps"), WALKS, ids=str)
def test_walk_is_a_power_of_a_matrix(count, grid, radius, beta, steps, device):
    masks, edges = make_values(count, *grid), make_edges(*grid, seed=count)
    exact = torch.from_numpy(dense_walk(masks.double().numpy(), edges.double().numpy(), radius, beta, steps))
    eager = reference.random_walk(masks, edges, radius, beta, steps)
    assert_no_worse(ops.random_walk(masks.to(device), edges.to(device), radius, beta, steps), exact, eager)
    torch.testing.assert_close(
        reference.random_walk(masks.double(), edges.double(), radius, beta, steps), exact, rtol=1e-12, atol=1e-12
    )


@pytest.fixture(scope="module")
def walks():
    """Return a cached function from a number of masks and a grid to masks, edges and their walk, exact and eager."""

    @functools.cache
    def walk(count, grid):
        masks, edges = make_values(count, *grid), make_edges(*grid)
        exact = reference.random_walk(masks.double(), edges.double(), steps=6)
        return masks, edges, exact, reference.random_walk(masks, edges, steps=6)

    return walk


@native
@pytest.mark.parametrize("grid", [(16, 24), (31, 17), (64, 96), (5, 130)], ids=str)
@pytest.mark.parametrize("count", [1, 5, 20])
def test_walk_no_worse_than_eager(count, grid, device, walks):
    masks, edges, exact, eager = walks(count, grid)
    assert_no_worse(ops.random_walk(masks.to(device), edges.to(device), steps=6), exact, eager)


@native
@pytest.mark.parametrize("grid", [(1, 1), (3, 7), (17, 33)], ids=str)
def test_constant_masks_stay_where_there_are_no_edges(grid, device):
    values = torch.tensor([1.0, 0.5, 0.0, 0.7], device=device)
    masks = values[:, None, None].expand(-1, *grid)
    walked = ops.random_walk(masks, torch.zeros(grid, device=device))
    # sums of ones are exact
    assert torch.equal(walked[:3], masks[:3])
    torch.testing.assert_close(walked[3], masks[3], rtol=1e-4, atol=0)


@native
def test_walls_stop_the_walk(device):
    edges = torch.zeros(8, 12, device=device)
    for y in range(8):
        edges[y, 2 + y] = 1  # touching at corners
    masks = torch.zeros(1, 8, 12, device=device)
    masks[:, 7, 0] = 1
    walked = ops.random_walk(masks, edges)[0].cpu()
    beyond = torch.ones(8, 12).triu(2).bool()
    assert (walked[beyond] == 0).all()
    assert (walked[torch.ones(8, 12).tril(1).bool()] > 0).all()


@native
def test_edges_are_clamped_and_steps_may_be_zero(device):
    masks, edges = make_values(2, 3, 4).to(device), make_edges(3, 4).to(device)
    edges[0, 0], edges[1, 1] = -0.5, 1.5
    assert torch.equal(ops.random_walk(masks, edges), ops.random_walk(masks, edges.clamp(0, 1)))
    torch.testing.assert_close(ops.random_walk(masks, edges, steps=0), masks * (1 - edges.clamp(0, 1)))


@native
def test_every_image_has_its_edges(device):
    masks = make_values(3, 4, 6, 5).to(device)
    edges = torch.stack([make_edges(6, 5, seed) for seed in range(3)]).to(device)
    walked = ops.random_walk(masks, edges, steps=8)
    shared = ops.random_walk(masks, edges[0], steps=8)
    for image in range(3):
        assert torch.equal(walked[image], ops.random_walk(masks[image], edges[image], steps=8))
        assert torch.equal(shared[image], ops.random_walk(masks[image], edges[0], steps=8))
    exact = reference.random_walk(masks.double().cpu(), edges.double().cpu(), steps=8)
    assert_no_worse(walked, exact, reference.random_walk(masks.cpu(), edges.cpu(), steps=8))


def make_masks(count, height, width, seed):
    """Return overlapping rectangles, some of them equal or empty."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, height, width), bool)
    for index in range(count):
        if index and rng.random() < 0.2:
            masks[index] = masks[rng.integers(index)]
        else:
            (top, bottom), (left, right) = (np.sort(rng.integers(0, side + 1, 2)) for side in (height, width))
            masks[index, top:bottom, left:right] = rng.random((bottom - top, right - left)) < rng.choice([0.5, 1.0])
    return torch.tensor(masks)


def merge_by_loop(masks, iou):
    """Return the sets of masks that are united, computed round by round."""
    groups = [{index} for index in range(len(masks))]
    while True:
        unions = [masks[sorted(group)].any(0) for group in groups]
        components = []
        for index, union in enumerate(unions):
            near = {
                other
                for other in range(len(unions))
                if (union & unions[other]).sum() > iou * (union | unions[other]).sum()
            } | {index}
            touched = [component for component in components if component & near]
            components = [component for component in components if not component & near]
            components.append(near.union(*touched))
        if len(components) == len(groups):
            return sorted(groups, key=min)
        groups = [set().union(*(groups[index] for index in component)) for component in components]


@native
@settings(EXAMPLES, max_examples=60)
@given(
    count=st.integers(0, 12),
    height=st.integers(1, 12),
    width=st.one_of(st.integers(1, 12), st.integers(62, 130)),
    iou=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]),
    seed=seeds_,
)
def test_merging_is_a_loop(device, count, height, width, iou, seed):
    masks = make_masks(count, height, width, seed)
    merged, groups, scores = ops.merge_masks(masks.to(device), iou)
    expected = merge_by_loop(masks.numpy(), iou)
    assert scores is None
    assert merged.dtype == torch.bool
    assert groups.dtype == torch.int64
    assert merged.shape == (len(expected), height, width)
    for index, group in enumerate(expected):
        assert set(torch.nonzero(groups.cpu() == index)[:, 0].tolist()) == group
        assert torch.equal(merged[index].cpu(), masks[sorted(group)].any(0))
    for result, same in zip(reference.merge_masks(masks, iou)[:2], (merged, groups), strict=True):
        assert torch.equal(result, same.cpu())


@native
def test_masks_merge_in_any_order(device):
    masks, scores = make_masks(40, 20, 70, 5), make_values(40)
    merged, groups, best = ops.merge_masks(masks.to(device), 0.3, scores.to(device))
    assert 1 < len(merged) < 40
    for group in range(len(merged)):
        assert best[group] == scores[groups.cpu() == group].max()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    others, other_groups, other_best = ops.merge_masks(masks[order].to(device), 0.3, scores[order].to(device))
    # the same unions, numbered by their first masks
    assert torch.equal(others[other_groups], merged[groups[order]])
    assert torch.equal(other_best[other_groups], best[groups[order]])
    assert (others.flatten(1).unique(dim=0) == merged.flatten(1).unique(dim=0)).all()


@native
def test_rounds_go_on_while_unions_overlap(device):
    # the union of the first two overlaps the third by more than half, though neither of them does
    masks = torch.zeros(4, 1, 12, dtype=torch.bool, device=device)
    masks[0, 0, 0:4] = masks[1, 0, 1:5] = masks[2, 0, 0:8] = masks[3, 0, 9:] = True
    merged, groups, scores = ops.merge_masks(masks, 0.55, torch.tensor([0.1, 0.4, 0.3, 0.2], device=device))
    assert groups.tolist() == [0, 0, 0, 1]
    assert merged.int().sum((1, 2)).tolist() == [8, 3]
    assert scores.tolist() == torch.tensor([0.4, 0.2]).tolist()


@native
def test_empty_masks_never_merge(device):
    masks = torch.zeros(3, 2, 3, dtype=torch.bool, device=device)
    masks[1] = True
    assert ops.merge_masks(masks, 0)[1].tolist() == [0, 1, 2]


def results(barrier, seeds, masks, edges):
    """Return the results of all ops of the family."""
    return [
        *ops.label_regions(barrier),
        *ops.label_regions(barrier, 8),
        ops.flood_fill(seeds, barrier),
        ops.flood_fill(seeds, barrier, 8, True),
        ops.random_walk(masks, edges, steps=4),
        *ops.merge_masks(barrier, 0.4)[:2],
    ]


def arguments(batch=3, height=19, width=70):
    barrier = make_batch(height, width, 7, batch)
    return barrier, make_seeds(barrier, 8), make_values(batch, height, width), make_edges(height, width)


@native
def test_strided_inputs_give_the_same(device):
    contiguous = [x.to(device) for x in arguments()]
    expected = results(*contiguous)
    transposed = [x.mT.contiguous().mT for x in contiguous]
    spread = [torch.stack((x, x.new_zeros(()).expand_as(x)), 0)[0] for x in contiguous]
    spread[0] = torch.stack((contiguous[0], ~contiguous[0]), 1)[:, 0]
    assert not any(x.is_contiguous() for x in (*transposed, spread[0]))
    for inputs in (transposed, spread):
        for result, value in zip(results(*inputs), expected, strict=True):
            assert torch.equal(result, value)


@native
@pytest.mark.parametrize("offset", [1, 2, 3, 7])
def test_views_at_any_offset(offset, device):
    inputs = [x.to(device) for x in arguments()]
    shifted = [x.new_ones(x.numel() + 64)[offset : offset + x.numel()].view_as(x).copy_(x) for x in inputs]
    for result, value in zip(results(*shifted), results(*inputs), strict=True):
        assert torch.equal(result, value)


@native
@pytest.mark.parametrize("width", [5, 64, 70])
def test_nothing_else_is_written(width, device, guards):
    inputs = [x.to(device) for x in arguments(width=width)]
    before = [x.clone() for x in inputs]
    assert all(torch.isfinite(result).all() for result in results(*inputs))
    for result, value in zip(inputs, before, strict=True):
        assert torch.equal(result, value)


@pytest.mark.slow
def test_native_results_do_not_depend_on_threads(instruction_set, threads):
    # enough pixels for several strips, regions that cross them, and masks for several threads
    barrier = make_batch(700, 801, 3, batch=2)
    seeds, masks, edges = make_seeds(barrier, 4), make_values(7, 33, 20), make_edges(33, 20)
    rectangles = make_masks(33, 20, 70, 5)
    first = [results(barrier, seeds, masks[:count], edges) for count in (5, 7)]
    merged = ops.merge_masks(rectangles, 0.3)[1]
    torch.set_num_threads(1)
    for count, before in zip((5, 7), first, strict=True):
        for result, value in zip(results(barrier, seeds, masks[:count], edges), before, strict=True):
            assert torch.equal(result, value)
    assert torch.equal(ops.merge_masks(rectangles, 0.3)[1], merged)


def test_native_strips_of_an_image(instruction_set):
    for kind in ("spiral", "comb", "noise", "diagonals", "none"):
        barrier = torch.tensor(make_barrier(kind, 1031, 700, 1).copy())[None]
        for connectivity in (4, 8):
            assert_labels(barrier, connectivity, torch.device("cpu"))


@native
def test_empty_batches_and_no_masks(device):
    barrier, seeds, masks, edges = (x.to(device) for x in arguments())
    labels, counts = ops.label_regions(barrier[:0])
    assert labels.shape == (0, 19, 70)
    assert counts.shape == (0,)
    assert ops.flood_fill(seeds[:0], barrier[:0]).shape == (0, 19, 70)
    assert ops.random_walk(masks[:0], edges).shape == (0, 19, 70)
    assert ops.random_walk(masks[None, :0], edges).shape == (1, 0, 19, 70)
    assert ops.random_walk(masks[None, :0], edges[None]).shape == (1, 0, 19, 70)
    assert ops.random_walk(masks[None][:0], edges[None][:0]).shape == (0, 3, 19, 70)
    merged, groups, scores = ops.merge_masks(barrier[:0], scores=masks[:0, 0, 0])
    assert merged.shape == (0, 19, 70)
    assert groups.shape == scores.shape == (0,)


@native
@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda b, s, m, e: ops.label_regions(s), TypeError, "label_regions: barrier must be bool, got int32"),
        (
            lambda b, s, m, e: ops.label_regions(None),
            TypeError,
            "barrier must be a bool tensor, got None",
        ),
        (
            lambda b, s, m, e: ops.label_regions(b[0]),
            ValueError,
            r"label_regions: barrier must be \(B, H, W\), got \(2, 3\)",
        ),
        (lambda b, s, m, e: ops.label_regions(b[:, :0]), ValueError, r"barrier must be \(B, H, W\), got \(1, 0, 3\)"),
        (lambda b, s, m, e: ops.label_regions(b, 6), ValueError, "label_regions: connectivity must be 4 or 8, got 6"),
        (lambda b, s, m, e: ops.flood_fill(m, b), TypeError, "flood_fill: seeds must be int32, got float32"),
        (
            lambda b, s, m, e: ops.flood_fill(s, b[:, :1]),
            ValueError,
            r"flood_fill: barrier must be \(B, H, W\) with B = 1, H = 2, W = 3, got \(1, 1, 3\)",
        ),
        (
            lambda b, s, m, e: ops.flood_fill(s, b.to("meta")),
            ValueError,
            "flood_fill: barrier must be on {device} like seeds, got meta",
        ),
        (lambda b, s, m, e: ops.flood_fill(s, b, 0), ValueError, "flood_fill: connectivity must be 4 or 8, got 0"),
        (
            lambda b, s, m, e: ops.flood_fill(s, b, 4, "all"),
            ValueError,
            "claim_barrier must be False or True, got 'all'",
        ),
        (
            lambda b, s, m, e: ops.random_walk(m.double(), e),
            TypeError,
            "masks must be float32, got float64",
        ),
        (
            lambda b, s, m, e: ops.random_walk(m[0], e),
            ValueError,
            r"random_walk: masks must be \(M, H, W\), got \(2, 3\)",
        ),
        (
            lambda b, s, m, e: ops.random_walk(m, e[None]),
            ValueError,
            r"random_walk: edges must be \(H, W\) with H = 2, W = 3, got \(1, 2, 3\)",
        ),
        (
            lambda b, s, m, e: ops.random_walk(m[None], e.expand(2, 2, 3)),
            ValueError,
            r"random_walk: edges must be \(B, H, W\) with B = 1, H = 2, W = 3, got \(2, 2, 3\)",
        ),
        (
            lambda b, s, m, e: ops.random_walk(m, e.to("meta")),
            ValueError,
            "random_walk: edges must be on {device} like masks, got meta",
        ),
        (lambda b, s, m, e: ops.random_walk(m, e, 0), ValueError, "random_walk: radius must be at least 1, got 0"),
        (lambda b, s, m, e: ops.random_walk(m, e, 2.5), TypeError, "random_walk: radius must be an int, got float"),
        (lambda b, s, m, e: ops.random_walk(m, e, beta=-1), ValueError, "random_walk: beta must be at least 0, got -1"),
        (lambda b, s, m, e: ops.random_walk(m, e, beta="1"), TypeError, "random_walk: beta must be a number, got str"),
        (
            lambda b, s, m, e: ops.random_walk(m, e, steps=-1),
            ValueError,
            "walk: steps must be from 0 to 2147483647, got -1",
        ),
        (lambda b, s, m, e: ops.merge_masks(m), TypeError, "merge_masks: masks must be bool, got float32"),
        (lambda b, s, m, e: ops.merge_masks(b, 1.5), ValueError, "merge_masks: iou must be from 0 to 1, got 1.5"),
        (lambda b, s, m, e: ops.merge_masks(b, math.nan), ValueError, "merge_masks: iou must be from 0 to 1, got nan"),
        (
            lambda b, s, m, e: ops.merge_masks(b, scores=m[0, 0]),
            ValueError,
            r"merge_masks: scores must be \(M\) with M = 1, got \(3,\)",
        ),
        (
            lambda b, s, m, e: ops.merge_masks(b, scores=[1]),
            TypeError,
            "scores must be a float.* tensor, got list",
        ),
    ],
)
def test_errors(call, error, match, device):
    barrier = torch.zeros(1, 2, 3, dtype=torch.bool, device=device)
    with pytest.raises(error, match=match.replace("{device}", str(device))):
        call(barrier, barrier.int(), barrier.float(), torch.zeros(2, 3, device=device))


def huge(dtype, *shape):
    """Return a tensor of any shape that takes no memory."""
    return torch.zeros((), dtype=dtype).expand(shape)


def test_images_of_too_many_pixels_are_refused():
    pixels = huge(torch.bool, 1, 2**16, 2**15)
    for op, call in {
        "label_regions: barrier": lambda: ops.label_regions(pixels),
        "flood_fill: seeds": lambda: ops.flood_fill(huge(torch.int32, *pixels.shape), pixels),
        "random_walk: masks": lambda: ops.random_walk(
            huge(torch.float32, *pixels.shape), huge(torch.float32, *pixels.shape[1:])
        ),
        "merge_masks: masks": lambda: ops.merge_masks(pixels),
    }.items():
        with pytest.raises(ValueError, match=rf"{op} must be fewer than 2\^31 pixels, got 65536 \* 32768"):
            call()


def test_more_than_the_memory_holds_is_refused_before_it_is_allocated(monkeypatch):
    monkeypatch.setattr(checks, "MEMORY", 2**20)
    shape = 1, 1024, 1024
    masks, edges = huge(torch.float32, 1, 200, 200), huge(torch.float32, 200, 200)
    for call in (
        lambda: ops.label_regions(huge(torch.bool, *shape)),
        lambda: ops.flood_fill(huge(torch.int32, *shape), huge(torch.bool, *shape)),
        lambda: ops.random_walk(masks, edges),
        lambda: ops.merge_masks(huge(torch.bool, *shape)),
    ):
        with pytest.raises(ValueError, match=r"must be small enough for 0.0 GiB of memory, got .*, which takes"):
            call()


def test_a_walk_of_any_radius_takes_memory_for_the_image_alone(monkeypatch):
    masks, edges = torch.rand(2, 3, 3), torch.rand(3, 3)
    expected = ops.random_walk(masks, edges, 5, steps=3)
    assert torch.equal(ops.random_walk(masks, edges, 110, steps=3), expected)
    assert torch.equal(ops.random_walk(masks, edges, 2**70, steps=3), expected)
    # the margin counts, too: 1.1 GiB, of which the image's own pixels have 5 MiB
    monkeypatch.setattr(checks, "MEMORY", 2**24)
    with pytest.raises(ValueError, match=r"random_walk: masks must be small enough for .* got \(1, 1, 99\)"):
        ops.random_walk(torch.rand(1, 1, 99), torch.rand(1, 99), 110)
    with pytest.raises(ValueError, match=r"random_walk: steps must be from 0 to 2147483647, got 9223372036854775808"):
        ops.random_walk(masks, edges, steps=2**63)


def test_null_pointers_and_no_threads_are_refused():
    barrier, labels = torch.zeros(1, 2, 3, dtype=torch.bool), torch.zeros(1, 2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"_C: addresses of \w+ must not be null"):
        _C.cpu.label_regions(barrier.data_ptr(), 1, 2, 3, False, labels.data_ptr(), 0, 1)
    with pytest.raises(ValueError, match="_C: num_threads must be at least 1, got 0"):
        _C.cpu.label_regions(barrier.data_ptr(), 1, 2, 3, False, labels.data_ptr(), labels.data_ptr(), 0)


@native
def test_there_is_no_gradient(device):
    masks, edges = make_values(2, 3, 4).to(device), make_edges(3, 4).to(device)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        ops.random_walk(masks.requires_grad_(), edges).sum().backward()


@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    """Return the bodies of the GPU kernels, compiled for the CPU."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("bodies") / "bodies.so"
    source = ROOT / "tests" / "regions_bodies.cpp"
    subprocess.run(["c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def addresses(*tensors):
    return [ctypes.c_void_p(x.data_ptr()) for x in tensors]


@CONNECTIVITY
@settings(EXAMPLES, max_examples=100)
@given(height=st.integers(1, 40), width=st.integers(1, 40), seed=seeds_)
def test_gpu_labels_on_the_cpu(bodies, connectivity, height, width, seed):
    barrier = make_batch(height, width, seed, batch=1).contiguous()
    order = torch.randperm(height * width, generator=torch.Generator().manual_seed(seed)).int()
    roots = torch.empty(1, height, width, dtype=torch.int32)
    bodies.label(*addresses(barrier, order), height, width, connectivity == 8, 2, *addresses(roots))
    for result, expected in zip(
        reference.regions.number_roots(roots, barrier), reference.label_regions(barrier, connectivity), strict=True
    ):
        assert torch.equal(result, expected)


def test_gpu_threads_leave_the_root_in_every_link_of_a_chain(bodies):
    parents = (torch.arange(65536) - 1).clamp(min=0).int()
    bodies.flatten(*addresses(parents), len(parents), 16)
    assert parents.count_nonzero() == 0


def test_gpu_neighbors_on_the_cpu(bodies):
    height, width = 3, 5
    there = torch.empty(height * width, 8, dtype=torch.int32)
    bodies.neighbors(height, width, *addresses(there))
    for pixel, row in enumerate(there.tolist()):
        places = [(pixel // width + dy, pixel % width + dx) for dy, dx in SQUARE]
        inside = [y * width + x for y, x in places if 0 <= y < height and 0 <= x < width]
        assert sorted(row) == sorted(inside + [-1] * (8 - len(inside)))
        # the first four are those along the axes
        assert all(abs(other - pixel) in (1, width) for other in row[:4] if other >= 0)


@pytest.mark.parametrize("radius", [1, 2, 5])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (3, 7), (17, 9)], ids=str)
def test_gpu_walk_on_the_cpu(bodies, grid, radius):
    masks, edges = make_values(4, *grid), make_edges(*grid)
    start, powers = masks * (1 - edges), (1 - edges) ** 10
    ahead = torch.tensor(reference.regions.neighbor_steps(radius), dtype=torch.int32).view(-1, 2)
    walked, affinities = torch.empty_like(masks), torch.empty(len(ahead), *grid)
    sizes = [ctypes.c_int64(size) for size in (len(ahead), *grid)]
    bodies.walk(*addresses(start, powers, ahead), *sizes, 2, *addresses(affinities, walked))
    exact = reference.random_walk(masks.double(), edges.double(), radius, steps=1)
    assert_no_worse(walked, exact, reference.random_walk(masks, edges, radius, steps=1))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_gpu_kernels_compile(architecture, tmp_path):
    source, cubin = ROOT / "csrc" / "cuda" / "regions.cu", tmp_path / "regions.cubin"
    command = ["nvcc", "-std=c++17", "-O3", "-DTRACE_FAST_CUDA", f"-arch={architecture}", "-cubin", "-Xptxas=-v"]
    done = subprocess.run([*command, source, "-o", cubin], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert done.stderr.count("Compiling entry function") == 10
    assert done.stderr.count("0 bytes spill stores") == 10
    assert cubin.stat().st_size > 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None or torch.cuda.is_available(), reason="needs nvcc, and no GPU")
def test_gpu_kernels_that_are_built_need_a_gpu(tmp_path):
    program, source = tmp_path / "program", tmp_path / "program.cpp"
    header, kernels = ROOT / "csrc" / "trace_fast.h", ROOT / "csrc" / "cuda" / "regions.cu"
    source.write_text(f'#include "{header}"\nint main() {{ return trace_fast::cuda::is_available(); }}\n')
    command = ["nvcc", "-std=c++17", "-DTRACE_FAST_CUDA", "-arch=sm_90", source, kernels, "-o", program]
    subprocess.run(command, check=True)
    assert subprocess.run([program], check=False).returncode == 0
