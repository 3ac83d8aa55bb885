"""Ground truth of edges: where one segment ends and another begins, read from label maps, mask files, COCO or BSDS.

The convention: a pixel is on a contour where the pixel to its right or below belongs to another segment, or to none.
So contours are one pixel wide, on the upper left side of a change; they are thinned as detections are. The border of
the image is no contour. Pixels of crowds and of void are ignored: no contour runs along them, and what is detected on
them is no mistake. Where segments overlap, each keeps its whole outline.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch

from trace_fast import ops
from trace_fast.io.images import IMAGE_SUFFIXES
from trace_fast.masks import coco

__all__ = ["GROUPS", "NEIGHBOURS", "SIDES", "SIZES", "Contours", "Photo", "contours_of", "layers_of", "open_photos"]

# a contour pixel belongs to one of each: what is on the other side, the area of the smaller segment there in pixels
# (as COCO divides them), and how many others that segment touches
SIDES = ("background", "touching")
SIZES = ("small", "medium", "large")
NEIGHBOURS = ("none", "one", "several")
GROUPS = tuple(product(SIDES, SIZES, NEIGHBOURS))
AREAS = (32**2, 96**2)

CROWD = 65535
TRUTHS = ("inst", "panoptic", "masks", "ground_truth", "groundTruth")


@dataclass(frozen=True)
class Contours:
    """What the annotators of one image drew.

    Attributes:
        drawn: (A, H, W) bool, lines of one pixel, for each annotator.
        ignored: (H, W) bool, where a detection is no mistake.
        groups: (A, H, W) uint8, index into GROUPS of each contour pixel; None where segments are not known.
    """

    drawn: np.ndarray
    ignored: np.ndarray
    groups: np.ndarray | None


@dataclass(frozen=True)
class Photo:
    """One image of a data set.

    Attributes:
        name: unique in the data set; result files are named after it.
        image: its file; None where only maps of it can be scored.
        truth: the file, or folder, of its ground truth.
        contours: reads that. OSError or ValueError where it is damaged.
        instances: reads its masks, crowds marked, as COCO has them; None where contours alone are known. The id is that
            of a COCO file, or the name where it is a number.
        more: what the contours depend on beside the truth: further files, and settings.
    """

    name: str
    image: Path | None
    truth: Path
    contours: Callable[[], Contours]
    instances: Callable[[], coco.ImageInstances] | None = None
    more: tuple[Path | str, ...] = ()


def contours_of(labels: np.ndarray, ignored: np.ndarray | None = None) -> Contours:
    """Contours of segments.

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
        >>> contours_of(labels).drawn[0].astype(int)[1]
        array([0, 0, 1, 0, 1, 0])
    """
    labels = np.asarray(labels)
    labels = labels[None] if labels.ndim == 2 else labels
    if labels.ndim != 3 or labels.dtype.kind not in "iu" or labels.size == 0 or labels.min() < 0:
        raise ValueError(
            f"contours_of: labels must be (H, W) or (L, H, W) integers >= 0, got {labels.shape} {labels.dtype}"
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
                # between two layers only what one of them has drawn is looked at, to tell that they touch
                changes.append((here[1:], near, far, differs if layer == other else both & crossed, both))
                pairs.append(np.stack([near[both], far[both]]))
    touching = np.unique(np.sort(np.concatenate(pairs, axis=1), axis=0), axis=1)
    neighbours = np.bincount(touching.ravel(), minlength=len(area))

    edge = np.zeros(ignored.shape, bool)
    groups = np.zeros(ignored.shape, np.uint8)
    for here, near, far, change, both in changes:
        smaller = np.where(area[near] <= area[far], near, far)[change]
        size = np.digitize(area[smaller], AREAS)
        code = (both[change] * len(SIZES) + size) * len(NEIGHBOURS) + np.minimum(neighbours[smaller], 2)
        edge[here][change] = True
        groups[here][change] = np.maximum(groups[here][change], code)
    drawn = ops.thin(torch.from_numpy(edge)[None]).numpy()
    return Contours(drawn, ignored, groups[None])


def layers_of(masks: Iterable[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Masks that may overlap as layers of labels in which none do.

    Args:
        masks: (H, W) bool each; the first is label 1.
        shape: (H, W), for the case of no masks.

    Returns:
        (L, H, W) int32, L >= 1.
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


def open_photos(
    folder: Path, truth: str | Path | None = None, ignore: Sequence[int] = (CROWD,)
) -> tuple[list[Photo], list[str], list[str]]:
    """Photographs of a folder with their ground truth, what is wrong with the folder, and what is left out.

    Args:
        folder: holds the photographs in `images`, or itself; photographs may be missing where maps are scored.
        truth: ground truth, a folder below `folder` or anywhere, or a COCO JSON file; None is the first there is of
            inst, panoptic, masks, ground_truth, groundTruth. A folder holds one of: label maps NAME.png of one channel,
            or of three as COCO encodes panoptic segments; folders NAME of one mask a file; NAME.mat of BSDS500.
        ignore: labels of maps that are crowd or void.

    Returns:
        Photos by name; problems, a line each; notes: images without ground truth.

    Raises:
        ValueError: there is no ground truth at all.
    """
    folder = Path(folder)
    names = TRUTHS if truth is None else (str(truth),)
    places = [folder / name for name in names] + ([] if truth is None else [Path(truth)])
    places = [place for place in places if place.exists()]
    if not places:
        raise ValueError(f"evaluate: data must hold ground truth, got no {' or '.join(names)} in '{folder}'")
    images = folder / "images" if (folder / "images").is_dir() else folder
    files = (
        sorted(path for path in images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES) if images.is_dir() else []
    )
    shown, problems = _by_name(files, "image files")
    if places[0].suffix == ".json":
        photos, lost = _from_coco(places[0], images)
        return photos, problems + lost, []
    drawn, twice = _by_name([path for path in sorted(places[0].iterdir()) if path.name[0] != "."], "ground truths")
    problems += twice
    notes = [f"{name}: no ground truth in {places[0]}" for name in sorted(set(shown) - set(drawn))]
    if files:
        problems += [f"{name}: no image in {images}" for name in sorted(set(drawn) - set(shown))]
    # of several files of one name, nobody knows which is meant
    both = sorted(
        name for name, paths in drawn.items() if len(paths) == 1 and (len(shown.get(name, [])) == 1 or not files)
    )
    photos = [_photo(name, shown[name][0] if files else None, drawn[name][0], tuple(ignore)) for name in both]
    return photos, problems, notes


def _by_name(paths: Iterable[Path], kind: str) -> tuple[dict[str, list[Path]], list[str]]:
    """Files by their names without ending, folders by their names; problems: names of several."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        found.setdefault(path.name if path.is_dir() else path.stem, []).append(path)
    return found, [f"{name}: {len(each)} {kind} of that name" for name, each in found.items() if len(each) > 1]


