"""Pretraining of the embedded model: its data, exact resuming, and weights that can be traced."""

import functools
import itertools
import json
import re
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import start_two
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from trace_fast import Tracer
from trace_fast.backbones.mini import Mini
from trace_fast.cli import app
from trace_fast.training.inside import measure_inside
from trace_fast.training.mini import (
    MEASURED,
    Batches,
    PretrainConfig,
    Pretraining,
    Process,
    load_photos,
    make_collages,
    make_crops,
    pretrain,
)
from trace_fast.training.scenes import list_scenes


@pytest.fixture
def photos(tmp_path):
    """Eight photos of different sizes, half of them in a tar file."""
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(8):
        small = Image.fromarray(random.integers(0, 256, (4, 6, 3), dtype=np.uint8))
        small.resize((90 + index, 70), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    with tarfile.open(folder / "part.tar", "w") as archive:
        for index in range(4):
            archive.add(folder / f"{index}.png", f"in/{index}.png")
            (folder / f"{index}.png").unlink()
    return folder


@pytest.fixture
def config(photos, tmp_path):
    """Batches of eight, and every third one of two that are twice as large."""
    network = {"dim": 16, "depth": 2, "heads": 2}
    sizes = {"size": 16, "large_size": 32, "batch": 8, "large_every": 3}
    return PretrainConfig(photos=photos, output=tmp_path / "run", images=80, warmup=2, **network, **sizes)


def read_progress(config):
    with safe_open(config.output / "state.safetensors", "pt") as stored:
        return json.loads(stored.metadata()["progress"])


def read_weights(config):
    return load_file(config.output / "state.safetensors")


def test_photos_are_files_and_members_of_tars(photos):
    assert load_photos(photos, size=32).shape == (8, 32, 32, 3)


def test_a_missing_or_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="photos must be a folder of image or tar files, got"):
        load_photos(tmp_path / "none")
    with pytest.raises(ValueError, match="photos must be a folder with image files, got none in"):
        load_photos(tmp_path)


def test_crops_are_parts_of_photos():
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)[None] * 4
    crops = make_crops(ramp, 5, 16, np.random.default_rng(0))
    assert crops.shape == (5, 3, 16, 16) and crops.abs().max() <= 1
    slopes = crops.diff(dim=-1).mean((1, 2, 3)) * 127.5 / 4
    assert slopes.abs().min() > 0.9  # pixels of the ramp per pixel: at least the native resolution
    assert (slopes > 0).any() and (slopes < 0).any()  # some are mirrored


