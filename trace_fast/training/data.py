"""Photos to train on: image files of a folder and its subfolders, and members of the tar files there."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trace_fast.io.archives import list_pictures
from trace_fast.io.folders import describe_left_out, is_picture, walk_folder
from trace_fast.io.images import read_image
from trace_fast.io.pictures import open_picture
from trace_fast.progress import LOGGER, Progress
from trace_fast.training.state import Process

__all__ = ["PhotoFile", "find_damaged", "list_photos", "refuse_damaged", "shuffle_photos"]

REFUSAL = "photos must be readable, got "


@dataclass(frozen=True)
class PhotoFile:
    """An image file, or a member of a tar file that is one.

    Attributes:
        name: path in the folder; of a member of a tar file "archive.tar/member".
        path: the file that has its bytes.
        offset: of its first byte in that file.
        length: in bytes; None is the whole file.
    """

    name: str
    path: Path
    offset: int = 0
    length: int | None = None

    @property
    def key(self) -> str:
        """Name and length, which identify a photo in other files; a replaced photo rarely has the same length."""
        return f"{self.name} {self.length}"

    def read(self) -> Tensor:
        """Return the pixels, (1, 3, H, W) float32 in [0, 1].

        Raises:
            ValueError: the photo is damaged or too small; the message names it.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                content = file.read(self.length)
            return read_image(open_picture("edges: image", io.BytesIO(content), "a file"))
        except Exception as error:  # memory and a missing file included
            raise ValueError(f"{REFUSAL}{self.name} in {str(self.path)!r}: {error}") from error


def list_photos(folder: Path) -> list[PhotoFile]:
    """Return all photos of a folder, sorted by name; files that are left out are counted in a warning of the log.

    Args:
        folder: searched with its subfolders and the tar files in them.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: there is no photo in it, or a tar file is damaged.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"photos must be a folder of image or tar files, got {str(folder)!r}")
    photos: list[PhotoFile] = []
    others: set[Path] = set()  # what is no photo
    other_members: Counter[str] = Counter()
    paths = (here / name for here, _, names in walk_folder(folder, others) for name in names)
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if is_picture(name) and os.path.isfile(path):
            photos.append(PhotoFile(name, path, length=path.stat().st_size))
        elif path.suffix == ".tar" and os.path.isfile(path):
            pictures, left_out_of_it = _list_members(path)
            photos += [PhotoFile(f"{name}/{key}", path, file.offset_data, file.size) for key, file in pictures.items()]
            other_members += left_out_of_it
        else:
            others.add(path)
    left_out = describe_left_out(others, other_members)
    if not photos:
        reason = f": left out {left_out}" if left_out else ""
        raise ValueError(f"photos must be a folder with image files, got none in {str(folder)!r}{reason}")
    # one of several processes that train together
    if left_out and os.environ.get("RANK", "0") == "0":
        LOGGER.warning("left out of %r: %s", str(folder), left_out)
    return sorted(photos, key=lambda photo: photo.name)


def _list_members(path: Path) -> tuple[dict[str, tarfile.TarInfo], Counter[str]]:
    """Return what `list_pictures` does."""
    try:
        with tarfile.open(path, "r:") as archive:
            return list_pictures(archive)
    except tarfile.TarError as error:
        raise ValueError(f"{REFUSAL}a damaged tar file {str(path)!r}: {error}") from error


def shuffle_photos(photos: Sequence[PhotoFile], seed: int) -> list[PhotoFile]:
    """Return photos in an order that depends on the seed and their names.

    A photo that is added or removed does not change the order of the others.

    Args:
        photos: in any order.
        seed: of the order.
    """

    def get_hash(photo: PhotoFile) -> bytes:
        return hashlib.sha256(f"{seed} {photo.name}".encode(errors="surrogateescape")).digest()

    return sorted(photos, key=get_hash)


def find_damaged(photos: Sequence[PhotoFile], quiet: bool = False) -> dict[PhotoFile, str]:
    """Return the photos that are damaged or too small, with the reason for each, after reading them all.

    Args:
        photos: to read.
        quiet: show no progress.
    """
    damaged = {}
    with Progress("checking photos", "image", len(photos), hidden=quiet) as progress:
        for photo in photos:
            try:
                photo.read()
            except ValueError as error:
                damaged[photo] = str(error).removeprefix(REFUSAL)
            progress.update()
    return damaged


def refuse_damaged(photos: Sequence[PhotoFile], skip: bool, process: Process) -> set[PhotoFile]:
    """Return the photos that are damaged or too small, and log them.

    Args:
        photos: to read; every process reads its share.
        skip: continue if there are such photos.
        process: this process.

    Raises:
        ValueError: there are such photos, and `skip` is false; the message lists them.
    """
    shares = process.gather(find_damaged(photos[process.share], quiet=process.index > 0))
    damaged = {photo: reason for share in shares for photo, reason in share.items()}
    lines = "\n  ".join(["", *sorted(damaged.values())])
    if damaged and not skip:
        raise ValueError(f"{REFUSAL}{len(damaged)} damaged or too small; --skip-bad leaves them out:{lines}")
    if damaged and process.index == 0:
        LOGGER.warning("%d photos cannot be read and are left out:%s", len(damaged), lines)
    return set(damaged)
