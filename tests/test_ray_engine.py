"""`--engine ray`: the same files as without it, what is refused, and processes and machines that end."""

from __future__ import annotations

import json
import re
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from disks import mount
from exiting import EndingTask, SlowTask
from test_jobs import list_tree, make_photo, make_tar
from typer.testing import CliRunner

from trace_fast.cli import app
from trace_fast.jobs.finder import EdgeFinder
from trace_fast.jobs.inputs import list_inputs
from trace_fast.jobs.manifest import MANIFEST
from trace_fast.jobs.ray_engine import move_files
from trace_fast.jobs.run import plan_targets, run_job
from trace_fast.jobs.tasks import EdgesTask

ray = pytest.importorskip("ray", reason="needs ray: pip install 'trace_fast[ray]'")
pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'trace_fast[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # those of Ray, which starts processes
SIZE = ("--size", "16x24", "--device", "cpu")
FINDER = EdgeFinder(device="cpu", size=(16, 24))
# a shell that runs the tests in the background has them ignore Ctrl-C
DRIVER = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
import exiting
from trace_fast.cli import main
from trace_fast.jobs import tasks
tasks.EdgesTask = exiting.SlowTask
main()
"""


def set_environment(patch, notes):
    """Let nodes of Ray that are started from here, and their actors, import the tests."""
    patch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{':'.join(sys.path)}")
    patch.setenv("TRACE_FAST_NOTES", str(notes))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Start Ray on three nodes, one of them without actors."""
    from ray.cluster_utils import Cluster

    notes = tmp_path_factory.mktemp("notes") / "notes"
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, notes)
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
    return CliRunner().invoke(app, ["edges", "in", "-o", str(output), *SIZE, *map(str, options)])


