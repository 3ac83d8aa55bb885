"""The command line: `trace-fast edges`, `segment`, `evaluate`, `distill`, `pretrain`, `scenes`, `models` and so on.

Each command is a file that parses, calls the library and prints. Pillow, matplotlib, diffusers and Triton are imported
inside the commands, so that help does not wait for them; it does for torch, since the options of trainings are fields
of their configurations. The exit status is in the help of the command.
"""

from typing import Annotated

import typer

import trace_fast.cli.waiting  # noqa: F401, isort: skip (before torch)
from trace_fast.cli.backends import run_backends
from trace_fast.cli.check import run_check
from trace_fast.cli.demo import run_demo
from trace_fast.cli.distill import run_distill
from trace_fast.cli.edges import run_edges
from trace_fast.cli.evaluate import run_evaluate
from trace_fast.cli.models import run_models
from trace_fast.cli.page import run_page
from trace_fast.cli.pretrain import run_pretrain
from trace_fast.cli.scenes import run_scenes
from trace_fast.cli.segment import run_segment
from trace_fast.cli.verbosity import with_verbosity

__all__ = ["app", "main"]

app = typer.Typer(
    help="Instance edges from a diffusion model's self-attention.",
    epilog="Exit status: 0 all is well, 1 some images failed and the others are done, 2 the command was refused or "
    "failed, 130 Ctrl-C.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
)
COMMANDS = {
    "edges": run_edges,
    "segment": run_segment,
    "evaluate": run_evaluate,
    "demo": run_demo,
    "app": run_page,
    "distill": run_distill,
    "pretrain": run_pretrain,
    "scenes": run_scenes,
    "models": run_models,
    "check": run_check,
    "backends": run_backends,
}
for name, run in COMMANDS.items():
    app.command(name)(with_verbosity(run))


def main() -> None:
    """Run the `trace-fast` command."""
    app()


def _show_version(requested: bool) -> None:
    if requested:
        from trace_fast import __version__

        typer.echo(f"trace-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass
