"""`trace-fast segment` on edge maps that are exact: label maps, COCO results, void, and the options of `edges`."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("pycocotools", reason="needs pycocotools: pip install 'trace_fast[eval]'")

import trace_fast
from trace_fast import cli
from trace_fast.evaluation import find_contours

LABELS = np.zeros((48, 64), np.uint8)
LABELS[8:40, 6:30], LABELS[8:40, 30:50] = 1, 2


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Write photographs 7 and 42, their exact edges and label maps of one mask over two objects; run the command."""
    for folder in ("photos", "edges", "merged"):
        (tmp_path / folder).mkdir()
    whole = np.where(LABELS > 0, np.uint8(9), 0)
    whole[:2] = 255
    for name in ("007", "42"):
        Image.fromarray(np.repeat(100 * LABELS[..., None], 3, -1)).save(tmp_path / "photos" / f"{name}.jpg")
        Image.fromarray(np.uint8(255 * find_contours(LABELS).lines[0])).save(tmp_path / "edges" / f"{name}.png")
        Image.fromarray(whole).save(tmp_path / "merged" / f"{name}.png")
    monkeypatch.chdir(tmp_path)

    def call(*words):
        return CliRunner().invoke(cli.app, ["segment", "photos", "-o", "out", "--overwrite", *map(str, words)])

    return call


def read(path):
    with Image.open(path) as picture:
        return picture.mode, np.asarray(picture)


def read_json(path):
    return json.loads(Path(path).read_text())


class TestLabelMaps:
    def test_a_palette_that_viewers_show(self, call):
        result = call("--edges", "edges", "--overlay")
        assert (result.exit_code, result.stdout) == (0, "2 of 2 written to out\n"), result.output
        mode, labels = read("out/007.png")
        assert mode == "P" and labels.shape == (48, 64) and set(np.unique(labels)) == {1, 2, 3}
        with Image.open("out/007.png") as picture:
            colors = np.asarray(picture.convert("RGB"))
        assert len(np.unique(colors.reshape(-1, 3), axis=0)) == 3
        for box in (np.s_[10:38, 8:28], np.s_[10:38, 32:48], np.s_[:6]):
            assert len(np.unique(labels[box])) == 1
        assert read("out/42_overlay.jpg")[1].shape == (48, 64, 3)

    def test_16_bits(self, call):
        assert call("--edges", "edges").exit_code == 0
        expected = read("out/42.png")[1]
        assert call("--edges", "edges", "--bits", 16).exit_code == 0
        mode, labels = read("out/42.png")
        assert mode.startswith("I") and np.array_equal(labels, expected)

    def test_the_best_of_all_levels(self, call):
        assert call("--edges", "edges", "--top", 2, "--coco", "top.json").exit_code == 0
        results = read_json("top.json")
        assert len(results) == 4 and all(0 < result["score"] <= 1 for result in results)
        assert call("--edges", "edges", "--top", 1, "--threshold", 0.5).exit_code == 0
        assert set(np.unique(read("out/42.png")[1])) == {0, 1}

    def test_areas(self, call):
        assert call("--edges", "edges", "--min-area", 650).exit_code == 0
        labels = read("out/42.png")[1]
        assert len(np.unique(labels)) == 2  # the smaller of both objects has 640 pixels, and less off the edges

    def test_overlaps_are_removed(self, call):
        total = {}
        for words in ((), ("--exclusive",)):
            assert call("--edges", "edges", "--top", 20, "--coco", "top.json", *words).exit_code == 0
            results = [one for one in read_json("top.json") if one["image_id"] == 7]
            total[words] = sum(result["area"] for result in results)
        assert total[("--exclusive",)] <= 48 * 64 and total[()] > total[("--exclusive",)]


class TestCocoResults:
    # pycocotools' decode
    @pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
    def test_pycocotools_reads_them(self, call):
        from pycocotools.coco import COCO

        assert call("--edges", "edges", "--coco", "results.json").exit_code == 0
        images = [{"id": number, "height": 48, "width": 64} for number in (7, 42)]
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = {"images": images, "categories": [{"id": 1}], "annotations": []}
            truth.createIndex()
            read_results = truth.loadRes("results.json")
        labels = read("out/007.png")[1]
        results = read_results.loadAnns(read_results.getAnnIds(imgIds=7))
        assert len(results) == labels.max()
        for result, written in zip(results, read_json("results.json"), strict=False):
            mask = read_results.annToMask(result).astype(bool)
            assert len(np.unique(labels[mask])) == 1 and written["area"] == mask.sum()

    def test_ids_of_images(self, call, tmp_path):
        (tmp_path / "photos" / "007.jpg").rename(tmp_path / "photos" / "a.jpg")
        (tmp_path / "edges" / "007.png").rename(tmp_path / "edges" / "a.png")
        assert call("--edges", "edges", "--coco", "results.json").exit_code == 0
        assert {result["image_id"] for result in read_json("results.json")} == {1, 2}

    def test_the_images_that_do_not_fail(self, call, tmp_path):
        (tmp_path / "edges" / "42.png").unlink()
        result = call("--edges", "edges", "--coco", "results.json")
        assert result.exit_code == 1 and "42.png" in result.stderr
        assert {result["image_id"] for result in read_json("results.json")} == {7}


