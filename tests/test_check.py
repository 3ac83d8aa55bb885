"""The report on a model: what is measured, and how it reads."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from tiny import dinov2, embedded, pipeline
from torch.testing import assert_close
from typer.testing import CliRunner

from trace_fast import Tracer
from trace_fast import model_check as module
from trace_fast.cli import app
from trace_fast.model_check import check

pytest.importorskip("skimage", reason="needs scikit-image: pip install 'trace_fast[eval]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return embedded(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def report(folder):
    return check(folder, device="cpu")


def test_capture_is_described(report):
    assert report.capture["blocks"] == "2 of 2, 2 x (8, 12)"
    assert report.capture["output is the same bit by bit"] is True
    assert report.capture["largest difference of the output in the search"] <= 1e-5 * report.capture["largest output"]
    assert 0 <= report.capture["largest distance of the sum of a row from 1"] < 1e-5


def test_a_capture_that_changes_the_output_is_found(folder, monkeypatch):
    tracer = Tracer.from_pretrained(folder, device="cpu")
    predict = type(tracer.backbone).predict
    calls = []

    def predict_else(self, sample, timestep):
        calls.append(predict(self, sample, timestep) + 0.25 * (len(calls) >= 2))  # the first two are not captured
        return calls[-1]

    monkeypatch.setattr(type(tracer.backbone), "predict", predict_else)
    capture, _ = module.check_capture(tracer, torch.rand(1, 3, 40, 60))
    assert capture["output is the same bit by bit"] is False
    assert capture["largest difference of the output in the search"] == pytest.approx(0.25, abs=1e-5)


def test_stages_are_timed(report):
    assert list(report.stages) == ["loading", "encoding", "pass alone", "pass with capture", "search"]
    assert all(stage["seconds"] >= 0 for stage in report.stages.values())


def test_the_curve_is_that_of_the_search(report, folder):
    from skimage import data

    output = Tracer.from_pretrained(folder, device="cpu")(data.rocket(), return_kl=True)
    photo = report.photos["rocket"]
    assert list(photo["kl"]) == output.timesteps[1:].tolist()
    assert_close(torch.tensor(list(photo["kl"].values())), output.kl[0])
    assert photo["t*"] == list(photo["kl"])[int(output.kl[0].argmax())]
    assert photo["read"] == 0


def test_divergence_is_larger_on_the_outline_of_a_disc():
    tracer = Tracer.from_pretrained("mini", device="cpu")
    values = module.check_divergence(tracer, torch.full((1, 3, 90, 120), 0.2), torch.full((1, 3, 50, 60), 0.9))
    assert values["0"]["boundary"] > 2 * values["0"]["inside"] > 0


def test_an_encoder_has_no_curve(tmp_path):
    dinov2().save_pretrained(tmp_path)
    report = check(tmp_path, device="cpu")
    assert "- coffee: none, since an encoder has no timesteps" in str(report).splitlines()
    assert report.photos["coffee"] == {"kl": {}, "t*": None, "read": 0} and list(report.divergence) == ["0"]


@pytest.mark.slow
def test_a_model_of_diffusers(tmp_path):
    pipeline("sd15", tmp_path).save_pretrained(tmp_path / "model")
    report = check(tmp_path / "model", device="cpu")
    assert report.capture["output is the same bit by bit"] is True
    assert report.capture["largest difference of the output in the search"] <= 1e-4 * report.capture["largest output"]
    assert report.model["parameters"] > 0
    assert len(report.photos["coffee"]["kl"]) == 10


def test_a_grid_without_tokens_inside_is_null_in_json(folder, tmp_path):
    # nothing of the disc lies inside it
    check(folder, tmp_path, device="cpu", size=(16, 16))

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert report["divergence"]["0"]["inside"] is None


def test_the_command_writes_the_report(folder, tmp_path):
    result = CliRunner().invoke(app, ["check", "--model", str(folder), "--device", "cpu", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out" / "report.md").read_text()
    assert text in result.stdout
    for title in ("Machine", "Model", "Capture", "Stages", "KL curve, in nats", "Mean ABDiv, in nats"):
        assert f"## {title}\n" in text
    assert "| the authors' poster, another picture | 0.114 | 0.027 |" in text
    fields = {field.name for field in dataclasses.fields(module.Report)}
    assert json.loads((tmp_path / "out" / "report.json").read_text()).keys() == fields
    with Image.open(tmp_path / "out" / "panel.png") as panel:
        assert panel.height > 3 * module.HEIGHT
