"""Measure `trace-fast edges --overlay` with each engine beside a plain loop, and compare all their files.

`python scripts/engines.py PHOTOS` writes benchmarks/results/engines-cpu.json. CPU seconds and memory are those of all
processes that an engine starts; memory is the largest sum of their proportional set sizes (shared pages count once).
torch has its own number of threads, except where a name says one. A command that was stopped is continued by running it
again.

First the photographs; then pictures of 64 x 96 pixels that are cut from them, few and many, with a student that works
at this size: the cost of an image follows from them apart from the fixed cost.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from trace_fast.io.folders import is_picture

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "engines-cpu.json"
SMALL = (64, 96)  # height and width of the small pictures, and of what the student sees of them
TICKS = os.sysconf("SC_CLK_TCK")

REFERENCE, RAY, LOOPS = "threads", "Ray, 1 actor", ("plain loop", "plain loop, 1 thread")
MANY = (REFERENCE, *LOOPS, RAY)  # engines that see the small pictures
# the loop's overlays have other options of JPEG
WITHOUT_OVERLAYS = (*LOOPS, "datasets.map, no overlay", "pandas, no overlay")

LOOP = """
import sys
from pathlib import Path
import trace_fast
from trace_fast.io import visualize
from trace_fast.io.images import read_image
source, output, *size = sys.argv[1:]
model = trace_fast.load("mini", device="cpu", size=tuple(map(int, size)) or None)
Path(output).mkdir()
for path in sorted(Path(source).iterdir()):
    photo = read_image(path)
    edges = model.edges(photo)
    visualize.write_png(Path(output, path.stem + ".png"), edges)
    visualize.write_picture(Path(output, path.stem + "_overlay.jpg"), visualize.overlay(photo[0], edges[0, 0]))
"""
DATASETS = """
import sys
from pathlib import Path
import datasets
import pyarrow
import trace_fast
source, output, *size = sys.argv[1:]
datasets.disable_progress_bars()
paths = sorted(map(str, Path(source).iterdir()))
data = datasets.Dataset(pyarrow.table({"key": paths, "image": paths}), fingerprint="paths")
find_edges = trace_fast.BatchEdges("mini", "image", device="cpu", size=tuple(map(int, size)) or None)
for row in data.map(find_edges, batched=True, batch_size=32, remove_columns=["image"]):
    Path(output).mkdir(exist_ok=True)
    Path(output, Path(row["key"]).stem + ".png").write_bytes(row["edges"])
"""


PANDAS = """
import sys
from pathlib import Path
import pandas
import trace_fast
source, output, *size = sys.argv[1:]
paths = sorted(map(str, Path(source).iterdir()))
find_edges = trace_fast.BatchEdges("mini", "image", device="cpu", size=tuple(map(int, size)) or None)
Path(output).mkdir()
for start in range(0, len(paths), 32):
    frame = pandas.DataFrame({"key": paths[start : start + 32], "image": paths[start : start + 32]})
    for row in find_edges(frame).to_pandas().itertuples():
        Path(output, Path(row.key).stem + ".png").write_bytes(row.edges)
