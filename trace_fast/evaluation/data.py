"""Ground truth of edges: where one segment ends and another begins, read from label maps, mask files, COCO or BSDS.

The convention: a pixel is on a contour where the pixel to its right or below belongs to another segment, or to none.
So contours are one pixel wide, on the upper left side of a change; they are thinned as detections are. The border of
the image is no contour. Pixels of crowds and of void are ignored: no contour runs along them, and a detection on them
is not counted as a mistake. Where segments overlap, each keeps its whole outline.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch

from trace_fast import ops
from trace_fast.extras import require
from trace_fast.io.folders import describe_left_out, is_litter, is_picture
from trace_fast.io.pictures import read_picture
from trace_fast.masks import coco

__all__ = [
    "CROWD",
    "GROUPS",
    "NEIGHBORS",
    "SIDES",
    "SIZES",
    "Contours",
    "DataSet",
    "Photo",
    "find_contours",
    "open_dataset",
    "pack_layers",
]

# a contour pixel belongs to one of each: what is on the other side, the area of the smaller segment there in pixels
# (as COCO divides them), and how many others that segment touches
SIDES = ("background", "touching")
SIZES = ("small", "medium", "large")
NEIGHBORS = ("none", "one", "several")
GROUPS = tuple(product(SIDES, SIZES, NEIGHBORS))
AREAS = (32**2, 96**2)

CROWD = 65535  # the label of crowd and void in the maps of `inst`
TRUTH_FOLDERS = ("inst", "panoptic", "masks", "ground_truth", "groundTruth")


@dataclass(frozen=True)
class Contours:
    """The contours that the annotators of one image drew.

    Attributes:
        lines: (A, H, W) bool, lines of one pixel, for each annotator.
        ignored: (H, W) bool, where a detection is not counted as a mistake.
        groups: (A, H, W) uint8, index into GROUPS of each contour pixel; None where segments are not known.
    """

    lines: np.ndarray
    ignored: np.ndarray
    groups: np.ndarray | None


@dataclass(frozen=True)
class Photo:
    """One image of a data set.

    Attributes:
        name: unique in the data set; result files are named after it.
        image: its file; None where only maps of it can be scored.
        truth: the file, or folder, of its ground truth.
        contours: function that reads the contours; raises OSError or ValueError where the ground truth is damaged.
        instances: function that reads the masks, crowds marked, as COCO has them; None where contours alone are known.
            The id is that of a COCO file, or the name where it is a number.
        dependencies: further files, and settings, that the contours depend on beside the truth.
    """

    name: str
    image: Path | None
    truth: Path
    contours: Callable[[], Contours]
    instances: Callable[[], coco.ImageInstances] | None = None
    dependencies: tuple[Path | str, ...] = ()


@dataclass(frozen=True)
class DataSet:
    """Photographs with ground truth.

    Attributes:
        photos: sorted by name.
        problems: faults of the folder or of the ground truth, a line each.
        notes: images that are left out because they have no ground truth, a line each.
        panoptic: the panoptic segments of all images where the ground truth is a JSON file of them, else None.
    """

    photos: list[Photo]
    problems: list[str]
    notes: list[str]
    panoptic: coco.Panoptic | None = None


def find_contours(labels: np.ndarray, ignored: np.ndarray | None = None) -> Contours:
    """Find the contours of segments.

    Args:
        labels: (H, W) or (L, H, W) integers, 0 for none; a positive number is a segment, on one layer only. Segments
            that overlap are on different layers.
        ignored: (H, W) bool, crowd and void; None for nowhere.

    Returns:
        Contours of one annotator.

    Raises:
        ValueError: labels are of another shape or negative.

    Example:
        >>> labels = np.zeros((4, 6), int)
        >>> labels[:, :3], labels[:, 3:5] = 1, 2
        >>> find_contours(labels).lines[0].astype(int)[1]
        array([0, 0, 1, 0, 1, 0])
    """
    labels = np.asarray(labels)
    labels = labels[None] if labels.ndim == 2 else labels
    if labels.ndim != 3 or labels.dtype.kind not in "iu" or labels.size == 0 or labels.min() < 0:
        raise ValueError(
            f"find_contours: labels must be (H, W) or (L, H, W) integers >= 0, got {labels.shape} {labels.dtype}"
        )
    ignored = np.zeros(labels.shape[1:], bool) if ignored is None else ignored

    names, compact = np.unique(labels, return_inverse=True)
    compact = compact.reshape(labels.shape).astype(np.int32) + (names[0] != 0)  # 0 stays none
    area = np.bincount(compact.ravel())
    area[0] = labels[0].size + 1  # of two sides, never the smaller segment
    steps = [(np.s_[:, :, :-1], np.s_[:, :, 1:]), (np.s_[:, :-1], np.s_[:, 1:])]  # to the right, down

    changes = []  # (here, pixels of one side, of the other, whether a contour is between, whether both are segments)
    pairs = []
    for here, there in steps:
        valid = ~(ignored[here[1:]] | ignored[there[1:]])
        crossed = valid & (compact[here] != compact[there]).any(0)  # some segment ends or begins
        for layer, near in enumerate(compact[here]):
            for other, far in enumerate(compact[there]):
                differs = valid & (near != far)
                both = differs & (near > 0) & (far > 0)
                # two layers share a contour only where one of them has one: it says that their segments touch
                changes.append((here[1:], near, far, differs if layer == other else both & crossed, both))
                pairs.append(np.stack([near[both], far[both]]))
    touching = np.unique(np.sort(np.concatenate(pairs, axis=1), axis=0), axis=1)
    neighbors = np.bincount(touching.ravel(), minlength=len(area))

    edge = np.zeros(ignored.shape, bool)
    groups = np.zeros(ignored.shape, np.uint8)
    for here, near, far, change, both in changes:
        smaller = np.where(area[near] <= area[far], near, far)[change]
        size = np.digitize(area[smaller], AREAS)
        code = (both[change] * len(SIZES) + size) * len(NEIGHBORS) + np.minimum(neighbors[smaller], 2)
        edge[here][change] = True
        groups[here][change] = np.maximum(groups[here][change], code)
    return Contours(ops.thin(torch.from_numpy(edge)[None]).numpy(), ignored, groups[None])


def pack_layers(masks: Iterable[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Pack masks that may overlap into layers of labels in which none do.

    Args:
        masks: (H, W) bool each; the first is label 1.
        shape: (H, W), for the case of no masks.

    Returns:
        (L, H, W) int32, L >= 1.

    Example:
        >>> masks = np.array([[[1, 1, 0]], [[0, 1, 1]]], bool)
        >>> pack_layers(masks, (1, 3)).tolist()
        [[[1, 1, 0]], [[0, 2, 2]]]
    """
    layers = [np.zeros(shape, np.int32)]
    for label, mask in enumerate(masks, 1):
        for layer in layers:
            if not layer[mask].any():
                layer[mask] = label
                break
        else:
            layers.append(np.where(mask, label, 0).astype(np.int32))
    return np.stack(layers)


