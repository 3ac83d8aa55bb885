"""The command line: `trace-fast edges`, `segment`, `evaluate`, `demo`, `distill`, `pretrain`, `models`, `backends`.

Heavy modules are imported inside the commands, so that help costs no more than `import trace_fast.cli`.
Exit status: 0 all well, 1 some images failed (the others are done), 2 the command was refused or broke off.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

__all__ = ["main"]

RESAMPLES = 1000  # of the photos, behind the intervals of masks

# what a user, a file or the machine may cause: told in one line, without a traceback
_FAILURES = (OSError, RuntimeError, TypeError, ValueError)

app = typer.Typer(
    help="Instance edges from a diffusion model's self-attention.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the `trace-fast` command."""
    app()


def _show_version(asked: bool) -> None:
    if asked:
        from trace_fast import __version__

        typer.echo(f"trace-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def edges(
    inputs: Annotated[list[Path], typer.Argument(metavar="IN...", help="Image files, and folders of image files.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write to; made if needed.")],
    model: Annotated[
        str, typer.Option(help="Name shown by `trace-fast models`, repository of the hub, or folder.")
    ] = "mini",
    stage: Annotated[
        Literal["1", "2"] | None,
        typer.Option(help="1 for the search, 2 for the one-step student; else the student where there is one."),
    ] = None,
    timestep: Annotated[
        str | None,
        typer.Option(metavar="iep|INT", help="Level to read, or iep to search it; else what the model prefers."),
    ] = None,
    noising: Annotated[
        Literal["inversion", "gaussian"] | None,
        typer.Option(help="How an image is brought to a level; else what the model prefers."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:1; else the GPU where there is one.")] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="Processing size in pixels, such as 512x768; else the model's own."),
    ] = None,
    offload: Annotated[
        Literal["model", "sequential"] | None,
        typer.Option(help="For a small GPU: weights stay in main memory, and come whole in turn, or layer by layer."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the gaussian noise.")] = 0,
    bits: Annotated[Literal["8", "16"], typer.Option(help="Depth of the edge files.")] = "8",
    overlay: Annotated[bool, typer.Option("--overlay", help="Also write the edges drawn over the photo.")] = False,
    curve: Annotated[bool, typer.Option("--curve", help="Also plot the KL curve; needs matplotlib.")] = False,
) -> None:
    """Write the instance edges of each image as DIR/NAME.png: black is 0, white is 1.

    Asked to, it also writes DIR/NAME_overlay.png and DIR/NAME_curve.png. Files of an earlier run are replaced. Options
    of the search (--timestep, --noising, --size, --offload, --curve) ask for the search where there is a student, too.
    """
    level, sides = _parse_timestep(timestep), _parse_size(size)
    of_search = {"timestep": timestep, "noising": noising, "size": size, "offload": offload, "curve": curve or None}
    given = [f"--{name}" for name, value in of_search.items() if value is not None]
    if stage == "2" and given:
        _refuse(f"{given[0]} is of the search: --stage 1")
    kinds = ["", *["_overlay"] * overlay, *["_curve"] * curve]
    images = _list_images(inputs)
    results = {image: {kind: output / f"{image.stem}{kind}.png" for kind in kinds} for image in images}
    _check_results(results)
    if curve and find_spec("matplotlib") is None:
        _refuse("--curve needs matplotlib: pip install matplotlib")

    from trace_fast.backbones import has_student
    from trace_fast.detector import Detector
    from trace_fast.io import visualize
    from trace_fast.io.images import to_tensor
    from trace_fast.tracer import Tracer

    one_step = stage == "2" or (stage is None and not given and has_student(model))
    try:
        if one_step:
            detector = Detector.from_pretrained(model, device=device)
        else:
            tracer = Tracer.from_pretrained(model, device=device, size=sides, offload=offload)
    except _FAILURES as error:
        _refuse(str(error))
    _open_folder(output)

    def write(image: Path, paths: dict[str, Path]) -> None:
        photo = to_tensor(image)
        if one_step:
            found = detector.edges(photo)
        else:
            traced = tracer(photo, timestep=level, noising=noising, seed=seed, return_kl=curve)
            found = traced.edges
        visualize.write_png(paths[""], found, int(bits))
        if overlay:
            visualize.write_picture(paths["_overlay"], visualize.overlay(photo[0], found))
        if curve:
            visualize.plot_curve(traced, paths["_curve"])

    _write_each(results, output, write)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write to.")] = Path("demo"),
) -> None:
    """Trace sample photographs, and write their edges beside them as pictures."""
    from trace_fast import demo

    _open_folder(output)
    try:
        typer.echo(demo.run(output))
    except _FAILURES as error:
        _refuse(str(error))


@app.command()
def pretrain(
    photographs: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of image files, or of tar files of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Checkpoints; a run there is resumed.")],
    start: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Weights of the same architecture to go on from.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images to see before stopping.")] = 300_000,
    batch: Annotated[int, typer.Option(min=4, help="Images of 64 pixels in a step; a quarter as many of 128.")] = 32,
    rate: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = 1.5e-3,
    collages: Annotated[float, typer.Option(min=0, max=1, help="Share of a batch made of fragments of others.")] = 0.5,
    levels: Annotated[float, typer.Option(min=1, help="Exponent of the noise levels drawn, 1000 u^levels.")] = 1.5,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the network: slow to start, then faster.")
    ] = False,
    dim: Annotated[int, typer.Option(min=16, help="Channels of the network.")] = 160,
    depth: Annotated[int, typer.Option(min=1, help="Blocks of the network.")] = 6,
    device: Annotated[str, typer.Option(help="Where to train.")] = "cpu",
    workers: Annotated[int, typer.Option(min=0, help="Processes that make batches ahead; a GPU needs some.")] = 0,
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop after so long; the same command goes on.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    licence: Annotated[str, typer.Option(help="Of the photographs, for the model card.")] = "not stated",
) -> None:
    """Train the embedded model from photographs, without labels. Interrupt it at will: the same command goes on."""
    from trace_fast.backbones.mini import MiniConfig
    from trace_fast.training.mini import PretrainConfig, pretrain

    _open_folder(output)
    try:
        config = PretrainConfig(
            photographs,
            output,
            start=start,
            images=images,
            batches=(batch, batch // 4),
            rate=rate,
            collages=collages,
            levels=levels,
            compile=compile,
            device=device,
            workers=workers,
            minutes=minutes,
            seed=seed,
            licence=licence,
            model=MiniConfig(dim=dim, depth=depth),
        )
        typer.echo(pretrain(config))
    except _FAILURES as error:
        _refuse(str(error))


@app.command()
def distill(
    images: Annotated[
        Path, typer.Option("--images", metavar="DIR", help="Folder of image files, or of tar files of them; no labels.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="States and student; a run there is resumed.")
    ],
    edges: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="What the search finds, for several students; else DIR/edges of --output."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Teacher and base: name shown by `trace-fast models`, repository of the hub, or folder.")
    ] = "mini",
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Pixels that the student works at; else the model's own.")
    ] = None,
    teacher_size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Pixels that the search works at; else the student's.")
    ] = None,
    timestep: Annotated[
        str | None, typer.Option(metavar="iep|INT", help="Level that the search reads; else what the model prefers.")
    ] = None,
    noising: Annotated[
        Literal["inversion", "gaussian"] | None, typer.Option(help="Of the search; else what the model prefers.")
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Student to go on from, of the same model, rank and decoder; any size."),
    ] = None,
    labels: Annotated[
        Literal["ternary", "binary", "soft", "sharp", "crisp"],
        typer.Option(help="What is made of the search's divergences."),
    ] = "ternary",
    interior: Annotated[
        float, typer.Option(min=0, max=1, help="Share of cells that ternary labels call interior at least.")
    ] = 0.16,
    decoder: Annotated[
        Literal["conv", "pixels"], typer.Option(help="The paper's, or one that sees the photograph, too.")
    ] = "conv",
    level: Annotated[
        int | None,
        typer.Option(min=0, max=999, help="Noise level of the student's pass; else 0, and 20 for rectified flow."),
    ] = None,
    reconstruction: Annotated[float, typer.Option(min=0, help="Weight of the reconstruction loss.")] = 1.0,
    recolour: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the pictures whose colours are exchanged.")
    ] = 0.0,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters.")] = 64,
    rate: Annotated[float, typer.Option(min=0, help="Learning rate of the adapters.")] = 1e-4,
    decoder_rate: Annotated[float, typer.Option(min=0, help="Learning rate of the decoder.")] = 3e-3,
    epochs: Annotated[float, typer.Option(min=0, help="Passes over the photographs.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Photographs in a step, over all processes.")] = 8,
    limit: Annotated[int | None, typer.Option(min=7, help="Only so many photographs, drawn with the seed.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on without photographs that are damaged or too small.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="That the student is trained in; else bfloat16 on a GPU and float32 on the CPU."),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Less memory for more time: recompute in the backward pass.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Such as cuda:1; else the GPU where there is one.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model's repository.")] = None,
    licence: Annotated[str, typer.Option(help="Of the photographs, for the model card.")] = "not stated",
) -> None:
    """Distil a one-step student of a diffusion model from photographs alone. Interrupt it at will, and run it again.

    First the search visits every photograph, then the student learns from what it found; DIR/preview.png shows how it
    goes on, DIR/student is the result. Photographs may be added or removed between calls: what was found of the others
    stays good. Several GPUs: `accelerate launch -m trace_fast distill ...`.
    """
    options: dict[str, Any] = dict(locals())
    options |= {name: _parse_size(options[name], name.replace("_", "-")) for name in ("size", "teacher_size")}
    options["timestep"] = _parse_timestep(timestep)
    _open_folder(output)

    from trace_fast.training.distillation import DistillConfig
    from trace_fast.training.distillation import distill as run

    try:
        typer.echo(run(DistillConfig(**options)))
    except _FAILURES as error:
        _refuse(str(error))


