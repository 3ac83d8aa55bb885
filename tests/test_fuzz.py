"""Short runs of the harnesses in tests/fuzz: `make fuzz` and `make kill` run them for longer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "fuzz"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="children are watched through /proc"),
]


def run(name, *words):
    """Run a harness, and return what it prints; its children need no settings of the tests."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRACE_FAST_")}
    command = [sys.executable, str(FOLDER / name), *words]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_hostile_inputs_are_accepted_or_refused_by_name(tmp_path):
    table = run("run.py", "--inputs", "300", "--seed", "0", "--keep", str(tmp_path))
    counts = table.splitlines()[-1].split()
    assert counts[0] == "all" and int(counts[1]) >= 300 and counts[4:] == ["0"] * 4
    assert int(counts[2]) > 30 and int(counts[3]) > 30


def test_failing_inputs_are_kept(tmp_path):
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import os, signal, run
from server import Target, WrongError

def fail(random, level, folder):
    (folder / "input").write_text(str(level))
    number = int(random.integers(4))
    if number == 0:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 1:
        raise WrongError("wrong")
    if number == 2:
        bytearray(1 << 40)

run.TARGETS = (Target("all", fail, 1.0),)
sys.argv[1:] = ["--inputs", "40", "--seed", "0", "--keep", sys.argv[2]]
sys.exit(run.main())
"""
    result = subprocess.run([sys.executable, "-c", code, FOLDER, tmp_path], capture_output=True, text=True, timeout=900)
    assert result.returncode == 1, result.stderr
    accepted, refused, crashes, hangs, wrong, unclear = map(int, result.stdout.splitlines()[-1].split()[2:])
    assert (refused, hangs, accepted + crashes + wrong + unclear) == (0, 0, 40)
    assert min(accepted, crashes, wrong, unclear) > 0
    names = sorted(path.name.rpartition("-")[0] for path in tmp_path.iterdir())
    assert names == ["all-crash-1", "all-unclear-1", "all-wrong-1"]
    assert {(path / "input").read_text() for path in tmp_path.iterdir()} == {"1"}


def test_killed_runs_are_continued(tmp_path):
    words = ("--points", "4", "--no-disks", "--job", "edges", "--job", "scenes", "--job", "pretrain")
    table = run("kill.py", *words)
    killed, before, *problems = map(int, table.splitlines()[-1].split()[1:])
    assert killed + before >= 4 and problems == [0] * 4
