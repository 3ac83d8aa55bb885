"""Atomic writing of files: a file is complete under its name, or not there."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["write_atomically", "write_files"]


@contextmanager
def write_atomically(path: str | os.PathLike[str], op: str) -> Iterator[BinaryIO]:
    """Write a file that appears under its name in one step, when the block ends without an exception.

    Args:
        path: the file; replaced if it exists, with the same permissions. Where the block raises, it is left as it was.
        op: name of the calling function, for the message.

    Yields:
        A binary file to write to.

    Raises:
        FileNotFoundError: the folder of path does not exist.

    Example:
        >>> with write_atomically("scores.json", "evaluate") as file:
        ...     file.write(b"{}")
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{op}: path must be in an existing folder, got '{path}'")
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    mode = stat.S_IMODE(path.stat().st_mode) if path.is_file() else None

    def create(name: str, flags: int) -> int:
        # nobody else may read what replaces a private file, not even before it is complete
        return os.open(name, flags, 0o666 if mode is None else 0o600)

    try:
        with open(part, "xb", opener=create) as file:
            yield file
        if mode is not None:
            os.chmod(part, mode)
        os.replace(part, path)
    except BaseException:  # Ctrl-C included
        part.unlink(missing_ok=True)
        raise


def write_files(folder: Path, contents: Mapping[str, bytes], op: str) -> None:
    """Write files into a folder, in order, each as `write_atomically` does.

    Args:
        folder: it exists.
        contents: of the files, by name.
        op: name of the calling function, for messages.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    for name, content in contents.items():
        with write_atomically(folder / name, op) as file:
            file.write(content)
