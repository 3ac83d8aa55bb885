"""Files that are whole or not there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["write_atomically"]


@contextmanager
def write_atomically(path: str | os.PathLike[str], op: str) -> Iterator[BinaryIO]:
    """A file that appears under its name only when the block ends well, and in one step; else `path` is as it was."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{op}: path must be in an existing folder, got '{path}'")
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with open(part, "xb") as file:
            yield file
        os.replace(part, path)
    except BaseException:  # Ctrl-C included
        part.unlink(missing_ok=True)
        raise