"""


def list_commands(source: Path, output: Path, size: tuple[int, int] | None) -> dict[str, list[str]]:
    """Return the command of each engine."""
    sides = [str(side) for side in size or ()]
    words = ["edges", str(source), "-o", str(output), "--overlay", "--device", "cpu"]
    words += ["--size", "x".join(sides)] if sides else []
    program = [sys.executable, "-m", "trace_fast", *words]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    loop = [sys.executable, "-c", LOOP, str(source), str(output), *sides]
    return {
        REFERENCE: program,
        "plain loop": loop,
        "plain loop, 1 thread": ["env", "OMP_NUM_THREADS=1", *loop],
        "threads, 1 worker": [*program, "--workers", "1"],
        "threads, 3 workers": [*program, "--workers", "3"],
        "torchrun, 2 processes": [*torchrun, "-m", "trace_fast", *words],
        RAY: [*program, "--engine", "ray"],
        "datasets.map, no overlay": [sys.executable, "-c", DATASETS, str(source), str(output), *sides],
        "pandas, no overlay": [sys.executable, "-c", PANDAS, str(source), str(output), *sides],
    }


class Processes:
    """The processes that this one has started, theirs included, and what they use."""

    def __init__(self) -> None:
        # CPU seconds of each process, by its number and when it began
        self.times: dict[tuple[int, str], float] = {}
        self.peak = 0
        self.looked = 0.0

    def look(self) -> list[int]:
        """Return the numbers of the processes that run; note their times, and every two seconds their memory."""
        parents, own, memory = {}, {os.getpid()}, 0
        for path in Path("/proc").glob("[0-9]*"):
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            parents[int(path.name)] = fields
        while more := {pid for pid, fields in parents.items() if int(fields[1]) in own and pid not in own}:
            own |= more
        own.remove(os.getpid())
        for pid in own:
            fields = parents[pid]
            self.times[pid, fields[19]] = (int(fields[11]) + int(fields[12])) / TICKS
        if time.monotonic() - self.looked > 2:
            self.looked = time.monotonic()
            for pid in own:
                with contextlib.suppress(OSError):
                    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                    memory += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            self.peak = max(self.peak, memory)
        return [pid for pid in own if parents[pid][0] != "Z"]


def measure(command: list[str], output: Path) -> dict[str, float]:
    """Run a command, and return its seconds, CPU seconds, seconds to the first file, and MiB."""
    shutil.rmtree(output, ignore_errors=True)
    processes, first = Processes(), 0.0
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as cache:
        settings = {"PYTHONPATH": os.pathsep.join(sys.path[1:]), "HF_HOME": cache}
        started = time.monotonic()
        process = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            processes.look()
            if not first and output.is_dir() and any(path.name[0] != "." for path in output.iterdir()):
                first = time.monotonic() - started
            time.sleep(0.2)
        seconds = time.monotonic() - started
        if process.returncode:
            log.seek(0)
            raise RuntimeError(log.read().decode()[-2000:])
        # daemons of Ray, whose parent has become this process
        for _ in range(100):
            if not (left := processes.look()):
                break
            time.sleep(0.1)
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    return {"seconds": seconds, "cpu": sum(processes.times.values()), "first": first, "memory": processes.peak / 1024}


def count_different(engine: str, output: Path, expected: Path) -> int:
    """Return the number of files that are missing, or differ from those that are expected."""
    names = {path.name for path in expected.iterdir() if path.name[0] != "."}
    if engine in WITHOUT_OVERLAYS:
        names = {name for name in names if name.endswith(".png")}
    written = {name for name in names if (output / name).is_file()}
    return len(names - written) + sum(
        (output / name).read_bytes() != (expected / name).read_bytes() for name in written
    )


def cut_pictures(photos: list[Path], folder: Path, count: int) -> Path:
    """Cut small pictures from photographs in turn, unless they are there, and return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if len(list(folder.iterdir())) == count:
        return folder
    height, width = SMALL
    share = -(-count // len(photos))
    for number, path in enumerate(photos):
        with Image.open(path) as picture:
            pixels = picture.convert("RGB")
        for index in range(number * share, min(count, (number + 1) * share)):
            random = np.random.default_rng(index)
            left, top = random.integers(0, pixels.width - width + 1), random.integers(0, pixels.height - height + 1)
            pixels.crop((left, top, left + width, top + height)).save(folder / f"{index:06}.jpg", quality=90)
    return folder


def read_commit() -> str:
    """Return the commit of the working tree."""
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()


def describe_machine() -> str:
    """Return the processor, and the versions of what is measured."""
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    packages = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "ray", "datasets", "pyarrow")]
    return ", ".join([model.partition(": ")[2], f"{os.cpu_count()} cores", *packages])


def main() -> None:
    """Measure what the file of results does not have."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path, help="folder of photographs")
    parser.add_argument(
        "--only", action="append", help="inputs to measure, such as 'photographs'; repeat it for several"
    )
    parser.add_argument("--engine", action="append", help="engines to measure; repeat it for several")
    parser.add_argument("--runs", type=int, default=1, help="of each engine, in turn with the others")
    parser.add_argument("--small", type=int, nargs=2, default=(333, 10_000), help="numbers of small pictures")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "engines", help="for pictures and results")
    options = parser.parse_args()
    # orphans of its children become its own children
    ctypes.CDLL(None).prctl(36, 1)
    photos = sorted(path for path in options.photos.iterdir() if is_picture(path.name))
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"runs": []}
    folders: dict[str, tuple[Path, tuple[int, int] | None]] = {
        "photographs": (options.photos, None),
    }
    for count in options.small:
        folders[f"{count} small"] = cut_pictures(photos, options.folder / f"small-{count}", count), SMALL
    for name, number in itertools.product(options.only or folders, range(options.runs)):
        source, size = folders[name]
        expected, output = options.folder / f"expected-{name.replace(' ', '-')}", options.folder / "out"
        commands = list_commands(source, output, size)
        for engine in options.engine or (commands if source == options.photos else MANY):
            done = sum((run["inputs"], run["engine"]) == (name, engine) for run in results["runs"])
            if done > number and expected.is_dir():
                continue
            figures = measure(commands[engine], output)
            if engine == REFERENCE:
                shutil.rmtree(expected, ignore_errors=True)
                shutil.copytree(output, expected)
            images = len(list(source.iterdir()))
            run = {"inputs": name, "engine": engine, "images": images, "commit": read_commit(), **figures}
            run["different"] = count_different(engine, output, expected)
            results["machine"] = describe_machine()
            results["runs"].append(run)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(run, flush=True)


if __name__ == "__main__":
    main()
