"""Files of what models find in photos, such as the divergences of the teacher; each photo is searched once."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trace_fast.io.files import write_atomically, write_tensors
from trace_fast.progress import LOGGER, Progress
from trace_fast.training.data import PhotoFile
from trace_fast.training.state import require_same

__all__ = ["Shards", "cut"]


def cut(photos: Sequence[PhotoFile], length: int) -> list[Sequence[PhotoFile]]:
    """Return pieces of a list, in order, each of a length but the last one.

    Example:
        >>> cut("abcde", 2)
        ['ab', 'cd', 'e']
    """
    return [photos[start : start + length] for start in range(0, len(photos), length)]


class Shards:
    """A map for each photo of a list, in files.

    A file names the photos whose maps it has. These are found by name, so that photos may be added to and removed from
    the list between runs. The name of a file follows from its source and its photos, so that several runs may share a
    folder at any time: no run replaces the results that another one found for other photos.

    Args:
        folder: of the files; created if it is missing.
        source: description of what the maps depend on beside their photo, as JSON.
        photos: the whole list, in order.
    """

    def __init__(self, folder: Path, source: str, photos: Sequence[PhotoFile]):
        self.folder, self.source, self.photos = folder, source, photos

    @functools.cached_property
    def rows(self) -> dict[str, tuple[Path, int]]:
        """File and row of every photo that is in a file, by its key; read once.

        A damaged file is logged, and its photos are searched again.

        Raises:
            ValueError: a file belongs to another source.
        """
        rows: dict[str, tuple[Path, int]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                keys = self._read_keys(path)
            except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
                LOGGER.warning("%s is damaged, its photos are searched again: %s", path, error)
                continue
            rows |= {key: (path, row) for row, key in enumerate(keys)}
        return rows

    def _read_keys(self, path: Path) -> list[str]:
        """Return the keys of the photos of a file, in the order of its rows; refuse one of another source."""
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata() or {}
        content = "labels of the same teacher"
        require_same("distill", "labels_dir", content, metadata.get("teacher"), self.source, path)
        return list(json.loads(metadata["photographs"]))

    def list_missing(self) -> list[PhotoFile]:
        """Return the photos that are in no file.

        Raises:
            ValueError: there are files, but of other photos alone, or of another source.
        """
        missing = [photo for photo in self.photos if photo.key not in self.rows]
        if self.rows and len(missing) == len(self.photos):
            raise ValueError(
                "distill: labels_dir must be empty or hold labels of the same photos, got those of other photos alone "
                f"in {str(self.folder)!r}"
            )
        return missing

    def write(
        self, find: Callable[[Tensor], Tensor], photos: Sequence[PhotoFile], length: int, share: slice = slice(None)
    ) -> None:
        """Find the maps of photos that are missing, and write them.

        Args:
            find: returns the map of an image (1, 3, H, W) in [0, 1], as it is to be stored.
            photos: those that are missing.
            length: photos in a file, at most.
            share: the files that this process writes, of those for all `photos`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = cut(photos, length)[share]
        with Progress("searching", "image", sum(map(len, parts))) as progress:
            for part in parts:
                maps = {}
                for row, photo in enumerate(part):
                    maps[str(row)] = find(photo.read()).cpu()
                    progress.update()
                keys = json.dumps([photo.key for photo in part])
                name = hashlib.sha256(json.dumps([self.source, keys]).encode()).hexdigest()[:32]
                with write_atomically(self.folder / f"{name}.safetensors", "distill") as file:
                    write_tensors(file, maps, {"teacher": self.source, "photographs": keys})

    def read(self, index: int) -> Tensor:
        """Return the map of a photo by its index in the list, as it was stored.

        Raises:
            ValueError: the file does not have the photo any longer, since something has replaced it.
        """
        key = self.photos[index].key
        path = self.folder
        if key in self.rows:
            path, row = self.rows[key]
            file, keys = self._open(path)
            if keys[row : row + 1] == [key]:
                tensor: Tensor = file.get_tensor(str(row))
                return tensor
        raise ValueError(
            f"distill: labels_dir must keep its files while they are used, got one without {key!r} in {str(path)!r}"
        )

    @functools.lru_cache(maxsize=256)  # noqa: B019 (one object a run)
    def _open(self, path: Path) -> tuple[Any, list[str]]:
        """Return a file and the keys of its rows."""
        file: Any = safe_open(path, "pt")
        return file, list(json.loads((file.metadata() or {}).get("photographs", "[]")))
