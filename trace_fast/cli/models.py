"""The command `trace-fast models`."""

from __future__ import annotations

import typer

__all__ = ["run_models"]


def run_models() -> None:
    """Show the named models: processing size, token grid, parameters, outputs, license, and source.

    Encoders have no timesteps: they give ABDiv, and no t* is searched.
    """
    from trace_fast.backbones.registry import MODELS

    rows = [("name", "pixels", "grid", "parameters", "outputs", "license", "source")]
    rows.append(("mini", "128", "32 x 32", "0.002 B", "t*, ABDiv", "Apache-2.0", "this package"))
    for name, model in MODELS.items():
        license = f"{model.license}, gated" if model.gated else model.license
        grid = f"{model.grid} x {model.grid}"
        outputs = "ABDiv only" if model.encoder else "t*, ABDiv"
        rows.append((name, str(model.size), grid, f"{model.billions} B", outputs, license, model.repository))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(map(str.ljust, row, widths)).rstrip())
