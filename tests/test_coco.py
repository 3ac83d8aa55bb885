"""Readers of COCO's files: every form of mask, every problem that a file may have, and the memory that is kept."""

import copy
import json
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pycocotools", reason="needs pycocotools: pip install 'trace_fast[eval]'")
from pycocotools import mask as api

from trace_fast.evaluation.masks import NAMES
from trace_fast.evaluation.report import mask_table
from trace_fast.masks import coco
from trace_fast.masks.coco import encode_masks, read_annotations, read_instances, read_panoptic, read_results
from trace_fast.masks.rle import decode_run_lengths
from trace_fast.ops import checks

DATA = Path(__file__).parent.parent / "../shared/data/dev_coco"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/dev_coco")
HEIGHT, WIDTH = 5, 7
BOX = np.zeros((HEIGHT, WIDTH), dtype=bool)
BOX[1:3, 1:4] = True
POLYGON = [1, 1, 4, 1, 4, 3, 1, 3]
RUNS = [6, 2, 3, 2, 3, 2, 17]  # down the columns, outside and inside BOX in turn


def compress(mask):
    return api.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]


def rle(counts):
    return {"size": [HEIGHT, WIDTH], "counts": counts}


def annotated(*segmentations, **more):
    """Return an annotation file of one image."""
    return {
        "images": [{"id": 3, "file_name": "x.jpg", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 1, "name": "fg"}],
        "annotations": [
            {"id": index, "image_id": 3, "category_id": 1, "segmentation": mask, "area": 6.5, "iscrowd": 0, **more}
            for index, mask in enumerate(segmentations, 1)
        ],
    }


def results(*segmentations, **more):
    return [{"image_id": 3, "category_id": 1, "segmentation": mask, "score": 0.5, **more} for mask in segmentations]


def change(data, path, value):
    """Return a copy of `data` with the value at a path such as ("images", 0, "id") replaced; `...` removes it."""
    data = copy.deepcopy(data)
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    if value is ...:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return data


