"""Pieces that several commands share: options, refusals, the list of images, the folder of results."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from safetensors import SafetensorError

from trace_fast.io.pictures import MAX_PIXELS

if TYPE_CHECKING:
    from torch import Tensor

    from trace_fast import Detector, TraceOutput, Tracer

__all__ = [
    "FAILURES",
    "Device",
    "Dtype",
    "Inputs",
    "Model",
    "Noising",
    "Offload",
    "OutputFolder",
    "Seed",
    "Size",
    "Stage",
    "Timestep",
    "describe",
    "list_images",
    "load_edge_finder",
    "open_folder",
    "parse_size",
    "parse_timestep",
    "plan_results",
    "refuse",
    "refuse_failures",
    "write_results",
]

# what a user, a file or the machine may cause: reported in one line, without a traceback
FAILURES = (ArithmeticError, MemoryError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)

Inputs = Annotated[list[Path], typer.Argument(metavar="IN", help="Image files, and folders of image files.")]
OutputFolder = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write to. It is created where it is missing.")
]
Model = Annotated[
    str, typer.Option(help="Name that `trace-fast models` shows, repository of the hub (owner/name), or local folder.")
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


def refuse(reason: str) -> NoReturn:
    """Write the reason to stderr and end the command with exit status 2."""
    typer.echo(f"trace-fast: {reason}", err=True)
    raise typer.Exit(2)


@contextmanager
def refuse_failures() -> Iterator[None]:
    """End the command with one line on stderr where the block raises what a user may cause."""
    try:
        yield
    except typer.Exit:  # a refusal inside the block; it is a RuntimeError
        raise
    except FAILURES as error:
        refuse(describe(error))


def describe(error: BaseException) -> str:
    """Return the message of an error, or its name where it has none, as a MemoryError."""
    return str(error) or type(error).__name__


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


def load_edge_finder(
    model: str,
    stage: str | None,
    timestep: str | None,
    noising: str | None,
    device: str | None,
    size: str | None,
    dtype: str | None,
    offload: str | None,
    seed: int,
    curve: bool = False,
) -> tuple[Tracer | Detector, Callable[[Tensor], tuple[Tensor, TraceOutput | None]]]:
    """Load the model that the options choose.

    Returns:
        The model, and a function from an image (1, 3, H, W) to its edges (1, 1, H, W) and, where an option of the
        search is given, its whole output.
    """
    choices = {"timestep": parse_timestep(timestep), "noising": noising, "return_kl": curve or None}
    search: dict[str, Any] = {name: value for name, value in choices.items() if value is not None}
    height_and_width = parse_size(size)
    if stage == "2" and search:
        refuse("--timestep, --noising and --curve are options of the search: give --stage 1 with them")

    import torch

    import trace_fast

    with refuse_failures():
        loaded: Any = trace_fast.load(
            model,
            stage=1 if search else None if stage is None else int(stage),
            device=device,
            dtype=None if dtype is None else getattr(torch, dtype),
            size=height_and_width,
            offload=offload,
        )

    def find_edges(photo: Tensor) -> tuple[Tensor, TraceOutput | None]:
        if not search:
            return loaded.edges(photo, seed=seed), None
        traced = loaded(photo, seed=seed, **search)
        return traced.edges, traced

    return loaded, find_edges


def list_images(inputs: list[Path]) -> list[Path]:
    """Return the files as they are, whatever their ending, and the image files of the folders; each file once."""
    from trace_fast.io.folders import describe_left_out, is_picture

    images: list[Path] = []
    for path in inputs:
        with refuse_failures():  # such as of a name that is too long
            is_folder = path.is_dir()
        if is_folder:
            with refuse_failures():
                entries = sorted(path.iterdir())
                left_out = describe_left_out(entries)
            files = [entry for entry in entries if is_picture(entry.name) and entry.is_file()]
            if not files:
                refuse(f"no image files in the folder '{path}'" + (f": left out {left_out}" if left_out else ""))
            if left_out:
                typer.echo(f"trace-fast: left out of '{path}': {left_out}", err=True)
            images += files
        else:
            images.append(path)
    return list({os.path.abspath(image): image for image in images}.values())


def plan_results(images: list[Path], output: Path, suffixes: list[str]) -> dict[Path, dict[str, Path]]:
    """Return the files OUTPUT/NAME_SUFFIX.png of each image by suffix; none may replace another, or an image."""
    results = {image: {suffix: output / f"{image.stem}{suffix}.png" for suffix in suffixes} for image in images}
    # some file systems do not distinguish upper case from lower
    sources = {os.path.realpath(image).casefold(): image for image in results}
    writers: dict[str, Path] = {}
    for image, paths in results.items():
        for path in paths.values():
            target = os.path.realpath(path).casefold()
            if target in sources:
                refuse(f"'{path}' would replace the image '{sources[target]}': choose another folder with --output")
            if target in writers:
                refuse(
                    f"'{writers[target]}' and '{image}' would both be written to '{path}': "
                    "rename one, or give each its own --output"
                )
            writers[target] = image
    return results


def write_results(
    results: dict[Path, dict[str, Path]],
    output: Path,
    write: Callable[[Path, dict[str, Path]], None],
    finish: Callable[[], None] | None = None,
) -> None:
    """Write the results of each image; report the images that fail, and do the others all the same.

    Args:
        results: the files of each image, by suffix.
        output: the folder, for the message.
        write: writes the files of an image.
        finish: writes what all images share, after the last.
    """
    from tqdm import tqdm

    failures = 0
    # several images show progress, on a terminal only
    for image, paths in tqdm(results.items(), unit="image", disable=None if len(results) > 1 else True):
        try:
            write(image, paths)
        except FAILURES as error:
            failures += 1
            tqdm.write(f"trace-fast: {image}: {describe(error)}", file=sys.stderr)
    if finish is not None:
        with refuse_failures():
            finish()
    typer.echo(f"{len(results) - failures} of {len(results)} written to {output}")
    if failures:
        raise typer.Exit(1)


def open_folder(folder: Path) -> None:
    """Create the folder and write to it for a moment: permissions alone do not show whether that works."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        refuse(f"the folder '{folder}' cannot be written to: {error.strerror}")
