"""Export: files are read back by the tools that they are written for, and are whole or not there."""

import contextlib
import io
import json
import os

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as api
from pycocotools.coco import COCO

from trace_fast.masks.coco import read_panoptic, read_results
from trace_fast.masks.export import (
    make_panoptic_segments,
    make_predictor_prompts,
    make_sam_prompts,
    refine_results,
    write_coco_results,
    write_palette,
    write_panoptic,
)
from trace_fast.masks.formats import MaskSet, semantic_masks
from trace_fast.masks.propagation import propagate, seeds

MASKS = np.array([[[1, 1, 0], [1, 0, 0]], [[0, 1, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]], dtype=bool)
SCORES = np.array([0.9, 0.1, 0.5])
EXAMPLES = settings(max_examples=30, deadline=None)


def random_masks(shape):
    return hnp.arrays(bool, shape)


def as_set(masks, **fields):
    return MaskSet(torch.from_numpy(masks), **fields)


def load_results(path, sizes):
    """Results as pycocotools reads them."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i, "height": height, "width": width} for i, (height, width) in sizes.items()],
            "categories": [{"id": i} for i in range(10)],
            "annotations": [],
        }
        truth.createIndex()
        return truth.loadRes(str(path))


class TestCocoResults:
    # pycocotools' decode
    @pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
    @EXAMPLES
    @given(masks=random_masks(st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 9))))
    def test_pycocotools_reads_it(self, masks, tmp_path_factory):
        path = tmp_path_factory.mktemp("results") / "results.json"
        scores = np.linspace(1, 0.1, len(masks))
        write_coco_results(path, {42: (masks, scores)}, category_id=3)
        read = load_results(path, {42: masks.shape[1:]})
        entries = read.loadAnns(read.getAnnIds(imgIds=42))
        assert len(entries) == len(masks)
        for entry, mask, score in zip(entries, masks, scores, strict=True):
            np.testing.assert_array_equal(read.annToMask(entry).astype(bool), mask)
            assert entry["bbox"] == api.toBbox(entry["segmentation"]).tolist()
            assert entry["area"] == entry["bbox"][2] * entry["bbox"][3]  # the pitfall that the docstring names
            assert entry["score"] == score and entry["category_id"] == 3

    def test_entries(self, tmp_path):
        write_coco_results(tmp_path / "results.json", {7: as_set(MASKS[:1], scores=torch.tensor([0.5]))})
        assert json.loads((tmp_path / "results.json").read_text()) == [
            {
                "image_id": 7,
                "category_id": 1,
                "segmentation": {
                    "size": [2, 3],
                    "counts": api.encode(np.asfortranarray(MASKS[0], "u1"))["counts"].decode(),
                },
                "bbox": [0, 0, 2, 2],
                "area": 3,
                "score": 0.5,
            }
        ]
        assert isinstance(api.encode(np.asfortranarray(MASKS[0], "u1"))["counts"], bytes)

    def test_a_generator_of_many_formats(self, tmp_path):
        path, yielded = tmp_path / "results.json", []

        def results():
            for image, masks, scores in (
                (1, MASKS, SCORES),
                (np.int64(2), list(MASKS), None),
                (3, torch.from_numpy(MASKS), torch.from_numpy(SCORES)),
                (4, np.array([[1, 1, 0], [2, 0, 0]]), [0.25, 1]),
                (5, as_set(MASKS, scores=torch.rand(3), classes=torch.tensor([5, 6, 5])), SCORES),
                (6, MASKS[:0], None),
            ):
                assert not path.exists()
                yielded.append(image)
                yield image, masks, scores

        write_coco_results(path, results())
        images = read_results(path).images
        assert list(images) == [1, 2, 3, 4, 5] and len(yielded) == 6
        for image in (1, 2, 3, 5):
            np.testing.assert_array_equal(images[image].masks(), MASKS)
        scores = {number: [instance.score for instance in image.instances] for number, image in images.items()}
        assert scores[2] == [1, 1, 1] and scores[4] == [0.25, 1]
        assert scores[3] == scores[5] == SCORES.tolist()
        assert [instance.category for instance in images[5].instances] == [5, 6, 5]

    def test_no_results(self, tmp_path):
        for results in ({}, [], [(1, MASKS[:0], [])], iter(())):
            write_coco_results(tmp_path / "results.json", results)
            assert json.loads((tmp_path / "results.json").read_text()) == []

    def test_whole_or_not_at_all(self, tmp_path):
        path = tmp_path / "results.json"
        write_coco_results(path, {1: (MASKS, SCORES)})
        before = path.read_bytes()

        def broken():
            yield 1, MASKS, SCORES
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_coco_results(path, broken())
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["results.json"]

    @pytest.mark.parametrize(
        ("results", "error", "message"),
        [
            ({"x": (MASKS, SCORES)}, TypeError, "image_id must be an integer, got 'x'"),
            ({1: MASKS}, TypeError, r"results must be \(image_id, masks, scores\), got \(1, array"),
            ([(1, MASKS)], TypeError, r"results must be \(image_id, masks, scores\), got \(1, array"),
            ({1: (MASKS, SCORES[:2])}, ValueError, r"scores must be \(3,\), one for each mask, got \(2,\)"),
            ({1: (MASKS, [1, 2, np.inf])}, ValueError, "scores must be finite in float32, got inf"),
            ({1: (MASKS, ["a", "b", "c"])}, TypeError, r"scores must be numbers, got \['a', 'b', 'c'\]"),
        ],
    )
    def test_errors(self, tmp_path, results, error, message):
        with pytest.raises(error, match=f"write_coco_results: {message}"):
            write_coco_results(tmp_path / "results.json", results)
        assert not os.listdir(tmp_path)

    def test_more_errors(self, tmp_path):
        with pytest.raises(ValueError, match="open_masks: masks must be 0 or 1, got 2"):
            write_coco_results(tmp_path / "results.json", {1: (MASKS * 2, None)})
        with pytest.raises(TypeError, match="category_id must be an int, got str"):
            write_coco_results(tmp_path / "results.json", {}, category_id="cat")
        with pytest.raises(FileNotFoundError, match="write_coco_results: path must be in an existing folder"):
            write_coco_results(tmp_path / "none" / "results.json", {})


class TestRefine:
    def results(self):
        """Results of two images in two categories, as CutLER's detector writes them."""
        codes = [api.encode(np.asfortranarray(mask, "u1")) for mask in MASKS]
        return [
            {
                "image_id": image,
                "category_id": category,
                "bbox": api.toBbox(codes[mask]).tolist(),
                "score": score,
                "segmentation": {"size": [2, 3], "counts": codes[mask]["counts"].decode()},
            }
            for image, category, score, mask in ((9, 1, 0.9, 0), (9, 2, 0.1, 1), (4, 1, 0.7, 1), (9, 1, 0.3, 1))
        ]

    def annotations(self):
        """Pseudo labels as MaskCut writes them: height and width are exchanged, and other fields stand beside them."""
        entries = [
            {**result, "id": index + 5, "iscrowd": 0, "width": 3, "height": 2}
            for index, result in enumerate(self.results())
        ]
        for entry in entries:
            del entry["score"]
        return {
            "info": {"description": "pseudo-masks"},
            "licenses": [{"id": 1}],
            "categories": [{"id": i, "name": "fg", "supercategory": "fg"} for i in (1, 2)],
            "images": [{"id": i, "file_name": f"{i}.jpg", "height": 3, "width": 2, "license": 1} for i in (4, 9, 2)],
            "annotations": entries,
        }

    @pytest.mark.parametrize("from_file", [False, True])
    def test_results(self, tmp_path, from_file):
        results, calls = self.results(), []
        if from_file:
            (tmp_path / "in.json").write_text(json.dumps(results))

        def refine(masks, scores, image_id):
            assert masks.dtype == bool and masks.shape[1:] == (2, 3) and scores.dtype == np.float64
            calls.append((image_id, scores.tolist()))
            return masks, scores

        refine_results(tmp_path / "in.json" if from_file else results, tmp_path / "out.json", refine)
        assert calls == [(9, [0.9, 0.3]), (9, [0.1]), (4, [0.7])]
        out = json.loads((tmp_path / "out.json").read_text())
        assert len(out) == len(results) and all(result in results for result in out)

    def test_annotations(self, tmp_path):
        refine_results(self.annotations(), tmp_path / "out.json", lambda masks, scores, _: (~masks, None))
        out = json.loads((tmp_path / "out.json").read_text())
        before = self.annotations()
        assert all(out[key] == before[key] for key in ("info", "licenses", "categories"))
        sizes = [(image["id"], image["height"], image["width"]) for image in out["images"]]
        # those of image 2, which has no mask, are exchanged like all others
        assert sizes == [(4, 2, 3), (9, 2, 3), (2, 2, 3)]
        assert out["images"][0]["file_name"] == "4.jpg" and out["images"][0]["license"] == 1
        ids = [(entry["id"], entry["image_id"], entry["category_id"]) for entry in out["annotations"]]
        assert [one[1:] for one in ids] == [(4, 1), (9, 1), (9, 1), (9, 2)]
        assert len({one[0] for one in ids}) == 4
        assert out["annotations"][0]["area"] == 4 and out["annotations"][0]["iscrowd"] == 0
        refined = read_results(tmp_path / "out.json")
        np.testing.assert_array_equal(refined.images[9].masks(), ~MASKS[[0, 1, 1]])
        with contextlib.redirect_stdout(io.StringIO()):
            assert len(COCO(str(tmp_path / "out.json")).getAnnIds(imgIds=9)) == 3

    def test_every_field_is_kept(self, tmp_path):
        content = self.annotations()
        for k, entry in enumerate(content["annotations"]):
            entry |= {"iscrowd": k % 2, "area": 2.5, "attributes": {"occluded": k}, "score": 0.5}
        polygon = {"id": 30, "image_id": 2, "category_id": 2, "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]], "area": 4.25}
        content["annotations"].append(polygon)
        refine_results(content, tmp_path / "out.json", lambda masks, scores, _: (masks, scores))
        out = {entry["id"]: entry for entry in json.loads((tmp_path / "out.json").read_text())["annotations"]}
        assert sorted(out) == [5, 6, 7, 8, 30]
        assert all(out[entry["id"]] == entry for entry in content["annotations"][:-1])
        assert out[30] == {**polygon, "bbox": [0, 0, 2, 2], "iscrowd": 0, "score": 1.0}

    def test_parts_have_ids_of_their_own(self, tmp_path):
        content = self.annotations()
        content["annotations"] = content["annotations"][:1]
        content["annotations"][0] |= {"extra": "x", "area": 2.5, "score": 0.5}

        def split(masks, scores, _):
            upper = np.zeros_like(masks)
            upper[:, :1] = True
            return np.concatenate([masks & ~upper, masks & upper]), [0.25, 0.75]

        refine_results(content, tmp_path / "out.json", split)
        lower, upper = json.loads((tmp_path / "out.json").read_text())["annotations"]
        assert (lower["id"], upper["id"]) == (5, 6) and lower["extra"] == upper["extra"] == "x"
        assert (lower["area"], upper["area"]) == (1, 2) and (lower["score"], upper["score"]) == (0.25, 0.75)
        assert (lower["bbox"], upper["bbox"]) == ([0, 1, 1, 1], [0, 0, 2, 1])

    def test_the_form_of_rle_is_kept(self, tmp_path):
        results = self.results()[:1]
        results[0]["segmentation"] = {"size": [2, 3], "counts": [0, 3, 3]}
        refine_results(results, tmp_path / "out.json", lambda masks, scores, _: (masks, scores))
        assert json.loads((tmp_path / "out.json").read_text()) == results
        refine_results(results, tmp_path / "out.json", lambda masks, scores, _: (masks | masks[:, ::-1], scores))
        (out,) = json.loads((tmp_path / "out.json").read_text())
        assert out == {**results[0], "segmentation": {"size": [2, 3], "counts": [0, 4, 2]}}

    def test_overlaps_are_removed(self, tmp_path):
        refine_results(self.results(), tmp_path / "out.json", lambda masks, s, _: (masks | True, s), exclusive=True)
        images = read_results(tmp_path / "out.json").images
        assert all(len(image.instances) == 1 for image in images.values())
        write_coco_results(tmp_path / "out.json", {1: (MASKS, SCORES)}, exclusive=True)
        (image,) = read_results(tmp_path / "out.json").images.values()
        np.testing.assert_array_equal(image.masks(), [MASKS[0] & ~MASKS[1], MASKS[1]])
        assert [instance.score for instance in image.instances] == SCORES[:2].tolist()

    def test_fewer_masks_of_another_format(self, tmp_path):
        def refine(masks, scores, image_id):
            return as_set(masks.any(0)[None], scores=torch.tensor([0.5])) if image_id == 9 else masks[:0], None

        refine_results(self.results(), tmp_path / "out.json", refine)
        (image,) = read_results(tmp_path / "out.json").images.values()
        np.testing.assert_array_equal(image.masks(), [MASKS[:2].any(0), MASKS[1]])
        assert [instance.score for instance in image.instances] == [0.5, 0.5]

    @pytest.mark.parametrize(
        ("refine", "error", "message"),
        [
            (lambda masks, *_: masks, TypeError, "refine_results: refine must return masks and scores, got ndarray"),
            (lambda masks, *_: (masks, [1.0] * 5), ValueError, r"refine_results: scores must be \(2,\), one for each"),
            (lambda masks, *_: (masks[:, :1], None), ValueError, r"masks must be of size \(2, 3\), got \(1, 3\)"),
        ],
    )
    def test_bad_results_of_refine(self, tmp_path, refine, error, message):
        with pytest.raises(error, match=message):
            refine_results(self.results(), tmp_path / "out.json", refine)
        assert not os.listdir(tmp_path)

    def test_missing_file(self, tmp_path):
        message = r"^refine_results: path must be a file that can be read, got '.*no\.json': No such file or directory$"
        with pytest.raises(FileNotFoundError, match=message):
            refine_results(tmp_path / "no.json", tmp_path / "out.json", None)
        assert not os.listdir(tmp_path)

    def test_problems_of_the_file(self, tmp_path):
        (tmp_path / "in.json").write_text("{")
        with pytest.raises(ValueError, match="refine_results: path must be a JSON file"):
            refine_results(tmp_path / "in.json", tmp_path / "out.json", None)
        (tmp_path / "in.json").write_text('[{"image_id": 1}]')
        with pytest.raises(
            ValueError, match=r"refine_results: path must be free of problems, got 1 problem in '.*in\.json'"
        ):
            refine_results(tmp_path / "in.json", tmp_path / "out.json", None)


CATEGORIES = [{"id": 7, "name": "cat", "isthing": 1}, {"id": 9, "name": "sky", "isthing": 0, "color": [1, 2, 3]}]


def read_png(path):
    """Segment ids of COCO's encoding, decoded pixel by pixel."""
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.mode == "RGB"
        pixels = picture.load()
        width, height = picture.size
        weights = (1, 256, 256**2)
        return np.array(
            [
                [sum(weight * level for weight, level in zip(weights, pixels[x, y], strict=True)) for x in range(width)]
                for y in range(height)
            ]
        )


class TestPanoptic:
    @EXAMPLES
    @given(
        ids=hnp.arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=st.integers(0, 256**3 - 1))
    )
    def test_ids_come_back(self, ids, tmp_path_factory):
        folder = tmp_path_factory.mktemp("panoptic")
        infos = [{"id": int(i), "category_id": 7} for i in np.unique(ids[ids > 0])]
        write_panoptic(folder / "p.json", folder / "p", [(5, "a/x.jpg", ids, infos)], CATEGORIES)
        np.testing.assert_array_equal(read_png(folder / "p" / "x.png"), ids)
        read = read_panoptic(folder / "p.json", folder / "p").images[5]
        np.testing.assert_array_equal(read.segment_map(), ids)
        content = json.loads((folder / "p.json").read_text())
        assert content["categories"] == [{**CATEGORIES[0], "color": [128, 0, 0]}, CATEGORIES[1]]
        assert content["images"] == [{"id": 5, "file_name": "a/x.jpg", "height": ids.shape[0], "width": ids.shape[1]}]
        (annotation,) = content["annotations"]
        assert annotation["image_id"] == 5 and annotation["file_name"] == "x.png"
        assert len(annotation["segments_info"]) == len(infos)
        for info in annotation["segments_info"]:
            code = api.encode(np.asfortranarray(ids == info["id"], "u1"))
            assert info["area"] == api.area(code) and info["bbox"] == api.toBbox(code).tolist()
            assert info["iscrowd"] == 0 and info["category_id"] == 7

    def test_dtypes_of_maps_and_further_fields(self, tmp_path):
        ids = np.array([[1, 0, 2]])
        infos = [{"id": 1, "category_id": 7, "iscrowd": 1, "score": 0.5}, {"id": 2, "category_id": 9}]
        maps = ids.astype(np.uint8), torch.from_numpy(ids).int()
        images = ((number, f"{number}.jpg", segment_map, infos) for number, segment_map in enumerate(maps))
        write_panoptic(tmp_path / "p.json", tmp_path / "p", images, CATEGORIES)
        read = read_panoptic(tmp_path / "p.json", tmp_path / "p")
        assert read.isthing == {7: True, 9: False} and list(read.images) == [0, 1]
        for image in read.images.values():
            np.testing.assert_array_equal(image.segment_map(), ids)
            assert [segment["iscrowd"] for segment in image.segments] == [1, 0]
            assert image.segments[0]["score"] == 0.5

    def test_no_images(self, tmp_path):
        write_panoptic(tmp_path / "p.json", tmp_path / "p", [], CATEGORIES)
        assert read_panoptic(tmp_path / "p.json", tmp_path / "p").images == {}

    def test_whole_or_not_at_all(self, tmp_path):
        def broken():
            yield 1, "x.jpg", np.zeros((2, 3), dtype=int), []
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_panoptic(tmp_path / "p.json", tmp_path / "p", broken(), CATEGORIES)
        assert os.listdir(tmp_path) == ["p"]

    @pytest.mark.parametrize(
        ("images", "error", "message"),
        [
            ([("1", "x", [[0]], [])], TypeError, "image_id must be an integer, got '1'"),
            (
                [(1, "x", np.zeros((1, 1)), [])],
                TypeError,
                "segment map must be an integer array or tensor, got float64",
            ),
            ([(1, "x", np.zeros(3, int), [])], ValueError, r"segment map must be \(H, W\), got \(3,\)"),
            (
                [(1, "x", np.array([[-1]]), [])],
                ValueError,
                "segment map must be from 0 to 16777215, got -1 to -1 for x.png",
            ),
            ([(1, "x", np.array([[256**3]]), [])], ValueError, "segment map must be from 0 to 16777215, got 16777216"),
            ([(1, "x", np.array([[1]]), [])], ValueError, r"segments_info must list \[1\], the ids of x.png, got \[\]"),
            ([(1, "x", np.array([[0]]), [{"id": 1}])], ValueError, r"segments_info must list \[\], .* got \[1\]"),
            (
                [(1, "x", np.array([[1]]), [{"id": 1}] * 2)],
                ValueError,
                r"segments_info must list \[1\], .* got \[1, 1\]",
            ),
            ([(1, "x", np.array([[1]]), [{}])], ValueError, r"segments_info must list \[1\], .* got \[None\]"),
            (
                [(1, "x", np.array([[1]]), [{"id": 1, "category_id": 8}])],
                ValueError,
                "category_id must be one of categories, got 8 for x.png",
            ),
            (
                [(1, "x.jpg", np.zeros((1, 1), int), []), (2, "a/x.png", np.zeros((1, 1), int), [])],
                ValueError,
                "images must differ in id and file name, got 2 and x.png again",
            ),
            (
                [(1, "x.jpg", np.zeros((1, 1), int), []), (1, "y.jpg", np.zeros((1, 1), int), [])],
                ValueError,
                "images must differ in id and file name, got 1 and y.png again",
            ),
        ],
    )
    def test_errors(self, tmp_path, images, error, message):
        with pytest.raises(error, match=f"write_panoptic: {message}"):
            write_panoptic(tmp_path / "p.json", tmp_path / "p", images, CATEGORIES)
        assert os.listdir(tmp_path) == ["p"]

    def test_categories(self, tmp_path):
        for category in ({"id": 1, "name": "x"}, {"name": "x", "isthing": 1}, {"id": 1, "name": "x", "isthing": 2}):
            with pytest.raises(
                ValueError, match="write_panoptic: categories must have id, name and isthing 0 or 1, got"
            ):
                write_panoptic(tmp_path / "p.json", tmp_path / "p", [], [category])
        assert not os.listdir(tmp_path)

    def test_colors_differ(self, tmp_path):
        count = 300
        categories = [{"id": k, "name": str(k), "isthing": 1} for k in range(count)]
        categories[7]["color"], categories[9]["color"] = [128, 0, 0], [0, 64, 0]
        write_panoptic(tmp_path / "p.json", tmp_path / "p", [], categories)
        written = json.loads((tmp_path / "p.json").read_text())["categories"]
        colors = {tuple(category["color"]) for category in written}
        assert len(colors) == count and (0, 0, 0) not in colors
        assert all(0 <= level <= 255 for color in colors for level in color)
        assert written[7] == categories[7] and "color" not in categories[0]

    def test_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="write_panoptic: path must be in an existing folder"):
            write_panoptic(tmp_path / "none" / "p.json", tmp_path / "p", [], CATEGORIES)
        assert not os.listdir(tmp_path)


class TestSegments:
    def test_hidden_masks_are_left_out(self):
        masks = np.array([[[1, 1, 1, 0]], [[1, 0, 0, 0]], [[0, 1, 1, 0]]], dtype=bool)
        ids, infos = make_panoptic_segments(as_set(masks, classes=torch.tensor([7, 8, 9])))
        np.testing.assert_array_equal(ids, [[1, 2, 2, 0]])
        assert ids.dtype == np.int32
        assert infos == [
            {"id": 1, "category_id": 8, "area": 1, "bbox": [0, 0, 1, 1], "iscrowd": 0},
            {"id": 2, "category_id": 9, "area": 2, "bbox": [1, 0, 2, 1], "iscrowd": 0},
        ]

    @EXAMPLES
    @given(masks=random_masks(st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(1, 7))), data=st.data())
    def test_segments_are_the_visible_masks(self, masks, data):
        categories = st.lists(st.integers(1, 99), min_size=len(masks), max_size=len(masks))
        classes = np.array(data.draw(categories), dtype=np.int64)
        ids, infos = make_panoptic_segments(as_set(masks, classes=torch.from_numpy(classes)))
        assert [info["id"] for info in infos] == np.unique(ids[ids > 0]).tolist() == [*range(1, len(infos) + 1)]
        np.testing.assert_array_equal(ids > 0, masks.any(0))
        expected = np.zeros(ids.shape, dtype=np.int64)  # class of the smallest mask on each pixel, the last of equals
        for index in sorted(range(len(masks)), key=lambda k: -masks[k].sum()):
            expected[masks[index]] = classes[index]
        np.testing.assert_array_equal(np.array([0, *(info["category_id"] for info in infos)])[ids], expected)
        assert sum(info["area"] for info in infos) == (ids > 0).sum()

    def test_from_tags_to_panoptic_and_back(self, tmp_path):
        class_map = np.array([[0, 15, 15, 3], [12, 255, 15, 3]], dtype=np.uint8)
        segments = make_panoptic_segments(semantic_masks(class_map, [12, 15]))
        categories = [{"id": i, "name": str(i), "isthing": 1} for i in (12, 15)]
        write_panoptic(tmp_path / "p.json", tmp_path / "p", [(1, "x.jpg", *segments)], categories)
        read = read_panoptic(tmp_path / "p.json", tmp_path / "p").images[1]
        classes = np.array([0, *(info["category_id"] for info in read.segments)])[read.segment_map()]
        np.testing.assert_array_equal(classes, np.where(np.isin(class_map, [12, 15]), class_map, 0))

    @pytest.mark.parametrize("origin", ["classes of the masks", "classes apart"])
    def test_edges_split_a_class_and_never_join_two(self, tmp_path, origin):
        # two people who touch, a dog beside the second without an edge between them, and a bottle without a tag
        first, second, dog, bottle = np.s_[5:35, 4:19], np.s_[5:35, 19:27], np.s_[5:35, 27:56], np.s_[37:40, 10:20]
        class_map = np.zeros((41, 61), np.uint8)
        for box, number in ((first, 15), (second, 15), (dog, 12), (bottle, 5), (np.s_[:2], 255)):
            class_map[box] = number
        write_palette(tmp_path / "x.png", class_map)
        edges = np.zeros(class_map.shape, np.float32)
        edges[4:36, [3, 18, 56]] = edges[[4, 35], 3:57] = 1

        with Image.open(tmp_path / "x.png") as picture:
            mask_set = semantic_masks(np.asarray(picture), tags=[15, 12])
        classes = None
        if origin == "classes apart":
            mask_set, classes = MaskSet(mask_set.masks), mask_set.classes.tolist()
        segments = make_panoptic_segments(propagate(mask_set, edges, threshold=0.5, classes=classes))
        categories = [{"id": 12, "name": "dog", "isthing": 1}, {"id": 15, "name": "person", "isthing": 1}]
        write_panoptic(tmp_path / "p.json", tmp_path / "p", [(1, "x.jpg", *segments)], categories)

        ids = read_png(tmp_path / "p" / "x.png")
        (annotation,) = json.loads((tmp_path / "p.json").read_text())["annotations"]
        category = {info["id"]: info["category_id"] for info in annotation["segments_info"]}
        assert len(category) == 3
        for box, number in ((first, 15), (second, 15), (dog, 12)):
            inside = np.zeros(ids.shape, bool)
            inside[box] = True
            segment = ids[box][0, 0]
            assert category.pop(segment) == number  # each is another segment
            np.testing.assert_array_equal((ids == segment) & (edges == 0), inside & (edges == 0))
        # without classes the second person and the dog fill their region together, and become one mask
        assert len(propagate(mask_set.masks, edges, threshold=0.5)) == 2

    def test_errors(self):
        with pytest.raises(ValueError, match="make_panoptic_segments: mask_set must have classes, got None"):
            make_panoptic_segments(as_set(MASKS))
        with pytest.raises(TypeError, match="make_panoptic_segments: mask_set must be a MaskSet, got ndarray"):
            make_panoptic_segments(MASKS)


