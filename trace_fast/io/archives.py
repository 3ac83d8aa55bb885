"""Selection of the pictures in a tar file, whose names and kinds of members may be anything."""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import PurePosixPath

from trace_fast.io.folders import NO_FILE, get_ending, is_litter, is_picture

__all__ = ["list_pictures"]


def list_pictures(archive: tarfile.TarFile) -> tuple[dict[str, tarfile.TarInfo], Counter[str]]:
    """Return the pictures of a tar file by their names, and how many members are left out, by their endings.

    Names are relative and without "..", so that no file that is named after a member leads out of its folder. Of
    members of one name the last counts, which replaces the others where a tar file is unpacked. Links, and files with
    holes, whose size says nothing about what is stored, are no files.

    Args:
        archive: open, and without compression.

    Raises:
        tarfile.TarError: the archive is damaged.

    Example:
        >>> with tarfile.open("photos.tar", "r:") as archive:  # doctest: +SKIP
        ...     pictures, left_out = list_pictures(archive)
    """
    pictures: dict[str, tarfile.TarInfo] = {}
    left_out: Counter[str] = Counter()
    for member in archive:
        name = "/".join(part for part in PurePosixPath(member.name).parts if part.strip("/") not in ("", ".."))
        if member.isdir() or is_litter(name):
            continue
        if not member.isreg() or member.issparse():
            left_out[NO_FILE] += 1
        elif not is_picture(name):
            left_out[get_ending(name)] += 1
        else:
            pictures[name] = member
    return pictures, left_out
