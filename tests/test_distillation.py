"""Distillation of the one-step student: labels and losses by hand, every family, resuming, and faults told."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import PIPELINES, SIZE, dinov2, embedded, pipeline
from torch.testing import assert_close
from typer.testing import CliRunner

from trace_fast import Detector, Tracer, cli
from trace_fast.backbones.schedule import RectifiedFlow, VariancePreserving
from trace_fast.decoder import AttentionReadout
from trace_fast.io import files as _files
from trace_fast.io import visualize
from trace_fast.io.images import resize
from trace_fast.training import data
from trace_fast.training import distillation as program
from trace_fast.training.data import Photograph, in_order, list_photographs
from trace_fast.training.distillation import Distillation, DistillConfig, dice, distill
from trace_fast.training.labels import LABELS, crests, draw_labels, pseudo_labels
from trace_fast.training.lora import inject
from trace_fast.training.shards import Shards

# of diffusers' own call of the hub
pytestmark = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")

FAMILIES = tuple(name for name in PIPELINES if name != "pixart-1024")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No network, a cache of its own, and one thread: sums have one order."""

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
def photographs(tmp_path_factory):
    """Ten pictures of a rectangle each, of unlike sizes."""
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for index in range(10):
        picture = random.integers(0, 80, (40 + index, 60, 3), dtype=np.uint8)
        top, left = random.integers(4, 20, 2)
        picture[top : top + 16, left : left + 24] += random.integers(60, 170, 3, dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return embedded(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def base(model, photographs):
    """Four photographs to train on, in shards of four."""
    return DistillConfig(
        str(model), photographs, Path(), rank=2, rate=1e-2, epochs=2, batch=2, warmup=2, shard=4, device="cpu"
    )


@pytest.fixture
def config(base, tmp_path):
    return replace(base, output=tmp_path / "run")


@pytest.fixture
def call(config, monkeypatch):
    """Run the command as it would make this configuration, some options changed."""
    # what the command has no options for
    options = {"shard": config.shard, "warmup": config.warmup, "save_minutes": 0}
    monkeypatch.setattr(program, "DistillConfig", lambda **given: DistillConfig(**given, **options))

    def call(*more, **changed):
        names = ("model", "images", "output", "rank", "rate", "epochs", "batch", "device")
        values = {name: getattr(config, name) for name in names} | changed
        words = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
        return CliRunner().invoke(cli.app, ["distill", *words, *map(str, more)])

    return call


def weights(config):
    """What a run has learned."""
    return {name: x for name, x in load_file(config.output / "state.safetensors").items() if name.startswith("model.")}


def progress(config):
    with safe_open(config.output / "state.safetensors", "pt") as stored:
        return json.loads(stored.metadata()["progress"])


def shards(config):
    return {path.name: path.stat().st_mtime_ns for path in (config.output / "edges").glob("*.safetensors")}


def labels(config):
    """What the search found of each photograph of a run, by name."""
    photographs = order(config)
    found = config.shards(photographs).read(range(len(photographs)))
    return {each.name: label.tolist() for each, label in zip(photographs, found, strict=True)}


class TestPseudoLabels:
    def test_edge_above_and_interior_below_mean_and_deviation(self):
        abdiv = torch.tensor([[[0.0, 4, 4, 4, 4], [4, 4, 4, 4, 8]]])  # mean 4, deviation 1.79
        label, counts = pseudo_labels(abdiv, interior=0)
        assert label.tolist() == [[[0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]]
        assert counts.tolist() == [[[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]]

    def test_the_deviation_is_that_of_the_cells_themselves(self):
        # mean 1, deviation 0.82; of a sample it would be 1
        label, counts = pseudo_labels(torch.tensor([[[0.0, 1, 2]]]), interior=0)
        assert (label.tolist(), counts.tolist()) == ([[[0, 0, 1]]], [[[1, 0, 1]]])

    def test_every_image_has_thresholds_of_its_own(self):
        abdiv = torch.rand(1, 5, 7, generator=torch.Generator().manual_seed(0)) ** 3
        label, counts = pseudo_labels(torch.cat([abdiv, 100 * abdiv + 3]))
        assert torch.equal(label[0], label[1]) and torch.equal(counts[0], counts[1])
        assert 0 < label.sum() < counts.sum() < counts.numel()

    @pytest.mark.parametrize(("interior", "cells"), [(0.0, 1), (0.16, 4), (0.3, 6), (0.5, 10)])
    def test_the_lowest_share_is_interior_where_nothing_lies_below(self, interior, cells):
        abdiv = (torch.arange(20.0) / 20).pow(4).flip(0).view(1, 4, 5)  # leans to the right
        assert abdiv.mean() - abdiv.std(correction=0) < 0
        label, counts = pseudo_labels(abdiv, interior=interior)
        inside = (counts > label).flatten().flip(0)
        assert inside.tolist() == [True] * cells + [False] * (20 - cells)
        assert label.sum() == (abdiv > abdiv.mean() + abdiv.std(correction=0)).sum() > 0

    def test_more_than_the_share_is_interior_where_more_lies_below(self):
        abdiv = torch.tensor([[[1.0, 2, 3, 9, 9, 9, 9, 9, 9, 9]]])  # mean 6.9, deviation 3.24
        label, counts = pseudo_labels(abdiv, interior=0.1)
        assert not label.any() and counts.tolist() == [[[1, 1, 1, 0, 0, 0, 0, 0, 0, 0]]]

    def test_no_cell_is_edge_and_interior(self):
        abdiv = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)) ** 5
        label, counts = pseudo_labels(abdiv, interior=1.0)
        assert torch.equal(counts, torch.ones(3, 5, 7)) and 0 < label.mean() < 0.5

    def test_an_image_without_structure_has_no_edge(self):
        label, counts = pseudo_labels(torch.zeros(1, 3, 4))
        assert not label.any() and counts.all()

    def test_binary_counts_everything(self):
        abdiv = torch.tensor([[[0.0, 4, 4, 4, 4], [4, 4, 4, 4, 8]]])
        label, counts = pseudo_labels(abdiv, "binary")
        assert label.tolist() == [[[0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]] and counts.all()

    def test_soft_is_the_probability(self):
        label, counts = pseudo_labels(torch.tensor([[[0.0, 0.2, 0.4], [-1e-3, 2, 50]]]), "soft", scale=0.2)
        expected = [[[0, 1 - np.exp(-1), 1 - np.exp(-2)], [0, 1 - np.exp(-10), 1]]]
        np.testing.assert_allclose(label.numpy(), expected, atol=1e-6)
        assert counts.all()

    def targets(self, abdiv, size, photographs=None, **config):
        given = SimpleNamespace(config=DistillConfig("mini", Path(), Path(), **config), scale=0.2)
        return Distillation.targets(given, abdiv, size, photographs)

    def test_on_a_finer_grid_thresholds_stay_and_what_is_left_out_stays_so(self):
        # columns of edge, neither, interior
        abdiv = torch.tensor([[[9.0, 1, 1, 1, 0], [9, 1, 1, 1, 0], [9, 1, 1, 1, 0]]])
        label, counts = self.targets(abdiv, (12, 20))
        assert label.shape == (1, 1, 12, 20)
        assert label[0, 0].tolist() == [[1] * 4 + [0] * 16] * 12
        assert counts[0, 0].tolist() == [[1] * 4 + [0] * 12 + [1] * 4] * 12

    def test_on_a_finer_grid_corners_are_round(self):
        abdiv = torch.zeros(1, 3, 5)
        abdiv[0, 1, 2] = 9
        label, counts = self.targets(abdiv, (12, 20))
        # of the cell, 0.625 or 0.875 are left along an axis
        block = [[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]]
        assert label[0, 0, 4:8, 8:12].tolist() == block and label.sum() == 12 and counts.all()

    def test_on_a_finer_grid_soft_is_interpolated(self):
        label, counts = self.targets(torch.tensor([[[0.0, 99]]]), (2, 4), labels="soft")
        assert_close(label, torch.tensor([[[[0, 0.25, 0.75, 1]] * 2]]))
        assert counts.all()

    @pytest.mark.parametrize("labels", ["ternary", "binary", "soft"])
    def test_on_its_own_grid_targets_are_the_labels(self, labels):
        abdiv = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0))
        found = self.targets(abdiv, (3, 5), labels=labels, interior=0.5)
        assert torch.equal(found[:, :, 0], pseudo_labels(abdiv, labels, interior=0.5, scale=0.2))

    def test_sharp_is_soft_times_the_root_of_the_crests(self):
        generator = torch.Generator().manual_seed(0)
        abdiv, photographs = torch.rand(2, 3, 5, generator=generator), torch.rand(2, 3, 12, 20, generator=generator)
        soft = self.targets(abdiv, (6, 10), labels="soft")
        label, counts = self.targets(abdiv, (6, 10), photographs, labels="sharp")
        assert_close(label, soft[0] * crests(resize(photographs, (6, 10))).sqrt())
        assert (label <= soft[0]).all() and counts.all()

    def test_crisp_is_sharp_pushed_apart(self):
        generator = torch.Generator().manual_seed(0)
        abdiv, photographs = torch.rand(2, 3, 5, generator=generator), torch.rand(2, 3, 12, 20, generator=generator)
        sharp = self.targets(abdiv, (6, 10), photographs, labels="sharp")[0]
        label, counts = self.targets(abdiv, (6, 10), photographs, labels="crisp")
        assert_close(torch.logit(label.double()) / 12, sharp.double() - 0.42, rtol=0, atol=1e-4)
        assert counts.all()


class TestCrests:
    def test_an_outline_is_found_at_its_pixel_whatever_its_strength(self):
        picture = torch.zeros(2, 3, 20, 24)
        picture[0, :, :, 12:], picture[1, :, :, 12:] = 1.0, 0.1
        found = crests(picture)
        assert found.shape == (2, 1, 20, 24)
        assert (found[..., 11:13] > 0.95).all() and not found[..., :8].any() and not found[..., 16:].any()
        assert_close(found[0], found[1], rtol=0, atol=0.05)

    def test_of_two_close_outlines_the_weaker_one_is_weaker(self):
        picture = torch.zeros(1, 3, 20, 24)
        picture[..., 10:], picture[..., 13:] = 0.2, 1.0
        found = crests(picture)[0, 0, 10]
        assert found[12:14].min() > 0.9 and 0.1 < found[9] < 0.6

    @pytest.mark.parametrize(("given", "radius"), [({}, 3), ({"radius": 2}, 2)], ids=["default", "other"])
    def test_by_hand(self, given, radius):
        picture = torch.rand(1, 2, 9, 11, generator=torch.Generator().manual_seed(0)).double()
        padded = np.pad(picture[0].numpy(), ((0, 0), (2, 2), (2, 2)), mode="edge")
        weights = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
        soft = np.array(
            [[[(x[i : i + 5, j : j + 5] * weights).sum() for j in range(11)] for i in range(9)] for x in padded]
        )
        ends = np.pad(soft, ((0, 0), (1, 1), (1, 1)), mode="edge")
        slopes = (ends[:, 1:-1, 2:] - ends[:, 1:-1, :-2]) / 2, (ends[:, 2:, 1:-1] - ends[:, :-2, 1:-1]) / 2
        steep = np.sqrt((slopes[0] ** 2 + slopes[1] ** 2).sum(0))
        side = 2 * radius + 1
        around = np.pad(steep, radius, mode="constant")
        highest = np.array([[around[i : i + side, j : j + side].max() for j in range(11)] for i in range(9)])
        around = np.pad(highest, radius, mode="edge")
        mean = np.array([[around[i : i + side, j : j + side].mean() for j in range(11)] for i in range(9)])
        expected = np.minimum(steep / (mean + 1e-3), 1)
        np.testing.assert_allclose(crests(picture, **given)[0, 0].numpy(), expected, atol=1e-12)

    def test_a_plain_picture_has_none(self):
        assert not crests(torch.full((1, 3, 9, 9), 0.3)).any()


class TestDice:
    def test_by_hand(self):
        found = torch.tensor([[[[0.5, 1.0, 0.25]]]])
        label = torch.tensor([[[[1.0, 1.0, 0.0]]]])
        # products 1.5, squares 0.25 + 1 + 0.0625 and 2
        assert_close(dice(found, label, torch.ones(1, 1, 1, 3)), torch.tensor(1 - 4 / 4.3125))

    def test_what_does_not_count_is_ignored(self):
        found = torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        label, counts = torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4)
        label[:, :, 0], counts[:, :, :2] = 1, 1
        expected = dice(found[:, :, :2], label[:, :, :2], counts[:, :, :2])
        assert_close(dice(found, label, counts), expected)
        dice(found, label, counts).backward()
        assert not found.grad[:, :, 2].any() and found.grad[:, :, :2].all()

    def test_is_the_mean_over_images(self):
        found, label = torch.rand(2, 3, 1, 4, 5, generator=torch.Generator().manual_seed(0))
        counts = torch.ones(3, 1, 4, 5)
        each = [dice(found[i : i + 1], label[i : i + 1], counts[:1]) for i in range(3)]
        assert_close(dice(found, label, counts), torch.stack(each).mean())

    def test_is_zero_and_flat_at_the_label_itself(self):
        label = torch.rand(1, 1, 4, 5, generator=torch.Generator().manual_seed(0))
        found = label.clone().requires_grad_()
        loss = dice(found, label, torch.ones_like(label))
        loss.backward()
        assert loss.abs() < 1e-6 and found.grad.abs().max() < 1e-6

    def test_nothing_that_counts_is_no_loss(self):
        found, label = torch.rand(2, 1, 1, 4, 5)
        assert dice(found, label, torch.zeros(1, 1, 4, 5)) == 0


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
    level = torch.tensor([0, 20, 499, 999])
    sample = schedule.noise(latent, noise, level)
    if isinstance(schedule, RectifiedFlow):
        told = noise - latent
    else:
        told = noise if schedule.prediction == "epsilon" else schedule.velocity(latent, noise, level)
    found = schedule.denoise(sample, told, level)
    # the levels' factors are float32, whose squares sum to 1 but for its rounding; epsilon divides by them exactly
    assert_close(found, latent, rtol=0, atol=2e-6)
    assert not torch.equal(sample[0], latent[0]) or isinstance(schedule, RectifiedFlow)


