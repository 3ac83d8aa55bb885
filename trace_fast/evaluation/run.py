"""The counts of every image of a data set, each kept in a file as soon as it is computed.

Interrupt a run at any time: the same call continues it, and finished images are not computed again.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from trace_fast import __version__
from trace_fast.evaluation.data import Photo
from trace_fast.evaluation.edges import DISTANCE, SUPPRESSION, THRESHOLDS, Counts, count_edges
from trace_fast.evaluation.methods import Method
from trace_fast.io.files import write_atomically
from trace_fast.io.pictures import read_picture
from trace_fast.masks import coco
from trace_fast.progress import LOGGER, Progress

__all__ = [
    "FAILURES",
    "check_photos",
    "count_all",
    "make_results_folder",
    "make_stamp",
    "map_photos",
    "read_cached",
    "read_counts",
    "read_truth",
]

WORKERS = 2  # images at a time: one is read while another is matched on all cores
Result = TypeVar("Result")
FAILURES = (OSError, ValueError)  # of damaged files


def check_photos(photos: Sequence[Photo], methods: Sequence[Method]) -> tuple[list[Photo], list[str], list[str]]:
    """Read every file once, so that faults are known before hours of work.

    Args:
        photos: of one data set.
        methods: to be scored on it.

    Returns:
        Photos that can be scored; problems, a line each: files that are missing, damaged or of the wrong size; notes,
        a line each: photos without any contour, which are left out.
    """

    def check(photo: Photo) -> tuple[list[str], bool]:
        try:
            contours = photo.contours()
        except FAILURES as error:
            return [f"{photo.name}: ground truth {photo.truth} cannot be read: {error}"], True
        return _check_sources(photo, methods, contours.ignored.shape), bool(contours.lines.any())

    good, problems, notes = [], [], []
    for photo, (faults, has_contours) in zip(photos, map_photos(check, photos, "checking files"), strict=True):
        problems += faults
        if not has_contours:
            notes.append(f"{photo.name}: no contour in its ground truth")
        elif not faults:
            good.append(photo)
    return good, problems, notes


def _check_sources(photo: Photo, methods: Sequence[Method], shape: tuple[int, ...]) -> list[str]:
    """Return the faults of the image, and of the maps, of a photo whose ground truth has a shape."""
    sources = {source: method for method in methods if (source := method.source(photo)) is not None}
    problems = [f"{photo.name}: {method.name} needs its image" for method in methods if method.source(photo) is None]
    for source, method in sorted(sources.items()):
        try:
            # a map is read as it will be, an image is not traced yet
            size = _read_size(source) if source == photo.image else method.edges(photo).shape
        except FAILURES as error:
            problems.append(f"{photo.name}: {source} cannot be read: {error}")
            continue
        if size != shape:
            problems.append(f"{photo.name}: {source} has size {size}, the ground truth {shape}")
    return problems


def count_all(
    photos: Sequence[Photo],
    method: Method,
    folder: Path,
    *,
    distance: float = DISTANCE,
    thresholds: Sequence[float] = THRESHOLDS,
    suppression: str = SUPPRESSION,
) -> list[Counts]:
    """Return the counts of every photo, from files where an earlier run has left them.

    Args:
        photos: of one data set, checked.
        method: source of the edge maps.
        folder: where the counts are kept, one file a photo, in a folder below it for each method and setting.
        distance: see `count_edges`.
        thresholds: see `count_edges`.
        suppression: see `count_edges`; without effect where the maps of the method hold lines already.

    Returns:
        Counts in the order of the photos.
    """
    applied = suppression if method.suppress else None
    results = make_results_folder(folder, method, applied, distance, list(thresholds))
    lock = nullcontext() if method.threads else threading.Lock()

    def count(photo: Photo) -> Counts:
        file = results / f"{photo.name}.npz"
        stamp = make_stamp(photo.truth, method.source(photo), *photo.dependencies)
        if (cached := read_counts(file, stamp)) is not None:
            return cached
        with lock:
            edges = method.edges(photo)
        counts = count_edges(edges, photo.contours(), distance=distance, thresholds=thresholds, suppression=applied)
        with write_atomically(file, "evaluate") as out:
            np.savez_compressed(out, stamp=stamp, **vars(counts))
        return counts

    return list(map_photos(count, photos, method.name))


def read_truth(photos: Sequence[Photo]) -> coco.Instances:
    """Read the instances of every photo.

    Args:
        photos: of one data set.

    Returns:
        The instances by image id, in the order of the photos.

    Raises:
        ValueError: a photo has no instances, or two photos have one id.
    """

    def read(photo: Photo) -> list[coco.ImageInstances]:
        return [] if photo.instances is None else [photo.instances()]

    truth = {image.id: image for images in map_photos(read, photos, "reading masks") for image in images}
    if len(truth) < len(photos):
        raise ValueError(
            "evaluate: masks need instances of every photo, each with a number for a name or listed in a JSON file, "
            f"got {len(truth)} of {len(photos)}"
        )
    return coco.Instances(truth, {})


def map_photos(work: Callable[[Photo], Result], photos: Sequence[Photo], title: str) -> Iterable[Result]:
    """Yield results in order, with progress; several are computed at a time.

    An error or Ctrl-C ends the work at once.
    """
    pool = ThreadPoolExecutor(WORKERS)
    try:
        with Progress(title, "image", len(photos)) as progress:
            for result in pool.map(work, photos):
                progress.update()
                yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read_cached(file: Path, read: Callable[[Path], Result | None]) -> Result | None:
    """Return what `read` returns of a file of an earlier run; None where it is missing, or damaged, which is reported.

    Args:
        file: of an earlier run.
        read: reader of such files; it may return None.
    """
    try:
        return read(file)
    except FileNotFoundError:
        pass
    except Exception as error:  # damaged bytes fail in many ways
        LOGGER.warning("%s is damaged and computed again: %r", file, error)
    return None


def read_counts(file: Path, stamp: str) -> Counts | None:
    """Read the counts of an earlier run; None unless the file is whole, and its sources have not changed since."""

    def read(file: Path) -> Counts | None:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            same = str(arrays["stamp"]) == stamp
            return Counts(*(arrays[name] for name in Counts.__dataclass_fields__)) if same else None

    return read_cached(file, read)


def make_results_folder(folder: Path, method: Method, *settings: Any) -> Path:
    """Make the folder of the results of a method under some settings, and return it.

    Args:
        folder: its parent.
        method: whose results are kept there.
        settings: values for JSON that the results depend on.
    """
    text = json.dumps([__version__, method.identity, *settings])
    results = folder / f"{method.slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    results.mkdir(parents=True, exist_ok=True)
    return results


def make_stamp(*sources: Path | str | None) -> str:
    """Return a text that identifies what a result was computed from: it is valid for these sources alone.

    Args:
        sources: files, identified by their place, size and time, and texts.
    """
    marks = []
    for source in sources:
        if isinstance(source, Path):
            stat = source.stat()
            source = f"{source.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        marks.append(source)
    return hashlib.sha256(json.dumps(marks).encode()).hexdigest()


def _read_size(path: Path) -> tuple[int, int]:
    """Return the height and width of a picture in its upright orientation; all of it is decoded."""
    from PIL import ImageOps

    with read_picture("evaluate: image", path) as picture:
        width, height = ImageOps.exif_transpose(picture).size
    return height, width
