"""The command `trace-fast app`."""

from __future__ import annotations

from typing import Annotated

import typer

from trace_fast.cli.common import Device, Dtype, Model, Offload, Size, parse_size, refuse_failures
from trace_fast.extras import require

__all__ = ["run_page"]


def run_page(
    model: Model = "mini",
    device: Device = None,
    size: Size = None,
    dtype: Dtype = None,
    offload: Offload = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port of 127.0.0.1. The default is the first free one from 7860."),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Serve a page for this machine alone: edges, masks, the KL curve, ABDiv of each timestep, and attention by click.

    Nothing leaves the machine. Ctrl-C ends it.
    """
    with refuse_failures():
        require("app", "gradio", "matplotlib", "pycocotools", extra="app")

        import torch

        from trace_fast.page.analysis import Models
        from trace_fast.page.layout import serve

        models = Models.load(
            model,
            device=device,
            size=parse_size(size),
            dtype=None if dtype is None else getattr(torch, dtype),
            offload=offload,
        )
        serve(models, port, open_browser=open_browser)