@pytest.fixture(scope="module", params=FAMILIES)
def distilled(request, photographs, tmp_path_factory):
    """Folder of a tiny pipeline, output of its distillation by the command, and what the command said."""
    folder = tmp_path_factory.mktemp(request.param)
    pipe = pipeline(request.param, folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "model")
    given = {"model": folder / "model", "images": photographs, "output": folder / "out", "size": "16x24"}
    given |= {"device": "cpu", "rank": 2, "epochs": 2, "batch": 2, "licence": "CC0"}
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    result = CliRunner().invoke(cli.app, ["distill", *words])
    for part in (*(folder / "model").glob("text_encoder*"), *(folder / "model").glob("tokenizer*")):
        shutil.rmtree(part)  # a student needs none of them
    return folder / "model", folder / "out", result


class TestEveryFamily:
    def test_the_command_writes_student_states_shards_and_picture(self, distilled):
        _, out, result = distilled
        assert (result.exit_code, result.stdout) == (0, f"{out / 'student'}\n"), result.output
        assert {path.name for path in out.iterdir()} == {"edges", "preview.png", "state.safetensors", "student"}
        with Image.open(out / "preview.png") as picture:  # a row for each of six photographs, four pictures of 3 : 2
            assert picture.height >= 6 * 192 and picture.width >= 4 * 288
        names = {"README.md", "config.json", "decoder.safetensors", "lora.safetensors", "null_text.safetensors"}
        assert {path.name for path in (out / "student").iterdir()} == names
        card = (out / "student" / "README.md").read_text()
        assert "4 photographs" in card and "4 steps of 2" in card and "licence CC0" in card

    def test_the_student_gives_edges_without_text_encoders(self, distilled, monkeypatch, tmp_path):
        _, out, _ = distilled
        monkeypatch.setenv("TRACE_FAST_CACHE", str(tmp_path))  # empty
        detector = Detector.from_pretrained(out / "student", device="cpu", local_files_only=True)
        edges = detector(torch.rand(2, 3, 20, 30))
        assert edges.shape == (2, 1, 20, 30) and edges.isfinite().all() and edges.std() > 0
        assert detector.timestep == (20 if isinstance(detector.backbone.schedule, RectifiedFlow) else 0)
        assert not any(tmp_path.iterdir())

    def test_merged_adapters_are_the_live_ones(self, distilled, tmp_path):
        model, out, _ = distilled
        student = shutil.copytree(out / "student", tmp_path / "student")
        # those of a few steps change little
        random = torch.Generator().manual_seed(0)
        stored = load_file(student / "lora.safetensors")
        stored = {name: torch.randn(x.shape, generator=random).half() / 4 for name, x in stored.items()}
        save_file(stored, student / "lora.safetensors")
        detector = Detector.from_pretrained(student, device="cpu")
        backbone = Tracer.from_pretrained(model, device="cpu", size=SIZE).backbone
        images, level = torch.rand(2, 3, *SIZE), torch.full((2,), detector.timestep)

        @torch.no_grad()
        def logits():
            taps = AttentionReadout(detector.decoder.values, backbone.read_grids())
            with backbone.capture(taps.on_attention):
                prediction = backbone.predict(backbone.encode(images), level)
            return detector.decoder(taps.result(), None), prediction

        plain, predicted = logits()
        live = inject(backbone, 2)
        assert_close(logits()[0], plain, rtol=0, atol=1e-6)  # products start at zero
        assert set(stored) == set(live)
        for name, value in stored.items():
            live[name].data.copy_(value)
        expected, prediction = logits()
        assert (expected - plain).abs().max() > 1e-3 and (prediction - predicted).abs().max() > 1e-3
        with torch.no_grad():
            assert_close(detector._forward(images, None), expected, rtol=1e-4, atol=1e-5)
            # and the rest of the network, which the student does not run
            whole = detector.backbone.predict(backbone.encode(images), level)
        assert_close(whole, prediction, rtol=1e-3, atol=1e-4)

    def test_the_students_folder_holds_no_weights_of_the_base(self, distilled):
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
        moved = {name for name, x in stored.items() if ".lora_B" in name and x.any()}
        assert {name.rpartition(".lora_")[0] for name in moved} == expected


