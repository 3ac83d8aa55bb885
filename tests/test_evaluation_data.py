"""Ground truth of edges: the convention of contours, their groups, every form of file, faults of a folder."""

import json
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from skimage.morphology import thin

from trace_fast import evaluation
from trace_fast.evaluation import find_contours, open_dataset, run
from trace_fast.evaluation.data import GROUPS, pack_layers

few = settings(max_examples=60, deadline=None)


def draw_lines(labels, ignored=None):
    """Return the contours of labels as lists of 0 and 1."""
    return find_contours(np.array(labels), ignored).lines[0].astype(int).tolist()


def group_names(contours):
    """Count the contour pixels of each group."""
    return Counter(GROUPS[code] for code in contours.groups[contours.lines])


def rectangle(labels, top, left, bottom, right, label):
    labels[top:bottom, left:right] = label
    return labels


def loop_contours(layers, ignored):
    """Find contours and groups pixel by pixel, from the set of segments at each pixel."""
    height, width = ignored.shape
    inside = {
        (y, x): {int(v) for v in layers[:, y, x] if v} for y in range(height) for x in range(width) if not ignored[y, x]
    }
    area = Counter(int(v) for v in layers.ravel() if v)
    steps = [
        (here, there)
        for here in inside
        for there in [(here[0], here[1] + 1), (here[0] + 1, here[1])]
        if there in inside
    ]
    touching = {frozenset((a, b)) for here, there in steps for a in inside[here] for b in inside[there] if a != b}
    neighbors = Counter(segment for pair in touching for segment in pair)

    def code(side, segment):
        return (
            side * 9 + sum(area[segment] >= limit for limit in evaluation.data.AREAS) * 3 + min(neighbors[segment], 2)
        )

    edge, groups = np.zeros(ignored.shape, bool), np.zeros(ignored.shape, int)
    for here, there in steps:
        if inside[here] != inside[there]:
            pairs = [(a, b) for a in inside[here] for b in inside[there] if a != b]
            codes = [code(1, a if area[a] <= area[b] else b) for a, b in pairs]
            codes += [code(0, a) for a in inside[here] ^ inside[there]]
            edge[here] = True
            groups[here] = max(groups[here], *codes)
    return thin(edge), groups


