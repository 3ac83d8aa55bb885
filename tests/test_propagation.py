"""Boundary-Guided Propagation: splitting, completing and merging masks; masks and seeds from edges alone."""

import gc
import tracemalloc

import numpy as np
import pytest
import torch
from scipy import ndimage

import trace_fast
from trace_fast import ops, reference
from trace_fast.masks import fitting, propagation
from trace_fast.masks.fitting import draw_parts
from trace_fast.masks.formats import MaskSet

# pixels that rounding may move across a threshold of the random walk
ROUNDED_SHARE = 0.001


def cross(height=40, width=60):
    """Edges that divide an image into four, and the labels (H, W) of the four."""
    edges = np.zeros((height, width), np.float32)
    edges[height // 2] = edges[:, width // 2] = 1
    rows, columns = np.mgrid[:height, :width]
    return edges, 1 + 2 * (rows >= height // 2) + (columns >= width // 2)


def flood(masks, edges, **options):
    return trace_fast.propagate(masks, edges, mode="flood", **options)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("mode", ["flood", "walk"])
def test_merged_masks_are_split_and_fragments_completed(mode):
    edges, labels = cross()
    masks = np.stack([labels <= 2, labels == 3, labels == 3, labels == 4])
    masks[1, :, 12:], masks[2, :, :14] = False, False  # two parts of one
    out = trace_fast.propagate(masks, edges, threshold=0.5, mode=mode, min_area=5)
    assert out.dtype == bool and out.shape == (4, 40, 60)
    truth = np.stack([labels == label for label in (1, 2, 3, 4)])
    for mask, other in zip(out, truth, strict=True):
        assert iou(mask, other) > 0.9


def test_an_object_is_filled_from_the_share_that_is_asked_for():
    edges, _ = cross(42, 61)
    objects, _ = trace_fast.instances(edges, threshold=0.98, min_area=1)
    whole = objects[1].numpy()
    half = whole & (whole.ravel().cumsum().reshape(whole.shape) <= whole.sum() / 2)
    assert 2 * half.sum() == whole.sum()
    assert np.array_equal(trace_fast.propagate(half[None], edges, cover=0.5), whole[None])
    assert np.array_equal(trace_fast.propagate(half[None], edges, cover=0.51), half[None])


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_pixels_near_an_outline_have_both_sides_in_reach(reach):
    blocks = np.random.default_rng(0).random((5, 4)) < 0.5
    mask = np.kron(blocks, np.ones((4, 7), bool))  # some lie along the border of the image
    windows = {"size": 2 * reach + 1, "mode": "nearest"}
    expected = ndimage.maximum_filter(mask, **windows) & ~ndimage.minimum_filter(mask, **windows)
    assert expected.any() and not expected.all()
    assert np.array_equal(fitting._is_near_outline(mask, reach), expected)


def test_flood_fills_regions_exactly():
    edges, labels = cross()
    masks = np.stack([(labels == label) for label in (1, 2, 3, 4)])
    masks[:, ::2] = False  # half of each
    masks[:, :, ::7] = False
    out = flood(masks, edges, threshold=0.5, min_area=1, cover=0.3)
    off = edges == 0
    assert len(out) == 4
    for mask, label in zip(out, (1, 2, 3, 4), strict=True):
        assert np.array_equal(mask & off, (labels == label) & off)
    assert out.sum() == out.any(0).sum()  # the barrier is claimed once


def test_a_region_is_filled_from_that_share_on():
    edges, labels = cross()
    mask = (labels == 1)[None]
    mask[:, 10:] = False  # 300 of the region's 600 pixels
    filled = flood(mask, edges, threshold=0.5, cover=0.5)
    assert np.array_equal(filled[0] & (edges == 0), (labels == 1) & (edges == 0))
    assert np.array_equal(flood(mask, edges, threshold=0.5, cover=0.51), mask)


def test_an_edge_of_just_the_threshold_separates():
    edges = cross()[0] * np.float32(0.7)
    mask = np.ones((1, 40, 60), bool)
    for threshold, count in ((0.7, 4), (0.71, 1)):
        assert len(flood(mask, edges, threshold=threshold)) == count
        assert len(trace_fast.instances(edges, threshold=threshold)[0]) == count


def test_masks_are_united_above_the_iou():
    masks = np.zeros((2, 40, 60), bool)
    masks[0, 2:12, 2:12], masks[1, 2:12, 2:7] = True, True  # half of the other
    for least, count in ((0.49, 1), (0.5, 2)):
        assert len(flood(masks, cross()[0], threshold=0.5, iou=least)) == count


def test_a_leak_does_not_flood_the_image():
    edges, labels = cross()
    edges[10, 30] = 0  # a gap
    mask = (labels == 1)[None]
    assert np.array_equal(flood(mask, edges, threshold=0.5), mask)
    flooded = flood(mask, edges, threshold=0.5, cover=0.0)
    assert flooded[0, 5, 50]


def test_no_pixel_of_a_mask_is_lost():
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        edges = torch.rand(33, 47, generator=generator)
        masks = torch.rand(3, 33, 47, generator=generator) < (seed + 1) / 21
        barrier = edges >= 0.7
        parts = propagation.split_masks(masks, barrier, 4)
        for index, mask in enumerate(masks):
            own = parts.masks[parts.sources == index]
            assert len(own) >= 1
            assert torch.equal(own.any(0), mask)
            assert own.sum() == mask.sum()
            if len(own) > 1:
                regions = ops.label_regions(~(mask & ~barrier)[None])[0][0]
                large = [label for label in regions.unique().tolist() if label and (regions == label).sum() >= 4]
                assert len(own) == len(large)


def test_small_parts_do_not_become_masks():
    edges, _ = cross()
    mask = np.zeros((1, 40, 60), bool)
    mask[0, 2:25, 2:33] = True  # over into the other three, by two columns or some rows
    assert len(flood(mask, edges, threshold=0.5, min_area=100)) == 2
    assert len(flood(mask, edges, threshold=0.5, min_area=1)) == 4
    # a mask smaller than the smallest area is kept
    small = np.zeros((1, 40, 60), bool)
    small[0, 3:5, 3:5] = True
    assert np.array_equal(flood(small, edges, threshold=0.5, min_area=50), small)


def test_the_smallest_part_is_a_share_of_the_image():
    edges = np.zeros((80, 100), np.float32)
    edges[1, :9] = edges[0, [4, 8]] = 1  # 4 pixels, which are 0.05 %, and 3
    assert len(trace_fast.instances(edges, threshold=0.5)[0]) == 2
    assert len(flood(np.ones((1, 80, 100), bool), edges, threshold=0.5)) == 2


def test_scores_follow_shares_of_area():
    edges, labels = cross()
    masks = MaskSet(torch.from_numpy(np.stack([labels <= 2, labels == 3])), torch.tensor([0.8, 0.4]))
    out = flood(masks, edges, threshold=0.5)
    assert isinstance(out, MaskSet)
    # the barrier between two regions goes to one of them
    torch.testing.assert_close(out.scores, torch.tensor([0.4, 0.4, 0.4]), atol=0.02, rtol=0)
    twice = MaskSet(masks.masks[[1, 1]], torch.tensor([0.3, 0.9]))
    assert flood(twice, edges, threshold=0.5).scores.tolist() == pytest.approx([0.9])


def test_classes_keep_masks_apart():
    edges, labels = cross()
    masks = np.stack([labels == 1, labels == 1])
    assert len(flood(masks, edges, threshold=0.5)) == 1
    assert len(flood(masks, edges, threshold=0.5, classes=[4, 7])) == 2


@pytest.mark.parametrize(
    "classes", [[1.2, 1.9], [1, None], [1], [[1, 2]], 3, torch.tensor([1, 2]).to_sparse()], ids=str
)
def test_classes_that_are_no_integers(classes):
    edges, labels = cross()
    with pytest.raises((TypeError, ValueError), match=r"^propagate: classes must be"):
        flood(np.stack([labels == 1, labels == 2]), edges, threshold=0.5, classes=classes)


def test_the_format_is_kept():
    edges, labels = cross()
    whole = labels <= 2
    label_map = np.where(whole, 9, 0).astype(np.uint16)
    out = flood(label_map, edges, threshold=0.5)
    assert out.dtype == np.uint16 and out.shape == labels.shape and len(np.unique(out[whole])) == 2
    tensor = flood(torch.from_numpy(whole)[None], torch.from_numpy(edges)[None, None], threshold=0.5)
    assert isinstance(tensor, torch.Tensor) and tensor.shape == (2, 40, 60)
    record = {"segmentation": whole, "area": 1, "bbox": [0, 0, 1, 1], "predicted_iou": 0.5, "stability_score": 0.7}
    first, second = flood([record], edges, threshold=0.5)
    # it was measured on the whole
    assert not {"stability_score"} & {*first, *second}
    assert first["predicted_iou"] + second["predicted_iou"] == pytest.approx(0.5)
    assert first["area"] == first["segmentation"].sum() > 500


@pytest.mark.parametrize("mode", ["fit", "flood", "walk"])
@pytest.mark.parametrize("masks", [np.zeros((0, 40, 60), bool), [], np.zeros((40, 60), np.int32)], ids=str)
def test_no_masks_stay_none(masks, mode):
    out = trace_fast.propagate(masks, cross()[0], threshold=0.5, mode=mode)
    assert type(out) is type(masks)
    assert np.array_equal(np.asarray(out), np.asarray(masks))


@pytest.mark.parametrize("mode", ["flood", "walk"])
def test_edges_everywhere_or_nowhere(mode):
    mask = np.zeros((2, 20, 30), bool)
    mask[0, 3:9, 4:12], mask[1, 10:19, 15:28] = True, True
    for edges in (np.ones((20, 30), np.float32), np.zeros((20, 30), np.float32)):
        out = trace_fast.propagate(mask, edges, threshold=0.5, mode=mode)
        assert all(any((before & ~after).sum() == 0 for after in out) for before in mask)


@pytest.mark.parametrize("mode", ["flood", "walk"])
def test_classes_that_no_edge_divides_keep_to_themselves(mode):
    mask = np.zeros((2, 40, 60), bool)
    mask[0, :, :22], mask[1, :, 38:] = True, True
    edges = np.zeros((40, 60), np.float32)
    out = trace_fast.propagate(mask, edges, threshold=0.5, mode=mode, classes=[3, 8])
    assert len(out) == 2 and not (out[0] & out[1]).any()
    assert (out[0, :, :22]).all() and (out[1, :, 38:]).all()
    if mode == "walk":  # the pixels between them are divided
        assert out[:, :, 22:38].any(0).mean() > 0.6
        # a walk and its mirror image are summed in another order
        assert (out[0] != out[1, :, ::-1]).mean() < ROUNDED_SHARE
        alone = trace_fast.propagate(mask, edges, threshold=0.5, mode=mode)
        assert (alone.sum((1, 2)) > out.sum((1, 2)).max()).all()  # a single class is not held back by another


def test_a_walk_ends_at_half_of_its_greatest_density():
    generator = torch.Generator().manual_seed(0)
    edges = 0.6 * torch.rand(23, 41, generator=generator, dtype=torch.float64)
    masks = torch.zeros(2, 23, 41, dtype=torch.bool)
    masks[0, 3:12, 4:9], masks[1, 8:20, 25:37] = True, True
    density = reference.random_walk(masks.double(), edges, radius=5, beta=10, steps=256)
    expected = masks | (density > density.amax((1, 2), keepdim=True) / 2)
    assert (expected.sum((1, 2)) > 2 * masks.sum((1, 2))).all() and not expected.all(0).any()
    completed = propagation.complete_by_walk(masks, edges.float(), torch.zeros(2, dtype=torch.int64))
    # pixels at just the half may fall to either side
    decided = (2 * density / density.amax((1, 2), keepdim=True) - 1).abs() > 1e-4
    assert torch.equal(completed & decided, expected & decided) and decided.float().mean() > 0.99


def test_a_thin_edge_holds_a_walk_back_in_a_large_image():
    edges, mask = np.zeros((20, 640), np.float32), np.zeros((1, 20, 640), bool)
    edges[:, 600], mask[..., :600] = 1, True
    out = trace_fast.propagate(mask, edges, threshold=0.5, mode="walk")
    assert not out[..., 605:].any()  # the walk's pixels are 5 x 5


def test_a_walk_leaves_the_pixels_of_another_class():
    mask = np.zeros((3, 40, 60), bool)
    mask[0, :, 8:30], mask[1, :, 30:34], mask[2, :, 34:58] = True, True, True  # the middle one is of another class
    out = trace_fast.propagate(mask, np.zeros((40, 60), np.float32), threshold=0.5, mode="walk", classes=[2, 1, 2])
    assert len(out) == 2 and np.array_equal(out[1], mask[1])
    assert not (out[0] & mask[1]).any() and out[0].sum() > mask[[0, 2]].sum()


def smooth_object(radius=1.0):
    """Return the edges (H, W) around an ellipse, some of them missing, and the ellipse."""
    rows, columns = np.mgrid[:270, :390]
    disc = ((rows - 132) / 90) ** 2 + ((columns - 189) / 135) ** 2 < radius**2
    height, width = disc.shape
    edges = np.zeros((height, width), np.float32)
    edges[:-1] = np.maximum(edges[:-1], disc[1:] != disc[:-1])
    edges[:, :-1] = np.maximum(edges[:, :-1], disc[:, 1:] != disc[:, :-1])
    edges *= 0.5
    edges[120:128] = 0
    return edges, disc


def on_grid(mask, step=15):
    """Return a mask as a network of coarse tokens draws it."""
    small = mask.reshape(mask.shape[0] // step, step, -1, step).mean((1, 3)) > 0.5
    return small.repeat(step, 0).repeat(step, 1)


def test_masks_without_edges_come_back_unchanged():
    _, disc = smooth_object()
    apart = on_grid(disc)
    apart[:8, :8] = apart[-9:, -9:] = True
    masks = np.stack([disc, on_grid(disc), apart, np.zeros_like(disc), np.ones_like(disc)])
    scores = torch.linspace(0.1, 0.9, 5)
    out = trace_fast.propagate(MaskSet(torch.from_numpy(masks), scores), np.zeros(disc.shape))
    assert np.array_equal(out.masks, masks) and torch.equal(out.scores, scores)


def test_two_halves_without_an_edge_stay_two():
    edges, labels = cross()
    edges[:20, 30] = edges[21:, 30] = 0
    halves = np.stack([labels == 1, labels == 2])
    out = trace_fast.propagate(halves, edges / 2)
    assert np.array_equal(out & (edges == 0), halves & (edges == 0))
    # the paper's way makes one mask of them
    assert len(flood(halves, edges / 2, threshold=0.4)) == 1


def test_a_coarse_outline_moves_to_a_broken_edge():
    edges, disc = smooth_object()
    coarse = on_grid(disc)
    (out,) = trace_fast.propagate(coarse[None], edges)
    assert iou(coarse, disc) < 0.95
    assert iou(out, disc) > 0.97
    # two coarse masks share the pixels between them
    first, second = trace_fast.propagate(np.stack([coarse, ~coarse]), edges)
    assert iou(first, disc) > 0.97 and iou(second, ~disc) > 0.97
    assert (first ^ second).all()


def test_an_outline_moves_no_farther_than_its_pieces_are_long():
    edges, _ = smooth_object()
    inner = on_grid(smooth_object(0.7)[1])
    assert np.array_equal(trace_fast.propagate(inner[None], edges)[0], inner)


def test_an_outline_of_single_pixels_stays():
    edges, disc = smooth_object()
    shifted = np.roll(disc, 3, 1)
    assert np.array_equal(trace_fast.propagate(shifted[None], edges)[0], shifted)


def test_unconnected_parts_with_edges_around_are_split():
    edges = np.zeros((60, 90), np.float32)
    for left in (9, 49):
        edges[9:41, left : left + 32] = 0.4
        edges[10:40, left + 1 : left + 31] = 0
    mask = np.zeros((1, 60, 90), bool)
    mask[:, 10:40, 10:40] = mask[:, 10:40, 50:80] = True
    masks = MaskSet(torch.from_numpy(mask), torch.tensor([0.8]))
    out = trace_fast.propagate(masks, edges)
    assert len(out.masks) == 2 and not (out.masks[0] & out.masks[1]).any()
    torch.testing.assert_close(out.scores, torch.tensor([0.4, 0.4]))
    # weaker edges than the threshold are none
    assert len(trace_fast.propagate(masks, edges, threshold=0.5).masks) == 1
    # a part that is too small stays
    assert len(trace_fast.propagate(masks, edges, min_area=1000).masks) == 1


def test_certain_edges_split_and_join():
    edges, labels = cross()
    (first, second), third = trace_fast.propagate((labels <= 2)[None], edges), labels == 3
    off = edges == 0
    assert np.array_equal(first & off, (labels == 1) & off) and np.array_equal(second & off, (labels == 2) & off)
    halves = np.stack([third, third])
    halves[0, :, 14:], halves[1, :, :14] = False, False
    (out,) = trace_fast.propagate(halves, edges)
    assert np.array_equal(out & off, third & off)
    # what is certain is beside nothing: half as strong edges neither split nor join
    assert np.array_equal(trace_fast.propagate((labels <= 2)[None], edges / 2) & off, (labels <= 2)[None] & off)
    assert len(trace_fast.propagate(halves, edges / 2)) == 2
    assert len(trace_fast.propagate(halves, edges, classes=[1, 2])) == 2


def test_certain_objects_hold_small_parts_and_weak_boundaries():
    edges, labels = cross()
    edges[24:27, 4:7] = edges[5, 40:48] = 1  # a pocket, and a line with open ends
    off, columns = edges == 0, np.indices(edges.shape)[1]
    edges[25, 5] = 0
    for label, middle in ((3, 15), (2, 45)):
        whole = labels == label
        halves = np.stack([whole & (columns < middle), whole & (columns >= middle)])
        (out,) = trace_fast.propagate(halves, edges, min_area=20)
        assert np.array_equal(out & off, whole & off)


def test_a_gap_makes_a_boundary_uncertain():
    edges, labels = cross()
    edges[20:33, 15] = 1  # two thirds of the way through the third
    off, columns = edges == 0, np.indices(edges.shape)[1]
    halves = np.stack([(labels == 3) & (columns < 15), (labels == 3) & (columns >= 15)])
    (out,) = trace_fast.propagate(halves, edges)
    assert np.array_equal(out & off, (labels == 3) & off)
    # edges of 0.95 everywhere are none that is certain
    assert len(trace_fast.propagate((labels <= 2)[None], 0.95 * edges)) == 1
    assert len(trace_fast.propagate(halves, 0.95 * edges)) == 2


def test_masks_cover_an_object_together():
    edges, labels = cross()
    off, columns = edges == 0, np.indices(edges.shape)[1]
    first = (labels == 3) & (columns < 20)
    (alone,) = trace_fast.propagate(first[None], edges)
    assert np.array_equal(alone & off, first & off)
    # another, which lies mostly beside the object, covers the rest
    second = (labels >= 3) & (columns >= 20) & (columns < 44)
    out = trace_fast.propagate(np.stack([first, second]), edges)
    assert len(out) == 2
    assert np.array_equal(out[0] & off, (labels == 3) & off) and np.array_equal(out[1] & off, second & off)


def test_many_masks_take_little_memory(monkeypatch):
    edges, disc = smooth_object()
    masks = np.repeat(disc[None], 40, 0)
    alive, peaks = [], []

    def look(parts, size):
        peaks.append(tracemalloc.get_traced_memory()[1])
        tensors = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor)
        alive.extend(tensor for tensor in tensors if tensor.shape == masks.shape)
        del tensors
        tracemalloc.reset_peak()  # the list of all objects of a long test run is large
        return draw_parts(parts, size)

    trace_fast.propagate(masks[:1], edges)  # what is imported once takes memory, too
    monkeypatch.setattr(propagation, "draw_parts", look)
    tracemalloc.start()
    out = trace_fast.propagate(masks, edges)
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert np.array_equal(out, masks)
    # the copy that was read is gone before the result is drawn, and meanwhile each pixel is a bit
    assert not alive
    assert max(peaks) < 1.5 * masks.nbytes


def test_the_other_modes_need_a_threshold():
    for mode in ("flood", "walk"):
        with pytest.raises(ValueError, match=f"propagate: threshold must be given with mode {mode}, got None"):
            trace_fast.propagate(np.ones((1, 4, 5), bool), np.zeros((4, 5)), mode=mode)


def test_instances_are_the_regions():
    edges, labels = cross()
    edges *= 0.8
    masks, scores = trace_fast.instances(edges, threshold=0.5)
    assert masks.shape == (4, 40, 60) and (masks.sum(0) == 1).all()
    torch.testing.assert_close(scores, torch.full((4,), 0.8))
    for mask in masks:
        assert len(np.unique(labels[(mask & (torch.from_numpy(edges) == 0)).numpy()])) == 1
    assert len(trace_fast.instances(edges, threshold=0.5, min_area=700)[0]) == 0
    assert len(trace_fast.instances(np.ones((5, 6), np.float32), threshold=0.5)[0]) == 0
    whole, _ = trace_fast.instances(np.zeros((5, 6), np.float32), threshold=0.5)
    assert whole.all() and len(whole) == 1


def test_a_gap_does_not_join_instances():
    edges, _ = cross()
    whole, _ = trace_fast.instances(edges, threshold=0.5)
    edges[np.nonzero(edges)[0][0], np.nonzero(edges)[1][0]] = edges[5, np.nonzero(edges[5])[0]] = 0
    masks, scores = trace_fast.instances(edges, threshold=0.5)
    assert masks.shape == (4, 40, 60) and (masks.sum(0) == 1).all()
    assert (scores > 0.8).all()
    # pixels on the edge itself may change sides
    overlap = [max(float((mask & other).sum() / (mask | other).sum()) for other in whole) for mask in masks]
    assert min(overlap) > 0.9
    seeds = trace_fast.seeds(edges, 9, threshold=0.5)
    assert len(seeds.points) == 4
    assert (seeds.radius <= 20).all()


def test_small_regions_go_to_those_nearest():
    edges = np.zeros((20, 30), np.float32)
    edges[:, 15] = edges[3, :4] = edges[:4, 3] = 0.75  # a corner of 9 pixels
    corner, _ = trace_fast.instances(edges, threshold=0.5, min_area=9)
    assert sorted(corner.flatten(1).sum(1).tolist())[0] < 20 and len(corner) == 3
    masks, _ = trace_fast.instances(edges, threshold=0.5, min_area=10)
    assert len(masks) == 2 and (masks.sum(0) == 1).all()


def test_ranked_instances_by_hand():
    # three basins: a corner behind 0.75, and the halves of the rest on both sides of 0.5
    edges = torch.zeros(6, 12)
    edges[:, 6] = 0.5
    edges[2, :3] = edges[:3, 2] = 0.75
    masks, scores = trace_fast.instances(edges, min_area=1)
    corner, right = (torch.zeros(6, 12, dtype=torch.bool) for _ in range(2))
    corner[:3, :3], right[:, 6:] = True, True
    corner[2, 2] = False
    expected = {
        "both halves": (~corner, 0.75 - (0.75 + 6 * 0.5) / 64),
        "left": (~corner & ~right, 0.5 - 0.75 / 28),
        "right": (right, 0.5 - 6 * 0.5 / 36),
        "corner": (corner, 0.75 - 4 * 0.75 / 8),
    }  # twice the scores, since all are at the border
    assert torch.equal(masks, torch.stack([mask for mask, _ in expected.values()]))
    torch.testing.assert_close(2 * scores, torch.tensor([score for _, score in expected.values()]), rtol=0, atol=2**-16)
    # at most k, and no two with an IoU above 0.7
    assert torch.equal(trace_fast.instances(edges, k=3, min_area=1)[0], masks[:3])
    assert torch.equal(trace_fast.instances(edges, min_area=9)[0], masks[:3])
    edges[0, 6:] = 0.3  # a row of 6 pixels less is nearly the same mask
    masks = trace_fast.instances(edges, min_area=1)[0].flatten(1).float()
    shared, areas = masks @ masks.T, masks.sum(1)
    iou = shared / (areas + areas[:, None] - shared)
    assert iou.fill_diagonal_(0).max() <= 0.7


def test_a_mask_at_the_border_counts_half():
    edges = torch.zeros(20, 30)
    for left in (0, 12):
        edges[5:15, left : left + 10] = 0.8
        edges[6:14, left + 1 : left + 9] = 0
    masks, scores = trace_fast.instances(edges, min_area=9)
    inside, beside = masks[:, 10, 15], masks[:, 10, 4]
    assert inside.tolist()[0] and not beside.tolist()[0]
    # nearly: the one beside has other pixels of the line around
    assert 0.45 < scores[beside & ~inside].max() / scores[0] < 0.5


@pytest.mark.parametrize("value", [0, 0.4, 1])
def test_an_even_map_has_no_ranked_instances(value):
    masks, scores = trace_fast.instances(np.full((5, 7), value, np.float32))
    assert masks.shape == (0, 5, 7) and masks.dtype == torch.bool and len(scores) == 0


def test_seeds_are_inside_and_farthest_from_edges():
    edges, labels = cross(41, 81)
    seeds = trace_fast.seeds(edges, 3, threshold=0.5)
    assert seeds.points.shape == (3, 2) and seeds.boxes.shape == (3, 4)
    assert (seeds.radius.diff() <= 0).all()
    for (x, y), (x0, y0, x1, y1), radius in zip(
        seeds.points.int().tolist(), seeds.boxes.int().tolist(), seeds.radius.tolist(), strict=True
    ):
        region = (labels == labels[y, x]) & (edges == 0)
        rows, columns = np.nonzero(region)
        assert (x0, y0, x1, y1) == (columns.min(), rows.min(), columns.max(), rows.max())
        others = np.argwhere(np.pad(~region, 1, constant_values=True)) - 1
        assert np.hypot(*(others - (y, x)).T).min() == pytest.approx(radius)
        # no pixel of the region is farther from its outside
        best = max(np.hypot(*(others - pixel).T).min() for pixel in np.argwhere(region))
        assert radius == pytest.approx(best)
    assert len(trace_fast.seeds(np.ones((5, 6), np.float32), 4, threshold=0.5).points) == 0


@pytest.mark.slow
def test_threads_do_not_change_the_result(threads):
    generator = torch.Generator().manual_seed(1)
    edges, masks = torch.rand(60, 70, generator=generator), torch.rand(5, 60, 70, generator=generator) < 0.6
    for mode, share in (("fit", 0), ("flood", 0), ("walk", ROUNDED_SHARE)):
        out = trace_fast.propagate(masks, edges, threshold=0.8, mode=mode, min_area=3)
        torch.set_num_threads(1)
        expected = trace_fast.propagate(masks, edges, threshold=0.8, mode=mode, min_area=3)
        assert out.shape == expected.shape and (out != expected).float().mean() <= share
        torch.set_num_threads(threads)


def many_classes():
    """Random edges, and 80 overlapping masks of as many classes, with scores."""
    random = np.random.default_rng(3)
    edges = np.maximum(cross(61, 83)[0], 0.6 * random.random((61, 83), dtype=np.float32))
    masks = np.zeros((80, 61, 83), bool)
    for mask, (y, x) in zip(masks, random.integers(0, (45, 60), (80, 2)), strict=True):
        mask[y : y + 16, x : x + 23] = random.random((16, 23)) < 0.9
    scores = torch.from_numpy(random.random(80, dtype=np.float32))
    return edges, MaskSet(torch.from_numpy(masks), scores, torch.arange(80).flip(0) % 77)


def test_the_regions_of_a_barrier_are_found_once_for_all_classes(monkeypatch):
    edges, masks = many_classes()
    calls = []
    monkeypatch.setattr(
        ops, "label_regions", lambda barrier, real=ops.label_regions: calls.append(barrier) or real(barrier)
    )
    out = flood(masks, edges, threshold=0.59, min_area=5, cover=0.2)
    # the parts of each mask within its box, and the regions
    assert [barrier.shape == (1, *edges.shape) for barrier in calls] == [False] * 80 + [True]
    assert torch.equal(calls[-1][0], torch.from_numpy(edges >= np.float32(0.59)))
    assert len(out.masks) > 80


def test_classes_are_propagated_as_if_alone():
    edges, masks = many_classes()
    out = flood(masks, edges, threshold=0.59, min_area=5, cover=0.2)
    for label in masks.classes.unique():
        chosen = masks.classes == label
        alone = MaskSet(masks.masks[chosen], masks.scores[chosen], masks.classes[chosen])
        alone = flood(alone, edges, threshold=0.59, min_area=5, cover=0.2)
        assert torch.equal(alone.masks, out.masks[out.classes == label])
        torch.testing.assert_close(alone.scores, out.scores[out.classes == label])


def run_all(edges, masks, *, threshold=0.4, min_area=None, k=3, **options):
    """Results of all functions for some edges, as one list of tensors."""
    stack, strengths = trace_fast.instances(edges, threshold=threshold, min_area=min_area)
    seeds = trace_fast.seeds(edges, k, threshold=threshold, min_area=min_area)
    scores = torch.linspace(0.9, 0.3, len(masks), dtype=torch.float32, device="cpu")
    ranked = trace_fast.instances(edges, k=k, min_area=min_area)
    tensors = [stack, strengths, *ranked, seeds.points, seeds.boxes, seeds.radius]
    for mode in ("fit", "flood", "walk"):
        mask_set = MaskSet(torch.from_numpy(masks), scores)
        out = trace_fast.propagate(mask_set, edges, threshold=threshold, mode=mode, min_area=min_area, **options)
        tensors += [out.masks, out.scores]
    return tensors


def assert_same(tensors, others):
    """Equality of results that the same code computed from the same values."""
    for one, other in zip(tensors, others, strict=True):
        assert one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


@pytest.fixture
def noisy():
    """Edges and masks for which every function has results."""
    random = np.random.default_rng(0)
    edges, labels = cross()
    edges = np.maximum(0.8 * edges, 0.3 * random.random(edges.shape, dtype=np.float32))
    masks = np.stack([labels <= 2, labels == 3, labels != 1])
    masks[1, ::3] = False
    return edges, masks


@pytest.mark.parametrize("layout", ["flipped", "transposed", "big-endian", "read-only", "mapped"])
def test_memory_layouts_of_edges(noisy, layout, tmp_path):
    edges, masks = noisy
    np.save(tmp_path / "edges.npy", edges)
    other = {
        "flipped": lambda: edges[::-1, ::-1].copy()[::-1, ::-1],
        "transposed": lambda: edges.T.copy().T,
        "big-endian": lambda: edges.astype(">f4"),
        "read-only": lambda: np.frombuffer(edges.tobytes(), np.float32).reshape(edges.shape),
        "mapped": lambda: np.load(tmp_path / "edges.npy", mmap_mode="r"),
    }[layout]()
    before = other.copy()
    assert_same(run_all(other, masks), run_all(edges, masks))
    assert np.array_equal(other, before)


def test_numbers_of_numpy(noisy):
    plain = {"threshold": 0.25, "iou": 0.5, "cover": 0.75, "min_area": 7, "k": 2}
    for real, whole in ((np.float32, np.int64), (np.float64, np.uint8), (np.float16, np.int32)):
        others = {name: whole(value) if isinstance(value, int) else real(value) for name, value in plain.items()}
        assert_same(run_all(*noisy, **others), run_all(*noisy, **plain))
    edges, _ = noisy
    assert len(trace_fast.instances(edges, threshold=np.quantile(edges, 0.95))[0]) > 0


@pytest.mark.parametrize("boolean", [True, np.True_], ids=["Python", "numpy"])
@pytest.mark.parametrize("name", ["threshold", "iou", "cover", "min_area", "k"])
def test_bool_is_no_number(noisy, name, boolean):
    required = "an int" if name in ("min_area", "k") else "a number"
    with pytest.raises(TypeError, match=rf"^\w+: {name} must be {required}, got bool"):
        run_all(*noisy, **{name: boolean})


def test_defaults_of_torch_do_not_matter(noisy, request):
    edges, masks = noisy
    before = run_all(edges, masks)
    request.getfixturevalue("odd_defaults")
    assert_same(run_all(edges, masks), before)
    for nothing in ([], masks[:0], np.zeros(edges.shape, np.int32)):
        assert len(flood(nothing, edges, threshold=0.5)) == len(nothing)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"threshold": 0}, ValueError, "threshold must be above 0 and at most 1, got 0"),
        ({"threshold": np.float32("nan")}, ValueError, "threshold must be finite, got nan"),
        ({"threshold": "0.5"}, TypeError, "threshold must be a number, got str"),
        ({"mode": "swim"}, ValueError, "mode must be 'fit' or 'flood' or 'walk', got 'swim'"),
        ({"mode": np.zeros(2)}, ValueError, "mode must be 'fit' or 'flood' or 'walk', got array"),
        ({"iou": 2}, ValueError, "iou must be from 0 to 1, got 2"),
        ({"cover": -1}, ValueError, "cover must be from 0 to 1, got -1"),
        ({"min_area": 0}, ValueError, "min_area must be at least 1, got 0"),
        ({"min_area": 1.0}, TypeError, "min_area must be an int, got float"),
        ({"classes": [1, 2]}, ValueError, r"classes must be \(1,\), one for each mask, got \(2,\)"),
        ({"edges": np.zeros((4, 6))}, ValueError, r"masks must be of size \(4, 6\), got \(4, 5\)"),
        ({"masks": "masks.png"}, TypeError, "masks"),
    ],
    ids=str,
)
def test_errors(change, error, message):
    arguments = {"masks": np.ones((1, 4, 5), bool), "edges": np.zeros((4, 5)), "threshold": 0.5} | change
    with pytest.raises(error, match=message):
        trace_fast.propagate(**arguments)
    with pytest.raises(ValueError, match="instances: k must be at least 1, got 0"):
        trace_fast.instances(np.zeros((4, 5)), k=0)
    with pytest.raises(ValueError, match="seeds: k must be at least 1, got 0"):
        trace_fast.seeds(np.zeros((4, 5)), 0, threshold=0.5)


