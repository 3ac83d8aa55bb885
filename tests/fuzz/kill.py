"""Kill runs of commands at random moments, run them again, and compare with runs that nothing interrupted.

`make kill POINTS=300` prints a table: runs that were killed, files that were half-written, files that a later run did
not have, and later runs whose files differ. Then disks are full or read-only, folders disappear, and two runs write to
one folder. `--job "edges of shards on ray"` does this with Ray, whose runs take 15 seconds; otherwise it is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

# before anything imports torch: a child has one thread
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.append(str(Path(__file__).parents[1]))

import numpy as np
from disks import mount
from inputs import check_shard
from PIL import Image
from safetensors import safe_open
from tables import print_table
from targets import make_small_network
from tqdm import tqdm

from trace_fast.cli import app
from trace_fast.io.claims import STAGE
from trace_fast.jobs.manifest import MANIFEST, read_line

MANY = 20  # shards for Ray, which takes longer to start than to compute
RAY = "edges of shards on ray"
COLUMNS = ("killed", "finished before", "half-written", "lost", "differs", "failed")
JOBS = {
    "edges": ["edges", "PHOTOS", "-o", "OUT", "--model", "MODEL", "--overlay", "--workers", "3"],
    "edges of the student": ["edges", "PHOTOS", "-o", "OUT", "--size", "32x48", "--overlay", "--workers", "3"],
    "edges of shards": ["edges", "SHARDS", "-o", "OUT", "--model", "MODEL", "--overlay", "--workers", "3"],
    RAY: [
        "edges",
        *("MANY", "-o", "OUT", "--model", "MODEL", "--overlay", "--engine", "ray", "--actors", "1"),
    ],
    "segment": ["segment", "PHOTOS", "-o", "OUT", "--model", "MODEL", "--overlay", "--workers", "3"],
    "segment of shards": ["segment", "SHARDS", "-o", "OUT", "--model", "MODEL", "--workers", "3"],
    "evaluate": ["evaluate", "--data", "DATA", "-o", "OUT", "--method", "sobel"],
    "scenes": ["scenes", "-o", "OUT", "--count", "6", "--size", "32"],
    "distill": [
        "distill",
        *("--images", "PHOTOS", "-o", "OUT", "--model", "MODEL", "--rank", "2", "--epochs", "2", "--batch", "2"),
        *("--shard", "3", "--save-minutes", "0", "--warmup", "2"),
    ],
    "pretrain": [
        "pretrain",
        *("PHOTOS", "-o", "OUT", "--images", "48", "--batch", "8", "--size", "16", "--large-size", "32"),
        *("--dim", "16", "--depth", "1", "--heads", "2", "--save-minutes", "0", "--warmup", "2"),
    ],
}  # fmt: skip


def make_inputs(folder: Path) -> dict[str, str]:
    """Make photos, a data set and a model, and return the words that name them."""
    random = np.random.default_rng(0)
    for name in ("photos", "shards", "many", "data/images", "data/inst", "model"):
        (folder / name).mkdir(parents=True)
    for index in range(9):
        small = Image.fromarray(random.integers(0, 256, (4, 6, 3), dtype=np.uint8))
        photo = small.resize((48 + index, 36), Image.Resampling.BICUBIC)
        photo.save(folder / "photos" / f"{index}.png")
        if index < 4:
            photo.save(folder / "data" / "images" / f"{index}.png")
            labels = np.kron(random.integers(0, 3, (4, 4)), np.ones((9, 12 + index), dtype=np.int64))
            picture = Image.fromarray(labels[:, : photo.width].astype(np.uint16))
            picture.save(folder / "data" / "inst" / f"{index}.png")
    write_shards(sorted((folder / "photos").iterdir()), folder / "shards")
    for index in range(MANY):
        with tarfile.open(folder / "many" / f"{index:02}.tar", "w") as archive:
            archive.add(folder / "photos", "")
    make_small_network(folder / "model")
    return {word: str(folder / word.lower()) for word in ("PHOTOS", "SHARDS", "MANY", "DATA", "MODEL")}


def write_shards(photos: list[Path], folder: Path) -> None:
    """Write photos to tar files and, where pyarrow is there, to parquet files, three to a file."""
    for start in range(0, len(photos), 3):
        part = photos[start : start + 3]
        with tarfile.open(folder / f"{start}.tar", "w") as archive:
            for photo in part:
                archive.add(photo, photo.name)
        with contextlib.suppress(ImportError):
            import pyarrow.parquet

            table = pyarrow.table({"key": [photo.name for photo in part], "bytes": [p.read_bytes() for p in part]})
            pyarrow.parquet.write_table(table, folder / f"{start}.parquet")


def start(job: str, paths: dict[str, str], output: Path, log: Path) -> int:
    """Start a command in a child, and return its process."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        words = [{**paths, "OUT": str(output)}.get(word, word) for word in JOBS[job]]
        sys.argv = ["trace-fast", *words]
        app(words)
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def warm_up(paths: dict[str, str], folder: Path) -> None:
    """Import what commands import when they run, so that no child has to: on one thread, a run leaves none behind."""
    # processes share the lock that tqdm makes by itself, so that a child killed while it holds it would stop all others
    tqdm.set_lock(threading.RLock())
    for job in ("edges", "edges of shards", "segment", "evaluate", "scenes"):
        with contextlib.suppress(SystemExit), open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            words = [{**paths, "OUT": str(folder / "warm-up")}.get(word, word) for word in JOBS[job]]
            app(words)
        shutil.rmtree(folder / "warm-up")
    for module in ("accelerate", "torch.distributed", "torch.utils.data"):
        importlib.import_module(module)


