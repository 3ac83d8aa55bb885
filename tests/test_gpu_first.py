"""The scripts that need a GPU, rehearsed on the CPU."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

import gpu_first
import tables
import tune_kernels

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Return the rows of both rehearsals by action."""
    folder = tmp_path_factory.mktemp("results")
    for action in ("check", "time"):
        command = [sys.executable, ROOT / "scripts" / "gpu_first.py", action, "--rehearse", "--seconds", "3000"]
        environment = {**os.environ, "TRACE_FAST_COMMIT": "0123456"}
        done = subprocess.run(
            [*command, "--output", folder], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "left out" not in done.stdout
    return [json.loads((folder / f"gpu-{action}.json").read_text()) for action in ("check", "time")]


@pytest.mark.slow
def test_every_kind_of_check_is_rehearsed(rehearsed):
    rows = rehearsed[0]["rows"]
    assert all(row["right"] for row in rows)
    assert {row["kind"] for row in rows} == set(gpu_first.MEANING) - {"graph"}


@pytest.mark.slow
def test_every_kernel_is_timed_in_what_ships_and_in_candidates(rehearsed):
    rows = rehearsed[1]["rows"]
    kernels = {row["what"].partition(",")[0] for row in rows if row["ships"]}
    expected = {"row_statistics", "add_probabilities", "readout", "step_kl_abdiv", "accumulate_resized"}
    assert expected <= kernels
    assert not all(row["ships"] for row in rows) and all(row["seconds"] > 0 for row in rows)


@pytest.mark.slow
def test_results_become_a_table(rehearsed):
    text = tables.first_contact(rehearsed)
    assert f"{len(rehearsed[0]['rows'])} checks, 0 wrong." in text and "commit `0123456`" in text
    assert text.count("\n| ") > 8
    wrong = {**rehearsed[0], "rows": [{"kind": "map", "what": "a map", "right": False, "figures": "error 1"}]}
    assert "1 checks, 1 wrong.\n\n- a map: error 1" in tables.first_contact([wrong])
    assert "No GPU has been met yet" in tables.first_contact([])


def test_what_is_wrong_is_printed_with_its_meaning(monkeypatch, capsys):
    def fail():
        raise RuntimeError("no kernel image")

    checks = [("map", "one", lambda: (True, "error 0")), ("lse", "two", lambda: (False, "9")), ("graph", "three", fail)]
    monkeypatch.setattr(gpu_first, "checks", lambda *_: checks)
    rows = []
    gpu_first.run_checks("cpu", True, math.inf, rows)
    assert [row["right"] for row in rows] == [True, False, False]
    text = capsys.readouterr().out
    assert gpu_first.MEANING["lse"] in text and "three: RuntimeError: no kernel image" in text
    gpu_first.run_checks("cpu", True, time.monotonic() - 1, rows)
    assert len(rows) == 3 and capsys.readouterr().out.count("left out") == 3


def test_wheels_are_those_that_backbones_need():
    names = {line.partition("==")[0] for line in gpu_first.wheels()}
    assert {"diffusers", "huggingface-hub", "pytest", "safetensors"} <= names
    assert not names & {"torch", "triton", "numpy", "trace-fast"}


def test_every_tile_of_the_divergence_is_tuned(monkeypatch):
    calls = []
    monkeypatch.setattr(
        tune_kernels, "event_times", lambda call, milliseconds: calls.append(call) or [1e-3, 2e-3, 3e-3]
    )
    rows = tune_kernels.time_divergence(4, "cpu")
    tiles = [list(config) for config in tune_kernels.divergence.CONFIGS[4]]
    assert [row["tile"] for row in rows] == [list(call.args[-1]) for call in calls] == tiles
    assert [row["picked"] for row in rows].count(True) == 1
    assert {round(row["median_ms"], 6) for row in rows} == {2}
