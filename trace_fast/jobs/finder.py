"""The choice of a model: configuration alone, so that it can be sent to other processes, which load the weights."""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from trace_fast.api import load
from trace_fast.detector import Detector
from trace_fast.tracer import TraceOutput, Tracer

__all__ = ["EdgeFinder"]

SMALL = 10**8  # parameters of a network; larger ones make good use of several threads, and need much memory a pass


@dataclass
class EdgeFinder:
    """A function from an image to its edges. It is pickled without the model, which is loaded where it is first used.

    Attributes:
        model: a name, a repository of the hub or a folder; see `trace_fast.load`.
        stage: 1 or 2; None is 2 where the model has or is a student, else 1. Options of the search choose 1.
        device: where to run; None is the GPU where there is one, else the CPU.
        size: processing size in pixels, (height, width); None is the model's own.
        dtype: name of the dtype of the weights; None is `load`'s choice.
        offload: see `trace_fast.load`.
        revision: of a repository.
        seed: of the Gaussian noise.
        timestep: that the search reads, or "iep"; None is the model's own.
        noising: of the search; None is the model's own.
        batch_size: images of each pass of a student. A pass that has fewer is filled up, so that edges depend on this
            number, by a level of 8 bits in a few pixels, and not on what else is in the pass.
    """

    model: str = "mini"
    stage: int | None = None
    device: str | None = None
    size: tuple[int, int] | None = None
    dtype: str | None = None
    offload: str | None = None
    revision: str | None = None
    seed: int = 0
    timestep: int | str | None = None
    noising: str | None = None
    batch_size: int = 1

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def search(self) -> dict[str, Any]:
        """The options of the search that are given."""
        choices = {"timestep": self.timestep, "noising": self.noising}
        return {name: value for name, value in choices.items() if value is not None}

    @functools.cached_property
    def loaded(self) -> Tracer | Detector:
        """The model; see `trace_fast.load` for what it raises."""
        return load(
            self.model,
            stage=1 if self.search else self.stage,
            device=self.device,
            dtype=None if self.dtype is None else getattr(torch, self.dtype),
            size=self.size,
            offload=self.offload,
            revision=self.revision,
        )

    def load_detector(self) -> Detector:
        """Return the model, which must be a student.

        Raises:
            ValueError: it is the search.
        """
        if not isinstance(self.loaded, Detector):
            raise ValueError(f"edges: grid and batches must be of a student, got the search of {self.model}")
        return self.loaded

    @functools.cached_property
    def is_parallel(self) -> bool:
        """Whether several threads may compute at a time: small students on a CPU, which use many threads badly."""
        model = self.loaded
        return (
            isinstance(model, Detector)
            and model.device.type == "cpu"
            and self.offload is None
            and self.batch_size == 1
            and sum(parameter.numel() for parameter in model.backbone.network.parameters()) < SMALL
        )

    @functools.cached_property
    def replicas(self) -> deque[Detector]:
        """Models that share their weights and that no thread uses."""
        return deque()

    @contextlib.contextmanager
    def borrow_detector(self) -> Iterator[Detector]:
        """Lend a student to one thread."""
        if not self.is_parallel:
            yield self.load_detector()
            return
        try:
            replica = self.replicas.pop()
        except IndexError:
            replica = self.load_detector().replicated()
        try:
            yield replica
        finally:
            self.replicas.append(replica)

    def get_group(self, photo: Tensor) -> Hashable:
        """Return what images of one pass have in common: the size at which the decoder sees them.

        Args:
            photo: (1, 3, H, W).
        """
        if self.batch_size == 1:
            return None
        detector = self.load_detector()
        return detector.decoder.photo_size((photo.shape[2], photo.shape[3]), detector.size)

    def find(
        self, photos: Sequence[Tensor], curve: bool = False, grid: bool = False
    ) -> list[tuple[Tensor, TraceOutput | None]]:
        """Return the edges of images of one group and, where an option of the search is given, its whole output.

        Args:
            photos: (1, 3, H, W) float32 in [0, 1] each; at most `batch_size`.
            curve: let the search return its KL curve.
            grid: return edges at the size of the decoder's output.

        Returns:
            (1, 1, H, W) float32 in [0, 1], and the output or None, of each.
        """
        model = self.loaded
        if isinstance(model, Detector):
            filled = [*photos, *[photos[-1]] * (self.batch_size - len(photos))]
            with self.borrow_detector() as detector:
                edges = detector.detect(filled, grid)
            return [(one, None) for one in edges[: len(photos)]]
        if self.search or curve:
            outputs = [model(photo, seed=self.seed, return_kl=curve, **self.search) for photo in photos]
            return [(traced.edges, traced) for traced in outputs]
        return [(model.edges(photo, seed=self.seed), None) for photo in photos]

    def get_timestep(self, traced: TraceOutput | None) -> int | None:
        """Return the timestep whose attention was read; None where it was searched and is not known.

        Args:
            traced: the second of what `find` returns for an image.
        """
        timestep = self.loaded.timestep if traced is None else int(traced.timestep[0])
        return timestep if isinstance(timestep, int) else None

    def describe(self) -> dict[str, Any]:
        """Return what edges depend on beside the image, for JSON; two models of one name differ in their weights.

        Raises:
            ValueError: there are batches of the search.
        """
        model = self.loaded if self.batch_size == 1 else self.load_detector()
        settings = asdict(self) | self.search
        own = {
            "stage": 1 if isinstance(model, Tracer) else 2,
            "timestep": self.search.get("timestep", model.timestep),
            "size": list(model.size),
            "device": model.device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "weights": model.hash_weights(),
        }
        del settings["offload"]  # which has no effect on the edges
        return settings | own