def wait(child: int) -> int:
    """Return the exit status of a child."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def list_files(folder: Path) -> dict[str, Path]:
    """Return the files of a run by name; claims and incomplete files are none."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in files.items() if not any(part[0] == "." for part in Path(name).parts)}


def digest(path: Path) -> str:
    """Return what a file holds; of the state of a run without the seconds that it took. A damaged file raises."""
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            metadata = dict(file.metadata() or {})
            progress = json.loads(metadata.pop("progress", "{}"))
            progress.pop("seconds", None)
            values = {name: file.get_tensor(name) for name in sorted(file.keys())}
        content = b"".join(name.encode() + value.tobytes() for name, value in values.items())
        content += json.dumps([progress, metadata], sort_keys=True).encode()
    elif path.suffix == ".npz":
        with np.load(path) as arrays:
            content = b"".join(name.encode() + arrays[name].tobytes() for name in sorted(arrays))
    else:
        content = path.read_bytes()
        if path.suffix in (".png", ".jpg"):
            with Image.open(path) as picture:
                picture.load()
        elif path.suffix == ".json":
            json.loads(content)
        elif path.suffix in (".tar", ".parquet"):
            check_shard(path)
        elif not content:
            raise ValueError("empty")
        if path.suffix == ".md":  # a model card says how many hours a training took
            content = re.sub(rb"- Machine: .*\n", b"", content)
    return hashlib.sha256(content).hexdigest()


def find_damaged(folder: Path) -> list[str]:
    """Return the names of files that cannot be read to their end."""
    damaged = []
    for name, path in list_files(folder).items():
        try:
            digest(path)
        except Exception as error:
            damaged.append(f"{name}: {type(error).__name__}: {error}")
    return damaged


