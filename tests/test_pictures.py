"""trace_fast.io.pictures: only raster images are opened, everywhere, and no other program is started for a file."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from typer.testing import CliRunner

import trace_fast
from trace_fast.cli import app
from trace_fast.evaluation import read_map
from trace_fast.evaluation.data import open_dataset
from trace_fast.evaluation.run import check_photos
from trace_fast.io.images import read_image
from trace_fast.masks.coco import read_panoptic
from trace_fast.training.data import list_photos
from trace_fast.training.scenes.dataset import SceneFile, read_scene

PACKAGE = Path(trace_fast.__file__).parent
POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EndComments\n0 0 moveto 9 9 lineto stroke\nshowpage\n"
)
# what opens a file by its content and may start a program for it
OPENERS = ("Image.open", "imread")


@pytest.fixture(autouse=True)
def ghostscript(tmp_path, monkeypatch):
    """Put a `gs` on PATH that leaves a file behind when it is started; there must be none after the test."""
    folder = tmp_path / "bin"
    folder.mkdir()
    started = folder / "started"
    (folder / "gs").write_text(f"#!/bin/sh\ntouch {started}\nexit 0\n")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for the program once
    yield started
    assert not started.exists()


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(POSTSCRIPT)
    return path


@pytest.mark.skipif(os.name == "nt", reason="the program is a shell script")
def test_pillow_would_start_the_program(tmp_path, ghostscript):
    with Image.open(write(tmp_path / "photo.jpg")) as picture:
        assert picture.format == "EPS"
        with contextlib.suppress(Exception):  # the program writes no picture
            picture.load()
    assert ghostscript.exists()
    ghostscript.unlink()


def test_an_image_of_the_api(tmp_path):
    with pytest.raises(ValueError, match=r"^edges: image must be an image file, got '.*photo\.jpg', which Pillow"):
        read_image(write(tmp_path / "photo.jpg"))


def test_an_image_that_the_caller_opened(tmp_path):
    with (
        Image.open(write(tmp_path / "photo.jpg")) as picture,
        pytest.raises(ValueError, match=r"^edges: image must be a raster image, got PostScript in a PIL image"),
    ):
        read_image(picture)


def test_edges_of_a_folder(tmp_path):
    write(tmp_path / "photos" / "photo.jpg")
    result = CliRunner().invoke(app, ["edges", str(tmp_path / "photos"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 1 and "must be an image file" in result.stderr


def test_photos_of_training(tmp_path):
    write(tmp_path / "photos" / "photo.jpg")
    with tarfile.open(tmp_path / "photos" / "more.tar", "w") as archive:
        archive.add(tmp_path / "photos" / "photo.jpg", "member.png")
    photos = list_photos(tmp_path / "photos")
    assert [photo.name for photo in photos] == ["more.tar/member.png", "photo.jpg"]
    for photo in photos:
        with pytest.raises(ValueError, match="must be an image file"):
            photo.read()


def test_scenes(tmp_path):
    for image, instances in ((write(tmp_path / "a.jpg"), tmp_path / "b.png"), (tmp_path / "c.jpg", tmp_path / "a.jpg")):
        for path in {image, instances} - {tmp_path / "a.jpg"}:
            Image.new("L", (64, 48)).save(path)
        with pytest.raises(ValueError, match="must be an image file"):
            read_scene(SceneFile(image, instances))


def test_edge_maps(tmp_path):
    with pytest.raises(ValueError, match="must be an image file"):
        read_map(write(tmp_path / "map.png"))


@pytest.mark.parametrize("truth", ["inst/a.png", "inst/a/1.png"])
def test_ground_truth_of_evaluate(tmp_path, truth):
    write(tmp_path / truth)
    photos, problems, _ = check_photos(open_dataset(tmp_path).photos, [])
    assert not photos and "must be an image file" in problems[0]


def test_photos_of_evaluate(tmp_path):
    (tmp_path / "inst").mkdir()
    Image.fromarray(np.eye(48, 64, dtype=np.uint8)).save(tmp_path / "inst" / "a.png")
    write(tmp_path / "images" / "a.jpg")
    arguments = ["evaluate", "--data", str(tmp_path), "-o", str(tmp_path / "out"), "--method", "mini"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "must be an image file" in result.stderr


def test_segment_maps(tmp_path):
    write(tmp_path / "maps" / "a.png")
    content = {
        "images": [{"id": 1, "height": 48, "width": 64}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": []}],
        "categories": [],
    }
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must be an image file"):
        read_panoptic(tmp_path / "panoptic.json", tmp_path / "maps")


def test_masks_of_segment(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "photo.png")
    masks = write(tmp_path / "masks.png")
    arguments = ["segment", str(tmp_path / "photo.png"), "--masks", str(masks), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "must be an image file" in result.stderr


def find_openers(source: str) -> list[str]:
    """Return the calls of openers by their full names, whatever they are imported as."""
    names, calls = {}, []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names |= {alias.asname or alias.name: f"{module}{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call):
            calls.append(ast.unparse(node.func))
    full_names = (".".join([names.get(first, first), *rest]) for first, *rest in (call.split(".") for call in calls))
    return [name for name in full_names if name.endswith(OPENERS)]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import PIL.Image\nPIL.Image.open(x)", "PIL.Image.open"),
        ("from PIL import Image\nImage.open(x).load()", "PIL.Image.open"),
        ("from PIL import Image as Picture\nPicture.open(x)", "PIL.Image.open"),
        ("from PIL.Image import open as opened\nopened(x)", "PIL.Image.open"),
        ("import cv2 as cv\ncv.imread(x)", "cv2.imread"),
        ("from skimage.io import imread\nimread(x)", "skimage.io.imread"),
    ],
)
def test_openers_are_noticed(source, name):
    assert find_openers(source) == [name]


def test_pictures_are_opened_in_one_place():
    openers = {
        path.relative_to(PACKAGE).as_posix(): calls
        for path in sorted(PACKAGE.rglob("*.py"))
        if (calls := find_openers(path.read_text(encoding="utf-8")))
    }
    assert openers == {"io/pictures.py": ["PIL.Image.open"]}


def test_large_pictures_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    Image.new("L", (400, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"^read_map: path must have at most .* pixels, got more in '.*bomb\.png'"):
        read_map(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr("trace_fast.io.pictures.MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="must have at most 1000 pixels, got 300 x 400 in "):
        read_map(tmp_path / "bomb.png")


class TestHeic:
    """HEIC, which Pillow reads by pillow-heif; each test begins without it."""

    @pytest.fixture(autouse=True)
    def unregistered(self, monkeypatch):
        Image.init()
        monkeypatch.setattr(Image, "OPEN", {name: opener for name, opener in Image.OPEN.items() if name != "HEIF"})

    @pytest.fixture
    def folder(self, tmp_path):
        """Write a photo of two colors as HEIC, on its side by EXIF, and one as PNG."""
        pillow_heif = pytest.importorskip("pillow_heif")
        pixels = np.zeros((64, 96, 3), np.uint8)
        pixels[:, :40], pixels[:, 40:] = (200, 30, 30), (30, 60, 200)
        folder = tmp_path / "photos"
        folder.mkdir()
        Image.fromarray(pixels).save(folder / "b.png")
        exif = Image.Exif()
        exif[0x0112] = 6
        heic = pillow_heif.from_pillow(Image.fromarray(np.rot90(pixels).copy()))
        heic.save(folder / "a.HEIC", quality=95, exif=exif.tobytes())
        return folder

    def test_the_package_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        (tmp_path / "photo.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
        with pytest.raises(ValueError, match=r"without pillow-heif: pip install 'trace_fast\[heif\]', or convert HEIC"):
            read_image(tmp_path / "photo.HEIC")

    def test_pixels(self, folder):
        upright, expected = read_image(folder / "a.HEIC"), read_image(folder / "b.png")
        assert upright.shape == expected.shape and (upright - expected).abs().mean() < 0.02

    def test_other_files_do_not_import_it(self, folder):
        read_image(folder / "b.png")
        assert "HEIF" not in Image.OPEN

    def test_folders_and_commands(self, folder):
        assert [photo.name for photo in list_photos(folder)] == ["a.HEIC", "b.png"]
        options = ["--size", "32x48", "--device", "cpu", "-o", str(folder / "out"), "--max-side", "80"]
        result = CliRunner().invoke(app, ["edges", str(folder), *options])
        assert (result.exit_code, result.stderr) == (0, "")
        with Image.open(folder / "out" / "a.png") as picture:
            assert picture.size == (80, 53)

    def test_damage(self, folder):
        content = (folder / "a.HEIC").read_bytes()
        for end in (40, len(content) // 2, len(content) - 30):
            (folder / "cut.heic").write_bytes(content[:end])
            with pytest.raises(ValueError, match="edges: image must be"):
                read_image(folder / "cut.heic")

    def test_a_large_one_is_refused_before_it_is_decoded(self, folder, monkeypatch):
        monkeypatch.setattr("trace_fast.io.pictures.MAX_PIXELS", 1000)
        with pytest.raises(ValueError, match="must have at most 1000 pixels"):
            read_image(folder / "a.HEIC")

    def test_postscript_of_that_name(self, folder):
        (folder / "c.heic").write_bytes(POSTSCRIPT)
        with pytest.raises(ValueError, match="must be an image file"):
            read_image(folder / "c.heic")