class TestMasks:
    def test_every_form_gives_the_same_mask(self):
        text = compress(BOX)
        truth = read_instances(annotated([POLYGON], rle(RUNS), rle(text.decode()), rle(text)))
        assert truth.notes == ()
        (image,) = truth.images.values()
        assert (image.id, image.height, image.width, image.file_name) == (3, HEIGHT, WIDTH, "x.jpg")
        assert {instance.counts for instance in image.instances} == {text}
        masks = image.masks()
        assert masks.shape == (4, HEIGHT, WIDTH) and masks.dtype == bool
        np.testing.assert_array_equal(masks, np.broadcast_to(BOX, masks.shape))

    def test_polygons_of_an_annotation_are_one_mask(self):
        image = read_instances(annotated([POLYGON, [5, 0, 7, 0, 7, 5, 5, 5]])).images[3]
        expected = BOX.copy()
        expected[:, 5:] = True
        np.testing.assert_array_equal(image.masks()[0], expected)

    def test_an_image_without_annotations_is_kept(self):
        image = read_instances(annotated()).images[3]
        assert image.instances == [] and image.masks().shape == (0, HEIGHT, WIDTH)

    @pytest.mark.parametrize("share", [0, 0.02, 0.5, 1])
    def test_run_lengths_of_random_masks(self, share):
        random = np.random.default_rng(0)
        for shape in ((1, 1), (2, 3), (31, 17), (300, 400)):
            flat = (random.random(shape) < share).ravel(order="F")
            edges = np.flatnonzero(np.diff(np.append(0, flat))), [flat.size]
            runs = np.diff(np.concatenate([[0], *edges]))
            assert decode_run_lengths(compress(flat.reshape(shape, order="F"))).tolist() == runs.tolist()

    @pytest.mark.parametrize("seed", range(5))
    def test_round_trip_through_a_file(self, seed, tmp_path):
        random = np.random.default_rng(seed)
        stacks = [random.random((count, 31, 17)) < random.random() for count in (0, 1, 4)]
        scores = [random.normal(size=len(stack)) for stack in stacks]
        entries = [
            {"image_id": number, "category_id": 1, "segmentation": segmentation, "score": instance.score}
            for number, (stack, score) in enumerate(zip(stacks, scores, strict=True))
            for image in [encode_masks(stack, score, id=number)]
            for segmentation, instance in zip(image.rles(), image.instances, strict=True)
        ]
        for entry in entries:
            entry["segmentation"]["counts"] = entry["segmentation"]["counts"].decode()
        (tmp_path / "results.json").write_text(json.dumps(entries))
        detections = read_results(tmp_path / "results.json").images
        assert sorted(detections) == [1, 2]  # a list does not say which images have no result
        for number, image in detections.items():
            np.testing.assert_array_equal(image.masks(), stacks[number])
            assert [instance.score for instance in image.instances] == scores[number].tolist()
            assert [instance.area for instance in image.instances] == stacks[number].sum((1, 2)).tolist()

    def test_from_masks(self):
        image = encode_masks(np.stack([BOX, ~BOX]), np.array([0.5, -2]), np.array([False, True]), id=9, file_name="y")
        assert (image.id, image.file_name, image.height, image.width) == (9, "y", HEIGHT, WIDTH)
        first, second = image.instances
        assert (first.area, first.score, first.iscrowd) == (6, 0.5, False)
        assert (second.area, second.score, second.iscrowd) == (29, -2, True)
        np.testing.assert_array_equal(image.masks(), [BOX, ~BOX])
        turned = encode_masks(np.stack([BOX, ~BOX]).transpose(0, 2, 1)[:, ::-1, ::2])
        assert [instance.area for instance in turned.instances] == [BOX[::2].sum(), (~BOX[::2]).sum()]

    @pytest.mark.parametrize(
        ("masks", "keywords", "error", "message"),
        [
            (BOX[None].astype(int), {}, TypeError, "masks must be a bool array, got int64"),
            ([BOX], {}, TypeError, "masks must be a bool array, got list"),
            (BOX, {}, ValueError, r"masks must be \(M, H, W\), got \(5, 7\)"),
            (BOX[None, :, :0], {}, ValueError, r"masks must be \(M, H, W\), got \(1, 5, 0\)"),
            (BOX[None], {"scores": np.ones(2)}, ValueError, r"scores must be \(1,\), one for each mask, got \(2,\)"),
            (BOX[None], {"iscrowd": np.ones(0)}, ValueError, r"iscrowd must be \(1,\), one for each mask, got \(0,\)"),
            (BOX[None], {"scores": np.array([np.nan])}, ValueError, "scores must be finite, got nan"),
        ],
    )
    def test_from_masks_refuses(self, masks, keywords, error, message):
        with pytest.raises(error, match=f"^encode_masks: {message}$"):
            encode_masks(masks, **keywords)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools")
    @pytest.mark.parametrize("share", [0, 0.02, 0.5, 1])
    def test_decoded_as_pycocotools_does(self, share):
        random = np.random.default_rng(0)
        for shape in ((3, 1, 1), (1, 2, 3), (4, 31, 17), (2, 300, 400)):
            image = encode_masks(random.random(shape) < share)
            np.testing.assert_array_equal(image.masks(), api.decode(image.rles()).transpose(2, 0, 1))

    def test_decoded_masks_are_not_kept(self):
        stack = np.random.default_rng(0).random((1, 200, 300)) < 0.001
        images = [encode_masks(stack, id=number) for number in range(20)]
        tracemalloc.start()
        for image in images:
            assert image.masks().any()
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert held < stack.size


