"""os.fork after an op: the threads of the parent do not exist in the child, which must not wait for them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# an op of the core and one of torch itself, both on several threads
WORK = """
import os, torch
from trace_fast import ops

assert torch.get_num_threads() == 2

def work(seed):
    torch.manual_seed(seed)
    masks, edges = torch.rand(12, 40, 56), torch.rand(40, 56)
    return float(ops.random_walk(masks, edges, 3, 10, 20).sum() + torch.rand(1 << 20).exp().sum())

expected = work(0)
"""
FORK = """
child = os.fork()
if child == 0:
    assert torch.get_num_threads() == 1
    os._exit(0 if abs(work(0) - expected) <= 1e-4 * expected else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.get_num_threads() == 2
"""
LOADER = """
loader = torch.utils.data.DataLoader(range(4), num_workers=2, collate_fn=lambda seeds: work(seeds[0]))
assert abs(list(loader)[0] - expected) <= 1e-4 * expected
"""
POOL = """
import multiprocessing
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert abs(pool.map(work, range(4))[0] - expected) <= 1e-4 * expected
"""
# a child that forks before any op may use as many threads as it likes
FRESH = """
import os, torch
from trace_fast import ops
child = os.fork()
if child == 0:
    os._exit(torch.get_num_threads())
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
"""


@pytest.mark.parametrize(
    "code", [WORK + FORK, WORK + LOADER, WORK + POOL, FRESH], ids=["fork", "loader", "pool", "fresh"]
)
def test_children(tmp_path, code):
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    with open(tmp_path / "errors", "w+") as errors:
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=errors, start_new_session=True)
        try:
            process.wait(120)
        finally:
            # children that wait for threads outlive their parent
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        errors.seek(0)
        assert process.returncode == 0, errors.read()
