"""How the threads of commands wait: they leave the cores to other programs."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

# prints what torch will find in the environment when it is loaded
WATCH = """
import os, sys
class Watch:
    def find_spec(name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
sys.meta_path.insert(0, Watch)
"""


def run_python(code, **environment):
    """Return what Python prints, with none of the variables that decide how threads wait but these."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=inherited | environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_the_package_alone_loads_no_torch():
    assert run_python(WATCH + "import trace_fast; trace_fast.__version__; dir(trace_fast)") == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "10000 None\n"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None\n"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE\n"),
    ],
    ids=str,
)
def test_commands_wait_briefly_unless_the_user_decides(environment, expected):
    assert run_python(WATCH + "import trace_fast.cli", **environment) == expected


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libgomp is torch's on Linux")
def test_two_commands_side_by_side_cost_as_much_as_one_after_the_other(tmp_path):
    random = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(random.integers(0, 256, (240, 320, 3), np.uint8)).save(tmp_path / f"{number}.png")

    def start(name):
        command = [sys.executable, "-m", "trace_fast", "edges", str(tmp_path), "-o", str(tmp_path / name)]
        environment = os.environ | {"OMP_NUM_THREADS": "2"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def wait(process):
        """Return the seconds of CPU time that a process took."""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return usage.ru_utime + usage.ru_stime

    apart = sum(wait(start(f"apart-{number}")) for number in range(2))
    together = sum(map(wait, [start(f"together-{number}") for number in range(2)]))
    assert together <= 1.3 * apart, f"{together:.1f} s side by side, {apart:.1f} s apart"
