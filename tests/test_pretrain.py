"""Training of the embedded model: data, resuming, and that the result can be traced."""

import functools
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from trace_fast import Tracer
from trace_fast.backbones.mini import Mini, MiniConfig
from trace_fast.cli import app
from trace_fast.training.mini import PretrainConfig, Pretraining, Process, collages, crops, load_photographs, pretrain


@pytest.fixture
def photographs(tmp_path):
    """Eight pictures of unlike sizes, half of them in a tar file."""
    folder = tmp_path / "photographs"
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
def config(photographs, tmp_path):
    model = MiniConfig(dim=16, depth=2, heads=2)
    sizes = {"sizes": (16, 32), "batches": (4, 2), "large_every": 3}
    return PretrainConfig(photographs, tmp_path / "run", images=40, warmup=2, model=model, **sizes)


def test_photographs_come_from_files_and_tars(photographs):
    assert load_photographs(photographs, size=32).shape == (8, 32, 32, 3)


def test_missing_or_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="photographs must be a folder"):
        load_photographs(tmp_path / "none")
    with pytest.raises(ValueError, match="photographs must hold image files"):
        load_photographs(tmp_path)


def test_crops_are_parts_of_photographs():
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)[None] * 4
    found = crops(ramp, 5, 16, np.random.default_rng(0))
    assert found.shape == (5, 3, 16, 16) and found.abs().max() <= 1
    slopes = found.diff(dim=-1).mean((1, 2, 3)) * 127.5 / 4
    assert slopes.abs().min() > 0.9  # pixels of the ramp per pixel: at least native detail
    assert (slopes > 0).any() and (slopes < 0).any()  # flipped or not


def test_collages_keep_the_range_and_mix_their_sources():
    images = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 3, 32, 40)
    found = collages(images, 10, torch.Generator().manual_seed(0))
    assert found.shape == (10, 3, 32, 40) and found.abs().max() <= 1
    assert all(len(one.flatten(1).unique(dim=1).T) > 3 for one in found)  # more than one plain colour in each
    assert torch.equal(found, collages(images, 10, torch.Generator().manual_seed(0)))


def test_a_run_falls_in_loss_and_can_be_traced(config):
    folder = pretrain(replace(config, images=1000, collages=0.0, rate=3e-3, licence="CC0"))
    state = json.loads(safetensors_metadata(config.output / "state.safetensors")["progress"])
    losses = [loss for _, loss in state["losses"]]
    assert losses[-1] < 0.9 * losses[0]
    card = (folder / "README.md").read_text()
    assert "images seen: 1,00" in card
    assert "licence CC0" in card
    assert Tracer.from_pretrained(folder, device="cpu")(np.zeros((20, 30, 3), np.uint8)).edges.shape == (1, 1, 20, 30)


def test_a_resumed_run_ends_where_an_unbroken_one_does(config):
    unbroken = pretrain(config)

    class StopError(Exception):
        pass

    broken = replace(config, output=config.output.with_name("broken"))
    run = Pretraining(broken, Process.join("cpu", "pretrain"))
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
    resumed = pretrain(broken)
    assert [
        load_file(config.output / "state.safetensors")[name].equal(value)
        for name, value in load_file(broken.output / "state.safetensors").items()
    ].count(False) == 0
    assert (resumed / "config.json").read_text() == (unbroken / "config.json").read_text()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes:UserWarning")  # on one core
def test_workers_change_nothing(config, tmp_path):
    alone, helped = config, replace(config, output=tmp_path / "helped", workers=2)
    pretrain(alone), pretrain(helped)
    first, second = (load_file(each.output / "state.safetensors") for each in (alone, helped))
    assert all(first[name].equal(value) for name, value in second.items())


def test_a_run_stops_after_its_minutes_and_goes_on(config, tmp_path, monkeypatch):
    pretrain(config)
    clock = itertools.count()
    monkeypatch.setattr("trace_fast.training.mini.time.monotonic", lambda: float(next(clock)))
    short = replace(config, output=tmp_path / "short", minutes=0.1)
    seen = []
    while not seen or seen[-1] < config.images:
        folder = pretrain(short)
        seen.append(json.loads((folder / "config.json").read_text())["images"])
    assert len(seen) > 2 and seen == sorted(set(seen))
    first, second = (load_file(each.output / "state.safetensors") for each in (config, short))
    assert all(first[name].equal(value) for name, value in second.items())


def test_a_run_goes_on_from_weights(config, tmp_path):
    start = pretrain(config)
    config = replace(config, output=tmp_path / "second", start=start, rate=0.0)
    second = pretrain(config)
    assert load_file(second / "model.safetensors").keys() == load_file(start / "model.safetensors").keys()
    for name, value in load_file(second / "model.safetensors").items():  # nothing is learned at rate 0
        assert value.equal(load_file(start / "model.safetensors")[name]), name
    assert f"Set out from the weights in '{start.name}'" in (second / "README.md").read_text()
    assert pretrain(replace(config, start=start.rename(tmp_path / "moved"))) == second  # of the same bytes
    other = pretrain(replace(config, output=tmp_path / "third", start=None, seed=1))
    with pytest.raises(ValueError, match="output must be empty or hold a run of the same configuration"):
        pretrain(replace(config, start=other))


