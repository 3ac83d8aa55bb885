"""A task that ends the process at some photos, as a fault in a decoder does; actors of Ray import it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trace_fast.jobs.tasks import EdgesTask, Photo

__all__ = ["ExitingTask"]


class ExitingTask(EdgesTask):
    """Ends the process at photos of width 99, and counts how often it begins with one."""

    def compute(self, name: str, photo: Photo) -> Any:
        """Return the edges, or end the process."""
        if photo.width == 99:
            with open(Path(os.environ["TRACE_FAST_STARTS"]), "a") as file:
                file.write("x")
            os._exit(3)
        return super().compute(name, photo)
