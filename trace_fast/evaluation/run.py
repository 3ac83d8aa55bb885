"""A data set, some methods, and the counts of every image, each kept in a file as soon as it is there.

Interrupt a run at will: the same command goes on, and finished images are not computed again.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from trace_fast import __version__
from trace_fast.evaluation import panoptic
from trace_fast.evaluation.data import Photo
from trace_fast.evaluation.edges import DISTANCE, THRESHOLDS, Counts, count
from trace_fast.evaluation.methods import Method
from trace_fast.io.files import write_atomically
from trace_fast.masks import coco

__all__ = [
    "check",
    "count_all",
    "is_panoptic",
    "over_photos",
    "place_of",
    "read_counts",
    "read_kept",
    "read_masks",
    "read_truth",
    "score_panoptic",
    "stamp_of",
]

WORKERS = 2  # images at a time: one is read while another is matched on all cores
Result = TypeVar("Result")
FAILURES = (OSError, ValueError, SyntaxError)  # of damaged files; Pillow raises SyntaxError for some


def check(photos: Sequence[Photo], methods: Sequence[Method]) -> tuple[list[Photo], list[str], list[str]]:
    """Read every file once, so that what is wrong is known before hours of work.

    Args:
        photos: a data set.
        methods: what is to be scored on it.

    Returns:
        Photos that can be scored; problems, a line each: files that are missing, damaged or of the wrong size; notes,
        a line each: photos without any contour, which are left out.
    """

    def look(photo: Photo) -> tuple[list[str], bool]:
        try:
            contours = photo.contours()
        except FAILURES as error:
            return [f"{photo.name}: ground truth {photo.truth} cannot be read: {error}"], True
        sources = {source: method for method in methods if (source := method.source(photo)) is not None}
        problems = [
            f"{photo.name}: {method.name} needs its image" for method in methods if method.source(photo) is None
        ]
        for source, method in sorted(sources.items()):
            try:
                # a map is read as it will be, an image is not traced yet
                size = _size(source) if source == photo.image else method.edges(photo).shape
            except FAILURES as error:
                problems.append(f"{photo.name}: {source} cannot be read: {error}")
                continue
            if size != contours.ignored.shape:
                problems.append(f"{photo.name}: {source} has size {size}, the ground truth {contours.ignored.shape}")
        return problems, bool(contours.drawn.any())

    good, problems, notes = [], [], []
    for photo, (found, drawn) in zip(photos, over_photos(look, photos, "checking files"), strict=True):
        problems += found
        if not drawn:
            notes.append(f"{photo.name}: no contour in its ground truth")
        elif not found:
            good.append(photo)
    return good, problems, notes


def count_all(
    photos: Sequence[Photo],
    method: Method,
    folder: Path,
    *,
    distance: float = DISTANCE,
    thresholds: Sequence[float] = THRESHOLDS,
) -> list[Counts]:
    """Counts of every photo, from files where an earlier run has left them.

    Args:
        photos: of one data set, checked.
        method: what makes the maps.
        folder: where the counts go, one file a photo, in a folder below it for each method and setting.
        distance: see `edges.count`.
        thresholds: see `edges.count`.

    Returns:
        Counts in the order of the photos.
    """
    place = place_of(folder, method, method.suppress, distance, list(thresholds))
    one_at_a_time = nullcontext() if method.threads else threading.Lock()

    def run(photo: Photo) -> Counts:
        file = place / f"{photo.name}.npz"
        stamp = stamp_of(photo.truth, method.source(photo), *photo.more)
        if (kept := read_counts(file, stamp)) is not None:
            return kept
        with one_at_a_time:
            edges = method.edges(photo)
        found = count(edges, photo.contours(), distance=distance, thresholds=thresholds, suppress=method.suppress)
        with write_atomically(file, "evaluate") as out:
            np.savez_compressed(out, stamp=stamp, **vars(found))
        return found

    return list(over_photos(run, photos, method.name))


def read_truth(photos: Sequence[Photo]) -> coco.Instances:
    """The instances of every photo.

    Raises:
        ValueError: a photo has no instances, or no id of its own.
    """

    def read(photo: Photo) -> list[coco.ImageInstances]:
        return [] if photo.instances is None else [photo.instances()]

    truth = {image.id: image for images in over_photos(read, photos, "reading masks") for image in images}
    if len(truth) < len(photos):
        raise ValueError(
            "evaluate: masks need instances of every photo, each with a number for a name or listed in a JSON file, "
            f"got {len(truth)} of {len(photos)}"
        )
    return coco.Instances(truth, {})


def read_masks(path: Path, truth: coco.Instances) -> coco.Instances:
    """Masks of a COCO results file; images that the truth lacks are left out.

    Raises:
        ValueError: the file has problems, or no image of the truth.
    """
    shown = {number: image for number, image in coco.read_results(path).images.items() if number in truth.images}
    if not shown:
        raise ValueError(f"evaluate: masks must be of these photos, got none of their ids in '{path}'")
    return coco.Instances(shown, {})


def is_panoptic(path: Path) -> bool:
    """Whether a results file holds panoptic segments."""
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"evaluate: results must be a JSON file, got '{path}': {error}") from error
    return isinstance(data, dict) and any("segments_info" in each for each in data.get("annotations", []))


def score_panoptic(path: Path, truth: Path) -> panoptic.PanopticScores:
    """PQ, SQ and RQ of panoptic results against a truth, JSON files with a folder of PNG files of the same name.

    Raises:
        ValueError: a file has problems, or their images differ.
    """
    read = [coco.read_panoptic(file, file.with_suffix("")) for file in (truth, path)]
    return panoptic.panoptic_quality(*read)


def over_photos(work: Callable[[Photo], Result], photos: Sequence[Photo], title: str) -> Iterable[Result]:
    """Results in order, some computed at a time, with progress on a terminal; an error or Ctrl-C ends it at once."""
    pool = ThreadPoolExecutor(WORKERS)
    try:
        yield from tqdm(pool.map(work, photos), total=len(photos), desc=title, unit="image", disable=None)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read_kept(file: Path, read: Callable[[Path], Result | None]) -> Result | None:
    """What `read` finds in a file of an earlier run; None where there is none, or a damaged one, which is told."""
    try:
        return read(file)
    except FileNotFoundError:
        pass
    except Exception as error:  # damaged bytes fail in many ways
        tqdm.write(f"trace-fast: {file} is damaged and made again: {error!r}", file=sys.stderr)
    return None


def read_counts(file: Path, stamp: str) -> Counts | None:
    """Counts of a file of an earlier run; None unless it is there, whole, and of files that have not changed since."""

    def read(file: Path) -> Counts | None:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as kept:
            same = str(kept["stamp"]) == stamp
            return Counts(kept["matches"], kept["by_group"], kept["drawn"]) if same else None

    return read_kept(file, read)


def place_of(folder: Path, method: Method, *settings: Any) -> Path:
    """Where results of a method under some settings are kept, made if it is missing."""
    text = json.dumps([__version__, method.identity, *settings])
    place = folder / f"{method.slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    place.mkdir(parents=True, exist_ok=True)
    return place


def stamp_of(*sources: Path | str | None) -> str:
    """What a result was made from, files with their place, size and time: it is good for these alone."""
    marks = []
    for source in sources:
        if isinstance(source, Path):
            stat = source.stat()
            source = f"{source.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        marks.append(source)
    return hashlib.sha256(json.dumps(marks).encode()).hexdigest()


def _size(path: Path) -> tuple[int, int]:
    """Height and width of a picture as it is looked at, all of it decoded."""
    from PIL import Image, ImageOps

    with Image.open(path) as picture:
        width, height = ImageOps.exif_transpose(picture).size
    return height, width