def test_weights_to_start_from_must_fit(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"start must be a folder with model\.safetensors"):
        pretrain(replace(config, start=tmp_path))
    start = pretrain(replace(config, images=4, output=tmp_path / "wide", model=MiniConfig(dim=32, depth=2, heads=2)))
    refusal = r"start must be a folder with weights of MiniConfig\(dim=16, .* got .*final': "
    with pytest.raises(ValueError, match=refusal + r"blocks\.0\..* differs"):
        pretrain(replace(config, start=start))
    (start / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=refusal + r"model\.safetensors is damaged"):
        pretrain(replace(config, start=start))


def test_levels_are_drawn_as_asked(config, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "trace_fast.backbones.schedule.VariancePreserving.noise", lambda self, x, noise, level: see(level, x)
    )

    def see(level, x):
        drawn.append(level)
        return x

    for exponent in (1.0, 4.0):
        pretrain(replace(config, images=600, levels=exponent, output=config.output / str(exponent)))
        found = torch.cat(drawn)
        drawn.clear()
        assert found.min() >= 0 and found.max() < 1000
        # P(level < 100) = 0.1^(1 / exponent)
        assert abs((found < 100).float().mean() - 0.1 ** (1 / exponent)) < 0.08


@pytest.mark.parametrize(
    ("name", "value"), [("levels", 0.5), ("levels", float("nan")), ("collages", 1.5), ("rate", -1.0)]
)
def test_settings_out_of_range_are_told(config, name, value):
    with pytest.raises(ValueError, match=f"pretrain: {name} must be .* got {value}"):
        replace(config, **{name: value})


def test_two_processes_learn_what_one_does(config, tmp_path):
    one, two = (replace(config, output=tmp_path / name) for name in ("one", "two"))
    code = f"from pathlib import PosixPath; from trace_fast.training.mini import *; pretrain({two!r})"
    code = f"from trace_fast.backbones.mini import MiniConfig; {code}"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stderr=subprocess.PIPE,
            env=os.environ | job | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]
    pretrain(one)
    for process in processes:
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told.decode()
    first, second = (load_file(each.output / "state.safetensors") for each in (one, two))
    torch.manual_seed(config.seed)
    before = dict(Mini(config.model).named_parameters())
    for name, parameter in before.items():
        learned = (first[f"model.{name}"] - parameter.detach()).norm()
        apart = (first[f"model.{name}"] - second[f"model.{name}"]).norm()
        assert learned > 0 and apart < 0.1 * learned, name


def test_more_processes_than_images_are_refused(config, monkeypatch):
    monkeypatch.setattr(Process, "join", lambda device, op: Process(0, 4, torch.device("cpu")))
    with pytest.raises(ValueError, match="batches must be at least the 4 processes, got 2"):
        pretrain(config)


def test_a_compiled_run_learns_what_an_eager_one_does(config, tmp_path, monkeypatch):
    # one whole graph, without the minutes of the code generator
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    eager, compiled = config, replace(config, output=tmp_path / "compiled", compile=True)
    pretrain(eager)
    pretrain(compiled)
    first, second = (
        json.loads(safetensors_metadata(each.output / "state.safetensors")["progress"]) for each in (eager, compiled)
    )
    np.testing.assert_allclose(first["recent"], second["recent"], rtol=0.02)


def test_the_command_line(photographs, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(
        "trace_fast.training.mini.pretrain", lambda config: told.append(config) or config.output / "final"
    )
    words = (
        "--images 9 --batch 16 --rate 0.01 --collages 0.25 --levels 4 --seed 3 --compile --licence CC0 --dim 32 "
        "--depth 2 --workers 3 --minutes 1.5"
    )
    found = CliRunner().invoke(app, ["pretrain", str(photographs), "-o", str(tmp_path / "run"), *words.split()])
    assert found.exit_code == 0, found.output
    assert found.stdout.strip() == str(tmp_path / "run/final")
    assert told == [
        PretrainConfig(
            photographs,
            tmp_path / "run",
            images=9,
            batches=(16, 4),
            rate=0.01,
            collages=0.25,
            levels=4.0,
            seed=3,
            compile=True,
            licence="CC0",
            model=MiniConfig(dim=32, depth=2),
            workers=3,
            minutes=1.5,
        )
    ]
    found = CliRunner().invoke(app, ["pretrain", str(photographs), "-o", str(tmp_path), "--start", str(photographs)])
    assert found.exit_code == 2 and "start must be a folder with model.safetensors" in found.stderr


def test_a_run_of_another_configuration_is_not_resumed(config):
    pretrain(replace(config, images=4))
    refusal = "pretrain: output must be empty or hold a run of the same configuration, got "
    told = f"seed 0 there, 1 here; model.depth 2 there, 3 here in '{config.output / 'state.safetensors'}'"
    with pytest.raises(ValueError, match=re.escape(refusal + told) + "$"):
        pretrain(replace(config, seed=1, model=replace(config.model, depth=3)))


def test_a_state_of_another_version_is_not_resumed(config):
    pretrain(replace(config, images=4))
    state = config.output / "state.safetensors"
    save_file(load_file(state), state, {"progress": "{}"})
    with pytest.raises(ValueError, match=r"hold a run of the same configuration, got another version in '.*state"):
        pretrain(config)


def test_a_damaged_state_is_named(config):
    pretrain(replace(config, images=4))
    state = config.output / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-8])
    with pytest.raises(ValueError, match="output must hold a whole state"):
        pretrain(config)


def test_a_damaged_photograph_is_named(photographs):
    (photographs / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"photographs must be readable, got .*bad\.png"):
        load_photographs(photographs)


def test_a_missing_device_is_named(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="device must be present, got 'cuda'"):
        pretrain(replace(config, device="cuda"))


def safetensors_metadata(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as stored:
        return stored.metadata()
