"""`trace_fast.edges`, the promise to users: any image in, the same kind and size out, or one clear error."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import trace_fast
from trace_fast import api


@pytest.fixture(scope="module")
def photograph():
    rows, columns = np.mgrid[0:50, 0:70]
    picture = np.stack([rows * 5, columns * 3, 0 * rows + 60], -1).astype(np.uint8)
    picture[15:40, 20:45] = (220, 30, 40)
    return picture


@pytest.fixture(scope="module")
def expected(photograph):
    return trace_fast.edges(photograph)


def test_array_gives_an_array_at_its_size(expected):
    assert isinstance(expected, np.ndarray) and expected.dtype == np.float32 and expected.shape == (50, 70)
    assert 0 <= expected.min() < expected.max() <= 1


@pytest.mark.parametrize("stage", [1, 2])
def test_edges_are_on_the_outline_of_a_plain_object(photograph, stage):
    found = trace_fast.edges(photograph, stage=stage)
    outline = np.zeros((50, 70), bool)
    outline[13:42, 18:47] = True
    outline[17:38, 22:43] = False
    assert found[outline].mean() > 2 * found[~outline].mean()


@pytest.mark.parametrize("kind", ["path", "pil", "rgba", "chw", "bchw", "float", "uint16"])
def test_every_kind_of_the_same_picture_gives_the_same_edges(photograph, expected, tmp_path, kind):
    chw = torch.from_numpy(photograph).permute(2, 0, 1)
    opaque = np.full((50, 70, 1), 255, np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(photograph).save(path)
    image = {
        "path": path,
        "pil": Image.fromarray(photograph),
        "rgba": np.concatenate([photograph, opaque], -1),
        "chw": chw,
        "bchw": chw[None],
        "float": photograph / 255.0,
        "uint16": photograph.astype(np.uint16) * 257,
    }[kind]
    found = trace_fast.edges(image)
    if kind.endswith("chw"):
        assert isinstance(found, torch.Tensor) and found.shape == (1, 1, 50, 70) and found.dtype == torch.float32
        found = found[0, 0].numpy()
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_list_of_mixed_sizes_keeps_order_and_sizes(photograph, expected):
    tensor = torch.rand(3, 20, 30)
    found = trace_fast.edges([photograph[:, ::-1].copy(), tensor, photograph])
    assert [type(one).__name__ for one in found] == ["ndarray", "Tensor", "ndarray"]
    assert found[0].shape == (50, 70) and found[1].shape == (1, 1, 20, 30)
    np.testing.assert_array_equal(found[2], expected)


def test_output_types(photograph, expected):
    picture = trace_fast.edges(photograph, output_type="pil")
    assert picture.size == (70, 50) and picture.mode == "L"
    assert trace_fast.edges(photograph, output_type="pt").shape == (1, 1, 50, 70)
    assert trace_fast.edges(torch.rand(2, 3, 20, 30), output_type="np").shape == (2, 20, 30)
    np.testing.assert_allclose(np.asarray(picture) / 255, expected, atol=0.5 / 255 + 1e-6)


def test_results_repeat(photograph, expected):
    np.testing.assert_array_equal(trace_fast.edges(photograph), expected)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ([], ValueError, "image must hold at least one image, got an empty list"),
        (np.zeros((0, 30, 3), np.uint8), ValueError, "image must be at least 16 pixels high and wide, got 0 x 30"),
        (np.zeros((15, 30, 3), np.uint8), ValueError, "image must be at least 16 pixels high and wide, got 15 x 30"),
        (np.full((20, 30), np.nan), ValueError, "image must be finite and in"),
        (np.full((20, 30), np.inf), ValueError, "image must be finite and in"),
        (np.full((20, 30), 200.0), ValueError, "got values from 200 to 200"),
        (np.zeros((20, 30), bool), TypeError, "got bool"),
        (np.zeros((20, 30), np.int32), TypeError, "got int32"),
        (torch.zeros(3, 20, 30, dtype=torch.int64), TypeError, "got torch.int64"),
        (np.zeros((20, 30, 2), np.uint8), ValueError, r"C = 1, 3 or 4, got shape \(20, 30, 2\)"),
        (torch.zeros(1, 1, 3, 20, 30), ValueError, r"got shape \(1, 1, 3, 20, 30\)"),
        (None, TypeError, r"image must be .* got NoneType"),
        ("nothing.jpg", FileNotFoundError, "image must be an existing file, got 'nothing.jpg'"),
    ],
)
def test_bad_images(image, error, message):
    with pytest.raises(error, match=f"edges: .*{message}"):
        trace_fast.edges(image)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 0), (torch.bfloat16, 2e-3)], ids=str)
def test_torchs_default_dtype_changes_nothing(photograph, stage, dtype, apart):
    expected = trace_fast.edges(photograph, stage=stage)
    api._load_once.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        found = trace_fast.edges(photograph, stage=stage)
        kl = trace_fast.Tracer.from_pretrained(device="cpu")(photograph, timestep="iep", noising="gaussian").kl
    finally:
        torch.set_default_dtype(torch.float32)
        api._load_once.cache_clear()
    assert found.dtype == np.float32 and kl.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=apart)


def test_torchs_default_device_changes_nothing(photograph, expected):
    api._load_once.cache_clear()
    torch.set_default_device("meta")
    try:
        found = trace_fast.edges(photograph, device="cpu")
    finally:
        torch.set_default_device(None)
    np.testing.assert_array_equal(found, expected)


def test_modules_are_there_when_asked_for():
    # in a process of its own: here the tests have imported them
    code = (
        "import trace_fast; print(trace_fast.masks.export.MaskSet.__name__, trace_fast.io.visualize.overlay.__name__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["MaskSet", "overlay"]
    with pytest.raises(AttributeError, match="module 'trace_fast' has no attribute 'edge'"):
        trace_fast.edge  # noqa: B018


def test_the_bad_one_of_a_list_is_told(photograph):
    for call in (trace_fast.edges, trace_fast.Detector.from_pretrained(device="cpu")):
        with pytest.raises(ValueError, match="got 15 x 30") as caught:
            call([photograph, photograph, np.zeros((15, 30, 3), np.uint8)])
        assert caught.value.__notes__ == ["image 2 of the list, counted from 0"]


def test_bad_options(photograph):
    with pytest.raises(TypeError, match=r"trace: seed must be an int, got float"):
        trace_fast.edges(photograph, stage=1, seed=1.5)
    with pytest.raises(TypeError, match=r"load: model must be a name, a folder, .* got NoneType"):
        trace_fast.edges(photograph, model=None)
    with pytest.raises(ValueError, match=r"output_type must be .* got 'jpg'"):
        trace_fast.edges(photograph, output_type="jpg")
    with pytest.raises(ValueError, match=r"model must be one of mini, .* got 'sd9'"):
        trace_fast.edges(photograph, model="sd9")