class TestMasks:
    def test_a_folder_with_void(self, call):
        words = ("--edges", "edges", "--masks", "merged", "--mode", "flood")
        assert call(*words, "--coco", "results.json").exit_code == 0
        mode, labels = read("out/007.png")
        assert mode == "P" and (labels[:2] == 255).all()
        first, second = np.unique(labels[10:38, 8:28]), np.unique(labels[10:38, 32:48])
        assert len(first) == len(second) == 1 and first != second and {*first, *second} == {1, 9}
        assert len(read_json("results.json")) == 4
        assert call(*words, "--bits", 16).exit_code == 0
        assert (read("out/007.png")[1][:2] == 65535).all()

    def test_other_labels_of_void(self, call):
        words = ("--edges", "edges", "--masks", "merged", "--ignore", 9, "--bits", 16)
        assert call(*words).exit_code == 0
        labels = read("out/007.png")[1]
        # 9 is void now, and 255 is a mask
        assert (labels[10:38, 8:28] == 65535).all() and (labels[:2] == 255).all()

    def test_the_largest(self, call):
        assert call("--edges", "edges", "--masks", "merged", "--top", 1).exit_code == 0
        labels = read("out/007.png")[1]
        assert len(np.unique(labels)) == 3 and (labels[10:38, 8:28] > 0).all() and not labels[10:38, 34:46].any()

    def test_one_file(self, call, tmp_path):
        (tmp_path / "photos" / "007.jpg").unlink()
        assert call("--edges", "edges", "--masks", "merged/42.png").exit_code == 0
        result = call("--edges", "edges", "--masks", "photos/42.jpg")
        assert result.exit_code == 2 and "--masks must be a lossless picture of one channel" in result.stderr

    def test_a_folder_without_one(self, call, tmp_path):
        (tmp_path / "merged" / "42.png").unlink()
        result = call("--edges", "edges", "--masks", "merged")
        message = "trace-fast: --masks must hold a label map of each image, got no 42.png in 'merged'\n"
        assert (result.exit_code, result.stderr) == (2, message)


class TestEdges:
    def test_a_map_of_another_size(self, call, tmp_path):
        Image.new("L", (9, 9)).save(tmp_path / "edges" / "42.png")
        result = call("--edges", "edges")
        assert result.exit_code == 1
        assert "segment: edges must be of the image's size (48, 64), got (9, 9) in 'edges'" in result.stderr

    def test_a_map_that_is_missing(self, call, tmp_path):
        (tmp_path / "edges" / "42.png").unlink()
        result = call("--edges", "edges")
        assert result.exit_code == 1
        assert "segment: edges must hold an edge map of the image, got no 42.png in 'edges'" in result.stderr

    def test_no_folder(self, call):
        result = call("--edges", "nowhere")
        assert (result.exit_code, result.stderr) == (
            2,
            "trace-fast: --edges must be a folder of edge maps, got 'nowhere'\n",
        )

    def test_saved_edges_are_used_again(self, call):
        words = ("--device", "cpu", "--threshold", 0.3)
        assert call(*words, "--save-edges", "saved", "--size", "32x48").exit_code == 0
        mode, edges = read("saved/42.png")
        assert mode.startswith("I")
        expected = trace_fast.edges("photos/42.jpg", size=(32, 48), device="cpu")
        np.testing.assert_allclose(edges / 65535, expected, atol=1e-4)
        first = read("out/42.png")[1]
        assert call("--edges", "saved", "--threshold", 0.3).exit_code == 0
        assert np.mean(read("out/42.png")[1] == first) > 0.9

    @pytest.mark.slow
    def test_options_of_the_search(self, call):
        words = ("--size", "32x48", "--device", "cpu", "--save-edges", "saved")
        assert call(*words, "--stage", 1, "--timestep", 99, "--noising", "gaussian", "--seed", 3).exit_code == 0
        tracer = trace_fast.load("mini", stage=1, size=(32, 48), device="cpu")
        traced = tracer("photos/42.jpg", timestep=99, noising="gaussian", seed=3)
        np.testing.assert_allclose(read("saved/42.png")[1] / 65535, traced.edges[0, 0].numpy(), atol=1e-4)
        result = call(*words, "--stage", 2, "--timestep", 99)
        message = "trace-fast: --timestep, --noising and --curve are options of the search: give --stage 1 with them\n"
        assert (result.exit_code, result.stderr) == (2, message)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--masks", "merged", "--save-edges", "merged"), "would replace the input 'merged/007.png'"),
        (("--edges", "edges", "--save-edges", "edges"), "would replace the input 'edges/007.png'"),
        (("--edges", "edges", "--save-edges", "out"), "would both be written to 'out/007.png'"),
        (("--edges", "edges", "--masks", "out"), "would replace the input 'out/007.png'"),
    ],
    ids=["masks", "edges", "output", "output of masks"],
)
def test_nothing_is_replaced_by_what_comes_of_it(call, tmp_path, words, reason):
    shutil.copytree(tmp_path / "merged", tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    result = call(*words, "--size", "32x48", "--device", "cpu")
    assert result.exit_code == 2 and reason in result.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == before
