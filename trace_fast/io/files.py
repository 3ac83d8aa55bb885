"""Atomic writing of files: a file is complete under its name, or not there."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["format_json", "write_atomically", "write_files", "write_tensors"]

# of disks, and of users who have used their share of one
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


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
        OSError: the folder cannot be written to, or its disk is full; the message names it.

    Example:
        >>> with write_atomically("scores.json", "evaluate") as file:
        ...     file.write(b"{}")
    """
    path = Path(path)
    if not os.path.isdir(path.parent):
        raise FileNotFoundError(f"{op}: path must be in an existing folder, got '{path}'")
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    mode = stat.S_IMODE(path.stat().st_mode) if os.path.isfile(path) else None

    def create(name: str, flags: int) -> int:
        # nobody else may read what replaces a private file, not even before it is complete
        return os.open(name, flags, 0o666 if mode is None else 0o600)

    try:
        with open(part, "xb", opener=create) as file:
            yield file
        if mode is not None:
            os.chmod(part, mode)
        os.replace(part, path)
    except BaseException as error:  # Ctrl-C included
        with suppress(OSError):  # such as a folder that is gone
            part.unlink()
        if isinstance(error, OSError) and error.errno in FULL and error.filename is None:
            reason = f"{op}: the disk must have room for {path.name}, got {error.strerror!r} in the folder"
            raise OSError(error.errno, reason, str(path.parent)) from error
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


def format_json(data: Any) -> str:
    r"""Return the text of a JSON file, with null in place of numbers that are not finite, which JSON has not.

    Args:
        data: nested mappings, lists and tuples.

    Example:
        >>> format_json({"mean": float("nan")})
        '{\n "mean": null\n}\n'
    """

    def replace(data: Any) -> Any:
        if isinstance(data, Mapping):
            return {name: replace(value) for name, value in data.items()}
        if isinstance(data, (list, tuple)):
            return [replace(value) for value in data]
        return None if isinstance(data, float) and not math.isfinite(data) else data

    return json.dumps(replace(data), indent=1, allow_nan=False) + "\n"


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes follow from its content: safetensors itself shuffles metadata.

    Args:
        file: to write to.
        tensors: by name, contiguous.
        metadata: by name.
    """
    from safetensors.torch import save

    content = memoryview(save(dict(tensors), dict(metadata)))
    data = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:data])) | {"__metadata__": dict(sorted(metadata.items()))}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    file.write(content[data:])