class TestFields:
    def test_of_the_truth(self):
        data = annotated([POLYGON], rle(RUNS))
        data["annotations"][1] |= {"iscrowd": 1, "score": 0.25, "category_id": 1.0}
        truth = read_instances(data)
        first, second = truth.images[3].instances
        assert (first.category, first.area, first.iscrowd, first.score) == (1, 6.5, False, 1.0)
        assert (second.category, second.iscrowd, second.score) == (1, True, 0.25)
        assert type(second.category) is int
        assert truth.categories == {1: "fg"}

    def test_of_results(self):
        # the box is of no use to masks, and areas are counted
        detections = read_results(results(rle(RUNS), category_id=7.0, bbox=[0, 0, 7, 5], area=35, iscrowd=1))
        (instance,) = detections.images[3].instances
        assert (instance.category, instance.area, instance.iscrowd, instance.score) == (7, 6, False, 0.5)
        assert (detections.images[3].height, detections.images[3].width) == (HEIGHT, WIDTH)
        assert read_results([]).images == {}

    def test_cutler_form(self, tmp_path):
        # as maskcut.py writes it: areas and boxes of the mask, class "fg", no scores
        data = {
            "info": {"description": "ImageNet-1K: pseudo-masks with MaskCut"},
            "licenses": [{"id": 1}],
            "categories": [{"id": 1, "name": "fg", "supercategory": "fg"}],
            "images": [{"id": 1, "file_name": "n1/a.JPEG", "height": HEIGHT, "width": WIDTH, "license": 1}],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 6, "bbox": [1.0, 1.0, 3.0, 2.0]}
                | {"segmentation": rle(compress(BOX).decode("ascii")), "width": WIDTH, "height": HEIGHT}
            ],
        }
        path = tmp_path / "cutler.json"
        path.write_text(json.dumps(data))
        for read in (read_instances, read_results):
            (instance,) = read(str(path)).images[1].instances
            assert (instance.counts, instance.area, instance.score) == (compress(BOX), 6, 1.0)
        # ProMerge adds scores and writes categories as floats
        data["annotations"][0] |= {"score": 0.75, "category_id": 1.0}
        assert read_results(data).images[1].instances[0].score == 0.75

    @pytest.mark.parametrize("read", [read_instances, read_results])
    def test_maskcut_exchanges_height_and_width(self, read):
        data = annotated(rle(RUNS), rle(compress(~BOX)))
        data["images"][0] |= {"height": WIDTH, "width": HEIGHT}
        truth = read(data)
        assert truth.notes == ("images with height and width exchanged, of which the size of the masks is used: 1",)
        np.testing.assert_array_equal(truth.images[3].masks(), [BOX, ~BOX])
        # but the masks of an image must agree
        data["annotations"][1]["segmentation"]["size"] = [WIDTH, HEIGHT]
        with pytest.raises(ValueError, match=r"must be of its image's size \(5, 7\), got \(7, 5\)"):
            read(data)

    def test_notes(self):
        data = annotated([POLYGON, [1, 1, 2, 2]], [[1, 1]], rle([35]))
        data["annotations"][0]["category_id"] = 8
        del data["annotations"][0]["area"]
        truth = read_instances(data)
        assert set(truth.notes) == {
            "polygons of fewer than three points, which are left out: 2",
            "masks without a pixel: 2",
            "annotations without an area, for which the mask is measured: 1",
            "instances of a category without a name: 1",
        }
        assert [instance.area for instance in truth.images[3].instances] == [6, 6.5, 6.5]
        np.testing.assert_array_equal(truth.images[3].masks(), [BOX, BOX & False, BOX & False])


GOOD = annotated([POLYGON], rle(RUNS))
FIRST, SECOND = ("annotations", 0), ("annotations", 1)


