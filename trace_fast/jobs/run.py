"""Running a job: the results of inputs are written, and what is done is recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trace_fast.io.claims import remove_parts
from trace_fast.io.files import write_atomically
from trace_fast.jobs.errors import FAILURES, describe
from trace_fast.jobs.inputs import InputFile, name_file, name_results, read_stamp
from trace_fast.jobs.manifest import Manifest, open_manifest
from trace_fast.jobs.parts import ALONE, Part
from trace_fast.jobs.pipeline import compute_results
from trace_fast.jobs.shards import list_images, open_shard_writer
from trace_fast.jobs.tasks import Result, Task
from trace_fast.progress import LOGGER, Progress

__all__ = ["Job", "Outcome", "Recorder", "Targets", "plan_targets", "run_job"]

# names of the files of the results of each input, by their kind
Targets = dict[InputFile, dict[str, str]]


@dataclass
class Outcome:
    """The counts and results of the inputs of a job.

    Attributes:
        images: those that were looked at, in this run or an earlier one.
        earlier: those of them that an earlier run has done.
        failures: those without a result.
        names: of all pictures, in order.
        results: the result of each picture, without its files, by its name, where the task keeps them.
        left_out: members of tar files that are no pictures, see `trace_fast.io.archives.list_pictures`.
    """

    names: list[str] = field(default_factory=list)
    images: int = 0
    earlier: int = 0
    failures: int = 0
    results: dict[str, Result] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


def run_job(
    task: Task,
    targets: Targets,
    output: Path,
    *,
    workers: int | None = None,
    part: Part = ALONE,
    overwrite: bool = False,
    engine: str = "threads",
    actors: int | None = None,
) -> Outcome:
    """Write the results of all inputs that are not done: files for a picture, and a shard for each shard.

    A run that ends early, even by force, is continued by running it again: what an input gave is complete or not there.
    Failures of images are logged, and the others are done all the same.

    Args:
        task: what to compute.
        targets: of pictures and shards, see `plan_targets`.
        output: the folder to write to; it exists.
        workers: see `trace_fast.jobs.pipeline.compute_results`.
        part: of the inputs, which this process works on.
        overwrite: do everything again, and replace files of other origin.
        engine: "threads" of this process, or actors of "ray".
        actors: processes of Ray; None is the CPUs of its cluster but two.

    Raises:
        ValueError: the folder holds results of other settings.
        RuntimeError: another run writes to the folder.
        OSError: the folder cannot be written to, or the disk is full.
    """
    files = [name for paths in targets.values() for name in paths.values()]
    with open_manifest(output, task.settings, task.op, files, part, overwrite) as manifest:
        job = Job(task, output, workers, manifest)
        job.outcome.names = [name_result(paths) for file, paths in targets.items() if not file.is_shard]
        own = dict(list(targets.items())[part.share])
        missing = {file: paths for file, paths in own.items() if not job.is_done(file, paths)}
        shards = sum(file.is_shard for file in missing)
        hidden = len(missing) < 2 and not shards
        with Progress("", "image", None if shards else len(missing), hidden=hidden) as job.progress:
            if engine == "ray" and missing:
                from trace_fast.jobs.ray_engine import run_in_actors

                run_in_actors(job, missing, actors)
            else:
                job.write(missing)
    return job.outcome


def plan_targets(task: Task, files: list[InputFile], output: Path) -> Targets:
    """Return the names of the files of each input in the output folder, by kind; none may replace another, or an input.

    Raises:
        ValueError: one would.
    """
    pictures = [file for file in files if not file.is_shard]
    results = name_results([file.name for file in pictures], task.file_kinds)
    targets = {
        file: {kind: name_file(result, kind) for kind in task.file_kinds}
        for file, result in zip(pictures, results, strict=True)
    }
    targets |= {file: {"": file.name} for file in files if file.is_shard}
    # some file systems do not distinguish upper case from lower
    resolved: dict[Path, str] = {}

    def locate(path: Path) -> str:
        if path.parent not in resolved:
            resolved[path.parent] = str(path.parent.resolve())
        return f"{resolved[path.parent]}/{path.name}".casefold()

    results_of = {file: name_result(names) for file, names in targets.items() if not file.is_shard}
    inputs = [file.path for file in files]
    inputs += [path for result in results_of.values() for path in task.list_companions(result)]
    sources = {locate(path): path for path in inputs}
    writers: dict[str, Path] = {}
    for file, names in targets.items():
        paths = [output / name for name in names.values()]
        for path in [*paths, *(task.list_additions(results_of[file]) if file in results_of else [])]:
            location = locate(path)
            if location in sources:
                raise ValueError(
                    f"'{path}' would replace the input '{sources[location]}': "
                    f"choose another folder with {'--output' if path in paths else '--save-edges'}"
                )
            if location in writers:
                raise ValueError(
                    f"'{writers[location]}' and '{file.path}' would both be written to '{path}': "
                    "rename one, or give each its own --output"
                )
            writers[location] = file.path
    return targets


class Recorder:
    """The lines that a job in another process adds to the manifest, kept for the process that writes it."""

    def __init__(self) -> None:
        self.records: list[tuple[str, list[int], dict[str, Any]]] = []

    def add(self, name: str, stamp: list[int], **content: Any) -> None:
        """Keep a record; see `Manifest.add`."""
        self.records.append((name, stamp, content))


class Job:
    """A run of a job; see `run_job`.

    Args:
        task: what to compute.
        output: the folder to write to.
        workers: see `trace_fast.jobs.pipeline.compute_results`.
        manifest: where what is done is recorded.
        warn: called with a line for each failure; None logs it.
    """

    def __init__(
        self,
        task: Task,
        output: Path,
        workers: int | None,
        manifest: Manifest | Recorder,
        warn: Callable[[str], None] | None = None,
    ):
        self.task, self.output, self.workers, self.manifest = task, output, workers, manifest
        self.warn = LOGGER.error if warn is None else warn
        self.outcome = Outcome()
        self.progress = Progress("", "image", hidden=True)

    def write(self, targets: Targets) -> None:
        """Write the results of inputs."""
        shards = {file: names[""] for file, names in targets.items() if file.is_shard}
        self.write_pictures({file: names for file, names in targets.items() if not file.is_shard})
        for number, (shard, target) in enumerate(shards.items(), 1):
            self.progress.set_title(f"shard {number} of {len(shards)}")
            self.write_shard(shard, target)

    def merge(self, recorder: Recorder, outcome: Outcome, warnings: list[str]) -> None:
        """Record what a job in another process has done."""
        for line in warnings:
            self.warn(line)
        for name, stamp, content in recorder.records:
            self.manifest.add(name, stamp, **content)
        self.outcome.images += outcome.images
        self.outcome.failures += outcome.failures
        self.outcome.results |= outcome.results
        self.outcome.left_out += outcome.left_out
        self.progress.update(outcome.images)

    def read_stamp(self, file: InputFile, targets: dict[str, str]) -> list[int]:
        """Return what a later run compares: the state of an input, and of the other files that the task reads."""
        others = [] if file.is_shard else self.task.list_companions(name_result(targets))
        return read_stamp([file.path, *others])

    def is_done(self, file: InputFile, targets: dict[str, str]) -> bool:
        """Return whether an earlier run has done an input, and count its images if so."""
        assert isinstance(self.manifest, Manifest)
        record = self.manifest.find(file.name, self.read_stamp(file, targets), targets.values())
        if record is None:
            return False
        self.outcome.images += record["images"]
        self.outcome.earlier += record["images"]
        self.outcome.failures += record["failures"]
        if "result" in record:
            result = Result(**record["result"])
            self.outcome.results[result.name] = result
        return True

    def write_pictures(self, targets: Targets) -> None:
        """Write the files of each picture, given their names by kind."""
        for folder in {(self.output / name).parent for names in targets.values() for name in names.values()}:
            folder.mkdir(parents=True, exist_ok=True)
            remove_parts(folder)
        files = {name_result(names): file for file, names in targets.items()}
        stamps: dict[str, list[int]] = {}

        def list_files() -> Iterator[tuple[str, Path]]:
            for name, file in files.items():
                stamps[name] = self.read_stamp(file, targets[file])
                yield name, file.path

        def write(result: Result) -> None:
            for kind, content in result.files.items():
                with write_atomically(self.output / targets[files[result.name]][kind], self.task.op) as opened:
                    opened.write(content)

        for result in compute_results(self.task, list_files(), self.workers, write):
            file, stamp = files[result.name], stamps.pop(result.name)
            self.count(result, file.path)
            if result.error is not None:
                continue
            content = {}
            if self.task.keeps_results:
                self.outcome.results[result.name] = replace(result, files={})
                content = {"result": asdict(self.outcome.results[result.name])}
            self.manifest.add(file.name, stamp, images=1, failures=0, **content)

    def write_shard(self, shard: InputFile, target: str) -> None:
        """Write the shard of results of a shard, whole; one that cannot be read, or written, is a failure."""
        path = self.output / target
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_parts(path.parent)
        stamp, images, failures = self.read_stamp(shard, {}), 0, 0
        try:
            with (
                write_atomically(path, self.task.op) as file,
                open_shard_writer(self.task, path.suffix.lower(), file) as writer,
            ):
                source = list_images(self.task, shard.path, self.outcome.left_out)
                for result in compute_results(self.task, source, self.workers, raise_memory=True):
                    writer.add(result)
                    images += 1
                    failures += result.error is not None
                    self.count(result, f"{shard.path}/{result.name}")
        except FAILURES as error:
            # those of its images that were counted are not written, either
            self.outcome.images += not images
            self.outcome.failures += max(1, images) - failures
            self.warn(f"{shard.path}: not written: {describe(error)}")
            return
        self.manifest.add(shard.name, stamp, images=images, failures=failures)

    def count(self, result: Result, source: Path | str) -> None:
        """Count an image, and report its failure."""
        self.outcome.images += 1
        if result.error is not None:
            self.outcome.failures += 1
            self.progress.set_postfix(failed=self.outcome.failures)
            self.warn(f"{source}: {result.error}")
        self.progress.update()


def name_result(targets: dict[str, str]) -> str:
    """Return the name of the results of an image, given those of its files by kind; see `name_file`."""
    kind, name = next(iter(targets.items()))
    return name[: -len(kind) - 1]
