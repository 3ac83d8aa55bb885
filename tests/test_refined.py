"""Scores of masks from files, a baseline refined by edges, and `trace-fast segment`."""

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from degrade import degrade, group_touching
from PIL import Image
from propagation import SETS, Source, draw_on_grid, make_sets, measure, open_source
from tiny import embedded, student
from typer.testing import CliRunner

pytest.importorskip("pycocotools", reason="needs pycocotools: pip install 'trace_fast[eval]'")

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import trace_fast
from trace_fast import cli
from trace_fast.evaluation import api, evaluate, find_contours, open_dataset, open_method, refined, run
from trace_fast.io import visualize
from trace_fast.masks import coco
from trace_fast.masks.export import refine_results, write_coco_results, write_panoptic
from trace_fast.masks.formats import MaskSet
from trace_fast.masks.propagation import propagate

COLORS = np.array([[40, 40, 60], [200, 60, 60], [60, 200, 60], [70, 70, 220]], np.uint8)


@pytest.fixture
def data(tmp_path):
    """Write four numbered photographs of three instances, two of which touch, and their contours as edge maps."""
    for number in range(1, 5):
        labels = np.zeros((48, 64), np.uint8)
        labels[8:40, 4 + number : 30] = 1
        labels[8:40, 30:50] = 2
        labels[3:8, 54:62] = 3
        lines = np.uint8(255 * find_contours(labels).lines[0])
        for folder, picture in (("images", COLORS[labels]), ("inst", labels), ("lines", lines)):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(tmp_path / "data" / folder / f"{number:03}.png")
    return tmp_path / "data"


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["trace-fast", *map(str, words)])
        return CliRunner().invoke(cli.app, list(map(str, words)))

    return call


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(api, "RESAMPLES", 20)


@pytest.fixture
def baseline(data, tmp_path):
    """Write the touching two as one mask, on three of the photographs."""
    path = tmp_path / "merged.json"
    masks = {}
    for photo in open_dataset(data).photos[:3]:
        truth = photo.instances()
        first, second, third = truth.masks()
        masks[truth.id] = (np.stack([first | second, third]), np.array([0.9, 0.8]))
    write_coco_results(path, masks)
    return path


def read(folder):
    return json.loads((folder / "masks.json").read_text(), parse_constant=pytest.fail)["results"]  # NaN is not JSON


def test_results_are_scored(call, data, baseline, tmp_path, parsed):
    result = call("evaluate", "--data", data, "--results", f"ours={baseline}", "-o", "out")
    assert result.exit_code == 0, result.output
    assert len(parsed) == 1
    scores = read(tmp_path / "out")["ours"]
    assert 0 < scores["ap50"] < 1
    assert "| ours |" in (tmp_path / "out" / "masks.md").read_text()


def test_right_edges_split_merged_masks(call, data, baseline, tmp_path, monkeypatch):
    words = ["evaluate", "--data", data, "--table", "backbones", "--baseline", baseline, "--method"]
    words += [f"right=lines:{data / 'lines'}", "-o", "out"]
    result = call(*words)
    assert result.exit_code == 0, result.output
    scores = read(tmp_path / "out")
    assert list(scores) == ["merged", "merged + right"]
    assert scores["merged + right"]["ap50"] > 1.4 * scores["merged"]["ap50"]
    # one photograph of four has no masks, and small ones differ by a pixel
    assert scores["merged + right"]["ar100"] == pytest.approx(0.65, abs=0.1)

    def refuse(*_, **__):
        raise AssertionError("a finished photo was computed again")

    before = (tmp_path / "out" / "masks.json").read_bytes()
    monkeypatch.setattr(refined, "propagate", refuse)
    assert call(*words).exit_code == 0
    assert (tmp_path / "out" / "masks.json").read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "keys", "mask", "list"])
