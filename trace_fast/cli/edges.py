"""The command `trace-fast edges`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from trace_fast.cli.common import (
    Actors,
    BatchSize,
    Device,
    Dtype,
    Engine,
    Inputs,
    MaxSide,
    Model,
    Noising,
    Offload,
    Output,
    OverlayFormat,
    Overwrite,
    PartOption,
    Recursive,
    Seed,
    Size,
    Stage,
    Timestep,
    Workers,
    choose_finder,
    list_files,
    refuse,
    refuse_failures,
    run,
)
from trace_fast.extras import require

__all__ = ["run_edges"]


def run_edges(
    inputs: Inputs,
    output: Output,
    model: Model = "mini",
    stage: Stage = None,
    timestep: Timestep = None,
    noising: Noising = None,
    device: Device = None,
    size: Size = None,
    dtype: Dtype = None,
    offload: Offload = None,
    seed: Seed = 0,
    bits: Annotated[Literal["8", "16"], typer.Option(help="Bits of each pixel in the edge files.")] = "8",
    overlay: Annotated[bool, typer.Option("--overlay", help="Also write the edges drawn over the image.")] = False,
    overlay_format: OverlayFormat = "jpg",
    grid: Annotated[
        bool,
        typer.Option(
            "--grid",
            help="Write edges at the size of the student's output, in about a quarter of the bytes; "
            "`restore_edges` of trace_fast.io enlarges them.",
        ),
    ] = False,
    curve: Annotated[bool, typer.Option("--curve", help="Also plot the KL curve. This needs matplotlib.")] = False,
    max_side: MaxSide = None,
    recursive: Recursive = False,
    workers: Workers = None,
    batch_size: BatchSize = 1,
    part: PartOption = None,
    overwrite: Overwrite = False,
    engine: Engine = "threads",
    actors: Actors = None,
) -> None:
    """Write the instance edges of each image as DIR/NAME.png: black is 0, white is 1.

    With --overlay and --curve it also writes DIR/NAME_overlay.jpg and DIR/NAME_curve.png. Images of one name but other
    endings keep these: DIR/NAME.jpg.png. A tar or parquet file gives one of the same name and kind, with one result for
    each image, and an error for each image that cannot be read.

    A run that was interrupted is continued by the same command: what is done is skipped. The options --timestep,
    --noising and --curve choose the search even where there is a student.
    """
    files = list_files("edges", inputs, output, recursive)
    if grid and (overlay or curve):
        refuse("--grid must be without --overlay and --curve, whose pictures are of the image's size")
    if curve:
        with refuse_failures():
            require("--curve", "matplotlib")
    finder = choose_finder(model, stage, timestep, noising, device, size, dtype, offload, seed, batch_size, curve)

    from trace_fast.jobs.tasks import EdgesTask

    task = EdgesTask(finder, int(bits), overlay_format if overlay else None, curve, max_side, grid)
    run(task, files, output, workers=workers, part=part, overwrite=overwrite, engine=engine, actors=actors)