def open_dataset(
    folder: str | Path,
    truth: str | Path | None = None,
    ignore: Sequence[int] = (CROWD,),
    skip_bad: bool = False,
) -> DataSet:
    """List the photographs of a folder that have ground truth; their pixels are read when they are asked for.

    Args:
        folder: holds the photographs in `images`, or, for a JSON file NAME_SPLIT.json, in `SPLIT`, or itself;
            photographs may be missing where maps are scored.
        truth: ground truth, a folder below `folder` or anywhere, or a COCO JSON file, which is read at once; None is
            the first that exists of inst, panoptic, masks, ground_truth, groundTruth, or else, as COCO is laid out,
            annotations/instances_SPLIT.json of a folder `SPLIT`, that of val if there are several. A folder holds one
            of: label maps
            NAME.png of one channel, or of three as COCO encodes panoptic segments; folders NAME of one mask a file;
            NAME.mat of BSDS500.
        ignore: labels of maps that are crowd or void.
        skip_bad: leave out the images of a JSON file that have a bad annotation, with a note, instead of raising.

    Returns:
        The photos, with what is wrong with the folder and what is left out.

    Raises:
        ValueError: there is no ground truth at all, or the JSON file has problems.

    Example:
        >>> dataset = open_dataset("coco/val2017", "coco/annotations/instances_val2017.json")  # doctest: +SKIP
        >>> dataset.photos[0].contours().lines.shape  # doctest: +SKIP
        (1, 426, 640)
    """
    folder = Path(folder)
    truth_path = _find_truth(folder, truth)
    names = ["images", truth_path.stem.rpartition("_")[2]] if truth_path.suffix == ".json" else ["images"]
    images = next((folder / name for name in names if os.path.isdir(folder / name)), folder)
    entries = images.iterdir() if os.path.isdir(images) else ()
    files = sorted(path for path in entries if is_picture(path.name) and os.path.isfile(path))
    if truth_path.suffix == ".json":
        return _open_json(truth_path, images, files, skip_bad)
    return _open_folder(truth_path, images, files, tuple(ignore))