class TestProblems:
    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (("images",), ..., "images must be a list, got None"),
            (("annotations",), {}, "annotations must be a list, got {}"),
            (("categories",), 3, "categories must be a list, got 3"),
            (("images", 0), 5, r"images\[0\] must be an object, got 5"),
            (("images", 0, "id"), "3", r"images\[0\]: id must be an integer, got '3'"),
            (("images", 0, "height"), ..., r"images\[0\]: height must be an integer of at least 1, got None"),
            (("images", 0, "width"), 0, r"images\[0\]: width must be an integer of at least 1, got 0"),
            (("images", 0, "width"), 7.5, r"images\[0\]: width must be an integer of at least 1, got 7\.5"),
            (("images", 0, "width"), 1e300, r"images\[0\]: width must be an integer of at least 1, got 1e\+300"),
            (("images", 0, "width"), 2**30, r"images\[0\]: height and width must be at most 178956970 pixels, got 5 x"),
            (("images", 0, "id"), 2**63, r"images\[0\]: id must be an integer of 64 bits, got 9223372036854775808"),
            (
                (*FIRST, "category_id"),
                -1e30,
                r"annotations\[0\]: category_id must be an integer of 64 bits, got -1e",
            ),
            (("images",), GOOD["images"] * 2, r"images\[1\]: id must be unique, got 3 again"),
            (("categories",), GOOD["categories"] * 2, r"categories\[1\]: id must be unique, got 1 again"),
            ((*SECOND, "id"), 1, r"annotations\[1\]: id must be unique, got 1 again"),
            ((*SECOND, "id"), None, r"annotations\[1\]: id must be an integer, got None"),
            ((*FIRST, "image_id"), 4, r"annotations\[0\]: image_id must be that of a listed image, got 4"),
            ((*FIRST, "image_id"), True, r"annotations\[0\]: image_id must be an integer, got True"),
            ((*FIRST, "category_id"), ..., r"annotations\[0\]: category_id must be an integer, got None"),
            ((*FIRST, "category_id"), 1.5, r"annotations\[0\]: category_id must be an integer, got 1\.5"),
            ((*FIRST, "area"), -1, r"annotations\[0\]: area must be a finite number of at least 0, got -1"),
            ((*FIRST, "area"), "6", r"annotations\[0\]: area must be a finite number of at least 0, got '6'"),
            ((*FIRST, "iscrowd"), 2, r"annotations\[0\]: iscrowd must be 0 or 1, got 2"),
            ((*FIRST, "score"), float("nan"), r"annotations\[0\]: score must be a finite number, got nan"),
            ((*FIRST, "segmentation"), ..., r"annotations\[0\]: segmentation must be polygons or RLE, got None"),
            ((*FIRST, "segmentation"), [], r"annotations\[0\]: segmentation must be polygons or RLE, got \[\]"),
            ((*FIRST, "segmentation"), [POLYGON[:-1]], "polygon must be an even number of finite coordinates"),
            ((*FIRST, "segmentation"), [[*POLYGON[:-1], float("inf")]], "polygon must be an even number of finite"),
            ((*FIRST, "segmentation"), [[*POLYGON[:-1], float("nan")]], "polygon must be an even number of finite"),
            ((*FIRST, "segmentation"), [[*POLYGON[:-1], 1e300]], "polygon must be an even number of finite"),
            ((*FIRST, "segmentation"), [[*POLYGON[:-1], -(2**63)]], "polygon must be an even number of finite"),
            ((*FIRST, "segmentation"), [[*POLYGON[:-1], 2**63]], "polygon must be an even number of finite"),
            ((*FIRST, "segmentation"), [[*POLYGON[:-1], 10**400]], "polygon must be an even number of finite"),
            ((*FIRST, "segmentation"), [[0.5, 10**400] * 3], "polygon must be an even number of finite"),
            ((*FIRST, "segmentation"), [[0, 0, 9e5, 9e5] * 9], "polygon must be at most 8388608 pixels around, got 16"),
            ((*FIRST, "segmentation"), [[*POLYGON[:-1], None]], "polygon must be an even number of finite"),
            ((*FIRST, "segmentation"), [[*POLYGON[:-1], "3"]], "polygon must be an even number of finite"),
            ((*FIRST, "segmentation"), [[[1, 1], [4, 1], [4, 3]]], "polygon must be an even number of finite"),
            ((*FIRST, "segmentation"), [[[1], [4, 1]]], "polygon must be an even number of finite"),
            ((*FIRST, "segmentation"), [3], "polygon must be an even number of finite"),
            ((*SECOND, "segmentation", "size"), ..., r"annotations\[1\]: segmentation must be RLE with its size"),
            ((*SECOND, "segmentation", "size"), [7, 5], r"must be of its image's size \(5, 7\), got \(7, 5\)"),
            ((*SECOND, "segmentation", "size"), [5, "7"], "size must be an integer of at least 1, got '7'"),
            ((*SECOND, "segmentation", "size"), [2**20, 2**20], r"size must be at most \d+ pixels, got 1048576 x"),
            ((*SECOND, "segmentation", "counts"), [2**63, 35 - 2**63], "counts must be at least 0 and sum to"),
            ((*SECOND, "segmentation", "counts"), ..., "counts must be a list or a string, got None"),
            (
                (*SECOND, "segmentation", "counts"),
                [6, 28],
                r"counts must be at least 0 and sum to 5 \* 7, got \[6, 28\]",
            ),
            ((*SECOND, "segmentation", "counts"), [-1, 36], "counts must be at least 0 and sum to"),
            ((*SECOND, "segmentation", "counts"), [6, 29.0], "counts must be integers"),
            ((*SECOND, "segmentation", "counts"), "", "counts must be a compressed RLE, got b''"),
            ((*SECOND, "segmentation", "counts"), compress(BOX)[:-1], "counts must be at least 0 and sum to"),
            ((*SECOND, "segmentation", "counts"), compress(BOX).decode() + "Q", "counts must be a compressed RLE"),
            ((*SECOND, "segmentation", "counts"), "v" + compress(BOX).decode()[1:], "counts must be a compressed RLE"),
            ((*SECOND, "segmentation", "counts"), "6 2", "counts must be a compressed RLE"),
            ((*SECOND, "segmentation", "counts"), "6é", "counts must be a compressed RLE"),
            ((*SECOND, "segmentation", "counts"), "o" * 9 + "0", "counts must be a compressed RLE of 32-bit lengths"),
            ((*SECOND, "segmentation", "counts"), "OT1", "counts must be at least 0 and sum to"),  # -1, 36
        ],
    )
    def test_of_annotations(self, path, value, message):
        assert read_instances(GOOD).notes == ()
        with pytest.raises(ValueError, match=r"^read_instances: path must be free of problems, got") as caught:
            read_instances(change(GOOD, path, value))
        assert "in the given data:\n" in str(caught.value)
        caught.match(message)

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (("score",), ..., "score must be a finite number, got None"),
            (("score",), float("inf"), "score must be a finite number, got inf"),
            (("score",), 10**400, "score must be a finite number, got 1000"),
            (("score",), True, "score must be a finite number, got True"),
            (("segmentation",), [POLYGON], "segmentation must be RLE with its size"),
            (("segmentation", "size"), [5, 6], r"must be of its image's size \(5, 7\), got \(5, 6\)"),
            (("segmentation", "counts"), [35, 1], "counts must be at least 0 and sum to"),
            (("image_id",), None, "image_id must be an integer, got None"),
        ],
    )
    def test_of_results(self, path, value, message):
        good = results(rle(RUNS), rle(RUNS))
        assert len(read_results(good).images[3].instances) == 2
        with pytest.raises(ValueError, match=rf"got 1 problem in the given data:\n  results\[1\]: .*{message}"):
            read_results(change(good, (1, *path), value))

    def test_lengths_whose_sum_overflows(self):
        """Sum to 5 * 7 modulo 2^64 by lengths that grow up to 2^48."""
        count = 100_000
        multiples = np.maximum(np.arange(count) - 1, 0) // 2
        step, rest = divmod(2**64 + 35, int(multiples.sum()))
        differences = [0, 0, 0, *[step] * (count - 4), step + rest]
        assert step + rest < 2**34
        counts = "".join(
            chr(48 + (value >> 5 * digit & 31 | 32 * (digit < 6))) for value in differences for digit in range(7)
        )
        assert decode_run_lengths(counts.encode()).sum() == 35
        with pytest.raises(ValueError, match="counts must be at least 0 and sum to"):
            read_instances(change(GOOD, (*SECOND, "segmentation", "counts"), counts))

    def test_masks_that_do_not_fit_are_refused_before_they_are_decoded(self, monkeypatch):
        monkeypatch.setattr(checks, "MEMORY", 60)
        image = read_instances(GOOD).images[3]
        with pytest.raises(ValueError, match=r"^masks: instances must be small enough for .* got \(2, 5, 7\)"):
            image.masks()

    def test_all_problems_are_listed_at_once(self, tmp_path):
        data = annotated(rle(RUNS), [POLYGON[:-1]], rle([1]))
        data["annotations"].append({**data["annotations"][0], "id": 4, "image_id": 99})
        data["images"].append({"id": 3})
        (tmp_path / "x.json").write_text(json.dumps(data))
        with pytest.raises(ValueError, match=r"got 4 problems in '.*x\.json'") as caught:
            read_instances(tmp_path / "x.json")
        lines = str(caught.value).splitlines()[1:]
        assert [line.split(":")[0].strip() for line in lines] == [
            "images[1]",
            "annotations[1]",
            "annotations[2]",
            "annotations[3]",
        ]

    def test_an_image_without_a_size_is_one_problem(self):
        with pytest.raises(ValueError, match="got 1 problem in"):
            read_instances(change(GOOD, ("images", 0, "height"), None))

    def test_a_long_list_is_cut(self):
        with pytest.raises(ValueError, match="got 50 problems in") as caught:
            read_results(results(*[rle([1])] * 50))
        lines = str(caught.value).splitlines()
        assert len(lines) == 22 and lines[-1] == "  and 30 more"

    @pytest.mark.parametrize("read", [read_instances, read_results])
    def test_of_the_file_itself(self, read, tmp_path):
        (tmp_path / "x.json").write_text("{")
        with pytest.raises(ValueError, match=rf"^{read.__name__}: path must be a JSON file, got '.*x.json': Expecting"):
            read(tmp_path / "x.json")
        message = rf"^{read.__name__}: path must be a file that can be read, got"
        with pytest.raises(FileNotFoundError, match=rf"{message} '.*none\.json': No such file or directory$"):
            read(tmp_path / "none.json")
        with pytest.raises(IsADirectoryError, match=rf"{message} '.*': Is a directory$"):
            read(tmp_path)
        with pytest.raises(ValueError, match=rf"^{read.__name__}: path must hold .*, got 3 in the given data$"):
            read(3)
        with pytest.raises(ValueError, match=r"path must hold an object with images and annotations, got \[\] in"):
            read_instances([])

    def test_pycocotools_is_named_where_it_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pycocotools", None)
        for call in (lambda: read_instances(GOOD), lambda: read_results([]), lambda: encode_masks(BOX[None])):
            with pytest.raises(RuntimeError, match=r"pycocotools must be installed"):
                call()


