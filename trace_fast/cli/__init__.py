"""The command line: `trace-fast edges`, `segment`, `evaluate`, `distill`, `pretrain`, `scenes`, `models` and so on.

Each command is a file that parses, calls the library and prints. Heavy modules are imported inside the commands, so
that help costs no more than `import trace_fast.cli`.
Exit status: 0 all is well, 1 some images failed (the others are done), 2 the command was refused or failed.
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

__all__ = ["app", "main"]

app = typer.Typer(
    help="Instance edges from a diffusion model's self-attention.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
)
app.command("edges")(run_edges)
app.command("segment")(run_segment)
app.command("evaluate")(run_evaluate)
app.command("demo")(run_demo)
app.command("app")(run_page)
app.command("distill")(run_distill)
app.command("pretrain")(run_pretrain)
app.command("scenes")(run_scenes)
app.command("models")(run_models)
app.command("check")(run_check)
app.command("backends")(run_backends)


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
