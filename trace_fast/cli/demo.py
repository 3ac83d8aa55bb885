"""The command `trace-fast demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trace_fast.cli.common import open_folder, refuse_failures

__all__ = ["run_demo"]


def run_demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write to.")] = Path("demo"),
) -> None:
    """Trace sample photographs, and write their edges beside them as pictures."""
    from trace_fast import demo

    open_folder(output)
    with refuse_failures():
        typer.echo(demo.run(output))