def write_map(path, ids):
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)).save(path)


@pytest.fixture
def panoptic(tmp_path):
    """Write a panoptic file of two images, the second all void, and its folder."""
    first = np.array([[0, 5, 5], [300, 300, 16_000_000]])
    write_map(tmp_path / "a.png", first)
    write_map(tmp_path / "b.png", np.zeros((1, 1), dtype=int))
    segments = [
        {"id": 5, "category_id": 1, "iscrowd": 0, "area": 2},
        {"id": 300, "category_id": 2},
        {"id": 16_000_000, "category_id": 1.0, "iscrowd": 1},
    ]
    data = {
        "images": [
            {"id": 1, "file_name": "a.jpg", "height": 2, "width": 3},
            {"id": 2, "file_name": "b.jpg", "height": 1, "width": 1},
        ],
        "categories": [{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}],
        "annotations": [
            {"image_id": 1, "file_name": "a.png", "segments_info": segments},
            {"image_id": 2, "file_name": "b.png", "segments_info": []},
        ],
    }
    return data, tmp_path, first


class TestPanoptic:
    def test_reads(self, panoptic):
        data, folder, ids = panoptic
        (folder / "x.json").write_text(json.dumps(data))
        truth = read_panoptic(folder / "x.json", str(folder))
        assert truth.notes == ()
        assert truth.categories == {1: "cat", 2: "sky"} and truth.isthing == {1: True, 2: False}
        image = truth.images[1]
        assert (image.id, image.height, image.width, image.file_name) == (1, 2, 3, "a.jpg")
        segment_map = image.segment_map()
        assert segment_map.dtype == np.int32
        np.testing.assert_array_equal(segment_map, ids)
        assert [segment["iscrowd"] for segment in image.segments] == [0, 0, 1]
        assert [segment["category_id"] for segment in image.segments] == [1, 2, 1]
        assert truth.images[2].segment_map().tolist() == [[0]]

    def test_an_image_without_an_annotation_is_noted(self, panoptic):
        data, folder, _ = panoptic
        del data["annotations"][1]
        truth = read_panoptic(data, folder)
        assert list(truth.images) == [1] and truth.notes == ("images without an annotation, which are left out: 1",)

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (("categories",), ..., "categories must be a list, got None"),
            (("categories", 0, "isthing"), ..., r"categories\[0\]: isthing must be 0 or 1, got None"),
            (("images", 1, "id"), 1, r"images\[1\]: id must be unique, got 1 again"),
            (("annotations", 1, "image_id"), 1, r"annotations\[1\]: image_id must be unique, got 1 again"),
            (("annotations", 1, "image_id"), 7, r"annotations\[1\]: image_id must be that of a listed image, got 7"),
            (("annotations", 1, "file_name"), ..., r"annotations\[1\]: file_name must be that of a PNG, got None"),
            (
                ("annotations", 1, "file_name"),
                "c.png",
                r"annotations\[1\]: c.png must be a file of the folder, got none",
            ),
            (("annotations", 1, "segments_info"), ..., r"annotations\[1\].segments_info must be a list, got None"),
            (("images", 1, "width"), 4, r"annotations\[1\]: b.png must be 1 x 4 like its image, got \(1, 1\)"),
        ],
    )
    def test_problems(self, panoptic, path, value, message):
        data, folder, _ = panoptic
        with pytest.raises(ValueError, match=r"^read_panoptic: path must be free of problems, got") as caught:
            read_panoptic(change(data, path, value), folder)
        caught.match(message)

    @pytest.mark.parametrize(
        ("key", "value", "messages"),
        [
            ("id", 0, ["segments_info[0]: id must be an integer of at least 1, got 0", "got [5] not in the JSON"]),
            ("id", 300, ["segments_info[1]: id must be unique, got 300 again", "got [5] not in the JSON"]),
            ("id", 6, ["got [5] not in the JSON", "got [6] not in the PNG"]),
            ("category_id", 9, ["segments_info[0]: category_id must be that of a listed category, got 9"]),
            ("iscrowd", None, ["segments_info[0]: iscrowd must be 0 or 1, got None"]),
        ],
    )
    def test_problems_of_segments(self, panoptic, key, value, messages):
        data, folder, _ = panoptic
        data["annotations"][0]["segments_info"][0][key] = value
        with pytest.raises(ValueError, match=f"got {len(messages)} problem") as caught:
            read_panoptic(data, folder)
        for line, message in zip(str(caught.value).splitlines()[1:], messages, strict=True):
            assert line.startswith("  annotations[0]") and line.endswith(message)

    def test_problems_of_files_are_listed_at_once(self, panoptic):
        data, folder, _ = panoptic
        data["images"] += [{"id": n, "height": 1, "width": 1} for n in (3, 4)]
        data["annotations"] += [{"image_id": n, "file_name": f"{n}.png", "segments_info": []} for n in (3, 4)]
        whole = (folder / "a.png").read_bytes()
        (folder / "a.png").write_bytes(whole[: len(whole) // 2])
        (folder / "b.png").write_text("not a picture")
        Image.new("L", (1, 1)).save(folder / "3.png")
        with pytest.raises(ValueError, match="got 4 problems") as caught:
            read_panoptic(data, folder)
        lines = str(caught.value).splitlines()[1:]
        for line, name in zip(lines, ("a.png", "b.png", "3.png"), strict=False):
            assert f"{name} must be a readable RGB PNG, got" in line
        assert lines[2].endswith("got mode L")
        assert lines[3].endswith("4.png must be a file of the folder, got none")


class TestReadAnnotations:
    """The kind of a file is recognized, and the file is parsed once."""

    @pytest.fixture
    def parsed(self, monkeypatch):
        """Collect the JSON texts that are parsed."""
        texts = []
        monkeypatch.setattr(coco, "json", SimpleNamespace(loads=lambda text: texts.append(text) or json.loads(text)))
        return texts

    def test_panoptic_segments(self, panoptic, parsed):
        data, folder, ids = panoptic
        (folder / "x").mkdir()
        for name in ("a.png", "b.png"):
            (folder / name).rename(folder / "x" / name)
        (folder / "x.json").write_text(json.dumps(data))
        for results in (False, True):
            segments = read_annotations(folder / "x.json", results=results)
            np.testing.assert_array_equal(segments.images[1].segment_map(), ids)
        assert len(parsed) == 2

    def test_masks(self, tmp_path, parsed):
        (tmp_path / "truth.json").write_text(json.dumps(annotated([POLYGON], iscrowd=1)))
        (tmp_path / "results.json").write_text(json.dumps(results(rle(RUNS))))
        truth = read_annotations(tmp_path / "truth.json")
        assert truth == read_instances(annotated([POLYGON], iscrowd=1)) and truth.images[3].instances[0].iscrowd
        assert read_annotations(tmp_path / "results.json", results=True) == read_results(results(rle(RUNS)))
        assert len(parsed) == 2

    @pytest.mark.parametrize("segmentation", [[], [[]], [POLYGON[:-1]], rle([1]), None, 3])
    def test_bad_records_are_left_out(self, tmp_path, segmentation):
        data = annotated(rle(RUNS), segmentation, [POLYGON])
        data["images"].append({**data["images"][0], "id": 4})
        data["annotations"][2]["image_id"] = 4
        (tmp_path / "truth.json").write_text(json.dumps(data))
        (tmp_path / "results.json").write_text(json.dumps(results(rle(RUNS), segmentation, rle(RUNS))))
        for name, as_results in (("truth", False), ("results", True)):
            path = tmp_path / f"{name}.json"
            if segmentation == [[]] and not as_results:  # polygons without a point cover none
                continue
            with pytest.raises(ValueError, match="1 problem in"):
                read_annotations(path, results=as_results)
            instances = read_annotations(path, results=as_results, skip_bad=True)
            assert len(instances.left_out) == 1 and "[1]: " in instances.left_out[0]
            if as_results:
                assert [len(image.instances) for image in instances.images.values()] == [2]
            else:
                # the image with a bad annotation is left out, and the other one is whole
                assert list(instances.images) == [4] and len(instances.images[4].instances) == 1

    def test_missing_lists_are_no_bad_records(self, tmp_path):
        (tmp_path / "x.json").write_text('{"annotations": 3, "images": []}')
        with pytest.raises(ValueError, match="annotations must be a list"):
            read_annotations(tmp_path / "x.json", skip_bad=True)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"annotations": [1]}', '{"annotations": 3}'])
    def test_the_file_of_a_problem_is_named(self, tmp_path, text):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=r"^read_annotations: path must .*'.*x\.json'"):
            read_annotations(tmp_path / "x.json")


