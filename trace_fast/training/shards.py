"""Files of the divergences that the search gave, by photograph: searched once, read in every epoch and by every run."""

from __future__ import annotations

import functools
import itertools
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
from trace_fast.training.data import Photograph
from trace_fast.training.state import require_same

__all__ = ["Shards"]


class Shards:
    """The pseudo edges of a list of photographs: in files that are whole or not there.

    A file tells the photographs that it is of. They are found by that, so that others may come and go.

    Args:
        folder: of the files; made where it is missing.
        teacher: what the divergences depend on beside their photograph, as JSON.
        photographs: all of them, in order.
    """

    def __init__(self, folder: Path, teacher: str, photographs: Sequence[Photograph]):
        self.folder, self.teacher, self.photographs = folder, teacher, photographs

    @functools.cached_property
    def places(self) -> dict[str, tuple[Path, int]]:
        """File and row of what was there when this was asked for first. A damaged file is told, and made again.

        Raises:
            ValueError: a file is of another teacher.
        """
        places: dict[str, tuple[Path, int]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as stored:
                    metadata = stored.metadata() or {}
            except (SafetensorError, OSError) as error:
                tqdm.write(f"trace-fast: {path} is damaged and made again: {error}", file=sys.stderr)
                continue
            require_same("distill", "teacher and photographs", metadata.get("teacher"), self.teacher, path)
            places |= {key: (path, row) for row, key in enumerate(json.loads(metadata["photographs"]))}
        return places

    def missing(self) -> list[Photograph]:
        """Photographs whose pseudo edges are not there.

        Raises:
            ValueError: files are there, but of other photographs alone, or of another teacher.
        """
        missing = [photograph for photograph in self.photographs if photograph.key not in self.places]
        if self.places and len(missing) == len(self.photographs):
            raise ValueError(
                "distill: output must be empty or hold a run of the same teacher and photographs, got others alone in "
                f"{str(self.folder)!r}"
            )
        return missing

    def make(
        self,
        search: Callable[[Tensor], TraceOutput],
        photographs: Sequence[Photograph],
        length: int,
        share: slice = slice(None),
    ) -> None:
        """Search photographs that are missing.

        Args:
            search: gives the divergences of an image (1, 3, H, W) in [0, 1].
            photographs: those that are missing.
            length: photographs in a file, at most.
            share: the files to make here, of those of all the photographs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        taken = {path for path, _ in self.places.values()}
        paths = (self.folder / f"{number:06d}.safetensors" for number in itertools.count())
        free = (path for path in paths if path not in taken)
        starts = range(0, len(photographs), length)
        parts = [(next(free), photographs[start : start + length]) for start in starts][share]
        with tqdm(total=sum(len(part) for _, part in parts), desc="pseudo edges", unit="image", disable=None) as bar:
            for path, part in parts:
                strengths, levels = [], []
                for photograph in part:
                    traced = search(photograph.read())
                    assert traced.abdiv is not None
                    strengths.append(traced.abdiv.half().cpu())
                    levels.append(traced.timestep.cpu())
                    bar.update()
                tensors = {"abdiv": torch.cat(strengths), "timestep": torch.cat(levels)}
                keys = json.dumps([photograph.key for photograph in part])
                with write_atomically(path, "distill") as file:
                    file.write(save(tensors, {"teacher": self.teacher, "photographs": keys}))

    def read(self, indices: Sequence[int]) -> Tensor:
        """ABDiv (B, h, w) float32 of photographs by their place in the list."""
        rows = []
        for index in indices:
            path, row = self.places[self.photographs[index].key]
            rows.append(self._open(path).get_slice("abdiv")[row : row + 1])
        return torch.cat(rows).float()

    @functools.lru_cache(maxsize=256)  # noqa: B019 (one object a run)
    def _open(self, path: Path) -> Any:
        return safe_open(path, "pt")