class TestConvention:
    def test_the_upper_left_side_of_a_change(self):
        assert draw_lines([[0, 0, 1, 1]] * 2) == [[0, 1, 0, 0]] * 2
        assert draw_lines([[1, 1, 0, 0]] * 2) == [[0, 1, 0, 0]] * 2
        assert draw_lines([[1, 1], [2, 2], [2, 2]]) == [[1, 1], [0, 0], [0, 0]]
        assert draw_lines([[1, 2, 3]]) == [[1, 1, 0]]

    def test_a_square(self):
        square = rectangle(np.zeros((6, 7), int), 2, 2, 4, 5, 9)
        # a corner is cut: above left because no neighbor to the right or below differs, above right by thinning
        assert draw_lines(square) == [
            [0, 0, 0, 0, 0, 0, 0],
            [0, 0, 1, 1, 0, 0, 0],
            [0, 1, 0, 0, 1, 0, 0],
            [0, 0, 1, 1, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0],
        ]

    def test_the_border_of_the_image_is_no_contour(self):
        assert not find_contours(np.ones((5, 4), int)).lines.any()
        assert not find_contours(np.zeros((1, 1), int)).lines.any()
        assert draw_lines(rectangle(np.zeros((4, 4), int), 0, 0, 4, 2, 1)) == [[0, 1, 0, 0]] * 4

    def test_no_contour_along_crowds(self):
        labels = rectangle(np.ones((4, 6), int), 0, 4, 4, 6, 2)
        crowd = np.zeros((4, 6), bool)
        crowd[:, 1:3] = True
        assert draw_lines(np.where(crowd, 0, labels), crowd) == [[0, 0, 0, 1, 0, 0]] * 4
        crowd[:, 3] = True
        contours = find_contours(np.where(crowd, 0, labels), crowd)
        assert not contours.lines.any() and (contours.ignored == crowd).all()

    def test_overlapping_segments_keep_their_outlines(self):
        one, two = (rectangle(np.zeros((9, 12), int), *box) for box in ((1, 1, 7, 7, 1), (4, 4, 8, 10, 2)))
        expected = find_contours(one).lines | find_contours(two).lines
        contours = find_contours(np.stack([one, two]))
        assert contours.lines.sum() >= expected.sum() - 2  # thinned together, where the outlines cross
        assert not (contours.lines & ~expected).any()

    def test_labels_may_be_large_and_sparse(self):
        small = np.array([[0, 0, 1, 1, 3], [2, 2, 1, 3, 3]])
        expected = find_contours(small)
        for dtype in (np.uint16, np.uint32, np.int64, np.uint64):
            large = np.array([0, 7, np.iinfo(dtype).max, 60000], dtype)[small]
            contours = find_contours(large)
            assert (contours.lines == expected.lines).all() and (contours.groups == expected.groups).all()
        everywhere = find_contours(np.array([[4, 4, 9], [7, 9, 9]]))  # no zero at all
        assert everywhere.lines[0].tolist() == [[False, True, False], [True, False, False]]

    @pytest.mark.slow
    @few
    @given(
        st.data(),
        st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
        st.sampled_from([0.0, 0.1, 0.4]),
    )
    def test_equals_a_loop(self, data, shape, share):
        # label k on layer k % L, so that each segment is on one layer
        steps = data.draw(arrays(np.int64, shape, elements=st.integers(0, 3)))
        layers = np.where(steps, steps * shape[0] + np.arange(shape[0])[:, None, None], 0)
        ignored = np.random.default_rng(data.draw(st.integers(0, 99))).random(shape[1:]) < share
        layers[:, ignored] = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation.data, "AREAS", (4, 9))  # so that small images have all sizes
            contours = find_contours(layers, ignored)
            drawn, groups = loop_contours(layers, ignored)
        np.testing.assert_array_equal(contours.lines[0], drawn)
        np.testing.assert_array_equal(contours.groups[0][drawn], groups[drawn])

    @few
    @given(arrays(np.int64, (5, 6), elements=st.integers(0, 4)), st.lists(st.integers(0, 2), min_size=5, max_size=5))
    def test_which_layer_a_segment_is_on_changes_nothing(self, labels, layer):
        labels = labels.repeat(2, 0).repeat(2, 1)
        split = np.stack([np.where(np.array(layer)[labels] == index, labels, 0) for index in range(3)])
        one, several = find_contours(labels), find_contours(split)
        np.testing.assert_array_equal(several.lines, one.lines)
        np.testing.assert_array_equal(several.groups[one.lines], one.groups[one.lines])

    @pytest.mark.parametrize(
        ("labels", "got"),
        [
            (np.zeros(4, int), r"\(4,\) int64"),
            (np.zeros((1, 1, 1, 1), int), r"\(1, 1, 1, 1\) int64"),
            (np.zeros((0, 4), int), r"\(1, 0, 4\) int64"),
            (np.zeros((2, 3)), r"\(1, 2, 3\) float64"),
            (np.full((2, 3), -1), r"\(1, 2, 3\) int64"),
        ],
    )
    def test_errors(self, labels, got):
        with pytest.raises(ValueError, match=rf"labels must be \(H, W\) or \(L, H, W\) integers >= 0, got {got}"):
            find_contours(labels)


