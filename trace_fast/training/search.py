"""The search of photos for what their labels are computed from: the divergences of the teacher, the edges of a student.

Files of the results are found by their content, so that processes which search parts of the photos share a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trace_fast.backbones.base import Backbone
from trace_fast.detector import Detector, StudentPass
from trace_fast.io.images import resize
from trace_fast.tracer import Tracer
from trace_fast.training.batches import PREVIEW
from trace_fast.training.data import PhotoFile, refuse_damaged
from trace_fast.training.shards import Shards, cut
from trace_fast.training.state import Process

if TYPE_CHECKING:
    from trace_fast.training.distillation import DistillConfig

__all__ = ["HELPER_SCALES", "check_student", "list_missing", "make_search", "search_photos", "take_photos"]

HELPER_SCALES = (1.0, 1.25)  # sizes at which a student that helps to label sees a photo, relative to its own


def list_missing(config: DistillConfig, photos: Sequence[PhotoFile]) -> list[tuple[Shards, list[PhotoFile]]]:
    """Return the photos that are in no file yet, of the part that the configuration names, each with its files.

    Args:
        config: of the run.
        photos: all of them, in order.

    Returns:
        The divergences, then the edges of the student that helps, where there is one, and what each lacks.

    Raises:
        ValueError: the files are of another teacher, or of other photos alone.
    """
    # the part follows from all photos, so that it does not matter what other processes have written
    own = {photo for piece in cut(photos, config.shard)[config.get_part().share] for photo in piece}
    sources = [config.open_divergences(photos), config.open_helper(photos)]
    return [(shards, [photo for photo in shards.list_missing() if photo in own]) for shards in sources if shards]


def search_photos(
    config: DistillConfig,
    photos: Sequence[PhotoFile],
    missing: Sequence[tuple[Shards, list[PhotoFile]]],
    process: Process,
    load_tracer: Callable[[tuple[int, int] | None], Tracer],
) -> set[PhotoFile]:
    """Search the photos that are in no file yet.

    Args:
        config: of the run.
        photos: all of them, in order.
        missing: see `list_missing`.
        process: this process; those of a run share the search.
        load_tracer: returns the teacher at a size.

    Returns:
        The photos that should have been searched, and are damaged.

    Raises:
        ValueError: photos are damaged, and the configuration does not skip them, or too few others are left.
    """
    loaders: list[Callable[[], Callable[[Tensor], Tensor]]] = [
        lambda: make_search(config, load_tracer(config.teacher_size or config.size)),
        lambda: load_helper(config, process.device),
    ]
    searches = [(shards, part, load()) for (shards, part), load in zip(missing, loaders, strict=False) if part]
    if not searches:
        return set()
    damaged = refuse_damaged(
        list(dict.fromkeys(photo for _, part, _ in searches for photo in part)), config.skip_bad, process
    )
    take_photos(config, [photo for photo in photos if photo not in damaged])
    for shards, part, find in searches:
        shards.write(find, [photo for photo in part if photo not in damaged], config.shard, process.share)
    process.wait()
    return damaged


def take_photos(config: DistillConfig, photos: Sequence[PhotoFile]) -> Sequence[PhotoFile]:
    """Return those of the photos that the run uses; ValueError if they are too few."""
    needed = PREVIEW + (config.count_scenes() < config.batch)
    if len(photos) < needed:
        raise ValueError(f"distill: images must be at least {needed} photos, got {len(photos)}")
    return photos if needed > PREVIEW else photos[:PREVIEW]


def check_student(config: DistillConfig, backbone: Backbone) -> None:
    """Refuse options of the student that the network does not allow."""
    if config.size is not None:
        backbone.grids(config.size)
    if config.checkpointing and not hasattr(backbone.network, "enable_gradient_checkpointing"):
        raise ValueError(f"distill: checkpointing must be off for a network not of diffusers, got {config.model!r}")


def make_search(config: DistillConfig, teacher: Tracer) -> Callable[[Tensor], Tensor]:
    """Return the search of a photo (1, 3, H, W) for its divergence, (1, h, w) float16 in nats."""
    check_student(config, teacher.backbone)

    def find(photo: Tensor) -> Tensor:
        output = teacher(
            photo,
            timestep=config.teacher_timestep,
            noising=config.teacher_noising,
            seed=config.seed,
            return_abdiv=True,
        )
        assert output.abdiv is not None
        return output.abdiv.half()

    return find


def load_helper(config: DistillConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the search of a photo (1, 3, H, W) for a student's edges, (1, 1, h, w) uint8, as its decoder sees it.

    They are averaged over the photo and its mirrored copy, and over two sizes at which the decoder sees them.
    """
    detector = Detector.from_pretrained(str(config.labels_student), device=device)
    decoder, (height, width) = detector.decoder, detector.size
    student = StudentPass(detector.backbone, decoder, detector.timestep)

    @torch.no_grad()
    def average(photo: Tensor) -> Tensor:
        shape = (photo.shape[-2], photo.shape[-1])
        copies = torch.cat([photo, photo.flip(-1)]).to(device)
        readout = student.read(resize(copies, detector.size))
        target = decoder.photo_size(shape, detector.size) or decoder.grid
        maps: list[Tensor] = []
        for scale in HELPER_SCALES:
            size = decoder.photo_size(shape, (round(scale * height), round(scale * width)))
            logits = decoder(readout, None if size is None else resize(copies, size)).float()
            maps.append(resize(logits, target).sigmoid())
        edges = torch.stack(maps).mean(0)
        return ((edges[:1] + edges[1:].flip(-1)) / 2 * 255).round().byte()

    return average
