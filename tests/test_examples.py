"""The programs of examples/ run, with small networks in the place of weights."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from neighbors import require
from PIL import Image

import trace_fast
from trace_fast.masks.coco import read_panoptic, read_results

ROOT = Path(__file__).resolve().parents[1]
CLASSES = np.zeros((48, 64), np.uint8)
CLASSES[8:40, 6:30], CLASSES[8:40, 30:50], CLASSES[:2] = 15, 12, 255


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """Write a photo of two objects into an empty folder; edges come from a student that sees it at 32 pixels."""
    colors = np.zeros((256, 3), np.uint8)
    colors[12], colors[15] = (200, 60, 60), (60, 200, 60)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(colors[CLASSES]).save("000000000007.png")
    small = trace_fast.load("mini", device="cpu", size=(32, 32))
    monkeypatch.setattr(trace_fast, "load", lambda *_, **__: small)
    return "000000000007.png"


def load(name):
    """Import a program of examples/."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(mask):
    from pycocotools import mask as api

    code = api.encode(np.asfortranarray(mask, dtype=np.uint8))
    counts = code["counts"].decode()
    return {"image_id": 7, "category_id": 1, "score": 0.5, "segmentation": {"size": [48, 64], "counts": counts}}


def test_quick_start(photo, capsys):
    load("quick_start").main(photo, "some/out")
    with Image.open("some/out/edges.png") as picture:
        assert picture.size == (64, 48) and picture.mode == "L"
    with Image.open("some/out/result.png") as picture:
        assert picture.height > 48 and picture.width > 4 * 64
    assert "regions, the best with a score of 0." in capsys.readouterr().out


def test_own_pipeline(photo, tmp_path, capsys):
    from tiny import sd15_pipeline

    sd15_pipeline(tmp_path / "parts").save_pretrained("model")
    load("own_pipeline").main("model", photo, "out")
    with Image.open("out/edges.png") as picture:
        assert picture.size == (64, 48)
    with Image.open("out/trace.png") as picture:
        assert picture.width == 3 * picture.height * 4 / 3
    assert "of [0, 99, 199, 299, 399, 499, 599, 699, 799, 899, 999]" in capsys.readouterr().out


def test_distill_student(photo, tmp_path, monkeypatch, caplog):
    from tiny import embedded

    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for index in range(8):
        with Image.open(photo) as picture:
            picture.rotate(5 * index).save(f"photos/{index}.png")
    caplog.set_level("INFO", "trace_fast")
    load("distill_student").main("photos", "run", str(embedded(tmp_path / "model")), "1")
    with Image.open("run/comparison.png") as picture:
        assert picture.width > 3 * 64 and picture.height > 2 * 48
    assert any("6 photos for the preview alone" in message for message in caplog.messages)


def test_dataset_job(photo, capsys):
    require("pyarrow")
    import pyarrow
    from pyarrow import parquet

    Path("images").mkdir()
    content = Path(photo).read_bytes()
    rows = {"key": ["a", "b", "c"], "bytes": [content, b"no image", content]}
    parquet.write_table(pyarrow.table(rows), "images/part-0.parquet")
    load("dataset_job").main("images", "edges", rows=2)
    table = parquet.read_table("edges/part-0.parquet").to_pydict()
    assert table["key"] == ["a", "b", "c"] and table["edges"][0] == table["edges"][2] != table["edges"][1] is None
    assert "must be an image file" in table["error"][1]
    assert capsys.readouterr().out == "part-0.parquet: 1 images failed\n"


def test_cutler_results(photo):
    Path("photos").mkdir()
    Path(photo).rename(Path("photos") / photo)
    Path("results.json").write_text(json.dumps([record(CLASSES % 255 > 0)]))
    load("cutler_results").main("results.json", "photos", "refined.json")
    (image,) = read_results("refined.json").images.values()
    assert len(image.instances) >= 1 and all(0 < instance.score <= 0.5 for instance in image.instances)