class TestGroups:
    def test_a_segment_alone(self):
        contours = find_contours(rectangle(np.zeros((50, 60), int), 3, 3, 20, 20, 1))
        assert set(group_names(contours)) == {("background", "small", "none")}

    @pytest.mark.parametrize(
        ("height", "width", "size"),
        [(31, 33, "small"), (32, 32, "medium"), (95, 97, "medium"), (96, 96, "large"), (1, 1023, "small")],
    )
    def test_sizes_as_coco_has_them(self, height, width, size):
        contours = find_contours(rectangle(np.zeros((height + 4, width + 4), int), 2, 2, height + 2, width + 2, 1))
        assert set(group_names(contours)) == {("background", size, "none")}

    def test_two_that_touch(self):
        labels = np.zeros((60, 120), int)
        rectangle(labels, 10, 10, 20, 20, 1)
        rectangle(labels, 10, 20, 50, 110, 2)
        contours = find_contours(labels)
        between = np.s_[0, 11:19, 19]
        # of the smaller one, which has one neighbor
        assert {GROUPS[code] for code in contours.groups[between]} == {("touching", "small", "one")}
        assert group_names(contours).keys() == {
            ("touching", "small", "one"),
            ("background", "small", "one"),
            ("background", "medium", "one"),
        }

    def test_neighbors_of_the_smaller(self):
        labels = np.ones((90, 120), int)
        labels[:, 60:] = 2
        rectangle(labels, 20, 50, 40, 70, 3)  # across both
        contours = find_contours(labels)
        assert GROUPS[contours.groups[0, 5, 59]] == ("touching", "medium", "several")
        assert GROUPS[contours.groups[0, 30, 49]] == ("touching", "small", "several")
        rectangle(labels, 60, 10, 70, 20, 4)  # inside one
        assert GROUPS[find_contours(labels).groups[0, 65, 9]] == ("touching", "small", "one")

    def test_a_segment_upon_another_touches_it_on_all_sides(self):
        layers = np.zeros((2, 40, 50), int)
        rectangle(layers[0], 2, 2, 38, 48, 1)
        rectangle(layers[1], 10, 10, 20, 25, 2)
        contours = find_contours(layers)
        inner = find_contours(layers[1]).lines
        assert {GROUPS[code] for code in contours.groups[inner]} == {("touching", "small", "one")}
        assert {GROUPS[code] for code in contours.groups[contours.lines & ~inner]} == {("background", "medium", "one")}

    def test_a_common_end_of_two_that_overlap_is_background(self):
        layers = np.zeros((2, 20, 30), int)
        layers[0, :, :20], layers[1, 5:15, 10:20] = 1, 2
        contours = find_contours(layers)
        assert {GROUPS[code][0] for code in contours.groups[0, 6:14, 19]} == {"background"}
        assert {GROUPS[code][0] for code in contours.groups[0, 6:14, 9]} == {"touching"}


class TestLayers:
    def test_by_hand(self):
        masks = np.zeros((4, 1, 6), bool)
        masks[0, 0, :3] = masks[1, 0, 2:4] = masks[2, 0, 4:] = masks[3, 0, 2] = True
        assert pack_layers(masks, (1, 6)).tolist() == [[[1, 1, 1, 0, 3, 3]], [[0, 0, 2, 2, 0, 0]], [[0, 0, 4, 0, 0, 0]]]

    def test_no_masks_and_empty_masks(self):
        assert pack_layers([], (2, 3)).tolist() == [[[0] * 3] * 2]
        masks = np.zeros((3, 2, 3), bool)
        masks[1, 0, 0] = True
        assert pack_layers(masks, (2, 3)).tolist() == [[[2, 0, 0], [0, 0, 0]]]

    @few
    @given(arrays(bool, st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(1, 5))))
    def test_every_mask_is_on_one_layer(self, masks):
        layers = pack_layers(masks, masks.shape[1:])
        assert layers.dtype == np.int32 and 1 <= len(layers) <= max(len(masks), 1)
        for label, mask in enumerate(masks, 1):
            cells = layers == label
            np.testing.assert_array_equal(cells.any(0), mask)
            assert cells.any((1, 2)).sum() == mask.any()