@app.command()
def segment(
    inputs: Annotated[list[Path], typer.Argument(metavar="IN...", help="Image files, and folders of image files.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write to; made if needed.")],
    masks: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Masks of the one image to split and complete: a label map, PNG; else edges alone."
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Whose edges; as in `trace-fast edges`.")] = "mini",
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Strength from which an edge separates.")] = 0.5,
    mode: Annotated[Literal["flood", "walk"], typer.Option(help="How given masks are completed.")] = "flood",
    device: Annotated[str | None, typer.Option(help="Such as cuda:1; else the GPU where there is one.")] = None,
    overlay: Annotated[bool, typer.Option("--overlay", help="Also write the masks drawn over the photo.")] = False,
) -> None:
    """Write the masks of each image as DIR/NAME.png, a label map of 16 bits: 0 is none, others a mask each.

    They are the regions that the edges enclose or, with --masks, those masks split and completed by the edges. Asked
    to, it also writes DIR/NAME_overlay.png. Files of an earlier run are replaced.
    """
    kinds = ["", *["_overlay"] * overlay]
    images = _list_images(inputs)
    results = {image: {kind: output / f"{image.stem}{kind}.png" for kind in kinds} for image in images}
    _check_results(results)
    if not threshold:
        _refuse("--threshold must be above 0, got 0")
    if masks is not None and len(images) != 1:
        _refuse(f"--masks must be of one image, got {len(images)}")

    import numpy as np
    from PIL import Image

    import trace_fast
    from trace_fast.api import edge_finder
    from trace_fast.io import visualize
    from trace_fast.io.files import whole_file
    from trace_fast.io.images import to_tensor
    from trace_fast.masks.formats import open_masks, paint

    given = None if masks is None else _read_labels(masks)
    try:
        find = edge_finder(model, device=device)
    except _FAILURES as error:
        _refuse(str(error))
    _open_folder(output)

    def write(image: Path, paths: dict[str, Path]) -> None:
        photo = to_tensor(image)
        found = find(photo)
        if given is None:
            stack, _ = trace_fast.instances(found, threshold=threshold)
            labels = paint(stack, range(1, len(stack) + 1)).cpu().numpy()
        else:
            labels = trace_fast.propagate(given, found.cpu(), threshold=threshold, mode=mode)
        if labels.max(initial=0) > 65535:
            raise ValueError(f"segment: masks must be at most 65535 for a map of 16 bits, got label {labels.max()}")
        with whole_file(paths[""], "segment") as file:
            # half the time of the usual level
            Image.fromarray(labels.astype(np.uint16)).save(file, format="PNG", compress_level=3)
        if overlay:
            visualize.write_picture(paths["_overlay"], visualize.draw_masks(photo[0], open_masks(labels)[0].masks))

    _write_each(results, output, write)