def test_a_damaged_file_is_reported_and_computed_again(call, data, baseline, tmp_path, monkeypatch, damage):
    words = ["evaluate", "--data", data, "--table", "backbones", "--baseline", baseline, "-o", "out", "--method"]
    assert call(*words, f"lines:{data / 'lines'}").exit_code == 0
    scores = read(tmp_path / "out")
    (path,) = (tmp_path / "out" / "refined").glob("*/002.json")
    content = path.read_bytes()
    record = json.loads(content)
    changed = {
        "cut": content[:-9],
        "text": b"no masks",
        "empty": b"",
        "keys": json.dumps({"stamp": record["stamp"]}).encode(),
        "mask": json.dumps(record | {"masks": [{"counts": "1"}]}).encode(),
        "list": b"[]",
    }
    path.write_bytes(changed[damage])
    computed = []

    def count(*arguments, **options):
        computed.append(arguments)
        return propagate(*arguments, **options)

    monkeypatch.setattr(refined, "propagate", count)
    result = call(*words, f"lines:{data / 'lines'}")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith(f"trace-fast: {path.relative_to(tmp_path)} is damaged and computed again: ")
    assert len(computed) == 1 and path.read_bytes() == content
    assert read(tmp_path / "out") == scores


def test_other_masks_are_refined_anew(data, baseline, tmp_path):
    photos = open_dataset(data).photos
    truth = run.read_truth(photos)
    method = open_method(f"lines:{data / 'lines'}")
    merged = coco.read_results(baseline)
    split = refined.refine_all(photos, truth, merged, method, tmp_path, threshold=0.5, mode="flood")
    again = refined.refine_all(photos, truth, split, method, tmp_path, threshold=0.5, mode="flood")
    assert sum(len(image.instances) for image in split.images.values()) == 9
    assert sum(len(image.instances) for image in again.images.values()) == 9
    for number, image in truth.images.items():
        for mask in split.images[number].masks():
            assert max((mask & other).sum() / (mask | other).sum() for other in image.masks()) > 0.7


def test_masks_are_completed_as_the_mode_says(call, data, baseline, tmp_path):
    words = ["evaluate", "--data", data, "--table", "backbones", "--baseline", baseline, "-o", "out", "--method"]
    photos = open_dataset(data).photos
    edges = open_method(f"lines:{data / 'lines'}").edges(photos[0])
    masks = coco.read_results(baseline).images[1].masks()
    results = {}
    for mode in ("fit", "flood", "walk"):
        options = ["--mode", mode, "--threshold", "0.5"]
        assert call(*words, f"lines:{data / 'lines'}", *options).exit_code == 0
        (path,) = {*(tmp_path / "out" / "refined").glob("*/001.json")} - results.keys()  # in another folder
        results[path] = [mask["area"] for mask in json.loads(path.read_bytes())["masks"]]
        expected = propagate(masks, edges, threshold=0.5, mode=mode).sum((1, 2)).tolist()
        assert sorted(results[path]) == sorted(expected)
    fitted, flooded, walked = results.values()
    assert flooded != walked and fitted != walked


@pytest.mark.slow
def test_components_of_the_embedded_model(call, data, baseline, tmp_path):
    words = ["evaluate", "--data", data, "--table", "components", "--baseline", baseline, "-o", "out", "--limit", "1"]
    result = call(*words, "--method", "mini")
    assert result.exit_code == 0, result.output
    assert list(read(tmp_path / "out")) == ["merged", "merged + mini@0", "merged + mini@iep", "merged + mini"]
    assert "2.1 M" in (tmp_path / "out" / "masks.md").read_text()


