"""The command `trace-fast edges`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from trace_fast.cli.common import (
    Device,
    Inputs,
    OutputFolder,
    check_results,
    list_images,
    open_folder,
    parse_size,
    parse_timestep,
    refuse,
    refuse_failures,
    write_results,
)

__all__ = ["run_edges"]


def run_edges(
    inputs: Inputs,
    output: OutputFolder,
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
    device: Device = None,
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
    level, sides = parse_timestep(timestep), parse_size(size)
    of_search = {"timestep": timestep, "noising": noising, "size": size, "offload": offload, "curve": curve or None}
    given = [f"--{name}" for name, value in of_search.items() if value is not None]
    if stage == "2" and given:
        refuse(f"{given[0]} is of the search: --stage 1")
    kinds = ["", *["_overlay"] * overlay, *["_curve"] * curve]
    images = list_images(inputs)
    results = {image: {kind: output / f"{image.stem}{kind}.png" for kind in kinds} for image in images}
    check_results(results)
    if curve and find_spec("matplotlib") is None:
        refuse("--curve needs matplotlib: pip install matplotlib")

    from trace_fast.backbones import has_student
    from trace_fast.detector import Detector
    from trace_fast.io import visualize
    from trace_fast.io.images import read_image
    from trace_fast.tracer import Tracer

    one_step = stage == "2" or (stage is None and not given and has_student(model))
    with refuse_failures():
        if one_step:
            detector = Detector.from_pretrained(model, device=device)
        else:
            tracer = Tracer.from_pretrained(model, device=device, size=sides, offload=offload)
    open_folder(output)

    def write(image: Path, paths: dict[str, Path]) -> None:
        photo = read_image(image)
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

    write_results(results, output, write)
