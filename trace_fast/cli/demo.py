"""The command `trace-fast demo`."""

from __future__ import annotations

from pathlib import Path

import typer

from trace_fast.cli.common import OutputFolder, open_folder, refuse_failures
from trace_fast.io.claims import claim_folder

__all__ = ["run_demo"]


def run_demo(output: OutputFolder = Path("demo")) -> None:
    """Write the edges of sample photographs as pictures."""
    from trace_fast import demo

    open_folder(output)
    with refuse_failures(), claim_folder(output, "demo"):
        typer.echo(demo.run(output))