def _from_coco(path: Path, images: Path) -> tuple[list[Photo], list[str]]:
    """Photographs that a JSON file lists, by instances or by panoptic segments."""
    try:
        data = json.loads(path.read_bytes())
        panoptic = any("segments_info" in each for each in data["annotations"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"evaluate: truth must be a JSON file with annotations, got '{path}': {error}") from error
    # panoptic_val2017.json lies beside a folder panoptic_val2017
    listed = coco.read_panoptic(data, path.with_suffix("")) if panoptic else coco.read_instances(data)
    photos, problems = [], []
    for entry in listed.images.values():
        image = images / entry.file_name
        if not image.is_file():
            problems.append(f"{entry.file_name}: no image in {images}")
            continue
        instances = None if isinstance(entry, coco.ImageSegments) else functools.partial(_same, entry)
        more = (entry.png,) if isinstance(entry, coco.ImageSegments) else ()
        contours = functools.partial(_contours_of_entry, entry)
        photos.append(Photo(Path(entry.file_name).stem, image, path, contours, instances, more))
    twice = Counter(photo.name for photo in photos)
    problems += [f"{name}: listed {count} times" for name, count in twice.items() if count > 1]
    return sorted((photo for photo in photos if twice[photo.name] == 1), key=lambda photo: photo.name), problems


def _contours_of_entry(image: coco.ImageSegments | coco.ImageInstances) -> Contours:
    if isinstance(image, coco.ImageSegments):
        segments = image.segment_map()
        crowds = [segment["id"] for segment in image.segments if segment["iscrowd"]]
        ignored = np.isin(segments, [0, *crowds])
        return contours_of(np.where(ignored, 0, segments), ignored)
    crowd = np.array([instance.iscrowd for instance in image.instances], bool)
    masks = image.masks()
    ignored = masks[crowd].any(0)
    return contours_of(layers_of(masks[~crowd] & ~ignored, ignored.shape), ignored)


def _same(image: coco.ImageInstances) -> coco.ImageInstances:
    return image


def _photo(name: str, image: Path | None, path: Path, ignore: Sequence[int]) -> Photo:
    """A photo with one file, or folder, of ground truth."""
    if path.suffix == ".mat":
        return Photo(name, image, path, functools.partial(_from_bsds, path))
    read = functools.partial(_from_masks, path) if path.is_dir() else functools.partial(_from_labels, path, ignore)
    number = int(name) if name.isdecimal() else 0

    def instances() -> coco.ImageInstances:
        labels, ignored = read()
        masks = [labels == label for label in np.unique(labels) if label]
        flat = [mask.any(0) for mask in masks] + [ignored] * bool(ignored.any())
        stack = np.stack(flat) if flat else np.zeros((0, *ignored.shape), bool)
        return coco.encode_masks(stack, iscrowd=np.arange(len(stack)) >= len(masks), id=number, file_name=name)

    more = tuple(sorted(path.iterdir())) if path.is_dir() else (f"ignored: {sorted(set(ignore))}",)
    return Photo(name, image, path, lambda: contours_of(*read()), instances, more)


def _from_labels(path: Path, ignore: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Labels (L, H, W) and what is ignored (H, W)."""
    labels = _pixels(path)
    if labels.ndim == 3:
        labels = (labels[..., :3].astype(np.int64) << (0, 8, 16)).sum(-1)
    ignored = np.isin(labels, ignore)
    return np.where(ignored, 0, labels)[None], ignored


def _from_masks(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Likewise, from one mask a file."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    masks = [_pixels(path) for path in files]
    masks = [mask.max(-1) > 0 if mask.ndim == 3 else mask > 0 for mask in masks]
    if len(shapes := {mask.shape for mask in masks}) != 1:
        raise ValueError(f"masks must be of one size, got {sorted(shapes) or 'no files'} in {folder}")
    return layers_of(masks, masks[0].shape), np.zeros(masks[0].shape, bool)


def _from_bsds(path: Path) -> Contours:
    from scipy.io import loadmat

    try:
        drawn = np.stack([each["Boundaries"][0, 0] > 0 for each in loadmat(path)["groundTruth"][0]])
    except Exception as error:  # damaged bytes fail in many ways
        raise ValueError(f"no groundTruth with Boundaries, as BSDS500 has, in {path}: {error}") from error
    return Contours(drawn, np.zeros(drawn.shape[1:], bool), None)


def _pixels(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as picture:
        opaque = {"LA": "L", "RGBA": "RGB"}.get(picture.mode)
        return np.asarray(picture.convert(opaque) if opaque else picture)