@pytest.mark.parametrize(
    ("decoder", "options"),
    [
        ("conv", {"decoder_rate": 3e-2}),
        # at a rate of 3e-2 it depends on the seed
        ("pixels", {"decoder_rate": 1e-2, "decoder_options": {"channels": 4, "detail": 1}}),
    ],
    ids=["conv", "pixels"],
)
def test_loss_falls(config, decoder, options):
    config = replace(config, decoder=decoder, epochs=50, **options)
    student = distill(config)
    (step, *first), (last_step, *last) = progress(config)["losses"]
    assert (step, last_step) == (50, 100)
    assert last[0] < 0.8 * first[0] and last[1] < first[1]  # Dice, reconstruction
    detector = Detector.from_pretrained(student, device="cpu")
    assert detector.decoder.name == decoder
    assert detector(torch.rand(3, 20, 30)).shape == (1, 1, 20, 30)


def test_a_student_finds_what_its_search_found(config):
    student = distill(replace(config, decoder_rate=3e-2, epochs=50, labels="soft"))
    detector = Detector.from_pretrained(student, device="cpu")
    run = Distillation(config, Tracer.from_pretrained(config.model, device="cpu"), order(config), alone())
    images, _, abdiv = run.load(range(6, 10))  # those it was trained on
    label = pseudo_labels(abdiv, "soft", scale=run.scale)[0]
    with torch.no_grad():
        found = detector._forward(images, None)[:, 0].sigmoid()
    together = torch.corrcoef(torch.stack([found.flatten(), label.flatten()]))[0, 1]
    assert together > 0.6


def order(config):
    """Photographs as a run has them."""
    return in_order(list_photographs(config.images), config.seed)


def searched(run):
    """A run whose photographs have been searched."""
    tracer = Tracer.from_pretrained(run.config.model, device="cpu")
    run.shards.make(run.config.search(tracer), run.photographs, run.config.shard)
    run.shards = run.config.shards(run.photographs)
    return run


