"""The command `trace-fast check`."""

from __future__ import annotations

from pathlib import Path

import typer

from trace_fast.cli.common import (
    Device,
    Dtype,
    Model,
    Offload,
    OutputFolder,
    Size,
    open_folder,
    parse_size,
    refuse_failures,
)
from trace_fast.io.claims import claim_folder

__all__ = ["run_check"]


def run_check(
    model: Model = "mini",
    output: OutputFolder = Path("check"),
    device: Device = None,
    size: Size = None,
    dtype: Dtype = None,
    offload: Offload = None,
) -> None:
    """Measure what a model does on this machine, and write a report for an issue: report.md, report.json, panel.png.

    How many blocks are read and on which grids, whether the network's output stays the same, seconds and memory of each
    stage, the KL curve and t* of three photographs, and ABDiv inside and across objects.
    """
    open_folder(output)
    with refuse_failures(), claim_folder(output, "check"):
        import torch

        from trace_fast.model_check import check

        precision = None if dtype is None else getattr(torch, dtype)
        report = check(model, output, device=device, size=parse_size(size), dtype=precision, offload=offload)
        typer.echo(report)
        typer.echo(f"\nwritten to {output}: report.md, report.json, panel.png")