class TestSegmentAnything:
    @pytest.fixture
    def registry(self, predictor):
        return {"vit_b": lambda checkpoint: predictor.model}

    @pytest.fixture
    def predictor(self):
        from test_neighbors import make_predictor

        return make_predictor()

    def test_seeds(self, photo, registry, monkeypatch):
        module = load("sam_seeds")
        monkeypatch.setattr(module, "sam_model_registry", registry)
        module.main(photo, "sam.pth", "masks.png")
        with Image.open("masks.png") as picture:
            assert picture.size == (64, 48) and picture.mode == "RGB"

    def test_automatic_masks(self, photo, registry, monkeypatch):
        module = load("sam_automatic_masks")
        monkeypatch.setattr(module, "sam_model_registry", registry)
        options = {"points_per_side": 3, "pred_iou_thresh": -100, "stability_score_thresh": 0}
        module.main(photo, "sam.pth", "out.json", **options)
        records = json.loads(Path("out.json").read_text())
        assert records and all(one["segmentation"]["size"] == [48, 64] for one in records)
        assert all({"area", "bbox", "predicted_iou", "point_coords", "crop_box"} <= one.keys() for one in records)

    def test_a_stand_in(self, photo, monkeypatch):
        """Call both programs with a model that answers every prompt with a rectangle, as the package's would."""

        class Predictor:
            def __init__(self, model):
                self.transform, self.device = types.SimpleNamespace(target_length=1024), "cpu"

            def set_image(self, image):
                assert image.shape == (48, 64, 3) and image.dtype == np.uint8

            def predict_torch(self, point_coords, point_labels, boxes, multimask_output):
                count = len(point_coords)
                assert point_coords.shape == (count, 1, 2) and point_labels.shape == (count, 1)
                assert boxes.shape == (count, 4) and boxes.max() > 64  # in pixels of the network's image
                masks = torch.zeros(count, 1, 48, 64, dtype=torch.bool)
                masks[:, :, 8:40, 6:30] = True
                return masks, torch.ones(count, 1), None

        class Generator:
            def __init__(self, model, output_mode):
                assert output_mode == "coco_rle"

            def generate(self, image):
                fields = {"area": 768, "bbox": [6, 8, 23, 31], "predicted_iou": 0.9, "point_coords": [[9.0, 9.0]]}
                return [{"segmentation": record(CLASSES == 15)["segmentation"], **fields}]

        names = {"SamPredictor": Predictor, "SamAutomaticMaskGenerator": Generator}
        package = types.SimpleNamespace(**names, sam_model_registry={"vit_b": lambda checkpoint: None})
        monkeypatch.setitem(sys.modules, "segment_anything", package)
        load("sam_seeds").main(photo, "sam.pth", "masks.png")
        assert Path("masks.png").is_file()
        load("sam_automatic_masks").main(photo, "sam.pth", "out.json")
        assert all(one["predicted_iou"] <= 0.9 for one in json.loads(Path("out.json").read_text()))


class TestMaps:
    def test_irnet(self, photo):
        fields = {"score": np.array([0.9, 0.5]), "mask": np.stack([CLASSES == 15, CLASSES == 12]), "class": [14, 11]}
        np.save("masks.npy", fields | {"class": np.array([14, 11])}, allow_pickle=True)
        load("irnet_dhr_maps").main(photo, "masks.npy", "refined.npy")
        refined = np.load("refined.npy", allow_pickle=True).item()
        count = len(refined["score"])
        assert list(refined) == ["score", "mask", "class"] and count >= 2 and set(refined["class"]) == {11, 14}
        assert refined["mask"].shape == (count, 48, 64) and len(refined["class"]) == count

    def test_dhr(self, photo):
        soft = np.stack([CLASSES == 0, CLASSES == 15, CLASSES == 12]).astype(np.float16) * np.float16(0.75)
        torch.save({"keys": np.array([0, 15, 12]), "masks": soft}, "masks.pt")
        load("irnet_dhr_maps").main(photo, "masks.pt", "refined.pt")
        refined = torch.load("refined.pt", weights_only=False)
        # as its next step reads it: the class of the strongest mask
        class_map = refined["keys"][np.argmax(refined["masks"], axis=0)]
        assert class_map.shape == (48, 64) and {12, 15} <= set(np.unique(class_map)) <= {0, 12, 15}
        assert refined["masks"].dtype == np.float16

    def test_a_map_of_classes(self, photo):
        Image.fromarray(CLASSES).save("masks.png")
        load("irnet_dhr_maps").main(photo, "masks.png", "refined.png")
        with Image.open("refined.png") as picture:
            class_map = np.array(picture)
            assert picture.mode == "P"
        assert (class_map[:2] == 255).all() and set(np.unique(class_map)) <= {0, 12, 15, 255}


def test_supervision_detections(photo):
    require("supervision")
    load("supervision_detections").main(photo, "out.png")
    with Image.open("out.png") as picture:
        assert picture.size == (64, 48) and picture.mode == "RGB"


def test_controlnet(photo, monkeypatch, tmp_path):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
    from tiny import sd15_pipeline

    base = sd15_pipeline(tmp_path)
    controlnet = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(4, 8))
    module = load("controlnet")
    monkeypatch.setattr(module.ControlNetModel, "from_pretrained", lambda _: controlnet)
    monkeypatch.setattr(
        module.StableDiffusionControlNetPipeline,
        "from_pretrained",
        lambda _, controlnet: StableDiffusionControlNetPipeline(
            base.vae,
            base.text_encoder,
            base.tokenizer,
            base.unet,
            controlnet,
            base.scheduler,
            None,
            None,
            requires_safety_checker=False,
        ),
    )
    module.main(photo, "a cat", "out.png", resolution=64, steps=4)
    with Image.open("out.png") as picture:
        assert picture.size == (64, 64)


def test_panoptic_export(photo):
    Image.fromarray(CLASSES).save("classes.png")
    load("panoptic_export").main(photo, "classes.png", "out")
    panoptic = read_panoptic("out/panoptic.json", "out/panoptic")
    (image,) = panoptic.images.values()
    assert {segment["category_id"] for segment in image.segments} == {12, 15}
    content = json.loads(Path("out/panoptic.json").read_text())
    assert all(len(category["color"]) == 3 for category in content["categories"])


def test_every_program_is_tested():
    tested = Path(__file__).read_text()
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert len(names) >= 11 and all(f'load("{name}")' in tested for name in names)
