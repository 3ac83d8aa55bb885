"""trace_fast.io.claims: of two runs that write to one folder, the second is refused, and killed runs block nobody."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from PIL import Image
from typer.testing import CliRunner

from trace_fast import cli
from trace_fast.io import claims
from trace_fast.io.claims import CLAIM, claim_folder

REFUSAL = "output must be a folder that no other run writes to, got"
# without torch, whose import takes longer than the tests
LOAD = f"""
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("claims", {claims.__file__!r})
claims = importlib.util.module_from_spec(spec)
spec.loader.exec_module(claims)
"""
HOLDER = """
with claims.claim_folder(sys.argv[1], "distill"):
    print("claimed", flush=True)
    {action}
"""


@contextmanager
def holder(folder, action="time.sleep(60)"):
    """Run a process that claims a folder and then acts."""
    command = [sys.executable, "-c", LOAD + HOLDER.format(action=action), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "claimed\n"
            yield process
        finally:
            process.kill()


def claim(folder):
    with claim_folder(folder, "edges"):
        pass


def test_the_second_is_refused_and_a_killed_process_blocks_nobody(tmp_path):
    with holder(tmp_path) as process, pytest.raises(RuntimeError, match=f"edges: {REFUSAL} ") as refusal:
        claim(tmp_path)
    assert f"process {process.pid} writes; wait" in str(refusal.value)
    assert (tmp_path / CLAIM).exists()
    claim(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_neither_keeps_nor_ends_a_claim(tmp_path):
    # the child, as a worker of a loader, outlives its parent
    with holder(tmp_path, "child = os.fork(); child and print(child, flush=True); time.sleep(60)") as process:
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        try:
            claim(tmp_path)
        finally:
            os.kill(child, signal.SIGKILL)
    # the child leaves the block
    with holder(tmp_path, "os.fork() and (os.wait(), print('waited', flush=True), time.sleep(60))") as process:
        assert process.stdout.readline() == "waited\n"
        with pytest.raises(RuntimeError, match=REFUSAL):
            claim(tmp_path)


def test_threads_of_a_process(tmp_path):
    with claim_folder(tmp_path, "edges"), pytest.raises(RuntimeError, match=f"process {os.getpid()} writes"):
        claim(tmp_path / ".")
    with pytest.raises(ZeroDivisionError), claim_folder(tmp_path, "edges"):
        raise ZeroDivisionError
    claimed, refused, start = [], [], threading.Barrier(8)

    def work():
        start.wait()
        try:
            with claim_folder(tmp_path, "edges"):
                claimed.append(1)
                time.sleep(0.05)
        except RuntimeError:
            refused.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) + len(refused) == 8 and claimed
    assert list(tmp_path.iterdir()) == []


def test_many_processes_that_come_and_go(tmp_path):
    # a process must not lock a file that the one before has just removed
    code = """
end = time.monotonic() + 1
while time.monotonic() < end:
    try:
        with claims.claim_folder(sys.argv[1], "edges"):
            os.mkdir(os.path.join(sys.argv[1], "busy"))
            os.rmdir(os.path.join(sys.argv[1], "busy"))
    except RuntimeError:
        pass
"""
    workers = [subprocess.Popen([sys.executable, "-c", LOAD + code, str(tmp_path)]) for _ in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]


def test_a_system_without_fcntl(tmp_path, monkeypatch):
    locked = []

    def locking(file, mode, size):
        assert (mode, size, os.lseek(file, 0, os.SEEK_CUR)) == (2, 1, claims.LOCKED_BYTE)
        if locked:
            raise OSError(errno.EACCES, "Permission denied")
        locked.append(file)

    monkeypatch.setattr(claims, "fcntl", None)
    monkeypatch.setattr(claims, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    with claim_folder(tmp_path, "edges"):
        claims._claimed.clear()  # as another process
        with pytest.raises(RuntimeError, match=f"process {os.getpid()} writes"):
            claim(tmp_path)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claims, "fcntl", SimpleNamespace(lockf=lockf, LOCK_EX=2, LOCK_NB=4))
    claim(tmp_path)


def test_incomplete_files_of_killed_runs_are_removed(tmp_path):
    old = [tmp_path / f".{'0a' * 8}.part", tmp_path / "final" / f".{'0b' * 8}.part"]
    young = [tmp_path / f".{'0c' * 8}.part"]
    others = [tmp_path / "a.part", tmp_path / ".short.part", tmp_path / "final" / "b.png"]
    (tmp_path / "final").mkdir()
    for path in (*old, *young, *others):
        path.write_bytes(b"x")
    for path in (*old, *others):
        os.utime(path, (0, 0))
    with claim_folder(tmp_path, "pretrain"):
        assert not any(path.exists() for path in old) and all(path.exists() for path in (*young, *others))


@pytest.mark.parametrize("command", ["edges", "segment", "evaluate", "distill", "pretrain", "scenes"])
def test_every_command(tmp_path, command):
    output = tmp_path / "out"
    for folder in (output, tmp_path / "images", tmp_path / "inst"):
        folder.mkdir()
    for index in range(12):
        picture = Image.linear_gradient("L").rotate(30 * index)
        picture.save(tmp_path / "images" / f"{index}.png")
        picture.point(lambda value: value > 99).save(tmp_path / "inst" / f"{index}.png")
    images = str(tmp_path / "images")
    arguments = {
        "edges": [images],
        "segment": [images],
        "evaluate": ["--data", str(tmp_path), "--method", "sobel"],
        "distill": ["--images", images],
        "pretrain": [images],
        "scenes": [images],
    }[command]
    before = sorted(output.iterdir())
    with claim_folder(output, "other"):
        result = CliRunner().invoke(cli.app, [command, *arguments, "-o", str(output)])
    assert result.exit_code == 2
    assert f"trace-fast: {command}: {REFUSAL} '{output}', to which process {os.getpid()} writes;" in result.stderr
    assert sorted(output.iterdir()) == before