def encode(labels):
    """Return segment ids as the colors of COCO's panoptic PNG files."""
    return np.stack([labels % 256, labels // 256 % 256, labels // 256**2], -1).astype(np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def rle(mask):
    ends = np.flatnonzero(np.diff(np.append(0, mask.ravel(order="F"))))
    return {"size": list(mask.shape), "counts": np.diff([0, *ends, mask.size]).tolist()}


def entry(labels, name="a.png", number=1):
    return {"id": number, "file_name": name, "height": labels.shape[0], "width": labels.shape[1]}


def write_instances(path, labels, crowd=()):
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "segmentation": rle(labels == label), "iscrowd": int(label in crowd)}
        for i, label in enumerate(np.unique(labels[labels > 0]).tolist(), 1)
    ]
    data = {"images": [entry(labels)], "categories": [{"id": 1, "name": "x"}], "annotations": annotations}
    path.write_text(json.dumps(data))
    return path


def write_panoptic(path, labels, crowd=()):
    save(path.with_suffix("") / "a.png", encode(labels))
    segments = [
        {"id": label, "category_id": 1, "iscrowd": int(label in crowd)} for label in np.unique(labels).tolist() if label
    ]
    data = {
        "images": [entry(labels)],
        "categories": [{"id": 1, "name": "x", "isthing": 1}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
    }
    path.write_text(json.dumps(data))
    return path


def write_bsds(path, *lines):
    savemat = pytest.importorskip("scipy.io").savemat
    cells = np.empty((1, len(lines)), object)
    for index, annotator in enumerate(lines):
        segmentation = np.ones(annotator.shape, np.uint16)
        cells[0, index] = {"Boundaries": annotator.astype(np.uint8), "Segmentation": segmentation}
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"groundTruth": cells}, do_compression=True)
    return path


@pytest.fixture
def labels():
    """Five segments with large and small numbers, two of which touch."""
    labels = np.zeros((22, 31), int)
    for box in ((2, 2, 9, 12, 1), (5, 12, 15, 20, 2), (12, 1, 20, 9, 40), (17, 12, 22, 31, 200), (0, 24, 6, 31, 251)):
        rectangle(labels, *box)
    return labels


@pytest.fixture
def read(tmp_path, labels):
    """Return a function that reads the contours of the one photo in a folder."""
    save(tmp_path / "images" / "a.png", np.zeros((*labels.shape, 3), np.uint8))

    def read(name=None, **options):
        dataset = open_dataset(tmp_path, name, **options)
        assert (dataset.problems, dataset.notes) == ([], [])
        (photo,) = dataset.photos
        assert (photo.name, photo.image) == ("a", tmp_path / "images" / "a.png")
        return photo.contours()

    return read


def assert_same(contours, expected):
    np.testing.assert_array_equal(contours.ignored, expected.ignored)
    np.testing.assert_array_equal(contours.lines, expected.lines)
    np.testing.assert_array_equal(contours.groups[contours.lines], expected.groups[contours.lines])