def score_by_pycocotools(truth, results):
    """Return AP, AP50, AP75, AR1, AR10 and AR100 of records of results, whatever their category."""
    oracle = COCO()
    oracle.dataset = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "fg"}]}
    for image in truth:
        oracle.dataset["images"].append({"id": image.id, "height": image.height, "width": image.width})
        for rle, instance in zip(image.rles(), image.instances, strict=True):
            entry = {"id": 1 + len(oracle.dataset["annotations"]), "image_id": image.id, "category_id": 1, "iscrowd": 0}
            oracle.dataset["annotations"].append(entry | {"segmentation": rle, "area": instance.area})
    oracle.createIndex()
    evaluator = COCOeval(oracle, oracle.loadRes(results), "segm")
    evaluator.params.useCats = 0
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator.stats[[0, 1, 2, 6, 7, 8]].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("table", ["backbones", "components"])
def test_tables_of_tiny_models_are_those_of_pycocotools(call, data, baseline, tmp_path, table):
    # the fields that CutLER's detector writes
    fields = ("image_id", "category_id", "bbox", "score", "segmentation")
    records = {"cutler": [{name: entry[name] for name in fields} for entry in json.loads(baseline.read_text())]}
    (tmp_path / "cutler.json").write_text(json.dumps(records["cutler"]))
    model = embedded(tmp_path / "tiny")
    student(model / "student", model, (32, 48))
    specs = {"tiny@0": f"{model}@0", "tiny": str(model)}
    methods = [f"{name}={spec}" for name, spec in specs.items()] if table == "backbones" else [f"tiny={model}"]
    words = [word for method in methods for word in ("--method", method)]
    words += ["--table", table, "--baseline", "cutler.json", "--threshold", "0.02", "-o", "out"]
    result = call("evaluate", "--data", data, *words)
    assert result.exit_code == 0, result.output
    rows = read(tmp_path / "out")
    truth = {image.id: image for image in (photo.instances() for photo in open_dataset(data).photos)}
    for name, spec in specs.items():
        edges = {
            photo.instances().id: open_method(spec, device="cpu").edges(photo) for photo in open_dataset(data).photos
        }

        def refine(masks, scores, number, edges=edges):
            masks = MaskSet(torch.from_numpy(masks), torch.from_numpy(scores).float())
            refined = propagate(masks, edges[number], threshold=0.02)
            return refined.masks, refined.scores

        refine_results("cutler.json", tmp_path / "refined.json", refine)
        records[f"cutler + {name}"] = json.loads((tmp_path / "refined.json").read_text())
    assert set(rows) == {*records, *["cutler + tiny@iep"] * (table == "components")}
    assert records["cutler + tiny@0"] != records["cutler"]
    for name, entries in records.items():
        expected = score_by_pycocotools(truth.values(), entries)
        names = ("ap", "ap50", "ap75", "ar1", "ar10", "ar100")
        assert [rows[name][figure] for figure in names] == pytest.approx(expected), name


@pytest.fixture
def parsed(monkeypatch):
    """Collect the JSON files of COCO's form that are parsed."""
    texts = []
    monkeypatch.setattr(coco, "json", SimpleNamespace(loads=lambda text: texts.append(text) or json.loads(text)))
    return texts


def test_panoptic_results(call, tmp_path, data, parsed):
    segments = np.zeros((48, 64), np.int32)
    segments[:, 30:] = 7
    segments[:24, :30] = 3  # void below
    categories = [{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}]
    info = [{"id": 7, "category_id": 1}, {"id": 3, "category_id": 2}]
    for name in ("truth", "results"):
        write_panoptic(
            tmp_path / f"{name}.json", tmp_path / name, [(1, "001.png", segments, info)], categories=categories
        )
    result = call(
        "evaluate", "--data", data, "--truth", tmp_path / "truth.json", "--results", "results.json", "-o", "o"
    )
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "o" / "panoptic.json").read_text())["results"]["results"]["all"]["pq"] == 1


def test_panoptic_results_need_panoptic_truth(tmp_path, data):
    ids = np.ones((48, 64), np.int32)
    categories = [{"id": 1, "name": "cat", "isthing": 1}]
    segments = [(1, "001.png", ids, [{"id": 1, "category_id": 1}])]
    write_panoptic(tmp_path / "x.json", tmp_path / "x", segments, categories=categories)
    with pytest.raises(ValueError, match="evaluate: truth must be a JSON file of panoptic segments for the results x"):
        evaluate(data, results=tmp_path / "x.json")
    with pytest.raises(ValueError, match="evaluate: baseline must be a file of masks, got panoptic segments in"):
        evaluate(data, "sobel", table="backbones", baseline=tmp_path / "x.json", truth=data / "inst")


def test_results_beside_a_table(data, baseline):
    """Other results are rows of the table, and have no parameters."""
    lines = f"right=lines:{data / 'lines'}"
    report = evaluate(data, lines, {"ours": baseline}, table="backbones", baseline=baseline)
    assert list(report.masks) == ["merged", "ours", "merged + right"]
    assert str(report.masks["ours"]) == str(report.masks["merged"])  # some figures are nan
    assert report.parameters == {"merged + right": None} and not report.edges
    assert str(report).startswith("| masks | parameters | AP |") and str(report).endswith("\n\nClass-agnostic.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--table", "backbones", "--method", "sobel"], "table and baseline must be given together"),
        (["--table", "backbones", "--baseline", "merged.json"], "methods must be given for a table, got none"),
        (
            ["--table", "components", "--baseline", "merged.json", "--method", "mini@0"],
            'methods must be one MODEL without a timestep for table="components", got mini@0',
        ),
        (
            ["--method", "sobel", "--table", "backbones", "--baseline", "merged.json", "--mode", "walk"],
            "threshold must be given with another mode than fit, got None",
        ),
        (
            ["--method", "sobel", "--threshold", "0.1", "--threshold", "0.2"],
            "threshold must be one, or one for each of 1 methods, got 2",
        ),
        (["--results", "nothing.json"], "nothing.json"),
    ],
)
def test_refusals(call, data, words, message):
    result = call("evaluate", "--data", data, "-o", "out", *words)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.slow
