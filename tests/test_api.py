"""`trace_fast.load` and `trace_fast.edges`: any image in, the same kind and size out, or one clear error."""

import importlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import trace_fast
from trace_fast import Detector, Tracer, api


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
    edges = trace_fast.edges(photograph, stage=stage)
    outline = np.zeros((50, 70), bool)
    outline[13:42, 18:47] = True
    outline[17:38, 22:43] = False
    assert edges[outline].mean() > 2 * edges[~outline].mean()


@pytest.mark.slow
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
    edges = trace_fast.edges(image)
    if kind.endswith("chw"):
        assert isinstance(edges, torch.Tensor) and edges.shape == (1, 1, 50, 70) and edges.dtype == torch.float32
        edges = edges[0, 0].numpy()
    assert isinstance(edges, np.ndarray) and edges.dtype == np.float32
    np.testing.assert_allclose(edges, expected, atol=1e-4)


@pytest.mark.slow
def test_list_of_mixed_sizes_keeps_order_and_sizes(photograph, expected):
    tensor = torch.rand(3, 20, 30)
    edges = trace_fast.edges([photograph[:, ::-1].copy(), tensor, photograph])
    assert [type(one).__name__ for one in edges] == ["ndarray", "Tensor", "ndarray"]
    assert edges[0].shape == (50, 70) and edges[1].shape == (1, 1, 20, 30)
    np.testing.assert_array_equal(edges[2], expected)


def test_output_types(photograph, expected):
    picture = trace_fast.edges(photograph, output_type="pil")
    assert picture.size == (70, 50) and picture.mode == "L"
    assert trace_fast.edges(photograph, output_type="pt").shape == (1, 1, 50, 70)
    assert trace_fast.edges(torch.rand(2, 3, 20, 30), output_type="np").shape == (2, 20, 30)
    np.testing.assert_allclose(np.asarray(picture) / 255, expected, atol=0.5 / 255 + 1e-6)


def test_channel_order(photograph, expected):
    bgr = photograph[..., ::-1].copy()
    assert np.abs(trace_fast.edges(bgr) - expected).max() > 0.05
    model = trace_fast.load("mini", device="cpu", channel_order="bgr")
    picture = Image.fromarray(photograph)
    for edges in (
        trace_fast.edges(bgr, channel_order="bgr"),
        trace_fast.edges([bgr], channel_order="bgr")[0],
        trace_fast.edges(picture, channel_order="bgr"),
        model(bgr),
        model([bgr, picture])[1],
        model(photograph, channel_order="rgb"),
        trace_fast.edges(bgr, model=model),
        trace_fast.load(model, channel_order="rgb")(photograph),
    ):
        np.testing.assert_allclose(edges, expected, atol=1e-4)
    assert model.channel_order == "bgr" and trace_fast.load(model) is model


@pytest.mark.parametrize("call", [trace_fast.edges, lambda _, **order: trace_fast.load("mini", **order)])
def test_unknown_channel_order(photograph, call):
    for order in ("BGR", ""):
        with pytest.raises(ValueError, match=f"edges: channel_order must be 'rgb' or 'bgr', got '{order}'"):
            call(photograph, channel_order=order)


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


@pytest.mark.parametrize("image", ["nothing.jpg", []])
def test_a_bad_image_is_refused_before_a_model_is_loaded(image, monkeypatch):
    monkeypatch.setattr(api, "load_cached", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises((FileNotFoundError, ValueError), match="edges: image must"):
        trace_fast.edges(image)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 0), (torch.bfloat16, 2e-3)], ids=str)
def test_torchs_default_dtype_changes_nothing(photograph, stage, dtype, apart):
    expected = trace_fast.edges(photograph, stage=stage)
    api._load_once.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        edges = trace_fast.edges(photograph, stage=stage)
        tracer = trace_fast.Tracer.from_pretrained(device="cpu", size=(64, 96))
        kl = tracer(photograph, timestep="iep", noising="gaussian").kl
    finally:
        torch.set_default_dtype(torch.float32)
        api._load_once.cache_clear()
    assert edges.dtype == np.float32 and kl.dtype == torch.float32
    np.testing.assert_allclose(edges, expected, rtol=0, atol=apart)


