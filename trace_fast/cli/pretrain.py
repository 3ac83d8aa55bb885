"""The command `trace-fast pretrain`."""

from __future__ import annotations

import typer

from trace_fast.cli.options import take_options
from trace_fast.training import mini

__all__ = ["run_pretrain"]


@take_options(mini.PretrainConfig, positional="photos")
def run_pretrain(config: mini.PretrainConfig) -> None:
    """Train the embedded model on photos, without annotations.

    The weights are in the folder `final` of the output folder. You can interrupt the command at any time: the same
    command resumes the run.
    """
    typer.echo(mini.pretrain(config))