def alone():
    return program.Process(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("kinds", list(itertools.combinations(LABELS, 2)), ids=" and ".join)
def test_other_labels_teach_another_student(config, kinds):
    one, other = (replace(config, output=config.output / kind, edges=config.output, labels=kind) for kind in kinds)
    distill(one), distill(other)
    assert not torch.equal(weights(one)["model.decoder.values"], weights(other)["model.decoder.values"])


def test_sharp_labels_are_drawn_with_the_photographs_that_the_decoder_sees(config, monkeypatch):
    config = replace(config, labels="sharp", decoder="pixels", decoder_options={"channels": 4, "columns": 8})
    seen = []
    real = Distillation.targets
    monkeypatch.setattr(
        Distillation,
        "targets",
        lambda run, *given: (seen.append([x.clone() for x in given[::2]]), real(run, *given))[1],
    )
    distill(config)
    run = Distillation(config, Tracer.from_pretrained(config.model, device="cpu"), order(config), alone())
    assert len(seen) > run.steps  # and once for the picture
    for (abdiv, photographs), (_, details, expected) in zip(seen, run.batches(), strict=False):
        assert torch.equal(abdiv, expected) and torch.equal(photographs, details)
        assert details.shape[-2:] == (64, 96)  # twice the network's


def test_without_reconstruction_the_output_of_the_last_attention_learns_nothing(config):
    distill(replace(config, reconstruction=0))
    last = {name: x for name, x in weights(config).items() if "blocks.1.attn" in name and ".lora_B" in name}
    assert {name.split(".")[4] for name, x in last.items() if x.any()} == {"to_q", "to_k"}
    assert len(last) == 4


def test_bfloat16_keeps_what_is_trained_in_float32(config):
    half = replace(config, output=config.output.with_name("half"), edges=config.output / "edges", dtype="bfloat16")
    distill(config), distill(half)
    first, second = weights(config), weights(half)
    assert {x.dtype for x in second.values()} == {torch.float32}
    assert not all(torch.equal(first[name], second[name]) for name in first)
    assert_close(first["model.decoder.values"], second["model.decoder.values"], rtol=0, atol=5e-3)


def test_students_share_what_the_search_found(config, monkeypatch):
    edges = config.output.with_name("shared")
    distill(replace(config, edges=edges))
    assert not (config.output / "edges").exists() and len(list(edges.iterdir())) == 3
    monkeypatch.setattr(Shards, "make", lambda *_: pytest.fail("searched again"))
    other = replace(config, output=config.output.with_name("other"), edges=edges, rank=3)
    assert Detector.from_pretrained(distill(other), device="cpu").adapter["blocks.0.attn.to_q.lora_A.weight"].shape == (
        3,
        16,
    )


def test_another_teacher_size_is_stretched_to_the_students_grid(config):
    student = distill(replace(config, teacher_size=(48, 32)))
    with safe_open(config.output / "edges" / "000000.safetensors", "pt") as stored:
        assert stored.get_slice("abdiv").get_shape() == [4, 12, 8]
    assert Detector.from_pretrained(student, device="cpu").decoder.grid == (8, 12)
    assert "Teacher: ABDiv at (48, 32) pixels" in (student / "README.md").read_text()


def test_the_card_tells_the_level_that_was_searched(config):
    card = (distill(replace(config, timestep=0)) / "README.md").read_text()
    assert "timestep 0; ternary labels" in card


class TestOrder:
    @pytest.fixture
    def run(self, config):
        config = replace(config, decoder="pixels", decoder_options={"channels": 4, "columns": 8})
        tracer = Tracer.from_pretrained(config.model, device="cpu")
        return Distillation(config, tracer, order(config), alone())

    def test_one_more_or_less_moves_no_other(self):
        photographs = [Photograph(f"{index}.png", Path(f"{index}.png")) for index in range(50)]
        whole = in_order(photographs, 3)
        assert set(whole) == set(photographs) and whole != photographs
        for index in (0, 17, 49):
            fewer = [each for each in photographs if each != whole[index]]
            assert in_order(fewer[::-1], 3) == whole[:index] + whole[index + 1 :]

    def test_another_seed_is_another_order(self):
        photographs = [Photograph(f"{index}.png", Path(f"{index}.png")) for index in range(50)]
        assert len({tuple(in_order(photographs, seed)) for seed in range(9)}) == 9

    def test_is_by_the_hash_of_seed_and_name(self):
        names = ["a/1.png", "b.tar/2.jpg", "\udcff.png"]  # the last is no text
        photographs = [Photograph(name, Path("x"), length=7) for name in names]
        # SHA-256 of "0 a/1.png" begins with 89, of the others with 59 and c8
        assert [each.name for each in in_order(photographs, 0)] == ["b.tar/2.jpg", "a/1.png", "\udcff.png"]

    def test_every_photograph_but_the_previewed_once_an_epoch(self, run):
        for first in (0, 2, 4):  # of two steps
            seen = run.indices(first) + run.indices(first + 1)
            assert sorted(seen) == [6, 7, 8, 9]
        assert len({tuple(run.indices(first) + run.indices(first + 1)) for first in range(0, 20, 2)}) > 1

    def test_two_processes_see_what_one_sees(self, run):
        whole = list(searched(run).batches())
        parts = []
        for index in range(2):
            run.process = replace(alone(), index=index, count=2)
            parts.append(list(run.batches()))
        for batch, *shares in zip(whole, *parts, strict=True):
            for tensor, *of_share in zip(batch, *shares, strict=True):
                assert torch.equal(tensor, torch.cat(of_share))

    def test_pictures_are_mirrored_with_their_edges(self, run):
        run.steps, mirrored = 10, 0
        for step, batch in enumerate(searched(run).batches()):
            for *found, index in zip(*batch, run.indices(step), strict=True):
                plain = [x[0] for x in run.load([index])]
                turned = not torch.equal(found[0], plain[0])
                mirrored += turned
                for one, other in zip(found, plain, strict=True):
                    assert torch.equal(one, other.flip(-1) if turned else other)
        assert 4 <= mirrored <= 16

    def test_colours_are_exchanged_and_nothing_else(self, run):
        searched(run)
        run.config, run.steps = replace(run.config, recolour=1.0), 10
        exchanged = 0
        for step, batch in enumerate(run.batches()):
            for *found, strength, index in zip(*batch, run.indices(step), strict=True):
                *plain, expected = (x[0] for x in run.load([index]))
                if not torch.equal(strength, expected):
                    plain = [x.flip(-1) for x in plain]
                # the same of the photograph as the network and as the decoder sees it
                orders = [
                    order
                    for order in itertools.permutations(range(3))
                    if all(torch.equal(x, y[list(order)]) for x, y in zip(found, plain, strict=True))
                ]
                assert len(orders) == 1
                exchanged += orders[0] != (0, 1, 2)
        assert 8 <= exchanged <= 20

    def test_the_live_picture_is_of_photographs_that_are_not_trained_on(self, run, monkeypatch):
        rows = []
        real = visualize.panel
        monkeypatch.setattr(
            visualize,
            "panel",
            lambda columns, *more, **how: (rows.append(columns), real(columns, *more, **how))[1],
        )
        images, details, abdiv = searched(run).load(range(6))
        run.preview()
        label, counts = run.targets(abdiv, details.shape[-2:], details)
        target = torch.where(counts > 0, label, 0.5)[:, 0, ::2, ::2]  # what is left out is grey
        assert len(rows) == 6 and target.unique().tolist() == [0, 0.5, 1]
        for (photograph, _, drawn, student), image, expected in zip(rows, images, target, strict=True):
            assert torch.equal(photograph, image) and torch.equal(drawn, expected)
            assert student.shape == expected.shape and student.isfinite().all()


class TestStep:
    """One step of the optimiser."""

    @pytest.fixture
    def run(self, config):
        """Eight steps of two, of the embedded student's recipe, at a level of much noise."""
        config = replace(
            config,
            decoder="pixels",
            decoder_options={"channels": 4, "columns": 8},
            labels="sharp",
            level=300,
            reconstruction=100.0,
            epochs=4,
            warmup=4,
        )
        tracer = Tracer.from_pretrained(config.model, device="cpu")
        tracer.backbone.settings = replace(tracer.backbone.settings, edge_scale=0.4)
        return searched(Distillation(config, tracer, order(config), alone()))

    def trained(self, run):
        """Adapters and decoder, with their peak rates."""
        assert run.adapters
        return [(x, 1e-2) for x in run.adapters.values()] + [(x, 3e-3) for x in run.decoder.parameters()]

    def test_is_adamw_at_a_rate_that_rises_and_falls(self, run):
        batch = next(run.batches())
        moments = {x: (0.0, 0.0) for x, _ in self.trained(run)}
        # risen over four steps, falling over the last half of eight
        for count, (run.step, share) in enumerate({0: 0.25, 2: 0.75, 4: 1.0, 6: 0.5, 7: 0.25}.items(), 1):
            before = [x.detach().clone() for x, _ in self.trained(run)]
            run.train_step(*batch)
            for (x, peak), old in zip(self.trained(run), before, strict=True):
                mean, square = moments[x]
                mean, square = 0.9 * mean + 0.1 * x.grad, 0.999 * square + 0.001 * x.grad**2
                moments[x] = mean, square
                direction = mean / (1 - 0.9**count) / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
                assert_close(x.detach(), old - peak * share * direction, rtol=1e-5, atol=1e-6)

    def test_follows_dice_and_reconstruction(self, run, monkeypatch):
        schedule, noised = run.schedule, []
        spy = SimpleNamespace(
            noise=lambda *given: (noised.append(given), schedule.noise(*given))[1], denoise=schedule.denoise
        )
        monkeypatch.setattr(run, "schedule", spy)
        monkeypatch.setattr(run.optimiser, "step", lambda: None)
        trained = [x for x, _ in self.trained(run)]
        for images, details, abdiv in itertools.islice(run.batches(), 3):
            run.train_step(images, details, abdiv)
            latent, _, level = noised[-1]
            assert torch.equal(latent, run.backbone.encode(images)) and level.tolist() == [300, 300]
            noisy, taps = schedule.noise(*noised[-1]), AttentionReadout(run.decoder.values, run.backbone.read_grids())
            with run.backbone.capture(taps.on_attention):
                rebuilt = schedule.denoise(noisy, run.backbone.predict(noisy, level), level)
            found = run.decoder(taps.result(), details).sigmoid()
            edges = dice(found, *draw_labels(abdiv, found.shape[-2:], details, "sharp", 0.16, scale=0.4))
            reconstruction = (rebuilt - latent).square().mean()
            assert_close(run.recent[-1], [edges.item(), reconstruction.item()])
            expected = torch.autograd.grad(edges + 100 * reconstruction, trained)
            length = torch.cat([x.flatten() for x in expected]).norm()
            assert length > 1  # and cut to that
            for x, gradient in zip(trained, expected, strict=True):
                assert_close(x.grad, gradient / length, rtol=1e-3, atol=1e-5)
        noise = torch.stack([noise.flatten() for _, noise, _ in noised])
        assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
        assert_close(noise.corrcoef(), torch.eye(3), rtol=0, atol=0.05)  # of every step its own


# writes files as the library does, and dies by SIGKILL inside the n-th of a name, before it is there
DEADLY = """
import os, signal
from contextlib import contextmanager
from pathlib import PosixPath
from trace_fast.training import state, shards, distillation as distill
from trace_fast.io.files import write_atomically

left = {count}

@contextmanager
def deadly(path, op):
    global left
    with write_atomically(path, op) as file:
        yield file
        left -= path.name == {name!r}
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

shards.write_atomically = state.write_atomically = deadly
distill.distill(distill.{config!r})
"""


def start(code, **environment):
    """Python in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)


# the paper's, and that of the embedded student
RECIPES = {
    "paper": {},
    "sharp": {
        "decoder": "pixels",
        "decoder_options": {"channels": 4, "columns": 8},
        "labels": "sharp",
        "recolour": 0.5,
        "dtype": "bfloat16",
    },
}


@pytest.fixture(scope="module", params=RECIPES.values(), ids=RECIPES)
def unbroken(request, base, tmp_path_factory):
    config = replace(base, output=tmp_path_factory.mktemp("unbroken"), **request.param)
    distill(config)
    return config


class TestAfterAKill:
    @pytest.fixture
    def config(self, unbroken, tmp_path):
        return replace(unbroken, output=tmp_path / "run")

    def die(self, config, name, count):
        """Distil in a process that is killed while it writes the so-manyth file of a name."""
        process = start(DEADLY.format(name=name, count=count, config=config))
        _, told = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, told

    def ends_as(self, config, unbroken):
        """Whether the result is the same, bit for bit, but for the card, which tells the time."""
        for name in ("decoder.safetensors", "lora.safetensors", "config.json"):
            one, other = (each.output / "student" / name for each in (config, unbroken))
            assert one.read_bytes() == other.read_bytes(), name
        for name, value in load_file(unbroken.output / "state.safetensors").items():
            assert torch.equal(load_file(config.output / "state.safetensors")[name], value), name
        found, expected = (
            {name: value for name, value in progress(each).items() if name != "seconds"} for each in (config, unbroken)
        )
        assert found == expected and found["step"] == 4

    def test_in_the_search_whole_shards_stay(self, config, unbroken):
        self.die(config, "000001.safetensors", 1)
        before = shards(config)
        assert set(before) == {"000000.safetensors"}
        distill(config)
        assert shards(config)["000000.safetensors"] == before["000000.safetensors"] and len(shards(config)) == 3
        self.ends_as(config, unbroken)

    def test_in_the_training_it_goes_on_from_the_last_state(self, config, unbroken, monkeypatch):
        config = replace(config, save_minutes=0)  # after every step
        self.die(config, "state.safetensors", 3)
        assert progress(config)["step"] == 2 and not (config.output / "student").exists()
        steps = []
        real = Distillation.train_step
        monkeypatch.setattr(Distillation, "train_step", lambda run, *batch: (steps.append(run.step), real(run, *batch)))
        monkeypatch.setattr(Shards, "make", lambda *_: pytest.fail("searched again"))
        distill(config)
        assert steps == [2, 3]
        self.ends_as(config, unbroken)

    def test_a_state_of_other_weights_is_refused(self, config, unbroken):
        shutil.copytree(unbroken.output, config.output)
        path = config.output / "state.safetensors"
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata()
        values = load_file(path)
        values["model.decoder.old"] = values.pop("model.decoder.values")
        save_file(values, path, metadata)
        with pytest.raises(ValueError, match="distill: output must be empty or hold a run of this version, got "):
            distill(config)

    def test_a_run_that_is_done_is_left_as_it_is(self, config, unbroken, monkeypatch):
        shutil.copytree(unbroken.output, config.output)
        monkeypatch.setattr(Distillation, "train_step", lambda *_: pytest.fail("trained again"))
        assert distill(config) == config.output / "student"
        self.ends_as(config, unbroken)


class TestStart:
    """A run that sets out from a student."""

    @pytest.fixture
    def begun(self, config, unbroken):
        """Its configuration, and that of the run before."""
        return replace(unbroken, output=config.output, edges=config.output / "edges", start=unbroken.output / "student")

    def test_before_the_first_step_it_is_that_student(self, begun, unbroken):
        run = Distillation(begun, Tracer.from_pretrained(begun.model, device="cpu"), order(begun), alone())
        before = load_file(unbroken.output / "student" / "decoder.safetensors")
        assert all(torch.equal(x, before[name]) for name, x in run.decoder.state_dict().items())
        adapter = load_file(unbroken.output / "student" / "lora.safetensors")
        assert adapter and all(torch.equal(x.half(), adapter[name]) for name, x in run.adapters.items())

    def test_it_learns_on(self, begun, unbroken):
        distill(begun)
        before, after = weights(unbroken), weights(begun)
        assert {name for name in after if not torch.equal(after[name], before[name])} == set(after)
        assert "Set out from the student in 'student'" in (begun.output / "student" / "README.md").read_text()

    def test_at_another_size_values_are_interpolated(self, begun, unbroken):
        begun = replace(begun, size=(48, 64))
        tracer = Tracer.from_pretrained(begun.model, device="cpu", size=begun.size)
        run = Distillation(begun, tracer, order(begun), alone())
        resized = Detector.from_pretrained(unbroken.output / "student", device="cpu").resized(begun.size)
        assert torch.equal(run.decoder.values, resized.decoder.values)
        assert Detector.from_pretrained(distill(begun), device="cpu").backbone.settings.size == (48, 64)

    def test_another_student_is_another_run(self, begun):
        distill(begun)
        other = shutil.copytree(begun.start, begun.output.with_name("other") / "student")
        stored = load_file(other / "lora.safetensors")
        save_file({name: x + 1 for name, x in stored.items()}, other / "lora.safetensors")
        with pytest.raises(ValueError, match="output must be empty or hold a run of the same configuration"):
            distill(replace(begun, start=other))
        moved = begun.start.rename(begun.output.with_name("moved"))
        try:
            assert distill(replace(begun, start=moved)) == begun.output / "student"
        finally:
            moved.rename(begun.start)

    def test_what_cannot_be_gone_on_from(self, begun, tmp_path):
        with pytest.raises(ValueError, match=r"start must be the folder of a student, got '.*nowhere'"):
            replace(begun, start=tmp_path / "nowhere")
        refusal = r"start must be a student with decoder \w+ and adapters of rank "
        with pytest.raises(ValueError, match=refusal + r"\[3\], got rank \[2\] there, \[3\] here$"):
            replace(begun, rank=3)
        with pytest.raises(ValueError, match=r"start must be a student with decoder .* and adapters of rank \[\], got"):
            replace(begun, rate=0.0)
        other = {"decoder": "pixels", "decoder_options": {"channels": 2, "columns": 8}}
        with pytest.raises(
            ValueError, match=r"start must be a student with decoder pixels .*channels \w+ there, 2 here"
        ):
            replace(begun, **other)

    def test_a_student_of_another_network(self, begun, tmp_path):
        other = shutil.copytree(begun.start, tmp_path / "student")
        stored = load_file(other / "lora.safetensors")
        save_file({name.replace("blocks.0", "blocks.7"): x for name, x in stored.items()}, other / "lora.safetensors")
        begun = replace(begun, start=other)
        with pytest.raises(ValueError, match=r"start must be a student of the same model, got .*other layers"):
            Distillation(begun, Tracer.from_pretrained(begun.model, device="cpu"), order(begun), alone())


def test_a_run_that_is_done_goes_on_with_more_epochs(config):
    distill(config)
    before = weights(config)
    student = distill(replace(config, epochs=3))
    assert progress(config)["step"] == 6 and "6 steps of 2" in (student / "README.md").read_text()
    assert not torch.equal(weights(config)["model.decoder.values"], before["model.decoder.values"])


def test_without_a_rate_the_network_stays_as_it_is(config, model):
    student = distill(replace(config, rate=0.0))
    detector = Detector.from_pretrained(student, device="cpu")
    assert detector.adapter == {} and set(weights(config)) == {"model.decoder.values", "model.decoder.bias"}
    plain = Tracer.from_pretrained(model, device="cpu").backbone.network.state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in detector.backbone.network.state_dict().items())


class TestShards:
    @pytest.fixture
    def images(self, photographs, tmp_path):
        """The same photographs, to be changed."""
        return shutil.copytree(photographs, tmp_path / "images")

    def test_a_damaged_one_is_told_and_made_again(self, config, call):
        distill(config)
        path = config.output / "edges" / "000001.safetensors"
        before, was = shards(config), labels(config)
        path.write_bytes(path.read_bytes()[:-5])
        (config.output / "state.safetensors").unlink()
        result = call()
        assert result.exit_code == 0
        told = [line for line in result.stderr.splitlines() if "damaged" in line]
        assert len(told) == 1 and "000001.safetensors is damaged and made again" in told[0]
        assert labels(config) == was
        assert {name for name, time in shards(config).items() if time != before[name]} == {"000001.safetensors"}

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"timestep": 99}, "timestep None there, 99 here"),
            ({"seed": 1, "revision": "x"}, "revision None there, x here; seed 0 there, 1 here"),
            ({"teacher_size": (16, 24)}, "size None there, [16, 24] here"),
        ],
        ids=str,
    )
    def test_those_of_another_search_are_refused(self, config, change, told):
        distill(config)
        before, path = shards(config), config.output / "edges" / "000000.safetensors"
        refusal = "distill: output must be empty or hold a run of the same teacher and photographs, got "
        with pytest.raises(ValueError, match=re.escape(f"{refusal}{told} in '{path}'") + "$"):
            distill(replace(config, **change))
        assert shards(config) == before

    def test_they_hold_what_the_tracer_finds(self, config):
        config = replace(config, timestep=299, noising="gaussian", seed=3)
        tracer = Tracer.from_pretrained(config.model, device="cpu")
        run = searched(Distillation(config, tracer, order(config), alone()))
        places = [7, 2, 2, 5]
        traced = [
            tracer(run.photographs[place].read(), timestep=299, noising="gaussian", seed=3, return_abdiv=True).abdiv
            for place in places
        ]
        assert torch.equal(run.shards.read(places), torch.cat(traced).half().float())

    def test_those_of_another_version_are_refused(self, config):
        distill(config)
        path = config.output / "edges" / "000001.safetensors"
        save_file(load_file(path), path, {"identity": "x"})
        with pytest.raises(ValueError, match=r"same teacher and photographs, got another version in '.*000001\.safet"):
            distill(config)

    def test_those_of_other_photographs_alone_are_refused(self, config, images):
        distill(config)
        for path in list(images.iterdir()):
            path.rename(images / f"other-{path.name}")
        with pytest.raises(ValueError, match=r"same teacher and photographs, got others alone in '.*edges'$"):
            distill(replace(config, images=images))

    def test_without_a_photograph_nothing_is_searched_again(self, config, images, monkeypatch):
        distill(config)
        before, was = shards(config), labels(config)
        gone = order(config)[3].name
        (images / gone).unlink()
        monkeypatch.setattr(Tracer, "__call__", lambda *_, **__: pytest.fail("searched again"))
        fewer = replace(config, images=images)
        card = (distill(fewer) / "README.md").read_text()
        assert "Data: 3 photographs" in card and shards(config) == before
        assert labels(fewer) == {name: label for name, label in was.items() if name != gone}

    @pytest.mark.parametrize("limit", [None, 10])
    def test_of_more_photographs_only_those_are_searched(self, config, images, monkeypatch, limit):
        for name in ("3.png", "8.png"):
            (images / name).rename(images.parent / name)
        config = replace(config, images=images, limit=limit)
        distill(config)
        before, was = shards(config), labels(config)
        for name in ("3.png", "8.png"):
            (images.parent / name).rename(images / name)
        read = []
        real = Shards.make
        monkeypatch.setattr(Shards, "make", lambda *given: (read.extend(given[2]), real(*given))[1])
        distill(config)
        assert {each.name for each in read} == {"3.png", "8.png"}
        assert before.items() <= shards(config).items() and len(shards(config)) == len(before) + 1
        again = replace(config, output=config.output.with_name("again"))
        distill(again)
        assert was.items() <= labels(config).items() and labels(config) == labels(again)

    def test_a_photograph_in_the_place_of_another_is_searched(self, config, images, monkeypatch):
        distill(config)
        shutil.copy(images / "5.png", images / "4.png")
        read = []
        real = Shards.make
        monkeypatch.setattr(Shards, "make", lambda *given: (read.extend(given[2]), real(*given))[1])
        distill(replace(config, images=images))
        assert [each.name for each in read] == ["4.png"]

    def test_students_of_more_and_less_photographs_share_them(self, config, monkeypatch):
        edges = config.output.with_name("shared")
        distill(replace(config, edges=edges))
        monkeypatch.setattr(Shards, "make", lambda *_: pytest.fail("searched again"))
        fewer = replace(config, output=config.output.with_name("fewer"), edges=edges, limit=8)
        assert "Data: 2 photographs" in (distill(fewer) / "README.md").read_text()

    def test_those_of_a_run_before_are_not_remembered(self, config):
        first = replace(config, shard=100)
        distill(first)
        expected = weights(replace(config, output=distill(replace(first, output=first.output / "x", seed=1)).parent))
        shutil.rmtree(config.output)
        distill(replace(first, seed=1))  # another search in the same place
        assert all(torch.equal(x, expected[name]) for name, x in weights(config).items())


class TestFaults:
    @pytest.mark.parametrize(("name", "kept"), [("000001", 1), ("state", 3), ("lora", 3)])
    def test_a_full_disk_is_told_and_what_is_whole_stays(self, config, call, monkeypatch, name, kept):
        real = os.replace

        def full(source, target):
            if Path(target).stem == name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(_files.os, "replace", full)
            result = call()
        assert result.exit_code == 2 and result.stdout == ""
        assert result.stderr.endswith("trace-fast: [Errno 28] No space left on device\n")
        assert "Traceback" not in result.stderr
        before = shards(config)
        assert len(before) == kept and not list(config.output.rglob("*.part"))
        assert call().exit_code == 0  # with room again
        assert {file: time for file, time in shards(config).items() if file in before} == before

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"rank": 3}, "rank 2 there, 3 here"),
            ({"batch": 1, "rate": 0.02}, "rate 0.01 there, 0.02 here; batch 2 there, 1 here"),
            ({"limit": 9}, "limit None there, 9 here"),
        ],
        ids=str,
    )
    def test_another_configuration_in_the_same_folder(self, config, call, change, told):
        assert call().exit_code == 0
        before = {path: path.read_bytes() for path in (config.output / "student").iterdir()}
        result = call(**change)
        assert result.exit_code == 2
        refusal = "distill: output must be empty or hold a run of the same configuration"
        path = config.output / "state.safetensors"
        assert result.stderr.splitlines()[-1] == f"trace-fast: {refusal}, got {told} in '{path}'"
        assert before == {path: path.read_bytes() for path in (config.output / "student").iterdir()}

    def test_another_configuration_is_told_before_more_is_searched(self, config, photographs, tmp_path, monkeypatch):
        images = shutil.copytree(photographs, tmp_path / "images")
        distill(replace(config, images=images))
        shutil.copy(images / "0.png", images / "more.png")
        monkeypatch.setattr(Tracer, "__call__", lambda *_, **__: pytest.fail("searched before"))
        with pytest.raises(ValueError, match="same configuration, got rank 2 there, 3 here in "):
            distill(replace(config, images=images, rank=3))

    def test_a_damaged_state(self, config, call):
        distill(config)
        state = config.output / "state.safetensors"
        state.write_bytes(state.read_bytes()[:-8])
        result = call()
        assert result.exit_code == 2 and "distill: output must hold a whole state, got" in result.stderr

    @pytest.fixture
    def damaged(self, photographs, tmp_path):
        """Ten photographs, and three that are none: of text, cut, and too small."""
        images = shutil.copytree(photographs, tmp_path / "damaged")
        (images / "text.png").write_bytes(b"no picture")
        (images / "cut.png").write_bytes((images / "7.png").read_bytes()[:2000])
        Image.new("RGB", (40, 15)).save(images / "small.png")
        return images

    REASONS = (
        "cut.png in '{}/cut.png': edges: image must be readable to its end, got a PIL image: image file is truncated",
        "small.png in '{}/small.png': edges: image must be at least 16 pixels high and wide, got 15 x 40 in a PIL "
        "image",
        "text.png in '{}/text.png': Pillow cannot read it",
    )

    def told(self, stderr, images):
        """What was told of them, the line before first."""
        lines = stderr.splitlines()
        place = next(number for number, line in enumerate(lines) if line.startswith("  cut.png"))
        assert "Traceback" not in stderr
        assert lines[place : place + 3] == [f"  {reason.format(images)}" for reason in self.REASONS]
        return lines[place - 1]

    def test_damaged_photographs_are_all_told_before_the_search(self, config, call, damaged, monkeypatch):
        monkeypatch.setattr(Tracer, "__call__", lambda *_, **__: pytest.fail("searched before"))
        result = call(images=damaged)
        assert result.exit_code == 2 and not result.stdout and not shards(config)
        refusal = "trace-fast: photographs must be readable, got 3 damaged or too small; --skip-bad goes on without:"
        assert self.told(result.stderr, damaged) == refusal

    def test_damaged_photographs_are_left_out_and_told(self, config, call, damaged, photographs):
        result = call("--skip-bad", images=damaged)
        assert (result.exit_code, result.stdout) == (0, f"{config.output / 'student'}\n")
        note = "trace-fast: photographs that cannot be read are left out, 3 of them:"
        assert self.told(result.stderr, damaged) == note
        assert "Data: 4 photographs" in (config.output / "student" / "README.md").read_text()
        # as if they had never been there
        before = shards(config)
        other = replace(config, output=config.output.with_name("other"))
        distill(other)
        assert labels(config) == labels(other) and len(before) == 3
        assert all(torch.equal(x, weights(other)[name]) for name, x in weights(config).items())
        # the search is over: they stay left out, and without them nothing is left to be told
        assert self.told(call("--skip-bad", images=damaged).stderr, damaged) == note
        assert call(images=damaged).exit_code == 2
        for name in ("cut.png", "small.png", "text.png"):
            (damaged / name).unlink()
        result = call(images=damaged)
        assert result.exit_code == 0 and "left out" not in result.stderr and shards(config) == before

    def test_only_what_is_to_be_searched_is_checked(self, config, damaged, monkeypatch):
        config = replace(config, images=damaged, skip_bad=True)
        read = []
        real = data.find_damaged
        monkeypatch.setattr(
            data, "find_damaged", lambda some, **given: (read.append(len(some)), real(some, **given))[1]
        )
        distill(config)
        (config.output / "edges" / "000001.safetensors").unlink()
        distill(config)
        assert read == [13, 4 + 3]

    def test_too_few_are_left(self, config, damaged):
        for index in range(4):
            (damaged / f"{index}.png").unlink()
        with pytest.raises(ValueError, match="distill: images must be more than 6 photographs, got 6"):
            distill(replace(config, images=damaged, skip_bad=True))

    def test_a_photograph_of_too_many_pixels(self, call, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # twice as many are refused
        result = call()
        assert result.exit_code == 2 and not result.stdout
        assert "trace-fast: photographs must be readable, got 10 damaged or too small;" in result.stderr
        assert len([line for line in result.stderr.splitlines() if "decompression bomb" in line]) == 10

    def test_a_photograph_that_is_damaged_after_the_search(self, config, call, photographs, tmp_path):
        images = shutil.copytree(photographs, tmp_path / "images")
        distill(replace(config, images=images, epochs=1))
        (config.output / "state.safetensors").unlink()
        for path in images.iterdir():
            path.write_bytes(bytes(path.stat().st_size))
        result = call(images=images)
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith("trace-fast: photographs must be readable, got ")

    @pytest.mark.parametrize("option", ["epochs", "rate", "decoder-rate", "reconstruction"])
    def test_numbers_must_be_finite(self, call, option):
        result = call(f"--{option}", "inf")
        name = option.replace("-", "_")
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1] == f"trace-fast: distill: {name} must be finite, got inf"

    def test_too_few_photographs(self, config, call, photographs, tmp_path):
        (tmp_path / "few").mkdir()
        for index in range(6):
            shutil.copy(photographs / f"{index}.png", tmp_path / "few")
        result = call(images=tmp_path / "few")
        assert result.exit_code == 2
        assert result.stderr == "trace-fast: distill: images must be more than 6 photographs, got 6\n"

    def test_no_folder_of_photographs(self, call):
        result = call(images="nowhere")
        assert result.exit_code == 2
        assert result.stderr == "trace-fast: photographs must be a folder of image or tar files, got 'nowhere'\n"

    def test_an_encoder(self, call, config, tmp_path):
        dinov2().save_pretrained(tmp_path / "encoder")
        result = call(model=tmp_path / "encoder")
        assert result.exit_code == 2
        assert "distill: model must be a diffusion model, got the encoder" in result.stderr
        assert not shards(config)

    def test_a_batch_that_leaves_a_process_without_work(self, config, monkeypatch):
        monkeypatch.setattr(program.Process, "join", lambda device, op: replace(alone(), count=4))
        with pytest.raises(ValueError, match="distill: batch must be at least the 4 processes, got 2"):
            distill(config)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--size", "31x48"), "mini: size must be positive multiples of 4 pixels, got (31, 48)"),
            (("--size", "48"), "--size must be height and width in pixels, such as 512x768, got '48'"),
            (("--teacher-size", "48"), "--teacher-size must be height and width in pixels, such as 512x768, got '48'"),
            (("--timestep", "1000"), "--timestep must be iep or an integer from 0 to 999, got '1000'"),
            (("--size", "30x48", "--teacher-size", "32x48"), "mini: size must be positive multiples of 4 pixels, got "),
            (("--checkpointing",), "distill: checkpointing must be of a network of diffusers, got "),
        ],
    )
    def test_options_that_do_not_fit(self, call, options, message, monkeypatch):
        monkeypatch.setattr(Shards, "make", lambda *_: pytest.fail("searched before"))
        result = call(*options)
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith(f"trace-fast: {message}")

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"labels": "hard"}, ValueError, "distill: labels must be .*ternary.*, got hard"),
            ({"decoder": "cnn"}, ValueError, "distill: decoder must be .*conv.*, got cnn"),
            ({"dtype": "float16"}, ValueError, "distill: dtype must be .*, got float16"),
            ({"rank": 0}, ValueError, "distill: rank must be .* got 0"),
            ({"batch": 1.5}, TypeError, "distill: batch must be .* got .*"),
            ({"interior": 1.1}, ValueError, "distill: interior must be .* got 1.1"),
            ({"limit": 6}, ValueError, "distill: limit must be .* got 6"),
            ({"rate": float("nan")}, ValueError, "distill: rate must be .* got nan"),
            ({"epochs": float("inf")}, ValueError, "distill: epochs must be finite, got inf"),
            ({"recolour": float("nan")}, ValueError, "distill: recolour must be from 0 to 1, got nan"),
            ({"save_minutes": float("nan")}, ValueError, "distill: save_minutes must be at least 0, got nan"),
            ({"level": "iep"}, TypeError, "distill: level must be an int, got str"),
            ({"level": 1000}, ValueError, "distill: level must be from 0 to 999, got 1000"),
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
    def test_values_that_make_no_configuration(self, config, change, error, message):
        with pytest.raises(error, match=message):
            replace(config, **change)


@pytest.mark.parametrize("family", ["sd15", "sd3.5-large"])
def test_checkpointing_changes_nothing(config, family, tmp_path, monkeypatch):
    pipe = pipeline(family, tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "model")
    plain = replace(config, model=str(tmp_path / "model"), size=SIZE, timestep=0, epochs=1, edges=tmp_path / "edges")
    saving = replace(plain, output=config.output.with_name("saving"), checkpointing=True)
    heard = []
    real = AttentionReadout.on_attention
    monkeypatch.setattr(
        AttentionReadout,
        "on_attention",
        lambda taps, index, *x: (heard.append(torch.is_grad_enabled()), real(taps, index, *x)),
    )
    counts = []
    for each in (plain, saving):
        heard.clear()
        distill(each)
        counts.append(sum(heard))
    assert counts[1] == 2 * counts[0] > 0  # every attention ran once more, on the way back
    first, second = weights(plain), weights(saving)
    for name, value in first.items():
        assert_close(second[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_learn_what_one_does(config, tmp_path):
    # noise that matters, gradients that are clipped, and a step whose direction is the gradient's
    config = replace(config, batch=3, level=300, epochs=3, reconstruction=100.0)
    images = shutil.copytree(config.images, tmp_path / "images")
    for index in range(3):
        (images / f"bad{index}.png").write_bytes(b"no picture")
    one = replace(config, output=tmp_path / "one")
    two = replace(config, output=tmp_path / "two", images=images, skip_bad=True)
    code = f"from pathlib import PosixPath; from trace_fast.training.distillation import *; distill({two!r})"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # as torchrun and accelerate launch start them
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [start(code, RANK=rank, LOCAL_RANK=rank, **job) for rank in "01"]
    distill(one)
    left_out = []
    for process in processes:
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told
        left_out.append([line for line in told.splitlines() if "bad" in line])
    assert [len(lines) for lines in left_out] == [3, 0]  # told once, all of them
    assert set(shards(one)) == set(shards(two)) and progress(one)["step"] == progress(two)["step"] == 4
    np.testing.assert_allclose(progress(one)["recent"], progress(two)["recent"], rtol=1e-4)
    before = Distillation(one, Tracer.from_pretrained(one.model, device="cpu"), order(one), alone())
    first, second = weights(one), weights(two)
    for name, parameter in before.state.parameters.items():
        learned = (first[f"model.{name}"] - parameter.detach()).norm()
        apart = (first[f"model.{name}"] - second[f"model.{name}"]).norm()
        assert learned > 0 and apart < 0.02 * learned, name


class TestPhotographs:
    def test_members_of_tar_files_are_read_in_place(self, photographs, tmp_path):
        with tarfile.open(tmp_path / "part.tar", "w") as archive:
            for index in range(3):
                archive.add(photographs / f"{index}.png", f"in/{index}.png")
        shutil.copy(photographs / "5.png", tmp_path / "z.png")
        found = list_photographs(tmp_path)
        assert [each.name for each in found] == [*(f"part.tar/in/{index}.png" for index in range(3)), "z.png"]
        for each, original in zip(found, ("0", "1", "2", "5"), strict=True):
            path = photographs / f"{original}.png"
            assert torch.equal(each.read(), Photograph(path.name, path).read())

    def test_a_damaged_tar_file_is_named(self, tmp_path):
        (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
        with pytest.raises(ValueError, match=r"photographs must be readable, got a damaged tar file .*bad\.tar"):
            list_photographs(tmp_path)
