"""`--engine ray`: the same files as without it, what is refused, and shards whose process ends."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from test_jobs import list_tree, make_photo, make_tar
from typer.testing import CliRunner

from trace_fast.cli import app

ray = pytest.importorskip("ray", reason="needs ray: pip install 'trace_fast[ray]'")
pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'trace_fast[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # those of Ray, which starts processes
SIZE = ("--size", "16x24", "--device", "cpu")


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """Make 48 photos, one of them damaged, and two tar files."""
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "COVERAGE_PROCESS_START"):
        monkeypatch.delenv(name, raising=False)
    photos = {}
    for index in range(48):
        path = make_photo(tmp_path / "in" / f"{index:02}.jpg", index)
        photos[f"{index}.jpg"] = path.read_bytes()
    (tmp_path / "in" / "07.jpg").write_bytes(b"")
    for number, name in enumerate("ab"):
        make_tar(tmp_path / "in" / f"{name}.tar", dict(list(photos.items())[4 * number :][:4]))
    return tmp_path / "in"


def call(output, *options):
    return CliRunner().invoke(app, ["edges", "in", "-o", output, *SIZE, *map(str, options)])


def test_the_files_of_threads(inputs):
    assert call("plain").exit_code == 1
    for earlier in ("", ", 55 of them by an earlier run"):
        result = call("out", "--engine", "ray")
        assert (result.exit_code, result.stdout) == (1, f"55 of 56 written to out{earlier}\n")
        assert "in/07.jpg: edges: image must be an image file" in result.stderr
    assert list_tree("out") == list_tree("plain")
    # the manifests, too
    assert Path("out/.trace-fast.jsonl").read_bytes() == Path("plain/.trace-fast.jsonl").read_bytes()
    assert not ray.is_initialized()


def test_too_many_actors_are_refused_before_and_after(inputs):
    for _ in range(2):
        result = call("out", "--engine", "ray", "--actors", 1000)
        assert result.exit_code == 2 and "got 1000: 2 of the CPUs of the cluster are for Ray" in result.stderr
        shutil.rmtree(inputs, ignore_errors=True)
        make_photo(inputs / "a.jpg")


def test_a_shard_whose_process_ends(inputs, tmp_path, monkeypatch, caplog):
    from exiting import ExitingTask

    from trace_fast.jobs.finder import EdgeFinder
    from trace_fast.jobs.inputs import list_inputs
    from trace_fast.jobs.run import plan_targets, run_job

    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{':'.join(sys.path)}")
    monkeypatch.setenv("TRACE_FAST_STARTS", str(tmp_path / "starts"))
    wide = make_photo(tmp_path / "wide.jpg", width=99).read_bytes()
    make_tar(inputs / "a.tar", {"0.jpg": wide})
    task = ExitingTask(EdgeFinder(device="cpu", size=(16, 24)))
    (tmp_path / "out").mkdir()
    targets = plan_targets(task, list_inputs("edges", [inputs]).files, tmp_path / "out")
    outcome = run_job(task, targets, tmp_path / "out", engine="ray")
    assert (outcome.images, outcome.failures) == (53, 2)
    assert (tmp_path / "starts").read_text() == "xxx"
    assert f"{inputs / 'a.tar'}: not written: the process ended 3 times" in caplog.messages
    names = list_tree(tmp_path / "out")
    assert len(names) == 48 and "b.tar" in names and "a.tar" not in names