@app.command()
def evaluate(
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
    device: Annotated[str | None, typer.Option(help="Such as cuda:1; else the GPU where there is one.")] = None,
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
        _refuse("--method or --results must be given")
    if (table is None) != (baseline is None):
        _refuse("--table and --baseline must be given together")
    if table is not None and not method:
        _refuse("--table must have a --method")
    if table == "components":
        if len(method) > 1 or "@" in method[0]:
            _refuse("--table components must have one --method, a model without a level")
        method = [f"{method[0]}@0", f"{method[0]}@iep", *method[:1] * has_student(method[0])]
    if not all(threshold):
        _refuse("--threshold must be above 0, got 0")
    if len(threshold) not in (1, len(method) or 1):
        _refuse(f"--threshold must be given once or {len(method)} times, for each --method")
    if len(files) < len(results):
        _refuse("--results must have a name of its own each: write NAME=FILE")
    if method and table is None and find_spec("matplotlib") is None:
        _refuse("--method needs matplotlib for its curves: pip install matplotlib")
    _open_folder(output)
    try:
        photos, problems, notes = open_photos(data, truth, ignore)
        methods = [parse_method(text, device=device) for text in method]
        if len({each.slug for each in methods}) < len(methods):
            _refuse("--method must have a name of its own each: write NAME=SPEC")
        photos, more, empty = run.check(photos[:limit], methods)
        problems, notes = problems + more, notes + empty
        for line in notes:
            typer.echo(f"note: {line}", err=True)
        if problems and not skip_bad:
            _refuse("\n  ".join([f"{len(problems)} problems; --skip-bad goes on without these images", *problems]))
        if not photos:
            _refuse(f"no image with contours in '{data}'")
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
    except typer.Exit:  # refused above; it is a RuntimeError
        raise
    except _FAILURES as error:
        _refuse(str(error))


@app.command()
def models() -> None:
    """Show the models that have a name: processing size, token grid, parameters, what is read, licence, repository.

    Encoders have no noise levels: ABDiv is read, and no t* is searched.
    """
    from trace_fast.backbones.registry import MODELS

    rows = [("name", "pixels", "grid", "parameters", "read", "licence", "from")]
    rows.append(("mini", "128", "32 x 32", "0.002 B", "t*, ABDiv", "Apache-2.0", "this package"))
    for name, model in MODELS.items():
        licence = f"{model.licence}, gated" if model.gated else model.licence
        grid = f"{model.grid} x {model.grid}"
        read = "ABDiv only" if model.encoder else "t*, ABDiv"
        rows.append((name, str(model.size), grid, f"{model.parameters} B", read, licence, model.repo))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(map(str.ljust, row, widths)).rstrip())