def test_torchs_default_device_changes_nothing(photograph, expected):
    api._load_once.cache_clear()
    torch.set_default_device("meta")
    try:
        edges = trace_fast.edges(photograph, device="cpu")
    finally:
        torch.set_default_device(None)
    np.testing.assert_array_equal(edges, expected)


@pytest.mark.slow
def test_modules_are_there_when_asked_for():
    # in a new process, since here the tests have imported them
    code = (
        "import trace_fast; print(trace_fast.masks.export.MaskSet.__name__, trace_fast.io.visualize.overlay.__name__)"
    )
    edges = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert edges.stdout.split() == ["MaskSet", "overlay"]
    with pytest.raises(AttributeError, match="module 'trace_fast' has no attribute 'edge'"):
        trace_fast.edge  # noqa: B018


def test_an_error_names_the_bad_image_of_a_list(photograph):
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


class TestLoad:
    @pytest.mark.parametrize(("stage", "kind"), [(None, Detector), (2, Detector), (1, Tracer)])
    def test_the_stage_decides_the_class(self, stage, kind):
        model = trace_fast.load("mini", stage=stage, device="cpu")
        assert type(model) is kind and model.name == "mini"
        assert (model.size, model.dtype, model.device) == ((128, 128), torch.float32, torch.device("cpu"))

    @pytest.mark.parametrize("stage", [1, 2])
    def test_both_stages_have_one_interface(self, photograph, stage):
        model = trace_fast.load("mini", stage=stage, device="cpu", size=(64, 96))
        text = f"('mini', size=(64, 96), timestep={model.timestep!r}, device='cpu', dtype=torch.float32)"
        assert repr(model) == f"{type(model).__name__}{text}"
        assert model.to("cpu") is model
        pixels = torch.from_numpy(photograph).permute(2, 0, 1)[None] / 255
        edges = model.edges(pixels, seed=0)
        assert edges.shape == (1, 1, 50, 70) and edges.dtype == torch.float32
        assert torch.equal(model.resized((64, 96)).edges(pixels), edges)
        larger = model.resized((96, 128))
        assert larger.size == (96, 128) and model.size == (64, 96)
        assert larger.backbone.network is model.backbone.network
        assert not torch.equal(larger.edges(pixels), edges)
        results = model([photograph, Image.fromarray(photograph)])
        for result in results:
            array = result.edges[0, 0].numpy() if stage == 1 else result
            np.testing.assert_allclose(array, edges[0, 0].numpy(), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("stage", [1, 2])
    def test_a_size_that_the_network_refuses(self, stage):
        model = trace_fast.load("mini", stage=stage, device="cpu")
        with pytest.raises(ValueError, match=r"size must be positive multiples of 4 pixels, got \(63, 64\)"):
            model.resized((63, 64))

    @pytest.mark.slow
    @pytest.mark.parametrize("offload", ["model", "sequential"])
    @pytest.mark.parametrize("stage", [1, 2])
    def test_an_offloaded_model_gives_the_same_edges(self, photograph, stage, offload):
        plain = trace_fast.load("mini", stage=stage, device="cpu")
        offloaded = trace_fast.load("mini", stage=stage, device="cpu", offload=offload)
        pixels = torch.from_numpy(photograph).permute(2, 0, 1)[None] / 255
        torch.testing.assert_close(offloaded.edges(pixels), plain.edges(pixels), rtol=0, atol=1e-6)
        with pytest.raises(RuntimeError, match="to: the model must not be offloaded"):
            offloaded.to("cpu")
        if stage == 2:
            with pytest.raises(RuntimeError, match="compile: the model must not be offloaded"):
                offloaded.compile()

    def test_a_student_at_another_size_is_the_one_resized(self, photograph):
        pixels = torch.from_numpy(photograph).permute(2, 0, 1)[None] / 255
        student = trace_fast.load("mini", device="cpu")
        assert torch.equal(
            trace_fast.load("mini", device="cpu", size=(64, 96)).edges(pixels), student.resized((64, 96)).edges(pixels)
        )

    @pytest.mark.parametrize("stage", [1, 2])
    def test_edges_takes_size_and_dtype(self, photograph, stage):
        options = {"stage": stage, "size": (64, 96), "dtype": torch.bfloat16}
        expected = trace_fast.load("mini", device="cpu", **options).edges(
            torch.from_numpy(photograph).permute(2, 0, 1)[None] / 255
        )
        edges = trace_fast.edges(photograph, device="cpu", **options)
        np.testing.assert_allclose(edges, expected[0, 0].numpy(), rtol=0, atol=1e-6)

    @pytest.mark.slow
    @pytest.mark.parametrize("stage", [1, 2])
    def test_a_model_in_memory_is_used_as_it_is(self, photograph, stage):
        model = trace_fast.load("mini", stage=stage, device="cpu")
        assert trace_fast.load(model) is model and trace_fast.load(model, stage=stage) is model
        assert trace_fast.load(model, size=(64, 96)).size == (64, 96)
        expected = trace_fast.edges(photograph, stage=stage, device="cpu")
        np.testing.assert_array_equal(trace_fast.edges(photograph, model=model), expected)
        np.testing.assert_array_equal(trace_fast.edges([photograph], model=model)[0], expected)

    def test_a_pipeline_and_an_encoder_are_searched(self, photograph, tmp_path):
        from tiny import pipeline, sd15

        whole = pipeline("sd15", tmp_path)
        model = trace_fast.load(whole, size=(16, 24))
        assert isinstance(model, Tracer) and model.backbone.network is whole.unet
        edges = trace_fast.edges(photograph, model=whole, size=(16, 24))
        np.testing.assert_allclose(edges, model(photograph).edges[0, 0].numpy(), rtol=0, atol=1e-6)
        with pytest.raises(TypeError, match="from_encoder: model must be or hold one of"):
            trace_fast.load(sd15()[0]["vae"])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"device": "cpu"},
                "load: device must be None for a model that is loaded already, got 'cpu' with a Detector",
            ),
            ({"dtype": torch.float16}, "load: dtype must be None"),
            ({"offload": "model"}, "load: offload must be None"),
            ({"local_files_only": True}, "load: local_files_only must be None"),
            ({"stage": 1}, "load: stage must be 2 or None for this Detector, got 1"),
        ],
        ids=str,
    )
    def test_options_of_loading_are_refused_for_a_loaded_model(self, options, message):
        with pytest.raises(ValueError, match=message):
            trace_fast.load(trace_fast.load("mini", device="cpu"), **options)

    def test_something_that_is_no_model(self):
        with pytest.raises(TypeError, match=r"load: model must be a name, a folder, .* got int"):
            trace_fast.load(3)


def test_dir_lists_the_public_names_only():
    assert dir(trace_fast) == sorted(trace_fast.__all__)
    for name in trace_fast.__all__:
        assert getattr(trace_fast, name) is not None
    assert callable(trace_fast.distill) and callable(trace_fast.pretrain) and callable(trace_fast.load)


def test_no_function_has_the_name_of_its_module():
    import inspect
    import pkgutil

    for module in pkgutil.walk_packages(trace_fast.__path__, "trace_fast."):
        if module.name.endswith(("__main__", "_C")):
            continue
        functions = dict(inspect.getmembers(importlib.import_module(module.name), inspect.isroutine))
        assert module.name.rpartition(".")[2] not in functions, module.name
