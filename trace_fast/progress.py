"""Messages of long work to its user: those of the logger `trace_fast`, and progress.

The package sets no handler and no level; the commands do, and so may a program: `logging.basicConfig(level="INFO")`.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Self

from tqdm import tqdm

__all__ = ["LOGGER", "Progress"]

LOGGER = logging.getLogger("trace_fast")
LINE_SECONDS = 30  # between two lines of progress


class Progress:
    """A bar on a terminal; elsewhere a message of level INFO every half a minute.

    A level of the logger above INFO hides both.

    Args:
        title: what is done, such as "searching"; "" for nothing.
        unit: of what is counted, in the singular.
        total: None where it is not known.
        initial: what was done before.
        hidden: show nothing.

    Example:
        >>> with Progress("reading", "image", 2) as progress:
        ...     progress.update(2)
    """

    def __init__(self, title: str, unit: str, total: int | None = None, *, initial: int = 0, hidden: bool = False):
        hidden = hidden or LOGGER.level > logging.INFO
        # None is what tqdm calls a bar on a terminal alone
        self.bar = tqdm(total=total, initial=initial, desc=title, unit=unit, disable=True if hidden else None)
        self.has_lines = self.bar.disable and not hidden
        self.title, self.unit, self.total, self.initial, self.done, self.postfix = (
            title,
            unit,
            total,
            initial,
            initial,
            "",
        )
        self.started = self.last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def set_title(self, title: str) -> None:
        """Change the title."""
        self.title = title
        self.bar.set_description(title)

    def set_postfix(self, **values: Any) -> None:
        """Show values by their names from the next update on."""
        self.postfix = ", ".join(f"{name}={value}" for name, value in values.items())
        self.bar.set_postfix_str(self.postfix, refresh=False)

    def update(self, count: int = 1) -> None:
        """Count what is done."""
        self.bar.update(count)
        self.done += count
        now = time.monotonic()
        if self.has_lines and now - self.last_line >= LINE_SECONDS:
            self.last_line = now
            LOGGER.info(self.describe(now - self.started))

    def describe(self, seconds: float) -> str:
        """Return a line of progress, given the seconds since the start."""
        count = f"{self.done:,}" if self.total is None else f"{self.done:,} of {self.total:,}"
        parts = [f"{count} {self.unit}s, {tqdm.format_interval(seconds)} since the start"]
        if self.total is not None and self.done > self.initial:
            left = seconds * (self.total - self.done) / (self.done - self.initial)
            parts.append(f"about {tqdm.format_interval(left)} left")
        return (f"{self.title}: " if self.title else "") + ", ".join([*parts, *[self.postfix] * bool(self.postfix)])
