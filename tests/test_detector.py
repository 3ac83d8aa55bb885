"""The one-step student in use: `Detector`, and stage 2 of `trace_fast.edges` and of the command line."""

import contextlib
import copy
import json
import math
import pickle
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import SIZE, embedded, pipeline, student
from torch.testing import assert_close
from typer.testing import CliRunner

import trace_fast
from trace_fast import Detector, Tracer, cli, ops
from trace_fast.backbones import has_student, load_backbone
from trace_fast.backbones.loading import pipelines
from trace_fast.detector import OneThread, merge_adapter
from trace_fast.io.images import resize

# of diffusers' own call of the hub
pytestmark = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "conv": ("mini", "conv", {}),
    "pixels": ("mini", "pixels", {"channels": 4}),
    "unet": ("mini", "unet", {"channels": 4, "abdiv": 0.35}),
    "sd15": ("sd15", "conv", {}),
}


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No network, and a separate cache."""
    import socket

    def refuse(*_, **__):
        raise AssertionError("a test asked for the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setenv("TRACE_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        diffusers.utils.logging.disable_progress_bar()
        diffusers.utils.logging.set_verbosity_error()
        yield


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Write a folder for each of `KINDS`: the base, with the student in `student`."""
    folder = tmp_path_factory.mktemp("students")
    for kind, (base, decoder, options) in KINDS.items():
        if base == "mini":
            embedded(folder / kind)
        else:
            pipe = pipeline(base, folder)
            pipe.set_progress_bar_config(disable=True)
            pipe.save_pretrained(folder / kind)
        student(folder / kind / "student", folder / kind, (32, 48) if base == "mini" else SIZE, decoder, **options)
        for part in (*(folder / kind).glob("text_encoder*"), *(folder / kind).glob("tokenizer*")):
            shutil.rmtree(part)  # a student needs none of them
    return folder


@pytest.fixture(params=KINDS)
def folder(request, students):
    return students / request.param / "student"


@pytest.fixture
def detector(folder):
    return Detector.from_pretrained(folder, device="cpu")


@pytest.fixture
def copied(students, tmp_path):
    """Copy a student, to damage it."""
    return shutil.copytree(students / "conv" / "student", tmp_path / "student")


