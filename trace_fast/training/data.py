"""Photographs to train on: files of a folder and its subfolders, and members of the tar files there."""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from trace_fast.io.images import IMAGE_SUFFIXES, read_image
from trace_fast.training.state import Process

__all__ = ["Photograph", "find_bad", "find_damaged", "in_order", "list_photographs"]

REFUSAL = "photographs must be readable, got "


@dataclass(frozen=True)
class Photograph:
    """Where the bytes of a picture lie.

    Attributes:
        name: path in the folder, for a member of a tar file "archive.tar/member"; its own in the folder.
        path: the file that holds it.
        start: of its bytes there.
        length: of its bytes; None for the whole file.
    """

    name: str
    path: Path
    start: int = 0
    length: int | None = None

    @property
    def key(self) -> str:
        """Name and length, by which files of results know it: another file of the same name is seldom as long."""
        return f"{self.name} {self.length}"

    def read(self) -> Tensor:
        """Its pixels, (1, 3, H, W) float32 in [0, 1].

        Raises:
            ValueError: it cannot be read; the message names it.
        """
        from PIL import Image, UnidentifiedImageError

        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                content = file.read(self.length)
            return read_image(Image.open(io.BytesIO(content)))
        except Exception as error:  # each format's reader fails in its own way on damaged bytes
            # Pillow's own words are of an object in memory
            reason = "Pillow cannot read it" if isinstance(error, UnidentifiedImageError) else error
            raise ValueError(f"{REFUSAL}{self.name} in {str(self.path)!r}: {reason}") from error


def list_photographs(folder: Path) -> list[Photograph]:
    """Every photograph of a folder, by name.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds none, or a tar file is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"photographs must be a folder of image or tar files, got {str(folder)!r}")
    found: list[Photograph] = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            found.append(Photograph(name, path, length=path.stat().st_size))
        elif path.suffix == ".tar":
            try:
                with tarfile.open(path, "r:") as archive:
                    found += [
                        Photograph(f"{name}/{member.name}", path, member.offset_data, member.size)
                        for member in archive
                        if member.isfile() and Path(member.name).suffix.lower() in IMAGE_SUFFIXES
                    ]
            except tarfile.TarError as error:
                raise ValueError(f"{REFUSAL}a damaged tar file {str(path)!r}: {error}") from error
    if not found:
        raise ValueError(f"photographs must hold image files, got none in {str(folder)!r}")
    return sorted(found, key=lambda photograph: photograph.name)


def find_damaged(photographs: Iterable[Photograph], quiet: bool = False) -> dict[Photograph, str]:
    """Those that are damaged or too small, and what is wrong with each: all are read, before hours of work.

    Args:
        photographs: to read.
        quiet: show no progress.
    """
    found = {}
    for photograph in tqdm(photographs, desc="checking photographs", unit="image", disable=True if quiet else None):
        try:
            photograph.read()
        except ValueError as error:
            found[photograph] = str(error).removeprefix(REFUSAL)
    return found


def in_order(photographs: Sequence[Photograph], seed: int) -> list[Photograph]:
    """Shuffled with a seed, so that adding or removing one moves no other: by a hash of each one's name."""

    def place(photograph: Photograph) -> bytes:
        return hashlib.sha256(f"{seed} {photograph.name}".encode(errors="surrogateescape")).digest()

    return sorted(photographs, key=place)


def find_bad(photographs: Sequence[Photograph], skip: bool, process: Process) -> dict[Photograph, str]:
    """Those that cannot be read, of which each process reads its share: refused, or told once and to be left out."""
    found = process.gather(find_damaged(photographs[process.share], quiet=process.index > 0))
    bad = {photograph: told for each in found for photograph, told in each.items()}
    lines = "\n  ".join(["", *sorted(bad.values())])
    if bad and not skip:
        raise ValueError(f"{REFUSAL}{len(bad)} damaged or too small; --skip-bad goes on without:{lines}")
    if bad and process.index == 0:
        tqdm.write(
            f"trace-fast: photographs that cannot be read are left out, {len(bad)} of them:{lines}", file=sys.stderr
        )
    return bad
