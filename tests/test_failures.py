"""Failures that a file, a user or the machine causes: one line on stderr, or an error that names the argument."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from typer.testing import CliRunner

import trace_fast
from trace_fast import ControlNetAnnotator, Tracer, cli
from trace_fast.backbones import Settings
from trace_fast.decoder import make_decoder
from trace_fast.evaluation import open_method
from trace_fast.evaluation.data import open_dataset
from trace_fast.evaluation.masks import mask_ap
from trace_fast.evaluation.run import check_photos
from trace_fast.io.visualize import write_png
from trace_fast.jobs.finder import EdgeFinder
from trace_fast.jobs.segments import SegmentTask
from trace_fast.masks.coco import read_annotations
from trace_fast.training.data import list_photos


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OverflowError("Python int too large to convert to C long"), "Python int too large to convert to C long"),
        (ZeroDivisionError("integer modulo by zero"), "integer modulo by zero"),
        (MemoryError(), "MemoryError"),
        (KeyError("heads"), "KeyError: 'heads'"),
        (AttributeError("no attribute 'heads'"), "no attribute 'heads'"),
        (SafetensorError("header too large"), "header too large"),
    ],
)
@pytest.mark.parametrize("command", ["edges", "segment"])
def test_errors_of_files_and_machines(tmp_path, monkeypatch, command, error, message):
    def fail(*_, **__):
        raise error

    Image.new("L", (64, 48)).save(tmp_path / "a.png")
    arguments = [command, str(tmp_path / "a.png"), "-o", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr("trace_fast.jobs.tasks.read_image", fail)
        result = CliRunner().invoke(cli.app, arguments)
    assert (result.exit_code, result.stderr) == (1, f"trace-fast: {tmp_path / 'a.png'}: {message}\n")
    monkeypatch.setattr("trace_fast.jobs.finder.load", fail)
    result = CliRunner().invoke(cli.app, arguments)
    assert (result.exit_code, result.stderr) == (2, f"trace-fast: {message}\n")


def test_bombs(tmp_path, monkeypatch):
    """Read pictures of more pixels than Pillow allows, as masks, maps, photos and ground truth."""
    for folder in ("images", "inst", "maps"):
        (tmp_path / folder).mkdir()
        Image.linear_gradient("L").save(tmp_path / folder / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (photo,) = open_dataset(tmp_path).photos
    maps = open_method(f"maps:{tmp_path / 'maps'}")
    _, problems, _ = check_photos([photo], [maps])
    assert len(problems) == 1 and "ground truth" in problems[0] and "must have at most" in problems[0]
    with pytest.raises(ValueError, match="must have at most"):
        maps.edges(photo)
    arguments = [
        "segment",
        str(tmp_path / "a.png"),
        "--masks",
        str(tmp_path / "inst" / "a.png"),
        "-o",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2 and result.stderr.startswith("trace-fast: --masks must be a readable picture, got '")
    assert "must have at most" in result.stderr


ARRAY = np.array(["mini", "mini"])  # has no single truth


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("table", lambda tmp_path: trace_fast.evaluate(tmp_path, methods="sobel", table=ARRAY)),
        ("offload", lambda tmp_path: trace_fast.load("mini", offload=ARRAY)),
        ("dtype", lambda tmp_path: trace_fast.load("mini", dtype=ARRAY)),
        ("noising", lambda tmp_path: Settings(size=(32, 48), noising=ARRAY)),
        ("read", lambda tmp_path: Tracer.from_encoder(nn.Identity(), read=ARRAY)),
        ("bits", lambda tmp_path: write_png(tmp_path / "edges.png", np.zeros((2, 3), np.float32), bits=ARRAY)),
        ("output_type", lambda tmp_path: ControlNetAnnotator("mini")(np.zeros((2, 3, 3), np.uint8), output_type=ARRAY)),
        ("decoder", lambda tmp_path: make_decoder(ARRAY, (4, 6))),
        ("engine", lambda tmp_path: mask_ap([np.ones((1, 2, 3), bool)], [], engine=ARRAY)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_array_in_place_of_a_choice(name, call, tmp_path):
    with pytest.raises((TypeError, ValueError), match=rf"^\w+: {name} must be .*, got array"):
        call(tmp_path)


LONG = "x" * 300  # more than a name of a file may have
EDGES = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tmp_path: trace_fast.load(LONG), "^load: model must be one of "),
        (lambda tmp_path: trace_fast.evaluate(tmp_path, "sobel", truth=LONG), "^evaluate: data must hold ground truth"),
        (lambda tmp_path: open_method(f"x=maps:{LONG}"), "^evaluate: method x must name a folder of maps"),
        (lambda tmp_path: list_photos(Path(LONG)), "^photos must be a folder of image or tar files"),
        (lambda tmp_path: read_annotations(write_panoptic_file(tmp_path)), r"(?s)^read_annotations: path .*got none$"),
        (
            lambda tmp_path: SegmentTask(EdgeFinder(), masks=tmp_path)._complete_masks(LONG, EDGES),
            "^segment: masks must",
        ),
    ],
    ids=["load", "truth", "maps", "photos", "panoptic", "masks"],
)
def test_a_name_that_is_too_long_is_that_of_no_file(call, message, tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        call(tmp_path)


def write_panoptic_file(folder):
    (folder / "a").mkdir()
    image = {"id": 1, "file_name": "x.jpg", "height": 2, "width": 3}
    segments = {"image_id": 1, "file_name": f"{LONG}.png", "segments_info": []}
    path = folder / "a.json"
    path.write_text(json.dumps({"images": [image], "annotations": [segments], "categories": []}))
    return path