def test_segment_draws_what_edges_enclose(call, data, tmp_path):
    result = call("segment", data / "images", "-o", "out", "--overlay", "--threshold", "0.3")
    assert result.exit_code == 0, result.output
    labels = np.asarray(Image.open(tmp_path / "out" / "001.png"))
    assert labels.shape == (48, 64) and labels.dtype == np.uint8 and labels.max() >= 1
    assert np.asarray(Image.open(tmp_path / "out" / "001_overlay.jpg")).shape == (48, 64, 3)
    assert len(list((tmp_path / "out").glob("[!.]*"))) == 8


@pytest.mark.slow
def test_segment_separates_where_the_model_does_best(call, data, tmp_path):
    assert call("segment", data / "images" / "001.png", "-o", "out").exit_code == 0
    labels = np.asarray(Image.open(tmp_path / "out" / "001.png"))
    model = trace_fast.load("mini", device="cpu")
    masks, _ = trace_fast.instances(model(data / "images" / "001.png"), threshold=model.region_threshold)
    assert np.array_equal(labels > 0, masks.any(0)) and labels.max() == len(masks)


@pytest.mark.slow
def test_segment_keeps_the_masks_of_a_file(call, data, tmp_path):
    words = ["segment", data / "images" / "001.png", "-o", "out", "--masks", data / "inst" / "001.png", "--bits", 16]
    assert call(*words, "--threshold", "1").exit_code == 0
    labels, masks = (np.asarray(Image.open(path)) for path in (tmp_path / "out" / "001.png", data / "inst" / "001.png"))
    assert labels.dtype == np.uint16
    assert (labels[masks > 0] > 0).all()
    assert call(*words, "--threshold", "1", "--mode", "walk").exit_code == 2  # other options than before
    assert call(*words, "--threshold", "1", "--mode", "walk", "--overwrite").exit_code == 0
    walked = np.asarray(Image.open(tmp_path / "out" / "001.png"))
    expected = propagate(masks, trace_fast.edges(data / "images" / "001.png"), threshold=1, mode="walk")
    assert np.array_equal(walked, expected) and not np.array_equal(walked, labels)
    for masks in (data / "inst" / "001.png", "missing"):
        result = call("segment", data / "images", "-o", "out", "--masks", masks)
        assert result.exit_code == 2 and f"--masks must be a folder for 4 images, got '{masks}'" in result.output


def test_drawn_masks_have_outlines_and_colors():
    photo = np.full((30, 40, 3), 90, np.uint8)
    masks = np.zeros((2, 30, 40), bool)
    masks[0, 2:28, 2:38], masks[1, 8:20, 10:30] = True, True
    picture = np.asarray(visualize.draw_masks(photo, masks))
    assert (picture[0, 0] == 90).all()
    assert (picture[2, 5] == 255).all() and (picture[8, 15] == 255).all()
    assert not (picture[5, 5] == picture[14, 20]).all()
    with pytest.raises(ValueError, match=r"draw_masks: masks must be \(M, H, W\) of the image"):
        visualize.draw_masks(photo, masks[:, 1:])
    with pytest.raises(TypeError, match="draw_masks: masks must be bool, got uint8"):
        visualize.draw_masks(photo, masks.astype(np.uint8))


def test_degraded_masks():
    masks = np.zeros((4, 60, 80), bool)
    masks[0, :20, :20], masks[1, :20, 20:40], masks[2, 30:55, 5:40], masks[3, 58:60, 70:75] = True, True, True, True
    assert group_touching(masks) == [[1, 2], [3], [4]]
    degraded = degrade(masks, np.random.default_rng(0))
    assert np.array_equal(degraded[0], masks[0] | masks[1])
    assert np.array_equal(degraded[-1], masks[3])  # too small to be cut
    parts = degraded[1:-1]
    assert len(parts) == 2 and not (parts[0] & parts[1]).any()
    assert not (parts.any(0) & ~masks[2]).any() and 0.5 < parts.sum() / masks[2].sum() < 1


