"""Masks refined by edges: the masks of a baseline, split and completed by the edges of a method, and kept in files."""

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
from trace_fast.evaluation.run import make_results_folder, make_stamp, map_photos, read_cached
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
    threshold: float | None,
    mode: str = "fit",
) -> coco.Instances:
    """Propagate the masks of every photo by a method's edges; finished photos are read from files of an earlier run.

    Args:
        photos: of one data set.
        truth: its instances, from `read_truth`, whose image ids are those of the baseline.
        baseline: masks to refine; photos without masks stay without masks.
        method: source of the edge maps.
        folder: where results are kept, one file a photo, in a folder below it for each method and setting.
        threshold: see `trace_fast.propagate`.
        mode: see `trace_fast.propagate`.

    Returns:
        The refined masks, with scores.
    """
    results = make_results_folder(folder, method, threshold, mode)
    ids = {photo.name: number for photo, number in zip(photos, truth.images, strict=True)}
    lock = nullcontext() if method.threads else threading.Lock()

    def refine(photo: Photo) -> coco.ImageInstances:
        number = ids[photo.name]
        if number not in baseline.images:
            return replace(truth.images[number], instances=[])
        image = baseline.images[number]
        file = results / f"{photo.name}.json"
        texts = [b"%s %r" % (instance.counts, instance.score) for instance in image.instances]
        masks = hashlib.sha256(b"".join(texts)).hexdigest()
        stamp = make_stamp(photo.truth, method.source(photo), *photo.dependencies, masks)
        if (cached := _read_instances(file, stamp)) is not None:
            return coco.ImageInstances(number, image.height, image.width, photo.name, cached)
        with lock:
            edges = method.edges(photo)
        scores = torch.tensor([instance.score for instance in image.instances], dtype=torch.float32)
        refined = propagate(MaskSet(torch.from_numpy(image.masks()), scores), edges, threshold=threshold, mode=mode)
        assert refined.scores is not None  # as those before
        instances = coco.encode_masks(refined.masks.numpy(), refined.scores.numpy(), id=number, file_name=photo.name)
        _write_instances(file, stamp, instances.instances)
        return instances

    return coco.Instances({image.id: image for image in map_photos(refine, photos, method.name)}, {})


def _read_instances(file: Path, stamp: str) -> list[coco.Instance] | None:
    """Read the instances of an earlier run; None unless the file is whole, and its sources have not changed since."""

    def read(file: Path) -> list[coco.Instance] | None:
        data = json.loads(file.read_bytes())
        if data["stamp"] != stamp:
            return None
        return [coco.Instance(mask["counts"].encode(), 1, mask["area"], False, mask["score"]) for mask in data["masks"]]

    return read_cached(file, read)


def _write_instances(file: Path, stamp: str, instances: Sequence[coco.Instance]) -> None:
    """Write instances for `_read_instances`."""
    masks = [
        {"counts": instance.counts.decode(), "area": instance.area, "score": instance.score} for instance in instances
    ]
    with write_atomically(file, "evaluate") as out:
        out.write(json.dumps({"stamp": stamp, "masks": masks}).encode())