class TestReaders:
    def test_label_maps(self, read, tmp_path, labels):
        expected = find_contours(labels)
        save(tmp_path / "inst" / "a.png", labels.astype(np.uint8))
        assert_same(read(), expected)
        assert_same(read(ignore=[]), expected)
        numbers = np.arange(256) * 250
        save(tmp_path / "inst" / "a.png", numbers[labels].astype(np.uint16))
        assert_same(read(), expected)
        save(tmp_path / "inst" / "a.png", labels > 0)
        assert_same(read(), find_contours((labels > 0).astype(int)))
        palette = Image.fromarray(labels.astype(np.uint8)).convert("P")
        palette.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
        palette.save(tmp_path / "inst" / "a.png")
        with Image.open(tmp_path / "inst" / "a.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), labels)
        assert_same(read(), expected)

    def test_colors_as_coco_encodes_them(self, read, tmp_path, labels):
        for factor in (1, 257, 65793):  # in one, two and three of the channels
            colors = encode(labels * factor)
            save(tmp_path / "panoptic" / "a.png", colors)
            assert_same(read(), find_contours(labels))
            save(tmp_path / "panoptic" / "a.png", np.dstack([colors, np.full(labels.shape, 255, np.uint8)]))
            assert_same(read(), find_contours(labels))

    def test_ignored_labels(self, read, tmp_path, labels):
        crowd = labels == 2
        expected = find_contours(np.where(crowd, 0, labels), crowd)
        save(tmp_path / "inst" / "a.png", np.where(crowd, 65535, labels).astype(np.uint16))
        assert_same(read(), expected)
        save(tmp_path / "inst" / "a.png", np.where(crowd, 255, labels).astype(np.uint8))
        assert_same(read(ignore=[255, 77]), expected)
        save(tmp_path / "inst" / "a.png", encode(labels))
        assert_same(read(ignore=[2]), expected)

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA"])
    def test_folders_of_masks(self, read, tmp_path, labels, mode):
        for label in np.unique(labels[labels > 0]):
            save(tmp_path / "masks" / "a" / f"{label}.png", (labels == label).astype(np.uint8) * 255)
            path = tmp_path / "masks" / "a" / f"{label}.png"
            with Image.open(path) as picture:
                converted = picture.convert(mode)
            converted.save(path)
        (tmp_path / "masks" / "a" / "about.txt").write_text("no mask")
        assert_same(read(), find_contours(labels))

    def test_instances(self, read, tmp_path, labels):
        path = write_instances(tmp_path / "instances.json", labels)
        assert_same(read(path), find_contours(labels))
        assert_same(read("instances.json"), find_contours(labels))
        write_instances(path, labels, crowd=[2])
        crowd = labels == 2
        assert_same(read(path), find_contours(np.where(crowd, 0, labels), crowd))
        write_instances(path, np.zeros_like(labels))
        assert not read(path).lines.any()

    def test_panoptic_segments(self, read, tmp_path, labels):
        path = write_panoptic(tmp_path / "panoptic_x.json", labels)
        void = labels == 0
        assert_same(read(path), find_contours(labels, void))
        full = labels + 1
        write_panoptic(path, full)
        assert_same(read(path), find_contours(full))
        write_panoptic(path, full, crowd=[3])
        crowd = full == 3
        assert_same(read(path), find_contours(np.where(crowd, 0, full), crowd))

    def test_all_forms_of_one_truth(self, read, tmp_path, labels):
        full = labels + 1
        write_panoptic(tmp_path / "p.json", full)
        write_instances(tmp_path / "i.json", full)
        save(tmp_path / "inst" / "a.png", full.astype(np.uint16))
        save(tmp_path / "colors" / "a.png", encode(full))
        for label in np.unique(full):
            save(tmp_path / "masks" / "a" / f"{label}.png", full == label)
        expected = find_contours(full)
        for name in ("p.json", "i.json", "inst", "colors", "masks"):
            assert_same(read(name), expected)
        write_bsds(tmp_path / "ground_truth" / "a.mat", expected.lines[0])
        np.testing.assert_array_equal(read("ground_truth").lines, expected.lines)

    def test_annotators_of_bsds(self, read, tmp_path, labels):
        maps = np.random.default_rng(0).random((3, *labels.shape)) < 0.1
        write_bsds(tmp_path / "groundTruth" / "a.mat", *maps)
        contours = read()
        np.testing.assert_array_equal(contours.lines, maps)
        assert contours.lines.dtype == bool and contours.groups is None and not contours.ignored.any()

    @pytest.mark.parametrize("share", [0, 0.1, 0.3, 0.6, 0.9, 0.999])
    def test_a_truncated_file_is_an_error_that_names_it(self, read, tmp_path, labels, share):
        mat = write_bsds(tmp_path / "ground_truth" / "a.mat", labels > 0)
        png = save(tmp_path / "inst" / "a.png", labels.astype(np.uint16))
        for path in (mat, png):
            data = path.read_bytes()
            path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ValueError, match=r"no groundTruth with Boundaries, as BSDS500 has, in .*a\.mat: "):
            read("ground_truth")
        if share < 0.9:
            with pytest.raises(run.FAILURES, match=r"must be an image file|truncated"):
                read("inst")
        else:  # only bytes after the pixels are cut off
            assert_same(read("inst"), find_contours(labels))

    def test_other_errors(self, read, tmp_path, labels):
        savemat = pytest.importorskip("scipy.io").savemat
        (tmp_path / "ground_truth").mkdir()
        savemat(tmp_path / "ground_truth" / "a.mat", {"other": 1})
        with pytest.raises(ValueError, match=r"no groundTruth with Boundaries, as BSDS500 has, in .*a\.mat"):
            read("ground_truth")
        for size in ((3, 4), (4, 3)):
            save(tmp_path / "masks" / "a" / f"{size[0]}.png", np.zeros(size, np.uint8))
        with pytest.raises(ValueError, match=r"masks must be of one size, got \[\(3, 4\), \(4, 3\)\] in .*a"):
            read("masks")
        (tmp_path / "empty" / "a").mkdir(parents=True)
        with pytest.raises(ValueError, match="masks must be of one size, got no files in"):
            read("empty")