def run(task, inputs, output, **options):
    output.mkdir(exist_ok=True)
    return run_job(task, plan_targets(task, list_inputs("edges", [inputs]).files, output), output, **options)


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Make ten tar files of four photos, and a folder "plain" of what a run without Ray makes of them."""
    monkeypatch.chdir(tmp_path)
    photos = {f"{index}.png": make_photo(tmp_path / "photo.png", index).read_bytes() for index in range(4)}
    for index in range(10):
        make_tar(tmp_path / "in" / f"{index}.tar", photos)
    run(EdgesTask(FINDER), tmp_path / "in", tmp_path / "plain")
    return tmp_path / "in"


@pytest.fixture
def driver(tmp_path, shards, monkeypatch):
    """Start a command that takes a moment for each photo, on this machine, and wait for lines of its manifest."""
    set_environment(monkeypatch, tmp_path / "notes")
    # not the cluster of other tests, which Ray finds on this machine
    monkeypatch.setenv("RAY_ADDRESS", "local")
    manifest, processes = tmp_path / "out" / MANIFEST, []

    def start(lines):
        words = ["edges", "in", "-o", "out", *SIZE, "--engine", "ray", "--actors", "1"]
        process = subprocess.Popen([sys.executable, "-c", DRIVER, *words], stderr=subprocess.DEVNULL)
        processes.append(process)
        while process.poll() is None and not (manifest.exists() and manifest.read_bytes().count(b"\n") >= lines):
            time.sleep(0.01)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def list_everything(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*"))


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


@pytest.mark.usefixtures("cluster", "inputs")
def test_relative_paths_are_those_of_the_command():
    words = ["segment", "in/01.jpg", "in/02.jpg", "-o", "out", "--save-edges", "edges", *SIZE, "--engine", "ray"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    assert [*list_tree("edges")] == ["01.png", "02.png"]


@pytest.mark.usefixtures("cluster", "inputs")
def test_another_model_on_a_machine_is_refused(monkeypatch):
    describe = EdgeFinder.describe
    # of this process alone
    monkeypatch.setattr(EdgeFinder, "describe", lambda finder: {**describe(finder), "weights": "0"})
    result = call("out", "--engine", "ray", "--actors", 1)
    assert result.exit_code == 2
    assert re.search("actors must have the model of the command, got weights [0-9a-f]{64} instead of 0$", result.stderr)
    assert "Traceback" not in result.stderr and not list_everything("out")


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


@pytest.mark.usefixtures("cluster")
def test_a_folder_that_cannot_be_written_to(inputs, tmp_path):
    make_photo(inputs / "deep" / "a.jpg")
    files = list_inputs("edges", [inputs], recursive=True).files
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "deep").touch()  # in the place of a folder
    targets, task = plan_targets(EdgesTask(FINDER), files[-1:], tmp_path / "out"), EdgesTask(FINDER)
    for engine in ("threads", "ray"):
        with pytest.raises(FileExistsError, match="deep"):
            run_job(task, targets, tmp_path / "out", engine=engine)
    assert list_everything("out") == ["deep"]


@pytest.mark.usefixtures("cluster", "shards")
def test_a_disk_that_is_full():
    """Let some shards fail by name; the same command does them when there is room."""
    with ExitStack() as stack:
        try:
            disk = stack.enter_context(mount(64))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs the right to mount: {error}")
        output = disk / "out"
        result = call(output, "--engine", "ray")
        done = [*list_tree(output)]
        # images of a shard that fails are counted as far as they were read
        assert re.fullmatch(rf"{4 * len(done)} of \d\d written to {output}\n", result.stdout) and done
        assert result.exit_code == 1
        for shard in {path.name for path in Path("in").iterdir()}.difference(done):
            reason = rf"{shard}: not written: \[Errno 28\] edges: the disk must have room for {shard}"
            assert re.search(reason, result.stderr)
        assert list_everything(output) == [MANIFEST, *done]
        subprocess.run(["mount", "-o", "remount,size=1024k", str(disk)], check=True)
        result = call(output, "--engine", "ray")
        assert result.stdout == f"40 of 40 written to {output}, {4 * len(done)} of them by an earlier run\n"
        assert list_everything(output) == list_everything("plain") and list_tree(output) == list_tree("plain")


def test_files_that_are_moved_keep_permissions(tmp_path):
    for folder in (tmp_path / "stage", tmp_path / "out"):
        folder.mkdir()
        (folder / "a.png").write_text(folder.name)
    (tmp_path / "out" / "a.png").chmod(0o600)
    move_files(["a.png"], tmp_path / "stage", tmp_path / "out")
    assert (tmp_path / "out" / "a.png").read_text() == "stage"
    assert stat.S_IMODE((tmp_path / "out" / "a.png").stat().st_mode) == 0o600


def test_a_machine_that_ends(shards, tmp_path, cluster):
    """Kill a node in the middle of the work: every shard is there once, and those that were done stay."""
    cluster.notes.unlink(missing_ok=True)
    output, pool = tmp_path / "out", ThreadPoolExecutor()
    future = pool.submit(run, SlowTask(FINDER), shards, output, engine="ray", actors=2)
    manifest = output / MANIFEST
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


def test_a_command_that_is_killed(tmp_path, driver):
    """Kill it in the middle of the work: every shard is there once, and those that were done stay."""
    process = driver(4)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    shards = {*Path("out").glob("*.tar")}
    time.sleep(1.5)  # an actor lives on for a moment, and writes
    assert {*Path("out").glob("*.tar")} == shards
    done = {json.loads(line)["name"] for line in Path("out", MANIFEST).read_bytes().split(b"\n")[1:-1]}
    times = {name: Path("out", name).stat().st_mtime_ns for name in done}
    result = call("out", "--engine", "ray", "--actors", 1)
    assert result.stdout == f"40 of 40 written to out, {4 * len(done)} of them by an earlier run\n"
    assert {name: Path("out", name).stat().st_mtime_ns for name in done} == times and len(done) >= 3
    assert list_everything("out") == list_everything("plain") and list_tree("out") == list_tree("plain")
    assert Path("out", MANIFEST).read_bytes() == Path("plain", MANIFEST).read_bytes()


def test_ctrl_c(driver):
    """Press it in the middle: the command ends soon, and all its files are complete."""
    process = driver(3)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and time.monotonic() - started < 10
    files = list_tree("out")
    assert files.items() < list_tree("plain").items() and len(files) >= 2
    assert list_everything("out") == [MANIFEST, *files]