@app.command()
def backends() -> None:
    """Show which implementation of each op runs on each device."""
    import trace_fast

    try:
        typer.echo(trace_fast.backends())
    except _FAILURES as error:
        _refuse(str(error))


def _parse_timestep(text: str | None) -> str | int | None:
    if text is None or text == "iep":
        return text
    try:
        level = int(text)
    except ValueError:
        level = -1
    if not 0 <= level <= 999:
        _refuse(f"--timestep must be iep or an integer from 0 to 999, got {text!r}")
    return level


def _parse_size(text: str | None, name: str = "size") -> tuple[int, int] | None:
    if text is None:
        return None
    if not (found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text, re.ASCII)):
        _refuse(f"--{name} must be height and width in pixels, such as 512x768, got {text!r}")
    return int(found[1]), int(found[2])


def _list_images(inputs: list[Path]) -> list[Path]:
    """Files as they are, whatever their ending, folders as their image files by name; each file once."""
    from trace_fast.io.images import ENDINGS

    images: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = sorted(
                entry
                for entry in path.iterdir()
                if entry.suffix.lower() in ENDINGS and not entry.name.startswith(".") and entry.is_file()
            )
            if not found:
                _refuse(f"no image files in the folder '{path}'")
            images += found
        else:
            images.append(path)
    return list({os.path.abspath(image): image for image in images}.values())


def _read_labels(path: Path) -> Any:
    """A label map, (H, W) int32, of a lossless picture of whole numbers."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as picture:
            kind, lossy, mode = picture.format, picture.format == "JPEG", picture.mode
            labels = np.asarray(picture)
    except _FAILURES as error:
        _refuse(f"--masks must be a readable picture, got '{path}': {error}")
    if lossy or mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        _refuse(f"--masks must be a lossless picture of one channel of integers, got '{path}': {kind} of mode {mode}")
    return labels.astype(np.int32)


def _check_results(results: dict[Path, dict[str, Path]]) -> None:
    """Refuse a run in which a result would replace another one, or one of the images."""
    # some file systems do not tell upper case from lower
    sources = {os.path.realpath(image).casefold(): image for image in results}
    writers: dict[str, Path] = {}
    for image, paths in results.items():
        for path in paths.values():
            place = os.path.realpath(path).casefold()
            if place in sources:
                _refuse(f"'{path}' would replace the image '{sources[place]}': choose another folder with --output")
            if place in writers:
                _refuse(
                    f"'{writers[place]}' and '{image}' would both be written to '{path}': "
                    "rename one, or give each its own --output"
                )
            writers[place] = image


def _write_each(
    results: dict[Path, dict[str, Path]], output: Path, write: Callable[[Path, dict[str, Path]], None]
) -> None:
    """Write the results of each image; those that fail are told, and the others done all the same."""
    from tqdm import tqdm

    failed = 0
    # several images show progress, on a terminal only
    for image, paths in tqdm(results.items(), unit="image", disable=None if len(results) > 1 else True):
        try:
            write(image, paths)
        except _FAILURES as error:
            failed += 1
            tqdm.write(f"trace-fast: {image}: {error}", file=sys.stderr)
    typer.echo(f"{len(results) - failed} of {len(results)} written to {output}")
    if failed:
        raise typer.Exit(1)


def _open_folder(folder: Path) -> None:
    """Make the folder and write to it for a moment: permissions alone do not tell whether that works."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        _refuse(f"the folder '{folder}' cannot be written to: {error.strerror}")


def _refuse(reason: str) -> NoReturn:
    typer.echo(f"trace-fast: {reason}", err=True)
    raise typer.Exit(2)