def photograph(height=40, width=56, batch=1, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def is_quiet(network):
    return not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@torch.no_grad()
def whole_pass(detector, images, photograph=None):
    """Logits of a network that runs to its end."""
    backbone = detector.backbone
    taps = detector.decoder.open_readout(backbone.read_grids(), backbone.settings.edge_scale)
    with backbone.capture(taps.on_attention):
        backbone.predict(backbone.encode(images), torch.full((len(images),), detector.timestep))
    return detector.decoder(taps.result(), photograph)


class TestThresholds:
    def test_they_are_those_of_the_student_not_of_its_base(self, students, copied):
        base = json.loads((students / "conv" / "config.json").read_text())
        base["tracing"] = base.get("tracing", {}) | {"contour_threshold": 0.3, "region_threshold": 0.7}
        folder = copied.parent / "base"
        shutil.copytree(students / "conv", folder)
        (folder / "config.json").write_text(json.dumps(base))
        tracer = Tracer.from_pretrained(folder, device="cpu")
        assert (tracer.contour_threshold, tracer.region_threshold) == (0.3, 0.7)
        config = json.loads((copied / "config.json").read_text())
        config["base"]["model"] = str(folder)
        for thresholds, expected in (({}, (0.5, 0.5)), ({"contour": 0.4, "region": 0.2}, (0.4, 0.2))):
            (copied / "config.json").write_text(json.dumps(config | {"thresholds": thresholds}))
            detector = Detector.from_pretrained(copied, device="cpu")
            assert (detector.contour_threshold, detector.region_threshold) == expected
        detector.save_pretrained(copied.parent / "saved")
        assert Detector.from_pretrained(copied.parent / "saved", device="cpu").region_threshold == 0.2


class TestRoundTrip:
    @pytest.mark.slow
    def test_what_is_saved_is_read_bit_for_bit(self, detector, tmp_path):
        detector.save_pretrained(tmp_path / "new" / "folder")
        again = Detector.from_pretrained(tmp_path / "new" / "folder", device="cpu")
        images = photograph(batch=2)
        assert torch.equal(again.edges(images), detector.edges(images))
        assert again.config == detector.config and again.timestep == detector.timestep

    def test_files_are_those_of_the_folder_it_came_from(self, detector, folder, tmp_path):
        detector.save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}
        assert (tmp_path / "config.json").read_text() == (folder / "config.json").read_text()
        for path in folder.glob("*.safetensors"):
            for name, value in load_file(path).items():
                assert torch.equal(load_file(tmp_path / path.name)[name], value.float()), name

    def test_at_another_size_it_is_saved_with_that_size(self, students, tmp_path):
        larger = Detector.from_pretrained(students / "pixels", device="cpu").resized((64, 64))
        larger.save_pretrained(tmp_path)
        again = Detector.from_pretrained(tmp_path, device="cpu")
        assert again.backbone.settings.size == (64, 64)
        assert torch.equal(again.edges(photograph()), larger.edges(photograph()))

    def test_one_put_together_by_hand_says_what_it_lacks(self, detector, tmp_path, monkeypatch):
        import huggingface_hub

        unnamed = Detector(detector.backbone, detector.decoder)
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: pytest.fail("made a repository"))
        with pytest.raises(ValueError, match="save_pretrained: config must name the base model"):
            unnamed.push_to_hub("someone/student")
        with pytest.raises(ValueError, match=r"save_pretrained: config must name the base model, got \{\}"):
            unnamed.save_pretrained(tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_the_adapter_is_added_to_the_bases_weights(self, students):
        detector = Detector.from_pretrained(students / "conv", device="cpu")
        base = load_file(students / "conv" / "model.safetensors")
        changed = detector.backbone.network.state_dict()
        adapter = detector.adapter
        for name, value in base.items():
            layer = name.removesuffix(".weight")
            if f"{layer}.lora_A.weight" in adapter:
                product = adapter[f"{layer}.lora_B.weight"] @ adapter[f"{layer}.lora_A.weight"]
                assert_close(changed[name], value + 0.5 * product)
                assert (changed[name] - value).abs().max() > 0.1
            else:
                assert torch.equal(changed[name], value)

    def test_dtype_is_that_of_the_weights(self, folder):
        detector = Detector.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
        assert {x.dtype for x in detector.backbone.network.parameters()} == {torch.bfloat16}
        assert {x.dtype for x in detector.decoder.parameters()} == {torch.float32}
        if "vae" in vars(detector.backbone):
            edges, expected = (
                d.edges(photograph()) for d in (detector, Detector.from_pretrained(folder, device="cpu"))
            )
            assert edges.dtype == torch.float32
            assert_close(edges, expected, rtol=0, atol=0.05)

    def test_everything_moves(self, detector):
        assert detector.to("cpu") is detector
        detector.to("meta")
        parts = [detector.backbone.network, detector.decoder, getattr(detector.backbone, "vae", None)]
        assert {x.device.type for part in parts if part for x in part.parameters()} == {"meta"}
        assert detector.device == torch.device("meta")
        for device in ("xpu", "mps", "vulkan"):
            with pytest.raises(RuntimeError, match=f"to: device must be present, got '{device}': .*; use 'cpu'"):
                detector.to(device)
        with pytest.raises(ValueError, match="to: device must be a torch device, got 'potato'"):
            detector.to("potato")

    def test_no_text_encoder_is_loaded(self, students, monkeypatch, tmp_path):
        monkeypatch.setenv("TRACE_FAST_CACHE", str(tmp_path / "cache"))  # where an earlier embedding would be
        monkeypatch.setattr(pipelines, "encode_empty_prompt", lambda *_: pytest.fail("text encoders were loaded"))
        student = shutil.copytree(students / "sd15" / "student", tmp_path / "student")
        changed = {name: x + 1 for name, x in load_file(student / "null_text.safetensors").items()}
        save_file(changed, student / "null_text.safetensors")
        first, second = (Detector.from_pretrained(x, device="cpu") for x in (students / "sd15" / "student", student))
        assert all(torch.equal(second.backbone.empty_prompt[name], x) for name, x in changed.items())
        images = torch.rand(1, 3, *SIZE)
        assert not torch.equal(first._forward(images, None), second._forward(images, None))  # it is used

    @pytest.mark.parametrize("revision", ["abc123", None])
    def test_the_base_is_read_at_the_revision_that_was_distilled(self, copied, monkeypatch, revision):
        config = json.loads((copied / "config.json").read_text())
        config["base"]["revision"] = revision
        (copied / "config.json").write_text(json.dumps(config))
        asked = []

        def load(model, **options):
            asked.append((model, options["revision"]))
            return load_backbone(model, **options)

        monkeypatch.setattr("trace_fast.detector.load_backbone", load)
        Detector.from_pretrained(copied, device="cpu", revision="main")  # which is the student's own
        assert asked == [(config["base"]["model"], revision)]

    def test_a_base_with_a_student_inside_is_read_as_one(self, students):
        images = photograph()
        one, other = (Detector.from_pretrained(students / x, device="cpu") for x in ("conv", "conv/student"))
        assert torch.equal(one.edges(images), other.edges(images))


class TestCall:
    def test_a_batch_is_its_images(self, detector):
        images = photograph(batch=3)
        together = detector(images)
        assert together.shape == (3, 1, 40, 56) and together.dtype == torch.float32
        assert 0 <= together.min() < together.max() <= 1
        for image, edges in zip(images, together, strict=True):
            assert_close(detector(image), edges[None], rtol=0, atol=1e-6)

    def test_a_list_keeps_order_kinds_and_sizes(self, detector):
        sizes = [(16 + 3 * index, 60 - 4 * index) for index in range(10)]  # more than share a pass
        tensors = [photograph(*size, seed=index)[0] for index, size in enumerate(sizes)]
        images = [x.permute(1, 2, 0).numpy() if index % 2 else x for index, x in enumerate(tensors)]
        for image, tensor, size, edges in zip(images, tensors, sizes, detector(images), strict=True):
            assert isinstance(edges, type(image))
            assert edges.shape[-2:] == size
            assert_close(torch.as_tensor(edges).view(1, 1, *size), detector.edges(tensor[None]), rtol=0, atol=1e-6)

    def test_images_of_a_list_share_passes(self, detector, monkeypatch):
        if detector.decoder.name == "unet":
            pytest.skip("sees photos at their own shapes, which differ")
        passes, real = [], detector._forward
        monkeypatch.setattr(
            detector, "_forward", lambda images, detail: (passes.append(len(images)), real(images, detail))[1]
        )
        images = [photograph(20 + index)[0] for index in range(10)]
        detector(images)
        assert passes == [8, 2]
        passes.clear()
        height, width = detector.decoder.photo_size((40, 56), detector.size) or detector.size
        for pixels, expected in ((4 * height * width, [4, 4, 2]), (1, [1] * 10)):  # large pictures share less
            monkeypatch.setattr("trace_fast.detector.PIXELS", pixels)
            detector(images)
            assert passes == expected
            passes.clear()

    def test_output_kinds(self, detector):
        image = photograph()[0]
        array = image.permute(1, 2, 0).numpy()
        expected = detector(image)
        edges = detector(array)
        assert isinstance(edges, np.ndarray) and edges.dtype == np.float32 and edges.shape == (40, 56)
        np.testing.assert_array_equal(edges, expected[0, 0].numpy())
        assert torch.equal(detector(array, output_type="pt"), expected)
        np.testing.assert_array_equal(detector(image, output_type="np"), edges)
        picture = detector(image, output_type="pil")
        assert picture.mode == "L" and picture.size == (56, 40)
        np.testing.assert_allclose(np.asarray(picture) / 255, edges, atol=0.5 / 255 + 1e-6)
        assert [picture.size for picture in detector([image, array], output_type="pil")] == [(56, 40)] * 2
        with pytest.raises(ValueError, match=r"output_type must be .* got 'jpg'"):
            detector(image, output_type="jpg")

    def test_every_kind_of_image(self, detector, tmp_path):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))
        picture.save(tmp_path / "a.png")
        for image in (picture, tmp_path / "a.png", str(tmp_path / "a.png")):
            np.testing.assert_array_equal(detector(image), detector(np.asarray(picture)))

    def test_no_image(self, detector):
        with pytest.raises(ValueError, match="edges: image must hold at least one image, got an empty list"):
            detector([])
        with pytest.raises(TypeError, match=r"image must be .* got NoneType"):
            detector(None)

    def test_edges_are_the_decoders_logits_stretched(self, detector):
        size = detector.size
        images, photo_size = photograph(*size), detector.decoder.photo_size(size, size)
        small = torch.nn.functional.interpolate(images, photo_size, mode="bilinear") if photo_size else None
        with torch.no_grad():
            logits = detector._forward(images, small)
        options = {"mode": "bilinear", "align_corners": False, "antialias": logits.shape[-1] > size[1]}
        stretched = torch.nn.functional.interpolate(logits, size, **options)
        assert_close(detector.edges(images), stretched.sigmoid(), rtol=0, atol=1e-6)

    def test_a_line_is_found_wherever_it_falls_in_a_smaller_photograph(self, students, monkeypatch):
        detector = Detector.from_pretrained(students / "pixels", device="cpu")
        logits = torch.full((1, 1, 64, 96), -6.0)
        logits[..., 5::11] = 6.0  # lines of a pixel, at every place in turn against the photograph's pixels
        monkeypatch.setattr(detector, "_forward", lambda *_: logits)
        row = detector.edges(photograph(21, 32))[0, 0, 10]
        strengths = row[1:-1][(row[1:-1] > row[:-2]) & (row[1:-1] >= row[2:])]
        assert len(strengths) == 8 and strengths.max() < 8 * strengths.min()


