"""The command `trace-fast backends`."""

from __future__ import annotations

import typer

from trace_fast.cli.common import refuse_failures

__all__ = ["run_backends"]


def run_backends() -> None:
    """Show which implementation of each op runs on each device."""
    import trace_fast

    with refuse_failures():
        typer.echo(trace_fast.backends())
