"""The command `trace-fast segment`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
    open_folder,
    refuse,
    refuse_failures,
    run,
)
from trace_fast.extras import require

if TYPE_CHECKING:
    from trace_fast.jobs.inputs import InputFile
    from trace_fast.jobs.run import Outcome

__all__ = ["run_segment"]


def run_segment(
    inputs: Inputs,
    output: Output,
    masks: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|DIR",
            help="Label map of the masks of the one image, to split and complete; or folder of label maps NAME.png. "
            "Without it, masks are found by edges alone.",
        ),
    ] = None,
    ignore: Annotated[
        list[int],
        typer.Option(
            help="Label of --masks that is void. Repeat the option for several labels. The default is 255 of 8 bits "
            "and 65535 of 16 bits, in a map of several labels."
        ),
    ] = [],  # noqa: B006
    mode: Annotated[
        Literal["fit", "flood", "walk"], typer.Option(help="The way in which the masks of --masks are refined.")
    ] = "fit",
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Strength from which an edge separates masks. The default is the model's own or, with --edges, 0.5; "
            "to fit the masks of --masks, 0.15.",
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Write at most this number of masks: those whose outlines are strongest or, with --masks, the "
            "largest. Without --masks and --threshold they come from all levels of detail, some within others.",
        ),
    ] = None,
    min_area: Annotated[
        int | None,
        typer.Option(min=1, help="Area of the smallest mask in pixels. The default is 0.05 % of the image."),
    ] = None,
    exclusive: Annotated[
        bool, typer.Option("--exclusive", help="Remove overlaps also in --coco; smaller masks lie on top.")
    ] = False,
    bits: Annotated[
        Literal["8", "16"],
        typer.Option(help="8 for a label map with a palette, for at most 254 masks; 16 for one without."),
    ] = "8",
    coco: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write the masks of all images as COCO results, with RLE, boxes, areas and scores. The id of an "
            "image is its name where the names of all are numbers, else its position from 1.",
        ),
    ] = None,
    edges: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Use the edge maps NAME.png of this folder, and no model."),
    ] = None,
    save_edges: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the edges as NAME.png of 16 bits, for --edges.")
    ] = None,
    model: Model = "mini",
    stage: Stage = None,
    timestep: Timestep = None,
    noising: Noising = None,
    device: Device = None,
    size: Size = None,
    dtype: Dtype = None,
    offload: Offload = None,
    seed: Seed = 0,
    overlay: Annotated[bool, typer.Option("--overlay", help="Also write the masks drawn over the image.")] = False,
    overlay_format: OverlayFormat = "jpg",
    max_side: MaxSide = None,
    recursive: Recursive = False,
    workers: Workers = None,
    batch_size: BatchSize = 1,
    part: PartOption = None,
    overwrite: Overwrite = False,
    engine: Engine = "threads",
    actors: Actors = None,
) -> None:
    """Write the masks of each image as DIR/NAME.png, a label map: 0 is background, each mask has a number.

    They are the regions that edges enclose or, with --masks, the masks of those files split and completed by the edges.
    With --overlay it also writes DIR/NAME_overlay.jpg. Names, shards and runs that were interrupted are as those of
    `trace-fast edges`; a parquet file gives one with the masks as RLE, too.
    """
    files = list_files("segment", inputs, output, recursive)
    if threshold == 0:
        refuse("--threshold must be above 0, got 0")
    chosen = {"--masks": masks, "--coco": coco, "--edges": edges, "--save-edges": save_edges}
    has_parquet = _check_shards(files, [option for option, value in chosen.items() if value is not None])
    if coco is not None or has_parquet:
        with refuse_failures():
            require("--coco" if coco is not None else "parquet", "pycocotools")
    if edges is not None and not os.path.isdir(edges):
        refuse(f"--edges must be a folder of edge maps, got '{edges}'")
    finder = choose_finder(model, stage, timestep, noising, device, size, dtype, offload, seed, batch_size)
    if save_edges is not None:
        open_folder(save_edges)

    from trace_fast.jobs.segments import SegmentTask, list_coco_results
    from trace_fast.masks import write_coco_results

    task = SegmentTask(
        finder,
        edges=edges,
        save_edges=save_edges,
        masks=masks,
        ignore=ignore,
        mode=mode,
        threshold=threshold,
        top=top,
        min_area=min_area,
        exclusive=exclusive,
        bits=int(bits),
        overlay=overlay_format if overlay else None,
        max_side=max_side,
        coco=coco is not None,
        has_masks=coco is not None or has_parquet,
    )
    if masks is not None:
        _check_label_files(masks, task.file_kinds, files)

    def write_coco(outcome: Outcome) -> None:
        if coco is not None:
            write_coco_results(coco, list_coco_results(outcome.names, outcome.results))

    run(
        task,
        files,
        output,
        workers=workers,
        part=part,
        overwrite=overwrite,
        engine=engine,
        actors=actors,
        finish=write_coco,
    )


def _check_shards(files: list[InputFile], options: list[str]) -> bool:
    """Return whether there are parquet files; refuse options that need pictures where there are shards."""
    shards = [file for file in files if file.is_shard]
    if shards and options:
        refuse(f"{options[0]} needs pictures, got the shard '{shards[0].path}'")
    return any(file.path.suffix.lower() == ".parquet" for file in shards)


def _check_label_files(masks: Path, file_kinds: list[str], files: list[InputFile]) -> None:
    """Refuse --masks without a label map of each image."""
    from trace_fast.jobs.inputs import name_results
    from trace_fast.jobs.segments import find_label_file, read_labels

    if not os.path.isdir(masks):
        if len(files) != 1:
            refuse(f"--masks must be a folder for {len(files)} images, got '{masks}'")
        with refuse_failures():
            read_labels(masks)
    for name in name_results([file.name for file in files], file_kinds):
        if find_label_file(masks, name) is None:
            refuse(f"--masks must hold a label map of each image, got no {name}.png in '{masks}'")