def test_collages_keep_the_range_and_mix_their_sources():
    images = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 3, 32, 40)
    collages = make_collages(images, 10, torch.Generator().manual_seed(0))
    assert collages.shape == (10, 3, 32, 40) and collages.abs().max() <= 1
    assert all(len(collage.flatten(1).unique(dim=1).T) > 3 for collage in collages)
    assert torch.equal(collages, make_collages(images, 10, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("batch", "size", "large_size", "large_batch"), [(32, 64, 128, 8), (8, 16, 32, 2), (32, 32, 48, 14), (3, 16, 64, 1)]
)
def test_a_large_step_has_about_as_many_pixels(config, batch, size, large_size, large_batch):
    config = replace(config, batch=batch, size=size, large_size=large_size)
    assert [config.get_batch(step) for step in range(4)] == [
        (size, batch),
        (size, batch),
        (large_size, large_batch),
        (size, batch),
    ]


@pytest.mark.slow
def test_the_loss_falls_and_the_weights_can_be_traced(config):
    folder = pretrain(replace(config, images=1000, batch=4, collages=0.0, rate=3e-3, license="CC0"))
    losses = [loss for _, loss in read_progress(config)["losses"]]
    assert losses[-1] < 0.9 * losses[0]
    card = (folder / "README.md").read_text()
    assert "images: 1,00" in card and "license CC0" in card
    assert Tracer.from_pretrained(folder, device="cpu")(np.zeros((20, 30, 3), np.uint8)).edges.shape == (1, 1, 20, 30)


@pytest.mark.slow
class TestScenes:
    @pytest.fixture
    def config(self, config, tmp_path):
        """Five scenes to train on, all red, and 32 to measure attention on."""
        for name in ("images", "inst"):
            (tmp_path / "scenes" / name).mkdir(parents=True)
        instances = np.zeros((32, 32), np.uint16)
        instances[8:24, 8:24] = 1
        for index in range(MEASURED + 5):
            name = f"{index:06d}"
            color = (0, 0, 255) if index < MEASURED else (255, 0, 0)
            Image.new("RGB", (32, 32), color).save(tmp_path / "scenes" / "images" / f"{name}.jpg", quality=95)
            Image.fromarray(instances).save(tmp_path / "scenes" / "inst" / f"{name}.png")
        return replace(config, scenes=tmp_path / "scenes", scenes_share=0.25, collages=0.5)

    def test_a_batch_has_its_share_and_none_of_those_to_measure(self, config):
        run = Pretraining(config, Process(0, 1, torch.device("cpu")))
        photos = np.zeros((2, 64, 64, 3), np.uint8)
        images, *_ = Batches(config, photos, 1000, run.scenes[MEASURED:])[0]
        red = [bool((image[0] > 0.9).all() and (image[1:] < -0.9).all()) for image in images]
        assert red == [False] * 6 + [True] * 2
        without, *_ = Batches(replace(config, scenes=None), photos, 1000)[0]
        assert torch.equal(images[:2], without[:2])

    def test_the_card_has_what_was_measured(self, config):
        folder = pretrain(replace(config, images=16))
        card = (folder / "README.md").read_text()
        assert "25% drawn scenes" in card
        inside, chance = map(float, re.search(r"in 32 scenes .*: (\S+); by chance (\S+)", card).groups())
        expected = measure_inside(Tracer.from_pretrained(folder, device="cpu"), list_scenes(config.scenes)[:MEASURED])
        assert [inside, chance] == pytest.approx(expected, abs=1e-3)

    def test_options_that_do_not_fit(self, config, tmp_path):
        with pytest.raises(ValueError, match=r"scenes_share and collages must be at most 1 together, got 0.6 and 0.5"):
            replace(config, scenes_share=0.6)
        (tmp_path / "few" / "images").mkdir(parents=True)
        with pytest.raises(ValueError, match="scenes must be a folder"):
            pretrain(replace(config, scenes=tmp_path / "few"))


def test_a_resumed_run_equals_an_uninterrupted_one(config):
    uninterrupted = pretrain(config)

    class StopError(Exception):
        pass

    interrupted = replace(config, output=config.output.with_name("interrupted"))
    run = Pretraining(interrupted, Process.connect("cpu", "pretrain"))
    interrupted.output.mkdir()
    step, steps = run.train_step, []

    def stop_after_five(batch):
        if len(steps) == 5:
            run.save()
            raise StopError
        steps.append(1)
        return step(batch)

    run.train_step = stop_after_five
    with pytest.raises(StopError):
        run.run()
    resumed = pretrain(interrupted)
    expected = read_weights(config)
    assert all(expected[name].equal(value) for name, value in read_weights(interrupted).items())
    assert (resumed / "config.json").read_text() == (uninterrupted / "config.json").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes:UserWarning")  # on one core
def test_workers_change_nothing(config, tmp_path):
    alone, helped = config, replace(config, output=tmp_path / "helped", workers=2)
    pretrain(alone), pretrain(helped)
    expected = read_weights(alone)
    assert all(expected[name].equal(value) for name, value in read_weights(helped).items())


@pytest.mark.slow
def test_a_run_stops_after_its_minutes_and_can_be_resumed(config, tmp_path, monkeypatch):
    pretrain(config)
    clock = itertools.count()
    monkeypatch.setattr("trace_fast.training.mini.time.monotonic", lambda: float(next(clock)))
    short = replace(config, output=tmp_path / "short", minutes=0.1)
    counts = []
    while not counts or counts[-1] < config.images:
        folder = pretrain(short)
        counts.append(json.loads((folder / "config.json").read_text())["images"])
    assert len(counts) > 2 and counts == sorted(set(counts))
    expected = read_weights(config)
    assert all(expected[name].equal(value) for name, value in read_weights(short).items())


@pytest.mark.slow
def test_a_run_starts_from_weights(config, tmp_path):
    first = pretrain(config)
    config = replace(config, output=tmp_path / "second", init_from=first, rate=0.0)
    second = pretrain(config)
    expected = load_file(first / "model.safetensors")
    weights = load_file(second / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, value in weights.items():  # nothing changes at rate 0
        assert value.equal(expected[name]), name
    assert f"Initial weights: those in '{first.name}'" in (second / "README.md").read_text()
    assert pretrain(replace(config, init_from=first.rename(tmp_path / "moved"))) == second  # of the same bytes
    other = pretrain(replace(config, output=tmp_path / "third", init_from=None, seed=1))
    with pytest.raises(ValueError, match="output must be empty or hold a run of the same configuration"):
        pretrain(replace(config, init_from=other))


def test_weights_to_start_from_must_fit(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"init_from must be a folder with model\.safetensors"):
        pretrain(replace(config, init_from=tmp_path))
    wide = pretrain(replace(config, images=4, output=tmp_path / "wide", dim=32))
    refusal = r"init_from must be a folder with weights of MiniConfig\(dim=16, .* got .*final': "
    with pytest.raises(ValueError, match=refusal + r"blocks\.0\..* differs"):
        pretrain(replace(config, init_from=wide))
    (wide / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=refusal + r"model\.safetensors is damaged"):
        pretrain(replace(config, init_from=wide))


@pytest.mark.slow
def test_timesteps_follow_the_power(config, monkeypatch):
    drawn = []

    def record(schedule, images, noise, timesteps):
        drawn.append(timesteps)
        return images

    monkeypatch.setattr("trace_fast.backbones.schedule.VariancePreserving.noise", record)
    for power in (1.0, 4.0):
        pretrain(replace(config, images=600, timestep_power=power, output=config.output / str(power)))
        timesteps = torch.cat(drawn)
        drawn.clear()
        assert timesteps.min() >= 0 and timesteps.max() < 1000
        # P(timestep < 100) = 0.1^(1 / power)
        assert abs((timesteps < 100).float().mean() - 0.1 ** (1 / power)) < 0.08


@pytest.mark.parametrize(
    ("name", "value"), [("timestep_power", 0.5), ("timestep_power", float("nan")), ("collages", 1.5), ("rate", -1.0)]
)
def test_options_out_of_range(config, name, value):
    with pytest.raises(ValueError, match=f"pretrain: {name} must be .* got {value}"):
        replace(config, **{name: value})


@pytest.mark.slow
def test_two_processes_learn_what_one_does(config, tmp_path):
    one, two = (replace(config, output=tmp_path / name) for name in ("one", "two"))
    code = f"from pathlib import PosixPath; from trace_fast.training.mini import *; pretrain({two!r})"
    processes = start_two(code)
    pretrain(one)
    for process in processes:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    first, second = read_weights(one), read_weights(two)
    torch.manual_seed(config.seed)
    ratios = []
    for name, parameter in Mini(config.architecture).named_parameters():
        learned = (first[f"model.{name}"] - parameter.detach()).norm()
        assert learned > 0, name
        ratios.append((first[f"model.{name}"] - second[f"model.{name}"]).norm() / learned)
    # other sums change it by up to 0.06, with other last bits, too; processes that do not share gradients by 0.5
    assert torch.stack(ratios).median() < 0.15


def test_more_processes_than_images_are_refused(config, monkeypatch):
    monkeypatch.setattr(Process, "connect", lambda device, op: Process(0, 4, torch.device("cpu")))
    with pytest.raises(ValueError, match="pretrain: batch must be at least the 4 processes, got 2 in a step"):
        pretrain(config)


@pytest.mark.slow
def test_a_compiled_run_learns_what_an_eager_one_does(config, tmp_path, monkeypatch):
    # one graph, without the minutes of the code generator
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    eager, compiled = config, replace(config, output=tmp_path / "compiled", compile=True)
    pretrain(eager)
    pretrain(compiled)
    first, second = (read_progress(run)["recent"] for run in (eager, compiled))
    np.testing.assert_allclose(first, second, rtol=0.02)


def test_the_command_line(photos, tmp_path, monkeypatch):
    configs = []
    monkeypatch.setattr(
        "trace_fast.training.mini.pretrain", lambda config: configs.append(config) or config.output / "final"
    )
    words = (
        "--images 9 --batch 16 --rate 0.01 --collages 0.25 --timestep-power 4 --seed 3 --compile --license CC0 "
        "--dim 32 --depth 2 --workers 3 --minutes 1.5"
    )
    result = CliRunner().invoke(app, ["pretrain", str(photos), "-o", str(tmp_path / "run"), *words.split()])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "run/final")
    expected = PretrainConfig(
        photos=photos,
        output=tmp_path / "run",
        images=9,
        batch=16,
        rate=0.01,
        collages=0.25,
        timestep_power=4.0,
        seed=3,
        compile=True,
        license="CC0",
        dim=32,
        depth=2,
        workers=3,
        minutes=1.5,
    )
    assert configs == [expected]
    result = CliRunner().invoke(app, ["pretrain", str(photos), "-o", str(tmp_path), "--init-from", str(photos)])
    assert result.exit_code == 2 and "init_from must be a folder with model.safetensors" in result.stderr


def test_a_run_of_another_configuration_is_not_resumed(config):
    pretrain(replace(config, images=4))
    refusal = "pretrain: output must be empty or hold a run of the same configuration, got "
    difference = f"depth 2 instead of 3; seed 0 instead of 1 in '{config.output / 'state.safetensors'}'"
    with pytest.raises(ValueError, match=re.escape(refusal + difference) + "$"):
        pretrain(replace(config, seed=1, depth=3))


def test_a_state_of_another_version_is_not_resumed(config):
    pretrain(replace(config, images=4))
    state = config.output / "state.safetensors"
    save_file(load_file(state), state, {"progress": "{}"})
    with pytest.raises(ValueError, match=r"a run of the same configuration, got a file of another version in '.*state"):
        pretrain(config)


def test_a_damaged_state_is_named(config):
    pretrain(replace(config, images=4))
    state = config.output / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"output must hold a state that is not damaged, got '.*state"):
        pretrain(config)


def test_a_damaged_photo_is_named(photos):
    (photos / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"photos must be readable, got .*bad\.png"):
        load_photos(photos)


def test_a_missing_device_is_named(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="device must be present, got 'cuda'"):
        pretrain(replace(config, device="cuda"))
