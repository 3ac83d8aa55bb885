"""The command `trace-fast evaluate`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from trace_fast.cli.common import Device, open_folder, refuse_failures
from trace_fast.extras import require
from trace_fast.io.claims import claim_folder

__all__ = ["run_evaluate"]


def run_evaluate(
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="DIR",
            help="Folder with images/ and ground truth; or COCO's, with val2017/ and annotations/; or one of images "
            "alone, such as coco/val2017, for a --truth elsewhere.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the report. Counts in it are used again.")
    ],
    method: Annotated[
        list[str],
        typer.Option(
            "--method",
            metavar="[NAME=]SPEC",
            help="Source of edge maps: sobel, canny, maps:DIR or maps:FILE (a tar or parquet file of `trace-fast "
            "edges`), lines:DIR (thin already), MODEL (its student, where it has one), or MODEL@iep, MODEL@TIMESTEP "
            "(its search). Repeat the option for several sources.",
        ),
    ] = [],  # noqa: B006
    results: Annotated[
        list[str],
        typer.Option(
            "--results",
            metavar="[NAME=]FILE",
            help="Masks to score: a JSON file of COCO results, for AP and AR, or of panoptic segments, for PQ. Repeat "
            "the option for several files.",
        ),
    ] = [],  # noqa: B006
    table: Annotated[
        Literal["backbones", "components"] | None,
        typer.Option(
            help="Refine the masks of --baseline by edges: by those of each --method, or by those of the steps of one "
            "MODEL (a fixed timestep, t*, its student where it has one)."
        ),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON file of COCO results whose masks --table refines.")
    ] = None,
    threshold: Annotated[
        list[float],
        typer.Option(
            min=0,
            max=1,
            help="Strength from which an edge separates masks, for --table. Give one, or one for each --method. Modes "
            "other than fit need it.",
        ),
    ] = [],  # noqa: B006
    mode: Annotated[
        Literal["fit", "flood", "walk"], typer.Option(help="The way in which --table refines masks.")
    ] = "fit",
    truth: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Folder of label maps, of mask files or of BSDS .mat files, or a COCO JSON file, such as "
            "instances_val2017.json. The default is the first that exists of inst, panoptic, masks, ground_truth, "
            "groundTruth, and in annotations/ instances_SPLIT.json of a folder SPLIT (val, where there are several).",
        ),
    ] = None,
    ignore: Annotated[
        list[int], typer.Option(help="Label of maps that is crowd or void. Repeat the option for several labels.")
    ] = [65535],  # noqa: B006
    distance: Annotated[
        float, typer.Option(min=0, help="Largest distance of a match, as a share of the image's diagonal.")
    ] = 0.0075,
    suppression: Annotated[
        Literal["bsds", "hessian"],
        typer.Option(
            help="The way in which ridges of edge maps are found: that of the benchmark of BSDS500, with which scores "
            "are published, or along the exact normals of edges up to the border."
        ),
    ] = "bsds",
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first images, this number of them.")] = None,
    device: Device = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out images and results that have a problem.")
    ] = False,
) -> None:
    """Score edge maps against instance boundaries, and masks against instances.

    Edges are scored by ODS, OIS, AP, clDice, and recall where instances touch. You may interrupt the command: the same
    command continues it. The report is report.json, report.csv, report.md, images.csv, curves.png, a sheet of best and
    worst images for each method, and, in differences.md, paired differences to the first method. Masks are scored by
    class-agnostic AP and AR, in masks.json, masks.csv and masks.md; panoptic segments by PQ, SQ and RQ, in
    panoptic.json and panoptic.md. With --table the masks of a baseline are scored as they are, and split and completed
    by the edges of each method.
    """
    if method and table is None:
        with refuse_failures():
            require("--method", "matplotlib")
    open_folder(output)

    from trace_fast.evaluation import evaluate

    with refuse_failures(), claim_folder(output, "evaluate"):
        report = evaluate(
            data,
            method,
            results,
            table=table,
            baseline=baseline,
            threshold=threshold or None,
            mode=mode,
            truth=truth,
            ignore=ignore,
            distance=distance,
            suppression=suppression,
            limit=limit,
            device=device,
            skip_bad=skip_bad,
            cache=output,
        )
        report.save(output, command=shlex.join(["trace-fast", *sys.argv[1:]]))
        typer.echo(report)