class TestOptionsOfFormats:
    EDGES = np.zeros((20, 30), np.float32)
    EDGES[:, 14] = 1

    def test_overlaps_are_removed(self):
        masks = np.zeros((2, 20, 30), dtype=bool)
        masks[0, 2:18, 2:13], masks[1, 4:10, 3:9] = True, True
        mask_set = MaskSet(torch.from_numpy(masks), torch.tensor([0.5, 0.75]), torch.tensor([3, 4]))
        before = trace_fast.propagate(mask_set, self.EDGES, threshold=0.5, cover=1.0)
        after = trace_fast.propagate(mask_set, self.EDGES, threshold=0.5, cover=1.0, exclusive=True)
        assert before.masks.sum(0).max() == 2 and after.masks.sum(0).max() == 1
        assert torch.equal(after.masks.any(0), before.masks.any(0))
        assert after.scores.tolist() == [0.5, 0.75] and after.classes.tolist() == [3, 4]

    def test_void_divisor_and_cut_reach_the_reader(self):
        labels = np.zeros((20, 30), np.int32)
        labels[2:18, 2:28], labels[:, 29] = 11001, 9
        written = trace_fast.propagate(labels, self.EDGES, threshold=0.5, ignore=9, label_divisor=1000, cover=1.0)
        assert set(np.unique(written)) == {0, 9, 11001, 11002} and (written[:, 29] == 9).all()
        soft = np.full((1, 20, 30), 0.6, np.float32)
        assert trace_fast.propagate(soft, self.EDGES, threshold=0.5, cut=0.5).sum() == 600
        assert len(trace_fast.propagate(soft, self.EDGES, threshold=0.5, cut=0.7)) == 1
