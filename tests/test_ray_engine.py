"""`--engine ray`: the same files as without it, what is refused, and processes and machines that end."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from exiting import EndingTask, SlowTask
from test_jobs import list_tree, make_photo, make_tar
from typer.testing import CliRunner

from trace_fast.cli import app
from trace_fast.jobs.finder import EdgeFinder
from trace_fast.jobs.inputs import list_inputs
from trace_fast.jobs.run import plan_targets, run_job

ray = pytest.importorskip("ray", reason="needs ray: pip install 'trace_fast[ray]'")
pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'trace_fast[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # those of Ray, which starts processes
SIZE = ("--size", "16x24", "--device", "cpu")
FINDER = EdgeFinder(device="cpu", size=(16, 24))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Start Ray on three nodes, one of them without actors."""
    from ray.cluster_utils import Cluster

    notes = tmp_path_factory.mktemp("notes") / "notes"
    with pytest.MonkeyPatch.context() as patch:
        # actors have the environment that their node is started with
        patch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{':'.join(sys.path)}")
        patch.setenv("TRACE_FAST_NOTES", str(notes))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            cluster.nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
            patch.setenv("RAY_ADDRESS", cluster.address)
            cluster.notes = notes
            yield cluster
        finally:
            cluster.shutdown()


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """Make 48 photos, one of them damaged, and two tar files."""
    monkeypatch.chdir(tmp_path)
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


def run(task, inputs, output, **options):
    output.mkdir(exist_ok=True)
    return run_job(task, plan_targets(task, list_inputs("edges", [inputs]).files, output), output, **options)


def test_too_many_actors_are_refused_on_this_machine(inputs, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    result = call("out", "--engine", "ray", "--actors", 1000)
    assert result.exit_code == 2 and "got 1000: 2 of the CPUs of the cluster are for Ray" in result.stderr
    assert not ray.is_initialized()


@pytest.mark.usefixtures("cluster")
def test_the_files_of_threads(inputs):
    assert call("plain").exit_code == 1
    for earlier in ("", ", 55 of them by an earlier run"):
        result = call("out", "--engine", "ray", "--actors", 3)
        assert (
            result.exit_code == 2 and "actors must be at most 2, got 3: 2 of the CPUs of the cluster" in result.stderr
        )
        result = call("out", "--engine", "ray", "--actors", 1)
        assert (result.exit_code, result.stdout) == (1, f"55 of 56 written to out{earlier}\n")
        assert "in/07.jpg: edges: image must be an image file" in result.stderr
    assert list_tree("out") == list_tree("plain")
    # the manifests, too
    assert Path("out/.trace-fast.jsonl").read_bytes() == Path("plain/.trace-fast.jsonl").read_bytes()
    assert not ray.is_initialized()


def test_shards_whose_process_ends(inputs, tmp_path, cluster, caplog):
    """Let the process of a shard end each time, and that of another one be killed once."""
    plain = run(EndingTask(FINDER), inputs / "b.tar", tmp_path / "plain")
    assert plain.failures == 0
    for name, width in (("a", 99), ("b", 98)):
        photo = make_photo(tmp_path / "wide.png", width=width).read_bytes()
        make_tar(inputs / f"{name}.tar", {"0.png": photo})
    cluster.notes.unlink(missing_ok=True)
    outcome = run(EndingTask(FINDER), inputs, tmp_path / "out", engine="ray", actors=1)
    assert (outcome.images, outcome.failures) == (50, 2)
    assert sorted(cluster.notes.read_text().replace("killed", "k")) == ["k", "k", "x", "x", "x"]
    assert f"{inputs / 'a.tar'}: not written: the process ended 3 times" in caplog.text
    names = list_tree(tmp_path / "out")
    assert len(names) == 48 and "b.tar" in names and "a.tar" not in names


def test_a_shard_that_cannot_be_written(inputs, tmp_path, cluster, caplog):
    (tmp_path / "out").mkdir()
    make_photo(inputs / "deep" / "a.jpg")
    task, files = EndingTask(FINDER), list_inputs("edges", [inputs], recursive=True).files
    (tmp_path / "out" / "deep").touch()  # in the place of a folder
    outcome = run_job(task, plan_targets(task, files[-1:], tmp_path / "out"), tmp_path / "out", engine="ray")
    assert (outcome.images, outcome.failures) == (1, 1)
    assert f"{inputs / 'deep' / 'a.jpg'}: not written: " in caplog.text


def test_a_machine_that_ends(tmp_path, cluster):
    """Kill a node in the middle of the work: every shard is there once, and those that were done stay."""
    photos = {f"{index}.png": make_photo(tmp_path / "photo.png", index).read_bytes() for index in range(4)}
    for index in range(10):
        make_tar(tmp_path / "in" / f"{index}.tar", photos)
    task = SlowTask(FINDER)
    run(task, tmp_path / "in", tmp_path / "plain")
    cluster.notes.unlink()
    output, pool = tmp_path / "out", ThreadPoolExecutor()
    future = pool.submit(run, task, tmp_path / "in", output, engine="ray", actors=2)
    manifest = output / ".trace-fast.jsonl"
    while not future.done() and (not manifest.exists() or manifest.read_bytes().count(b"\n") < 3):
        time.sleep(0.01)
    done = [json.loads(line)["name"] for line in manifest.read_bytes().split(b"\n")[1:-1]]
    times = {name: (output / name).stat().st_mtime_ns for name in done}
    busy = int(cluster.notes.read_text().split()[-1])
    node = next(node for node in cluster.nodes if busy in [entry.process.pid for entry in node.all_processes["raylet"]])
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=2)
    outcome = future.result()
    assert (outcome.images, outcome.failures) == (40, 0)
    assert list_tree(output) == list_tree(tmp_path / "plain") and len(list_tree(output)) == 10
    assert {name: (output / name).stat().st_mtime_ns for name in done} == times and len(done) >= 2
    assert manifest.read_bytes() == (tmp_path / "plain" / ".trace-fast.jsonl").read_bytes()
