"""Training of the embedded model: data, resuming, and that the result can be traced."""

import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from trace_fast import Tracer
from trace_fast.backbones.mini import MiniConfig
from trace_fast.pretrain import PretrainConfig, collages, crops, load_photographs, pretrain


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

    from trace_fast import pretrain as program

    broken = replace(config, output=config.output.with_name("broken"))
    run = program.Pretraining(broken)
    step, steps = run.train_step, []

    def stop_after_five(photographs):
        if len(steps) == 5:
            run.save()
            raise StopError
        steps.append(1)
        return step(photographs)

    run.train_step = stop_after_five
    with pytest.raises(StopError):
        run.run()
    resumed = pretrain(broken)
    assert [
        load_file(config.output / "state.safetensors")[name].equal(value)
        for name, value in load_file(broken.output / "state.safetensors").items()
    ].count(False) == 0
    assert (resumed / "config.json").read_text() == (unbroken / "config.json").read_text()


def test_a_run_of_another_configuration_is_not_resumed(config):
    pretrain(replace(config, images=4))
    with pytest.raises(ValueError, match="output must be empty or hold a run of the same configuration"):
        pretrain(replace(config, seed=1))


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
