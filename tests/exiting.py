"""Tasks whose processes end in the middle of the work; actors of Ray import them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trace_fast.jobs.tasks import EdgesTask, Photo

__all__ = ["EndingTask", "SlowTask"]


def note(text: str) -> str:
    """Add a text to the file that the environment names, and return what was there."""
    path = Path(os.environ["TRACE_FAST_NOTES"])
    before = path.read_text() if path.exists() else ""
    with open(path, "a") as file:
        file.write(text)
    return before


class EndingTask(EdgesTask):
    """Ends the process at photos of width 99, as a fault in a decoder does, and at the first one of width 98."""

    def compute(self, names: Sequence[str], photos: Sequence[Photo]) -> list[Any]:
        """Return the edges, or end the process."""
        (photo,) = photos
        if photo.width == 99:
            note("x")
            os._exit(3)
        if photo.width == 98 and "killed" not in note("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().compute(names, photos)


class SlowTask(EdgesTask):
    """Takes a moment for each photo, and notes the parent of its process, which is one for all of a node of Ray."""

    def compute(self, names: Sequence[str], photos: Sequence[Photo]) -> list[Any]:
        """Return the edges."""
        note(f"{os.getppid()}\n")
        time.sleep(0.2)
        return super().compute(names, photos)