class TestResolutions:
    def test_the_image_is_resized_before_it_is_seen(self, detector):
        image = photograph(70, 140)
        edges = detector(image, 64, 128, "pt")
        assert edges.shape == (1, 1, 128, 256)
        assert torch.equal(edges, detector(resize(image, (64, 128)), None, 128))
        own = detector(image, 64)
        assert own.shape == (1, 1, 70, 140) and not torch.equal(own, detector(image))

    def test_the_aspect_ratio_is_kept(self, detector):
        for shape, size in (((70, 100), (192, 256)), ((100, 70), (256, 192)), ((40, 40), (192, 192))):
            picture = detector(photograph(*shape)[0].permute(1, 2, 0).numpy(), image_resolution=190, output_type="pil")
            assert picture.size == size[::-1] and picture.mode == "L"

    def test_results_of_a_list_and_of_single_images_agree(self, detector):
        images = [photograph(70, 100), photograph(40, 90)]
        for one, image in zip(detector(images, 64, 128), images, strict=True):
            assert_close(one, detector(image, 64, 128), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("name", ["detect_resolution", "image_resolution"])
    def test_refusals(self, detector, name):
        with pytest.raises(ValueError, match=f"edges: {name} must be at least 1, got 0"):
            detector(photograph(), **{name: 0})
        with pytest.raises(TypeError, match=f"edges: {name} must be an int, got float"):
            detector(photograph(), **{name: 64.0})
        message = "edges: resolution must be small enough for 178956970 pixels, got 65536 for 24 x 40"
        with pytest.raises(ValueError, match=message):
            detector(photograph(24, 40), **{name: 65536})


class TestResized:
    def test_the_networks_own_size_changes_nothing(self, detector):
        assert detector.resized(detector.size) is detector

    def test_another_size_has_another_grid_and_other_values(self, detector):
        image, before = photograph(), detector.edges(photograph())
        grid, values = detector.decoder.grid, detector.decoder.values.clone()
        larger = detector.resized((64, 64))
        edges = larger(image)
        assert edges.shape == image[:, :1].shape and not torch.equal(edges, before)
        assert larger.decoder.grid == larger.backbone.finest_grid() != grid
        # the detector itself is as it was
        assert detector.decoder.grid == grid and torch.equal(detector.decoder.values, values)
        assert torch.equal(detector.edges(image), before)

    def test_values_are_interpolated_over_the_keys(self, detector):
        if not detector.decoder.values.numel():
            pytest.skip("has no values")
        height, width = detector.decoder.grid
        ramp = torch.arange(height * width).view(height, width, 1).expand(-1, -1, detector.decoder.values.shape[1])
        detector.decoder.values.copy_(ramp.flatten(0, 1))
        (top, left), columns = (2 * side for side in detector.backbone.settings.size), detector.decoder.values.shape[1]
        values = detector.resized((top, left)).decoder.values.view(2 * height, 2 * width, columns)
        inside = values[1:-1, 1:-1, 0]
        assert_close(inside.diff(dim=1), torch.full((2 * height - 2, 2 * width - 3), 0.5))
        assert_close(inside.diff(dim=0), torch.full((2 * height - 3, 2 * width - 2), width / 2))

    def test_weights_are_shared(self, detector):
        larger = detector.resized((64, 64))
        assert larger.backbone.network is detector.backbone.network
        others = {name: x for name, x in larger.decoder.named_parameters() if name != "values"}
        assert all(x is dict(detector.decoder.named_parameters())[name] for name, x in others.items())

    def test_a_size_that_the_network_refuses(self, detector):
        with pytest.raises(ValueError, match=r"size must be positive multiples of \d pixels, got \(33, 33\)"):
            detector.resized((33, 33))
        with pytest.raises(ValueError, match="size must be "):
            detector.resized((0, 0))


class TestOnePass:
    def test_what_follows_the_last_attention_is_not_run(self, detector):
        network = detector.backbone.network
        last = detector.backbone.attentions()[-1]
        ran = []
        watched = [module for module in network.modules() if not list(module.children())]
        handles = [m.register_forward_hook(lambda m, *_: ran.append(m)) for m in watched]
        detector.edges(photograph())
        for handle in handles:
            handle.remove()
        names = {module: name for name, module in network.named_modules()}
        assert ran.count(last.to_q) == 1 and names[ran[-1]].startswith(names[last])
        silent = {names[module] for module in watched} - {names[module] for module in ran}
        if "vae" in vars(detector.backbone):
            assert "conv_out" in silent and any(".attn2." in name for name in silent)
        else:
            assert {"blocks.1.mlp.0", "blocks.1.local", "head"} <= silent
            assert "blocks.0.mlp.0" not in silent

    def test_it_gives_what_a_whole_pass_gives(self, detector):
        size, photo_size = detector.size, detector.decoder.photo_size(detector.size, detector.size)
        images, photos = photograph(*size, batch=2), photograph(*photo_size, batch=2) if photo_size else None
        with torch.no_grad():
            logits = detector._forward(images, photos)
        assert torch.equal(logits, whole_pass(detector, images, photos))

    def test_the_network_receives_the_students_timestep(self, students, tmp_path):
        student(tmp_path / "other", students / "conv", (32, 48), timestep=300)
        timesteps = []
        detector = Detector.from_pretrained(tmp_path / "other", device="cpu")
        detector.backbone.network.register_forward_pre_hook(lambda _, args: timesteps.append(args[1].tolist()))
        edges = detector.edges(photograph(batch=2))
        assert timesteps == [[300, 300]]
        plain = Detector.from_pretrained(students / "conv", device="cpu").edges(photograph(batch=2))
        assert not torch.equal(edges, plain)

    def test_no_map_is_made(self, detector, monkeypatch):
        if not detector.decoder.values.numel():
            pytest.skip("reads the ABDiv of a map")
        from trace_fast import ops

        for name in ("attention_map", "accumulate_attention", "resize_attention"):
            monkeypatch.setattr(ops, name, lambda *_: pytest.fail("a map was made"))
        detector.edges(photograph())

    def test_logits_are_computed_once(self):
        """Let every block of the embedded student attend and add its map at once; the last makes its map alone."""
        detector = Detector.from_pretrained("mini", device="cpu", size=(32, 48))
        names = ("attend", "accumulate_attention", "readout")
        with contextlib.ExitStack() as stack:
            calls = {n: stack.enter_context(mock.patch.object(ops, n, wraps=getattr(ops, n))) for n in names}
            detector.edges(photograph())
        totals = sum(len(call.args) > 3 for call in calls["attend"].call_args_list)
        blocks = len(detector.backbone.attentions())
        assert (totals, calls["accumulate_attention"].call_count, calls["readout"].call_count) == (blocks - 1, 1, 0)

    def test_blocks_that_the_settings_leave_out_are_not_read(self, students, tmp_path):
        base = shutil.copytree(students / "conv", tmp_path / "base")
        config = json.loads((base / "config.json").read_text())
        config["tracing"]["blocks"] = [0]
        (base / "config.json").write_text(json.dumps(config))
        shutil.rmtree(base / "student")
        student(base / "student", base, (32, 48))
        detector = Detector.from_pretrained(base, device="cpu")
        ran = []
        detector.backbone.network.blocks[1].attn.register_forward_hook(lambda *_: ran.append(1))
        detector.edges(photograph())
        assert not ran

    def test_hooks_are_gone_afterwards_and_after_an_error(self, detector):
        network = detector.backbone.network
        expected = detector.edges(photograph())
        assert is_quiet(network)
        breaks = detector.backbone.attentions()[-1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            detector.edges(photograph())
        breaks.remove()
        assert is_quiet(network)
        assert torch.equal(detector.edges(photograph()), expected)

    def test_no_graph_is_kept(self, detector):
        assert not detector.edges(photograph().requires_grad_()).requires_grad
        assert not any(x.requires_grad for x in detector.decoder.parameters())


@pytest.mark.slow
def test_threads_take_turns_whatever_their_sizes(detector):
    images = [photograph(seed=seed) for seed in range(4)]
    sizes = [detector.size, (64, 64), detector.size, (48, 48)]
    expected = [detector.resized(size)(image) for image, size in zip(images, sizes, strict=True)]
    ready = threading.Barrier(4, timeout=60)

    def work(index):
        ready.wait()
        return [detector.resized(sizes[index])(images[index]) for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        for results, one in zip(pool.map(work, range(4)), expected, strict=True):
            assert all(torch.equal(result, one) for result in results)
    assert is_quiet(detector.backbone.network)


@pytest.mark.slow
def test_the_embedded_student_compiles():
    image = photograph(96, 128)
    detector = Detector.from_pretrained("mini", device="cpu")
    expected = detector.edges(image)
    assert_close(detector.compile().edges(image), expected, rtol=0, atol=1e-4)


class CudaGraphs(torch.nn.Module):
    """A compiled pass as CUDA graphs make it: for the thread of the first call, its output at one address."""

    def __init__(self):
        super().__init__()
        self.thread, self.output = None, torch.zeros(1)

    def forward(self, images, photo):
        assert not torch.is_grad_enabled() and photo is None
        self.thread = self.thread or threading.get_ident()
        if self.thread != threading.get_ident():
            raise AssertionError("this thread has no tree of graphs")
        return self.output.copy_(images.sum()[None])


def test_graphs_are_replayed_in_their_thread_whoever_calls():
    graphs, results = CudaGraphs(), {}
    compiled = OneThread(graphs)

    def call(number):
        results[number] = compiled(torch.full((2, 3), number), None)

    for number in range(3):
        thread = threading.Thread(target=call, args=(number,))
        thread.start()
        thread.join(timeout=30)
    assert {number: result.item() for number, result in results.items()} == {0: 0, 1: 6, 2: 12}
    assert graphs.thread not in (None, threading.get_ident())
    with pytest.raises(AssertionError, match="no tree of graphs"), torch.no_grad():
        graphs(torch.zeros(1), None)
    with pytest.raises(AssertionError):  # an error of the pass is raised here
        compiled(torch.zeros(1), torch.zeros(1))


@pytest.mark.gpu
def test_a_student_compiled_on_a_gpu_runs_in_any_thread():
    detector = Detector.from_pretrained("mini", device="cuda")
    image = torch.rand(1, 3, 64, 96)
    expected, results = detector.edges(image), []
    detector.compile()
    for _ in range(2):
        thread = threading.Thread(target=lambda: results.append(detector.edges(image)))
        thread.start()
        thread.join()
    for result in (*results, detector.edges(image)):
        assert_close(result, expected, rtol=0, atol=1e-3)
    assert len(results) == 2


@pytest.mark.slow
def test_compiled_it_gives_the_same(students):
    detector = Detector.from_pretrained(students / "conv", device="cpu")
    images = photograph(batch=2)
    expected, larger = detector.edges(images), detector.resized((64, 64))(images)
    torch._dynamo.reset()
    assert detector.compile(mode="default") is detector
    compilations = torch._dynamo.utils.counters["stats"]
    assert_close(detector.edges(images), expected, rtol=1e-4, atol=1e-5)
    first = compilations["unique_graphs"]
    assert first > 0
    assert_close(detector.edges(images.flip(0)), expected.flip(0), rtol=1e-4, atol=1e-5)
    assert compilations["unique_graphs"] == first  # once
    # at another size it runs as it is, on the same network
    assert_close(detector.resized((64, 64))(images), larger, rtol=0, atol=1e-6)


class TestMerge:
    def test_by_hand(self):
        network = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3, bias=False), "b": torch.nn.Linear(2, 2)})
        network["a"].weight.data.zero_()
        before = network["b"].weight.clone()
        down, up = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [10], [100]])
        merge_adapter(network, {"a.lora_A.weight": down, "a.lora_B.weight": up}, 0.5)
        assert network["a"].weight.tolist() == [[0.5, 1], [5, 10], [50, 100]]
        assert torch.equal(network["b"].weight, before)

    def test_half_precision_is_rounded_once(self):
        network = torch.nn.Sequential(torch.nn.Linear(2, 2)).bfloat16()
        weight = network[0].weight.float()
        adapter = {"0.lora_A.weight": torch.tensor([[0.01, 0.02]]), "0.lora_B.weight": torch.tensor([[1.0], [3.0]])}
        merge_adapter(network, adapter, 1.0)
        product = adapter["0.lora_B.weight"] @ adapter["0.lora_A.weight"]
        assert torch.equal(network[0].weight, (weight + product).bfloat16())

    @pytest.mark.parametrize(("layer", "columns"), [("b", 2), ("a", 5), ("norm", 2)])
    def test_a_layer_that_does_not_fit(self, layer, columns):
        network = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3), "norm": torch.nn.LayerNorm(3)})
        adapter = {f"{layer}.lora_A.weight": torch.ones(1, columns), f"{layer}.lora_B.weight": torch.ones(3, 1)}
        with pytest.raises(ValueError, match=f"the adapter's layer {layer} must be linear, 3 x {columns}"):
            merge_adapter(network, adapter, 1.0)