def test_segment_refuses_files_that_are_no_label_maps(call, data):
    image = data / "images" / "001.png"
    photo = np.asarray(Image.open(image).convert("RGB"))
    labels = np.zeros(photo.shape[:2], np.int32)
    labels[2:9, 2:9], labels[12:20, 2:9] = 65536, 131072
    Image.fromarray(photo[..., 0]).save("map.jpg")
    Image.fromarray(photo).save("map.png")
    Image.fromarray(labels / np.float32(1e5)).save("map.tif")
    Image.fromarray(labels).save("many.tif")
    Image.fromarray(photo[..., 0]).save("cut.png")
    with open("cut.png", "r+b") as file:
        file.truncate(60)
    words = ["segment", image, "-o", "out", "--masks"]
    for name, kind in (("map.jpg", "JPEG of mode L"), ("map.png", "PNG of mode RGB"), ("map.tif", "TIFF of mode F")):
        result = call(*words, name)
        message = f"--masks must be a lossless picture of one channel of integers, got '{name}': {kind}"
        assert result.exit_code == 2 and message in result.stderr
    result = call(*words, "cut.png")
    assert result.exit_code == 2 and "--masks must be a readable picture, got 'cut.png': " in result.stderr
    assert not os.path.exists("out")
    for bits, most in ((8, 254), (16, 65534)):
        result = call(*words, "many.tif", "--bits", bits)
        message = f"segment: masks must be at most {most} for a map of {bits} bits, got label 131072"
        assert result.exit_code == 1 and message in result.stderr
        assert result.stderr.endswith(": give --bits 16\n") == (bits == 8)
    assert os.listdir("out") == []


def test_a_detector_that_finds_nothing_has_an_ap_of_zero(call, data, tmp_path):
    (tmp_path / "nothing.json").write_text("[]")
    result = call("evaluate", "--data", data, "--results", "nothing.json", "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert read(tmp_path / "out")["nothing"]["ap"] == 0


def test_bad_results_are_left_out_and_named(call, data, baseline, tmp_path):
    entries = json.loads(baseline.read_text())
    entries[1]["segmentation"] = []
    (tmp_path / "bad.json").write_text(json.dumps(entries))
    command = ("evaluate", "--data", data, "--results", "bad.json", "-o", "out")
    result = call(*command)
    assert result.exit_code == 2 and "[1]: segmentation must be" in result.stderr
    result = call(*command, "--skip-bad")
    assert result.exit_code == 0 and "trace-fast: left out of bad: results[1]: segmentation must be" in result.stderr
    assert 0 < read(tmp_path / "out")["bad"]["ap"] < 1


def test_masks_with_known_faults(data):
    photo = open_dataset(data).photos[0]
    truth = photo.instances().masks()
    sets = make_sets(photo, truth)
    assert list(sets) == ["united", "grid", "felzenszwalb", "saliency"]
    assert np.array_equal(sets["united"].masks.numpy(), truth.any(0)[None])
    assert all(len(masks.scores) == len(masks.masks) for masks in sets.values())
    assert (sets["felzenszwalb"].masks.sum(0) == 1).all()
    # 48 x 64 pixels are 3 x 4 tokens; the smallest instance covers none by half
    drawn = draw_on_grid(truth)
    assert drawn.shape == (2, 48, 64)
    assert np.array_equal(drawn, drawn[:, 8::16, 8::16].repeat(16, 1).repeat(16, 2))


def test_sets_are_measured_once_for_each_source(data):
    def refuse(photo):
        raise AssertionError("edges of a finished source were computed again")

    photo, masks = open_dataset(data).photos[0], {}
    measure(photo, photo.instances(), masks, [open_source("truth=0.5")])
    assert set(masks) == {f"{name}, {row}" for name in SETS for row in ("before", "truth, fit", "truth, flood")}
    before = dict(masks)
    measure(photo, photo.instances(), masks, [Source("truth", refuse, 0.5), open_source("none")])
    assert {key: masks[key] for key in before} == before
    assert all(masks[f"{name}, none, fit"] == before[f"{name}, before"] for name in SETS)