class TestFolders:
    def names(self, dataset):
        return [photo.name for photo in dataset.photos], dataset.problems, dataset.notes

    def test_the_first_truth_there_is(self, tmp_path, labels, monkeypatch):
        small = labels.astype(np.uint8)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        (tmp_path / "here" / "inst").mkdir()  # of the working folder, and so none of the data's
        with pytest.raises(
            ValueError, match=r"data must hold ground truth, got no inst or panoptic or masks or .* in '.*data'"
        ):
            open_dataset(tmp_path / "data")
        save(tmp_path / "data" / "a.png", small)
        for folder in ("ground_truth", "panoptic", "inst"):
            save(tmp_path / "data" / folder / "a.png", small)
            (photo,) = open_dataset(tmp_path / "data").photos
            assert photo.truth == tmp_path / "data" / folder / "a.png"
            assert photo.image == tmp_path / "data" / "a.png"

    def test_a_truth_anywhere(self, tmp_path, labels, monkeypatch):
        small = labels.astype(np.uint8)
        monkeypatch.chdir(tmp_path)
        save(tmp_path / "data" / "images" / "a.png", small)
        save(tmp_path / "elsewhere" / "a.png", small)
        for name in ("elsewhere", tmp_path / "elsewhere"):
            assert self.names(open_dataset("data", name)) == (["a"], [], [])
        with pytest.raises(ValueError, match="data must hold ground truth, got no nowhere in 'data'"):
            open_dataset("data", "nowhere")

    def test_photos_by_name_with_notes_and_problems(self, tmp_path, labels):
        small = labels.astype(np.uint8)
        for name in ("c.png", "b.png", "a.png", "extra.png", "twice.png", "twice.bmp", "doubt.png", "x.y.png"):
            save(tmp_path / "images" / name, small)
        (tmp_path / "images" / "readme.txt").write_text("no image")
        for name in ("a.png", "c.png", "b.png", "lost.png", "twice.png", "doubt.png", "doubt.bmp", ".hidden.png"):
            save(tmp_path / "inst" / name, small)
        save(tmp_path / "inst" / "x.y" / "1.png", small)
        names, problems, notes = self.names(open_dataset(tmp_path))
        assert names == ["a", "b", "c", "x.y"]
        assert problems == [
            "twice: 2 image files of that name",
            "doubt: 2 ground truths of that name",
            f"lost: no image in {tmp_path / 'images'}",
        ]
        assert notes == [
            f"extra: no ground truth in {tmp_path / 'inst'}",
            f"left out of {tmp_path / 'images'}: 1 file of another format (.txt)",
        ]

    def test_truth_without_photographs(self, tmp_path, labels):
        for name in ("b", "a"):
            save(tmp_path / "inst" / f"{name}.png", labels.astype(np.uint8))
        dataset = open_dataset(tmp_path)
        assert self.names(dataset) == (["a", "b"], [], [])
        assert {photo.image for photo in dataset.photos} == {None}

    def test_the_layout_of_coco(self, tmp_path, labels, monkeypatch):
        for split, names in (("train2017", "ab"), ("val2017", "c")):
            images = [{"id": k, "file_name": f"{name}.jpg", "height": 4, "width": 6} for k, name in enumerate(names)]
            (tmp_path / "coco" / "annotations").mkdir(parents=True, exist_ok=True)
            path = tmp_path / "coco" / "annotations" / f"instances_{split}.json"
            path.write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
            for name in names:
                save(tmp_path / "coco" / split / f"{name}.jpg", labels.astype(np.uint8))
        (tmp_path / "coco" / "annotations" / "instances_test2017.json").write_text("{}")  # without images
        monkeypatch.chdir(tmp_path)
        for data, truth, expected in (
            ("coco/val2017", "coco/annotations/instances_val2017.json", ["c"]),
            ("coco/", None, ["c"]),
            ("coco", "annotations/instances_train2017.json", ["a", "b"]),
            ("coco/train2017", tmp_path / "coco/annotations/instances_train2017.json", ["a", "b"]),
        ):
            dataset = open_dataset(data, truth)
            assert self.names(dataset) == (expected, [], [])
            assert all(photo.image.is_file() for photo in dataset.photos)
        (tmp_path / "coco" / "val2017").rename(tmp_path / "coco" / "test")
        assert self.names(open_dataset("coco"))[0] == ["a", "b"]
        (tmp_path / "coco" / "test").rename(tmp_path / "coco" / "test2017")
        with pytest.raises(ValueError, match=r"evaluate: truth must be one of \['coco/.*test2017.*train2017.*got None"):
            open_dataset("coco")

    def test_photos_of_a_json_file(self, tmp_path, labels):
        path = write_instances(tmp_path / "i.json", labels)
        data = json.loads(path.read_text())
        names = ("z.png", "sub/y.png", "y.jpg", "lost.png")
        data["images"] += [entry(labels, name, number) for number, name in enumerate(names, 2)]
        path.write_text(json.dumps(data))
        for name in ("a.png", *names[:-1], "unlisted.png"):
            save(tmp_path / "images" / name, labels.astype(np.uint8))
        names, problems, notes = self.names(open_dataset(tmp_path, "i.json"))
        assert names == ["a", "z"]
        assert problems == [f"lost.png: no image in {tmp_path / 'images'}", "y: listed 2 times"]
        assert notes == []

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"annotations": [1]}', '{"annotations": 3}'])
    def test_a_json_file_of_another_kind(self, tmp_path, text):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=r"^read_annotations: path must .*'.*x\.json'"):
            open_dataset(tmp_path, "x.json")

    def test_panoptic_segments_are_kept_for_scores_of_segments(self, tmp_path, labels):
        save(tmp_path / "images" / "a.png", labels.astype(np.uint8))
        write_panoptic(tmp_path / "p.json", labels)
        write_instances(tmp_path / "i.json", labels)
        assert open_dataset(tmp_path, "p.json").panoptic.images[1].segment_map().tolist() == labels.tolist()
        assert open_dataset(tmp_path, "i.json").panoptic is None

    def test_the_stamp_of_what_contours_depend_on(self, tmp_path, labels):
        """Results are kept under a stamp, which changes as soon as contours may change."""

        def stamp(name, **options):
            (photo,) = open_dataset(tmp_path, name, **options).photos
            return run.make_stamp(photo.truth, photo.image, *photo.dependencies)

        save(tmp_path / "images" / "a.png", labels.astype(np.uint8))
        write_panoptic(tmp_path / "p.json", labels)
        save(tmp_path / "masks" / "a" / "1.png", labels == 1)
        for folder in ("inst", "other"):
            path = save(tmp_path / folder / "a.png", labels.astype(np.uint8))
            os.utime(path, ns=(1, 1))
        names = ("inst", "other", "masks", "p.json")
        before = [*map(stamp, names), stamp("inst", ignore=[2])]
        assert len(set(before)) == 5
        assert stamp("inst", ignore=[65535, 65535]) == before[0]
        for path in ("inst/a.png", "other/a.png", "masks/a/1.png", "p/a.png"):
            os.utime(tmp_path / path, ns=(2, 2))
        assert not set(map(stamp, names)) & set(before)
        before = [*map(stamp, names)]
        os.utime(tmp_path / "images" / "a.png", ns=(2, 2))
        assert not set(map(stamp, names)) & set(before)
