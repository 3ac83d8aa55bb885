"""The command `trace-fast distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from trace_fast.cli.common import Device, open_folder, parse_size, parse_timestep, refuse_failures

__all__ = ["run_distill"]


def run_distill(
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
    device: Device = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model's repository.")] = None,
    licence: Annotated[str, typer.Option(help="Of the photographs, for the model card.")] = "not stated",
) -> None:
    """Distil a one-step student of a diffusion model from photographs alone. Interrupt it at will, and run it again.

    First the search visits every photograph, then the student learns from what it found; DIR/preview.png shows how it
    goes on, DIR/student is the result. Photographs may be added or removed between calls: what was found of the others
    stays good. Several GPUs: `accelerate launch -m trace_fast distill ...`.
    """
    options: dict[str, Any] = dict(locals())
    options |= {name: parse_size(options[name], name.replace("_", "-")) for name in ("size", "teacher_size")}
    options["timestep"] = parse_timestep(timestep)
    open_folder(output)

    from trace_fast.training.distillation import DistillConfig
    from trace_fast.training.distillation import distill as run

    with refuse_failures():
        typer.echo(run(DistillConfig(**options)))