def test_a_table_has_blanks_where_the_truth_has_nothing():
    row = dict.fromkeys(NAMES, 0.25) | {"ap_small": np.nan, "intervals": None}
    nothing = dict.fromkeys(NAMES, np.nan) | {"intervals": {"ap": (np.nan, np.nan)}}
    _, _, some, none = mask_table({"some": row, "none": nothing}).splitlines()
    assert some == "| some | 0.250 | 0.250 to 0.250 | 0.250 | 0.250 |  | 0.250 | 0.250 | 0.250 |"
    assert none == "| none |  |  |  |  |  |  |  |  |"


@needs_data
class TestPhotographs:
    def test_instances(self, tmp_path):
        data = {"images": [], "annotations": []}
        maps = {}
        for path in sorted((DATA / "inst").iterdir())[:20]:
            labels = np.array(Image.open(path))
            number = int(path.stem)
            data["images"].append({"id": number, "height": labels.shape[0], "width": labels.shape[1]})
            maps[number] = []
            for label in np.unique(labels[labels > 0]):
                mask = labels == label
                segmentation = {"size": list(mask.shape), "counts": compress(mask).decode()}
                entry = {"id": len(data["annotations"]) + 1, "image_id": number, "category_id": 1}
                entry |= {"iscrowd": int(label == 65535), "segmentation": segmentation, "area": int(mask.sum())}
                data["annotations"].append(entry)
                maps[number].append(mask)
        (tmp_path / "x.json").write_text(json.dumps(data))
        truth = read_instances(tmp_path / "x.json")
        assert truth.notes == () and len(data["annotations"]) > 50
        for number, masks in maps.items():
            np.testing.assert_array_equal(truth.images[number].masks(), masks)

    @pytest.mark.slow
    def test_panoptic(self, tmp_path):
        data = {"images": [], "annotations": [], "categories": [{"id": 1, "isthing": 1}]}
        maps = {}
        for path in sorted((DATA / "panoptic").iterdir())[:20]:
            maps[int(path.stem)] = ids = np.array(Image.open(path)).astype(int) * 4001
            write_map(tmp_path / path.name, ids)
            data["images"].append({"id": int(path.stem), "height": ids.shape[0], "width": ids.shape[1]})
            segments = [{"id": x, "category_id": 1} for x in np.unique(ids[ids > 0]).tolist()]
            data["annotations"].append({"image_id": int(path.stem), "file_name": path.name, "segments_info": segments})
        truth = read_panoptic(data, tmp_path)
        assert truth.notes == () and len(truth.images) == 20
        for number, ids in maps.items():
            np.testing.assert_array_equal(truth.images[number].segment_map(), ids)
