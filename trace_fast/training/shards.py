"""Files of the divergences that the teacher's search gives for photos; each photo is searched once."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from trace_fast.io.files import write_atomically
from trace_fast.tracer import TraceOutput
from trace_fast.training.data import PhotoFile
from trace_fast.training.state import require_same

__all__ = ["Shards"]


class Shards:
    """The divergences of a list of photos, in files.

    A file names the photos whose divergences it has. These are found by name, so that photos may be added to and
    removed from the list between runs. The name of a file follows from its teacher and its photos, so that several runs
    may share a folder at any time: no run replaces the results that another one found for other photos.

    Args:
        folder: of the files; created if it is missing.
        teacher: description of what the divergences depend on beside their photo, as JSON.
        photos: the whole list, in order.
    """

    def __init__(self, folder: Path, teacher: str, photos: Sequence[PhotoFile]):
        self.folder, self.teacher, self.photos = folder, teacher, photos

    @functools.cached_property
    def rows(self) -> dict[str, tuple[Path, int]]:
        """File and row of every photo that is in a file, by its key; read once.

        A damaged file is reported on stderr, and its photos are searched again.

        Raises:
            ValueError: a file belongs to another teacher.
        """
        rows: dict[str, tuple[Path, int]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                keys = self._read_keys(path)
            except (SafetensorError, OSError) as error:
                tqdm.write(f"trace-fast: {path} is damaged, its photos are searched again: {error}", file=sys.stderr)
                continue
            rows |= {key: (path, row) for row, key in enumerate(keys)}
        return rows

    def _read_keys(self, path: Path) -> list[str]:
        """Return the keys of the photos of a file, in the order of its rows; refuse one of another teacher."""
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata() or {}
        content = "labels of the same teacher"
        require_same("distill", "labels_dir", content, metadata.get("teacher"), self.teacher, path)
        return list(json.loads(metadata["photographs"]))

    def list_missing(self) -> list[PhotoFile]:
        """Return the photos that are in no file.

        Raises:
            ValueError: there are files, but of other photos alone, or of another teacher.
        """
        missing = [photo for photo in self.photos if photo.key not in self.rows]
        if self.rows and len(missing) == len(self.photos):
            raise ValueError(
                "distill: labels_dir must be empty or hold labels of the same photos, got those of other photos alone "
                f"in {str(self.folder)!r}"
            )
        return missing

    def write(
        self,
        search: Callable[[Tensor], TraceOutput],
        photos: Sequence[PhotoFile],
        length: int,
        share: slice = slice(None),
        student: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Search photos that are missing, and write their divergences, and the edges of a student.

        Args:
            search: returns the divergence of an image (1, 3, H, W) in [0, 1].
            photos: those that are missing.
            length: photos in a file, at most.
            share: the files that this process writes, of those for all `photos`.
            student: returns edges (1, 1, h, w) in [0, 1] of an image; None writes none.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = [photos[start : start + length] for start in range(0, len(photos), length)][share]
        with tqdm(total=sum(map(len, parts)), desc="searching", unit="image", disable=None) as bar:
            for part in parts:
                divergences, timesteps, edges = [], [], {}
                for row, photo in enumerate(part):
                    pixels = photo.read()
                    output = search(pixels)
                    assert output.abdiv is not None
                    divergences.append(output.abdiv.half().cpu())
                    timesteps.append(output.timestep.cpu())
                    if student is not None:  # of any size, so that rows cannot be stacked
                        edges[f"student.{row}"] = (student(pixels) * 255).round().byte().cpu()
                    bar.update()
                tensors = {"abdiv": torch.cat(divergences), "timestep": torch.cat(timesteps), **edges}
                keys = json.dumps([photo.key for photo in part])
                name = hashlib.sha256(json.dumps([self.teacher, keys]).encode()).hexdigest()[:32]
                with write_atomically(self.folder / f"{name}.safetensors", "distill") as file:
                    file.write(save(tensors, {"teacher": self.teacher, "photographs": keys}))

    def read(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Return the teacher's results for a photo by its index in the list.

        Returns:
            abdiv: (1, h, w) float32, in nats.
            student: (1, 1, h', w') float32 in [0, 1], the edges of the student that helps the teacher, or None.

        Raises:
            ValueError: the file does not have the photo any longer, since something has replaced it.
        """
        key = self.photos[index].key
        path, row = self.rows[key]
        file, keys = self._open(path)
        if keys[row : row + 1] != [key]:
            raise ValueError(
                f"distill: labels_dir must keep its files while they are used, got one without {key!r} in {str(path)!r}"
            )
        name = f"student.{row}"
        student = file.get_tensor(name).float() / 255 if name in file.keys() else None  # noqa: SIM118 (no mapping)
        return file.get_slice("abdiv")[row : row + 1].float(), student

    @functools.lru_cache(maxsize=256)  # noqa: B019 (one object a run)
    def _open(self, path: Path) -> tuple[Any, list[str]]:
        """Return a file and the keys of its rows."""
        file: Any = safe_open(path, "pt")
        return file, list(json.loads((file.metadata() or {}).get("photographs", "[]")))
