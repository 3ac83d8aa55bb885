"""The command `trace-fast evaluate`."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from trace_fast.cli.common import Device, open_folder, refuse, refuse_failures

__all__ = ["run_evaluate"]

RESAMPLES = 1000  # of the photos, behind the intervals of masks


def run_evaluate(
    data: Annotated[Path, typer.Option("--data", metavar="DIR", help="Folder with images/ and ground truth.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Report; counts there are kept.")],
    method: Annotated[
        list[str],
        typer.Option(
            "--method",
            metavar="[NAME=]SPEC",
            help="Edges: sobel, canny, maps:DIR, lines:DIR (thin already), MODEL (its student, where it has one), or "
            "MODEL@iep, MODEL@LEVEL; repeat for several.",
        ),
    ] = [],  # noqa: B006
    results: Annotated[
        list[str],
        typer.Option(
            "--results",
            metavar="[NAME=]FILE",
            help="Masks: a COCO results JSON for AP and AR, or a panoptic one for PQ; repeat.",
        ),
    ] = [],  # noqa: B006
    table: Annotated[
        Literal["backbones", "components"] | None,
        typer.Option(
            help="What edges do for the masks of --baseline: of each --method, or of the steps of one MODEL (a fixed "
            "level, t*, its student where it has one)."
        ),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="COCO results JSON of the masks that --table refines.")
    ] = None,
    threshold: Annotated[
        list[float], typer.Option(min=0, max=1, help="Of edges, for --table: one, or one for each --method.")
    ] = [0.5],  # noqa: B006
    mode: Annotated[Literal["flood", "walk"], typer.Option(help="How --table completes masks.")] = "flood",
    truth: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Folder of label maps, of mask files or of BSDS .mat files, or a COCO JSON file; "
            "else the first there is of inst, panoptic, masks, ground_truth, groundTruth.",
        ),
    ] = None,
    ignore: Annotated[list[int], typer.Option(help="Label of maps that is crowd or void; repeat.")] = [65535],  # noqa: B006
    distance: Annotated[
        float, typer.Option(min=0, help="Largest distance of a match, as a share of the image's diagonal.")
    ] = 0.0075,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many images.")] = None,
    device: Device = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Go on without images that have a problem.")] = False,
) -> None:
    """Score edge maps against instance boundaries, and masks against instances.

    Of edges ODS, OIS, AP, clDice, and recall where instances touch; interrupt it at will, the same command goes on. The
    report is report.json, report.csv, report.md, images.csv, curves.png and a sheet of best and worst images for each
    method. Of masks class-agnostic AP and AR, in masks.json, masks.csv and masks.md; of panoptic segments PQ, SQ and
    RQ, in panoptic.json and panoptic.md. With --table the masks of a baseline are scored as they are, and split and
    completed by the edges of each method.
    """
    import shlex

    from trace_fast.backbones import has_student
    from trace_fast.evaluation import edges, masks, refined, report, run
    from trace_fast.evaluation.data import open_photos
    from trace_fast.evaluation.methods import parse_method

    named = [text.rpartition("=") for text in results]
    files = {name or Path(file).stem: Path(file) for name, _, file in named}
    if not method and not results:
        refuse("--method or --results must be given")
    if (table is None) != (baseline is None):
        refuse("--table and --baseline must be given together")
    if table is not None and not method:
        refuse("--table must have a --method")
    if table == "components":
        if len(method) > 1 or "@" in method[0]:
            refuse("--table components must have one --method, a model without a level")
        method = [f"{method[0]}@0", f"{method[0]}@iep", *method[:1] * has_student(method[0])]
    if not all(threshold):
        refuse("--threshold must be above 0, got 0")
    if len(threshold) not in (1, len(method) or 1):
        refuse(f"--threshold must be given once or {len(method)} times, for each --method")
    if len(files) < len(results):
        refuse("--results must have a name of its own each: write NAME=FILE")
    if method and table is None and find_spec("matplotlib") is None:
        refuse("--method needs matplotlib for its curves: pip install matplotlib")
    open_folder(output)
    with refuse_failures():
        photos, problems, notes = open_photos(data, truth, ignore)
        methods = [parse_method(text, device=device) for text in method]
        if len({each.slug for each in methods}) < len(methods):
            refuse("--method must have a name of its own each: write NAME=SPEC")
        photos, more, empty = run.check(photos[:limit], methods)
        problems, notes = problems + more, notes + empty
        for line in notes:
            typer.echo(f"note: {line}", err=True)
        if problems and not skip_bad:
            refuse("\n  ".join([f"{len(problems)} problems; --skip-bad goes on without these images", *problems]))
        if not photos:
            refuse(f"no image with contours in '{data}'")
        command = shlex.join(["trace-fast", *sys.argv[1:]])
        if table is not None and baseline is not None:
            instances = run.read_truth(photos)
            given = run.read_masks(baseline, instances)
            found = {baseline.stem: given}
            thresholds = threshold if len(threshold) == len(methods) else threshold * len(methods)
            for each, strength in zip(methods, thresholds, strict=True):
                found[f"{baseline.stem} + {each.name}"] = refined.refine_all(
                    photos, instances, given, each, output / "refined", threshold=strength, mode=mode
                )
            precision = {name: masks.mask_ap(instances, each, resamples=RESAMPLES) for name, each in found.items()}
            sizes = {f"{baseline.stem} + {each.name}": each.parameters for each in methods}
            report.write_masks(output, precision, command, sizes)
            typer.echo((output / "masks.md").read_text())
            return
        if methods:
            counts = {each.name: run.count_all(photos, each, output / "counts", distance=distance) for each in methods}
            scores = {name: edges.score(each) for name, each in counts.items()}
            left_out = [*notes, *problems]
            report.write_report(output, scores, photos, methods, command=command, notes=left_out, distance=distance)
            typer.echo((output / "report.md").read_text())
        segments = {name: file for name, file in files.items() if run.is_panoptic(file)}
        if segments:
            quality = {name: run.score_panoptic(file, photos[0].truth) for name, file in segments.items()}
            report.write_panoptic(output, quality, command)
            typer.echo((output / "panoptic.md").read_text())
        if lists := {name: file for name, file in files.items() if name not in segments}:
            instances = run.read_truth(photos)
            precision = {
                name: masks.mask_ap(instances, run.read_masks(file, instances), resamples=RESAMPLES)
                for name, file in lists.items()
            }
            report.write_masks(output, precision, command)
            typer.echo((output / "masks.md").read_text())
