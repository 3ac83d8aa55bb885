"""The command `trace-fast edges`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from trace_fast.cli.common import (
    Device,
    Inputs,
    OutputFolder,
    list_images,
    open_folder,
    parse_size,
    parse_timestep,
    plan_results,
    refuse,
    refuse_failures,
    require_package,
    write_results,
)

__all__ = ["run_edges"]


def run_edges(
    inputs: Inputs,
    output: OutputFolder,
    model: Annotated[
        str,
        typer.Option(help="Name that `trace-fast models` shows, repository of the hub (owner/name), or local folder."),
    ] = "mini",
    stage: Annotated[
        Literal["1", "2"] | None,
        typer.Option(
            help="1 for the search, 2 for the one-step student. The default is the student where there is one."
        ),
    ] = None,
    timestep: Annotated[
        str | None,
        typer.Option(
            metavar="iep|INT",
            help="Timestep that the search reads, 0 to 999, or iep to find it. The default is the model's own.",
        ),
    ] = None,
    noising: Annotated[
        Literal["inversion", "gaussian"] | None,
        typer.Option(help="The way in which the search adds noise to an image. The default is the model's own."),
    ] = None,
    device: Device = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="Processing size in pixels, such as 512x768. The default is the model's own."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Data type of the weights. The default is bfloat16 on a GPU, and float32 on the CPU and for mini."
        ),
    ] = None,
    offload: Annotated[
        Literal["model", "sequential"] | None,
        typer.Option(
            help="Keep the weights in main memory, for a small GPU, and move them to the GPU model by model, or layer "
            "by layer (sequential)."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the Gaussian noise.")] = 0,
    bits: Annotated[Literal["8", "16"], typer.Option(help="Bits of each pixel in the edge files.")] = "8",
    overlay: Annotated[bool, typer.Option("--overlay", help="Also write the edges drawn over the image.")] = False,
    curve: Annotated[bool, typer.Option("--curve", help="Also plot the KL curve. This needs matplotlib.")] = False,
) -> None:
    """Write the instance edges of each image as DIR/NAME.png: black is 0, white is 1.

    With --overlay and --curve it also writes DIR/NAME_overlay.png and DIR/NAME_curve.png. Files of an earlier run are
    replaced. The options --timestep, --noising and --curve choose the search even where there is a student.
    """
    choices = {"timestep": parse_timestep(timestep), "noising": noising, "return_kl": curve or None}
    search: dict[str, Any] = {name: value for name, value in choices.items() if value is not None}
    height_and_width = parse_size(size)
    if stage == "2" and search:
        refuse("--timestep, --noising and --curve are options of the search: give --stage 1 with them")
    results = plan_results(list_images(inputs), output, ["", *["_overlay"] * overlay, *["_curve"] * curve])
    if curve:
        require_package("matplotlib", "--curve")

    import torch

    import trace_fast
    from trace_fast.io import visualize
    from trace_fast.io.images import read_image

    with refuse_failures():
        loaded: Any = trace_fast.load(
            model,
            stage=1 if search else None if stage is None else int(stage),
            device=device,
            dtype=None if dtype is None else getattr(torch, dtype),
            size=height_and_width,
            offload=offload,
        )
    open_folder(output)

    def write(image: Path, paths: dict[str, Path]) -> None:
        photo = read_image(image)
        if search:
            traced = loaded(photo, seed=seed, **search)
            edges = traced.edges
        else:
            edges = loaded.edges(photo, seed=seed)
        visualize.write_png(paths[""], edges, int(bits))
        if overlay:
            visualize.write_picture(paths["_overlay"], visualize.overlay(photo[0], edges))
        if curve:
            visualize.plot_curve(traced, paths["_curve"])

    write_results(results, output, write)
