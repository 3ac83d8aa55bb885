"""Distillation of the one-step student: every family, resuming, shards, and clear errors."""

import errno
import itertools
import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from processes import start, start_two
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import PIPELINES, SIZE, dinov2, embedded, pipeline
from torch.testing import assert_close
from typer.testing import CliRunner

from trace_fast import Detector, Tracer, cli
from trace_fast.backbones.schedule import RectifiedFlow, VariancePreserving
from trace_fast.decoder import AttentionReadout
from trace_fast.detector import StudentPass
from trace_fast.io import files, visualize
from trace_fast.io.images import resize
from trace_fast.training import batches, data, distillation
from trace_fast.training.batches import Augmentation, Batch
from trace_fast.training.data import PhotoFile, list_photos, shuffle_photos
from trace_fast.training.distillation import Distillation, DistillConfig, distill
from trace_fast.training.labels import LABELS, label_scene, make_labels
from trace_fast.training.lora import inject
from trace_fast.training.losses import dice
from trace_fast.training.scenes import list_scenes, read_scene
from trace_fast.training.search import make_search
from trace_fast.training.shards import Shards
from trace_fast.training.state import Process

# of diffusers' own call of the hub
pytestmark = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")

FAMILIES = tuple(name for name in PIPELINES if name != "pixart-1024")
SINGLE = Process(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Refuse the network, use an empty cache, and one thread, so that sums have one order."""

    def refuse(*_, **__):
        raise AssertionError("a test asked for the network")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setenv("TRACE_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        diffusers.utils.logging.disable_progress_bar()
        diffusers.utils.logging.set_verbosity_error()
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Ten photos of a rectangle each, of different sizes."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for index in range(10):
        image = random.integers(0, 80, (40 + index, 60, 3), dtype=np.uint8)
        top, left = random.integers(4, 20, 2)
        image[top : top + 16, left : left + 24] += random.integers(60, 170, 3, dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return embedded(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def base(model, photos):
    """Four photos to train on, in shards of four."""
    return DistillConfig(
        model=str(model),
        images=photos,
        output=Path(),
        rank=2,
        rate=1e-2,
        epochs=2,
        batch=2,
        warmup=2,
        shard=4,
        device="cpu",
    )


@pytest.fixture
def config(base, tmp_path):
    return replace(base, output=tmp_path / "run")


@pytest.fixture
def call(config):
    """Run the command with the options of this configuration, some of them changed."""

    def call(*more, **changed):
        names = ("model", "images", "output", "rank", "rate", "epochs", "batch", "warmup", "shard", "device")
        values = {name: getattr(config, name) for name in names} | {"save-minutes": 0} | changed
        words = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
        return CliRunner().invoke(cli.app, ["distill", *words, *map(str, more)])

    return call


def read_weights(config):
    """Return the trained weights of a run, by name."""
    state = load_file(config.output / "state.safetensors")
    return {name: value for name, value in state.items() if name.startswith("model.")}


def read_progress(config):
    with safe_open(config.output / "state.safetensors", "pt") as stored:
        return json.loads(stored.metadata()["progress"])


def list_shards(config):
    """Return the times of the shards of a run, by file name."""
    return {path.name: path.stat().st_mtime_ns for path in (config.output / "labels").glob("*.safetensors")}


def find_shard(config, number):
    """Return the path of a shard of a run by its number, in the order in which they were written."""
    return sorted((config.output / "labels").glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)[number]


def list_in_order(config):
    """Return the photos of a run in its order."""
    return shuffle_photos(list_photos(config.images), config.seed)


def read_divergences(config):
    """Return the divergence of each photo of a run, by name."""
    photos = list_in_order(config)
    shards = config.open_divergences(photos)
    return {photo.name: shards.read(index).tolist() for index, photo in enumerate(photos)}


def assert_same(batch, other):
    """Compare two batches, which must be the same bit for bit."""
    for name, value in vars(batch).items():
        assert (value is None) == (getattr(other, name) is None)
        assert value is None or torch.equal(value, getattr(other, name))


def make_run(config):
    """Return a run that has not begun."""
    tracer = Tracer.from_pretrained(config.model, device="cpu", size=config.size)
    return Distillation(config, tracer, list_in_order(config), SINGLE)


def search(run):
    """Search the photos of a run, and return it."""
    tracer = Tracer.from_pretrained(run.config.model, device="cpu")
    batches = run.batches
    batches.divergences.write(make_search(run.config, tracer), batches.photos, run.config.shard)
    batches.divergences = run.config.open_divergences(batches.photos)
    return run


@pytest.mark.parametrize(
    "schedule",
    [
        VariancePreserving(prediction="velocity"),
        VariancePreserving(prediction="epsilon"),
        VariancePreserving(scaled=False),
        RectifiedFlow(),
    ],
    ids=lambda schedule: f"{type(schedule).__name__}-{getattr(schedule, 'prediction', 'velocity')}",
)
def test_denoising_with_the_true_prediction_returns_the_latent(schedule):
    latent, noise = torch.randn(2, 4, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 20, 499, 999])
    sample = schedule.noise(latent, noise, timesteps)
    if isinstance(schedule, RectifiedFlow):
        prediction = noise - latent
    else:
        prediction = noise if schedule.prediction == "epsilon" else schedule.velocity(latent, noise, timesteps)
    denoised = schedule.denoise(sample, prediction, timesteps)
    # the factors are float32, whose squares sum to 1 up to rounding; epsilon divides by them exactly
    assert_close(denoised, latent, rtol=0, atol=2e-6)
    assert (sample[0] - latent[0]).abs().max() > 1e-3 or isinstance(schedule, RectifiedFlow)


@pytest.fixture(scope="module", params=FAMILIES)
def distilled(request, photos, tmp_path_factory):
    """Folder of a tiny pipeline, output of its distillation by the command, and the result of the command."""
    folder = tmp_path_factory.mktemp(request.param)
    pipe = pipeline(request.param, folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "model")
    options = {"model": folder / "model", "images": photos, "output": folder / "out", "size": "16x24"}
    options |= {"device": "cpu", "rank": 2, "epochs": 2, "batch": 2, "license": "CC0"}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    result = CliRunner().invoke(cli.app, ["distill", *words])
    # a student needs none of them
    for part in (*(folder / "model").glob("text_encoder*"), *(folder / "model").glob("tokenizer*")):
        shutil.rmtree(part)
    return folder / "model", folder / "out", result


@pytest.mark.slow
class TestEveryFamily:
    def test_the_command_writes_student_state_shards_and_preview(self, distilled):
        _, out, result = distilled
        assert (result.exit_code, result.stdout) == (0, f"{out / 'student'}\n"), result.output
        assert {path.name for path in out.iterdir()} == {"labels", "preview.png", "state.safetensors", "student"}
        # a row for each of six photos, with four images of 3 : 2
        with Image.open(out / "preview.png") as preview:
            assert preview.height >= 6 * 192 and preview.width >= 4 * 288
        names = {"README.md", "config.json", "decoder.safetensors", "lora.safetensors", "null_text.safetensors"}
        assert {path.name for path in (out / "student").iterdir()} == names
        card = (out / "student" / "README.md").read_text()
        assert "4 photos" in card and "4 steps of 2" in card and "license CC0" in card

    def test_the_command_says_what_it_did(self, distilled):
        base, out, result = distilled
        # transformers shows bars, too
        lines = [line for line in result.stderr.splitlines() if line.startswith("trace-fast: ")]
        search, start, warning, end = lines
        assert search == "trace-fast: distill: 10 photos, of which 10 must be searched for labels"
        assert start == "trace-fast: distill: 4 steps of 2 from 4 photos, 6 photos for the preview alone"
        assert f"needs its base model, the folder '{base}' of this machine" in warning
        number = r"\d+\.\d{4}"
        assert re.fullmatch(
            rf"trace-fast: distill: 4 steps took \d+ s; loss of edges {number}, at first {number}; loss of the "
            rf"reconstruction {number}; to use the student: trace-fast edges photos/ -o edges/ --model {out}/student",
            end,
        )

    def test_the_student_gives_edges_without_text_encoders(self, distilled, monkeypatch, tmp_path):
        _, out, _ = distilled
        monkeypatch.setenv("TRACE_FAST_CACHE", str(tmp_path))  # empty
        detector = Detector.from_pretrained(out / "student", device="cpu", local_files_only=True)
        edges = detector(torch.rand(2, 3, 20, 30))
        assert edges.shape == (2, 1, 20, 30) and edges.isfinite().all() and edges.std() > 0
        assert detector.timestep == (20 if isinstance(detector.backbone.schedule, RectifiedFlow) else 0)
        assert not any(tmp_path.iterdir())

    def test_merged_adapters_equal_the_trained_ones(self, distilled, tmp_path):
        model, out, _ = distilled
        student = shutil.copytree(out / "student", tmp_path / "student")
        # adapters of a few steps change too little
        random = torch.Generator().manual_seed(0)
        stored = load_file(student / "lora.safetensors")
        stored = {name: torch.randn(x.shape, generator=random).half() / 4 for name, x in stored.items()}
        save_file(stored, student / "lora.safetensors")
        detector = Detector.from_pretrained(student, device="cpu")
        backbone = Tracer.from_pretrained(model, device="cpu", size=SIZE).backbone
        images, timestep = torch.rand(2, 3, *SIZE), torch.full((2,), detector.timestep)

        @torch.no_grad()
        def run_whole():
            readout = AttentionReadout(detector.decoder.values, backbone.read_grids())
            with backbone.capture(readout.on_attention):
                prediction = backbone.predict(backbone.encode(images), timestep)
            return detector.decoder(readout.result(), None), prediction

        plain_logits, plain_prediction = run_whole()
        adapters = inject(backbone, 2)
        assert_close(run_whole()[0], plain_logits, rtol=0, atol=1e-6)  # products start at zero
        assert set(stored) == set(adapters)
        for name, value in stored.items():
            adapters[name].data.copy_(value)
        logits, prediction = run_whole()
        assert (logits - plain_logits).abs().max() > 1e-3 and (prediction - plain_prediction).abs().max() > 1e-3
        with torch.no_grad():
            assert_close(detector._forward(images, None), logits, rtol=1e-4, atol=1e-5)
            # the rest of the network, too, which the student does not run
            merged = detector.backbone.predict(backbone.encode(images), timestep)
        assert_close(merged, prediction, rtol=1e-3, atol=1e-4)

    def test_the_students_folder_has_no_weights_of_the_base(self, distilled):
        model, out, _ = distilled
        stored = load_file(out / "student" / "lora.safetensors")
        assert stored and all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in stored)
        assert max(min(x.shape) for x in stored.values()) == 2  # the rank
        assert set(load_file(out / "student" / "decoder.safetensors")) == {"values", "bias"}
        assert json.loads((out / "student" / "config.json").read_text())["base"]["model"] == str(model)

    def test_every_projection_of_self_attention_is_adapted_and_nothing_else(self, distilled):
        model, out, _ = distilled
        stored = load_file(out / "student" / "lora.safetensors")
        backbone = Tracer.from_pretrained(model, device="cpu", size=SIZE).backbone
        names = {module: name for name, module in backbone.network.named_modules()}
        expected = {
            f"{names[module]}.{part}"
            for module in backbone.attentions()
            for part in backbone.find_layout(module).adapters
            if f"{names[module]}.{part}" in names.values()
        }
        assert {name.rpartition(".lora_")[0] for name in stored} == expected
        assert all(any(name.startswith(f"{names[module]}.") for name in expected) for module in backbone.attentions())
        # each learned something: products start at zero
        learned = {name for name, x in stored.items() if ".lora_B" in name and x.any()}
        assert {name.rpartition(".lora_")[0] for name in learned} == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "options"),
    [
        ("conv", {"decoder_rate": 3e-2}),
        # at a rate of 3e-2 it depends on the seed
        ("pixels", {"decoder_rate": 1e-2, "decoder_options": {"channels": 4, "detail": 1}}),
    ],
    ids=["conv", "pixels"],
)
def test_the_loss_falls(config, decoder, options):
    config = replace(config, decoder=decoder, epochs=50, **options)
    student = distill(config)
    (step, *first), (last_step, *last) = read_progress(config)["losses"]
    assert (step, last_step) == (50, 100)
    assert last[0] < 0.8 * first[0] and last[1] < first[1]  # Dice, reconstruction
    detector = Detector.from_pretrained(student, device="cpu")
    assert detector.decoder.name == decoder
    assert detector(torch.rand(3, 20, 30)).shape == (1, 1, 20, 30)


@pytest.mark.slow
def test_a_student_learns_the_edges_of_its_teacher(config):
    config = replace(config, decoder_rate=3e-2, epochs=50, labels="soft")
    detector = Detector.from_pretrained(distill(config), device="cpu")
    batches = make_run(config).batches
    batch = Batch.concatenate([batches.load_photo(index) for index in range(6, 10)])  # those it was trained on
    with torch.no_grad():
        edges = detector._forward(batch.images, None).sigmoid()
    assert torch.corrcoef(torch.stack([edges.flatten(), batch.labels.flatten()]))[0, 1] > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("pair", list(itertools.combinations(LABELS[:-1], 2)), ids=" and ".join)
def test_other_labels_give_another_student(config, pair):
    one, other = (replace(config, output=config.output / kind, labels_dir=config.output, labels=kind) for kind in pair)
    distill(one), distill(other)
    difference = read_weights(one)["model.decoder.values"] - read_weights(other)["model.decoder.values"]
    assert difference.abs().max() > 1e-4


def test_labels_are_sharpened_by_the_photo_that_the_decoder_sees(config, monkeypatch):
    config = replace(config, labels="sharpened", decoder="pixels", decoder_options={"channels": 4, "columns": 8})
    calls = []

    def record(abdiv, size, photo, *more):
        calls.append((size, photo))
        return make_labels(abdiv, size, photo, *more)

    monkeypatch.setattr(batches, "make_labels", record)
    photo = search(make_run(config)).batches.load_photo(7)
    [(size, shown)] = calls
    assert size == (64, 96) and torch.equal(shown, photo.photos)  # twice the network's
    assert photo.labels.shape == (1, 1, 64, 96)


def test_without_reconstruction_the_output_of_the_last_attention_learns_nothing(config):
    distill(replace(config, reconstruction=0))
    last = {name: x for name, x in read_weights(config).items() if "blocks.1.attn" in name and ".lora_B" in name}
    assert {name.split(".")[4] for name, x in last.items() if x.any()} == {"to_q", "to_k"}
    assert len(last) == 4


def test_bfloat16_keeps_trained_weights_in_float32(config):
    half = replace(config, output=config.output.with_name("half"), labels_dir=config.output / "labels")
    half = replace(half, dtype="bfloat16")
    distill(config), distill(half)
    first, second = read_weights(config), read_weights(half)
    assert {x.dtype for x in second.values()} == {torch.float32}
    assert max((first[name] - second[name]).abs().max() for name in first) > 1e-6
    assert_close(first["model.decoder.values"], second["model.decoder.values"], rtol=0, atol=5e-3)


def test_students_share_divergences(config, monkeypatch):
    folder = config.output.with_name("shared")
    distill(replace(config, labels_dir=folder))
    assert not (config.output / "labels").exists() and len(list(folder.iterdir())) == 3
    monkeypatch.setattr(Shards, "write", lambda *_: pytest.fail("searched again"))
    student = distill(replace(config, output=config.output.with_name("other"), labels_dir=folder, rank=3))
    adapter = Detector.from_pretrained(student, device="cpu").adapter
    assert adapter["blocks.0.attn.to_q.lora_A.weight"].shape == (3, 16)


def test_labels_of_another_teacher_size_are_resized_to_the_students_grid(config):
    student = distill(replace(config, teacher_size=(48, 32)))
    with safe_open(find_shard(config, 0), "pt") as stored:
        assert [stored.get_slice(name).get_shape() for name in stored.keys()] == [[1, 12, 8]] * 4  # noqa: SIM118
    assert Detector.from_pretrained(student, device="cpu").decoder.grid == (8, 12)
    assert "Teacher: ABDiv at 48x32 pixels" in (student / "README.md").read_text()


def test_a_finished_run_says_so(config, caplog):
    caplog.set_level(logging.INFO, "trace_fast")
    distill(config)
    assert "finished by an earlier run" not in caplog.text
    distill(config)
    assert "distill: 10 photos, of which 0 must be searched for labels" in caplog.messages
    assert (
        "distill: 4 steps of 2 from 4 photos, 6 photos for the preview alone; already finished by an earlier run"
        in caplog.messages
    )


def test_the_card_names_a_base_on_the_hub(config, monkeypatch):
    from huggingface_hub import ModelCard

    folder = distill(config)
    data = ModelCard((folder / "README.md").read_text()).data
    assert data.library_name == "trace_fast" and "edge-detection" in data.tags and data.base_model is None
    monkeypatch.setattr(distillation, "find_repository", lambda model: "owner/name" if model == config.model else None)
    assert ModelCard((distill(config) / "README.md").read_text()).data.base_model == "owner/name"


def test_the_card_has_the_timestep_of_the_teacher(config):
    card = (distill(replace(config, teacher_timestep=0)) / "README.md").read_text()
    assert "timestep 0; ternary labels" in card


class TestOrder:
    @pytest.fixture
    def run(self, config):
        return make_run(replace(config, decoder="pixels", decoder_options={"channels": 4, "columns": 8}))

    def test_a_photo_more_or_less_does_not_move_the_others(self):
        photos = [PhotoFile(f"{index}.png", Path(f"{index}.png")) for index in range(50)]
        order = shuffle_photos(photos, 3)
        assert set(order) == set(photos) and order != photos
        for index in (0, 17, 49):
            fewer = [photo for photo in photos if photo != order[index]]
            assert shuffle_photos(fewer[::-1], 3) == order[:index] + order[index + 1 :]

    def test_another_seed_gives_another_order(self):
        photos = [PhotoFile(f"{index}.png", Path(f"{index}.png")) for index in range(50)]
        assert len({tuple(shuffle_photos(photos, seed)) for seed in range(9)}) == 9

    def test_it_is_by_the_hash_of_seed_and_name(self):
        names = ["a/1.png", "b.tar/2.jpg", "\udcff.png"]  # the last is not valid UTF-8
        photos = [PhotoFile(name, Path("x"), length=7) for name in names]
        # SHA-256 of "0 a/1.png" begins with 89, of the others with 59 and c8
        assert [photo.name for photo in shuffle_photos(photos, 0)] == ["b.tar/2.jpg", "a/1.png", "\udcff.png"]

    def test_an_epoch_has_every_photo_once_but_those_of_the_preview(self, run):
        orders = set()
        for first in range(0, 20, 2):  # an epoch has two steps
            indices = [index for step in (first, first + 1) for index in run.batches.get_indices(step)[0]]
            assert sorted(indices) == [6, 7, 8, 9]
            orders.add(tuple(indices))
        assert len(orders) > 1

    def test_two_processes_share_the_batches_of_one(self, run):
        batches = search(run).batches
        whole = list(batches.iterate(0, slice(None)))
        shares = [list(batches.iterate(0, slice(index, None, 2))) for index in range(2)]
        assert len(whole) == batches.steps
        for batch, *parts in zip(whole, *shares, strict=True):
            assert_same(batch, Batch.concatenate(parts))

    def test_a_run_from_the_middle_has_the_same_batches(self, run):
        batches = search(run).batches
        for batch, other in zip(
            list(batches.iterate(0, slice(None)))[3:], batches.iterate(3, slice(None)), strict=True
        ):
            assert_same(batch, other)

    def test_images_are_mirrored_with_their_labels(self, run):
        batches, count = search(run).batches, 0
        for step in range(10):
            batch = batches.load(step)
            for row, index in enumerate(batches.get_indices(step)[0]):
                plain = batches.load_photo(index)
                mirrored = not torch.equal(batch.images[row], plain.images[0])
                count += mirrored
                for name in ("images", "photos", "labels", "weights"):
                    one, other = getattr(batch, name)[row], getattr(plain, name)[0]
                    assert torch.equal(one, other.flip(-1) if mirrored else other)
        assert 4 <= count <= 16

    def test_channels_are_shuffled_and_nothing_else(self, run):
        batches = search(run).batches
        batches.config = replace(run.config, channel_shuffle=1.0)
        shuffled = 0
        for step in range(10):
            batch = batches.load(step)
            for row, index in enumerate(batches.get_indices(step)[0]):
                plain = batches.load_photo(index)
                pairs = [(batch.images[row], plain.images[0]), (batch.photos[row], plain.photos[0])]
                if not torch.equal(batch.labels[row], plain.labels[0]):
                    pairs = [(one, other.flip(-1)) for one, other in pairs]
                # the same order in the image of the network and in that of the decoder
                orders = [
                    order
                    for order in itertools.permutations(range(3))
                    if all(torch.equal(one, other[list(order)]) for one, other in pairs)
                ]
                assert len(orders) == 1
                shuffled += orders[0] != (0, 1, 2)
        assert 8 <= shuffled <= 20

    def test_the_preview_shows_photos_that_are_not_trained_on(self, run, monkeypatch):
        rows = []
        original = visualize.panel

        def record(columns, *more, **options):
            rows.append(columns)
            return original(columns, *more, **options)

        monkeypatch.setattr(visualize, "panel", record)
        batches = search(run).batches
        run.write_preview()
        assert len(rows) == 6
        for index, (photo, _, labels, edges) in enumerate(rows):
            whole = batches.load_photo(index)
            # pixels without a label are gray
            target = torch.where(whole.weights > 0, whole.labels, 0.5)[0, 0, ::2, ::2]
            assert target.unique().tolist() == [0, 0.5, 1]
            assert torch.equal(photo, whole.images[0]) and torch.equal(labels, target)
            assert edges.shape == target.shape and edges.isfinite().all()


class TestStep:
    """One step of the optimizer."""

    @pytest.fixture
    def run(self, config):
        """Eight steps of two, with the options of the embedded student, at a timestep with much noise."""
        config = replace(
            config,
            decoder="pixels",
            decoder_options={"channels": 4, "columns": 8},
            labels="sharpened",
            timestep=300,
            reconstruction=100.0,
            epochs=4,
            warmup=4,
        )
        tracer = Tracer.from_pretrained(config.model, device="cpu")
        tracer.backbone.settings = replace(tracer.backbone.settings, edge_scale=0.4)
        return search(Distillation(config, tracer, list_in_order(config), SINGLE))

    def list_trained(self, run):
        """Return adapters and parameters of the decoder, with their peak rates."""
        assert run.adapters
        return [(x, 1e-2) for x in run.adapters.values()] + [(x, 3e-3) for x in run.decoder.parameters()]

    def test_it_is_adamw_at_a_rate_that_rises_and_falls(self, run):
        batch = run.batches.load(0)
        moments = {x: (0.0, 0.0) for x, _ in self.list_trained(run)}
        # rises over four steps, falls over the last half of eight
        for count, (run.step, share) in enumerate({0: 0.25, 2: 0.75, 4: 1.0, 6: 0.5, 7: 0.25}.items(), 1):
            before = [x.detach().clone() for x, _ in self.list_trained(run)]
            run.train_step(batch)
            for (x, peak), old in zip(self.list_trained(run), before, strict=True):
                mean, square = moments[x]
                mean, square = 0.9 * mean + 0.1 * x.grad, 0.999 * square + 0.001 * x.grad**2
                moments[x] = mean, square
                direction = mean / (1 - 0.9**count) / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
                assert_close(x.detach(), old - peak * share * direction, rtol=1e-5, atol=1e-6)

    def test_it_follows_dice_and_reconstruction(self, run, monkeypatch):
        schedule, calls = run.schedule, []

        def record(*arguments):
            calls.append(arguments)
            return schedule.noise(*arguments)

        monkeypatch.setattr(run, "schedule", SimpleNamespace(noise=record, denoise=schedule.denoise))
        monkeypatch.setattr(run.optimizer, "step", lambda: None)
        trained = [x for x, _ in self.list_trained(run)]
        for step in range(3):
            batch = run.batches.load(step)
            run.train_step(batch)
            latent, _, timestep = calls[-1]
            assert torch.equal(latent, run.backbone.encode(batch.images)) and timestep.tolist() == [300, 300]
            noisy = schedule.noise(*calls[-1])
            readout = AttentionReadout(run.decoder.values, run.backbone.read_grids())
            with run.backbone.capture(readout.on_attention):
                denoised = schedule.denoise(noisy, run.backbone.predict(noisy, timestep), timestep)
            edges = run.decoder(readout.result(), batch.photos).sigmoid()
            edge_loss = dice(edges, batch.labels, batch.weights)
            reconstruction = (denoised - latent).square().mean()
            assert_close(run.recent[-1], [edge_loss.item(), reconstruction.item()])
            expected = torch.autograd.grad(edge_loss + 100 * reconstruction, trained)
            length = torch.cat([x.flatten() for x in expected]).norm()
            assert length > 1  # and is clipped to 1
            for x, gradient in zip(trained, expected, strict=True):
                assert_close(x.grad, gradient / length, rtol=1e-3, atol=1e-5)
        noise = torch.stack([noise.flatten() for _, noise, _ in calls])
        assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
        assert_close(noise.corrcoef(), torch.eye(3), rtol=0, atol=0.05)  # independent in every step


# writes files as the library does, and ends itself by SIGKILL inside the n-th write of a name, or
# of a folder of that name, before the file appears
DEADLY = """
import os, signal
from contextlib import contextmanager
from pathlib import PosixPath
from trace_fast.training import state, shards, distillation
from trace_fast.io.files import write_atomically

left = {count}

@contextmanager
def deadly(path, op):
    global left
    with write_atomically(path, op) as file:
        yield file
        left -= {name!r} in (path.name, path.parent.name)
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

shards.write_atomically = state.write_atomically = deadly
distillation.distill(distillation.{config!r})
"""


# those of the paper, and those of the embedded student
RECIPES = {
    "paper": {},
    "sharpened": {
        "decoder": "pixels",
        "decoder_options": {"channels": 4, "columns": 8},
        "labels": "sharpened",
        "channel_shuffle": 0.5,
        "dtype": "bfloat16",
    },
}


@pytest.fixture(scope="module", params=RECIPES.values(), ids=RECIPES)
def uninterrupted(request, base, tmp_path_factory):
    """Return the configuration of a run that was not interrupted."""
    config = replace(base, output=tmp_path_factory.mktemp("uninterrupted"), **request.param)
    distill(config)
    return config


@pytest.mark.slow
class TestAfterAKill:
    @pytest.fixture
    def config(self, uninterrupted, tmp_path):
        return replace(uninterrupted, output=tmp_path / "run")

    def run_killed(self, config, name, count):
        """Distill in a process that is killed while it writes a file of this name for the n-th time."""
        process = start(DEADLY.format(name=name, count=count, config=config))
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, stderr

    def assert_same(self, config, uninterrupted):
        """Require the same result, bit for bit, except for the model card, which has the time."""
        for name in ("decoder.safetensors", "lora.safetensors", "config.json"):
            one, other = (run.output / "student" / name for run in (config, uninterrupted))
            assert one.read_bytes() == other.read_bytes(), name
        for name, value in load_file(uninterrupted.output / "state.safetensors").items():
            assert torch.equal(load_file(config.output / "state.safetensors")[name], value), name
        progress, expected = (
            {name: value for name, value in read_progress(run).items() if name != "seconds"}
            for run in (config, uninterrupted)
        )
        assert progress == expected and progress["step"] == 4

    def test_in_the_search_complete_shards_stay(self, config, uninterrupted):
        self.run_killed(config, "labels", 2)
        before = list_shards(config)
        assert len(before) == 1
        distill(config)
        after = list_shards(config)
        assert before.items() <= after.items() and len(after) == 3
        self.assert_same(config, uninterrupted)

    def test_in_the_training_it_continues_from_the_last_state(self, config, uninterrupted, monkeypatch):
        config = replace(config, save_minutes=0)  # after every step
        self.run_killed(config, "state.safetensors", 3)
        assert read_progress(config)["step"] == 2 and not (config.output / "student").exists()
        steps = []
        original = Distillation.train_step

        def record(run, *batch):
            steps.append(run.step)
            original(run, *batch)

        monkeypatch.setattr(Distillation, "train_step", record)
        monkeypatch.setattr(Shards, "write", lambda *_: pytest.fail("searched again"))
        distill(config)
        assert steps == [2, 3]
        self.assert_same(config, uninterrupted)

    def test_a_state_of_other_weights_is_refused(self, config, uninterrupted):
        shutil.copytree(uninterrupted.output, config.output)
        path = config.output / "state.safetensors"
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata()
        values = load_file(path)
        values["model.decoder.old"] = values.pop("model.decoder.values")
        save_file(values, path, metadata)
        with pytest.raises(ValueError, match="distill: output must be empty or hold a run of this version, got "):
            distill(config)

    def test_a_finished_run_is_not_trained_again(self, config, uninterrupted, monkeypatch):
        shutil.copytree(uninterrupted.output, config.output)
        monkeypatch.setattr(Distillation, "train_step", lambda *_: pytest.fail("trained again"))
        assert distill(config) == config.output / "student"
        self.assert_same(config, uninterrupted)


@pytest.mark.slow
class TestInitFrom:
    """A run that starts from a student."""

    @pytest.fixture
    def second(self, config, uninterrupted):
        """Return the configuration of a run that starts from the student of another."""
        return replace(
            uninterrupted,
            output=config.output,
            labels_dir=config.output / "labels",
            init_from=uninterrupted.output / "student",
        )

    def test_before_the_first_step_it_is_that_student(self, second, uninterrupted):
        run = make_run(second)
        decoder = load_file(uninterrupted.output / "student" / "decoder.safetensors")
        assert all(torch.equal(x, decoder[name]) for name, x in run.decoder.state_dict().items())
        adapter = load_file(uninterrupted.output / "student" / "lora.safetensors")
        assert adapter and all(torch.equal(x.half(), adapter[name]) for name, x in run.adapters.items())

    def test_it_continues_to_learn(self, second, uninterrupted):
        distill(second)
        before, after = read_weights(uninterrupted), read_weights(second)
        assert {name for name in after if not torch.equal(after[name], before[name])} == set(after)
        card = (second.output / "student" / "README.md").read_text()
        assert "Initial weights: the student in 'student'" in card

    def test_at_another_size_values_are_interpolated(self, second, uninterrupted):
        second = replace(second, size=(48, 64))
        run = make_run(second)
        resized = Detector.from_pretrained(uninterrupted.output / "student", device="cpu").resized(second.size)
        assert_close(run.decoder.values, resized.decoder.values)
        assert Detector.from_pretrained(distill(second), device="cpu").size == (48, 64)

    def test_a_student_of_format_1_is_read(self, second, tmp_path):
        old = shutil.copytree(second.init_from, tmp_path / "student")
        config = json.loads((old / "config.json").read_text())
        config["level"] = config.pop("timestep")
        del config["format"]
        (old / "config.json").write_text(json.dumps(config))
        if second.decoder == "pixels":
            with pytest.raises(ValueError, match="its format must be 3, got 1, in which the decoder pixels had one"):
                make_run(replace(second, init_from=old))
            return
        weights = load_file(old / "decoder.safetensors")
        run = make_run(replace(second, init_from=old))
        assert all(torch.equal(x, weights[name]) for name, x in run.decoder.state_dict().items())

    def test_a_student_without_adapters_gets_new_ones(self, config, model):
        first = distill(replace(config, rate=0))
        second = replace(config, output=config.output.with_name("second"), init_from=first)
        run, student = make_run(second), Detector.from_pretrained(first, device="cpu")
        assert run.adapters and not any(x.any() for name, x in run.adapters.items() if ".lora_B" in name)
        assert torch.equal(run.decoder.values, student.decoder.values)

    def test_another_student_is_another_run(self, second):
        distill(second)
        other = shutil.copytree(second.init_from, second.output.with_name("other") / "student")
        stored = load_file(other / "lora.safetensors")
        save_file({name: x + 1 for name, x in stored.items()}, other / "lora.safetensors")
        with pytest.raises(ValueError, match="output must be empty or hold a run of the same configuration"):
            distill(replace(second, init_from=other))
        moved = second.init_from.rename(second.output.with_name("moved"))
        try:
            assert distill(replace(second, init_from=moved)) == second.output / "student"
        finally:
            moved.rename(second.init_from)

    def test_students_that_do_not_fit(self, second, tmp_path):
        with pytest.raises(ValueError, match=r"init_from must be the folder of a student, got '.*nowhere'"):
            replace(second, init_from=tmp_path / "nowhere")
        refusal = r"init_from must be a student with decoder \w+ and adapters of rank "
        with pytest.raises(ValueError, match=refusal + r"\[3\], got rank \[2\] instead of \[3\]$"):
            replace(second, rank=3)
        with pytest.raises(ValueError, match=refusal + r"\[\], got"):
            replace(second, rate=0.0)
        other = {"decoder": "pixels", "decoder_options": {"channels": 2, "columns": 8}}
        with pytest.raises(ValueError, match=refusal + r"\[2\], got .*channels \w+ instead of 2"):
            replace(second, **other)

    def test_a_student_of_another_network(self, second, tmp_path):
        other = shutil.copytree(second.init_from, tmp_path / "student")
        stored = load_file(other / "lora.safetensors")
        save_file({name.replace("blocks.0", "blocks.7"): x for name, x in stored.items()}, other / "lora.safetensors")
        with pytest.raises(ValueError, match=r"init_from must be a student of the same model, got .*other layers"):
            make_run(replace(second, init_from=other))


def test_a_finished_run_continues_with_more_epochs(config):
    distill(config)
    before = read_weights(config)
    student = distill(replace(config, epochs=3))
    assert read_progress(config)["step"] == 6 and "6 steps of 2" in (student / "README.md").read_text()
    assert not torch.equal(read_weights(config)["model.decoder.values"], before["model.decoder.values"])


def test_at_rate_zero_the_network_stays_as_it_is(config, model):
    student = distill(replace(config, rate=0.0))
    detector = Detector.from_pretrained(student, device="cpu")
    assert detector.adapter == {}
    assert set(read_weights(config)) == {"model.decoder.values", "model.decoder.bias"}
    plain = Tracer.from_pretrained(model, device="cpu").backbone.network.state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in detector.backbone.network.state_dict().items())


@pytest.mark.slow
class TestShards:
    @pytest.fixture
    def images(self, photos, tmp_path):
        """Copy the photos, to change them."""
        return shutil.copytree(photos, tmp_path / "images")

    @pytest.fixture
    def searched(self, monkeypatch):
        """Names of the photos that are searched."""
        names = []
        original = Shards.write

        def record(shards, search, photos, *more):
            names.extend(photo.name for photo in photos)
            original(shards, search, photos, *more)

        monkeypatch.setattr(Shards, "write", record)
        return names

    @pytest.mark.parametrize("photographs", [None, "[1"])
    def test_damaged_metadata_are_reported(self, tmp_path, caplog, photographs):
        keys = {} if photographs is None else {"photographs": photographs}
        save_file({"maps": torch.zeros(1)}, tmp_path / "a.safetensors", {"teacher": "here"} | keys)
        assert Shards(tmp_path, "here", []).rows == {}
        assert "a.safetensors is damaged, its photos are searched again" in caplog.text

    def test_a_damaged_one_is_reported_and_searched_again(self, config, call):
        distill(config)
        path = find_shard(config, 1)
        shards, divergences = list_shards(config), read_divergences(config)
        path.write_bytes(path.read_bytes()[:-5])
        (config.output / "state.safetensors").unlink()
        result = call()
        assert result.exit_code == 0
        lines = [line for line in result.stderr.splitlines() if "is damaged" in line]
        assert len(lines) == 1 and f"{path.name} is damaged, its photos are searched again" in lines[0]
        assert read_divergences(config) == divergences
        changed = {name for name, time in list_shards(config).items() if time != shards[name]}
        assert changed == {path.name}

    @pytest.mark.parametrize(
        ("change", "difference"),
        [
            ({"teacher_timestep": 99}, "timestep None instead of 99"),
            ({"seed": 1, "revision": "x"}, "revision None instead of x; seed 0 instead of 1"),
            ({"teacher_size": (16, 24)}, "size None instead of [16, 24]"),
        ],
        ids=str,
    )
    def test_those_of_another_teacher_are_refused(self, config, change, difference):
        distill(config)
        before, path = list_shards(config), min((config.output / "labels").iterdir())
        refusal = "distill: labels_dir must be empty or hold labels of the same teacher, got "
        with pytest.raises(ValueError, match=re.escape(f"{refusal}{difference} in '{path}'") + "$"):
            distill(replace(config, **change))
        assert list_shards(config) == before

    def test_they_have_the_divergences_of_the_tracer(self, config):
        config = replace(config, teacher_timestep=299, teacher_noising="gaussian", seed=3)
        run = search(make_run(config))
        tracer = Tracer.from_pretrained(config.model, device="cpu")
        indices = [7, 2, 2, 5]
        divergences = [
            tracer(run.batches.photos[index].read(), timestep=299, noising="gaussian", seed=3, return_abdiv=True).abdiv
            for index in indices
        ]
        stored = torch.cat([run.batches.divergences.read(index).float() for index in indices])
        assert_close(stored, torch.cat(divergences), rtol=1e-3, atol=1e-5)  # as float16

    def test_those_of_another_version_are_refused(self, config):
        distill(config)
        path = find_shard(config, 1)
        save_file(load_file(path), path, {"identity": "x"})
        with pytest.raises(ValueError, match=f"the same teacher, got a file of another version in '.*{path.name}'"):
            distill(config)

    def test_those_of_other_photos_alone_are_refused(self, config, images):
        distill(config)
        for path in list(images.iterdir()):
            path.rename(images / f"other-{path.name}")
        with pytest.raises(
            ValueError, match=r"labels of the same photos, got those of other photos alone in '.*labels'$"
        ):
            distill(replace(config, images=images))

    def test_without_a_photo_nothing_is_searched_again(self, config, images, searched):
        distill(config)
        searched.clear()
        shards, divergences = list_shards(config), read_divergences(config)
        removed = list_in_order(config)[3].name
        (images / removed).unlink()
        fewer = replace(config, images=images)
        card = (distill(fewer) / "README.md").read_text()
        assert "Data: 3 photos" in card and list_shards(config) == shards and not searched
        del divergences[removed]
        assert read_divergences(fewer) == divergences

    @pytest.mark.parametrize("limit", [None, 10])
    def test_of_more_photos_only_the_new_ones_are_searched(self, config, images, searched, limit):
        for name in ("3.png", "8.png"):
            (images / name).rename(images.parent / name)
        config = replace(config, images=images, limit=limit)
        distill(config)
        searched.clear()
        shards, divergences = list_shards(config), read_divergences(config)
        for name in ("3.png", "8.png"):
            (images.parent / name).rename(images / name)
        distill(config)
        assert set(searched) == {"3.png", "8.png"}
        assert shards.items() <= list_shards(config).items() and len(list_shards(config)) == len(shards) + 1
        again = replace(config, output=config.output.with_name("again"))
        distill(again)
        assert divergences.items() <= read_divergences(config).items()
        assert read_divergences(config) == read_divergences(again)

    def test_a_replaced_photo_is_searched(self, config, images, searched):
        distill(config)
        searched.clear()
        shutil.copy(images / "5.png", images / "4.png")
        distill(replace(config, images=images))
        assert searched == ["4.png"]

    def test_students_of_more_and_fewer_photos_share_them(self, config, searched):
        folder = config.output.with_name("shared")
        distill(replace(config, labels_dir=folder))
        searched.clear()
        fewer = replace(config, output=config.output.with_name("fewer"), labels_dir=folder, limit=8)
        assert "Data: 2 photos" in (distill(fewer) / "README.md").read_text() and not searched

    def test_a_run_does_not_replace_those_of_another_run(self, config, tmp_path):
        """Let two runs list a shared folder while it is empty; one trains while the other one searches."""
        run, folder = make_run(config), tmp_path / "shared"
        tracer = Tracer.from_pretrained(config.model, device="cpu")
        halves = run.batches.photos[:5], run.batches.photos[5:]
        first, second = (Shards(folder, config.describe_teacher(), half) for half in halves)
        assert not first.rows and not second.rows
        first.write(make_search(config, tracer), halves[0], config.shard)
        trained = Shards(folder, config.describe_teacher(), halves[0])
        assert len(trained.rows) == 5
        second.write(make_search(config, tracer), halves[1], config.shard)
        for index, photo in enumerate(halves[0]):
            expected = tracer(photo.read(), return_abdiv=True).abdiv
            assert_close(trained.read(index).float(), expected, rtol=1e-3, atol=1e-5)  # as float16

    def test_equal_runs_write_files_of_equal_names(self, config, tmp_path):
        tracer = Tracer.from_pretrained(config.model, device="cpu")
        photos = list_in_order(config)
        for name in ("one", "two"):
            shards = Shards(tmp_path / name, config.describe_teacher(), photos)
            shards.write(make_search(config, tracer), photos, config.shard)
        one, two = ({path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
        assert len(one) == 3 and one == two

    @pytest.mark.parametrize("help_of_a_student", [False, True])
    def test_parts_write_the_files_of_one_process(self, config, call, tmp_path, searched, help_of_a_student):
        options = {"shard": 2, "epochs": 0}
        if help_of_a_student:
            options |= {"labels": "combined", "labels-student": distill(replace(config, output=tmp_path / "helper"))}
        assert call(output=tmp_path / "one", **options).exit_code == 0
        expected = {
            path.relative_to(tmp_path / "one"): path.read_bytes()
            for path in (tmp_path / "one").rglob("labels/**/*")
            if path.is_file()
        }
        for part, count in (("2/3", 2), ("0/3", 4), ("1/3", 4)):
            searched.clear()
            result = call(output=tmp_path / "run", part=part, **options)
            assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'run' / 'labels'}\n")
            assert len(set(searched)) == count
        searched.clear()
        assert not (tmp_path / "run" / "student").exists()
        assert call(output=tmp_path / "run", part="1/3", **options).exit_code == 0
        assert call(output=tmp_path / "run", **options).exit_code == 0 and not searched
        for name, content in expected.items():
            assert (tmp_path / "run" / name).read_bytes() == content
        for name in ("decoder.safetensors", "lora.safetensors"):
            one, other = (tmp_path / run / "student" / name for run in ("one", "run"))
            assert one.read_bytes() == other.read_bytes()

    def test_a_part_that_does_not_exist(self, call):
        result = call(part="2/2")
        assert result.exit_code == 2 and "distill: part must be from 0/N to one below N/N, got '2/2'" in result.stderr

    def test_a_folder_that_disappears_while_it_is_used_is_noticed(self, config):
        photos = list_in_order(config)
        shards = config.open_divergences(photos)
        assert not shards.rows
        with pytest.raises(ValueError, match=r"^distill: labels_dir must keep its files while they are used, got one "):
            shards.read(0)

    def test_a_file_that_is_replaced_while_it_is_used_is_noticed(self, config):
        distill(config)
        photos = list_in_order(config)
        shards = config.open_divergences(photos)
        path, row = shards.rows[photos[0].key]
        shutil.copy(next(other for other, _ in shards.rows.values() if other != path), path)
        with pytest.raises(ValueError, match=r"^distill: labels_dir must keep its files while they are used, got one "):
            shards.read(0)
        assert row == 0

    def test_those_of_an_earlier_run_are_not_kept_in_memory(self, config):
        first = replace(config, shard=100)
        distill(first)
        other = replace(first, output=first.output / "other", seed=1)
        distill(other)
        expected = read_weights(other)
        shutil.rmtree(config.output)
        distill(replace(first, seed=1))  # another search in the same folder
        assert all(torch.equal(x, expected[name]) for name, x in read_weights(config).items())


class TestErrors:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "folder", "count"), [("labels", "labels", 1), ("state", "", 3), ("lora", "student", 3)]
    )
    def test_a_full_disk_is_reported_and_complete_files_stay(self, config, call, monkeypatch, name, folder, count):
        original = os.replace

        def fail(source, target):
            is_second_shard = name == target.parent.name and len(list_shards(config)) == 1
            if target.stem == name or is_second_shard:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", fail)
            result = call()
        assert result.exit_code == 2 and result.stdout == ""
        assert "[Errno 28]" in result.stderr and "the disk must have room for" in result.stderr
        assert result.stderr.endswith(f"'{config.output / folder}'\n")
        assert "Traceback" not in result.stderr
        before = list_shards(config)
        assert len(before) == count and not list(config.output.rglob("*.part"))
        assert call().exit_code == 0  # with space again
        assert before.items() <= list_shards(config).items()

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("change", "difference"),
        [
            ({"rank": 3}, "rank 2 instead of 3"),
            ({"batch": 1, "rate": 0.02}, "rate 0.01 instead of 0.02; batch 2 instead of 1"),
            ({"limit": 9}, "limit None instead of 9"),
        ],
        ids=str,
    )
    def test_another_configuration_in_the_same_folder(self, config, call, change, difference):
        assert call().exit_code == 0
        before = {path: path.read_bytes() for path in (config.output / "student").iterdir()}
        result = call(**change)
        assert result.exit_code == 2
        refusal = "distill: output must be empty or hold a run of the same configuration"
        path = config.output / "state.safetensors"
        assert result.stderr.splitlines()[-1] == f"trace-fast: {refusal}, got {difference} in '{path}'"
        assert before == {path: path.read_bytes() for path in (config.output / "student").iterdir()}

    def test_another_configuration_is_refused_before_more_is_searched(self, config, photos, tmp_path, monkeypatch):
        images = shutil.copytree(photos, tmp_path / "images")
        distill(replace(config, images=images))
        shutil.copy(images / "0.png", images / "more.png")
        monkeypatch.setattr(Tracer, "__call__", lambda *_, **__: pytest.fail("searched before"))
        with pytest.raises(ValueError, match="same configuration, got rank 2 instead of 3 in "):
            distill(replace(config, images=images, rank=3))

    def test_a_damaged_state(self, config, call):
        distill(config)
        state = config.output / "state.safetensors"
        state.write_bytes(state.read_bytes()[:-8])
        result = call()
        assert result.exit_code == 2
        assert "distill: output must hold a state that is not damaged, got" in result.stderr

    @pytest.fixture
    def damaged(self, photos, tmp_path):
        """Ten photos, and three files that cannot be used: text, a cut photo, and one that is too small."""
        images = shutil.copytree(photos, tmp_path / "damaged")
        (images / "text.png").write_bytes(b"no picture")
        (images / "cut.png").write_bytes((images / "7.png").read_bytes()[:2000])
        Image.new("RGB", (40, 15)).save(images / "small.png")
        return images

    REASONS = (
        "cut.png in '{}/cut.png': edges: image must be readable to its end, got a PIL image: image file is truncated",
        "small.png in '{}/small.png': edges: image must be at least 16 pixels high and wide, got 15 x 40 in a PIL "
        "image",
        "text.png in '{}/text.png': edges: image must be an image file, got a file, which Pillow cannot read",
    )

    def find_headline(self, stderr, images):
        """Return the line before the list of damaged photos, which must be complete."""
        lines = stderr.splitlines()
        first = next(number for number, line in enumerate(lines) if line.startswith("  cut.png"))
        assert "Traceback" not in stderr
        assert lines[first : first + 3] == [f"  {reason.format(images)}" for reason in self.REASONS]
        return lines[first - 1]

    def test_damaged_photos_are_all_listed_before_the_search(self, config, call, damaged, monkeypatch):
        monkeypatch.setattr(Tracer, "__call__", lambda *_, **__: pytest.fail("searched before"))
        result = call(images=damaged)
        assert result.exit_code == 2 and not result.stdout and not list_shards(config)
        refusal = "trace-fast: photos must be readable, got 3 damaged or too small; --skip-bad leaves them out:"
        assert self.find_headline(result.stderr, damaged) == refusal

    @pytest.mark.slow
    def test_damaged_photos_are_left_out_and_listed(self, config, call, damaged):
        result = call("--skip-bad", images=damaged)
        assert (result.exit_code, result.stdout) == (0, f"{config.output / 'student'}\n")
        headline = "trace-fast: 3 photos cannot be read and are left out:"
        assert self.find_headline(result.stderr, damaged) == headline
        assert "Data: 4 photos" in (config.output / "student" / "README.md").read_text()
        # the result is as without them
        before = list_shards(config)
        other = replace(config, output=config.output.with_name("other"))
        distill(other)
        assert read_divergences(config) == read_divergences(other) and len(before) == 3
        assert all(torch.equal(x, read_weights(other)[name]) for name, x in read_weights(config).items())
        # they are listed again in a later call, until they are removed
        assert self.find_headline(call("--skip-bad", images=damaged).stderr, damaged) == headline
        assert call(images=damaged).exit_code == 2
        for name in ("cut.png", "small.png", "text.png"):
            (damaged / name).unlink()
        result = call(images=damaged)
        assert result.exit_code == 0 and "left out" not in result.stderr and list_shards(config) == before

    def test_only_photos_to_search_are_checked(self, config, damaged, monkeypatch):
        config = replace(config, images=damaged, skip_bad=True)
        counts = []
        original = data.find_damaged

        def record(photos, **options):
            counts.append(len(photos))
            return original(photos, **options)

        monkeypatch.setattr(data, "find_damaged", record)
        distill(config)
        find_shard(config, 1).unlink()
        distill(config)
        assert counts == [13, 4 + 3]

    def test_too_few_photos_remain(self, config, damaged):
        for index in range(4):
            (damaged / f"{index}.png").unlink()
        with pytest.raises(ValueError, match="distill: images must be at least 7 photos, got 6"):
            distill(replace(config, images=damaged, skip_bad=True))

    def test_photos_of_too_many_pixels(self, call, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # twice as many are refused
        result = call()
        assert result.exit_code == 2 and not result.stdout
        assert "trace-fast: photos must be readable, got 10 damaged or too small;" in result.stderr
        lines = [line for line in result.stderr.splitlines() if "must have at most" in line]
        assert len(lines) == 10 and all("pixels, got more in a file" in line for line in lines)

    def test_photos_that_are_damaged_after_the_search(self, config, call, photos, tmp_path):
        images = shutil.copytree(photos, tmp_path / "images")
        distill(replace(config, images=images, epochs=1))
        (config.output / "state.safetensors").unlink()
        for path in images.iterdir():
            path.write_bytes(bytes(path.stat().st_size))
        result = call(images=images)
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith("trace-fast: photos must be readable, got ")

    @pytest.mark.parametrize("option", ["epochs", "rate", "decoder-rate", "reconstruction"])
    def test_numbers_must_be_finite(self, call, option):
        result = call(f"--{option}", "inf")
        name = option.replace("-", "_")
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1] == f"trace-fast: distill: {name} must be finite, got inf"

    def test_too_few_photos(self, call, photos, tmp_path):
        (tmp_path / "few").mkdir()
        for index in range(6):
            shutil.copy(photos / f"{index}.png", tmp_path / "few")
        result = call(images=tmp_path / "few")
        assert result.exit_code == 2
        assert result.stderr == "trace-fast: distill: images must be at least 7 photos, got 6\n"

    def test_a_missing_folder_of_photos(self, call):
        result = call(images="nowhere")
        assert result.exit_code == 2
        assert result.stderr == "trace-fast: photos must be a folder of image or tar files, got 'nowhere'\n"

    def test_an_encoder(self, call, config, tmp_path):
        dinov2().save_pretrained(tmp_path / "encoder")
        result = call(model=tmp_path / "encoder")
        assert result.exit_code == 2
        assert "distill: model must be a diffusion model, got the encoder" in result.stderr
        assert not list_shards(config)

    def test_more_processes_than_photos_in_a_batch(self, config, monkeypatch):
        monkeypatch.setattr(Process, "connect", lambda device, op: replace(SINGLE, count=4))
        with pytest.raises(ValueError, match="distill: batch must be at least the 4 processes, got 2"):
            distill(config)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--size", "31x48"), "mini: size must be positive multiples of 4 pixels, got (31, 48)"),
            (("--size", "48"), "--size must be height and width in pixels, such as 512x768, got '48'"),
            (("--teacher-size", "48"), "--teacher-size must be height and width in pixels, such as 512x768, got '48'"),
            (("--teacher-timestep", "1000"), "--teacher-timestep must be iep or an integer from 0 to 999, got '1000'"),
            (("--size", "30x48", "--teacher-size", "32x48"), "mini: size must be positive multiples of 4 pixels, got "),
            (("--checkpointing",), "distill: checkpointing must be off for a network not of diffusers, got "),
            (("--decoder-options", "channels=4"), "decoder conv does not have these options: "),
        ],
    )
    def test_options_that_do_not_fit_are_refused_before_the_search(self, call, options, message, monkeypatch):
        monkeypatch.setattr(Shards, "write", lambda *_: pytest.fail("searched before"))
        result = call(*options)
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith(f"trace-fast: {message}")

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"labels": "hard"}, ValueError, "distill: labels must be .*ternary.*, got 'hard'"),
            ({"decoder": "cnn"}, ValueError, "distill: decoder must be .*conv.*, got 'cnn'"),
            ({"dtype": "float16"}, ValueError, "distill: dtype must be .*, got 'float16'"),
            ({"teacher_noising": "pink"}, ValueError, "distill: teacher_noising must be .*gaussian.*, got 'pink'"),
            ({"teacher_timestep": 1000}, ValueError, "timestep must be from 0 to 999, got 1000"),
            ({"teacher_timestep": "late"}, TypeError, "timestep must be 'iep' or an integer.*, got 'late'"),
            ({"rank": 0}, ValueError, "distill: rank must be .* got 0"),
            ({"batch": 1.5}, TypeError, "distill: batch must be .* got .*"),
            ({"interior": 1.1}, ValueError, "distill: interior must be .* got 1.1"),
            ({"limit": 6}, ValueError, "distill: limit must be .* got 6"),
            ({"seed": -1}, ValueError, "distill: seed must be at least 0, got -1"),
            ({"rate": float("nan")}, ValueError, "distill: rate must be .* got nan"),
            ({"epochs": float("inf")}, ValueError, "distill: epochs must be finite, got inf"),
            ({"channel_shuffle": float("nan")}, ValueError, "distill: channel_shuffle must be from 0 to 1, got nan"),
            ({"save_minutes": float("nan")}, ValueError, "distill: save_minutes must be at least 0, got nan"),
            ({"timestep": "iep"}, TypeError, "distill: timestep must be an int, got str"),
            ({"timestep": 1000}, ValueError, "distill: timestep must be from 0 to 999, got 1000"),
            ({"decoder_options": {"channels": 4}}, ValueError, "decoder conv does not have these options: .*channels"),
            ({"decoder": "pixels", "decoder_options": {"columns": 65}}, ValueError, "columns must be from 1 to 64"),
            ({"decoder": "pixels", "decoder_options": {"columns": 0}}, ValueError, "columns must be at least 1, got 0"),
            ({"decoder": "pixels", "decoder_options": {"columns": "6"}}, TypeError, "columns must be an int, got str"),
            (
                {"decoder": "pixels", "decoder_options": {"channels": 0}},
                ValueError,
                "channels must be at least 1, got 0",
            ),
            ({"decoder": "pixels", "decoder_options": {"detail": -1}}, ValueError, "detail must be at least 1, got -1"),
        ],
        ids=str,
    )
    def test_options_out_of_range(self, config, change, error, message):
        with pytest.raises(error, match=message):
            replace(config, **change)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sd3.5-large"])
def test_checkpointing_changes_nothing(config, family, tmp_path, monkeypatch):
    pipe = pipeline(family, tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "model")
    model, folder = str(tmp_path / "model"), tmp_path / "labels"
    plain = replace(config, model=model, size=SIZE, teacher_timestep=0, epochs=1, labels_dir=folder)
    checkpointed = replace(plain, output=config.output.with_name("checkpointed"), checkpointing=True)
    calls = []
    original = AttentionReadout.on_attention

    def record(readout, *block):
        calls.append(torch.is_grad_enabled())
        original(readout, *block)

    monkeypatch.setattr(AttentionReadout, "on_attention", record)
    counts = []
    for run in (plain, checkpointed):
        calls.clear()
        distill(run)
        counts.append(sum(calls))
    assert counts[1] == 2 * counts[0] > 0  # every attention ran once more, in the backward pass
    first, second = read_weights(plain), read_weights(checkpointed)
    for name, value in first.items():
        assert_close(second[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_learn_what_one_does(config, tmp_path):
    # much noise, gradients that are clipped, and a last step whose direction is that of the gradient
    config = replace(config, batch=3, timestep=300, epochs=3, reconstruction=100.0)
    images = shutil.copytree(config.images, tmp_path / "images")
    for index in range(3):
        (images / f"bad{index}.png").write_bytes(b"no picture")
    one = replace(config, output=tmp_path / "one")
    two = replace(config, output=tmp_path / "two", images=images, skip_bad=True)
    code = f"from pathlib import PosixPath; from trace_fast.training.distillation import *; distill({two!r})"
    processes = start_two(code)
    distill(one)
    listed = []
    for process in processes:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        listed.append([line for line in stderr.splitlines() if "bad" in line])
    assert [len(lines) for lines in listed] == [3, 0]  # by one process, all of them
    assert set(list_shards(one)) == set(list_shards(two))
    assert read_progress(one)["step"] == read_progress(two)["step"] == 4
    np.testing.assert_allclose(read_progress(one)["recent"], read_progress(two)["recent"], rtol=1e-4)
    initial = make_run(one).state.parameters
    first, second = read_weights(one), read_weights(two)
    for name, parameter in initial.items():
        learned = (first[f"model.{name}"] - parameter.detach()).norm()
        difference = (first[f"model.{name}"] - second[f"model.{name}"]).norm()
        assert learned > 0 and difference < 0.02 * learned, name


class TestPhotos:
    def test_members_of_tar_files_are_read_in_place(self, photos, tmp_path):
        with tarfile.open(tmp_path / "part.tar", "w") as archive:
            for index in range(3):
                archive.add(photos / f"{index}.png", f"in/{index}.png")
        shutil.copy(photos / "5.png", tmp_path / "z.png")
        listed = list_photos(tmp_path)
        assert [photo.name for photo in listed] == [*(f"part.tar/in/{index}.png" for index in range(3)), "z.png"]
        for photo, original in zip(listed, ("0", "1", "2", "5"), strict=True):
            path = photos / f"{original}.png"
            assert torch.equal(photo.read(), PhotoFile(path.name, path).read())

    def test_a_damaged_tar_file_is_named(self, tmp_path):
        (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
        with pytest.raises(ValueError, match=r"photos must be readable, got a damaged tar file .*bad\.tar"):
            list_photos(tmp_path)


class TestScenes:
    """Scenes beside photos, windows, steps without attention, and a student that helps to label."""

    @pytest.fixture
    def scenes(self, tmp_path):
        """Five scenes of a square each, of 64 x 96 pixels, whose edges are known."""
        folder = tmp_path / "scenes"
        random = np.random.default_rng(0)
        for name in ("images", "inst"):
            (folder / name).mkdir(parents=True)
        for index in range(5):
            instances = np.zeros((64, 96), np.uint16)
            top, left = random.integers(4, 30, 2)
            instances[top : top + 24, left : left + 40] = 1
            image = np.where(instances[..., None] > 0, random.integers(0, 256, 3), random.integers(0, 256, 3))
            Image.fromarray(image.astype(np.uint8)).save(folder / "images" / f"{index:06d}.jpg", quality=95)
            Image.fromarray(instances).save(folder / "inst" / f"{index:06d}.png")
        return folder

    @pytest.fixture
    def config(self, config, scenes):
        options = {"channels": 4, "columns": 8}
        return replace(
            config, decoder="unet", decoder_options=options, scenes=scenes, window=32, loss="cross-entropy", batch=4
        )

    def make_batches(self, config, searched=False):
        """Return the batches of a run, whose photos are searched if they were not."""
        tracer = Tracer.from_pretrained(config.model, device="cpu", size=config.size)
        run = Distillation(config, tracer, list_in_order(config), SINGLE, list_scenes(config.scenes))
        return (run if searched else search(run)).batches

    def test_a_step_has_its_share_of_scenes(self, config):
        batches = self.make_batches(config)
        assert batches.steps == 4  # two epochs of four photos, two of them in a step
        orders = [batches.get_indices(step) for step in range(5)]
        assert {(len(photos), len(scenes)) for photos, scenes in orders} == {(2, 2)}
        assert sorted(index for _, scenes in orders[:2] for index in scenes) != [0, 0, 1, 1]
        assert sorted(index for _, scenes in orders for index in scenes) == sorted([*range(5)] * 2)

    def test_labels_of_scenes_are_exact(self, config):
        batches = self.make_batches(replace(config, window=None))
        batch = batches.load_scene(2)
        _, instances = read_scene(batches.scenes[2])
        expected, weights = label_scene(instances, (64, 96))
        assert torch.equal(batch.labels, expected) and torch.equal(batch.weights, weights)
        assert batch.windows is None and batch.photos.shape == (1, 3, 64, 96)

    def test_a_window_is_cut_from_photo_and_labels_alike(self, config):
        batches = self.make_batches(config)
        places = set()
        for step in range(8):
            batch = batches.load(step)
            assert batch.photos.shape == (4, 3, 32, 32) and batch.labels.shape == batch.weights.shape == (4, 1, 32, 32)
            assert batch.images.shape[-2:] == (32, 48)  # the network sees the whole image
            photos, scenes = batches.get_indices(step)
            for row, index in enumerate((*photos, *scenes)):
                whole = batches.load_photo(index) if row < len(photos) else batches.load_scene(index)
                height, width = whole.photos.shape[-2:]
                top, left, bottom, right = (
                    (batch.windows[row] * torch.tensor([height, width] * 2)).round().int().tolist()
                )
                assert (bottom - top, right - left) == (32, 32)
                places.add((top, left))
                for name in ("photos", "labels", "weights"):
                    maps = getattr(whole, name)
                    cuts = [x[0, :, top:bottom, left:right] for x in (maps, maps.flip(-1))]
                    assert any(torch.equal(getattr(batch, name)[row], cut) for cut in cuts)
        assert len(places) > 8

    def test_a_narrow_photo_is_enlarged_until_the_window_fits(self, config, monkeypatch):
        batches = self.make_batches(replace(config, window=80))
        assert batches.load(0).photos.shape == (4, 3, 80, 80)

    def test_without_a_window_photos_must_have_one_shape(self, config):
        batches = self.make_batches(replace(config, window=None, scenes_share=0.25))
        with pytest.raises(ValueError, match=r"window must be given .* got None and photos of \(\d+, \d+\) and \("):
            [batches.load(step) for step in range(4)]

    def test_jitter_changes_both_views_alike(self, config):
        batches = self.make_batches(replace(config, window=None, jitter=0.8, images=config.images))
        augmentation = Augmentation(gain=0.5, offset=0.2)
        plain, changed = batches.load_scene(0), batches.load_scene(0, augmentation)
        for name in ("images", "photos"):
            assert_close(getattr(changed, name), (getattr(plain, name) - 0.5) * 0.5 + 0.7)
        samples = [Augmentation.sample(np.random.default_rng(seed), 0, 0.8) for seed in range(50)]
        assert (
            0.2 <= min(sample.gain for sample in samples) < 0.5 and 1.5 < max(sample.gain for sample in samples) <= 1.8
        )
        assert -0.4 <= min(sample.offset for sample in samples) < -0.2

    @pytest.mark.slow
    def test_a_student_learns_from_scenes_alone(self, config):
        config = replace(config, scenes_share=1, rate=0, blank_attention=1, epochs=120, decoder_rate=1e-2)
        student = distill(config)
        losses = [loss for _, loss, _ in read_progress(config)["losses"]]
        assert losses[-1] < 0.7 * losses[0]
        assert len(list_shards(config)) == 2  # of the preview alone
        detector = Detector.from_pretrained(student, device="cpu")
        image, instances = read_scene(list_scenes(config.scenes)[0])
        edges, (label, _) = detector.edges(image[None] / 255), label_scene(instances, (64, 96))
        assert edges[label > 0].mean() > 3 * edges[label == 0].mean()

    def test_in_a_step_without_attention_the_network_does_not_run(self, config, monkeypatch):
        run = make_run(replace(config, scenes_share=1, blank_attention=1))
        run.batches = self.make_batches(replace(config, scenes_share=1))
        monkeypatch.setattr(run.backbone, "predict", lambda *_: pytest.fail("the network ran"))
        before = {name: x.detach().clone() for name, x in run.decoder.named_parameters()}
        run.train_step(run.batches.load(0))
        changed = {name for name, x in run.decoder.named_parameters() if not torch.equal(x, before[name])}
        assert "head.weight" in changed and "values" not in changed and run.recent[0][1] is None

    @pytest.mark.slow
    def test_a_resumed_run_equals_an_uninterrupted_one(self, config, monkeypatch):
        config = replace(config, blank_attention=0.5, jitter=0.3, channel_shuffle=0.5, epochs=6, save_minutes=0)
        other = replace(config, output=config.output.with_name("other"))
        distill(config)

        def stop(run, batch, train=Distillation.train_step):
            if run.step == 5:
                raise KeyboardInterrupt
            train(run, batch)

        monkeypatch.setattr(Distillation, "train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            distill(other)
        monkeypatch.undo()
        distill(other)
        first, second = read_weights(config), read_weights(other)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

    def test_abdiv_takes_the_place_of_features_of_tokens_and_the_photo_is_smaller(self, config):
        config = replace(config, rate=0.0)
        first = distill(config)
        second = replace(
            config,
            output=config.output.with_name("second"),
            decoder_options={"channels": 4, "abdiv": 0.25, "detail": 1.5},
            init_from=first,
        )
        old, new = Detector.from_pretrained(first, device="cpu"), make_run(second)
        assert new.decoder.options() == {"name": "unet", "columns": 0, "channels": 4, "detail": 1.5, "abdiv": 0.25}
        photo = torch.rand(1, 3, 32, 48)
        with torch.no_grad():
            assert_close(new.decoder(None, photo), old.decoder(None, photo), rtol=1e-4, atol=1e-5)
        student = Detector.from_pretrained(distill(second), device="cpu")
        assert student.decoder.abdiv == 0.25 and student.decoder.values.shape[1] == 0
        with pytest.raises(ValueError, match=r"rate must be 0 where the decoder reads ABDiv, .*, got 0.1"):
            replace(second, rate=0.1)

    def test_a_student_helps_to_label(self, config, monkeypatch):
        folder = config.output.with_name("shared")
        config = replace(config, labels_dir=folder)
        first = distill(config)
        searched = {path: path.stat().st_mtime_ns for path in folder.glob("*")}
        successor = replace(
            config, output=config.output.with_name("second"), labels="combined", labels_student=first, init_from=first
        )
        student = distill(successor)
        # divergences stay; the edges of the student are beside them
        assert searched.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("*")}.items()
        assert len(list(folder.iterdir())) == len(searched) + 1
        batches = self.make_batches(replace(successor, window=None), searched=True)
        detector = Detector.from_pretrained(first, device="cpu")
        photo = batches.photos[8].read()
        abdiv, stored = batches.divergences.read(8).float(), batches.helper.read(8).float() / 255
        shape, views = photo.shape[-2:], []
        student_pass = StudentPass(detector.backbone, detector.decoder, 0)
        size = detector.decoder.photo_size(shape, (32, 48))
        for side in (size, detector.decoder.photo_size(shape, (40, 60))):  # and at five quarters of that
            for flip in (lambda maps: maps, lambda maps: maps.flip(-1)):
                copy = flip(photo)
                with torch.no_grad():
                    logits = student_pass(resize(copy, (32, 48)), resize(copy, side))
                views.append(flip(resize(logits, size).sigmoid()))
        assert_close(stored, torch.stack(views).mean(0), rtol=0, atol=0.003)  # stored in 255 steps
        probability = 1 - torch.exp(-abdiv[:, None] / batches.scale)
        soft = torch.nn.functional.interpolate(probability, size, mode="bilinear")
        assert_close(batches.load_photo(8).labels, (stored * soft).sqrt(), rtol=0, atol=1e-5)
        assert "combined labels" in (student / "README.md").read_text()

    @pytest.mark.slow
    def test_no_ground_truth_beside_photos_is_opened(self, config, photos, tmp_path):
        """A student of scenes and one of the search's labels learn from a data set, and see its photos alone."""
        data = tmp_path / "data"
        shutil.copytree(photos, data / "images")
        for name in ("annotations/instances.json", "inst/0.png", "panoptic/0.png", "images/0.json"):
            (data / name).parent.mkdir(exist_ok=True)
            (data / name).write_text("the truth")
        opened: set[Path] = set()
        recording = True

        def record(event, arguments):
            if recording and event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | Path):
                opened.add(Path(arguments[0]))

        sys.addaudithook(record)  # it cannot be removed
        try:
            config = replace(config, images=data / "images")
            first = distill(config)
            distill(replace(config, output=tmp_path / "second", labels="combined", labels_student=first))
        finally:
            recording = False
        assert {path for path in opened if data in path.parents} == {data / "images", *(data / "images").glob("*.png")}

    @pytest.mark.slow
    def test_another_student_has_other_labels(self, config):
        first = distill(config)
        second = distill(replace(config, output=config.output.with_name("second"), seed=1))
        folder = config.output.with_name("labels")
        options = {"labels": "combined", "labels_dir": folder}
        for name, student in (("third", first), ("fourth", second)):
            distill(replace(config, output=config.output.with_name(name), labels_student=student, **options))
        maps = [
            replace(config, labels_student=student, **options).open_helper(list_in_order(config)).read(8)
            for student in (first, second)
        ]
        assert maps[0].shape == maps[1].shape and not torch.equal(*maps)
        # the divergences are searched once
        assert len([path for path in folder.iterdir() if path.is_file()]) == len(list_shards(config))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"labels": "combined"}, "labels_student must name a student for combined labels"),
            (
                {"labels_student": Path("x")},
                "labels_student must name a student for combined labels, and for them alone",
            ),
            ({"scenes": None, "scenes_share": 1.0, "decoder": "unet"}, None),
            ({"decoder": "conv", "decoder_options": {}}, "decoder must be one that sees the photo where window or"),
            ({"window": 16}, "window must be at least 32, got 16"),
            ({"window": 40}, "window must be a multiple of 16 pixels, got 40"),
            ({"scenes_share": 1.1}, "scenes_share must be from 0 to 1, got 1.1"),
            ({"loss": "mse"}, "loss must be 'dice' or 'cross-entropy', got 'mse'"),
        ],
        ids=str,
    )
    def test_options_that_do_not_fit(self, config, change, message):
        if message is None:
            replace(config, **change)
            return
        with pytest.raises(ValueError, match=f"distill: {message}"):
            replace(config, **change)

    def test_a_folder_without_scenes(self, config, tmp_path):
        with pytest.raises(ValueError, match=r"scenes must be a folder that .* wrote, got no scenes"):
            distill(replace(config, scenes=tmp_path / "nothing"))
