"""The engine Ray: actors of Ray Data take shards, each row of its data set being a shard or a few pictures."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from trace_fast.extras import require
from trace_fast.io.claims import make_stage
from trace_fast.jobs.errors import FAILURES, describe
from trace_fast.jobs.manifest import Manifest
from trace_fast.jobs.memory import keep_memory
from trace_fast.jobs.run import Job, Outcome, Recorder, Targets
from trace_fast.training.state import list_differences

__all__ = ["run_in_actors"]

PICTURES = 32  # of a row, which an actor writes before it reports
STARTS = 3  # of a row: Ray starts one whose process ends again without an end
RESERVED = 2  # CPUs for Ray itself: where actors take all, it waits without an end


def run_in_actors(job: Job, missing: Targets, actors: int | None) -> None:
    """Write the results of inputs in actors, and record what is done as they report it.

    A row whose process ends is given to another one twice; then its inputs are failures. All others are done.

    Actors may live longer than this process, if it is killed. They write to a folder of this run, from which files are
    moved here.

    Args:
        job: whose outcome and manifest are kept here.
        missing: inputs, and the names of the files of their results.
        actors: processes that run at a time; None is the CPUs of the cluster but two.

    Raises:
        ValueError: there are too many actors.
        RuntimeError: Ray is not installed, does not start, or ends too early; or a machine has another model.
        OSError: the folder of results cannot be written to.
    """
    assert isinstance(job.manifest, Manifest)
    op, files = job.task.op, {file.name: names.values() for file, names in missing.items()}
    require(op, "ray")
    import ray
    import ray.data
    import ray.exceptions

    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # each part of Ray fails in its own way
        raise RuntimeError(
            f"{op}: Ray must start, got {error}; where a machine is busy, its agent needs longer than Ray waits: try "
            "again when it is not"
        ) from error
    try:
        most = max(1, int(ray.cluster_resources().get("CPU", 1)) - RESERVED)
        if actors is not None and actors > most:
            raise ValueError(
                f"{op}: actors must be at most {most}, got {actors}: {RESERVED} of the CPUs of the cluster are for "
                "Ray, which waits without an end where none is left"
            )
        rows = list_rows(missing)
        ray.data.DataContext.get_current().enable_progress_bars = False
        # it writes a traceback for each process that ends
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        stage = make_stage(job.output.absolute(), job.manifest.part.index)
        task, settings = copy.copy(job.task), job.task.settings
        del vars(task)["settings"]  # actors compute theirs
        arguments = pickle.dumps((task, settings, stage, job.workers, os.getcwd()))
        # it may be on a machine that ends; counts begin again then
        starts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Starts).remote()
        reports = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            Actor,
            fn_constructor_args=(arguments, starts),
            compute=ray.data.ActorPoolStrategy(size=min(actors or most, len(rows)), max_tasks_in_flight_per_actor=1),
            num_cpus=1,
            num_gpus=int(job.task.settings.get("device") == "cuda"),
        )
        for report in reports.iter_rows():
            recorder, outcome, lines = pickle.loads(report["result"])
            for name, _, _ in recorder.records:
                move_files(files[name], stage, job.output)
            job.merge(recorder, outcome, lines)
    except ray.exceptions.RayError as error:  # its last line has the reason
        reason = str(error).strip().splitlines()[-1]
        raise RuntimeError(f"{op}: actors of Ray must run to the end of the job, got {reason}") from error
    finally:
        ray.shutdown()


def move_files(names: Iterable[str], stage: Path, output: Path) -> None:
    """Move files into a folder of the same disk; each replaces the one of its name, and has its permissions."""
    for name in names:
        path = output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(path, stage / name)
        os.replace(stage / name, path)


def list_rows(missing: Targets) -> list[dict[str, Any]]:
    """Return the rows of a data set: a shard each, or a few pictures. Actors may have another working folder."""
    absolute = [(replace(file, path=file.path.absolute()), names) for file, names in missing.items()]
    pictures = [(file, names) for file, names in absolute if not file.is_shard]
    inputs = [dict(pictures[start : start + PICTURES]) for start in range(0, len(pictures), PICTURES)]
    inputs += [{file: names} for file, names in absolute if file.is_shard]
    return [{"index": index, "inputs": pickle.dumps(part)} for index, part in enumerate(inputs)]


class Starts:
    """Counts how often each row was begun, in another process than those that may end."""

    def __init__(self) -> None:
        self.counts = Counter[int]()

    def add(self, index: int) -> int:
        """Return the number of times that a row was begun, this one included."""
        self.counts[index] += 1
        return self.counts[index]


class Actor:
    """Writes the results of rows, in a process of Ray.

    Args:
        arguments: task, settings, folder to write to, number of threads and working folder, pickled.
        starts: an actor of `Starts`.
    """

    def __init__(self, arguments: bytes, starts: Any):
        self.task, settings, self.output, self.workers, working_folder = pickle.loads(arguments)
        self.starts = starts
        keep_memory()
        # on a machine without it, all paths must be absolute
        with contextlib.suppress(OSError):
            os.chdir(working_folder)
        if self.task.settings != settings:
            raise RuntimeError(
                f"{self.task.op}: actors must have the model of the command, got "
                f"{list_differences(self.task.settings, settings)}"
            )

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return what `Job.merge` takes."""
        import ray

        recorder, lines, inputs = Recorder(), list[str](), pickle.loads(row["inputs"])
        job = Job(self.task, self.output, self.workers, recorder, lines.append)
        try:
            if ray.get(self.starts.add.remote(row["index"])) > STARTS:
                raise RuntimeError(f"the process ended {STARTS} times")
            job.write(inputs)
        except FAILURES as error:
            # what was written is written again by the next run
            recorder, job.outcome = Recorder(), Outcome(images=len(inputs), failures=len(inputs))
            names = " and ".join(str(file.path) for file in [*inputs][:: max(1, len(inputs) - 1)])
            text = f"{len(inputs)} pictures from {names}" if len(inputs) > 1 else names
            job.warn(f"{text}: not written: {describe(error)}")
        return {"result": pickle.dumps((recorder, job.outcome, lines))}
