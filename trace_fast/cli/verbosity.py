"""Messages of a command on stderr: those of the package's log, more of them with -v and fewer with -q."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from tqdm import tqdm

from trace_fast.jobs.errors import escape_controls
from trace_fast.progress import LOGGER

__all__ = ["log_to_stderr", "with_verbosity"]

OPTIONS = {
    "verbose": typer.Option(
        "--verbose", "-v", help="Also say which model was loaded, and show the traceback of a failure."
    ),
    "quiet": typer.Option("--quiet", "-q", help="Write failures alone: no progress, and not what is left out."),
}


def with_verbosity(run: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the options -v and -q, which decide what it writes to stderr.

    Args:
        run: a function whose parameters are the options of the command.
    """

    @functools.wraps(run)
    def command(*, verbose: bool, quiet: bool, **options: Any) -> None:
        if verbose and quiet:
            raise typer.BadParameter("give --verbose or --quiet, not both")
        with log_to_stderr(logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO):
            run(**options)

    signature = inspect.signature(run, eval_str=True)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])
        for name, option in OPTIONS.items()
    ]
    parameters = [*signature.parameters.values(), *added]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


@contextmanager
def log_to_stderr(level: int) -> Iterator[None]:
    """Write the messages of the package from a level on, and all warnings, to stderr until the block ends."""
    handler = StderrHandler()
    handler.setFormatter(logging.Formatter("trace-fast: %(message)s"))
    before = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: LOGGER.warning(message)
            yield
    finally:
        LOGGER.setLevel(before)
        LOGGER.removeHandler(handler)


class StderrHandler(logging.Handler):
    """Writes messages above the bars of progress."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message to what stderr is at this moment."""
        tqdm.write(escape_controls(self.format(record)), file=sys.stderr)
