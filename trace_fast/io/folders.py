"""Selection of the pictures in a folder: files of operating systems are skipped, and others are counted."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath

__all__ = [
    "HEIF_HINT",
    "HEIF_SUFFIXES",
    "IMAGE_SUFFIXES",
    "NO_FILE",
    "describe_left_out",
    "get_ending",
    "is_litter",
    "is_picture",
    "reads_heif",
    "walk_folder",
]

# names of image files in folders end in one of these
IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
HEIF_SUFFIXES = (".heic", ".heif")  # likewise, where pillow-heif is installed
HEIF_HINT = "pip install 'trace_fast[heif]', or convert HEIC to JPEG or PNG"
# files of Windows; those of macOS begin with a dot or are in a folder of archives
LITTER = ("desktop.ini", "ehthumbs.db", "thumbs.db", "__macosx")
NO_FILE = "no file"  # in place of an ending


def is_litter(path: str | PurePath) -> bool:
    """Return whether an operating system, and not the user, has left a file or a folder.

    Args:
        path: relative to the folder that is read, or a member of an archive; each of its parts counts.

    Example:
        >>> is_litter("photos/._a.jpg"), is_litter("photos/a.jpg")
        (True, False)
    """
    return any(part.startswith(".") or part.lower() in LITTER for part in PurePath(path).parts)


def is_picture(path: str | PurePath) -> bool:
    """Return whether a file, or a member of an archive, is a picture by its name, and no litter.

    Args:
        path: as in `is_litter`.

    Example:
        >>> is_picture("photos/a.JPG"), is_picture("photos/._a.jpg"), is_picture("a.txt")
        (True, False, False)
    """
    suffix = PurePath(path).suffix.lower()
    return (suffix in IMAGE_SUFFIXES or (suffix in HEIF_SUFFIXES and reads_heif())) and not is_litter(path)


def reads_heif() -> bool:
    """Return whether pillow-heif is installed, which reads HEIC."""
    return importlib.util.find_spec("pillow_heif") is not None


def get_ending(path: str | PurePath) -> str:
    """Return the ending of a name in lower case, or that it has none.

    Args:
        path: of a file, or a member of an archive.

    Example:
        >>> get_ending("a/notes.TXT"), get_ending("README")
        ('.txt', 'no ending')
    """
    return PurePath(path).suffix.lower() or "no ending"


def walk_folder(folder: Path, left_out: set[Path]) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Walk a folder and its subfolders, without litter.

    Args:
        folder: where to begin.
        left_out: subfolders that are links, or that cannot be read, are added; they are not entered.

    Yields:
        A folder, the names of its subfolders, and those of its files. Subfolders that are removed from their list are
        not entered.

    Raises:
        OSError: the folder itself cannot be read.
    """

    def leave_out(error: OSError) -> None:
        if error.filename == os.fspath(folder):
            raise error
        left_out.add(Path(error.filename))

    for parent, folders, names in os.walk(folder, onerror=leave_out):
        here = Path(parent)
        folders[:] = [name for name in folders if not is_litter(name)]
        left_out |= {here / name for name in folders if os.path.islink(here / name)}
        yield here, folders, [name for name in names if not is_litter(name)]


def describe_left_out(entries: Iterable[Path], members: Mapping[str, int] = {}) -> str:
    """Return what is left out of the entries of a folder, and of archives, and why.

    Args:
        entries: of the folder, with those of its subfolders if these are read. Litter is not counted.
        members: of archives that are left out: how many, by ending, or `NO_FILE`.

    Returns:
        One line; empty where nothing is left out.

    Example:
        >>> describe_left_out([Path("a.heic"), Path("a.jpg"), Path("notes.txt")])  # doctest: +SKIP
        "2 files of other formats (.heic, .txt): pip install 'trace_fast[heif]', or convert HEIC to JPEG or PNG"
    """
    endings = Counter(members)
    subfolders, broken = 0, endings.pop(NO_FILE, 0)
    for entry in entries:
        if is_litter(entry.name):
            continue
        # not the methods of Path, which raise where a link leads to what may not be read
        if os.path.isdir(entry):
            subfolders += 1
        elif not os.path.isfile(entry):
            broken += 1
        elif not is_picture(entry.name):
            endings[get_ending(entry)] += 1
    reasons = []
    if endings:
        count = endings.total()
        kind = "file of another format" if count == 1 else "files of other formats"
        text = f"{count} {kind} ({', '.join(sorted(endings))})"
        reasons.append(text + f": {HEIF_HINT}" * any(end in HEIF_SUFFIXES for end in endings))
    if subfolders:
        reasons.append(f"{subfolders} subfolder{'s' * (subfolders > 1)}, not read")
    if broken:
        reasons.append(f"{broken} that {'are' if broken > 1 else 'is'} no file, such as a link to nothing")
    return "; ".join(reasons)