class TestDamage:
    def refuse(self, folder, message):
        with pytest.raises(ValueError, match=f"load: model must be {message}"):
            Detector.from_pretrained(folder, device="cpu", local_files_only=True)

    @pytest.mark.parametrize("name", ["config.json", "lora.safetensors"])
    def test_a_missing_file(self, copied, name):
        (copied / name).unlink()
        self.refuse(copied, f"the folder of a student, got .*{name}")

    def test_a_missing_decoder(self, copied):
        (copied / "decoder.safetensors").unlink()
        self.refuse(copied, r"the folder of a student, got .*decoder\.safetensors")

    @pytest.mark.parametrize("name", ["lora.safetensors", "decoder.safetensors", "null_text.safetensors"])
    def test_a_cut_file(self, students, tmp_path, name):
        copied = shutil.copytree(students / "sd15" / "student", tmp_path / "copied")
        content = (copied / name).read_bytes()
        (copied / name).write_bytes(content[:-4])
        self.refuse(copied, f"the folder of a student, got .*: {name} is damaged")

    def test_numbers_that_are_not_finite(self, copied):
        weights = load_file(copied / "decoder.safetensors")
        weights["values"][3, 2] = float("nan")
        save_file(weights, copied / "decoder.safetensors")
        self.refuse(copied, r"the folder of a student, .* decoder\.safetensors holds numbers .* not finite in values")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"base": None}, ""),
            ({"base": "mini"}, ""),
            ({"base": {}}, "'model'"),
            ({"timestep": "low"}, ""),
            ({"timestep": -5}, r"config\.json: timestep must be from 0 to 999, got -5"),
            ({"timestep": 10**6}, r"config\.json: timestep must be from 0 to 999, got 1000000"),
            ({"timestep": True}, r"config\.json: timestep must be an int, got bool"),
            ({"size": 3}, ""),
            ({"size": [-32, 48]}, ".*size must be .* positive integers, got"),
            ({"scale": math.nan}, r"config\.json: scale must be from 0 to 1000, got nan"),
            ({"scale": math.inf}, r"config\.json: scale must be from 0 to 1000, got inf"),
            ({"scale": 1e30}, r"config\.json: scale must be from 0 to 1000, got 1e\+30"),
            ({"scale": 10**400}, r"config\.json: scale must be from 0 to 1000, got 1000"),
            ({"thresholds": {"contour": math.nan}}, ".*contour_threshold must be above 0 and at most 1, got nan"),
            ({"thresholds": {"region": 10**400}}, ".*region_threshold must be above 0 and at most 1, got 1000"),
            ({"thresholds": []}, ""),
            ({"decoder": {"name": "cnn"}}, "student: decoder must be 'conv' or 'pixels' or 'unet', got 'cnn'"),
            ({"decoder": {"name": "conv", "columns": 3}}, "decoder conv does not have these options"),
            ({"decoder": {"name": "pixels"}}, ".*state_dict"),
            ({"decoder": {}}, ".*name"),
            ({"decoder": "conv"}, ""),
            ({"scale": "much"}, ""),
            ({"thresholds": {"region": 0}}, ".*region_threshold must be above 0 and at most 1, got 0"),
        ],
        ids=str,
    )
    def test_a_configuration_that_does_not_fit(self, copied, change, message):
        config = json.loads((copied / "config.json").read_text())
        (copied / "config.json").write_text(json.dumps(config | change))
        self.refuse(copied, f"the folder of a student, got .*: {message}")

    @pytest.mark.parametrize("content", ["{", "[]", "3", "\udcff"], ids=["cut", "list", "number", "bytes"])
    def test_a_configuration_that_is_none(self, copied, content):
        (copied / "config.json").write_bytes(content.encode(errors="surrogateescape"))
        self.refuse(copied, "the folder of a student, got ")

    def test_an_adapter_of_one_half(self, copied):
        weights = load_file(copied / "lora.safetensors")
        del weights[next(iter(weights))]
        save_file(weights, copied / "lora.safetensors")
        self.refuse(copied, "the folder of a student, got ")

    def test_weights_that_the_adapter_makes_infinite(self, copied):
        weights = load_file(copied / "lora.safetensors")
        save_file({name: torch.full_like(weight, 6e4) for name, weight in weights.items()}, copied / "lora.safetensors")
        with pytest.raises(ValueError, match=r"the adapter's layer .* must leave finite weights in torch\.float16"):
            Detector.from_pretrained(copied, device="cpu", dtype=torch.float16)

    def test_weights_so_large_that_edges_are_no_numbers(self, copied):
        weights = load_file(copied / "decoder.safetensors")
        weights = {name: weight.sign() * torch.finfo(torch.float32).max for name, weight in weights.items()}
        save_file(weights, copied / "decoder.safetensors")
        detector = Detector.from_pretrained(copied, device="cpu")
        with pytest.raises(
            RuntimeError, match=r"edges: model must give finite numbers, got NaN from .*student; its weights"
        ):
            detector.edges(photograph())
        with pytest.raises(
            RuntimeError, match=r"edges: model must give finite numbers, got NaN from .*student; its weights"
        ):
            detector(photograph()[0].permute(1, 2, 0).numpy())

    def test_a_base_that_is_not_there(self, copied):
        config = json.loads((copied / "config.json").read_text())
        config["base"]["model"] = "/no/such/base"
        (copied / "config.json").write_text(json.dumps(config))
        self.refuse(copied, r"one of .* got '/no/such/base'")

    def test_a_student_of_another_network(self, students, copied):
        config = json.loads((copied / "config.json").read_text())
        config |= {"base": {"model": str(students / "sd15")}, "size": [16, 24]}
        (copied / "config.json").write_text(json.dumps(config))
        shutil.copy(students / "sd15" / "student" / "null_text.safetensors", copied)
        self.refuse(copied, r"the folder of a student, got .*the adapter's layer blocks\.0\.attn\.to_k must be linear")

    def test_a_size_of_another_grid(self, copied):
        config = json.loads((copied / "config.json").read_text())
        (copied / "config.json").write_text(json.dumps(config | {"size": [48, 48]}))
        self.refuse(copied, r"the folder of a student, got .*(?s:.)*size mismatch for values")

    @pytest.mark.parametrize("name", ["no such student", "sd9", "/no/such/folder"])
    def test_neither_name_nor_folder_nor_repository(self, name):
        self.refuse(name, f"a name, a folder or a repository of the hub .* got '{name}'")

    def test_a_hub_that_is_not_to_be_asked(self):
        with pytest.raises(RuntimeError, match=r"someone/something is not on this machine, .*local_files_only"):
            Detector.from_pretrained("someone/something", device="cpu", local_files_only=True)

    def test_a_missing_device(self, copied, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(RuntimeError, match="load: device must be present, got 'cuda'"):
            Detector.from_pretrained(copied, device="cuda")


class TestHub:
    def test_a_push_uploads_exactly_the_files(self, detector, folder, monkeypatch):
        calls = []

        class Hub:
            def create_repo(self, repository, **options):
                calls.append((repository, options))

            def upload_folder(self, *, repo_id, folder_path):
                files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
                calls.append((repo_id, files, folder_path))
                return "https://huggingface.co/someone/student/commit/1"

        monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
        assert detector.push_to_hub("someone/student", private=True).endswith("/commit/1")
        (created, options), (uploaded, files, temporary) = calls
        assert created == uploaded == "someone/student" and options == {"private": True, "exist_ok": True}
        assert set(files) == {path.name for path in folder.iterdir()}
        assert json.loads(files["config.json"]) == detector.config
        assert not Path(temporary).exists()

    def test_a_repository_is_fetched_without_more_than_is_needed(self, folder, monkeypatch):
        asked = []

        def fetch(repository, **options):
            asked.append((repository, options))
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
        detector = Detector.from_pretrained("someone/student", device="cpu", revision="main")
        names = ["config.json", "decoder.safetensors", "lora.safetensors", "null_text.safetensors"]
        assert asked == [("someone/student", {"revision": "main", "local_files_only": False, "allow_patterns": names})]
        assert torch.equal(
            detector.edges(photograph()), Detector.from_pretrained(folder, device="cpu").edges(photograph())
        )


class TestStages:
    def test_edges_uses_the_stage_that_is_given(self, students):
        image, model = photograph(), students / "conv"
        search = Tracer.from_pretrained(model, device="cpu")(image).edges
        student = Detector.from_pretrained(model, device="cpu").edges(image)
        assert not torch.equal(search, student)
        for stage, expected in ((1, search), (2, student), (None, student)):
            assert torch.equal(trace_fast.edges(image, model=model, stage=stage), expected)
        assert torch.equal(trace_fast.edges(image, model=model / "student"), student)
        (result,) = trace_fast.edges([image[0]], model=model, stage=1)
        assert torch.equal(result, search)

    def test_without_a_student_stage_one_is_taken_and_stage_two_refused(self, tmp_path):
        model, image = embedded(tmp_path / "base"), photograph()
        assert torch.equal(
            trace_fast.edges(image, model=model), Tracer.from_pretrained(model, device="cpu")(image).edges
        )
        with pytest.raises(ValueError, match=r"load: model must be .* that has a student, got '.*base'"):
            trace_fast.edges(image, model=model, stage=2)

    @pytest.mark.parametrize("offline", [False, True])
    def test_a_student_on_the_hub_is_known(self, folder, tmp_path, monkeypatch, offline):
        def fetch(repository, name, **options):
            if offline or repository != "someone/student":
                raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
            return str(folder / name)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
        monkeypatch.chdir(tmp_path)
        assert has_student("someone/student") is not offline
        assert not has_student("someone/else") and not has_student("sdxl") and not has_student("no name")

    def test_a_student_that_was_replaced_is_read_anew(self, students, tmp_path):
        image, model = photograph(), tmp_path / "model"
        shutil.copytree(students / "conv", model)
        before = trace_fast.edges(image, model=model)
        assert torch.equal(trace_fast.edges(image, model=model), before)
        decoder = load_file(model / "student/decoder.safetensors")
        save_file({name: -x for name, x in decoder.items()}, model / "student/decoder.safetensors")
        after = trace_fast.edges(image, model=model)
        assert torch.equal(after, Detector.from_pretrained(model, device="cpu").edges(image))
        assert not torch.equal(after, before)

    @pytest.mark.parametrize("kind", [Tracer, Detector])
    def test_copies_and_pickles_give_the_same(self, students, kind):
        model = kind.from_pretrained(students / "conv", device="cpu")
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            one, two = model(photograph()), other(photograph())
            assert torch.equal(one, two) if kind is Detector else torch.equal(one.edges, two.edges)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("stage", [1, 2])
    def test_half_precision(self, stage, dtype):
        kind = (Tracer, Detector)[stage - 1]
        image = photograph()
        expected, edges = (kind.from_pretrained(device="cpu", dtype=choice)(image) for choice in (None, dtype))
        if stage == 1:
            expected, edges = expected.edges, edges.edges
        assert edges.dtype == torch.float32
        torch.testing.assert_close(edges, expected, rtol=0, atol=0.02)

    @pytest.mark.parametrize("dtype", ["float16", torch.float64])
    def test_a_dtype_that_is_none(self, dtype):
        with pytest.raises(TypeError, match=r"load: dtype must be torch\.float32 or .* torch\.float16, got"):
            Detector.from_pretrained(device="cpu", dtype=dtype)

    @pytest.mark.parametrize("stage", [0, 3, "2", True, [1]])
    def test_a_stage_that_is_none(self, students, stage):
        with pytest.raises(ValueError, match=re.escape(f"load: stage must be 1, 2 or None, got {stage!r}")):
            trace_fast.edges(photograph(), model=students / "conv", stage=stage)


class TestCommandLine:
    @pytest.fixture
    def call(self, students, tmp_path, monkeypatch):
        """`trace-fast edges` of a.png into a folder."""
        monkeypatch.chdir(tmp_path)
        pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save("a.png")

        def call(*options):
            words = ["edges", "a.png", "-o", "out", "--model", str(students / "conv"), "--device", "cpu", *options]
            return CliRunner().invoke(cli.app, words)

        return call

    @pytest.mark.parametrize(
        ("options", "kind"),
        [
            ((), Detector),
            (("--stage", "2"), Detector),
            (("--stage", "1"), Tracer),
            (("--timestep", "0"), Tracer),  # options of the search ask for it
        ],
        ids=str,
    )
    def test_edges(self, call, students, options, kind):
        result = call(*options)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        expected = kind.from_pretrained(students / "conv", device="cpu")("a.png")
        expected = expected if kind is Detector else expected.edges[0, 0].numpy()
        with Image.open("out/a.png") as picture:
            np.testing.assert_allclose(np.asarray(picture) / 255, expected, atol=0.5 / 255 + 1e-6)

    @pytest.mark.parametrize("option", [("--timestep", "iep"), ("--noising", "gaussian"), ("--curve",)], ids=str)
    def test_options_of_the_search_are_refused_with_the_student(self, call, option):
        result = call("--stage", "2", *option)
        assert (result.exit_code, result.stdout) == (2, "")
        assert option[0] in result.stderr and result.stderr.endswith(
            " are options of the search: give --stage 1 with them\n"
        )
        assert not Path("out").exists()

    @pytest.mark.parametrize(
        ("option", "keywords"),
        [
            (("--size", "64x96"), {"size": (64, 96)}),
            (("--dtype", "bfloat16"), {"dtype": torch.bfloat16}),
            (("--offload", "model"), {"offload": "model"}),
        ],
        ids=str,
    )
    def test_options_of_both_stages_do_not_choose_the_search(self, call, students, option, keywords):
        result = call(*option, "--bits", "16")
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        expected = Detector.from_pretrained(students / "conv", device="cpu", **keywords)("a.png")
        with Image.open("out/a.png") as picture:
            np.testing.assert_allclose(np.asarray(picture) / 65535, expected, rtol=0, atol=0.5 / 65535 + 1e-6)

    def test_a_model_without_a_student(self, call, tmp_path):
        embedded(tmp_path / "plain")
        result = call("--model", str(tmp_path / "plain"), "--stage", "2")
        assert result.exit_code == 2 and result.stderr.startswith("trace-fast: load: model must be ")
        assert result.stderr.count("\n") == 1

    @pytest.mark.slow
    def test_evaluate_scores_the_student_where_there_is_one(self, students, tmp_path):
        pytest.importorskip("skimage", reason="needs scikit-image: pip install 'trace_fast[eval]'")
        from trace_fast.evaluation import Photo, open_method

        pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
        labels = np.zeros((40, 56), np.uint8)
        labels[10:30, 10:40] = 1
        for name, picture in (("images", pixels), ("inst", labels)):
            (tmp_path / name).mkdir()
            Image.fromarray(picture).save(tmp_path / name / "a.png")
        model = students / "conv"
        student, search = (open_method(f"{model}{level}", device="cpu") for level in ("", "@0"))
        image = tmp_path / "images" / "a.png"
        photo = Photo("a", image, tmp_path / "inst" / "a.png", lambda: None)
        detector = Detector.from_pretrained(model, device="cpu")
        np.testing.assert_array_equal(student.edges(photo), detector(image))
        np.testing.assert_array_equal(
            search.edges(photo), Tracer.from_pretrained(model, device="cpu")(image, timestep=0).edges[0, 0].numpy()
        )
        assert student.identity != search.identity
        decoder = sum(x.numel() for x in detector.decoder.parameters())
        assert student.parameters - search.parameters == decoder == 9 * 96 + 1
        words = ["evaluate", "--data", str(tmp_path), "-o", str(tmp_path / "out"), "--device", "cpu"]
        result = CliRunner().invoke(cli.app, [*words, "--method", f"one step={model}", "--method", f"search={model}@0"])
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert set(report["methods"]) == {"one step", "search"}
        assert len({json.dumps(scores) for scores in report["methods"].values()}) == 2