class Job:
    """A command, what it writes, and how long it takes.

    Args:
        name: of the command.
        paths: of its inputs.
        folder: for its runs.
    """

    def __init__(self, name: str, paths: dict[str, str], folder: Path):
        self.name, self.paths, self.folder = name, paths, folder
        runs = []
        for number in range(2):
            started = time.monotonic()
            output = folder / f"{name}-{number}"
            status = self.run(output)
            assert status == 0, self.log.read_text()
            self.seconds = time.monotonic() - started
            runs.append({file: digest(path) for file, path in list_files(output).items()})
        # the time of the day and the duration are in some files: these must be there, and readable
        self.expected = {file: value if runs[1][file] == value else "" for file, value in runs[0].items()}

    @property
    def log(self) -> Path:
        """Return the text that the last run has printed."""
        return self.folder / f"{self.name}.log"

    def start(self, output: Path) -> int:
        """Start the command in a child, and return its process."""
        return start(self.name, self.paths, output, self.log)

    def run(self, output: Path) -> int:
        """Run the command, and return its exit status."""
        return wait(self.start(output))

    def compare(self, output: Path) -> tuple[list[str], list[str]]:
        """Return the names of files that are missing, and of those that differ or that nobody expects."""
        files = list_files(output)
        lost = [file for file in self.expected if file not in files]
        different = [file for file in files if file not in self.expected]
        for file, value in self.expected.items():
            if file in files and value not in ("", digest(files[file])):
                different.append(file)
        different += [path.name for path in output.glob(f"{STAGE}*")]
        return lost, different

    def wait_for_moment(self, output: Path, random: np.random.Generator) -> None:
        """Wait for a random time; half of the runs on Ray, until a random number of shards is done."""
        if self.name != RAY or random.random() < 0.5:
            time.sleep(self.seconds * 1.02 * random.random())
            return
        shards, end = random.integers(1, MANY), time.monotonic() + 2 * self.seconds
        while len(list_done(output)) < shards and time.monotonic() < end:
            time.sleep(0.01)


def list_done(folder: Path) -> list[Path]:
    """Return the shards of a folder that its manifest lists, and which later runs leave as they are."""
    manifest = folder / MANIFEST
    lines = manifest.read_bytes().split(b"\n")[1:-1] if manifest.exists() else []
    names = [record["name"] for line in lines if (record := read_line(line)) is not None]
    return [folder / name for name in names if name.endswith((".tar", ".parquet"))]


def kill_once(job: Job, random: np.random.Generator, counts: Counter[str]) -> list[str]:
    """Kill a run once or twice, check its files, run it again and compare; return what is wrong."""
    output, problems = job.folder / f"{job.name}-killed", []
    shutil.rmtree(output, ignore_errors=True)
    for _ in range(1 + int(random.random() < 0.3)):
        child = job.start(output)
        job.wait_for_moment(output, random)
        os.kill(child, signal.SIGKILL)
        counts["killed" if wait(child) == -signal.SIGKILL else "finished before"] += 1
        if job.name == RAY and random.random() < 0.5:  # its actors live on for a moment
            files = [*list_files(output)]
            time.sleep(2.5)
            problems += [f"written after the end: {name}" for name in list_files(output) if name not in files]
        if output.is_dir() and (damaged := find_damaged(output)):
            counts["half-written"] += 1
            problems += damaged
    times = {path: path.stat().st_mtime_ns for path in list_done(output)}
    if job.run(output):
        counts["failed"] += 1
        return [*problems, job.log.read_text()[-500:]]
    lost, different = job.compare(output)
    different += [path.name for path, modified in times.items() if path.stat().st_mtime_ns != modified]
    counts["lost"] += bool(lost)
    counts["differs"] += bool(different)
    return [*problems, *(f"lost {name}" for name in lost), *(f"differs: {name}" for name in different)]


