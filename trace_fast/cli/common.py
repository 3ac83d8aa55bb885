"""Pieces that several commands share: options, refusals, the choice of a model, and jobs over images."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from trace_fast.io.folders import IMAGE_SUFFIXES
from trace_fast.io.pictures import MAX_PIXELS
from trace_fast.jobs.errors import FAILURES, describe, escape_controls
from trace_fast.progress import LOGGER

if TYPE_CHECKING:
    from trace_fast.jobs.finder import EdgeFinder
    from trace_fast.jobs.inputs import InputFile
    from trace_fast.jobs.run import Outcome
    from trace_fast.jobs.tasks import Task

__all__ = [
    "Actors",
    "Device",
    "Dtype",
    "Engine",
    "Inputs",
    "MaxSide",
    "Model",
    "Noising",
    "Offload",
    "Output",
    "OutputFolder",
    "OverlayFormat",
    "Overwrite",
    "PartOption",
    "Recursive",
    "Seed",
    "Size",
    "Stage",
    "Timestep",
    "Workers",
    "choose_finder",
    "list_files",
    "open_folder",
    "parse_size",
    "parse_timestep",
    "refuse",
    "refuse_failures",
    "run",
]

Inputs = Annotated[
    list[Path],
    typer.Argument(
        metavar="IN",
        help="Image files, shards (tar files of webdataset, parquet files), folders of these, patterns in quotes such "
        "as `'photos/*/*.jpg'`, and lists: files ending in .txt with one of these in each line.",
    ),
]
OutputFolder = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write to. It is created where it is missing.")
]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR|FILE.png",
        help="Folder to write to, which is created where it is missing; or, for one image, the file.",
    ),
]


def complete_model(start: str) -> list[str]:
    """Return the names of models that begin with a text, for the shell."""
    from trace_fast.backbones import models

    return [name for name in models() if name.startswith(start)]


Model = Annotated[
    str,
    typer.Option(
        help="Name that `trace-fast models` shows, repository of the hub (owner/name), or local folder.",
        autocompletion=complete_model,
    ),
]
Stage = Annotated[
    Literal["1", "2"] | None,
    typer.Option(help="1 for the search, 2 for the one-step student. The default is the student where there is one."),
]
Timestep = Annotated[
    str | None,
    typer.Option(
        metavar="iep|INT",
        help="Timestep that the search reads, 0 to 999, or iep to find it. The default is the model's own.",
    ),
]
Noising = Annotated[
    Literal["inversion", "gaussian"] | None,
    typer.Option(help="The way in which the search adds noise to an image. The default is the model's own."),
]
Device = Annotated[
    str | None,
    typer.Option(help="Device to run on, such as cuda:1. The default is the GPU where there is one, else the CPU."),
]
Size = Annotated[
    str | None,
    typer.Option(metavar="HxW", help="Processing size in pixels, such as 512x768. The default is the model's own."),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(
        help="Data type of the weights. The default is bfloat16 on a GPU (float16 before compute capability 8.0), and "
        "float32 on the CPU and for mini."
    ),
]
Offload = Annotated[
    Literal["model", "sequential"] | None,
    typer.Option(
        help="Keep the weights in main memory, for a small GPU, and move them to the GPU model by model, or layer by "
        "layer (sequential)."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the Gaussian noise.")]
Recursive = Annotated[
    bool, typer.Option("--recursive", help="Read the subfolders of folders, too; results keep their names.")
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Threads. With the embedded student, or another small one, on a CPU each works on an image from reading "
        "to writing; the default is the number of threads of torch. Otherwise they read images and write results while "
        "the network works; the default is the number of processor cores, at most 4.",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        min=1,
        help="Images that a student sees in one pass, for a GPU. Edges differ by a level in a few pixels from those of "
        "another number.",
    ),
]
PartOption = Annotated[
    str | None,
    typer.Option(
        "--part",
        metavar="I/N",
        help="Do the part I, from 0, of N parts of the inputs, each of another process. The default is what torchrun, "
        "accelerate launch or srun say.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Do everything again, and replace results of another model, of other options or of another origin. "
        "Without it, what an earlier run has done is skipped.",
    ),
]
Engine = Annotated[
    Literal["threads", "ray"],
    typer.Option(
        help="The engine of the job: threads of this process, or actors of Ray, on this machine or on the cluster that "
        "RAY_ADDRESS names, whose machines must have the files."
    ),
]
Actors = Annotated[
    int | None,
    typer.Option(min=1, help="Processes of Ray. The default is the CPUs of the cluster but two, which Ray needs."),
]
MaxSide = Annotated[
    int | None,
    typer.Option(
        min=16,
        help="Reduce images whose longer side has more pixels to this number, before anything else. JPEG files are "
        "decoded at a reduced scale, which is several times as fast.",
    ),
]
OverlayFormat = Annotated[Literal["jpg", "png", "webp"], typer.Option(help="Format of the pictures of --overlay.")]


def refuse(reason: str) -> NoReturn:
    """Write the reason to stderr and end the command with exit status 2."""
    typer.echo(f"trace-fast: {escape_controls(reason)}", err=True)
    raise typer.Exit(2)


@contextmanager
def refuse_failures() -> Iterator[None]:
    """End the command with one line on stderr where the block raises what a user may cause."""
    try:
        yield
    except typer.Exit:  # a refusal inside the block; it is a RuntimeError
        raise
    except FAILURES as error:
        LOGGER.debug("the failure came from here:", exc_info=error)
        refuse(describe(error))


def parse_timestep(text: str | None, name: str = "timestep") -> str | int | None:
    """Return the value of an option: an integer from 0 to 999, "iep", or None where it is not given."""
    if text is None or text == "iep":
        return text
    try:
        timestep = int(text)
    except ValueError:
        timestep = -1
    if not 0 <= timestep <= 999:
        refuse(f"--{name} must be iep or an integer from 0 to 999, got {text!r}")
    return timestep


def parse_size(text: str | None, name: str = "size") -> tuple[int, int] | None:
    """Return (height, width) of an option such as 512x768; None where it is not given."""
    if text is None:
        return None
    # of at most nine digits, which Python converts to integers in no time
    if not (sides := re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", text, re.ASCII)):
        refuse(f"--{name} must be height and width in pixels, such as 512x768, got {text!r}")
    height, width = int(sides[1]), int(sides[2])
    if height * width > MAX_PIXELS:
        refuse(f"--{name} must be at most {MAX_PIXELS} pixels, got {text}")
    return height, width


def choose_finder(
    model: str,
    stage: str | None,
    timestep: str | None,
    noising: str | None,
    device: str | None,
    size: str | None,
    dtype: str | None,
    offload: str | None,
    seed: int,
    batch_size: int,
    curve: bool = False,
) -> EdgeFinder:
    """Return the model that the options choose, which is loaded later."""
    parsed, height_and_width = parse_timestep(timestep), parse_size(size)
    if stage == "2" and (curve or parsed is not None or noising is not None):
        refuse("--timestep, --noising and --curve are options of the search: give --stage 1 with them")

    import torch

    from trace_fast.jobs.finder import EdgeFinder
    from trace_fast.jobs.parts import find_device

    if device in (None, "cuda"):
        device = find_device(torch.cuda.device_count()) or device
    return EdgeFinder(
        model=model,
        stage=1 if curve else None if stage is None else int(stage),
        device=device,
        size=height_and_width,
        dtype=dtype,
        offload=offload,
        seed=seed,
        timestep=parsed,
        noising=noising,
        batch_size=batch_size,
    )


def list_files(op: str, inputs: list[Path], output: Path, recursive: bool) -> list[InputFile]:
    """Return the pictures and shards of the inputs; what is left out of folders is reported."""
    from trace_fast.jobs.inputs import list_inputs

    with refuse_failures():
        listed = list_inputs(op, inputs, output, recursive)
    for line in listed.left_out:
        LOGGER.warning(line)
    return listed.files


def run(
    task: Task,
    files: list[InputFile],
    output: Path,
    *,
    workers: int | None,
    part: str | None,
    overwrite: bool,
    engine: str,
    actors: int | None,
    finish: Callable[[Outcome], None] | None = None,
) -> None:
    """Run a job, and say how many images were written.

    Args:
        task: what to compute.
        files: pictures and shards.
        output: the folder; or the PNG file of one picture, beside which its other files are written.
        workers: option.
        part: option.
        overwrite: option.
        engine: option.
        actors: option.
        finish: writes what all pictures share.
    """
    from trace_fast.io.files import write_atomically
    from trace_fast.io.folders import describe_left_out
    from trace_fast.jobs.memory import keep_memory
    from trace_fast.jobs.parts import find_part, parse_part
    from trace_fast.jobs.run import plan_targets, run_job

    if actors is not None and engine != "ray":
        refuse("--actors needs --engine ray")
    keep_memory()
    single = not os.path.isdir(output) and output.suffix.lower() in IMAGE_SUFFIXES
    with refuse_failures():
        names = name_single(task, files, output, overwrite) if single else {}
        own_part = find_part() if part is None else parse_part("--part", part)
        targets = plan_targets(task, files, output)
        task.settings  # noqa: B018 (loads the model before anything is written)
    open_folder(output.parent if single else output)
    with contextlib.ExitStack() as stack, refuse_failures():
        folder = output
        if single:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trace_fast-")))
        outcome = run_job(
            task,
            targets,
            folder,
            workers=workers,
            part=own_part,
            overwrite=overwrite,
            engine=engine,
            actors=actors,
        )
        if single and not outcome.failures:
            for kind, name in targets[files[0]].items():
                with write_atomically(output.parent / names[kind], task.op) as file:
                    file.write((folder / name).read_bytes())
        if finish is not None:
            finish(outcome)
    if outcome.left_out:
        LOGGER.warning("left out of tar files: %s", describe_left_out([], outcome.left_out))
    earlier = f", {outcome.earlier} of them by an earlier run" if outcome.earlier else ""
    if LOGGER.isEnabledFor(logging.INFO):
        typer.echo(f"{outcome.images - outcome.failures} of {outcome.images} written to {output}{earlier}")
    # torchrun ends the processes of all parts when that of one has failed
    if outcome.failures and "TORCHELASTIC_RUN_ID" not in os.environ:
        raise typer.Exit(1)


def name_single(task: Task, files: list[InputFile], output: Path, overwrite: bool) -> dict[str, str]:
    """Return the names of the files of one picture by kind, given that of the first; refuse what cannot be done."""
    from trace_fast.jobs.inputs import name_file

    if output.suffix.lower() != ".png":
        refuse(f"--output must be a folder, or end in .png, got '{output}'")
    if len(files) != 1 or files[0].is_shard:
        refuse(f"--output must be a folder for several images or a shard, got '{output}'")
    names = {kind: name_file(output.stem, kind) for kind in task.file_kinds}
    names["png"] = output.name
    for name in names.values():
        path = output.with_name(name)
        if path.exists() and path.samefile(files[0].path):
            refuse(f"'{path}' is the image itself: choose another --output")
        if path.exists() and not overwrite:
            refuse(f"'{path}' exists: choose another --output, or replace it by --overwrite")
    return names


def open_folder(folder: Path) -> None:
    """Create the folder and write to it for a moment: permissions alone do not show whether that works."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        refuse(f"the folder '{folder}' cannot be written to: {error.strerror}")
