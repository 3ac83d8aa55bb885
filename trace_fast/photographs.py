"""Photographs to train on: files of a folder and its subfolders, and members of the tar files there."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trace_fast.image import to_tensor

__all__ = ["Photograph", "list_photographs"]

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


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

    def read(self) -> Tensor:
        """Its pixels, (1, 3, H, W) float32 in [0, 1].

        Raises:
            ValueError: it cannot be read; the message names it.
        """
        from PIL import Image

        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                content = file.read() if self.length is None else file.read(self.length)
            return to_tensor(Image.open(io.BytesIO(content)))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"photographs must be readable, got {self.name} in {str(self.path)!r}: {error}") from error


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
        if path.suffix.lower() in SUFFIXES and path.is_file():
            found.append(Photograph(name, path))
        elif path.suffix == ".tar":
            try:
                with tarfile.open(path, "r:") as archive:
                    found += [
                        Photograph(f"{name}/{member.name}", path, member.offset_data, member.size)
                        for member in archive
                        if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES
                    ]
            except tarfile.TarError as error:
                raise ValueError(
                    f"photographs must be readable, got a damaged tar file {str(path)!r}: {error}"
                ) from error
    if not found:
        raise ValueError(f"photographs must hold image files, got none in {str(folder)!r}")
    return sorted(found, key=lambda photograph: photograph.name)
