"""The command `trace-fast distill`."""

from __future__ import annotations

import typer

from trace_fast.cli.options import take_options
from trace_fast.training import distillation

__all__ = ["run_distill"]


@take_options(distillation.DistillConfig)
def run_distill(config: distillation.DistillConfig) -> None:
    """Distill a one-step student of a diffusion model from photos alone.

    First the teacher searches every photo, then the student learns from the edges. The output folder has the student in
    `student` and a preview of its edges in `preview.png`. You can interrupt the command at any time: the same command
    resumes the run. You can add and remove photos between two calls: only new photos are searched.
    To use several GPUs, start it with `accelerate launch -m trace_fast distill ...`.
    """
    typer.echo(distillation.distill(config))
