"""What edges do for masks: a baseline's masks, split and completed by the edges of each method, and scored again."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from trace_fast.evaluation.data import Photo
from trace_fast.evaluation.methods import Method
from trace_fast.evaluation.run import over_photos, place_of, read_kept, stamp_of
from trace_fast.io.files import write_atomically
from trace_fast.masks import coco
from trace_fast.masks.formats import MaskSet
from trace_fast.masks.propagation import propagate

__all__ = ["refine_all"]


def refine_all(
    photos: Sequence[Photo],
    truth: coco.Instances,
    baseline: coco.Instances,
    method: Method,
    folder: Path,
    *,
    threshold: float,
    mode: str = "flood",
) -> coco.Instances:
    """Propagate the masks of every photo by a method's edges; finished photos are read from files of an earlier run.

    Args:
        photos: a data set.
        truth: its instances, from `run.read_truth`, whose image ids are those of the baseline.
        baseline: the masks; photos without any keep none.
        method: what makes the edges.
        folder: where results go, one file a photo, in a folder below it for each method and setting.
        threshold: see `trace_fast.propagate`.
        mode: see `trace_fast.propagate`.

    Returns:
        The masks as they became, with scores.
    """
    place = place_of(folder, method, threshold, mode)
    ids = {photo.name: number for photo, number in zip(photos, truth.images, strict=True)}
    one_at_a_time = nullcontext() if method.threads else threading.Lock()

    def run(photo: Photo) -> coco.ImageInstances:
        number = ids[photo.name]
        if number not in baseline.images:
            return replace(truth.images[number], instances=[])
        given = baseline.images[number]
        file = place / f"{photo.name}.json"
        masks = hashlib.sha256(b"".join(b"%s %r" % (each.counts, each.score) for each in given.instances)).hexdigest()
        stamp = stamp_of(photo.truth, method.source(photo), *photo.more, masks)

        def read(file: Path) -> list[coco.Instance] | None:
            kept = json.loads(file.read_bytes())
            if kept["stamp"] != stamp:
                return None
            return [
                coco.Instance(each["counts"].encode(), 1, each["area"], False, each["score"]) for each in kept["masks"]
            ]

        if (found := read_kept(file, read)) is not None:
            return coco.ImageInstances(number, given.height, given.width, photo.name, found)
        with one_at_a_time:
            edges = method.edges(photo)
        scores = torch.tensor([each.score for each in given.instances], dtype=torch.float32)
        result = propagate(MaskSet(torch.from_numpy(given.masks()), scores), edges, threshold=threshold, mode=mode)
        made = coco.encode_masks(result.masks.numpy(), result.scores.numpy(), id=number, file_name=photo.name)
        records = [{"counts": each.counts.decode(), "area": each.area, "score": each.score} for each in made.instances]
        with write_atomically(file, "evaluate") as out:
            out.write(json.dumps({"stamp": stamp, "masks": records}).encode())
        return made

    return coco.Instances({image.id: image for image in over_photos(run, photos, method.name)}, {})
