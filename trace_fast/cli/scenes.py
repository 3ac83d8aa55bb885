"""The command `trace-fast scenes`."""

from __future__ import annotations

import typer

from trace_fast.cli.options import take_options
from trace_fast.training import scenes

__all__ = ["run_scenes"]


@take_options(scenes.ScenesConfig, positional="photos")
def run_scenes(config: scenes.ScenesConfig) -> None:
    """Draw scenes of objects with exact instance maps, to train on without annotations.

    The output folder is a data set as `trace-fast evaluate` reads it. You can interrupt the command at any time: the
    same command draws the scenes that are missing.
    """
    typer.echo(scenes.write_scenes(config))