class TestPalette:
    @pytest.mark.parametrize("like", [np.asarray, torch.from_numpy, lambda x: x.astype(np.int64)])
    def test_classes_come_back(self, tmp_path, like):
        classes = np.arange(256, dtype=np.uint8).reshape(8, 32)
        write_palette(tmp_path / "map.PNG", like(classes))
        with Image.open(tmp_path / "map.PNG") as picture:
            assert picture.format == "PNG" and picture.mode == "P"
            np.testing.assert_array_equal(np.asarray(picture), classes)
            colors = np.asarray(picture.convert("RGB")).reshape(256, 3).tolist()
        # as VOC's development kit lists them
        assert colors[:4] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
        assert colors[15] == [192, 128, 128] and colors[20] == [0, 64, 128] and colors[255] == [224, 224, 192]

    @pytest.mark.parametrize(
        ("class_map", "error", "message"),
        [
            (np.zeros((2, 3)), TypeError, "class_map must be an integer array or tensor, got float64"),
            (np.zeros((1, 2, 3), int), ValueError, r"class_map must be \(H, W\), got \(1, 2, 3\)"),
            (np.array([[0, 256]]), ValueError, "class_map must be from 0 to 255, got 0 to 256"),
            (np.array([[-1, 2]]), ValueError, "class_map must be from 0 to 255, got -1 to 2"),
        ],
    )
    def test_errors(self, tmp_path, class_map, error, message):
        with pytest.raises(error, match=f"write_palette: {message}"):
            write_palette(tmp_path / "map.png", class_map)
        assert not os.listdir(tmp_path)

    def test_ending(self, tmp_path):
        with pytest.raises(ValueError, match=r"write_palette: path must end in \.png, got"):
            write_palette(tmp_path / "map.jpg", np.zeros((2, 3), int))


