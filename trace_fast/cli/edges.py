"""The command `trace-fast edges`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from trace_fast.cli.common import (
    Device,
    Dtype,
    Inputs,
    Model,
    Noising,
    Offload,
    OutputFolder,
    Seed,
    Size,
    Stage,
    Timestep,
    list_images,
    load_edge_finder,
    open_folder,
    plan_results,
    refuse_failures,
    write_results,
)
from trace_fast.extras import require
from trace_fast.io.claims import claim_folder

__all__ = ["run_edges"]


def run_edges(
    inputs: Inputs,
    output: OutputFolder,
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
    curve: Annotated[bool, typer.Option("--curve", help="Also plot the KL curve. This needs matplotlib.")] = False,
) -> None:
    """Write the instance edges of each image as DIR/NAME.png: black is 0, white is 1.

    With --overlay and --curve it also writes DIR/NAME_overlay.png and DIR/NAME_curve.png. Files of an earlier run are
    replaced. The options --timestep, --noising and --curve choose the search even where there is a student.
    """
    results = plan_results(list_images(inputs), output, ["", *["_overlay"] * overlay, *["_curve"] * curve])
    if curve:
        with refuse_failures():
            require("--curve", "matplotlib")

    from trace_fast.io import visualize
    from trace_fast.io.images import read_image

    _, find_edges = load_edge_finder(model, stage, timestep, noising, device, size, dtype, offload, seed, curve=curve)
    open_folder(output)

    def write(image: Path, paths: dict[str, Path]) -> None:
        photo = read_image(image)
        edges, traced = find_edges(photo)
        visualize.write_png(paths[""], edges, int(bits))
        if overlay:
            visualize.write_picture(paths["_overlay"], visualize.overlay(photo[0], edges))
        if curve and traced is not None:
            visualize.plot_curve(traced, paths["_curve"])

    with refuse_failures(), claim_folder(output, "edges"):
        write_results(results, output, write)