def fill_disk(job: Job, random: np.random.Generator) -> list[str]:
    """Run on a disk that is too small, and again on a larger one."""
    size = sum(path.stat().st_size for path in list_files(job.folder / f"{job.name}-0").values()) >> 10
    with mount(max(16, int(size * random.random()) // 4 * 4)) as disk:
        status, text = job.run(disk / "out"), job.log.read_text()
        problems = describe_refusal(status, text, may_succeed=True)
        problems += find_damaged(disk) if disk.is_dir() else []
        subprocess.run(["mount", "-o", "remount,size=65536k", str(disk)], check=True)
        if job.run(disk / "out"):
            return [*problems, job.log.read_text()[-500:]]
        lost, different = job.compare(disk / "out")
        return problems + lost + different


def forbid_writing(job: Job, random: np.random.Generator) -> list[str]:
    """Run on a disk that becomes read-only."""
    with mount(65536) as disk:
        (disk / "out").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        return describe_refusal(job.run(disk / "out"), job.log.read_text(), may_succeed=False)


def remove_folder(job: Job, random: np.random.Generator) -> list[str]:
    """Remove the output folder while the run writes to it."""
    output = job.folder / f"{job.name}-removed"
    child = job.start(output)
    time.sleep(job.seconds * random.random())
    shutil.rmtree(output, ignore_errors=True)
    problems = describe_refusal(wait(child), job.log.read_text(), may_succeed=True)
    shutil.rmtree(output, ignore_errors=True)
    return problems


def write_twice(job: Job, random: np.random.Generator) -> list[str]:
    """Start a second run in the folder of the first; one of them, or both in turn, must give the usual result."""
    output = job.folder / f"{job.name}-twice"
    shutil.rmtree(output, ignore_errors=True)
    first = job.start(output)
    time.sleep(job.seconds * 0.5 * random.random())
    other = start(job.name, job.paths, output, job.folder / "other.log")
    statuses = wait(first), wait(other)
    text = job.log.read_text() + (job.folder / "other.log").read_text()
    problems = [] if 0 in statuses else [text[-500:]]
    if any(statuses) and "no other run writes to" not in text:
        problems.append(text[-500:])
    lost, different = job.compare(output)
    return problems + lost + different


def describe_refusal(status: int, text: str, may_succeed: bool) -> list[str]:
    """Return what is wrong with the end of a run that cannot write its files."""
    if "Traceback" in text or status not in (0, 1, 2) or (status and not text.strip()):
        return [f"exit status {status}: {text[-500:]}"]
    return [] if status or may_succeed else ["no error"]


FAULTS = {"disk full": fill_disk, "read-only": forbid_writing, "folder removed": remove_folder, "two runs": write_twice}


def main() -> int:
    """Run the command, and return its exit status: 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=300, help="runs to interrupt, over all commands")
    parser.add_argument("--minutes", type=float, default=60, help="time after which no further run begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--job", action="append", default=[], help="name of a command; repeat it for several")
    parser.add_argument("--no-disks", action="store_true", help="mount no disks, which needs the rights of root")
    options = parser.parse_args()
    random, end, problems = np.random.default_rng(options.seed), time.monotonic() + 60 * options.minutes, 0
    # children read no settings of this user, and no network; Ray does not look for a cluster on this machine
    os.environ |= {"HF_HUB_OFFLINE": "1", "RAY_ADDRESS": "local"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TRACE_FAST_CACHE"] = str(folder / "cache")
        paths = make_inputs(folder)
        warm_up(paths, folder)
        names = options.job or [job for job in JOBS if job != RAY]
        jobs = [Job(job, paths, folder) for job in names]
        print("  ".join(f"{job.name} {job.seconds:.1f} s" for job in jobs), flush=True)
        faults: dict[str, Counter[str]] = {fault: Counter() for fault in FAULTS}
        for fault, check in FAULTS.items():
            if options.no_disks and check in (fill_disk, forbid_writing):
                continue
            for job in jobs:
                wrong = check(job, random)
                faults[fault].update(tried=1, wrong=bool(wrong))
                problems += bool(wrong)
                for problem in wrong:
                    print(f"{job.name}: {fault}: {problem}", flush=True)
        print_table(("fault", "tried", "wrong"), [(name, row["tried"], row["wrong"]) for name, row in faults.items()])
        counts: dict[str, Counter[str]] = {job.name: Counter() for job in jobs}
        for point in range(options.points):
            if time.monotonic() > end:
                break
            job = jobs[point % len(jobs)]
            for problem in kill_once(job, random, counts[job.name]):
                problems += 1
                print(f"{job.name}: {problem}", flush=True)
            if point % 30 == 29:
                print_table(("command", *COLUMNS), [(n, *(row[c] for c in COLUMNS)) for n, row in counts.items()])
        rows = [(name, *(row[column] for column in COLUMNS)) for name, row in counts.items()]
        rows.append(("all", *(sum(row[column] for row in counts.values()) for column in COLUMNS)))
        print_table(("command", *COLUMNS), rows)
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