def _find_truth(folder: Path, truth: str | Path | None) -> Path:
    """Return the file or folder of ground truth, below `folder` or anywhere."""
    names = TRUTH_FOLDERS if truth is None else (str(truth),)
    for path in [folder / name for name in names] + ([] if truth is None else [Path(truth)]):
        if os.path.exists(path):
            return path
    if truth is None:
        files = {path.stem.partition("_")[2]: path for path in sorted(folder.glob("annotations/instances_*.json"))}
        files = {split: path for split, path in files.items() if os.path.isdir(folder / split)}
        chosen = [split for split in files if split.startswith("val")] or list(files)
        if len(chosen) == 1:
            return files[chosen[0]]
        if chosen:
            raise ValueError(f"evaluate: truth must be one of {[str(path) for path in files.values()]}, got None")
        names = (*names, "annotations/instances_SPLIT.json with a folder SPLIT")
    raise ValueError(f"evaluate: data must hold ground truth, got no {' or '.join(names)} in '{folder}'")


def _open_folder(truth: Path, images: Path, files: list[Path], ignore: tuple[int, ...]) -> DataSet:
    """Pair image files with the files, or folders, of ground truth by their names."""
    truths = [path for path in sorted(truth.iterdir()) if not is_litter(path.name)]
    images_by_name, problems = _group_by_name(files, "image files")
    truth_by_name, more_problems = _group_by_name(truths, "ground truths")
    problems += more_problems
    notes = [f"{name}: no ground truth in {truth}" for name in sorted(set(images_by_name) - set(truth_by_name))]
    if files and images != truth.parent and (left_out := describe_left_out(images.iterdir())):
        notes.append(f"left out of {images}: {left_out}")
    if files:
        problems += [f"{name}: no image in {images}" for name in sorted(set(truth_by_name) - set(images_by_name))]
    photos = []
    for name, paths in sorted(truth_by_name.items()):
        pictures: Sequence[Path | None] = images_by_name.get(name, []) if files else [None]
        # of several files of one name, nobody knows which is meant
        if len(paths) == len(pictures) == 1:
            photos.append(_make_photo(name, pictures[0], paths[0], ignore))
    return DataSet(photos, problems, notes)


