"""The command `trace-fast pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trace_fast.cli.common import open_folder, refuse_failures

__all__ = ["run_pretrain"]


def run_pretrain(
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

    open_folder(output)
    with refuse_failures():
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