POINTS = np.array([[4.0, 2], [10, 12], [30, 19]])
BOXES = np.array([[0.0, 0, 8, 8], [6, 8, 16, 16], [25, 10, 30, 19]])
SIZE = (20, 31)


class TestSam:
    """Weights are random, so that only shapes and finite values are tested."""

    @pytest.mark.parametrize("boxes", [None, BOXES])
    def test_sam(self, boxes):
        torch.manual_seed(0)
        model, processor = tiny.sam()
        image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        inputs = processor(images=image, return_tensors="pt", **make_sam_prompts(POINTS, boxes))
        sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
        assert sizes[0].tolist() == [list(SIZE)] and ("input_boxes" in inputs) == (boxes is not None)
        scale = np.array(sizes[1][0].tolist())[::-1] / np.array(SIZE)[::-1]
        np.testing.assert_allclose(inputs["input_points"][0, :, 0], POINTS * scale)
        with torch.no_grad():
            output = model(**inputs)
        assert output.iou_scores.shape == (1, 3, 3) and output.pred_masks.isfinite().all()
        (masks,) = processor.post_process_masks(output.pred_masks, *sizes)
        assert masks.shape == (3, 3, *SIZE) and masks.dtype == torch.bool

    @pytest.mark.parametrize("boxes", [None, BOXES])
    def test_sam2(self, boxes):
        """SAM's image processor, which is not called, replaces that of SAM 2, which needs torchvision."""
        from transformers.models.sam2.processing_sam2 import Sam2Processor

        torch.manual_seed(0)
        processor = Sam2Processor(tiny.sam()[1].image_processor, target_size=64)
        inputs = processor(original_sizes=[list(SIZE)], return_tensors="pt", **make_sam_prompts(POINTS, boxes))
        del inputs["original_sizes"]
        np.testing.assert_allclose(inputs["input_points"][0, :, 0], POINTS * 64 / np.array(SIZE)[::-1], rtol=1e-6)
        with torch.no_grad():
            output = tiny.sam2()(pixel_values=torch.randn(1, 3, 64, 64), **inputs)
        assert output.pred_masks.shape[:3] == (1, 3, 3) and output.pred_masks.isfinite().all()
        assert output.iou_scores.shape == (1, 3, 3)

    def test_nested_lists(self):
        prompts = make_sam_prompts(torch.from_numpy(POINTS[:2]).float(), torch.from_numpy(BOXES[:2]))
        assert prompts == {
            "input_points": [[[[4.0, 2.0]], [[10.0, 12.0]]]],
            "input_labels": [[[1], [1]]],
            "input_boxes": [BOXES[:2].tolist()],
        }

    def test_seeds(self):
        edges = np.zeros((20, 31), np.float32)
        edges[:, 12] = 1
        prompts = seeds(edges, 2, threshold=0.5)
        assert make_sam_prompts(prompts) == make_sam_prompts(prompts.points, prompts.boxes)
        with pytest.raises(
            ValueError, match="make_sam_prompts: boxes must be None with Seeds, which have boxes, got Tensor"
        ):
            make_sam_prompts(prompts, prompts.boxes)
        with pytest.raises(
            ValueError, match=r"make_sam_prompts: points must be \(k, 2\), k of at least 1, got \(0, 2\)"
        ):
            make_sam_prompts(seeds(np.ones((4, 5), np.float32), 2, threshold=0.5))

    def test_prompts_for_predictors(self):
        prompts = make_predictor_prompts(POINTS, BOXES)
        assert {name: array.shape for name, array in prompts.items()} == {
            "point_coords": (3, 1, 2),
            "point_labels": (3, 1),
            "box": (3, 4),
        }
        np.testing.assert_array_equal(prompts["point_coords"][:, 0], POINTS)
        transformed = make_predictor_prompts(torch.from_numpy(POINTS), BOXES, size=(100, 333))
        assert list(transformed) == ["point_coords", "point_labels", "boxes"]
        # 100 x 333 becomes 308 x 1024: 100 * 1024 / 333 is 307.5
        scale = np.array([1024 / 333, 3.08])
        np.testing.assert_allclose(transformed["point_coords"][:, 0], POINTS * scale, rtol=1e-6)
        np.testing.assert_allclose(transformed["boxes"], BOXES * np.tile(scale, 2), rtol=1e-6)
        with pytest.raises(ValueError, match="make_predictor_prompts: height must be at least 1, got 0"):
            make_predictor_prompts(POINTS, size=(0, 3))
        with pytest.raises(TypeError, match="make_predictor_prompts: points must be an array or a tensor, got list"):
            make_predictor_prompts(POINTS.tolist())

    def test_layouts_and_dtypes_of_arrays(self):
        expected = make_sam_prompts(POINTS, BOXES)
        for change in (
            lambda x: x[::-1].copy()[::-1],
            lambda x: x.astype(">i4"),
            lambda x: np.broadcast_to(x, x.shape),
        ):
            assert make_sam_prompts(change(POINTS), change(BOXES)) == expected
        with torch.device("meta"):
            assert make_sam_prompts(POINTS, torch.from_numpy(BOXES)) == expected

    @pytest.mark.parametrize(
        ("points", "boxes", "error", "message"),
        [
            (POINTS.tolist(), None, TypeError, "points must be an array or a tensor, got list"),
            (None, BOXES, TypeError, "points must be an array or a tensor, got NoneType"),
            (POINTS[:0], None, ValueError, r"points must be \(k, 2\), k of at least 1, got \(0, 2\)"),
            (BOXES, None, ValueError, r"points must be \(k, 2\), k of at least 1, got \(3, 4\)"),
            (POINTS[0], None, ValueError, r"points must be \(k, 2\), k of at least 1, got \(2,\)"),
            (POINTS, BOXES[:2], ValueError, r"boxes must be \(k, 4\), k = 3, got \(2, 4\)"),
            (POINTS * np.nan, None, ValueError, "points must be finite, got nan"),
            (POINTS, np.full((3, 4), np.inf), ValueError, "boxes must be finite, got inf"),
        ],
    )
    def test_errors(self, points, boxes, error, message):
        with pytest.raises(error, match=f"make_sam_prompts: {message}"):
            make_sam_prompts(points, boxes)