def _group_by_name(paths: Iterable[Path], kind: str) -> tuple[dict[str, list[Path]], list[str]]:
    """Group files by their names without ending, and folders by their names; problems: names of several."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(path.name if os.path.isdir(path) else path.stem, []).append(path)
    return groups, [f"{name}: {len(group)} {kind} of that name" for name, group in groups.items() if len(group) > 1]


def _open_json(path: Path, images: Path, files: list[Path], skip_bad: bool) -> DataSet:
    """List the photographs of a JSON file, of instances or of panoptic segments."""
    _, problems = _group_by_name(files, "image files")
    annotations = coco.read_annotations(path, skip_bad=skip_bad)
    photos = []
    for entry in annotations.images.values():
        image = images / entry.file_name
        if not os.path.isfile(image):
            problems.append(f"{entry.file_name}: no image in {images}")
            continue
        contours = functools.partial(_find_listed_contours, entry)
        if isinstance(entry, coco.ImageSegments):
            photos.append(Photo(Path(entry.file_name).stem, image, path, contours, dependencies=(entry.png,)))
        else:
            instances = functools.partial(_return_same, entry)
            photos.append(Photo(Path(entry.file_name).stem, image, path, contours, instances))
    times = Counter(photo.name for photo in photos)
    problems += [f"{name}: listed {count} times" for name, count in times.items() if count > 1]
    photos = sorted((photo for photo in photos if times[photo.name] == 1), key=lambda photo: photo.name)
    if isinstance(annotations, coco.Panoptic):
        return DataSet(photos, problems, [], annotations)
    return DataSet(photos, problems, [f"left out with its image: {line}" for line in annotations.left_out])


def _find_listed_contours(image: coco.ImageSegments | coco.ImageInstances) -> Contours:
    """Find the contours of an image of a JSON file."""
    if isinstance(image, coco.ImageSegments):
        segments = image.segment_map()
        crowds = [segment["id"] for segment in image.segments if segment["iscrowd"]]
        ignored = np.isin(segments, [0, *crowds])
        return find_contours(np.where(ignored, 0, segments), ignored)
    crowd = np.array([instance.iscrowd for instance in image.instances], bool)
    masks = image.masks()
    ignored = masks[crowd].any(0)
    return find_contours(pack_layers(masks[~crowd] & ~ignored, ignored.shape), ignored)


def _return_same(image: coco.ImageInstances) -> coco.ImageInstances:
    return image


def _make_photo(name: str, image: Path | None, path: Path, ignore: tuple[int, ...]) -> Photo:
    """Make a photo of one file, or folder, of ground truth."""
    if path.suffix == ".mat":
        return Photo(name, image, path, functools.partial(_read_bsds, path))
    read = (
        functools.partial(_read_masks, path) if os.path.isdir(path) else functools.partial(_read_labels, path, ignore)
    )
    number = int(name) if name.isdecimal() else 0

    def read_instances() -> coco.ImageInstances:
        labels, ignored = read()
        masks = [labels == label for label in np.unique(labels) if label]
        flat = [mask.any(0) for mask in masks] + [ignored] * bool(ignored.any())
        stack = np.stack(flat) if flat else np.zeros((0, *ignored.shape), bool)
        return coco.encode_masks(stack, iscrowd=np.arange(len(stack)) >= len(masks), id=number, file_name=name)

    dependencies: tuple[Path | str, ...] = (f"ignored: {sorted(set(ignore))}",)
    if os.path.isdir(path):
        dependencies = tuple(sorted(file for file in path.iterdir() if is_picture(file.name)))
    return Photo(name, image, path, lambda: find_contours(*read()), read_instances, dependencies)


def _read_labels(path: Path, ignore: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Read a label map: labels (1, H, W), 0 for none, and what is ignored (H, W)."""
    labels = _read_pixels(path)
    if labels.ndim == 3:
        labels = (labels[..., :3].astype(np.int64) << (0, 8, 16)).sum(-1)
    ignored = np.isin(labels, ignore)
    return np.where(ignored, 0, labels)[None], ignored


def _read_masks(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a folder of one mask a file: labels (L, H, W), 0 for none, and what is ignored (H, W): nothing."""
    files = sorted(path for path in folder.iterdir() if is_picture(path.name))
    masks = [_read_pixels(path) for path in files]
    masks = [mask.max(-1) > 0 if mask.ndim == 3 else mask > 0 for mask in masks]
    if len(shapes := {mask.shape for mask in masks}) != 1:
        raise ValueError(f"masks must be of one size, got {sorted(shapes) or 'no files'} in {folder}")
    return pack_layers(masks, masks[0].shape), np.zeros(masks[0].shape, bool)


def _read_bsds(path: Path) -> Contours:
    """Read the boundaries of all annotators from a .mat file of BSDS500."""
    require("evaluate", "scipy")
    from scipy.io import loadmat

    try:
        lines = np.stack([cell["Boundaries"][0, 0] > 0 for cell in loadmat(path)["groundTruth"][0]])
    except Exception as error:  # damaged bytes fail in many ways
        raise ValueError(f"no groundTruth with Boundaries, as BSDS500 has, in {path}: {error}") from error
    return Contours(lines, np.zeros(lines.shape[1:], bool), None)


def _read_pixels(path: Path) -> np.ndarray:
    """Read a picture as it is stored, without transparency: (H, W) or (H, W, 3)."""
    with read_picture("evaluate: ground truth", path) as picture:
        opaque = {"LA": "L", "RGBA": "RGB"}.get(picture.mode)
        return np.asarray(picture.convert(opaque) if opaque else picture)
