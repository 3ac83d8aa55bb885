"""COCO's files, checked before anything is computed from them: instances, results and panoptic segmentations.

Read are the files of COCO and what is written like them: iSAID, HRSID, the class-agnostic ones of CutLER and its kin.
Masks are kept as compressed RLE and segment maps as the PNG files they are; either is decoded when it is asked for, and
not kept, so that memory does not grow with the images that were looked at.

Everything that is wrong with a file is raised at once, in one ValueError: ids that occur twice, images without a size,
annotations of images that are not listed, polygons with an odd number of coordinates, RLE of another size than its
image's or with counts that do not sum up, scores that are missing or not finite, segments of a PNG that the JSON does
not have, and the reverse. Of an annotation it is the first problem. What leaves a score well defined is counted in
`notes`: masks without a pixel, polygons of fewer than three points (left out), missing areas (the mask's is taken),
categories without a name, images whose height and width are exchanged, which MaskCut writes (the size of their RLE is
taken), images without a panoptic annotation (left out).
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import sys
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "ImageInstances",
    "ImageSegments",
    "Instance",
    "Instances",
    "Panoptic",
    "encode_masks",
    "read_annotations",
    "read_instances",
    "read_panoptic",
    "read_results",
]

LINES = 20  # problems that a message lists
FARTHEST = 2**20  # coordinates of polygons; rasterising takes time in proportion


@dataclass(frozen=True, slots=True)
class Instance:
    """A mask of an image.

    Attributes:
        counts: compressed RLE of the image's size, as pycocotools writes it.
        category: its id.
        area: pixels; of the truth what the file says, which COCO measured on polygons; of results the mask's.
        iscrowd: of the truth, a region of many instances, which is ignored where nothing else matches.
        score: of results, higher is surer; 1.0 where a file may leave it out.
    """

    counts: bytes
    category: int
    area: float
    iscrowd: bool = False
    score: float = 1.0


@dataclass(frozen=True, slots=True)
class ImageInstances:
    """The instances of an image, M of them; they may overlap.

    Attributes:
        id: of the image.
        height: pixels.
        width: pixels.
        file_name: of the image; "" in a list of results, which does not say.
        instances: in the order of the file.
    """

    id: int
    height: int
    width: int
    file_name: str
    instances: list[Instance]

    def rles(self) -> list[dict[str, Any]]:
        """The masks as pycocotools takes them: {"size": [height, width], "counts": bytes}."""
        return [{"size": [self.height, self.width], "counts": instance.counts} for instance in self.instances]

    def masks(self) -> np.ndarray:
        """The masks decoded: (M, height, width) bool."""
        masks = np.empty((len(self.instances), self.height, self.width), dtype=bool)
        for mask, instance in zip(masks, self.instances, strict=True):
            runs = run_lengths(instance.counts)  # out of the mask and in it by turns, down the columns
            mask[...] = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(self.width, self.height).T
        return masks


@dataclass(frozen=True)
class Instances:
    """The instances of a file.

    Attributes:
        images: by id, those without an instance included; in a list of results, those that have one.
        categories: name by id, as far as the file names them.
        notes: what was odd, but no problem.
    """

    images: dict[int, ImageInstances]
    categories: dict[int, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImageSegments:
    """The panoptic segments of an image; they do not overlap.

    Attributes:
        id: of the image.
        height: pixels.
        width: pixels.
        file_name: of the image.
        segments: COCO's segments_info: {"id", "category_id", "iscrowd"} and what else the file says.
        png: the file with the segment map.
    """

    id: int
    height: int
    width: int
    file_name: str
    segments: list[dict[str, Any]]
    png: Path

    def segment_map(self) -> np.ndarray:
        """The segment id of each pixel, R + 256 G + 256^2 B of the PNG: (height, width) int32, 0 is void.

        Raises:
            ValueError: the PNG is not RGB.
            OSError: it cannot be read.
        """
        from PIL import Image

        with Image.open(self.png) as picture:
            if picture.mode != "RGB":
                raise ValueError(f"segment_map: {self.png.name} must be an RGB picture, got mode {picture.mode}")
            colours = np.asarray(picture)
        ids = np.zeros((*colours.shape[:2], 4), dtype=np.uint8)
        ids[..., :3] = colours
        return ids.view("<i4")[..., 0].astype(np.int32, copy=False)


@dataclass(frozen=True)
class Panoptic:
    """The panoptic segmentations of a JSON file and its folder of PNG files.

    Attributes:
        images: by id, those with an annotation.
        categories: name by id.
        isthing: by category id; what is no thing is stuff.
        notes: what was odd, but no problem.
    """

    images: dict[int, ImageSegments]
    categories: dict[int, str]
    isthing: dict[int, bool]
    notes: tuple[str, ...] = ()


def read_instances(path: str | os.PathLike[str] | Mapping[str, Any]) -> Instances:
    """Read an annotation file of COCO's form, such as a ground truth or pseudo labels.

    Args:
        path: a JSON file with images, annotations and perhaps categories, or what it holds. Segmentations are polygons,
            uncompressed or compressed RLE; crowds stay marked. A score is kept where there is one.

    Returns:
        The instances, every mask as compressed RLE.

    Raises:
        ValueError: the file is no JSON or has problems; all are listed, see above.
        OSError: the file is missing or cannot be read.
        RuntimeError: pycocotools is not installed.

    Example:
        >>> images = [{"id": 7, "file_name": "x.jpg", "height": 2, "width": 3}]
        >>> corner = {"id": 1, "image_id": 7, "category_id": 1, "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]]}
        >>> read_instances({"images": images, "annotations": [corner]}).images[7].masks().sum((1, 2))
        array([1])
    """
    op = "read_instances"
    return _read_instances(op, *load_json(op, path), results=False)


def read_results(path: str | os.PathLike[str] | Mapping[str, Any] | list[Any]) -> Instances:
    """Read results of COCO's form, a list with scores, or a file of annotations as CutLER writes it.

    Areas are those of the masks, and crowds are not marked: results have none.

    Args:
        path: a JSON file, or what it holds: a list of {"image_id", "category_id", "segmentation", "score"}, RLE alone,
            whose sizes are the images'; or images and annotations, where a score that is missing is 1.0.

    Returns:
        The instances, every mask as compressed RLE.

    Raises:
        ValueError: the file is no JSON or has problems; all are listed, see above.
        OSError: the file is missing or cannot be read.
        RuntimeError: pycocotools is not installed.

    Example:
        >>> left = {"size": [2, 3], "counts": [0, 2, 4]}  # runs out of the mask and in it, down the columns
        >>> results = read_results([{"image_id": 7, "category_id": 1, "segmentation": left, "score": 0.5}])
        >>> results.images[7].instances[0].area
        2.0
    """
    op = "read_results"
    return _read_instances(op, *load_json(op, path, lists=True), results=True)


def read_panoptic(path: str | os.PathLike[str] | Mapping[str, Any], png_folder: str | os.PathLike[str]) -> Panoptic:
    """Read a panoptic segmentation of COCO's form. Every PNG is decoded once, to be checked, and none is kept.

    Args:
        path: a JSON file with images, annotations and categories that say isthing, or what it holds.
        png_folder: where the PNG files are that the annotations name.

    Returns:
        The segments; their maps are decoded by `ImageSegments.segment_map`.

    Raises:
        ValueError: the file is no JSON, or it or the PNG files have problems; all are listed, see above.
        OSError: the file is missing or cannot be read.

    Example:
        >>> truth = read_panoptic("panoptic_val2017.json", "panoptic_val2017")
        >>> maps = (image.segment_map() for image in truth.images.values())
    """
    op = "read_panoptic"
    return _read_panoptic(op, *load_json(op, path), Path(png_folder))


def read_annotations(path: str | os.PathLike[str], *, results: bool = False) -> Instances | Panoptic:
    """Read a JSON file of COCO's form, whichever it is: panoptic segments or masks. It is parsed once.

    Args:
        path: a JSON file. Where an annotation has segments_info the file is panoptic, and its PNG files are in the
            folder of its name beside it: panoptic_val2017 beside panoptic_val2017.json.
        results: read masks as results, as `read_results` does, else as annotations, as `read_instances` does.

    Returns:
        What `read_panoptic`, `read_results` or `read_instances` returns.

    Raises:
        ValueError: the file is no JSON or has problems; all are listed, see above.
        OSError: the file is missing or cannot be read.
        RuntimeError: pycocotools is not installed.

    Example:
        >>> truth = read_annotations("panoptic_val2017.json")
        >>> isinstance(truth, Panoptic)
        True
    """
    op = "read_annotations"
    data, name = load_json(op, path, lists=results)
    entries = data.get("annotations") if isinstance(data, Mapping) else None
    if isinstance(entries, list) and any(isinstance(entry, Mapping) and "segments_info" in entry for entry in entries):
        return _read_panoptic(op, data, name, Path(path).with_suffix(""))
    return _read_instances(op, data, name, results=results)


def _read_panoptic(op: str, data: Mapping[str, Any], name: str, png_folder: Path) -> Panoptic:
    """Read the panoptic segmentation of an object that messages call `name`."""
    problems: list[str] = []
    notes: Counter[str] = Counter()
    listed = _images(data, problems)
    categories, isthing = {}, {}
    for category, (where, entry) in _by_id(data, "categories", problems).items():
        categories[category] = str(entry.get("name", category))
        try:
            isthing[category] = _flag(entry, "isthing")
        except ValueError as problem:
            problems.append(f"{where}: {problem}")
    images: dict[int, ImageSegments] = {}
    for where, entry in _entries(data, "annotations", problems):
        try:
            number = integer(entry, "image_id")
            if number not in listed:
                raise ValueError(f"image_id must be that of a listed image, got {number}")
            _unique(number, images, "image_id")
            file_name = entry.get("file_name")
            if not isinstance(file_name, str):
                raise ValueError(f"file_name must be that of a PNG, got {reprlib.repr(file_name)}")
        except ValueError as problem:
            problems.append(f"{where}: {problem}")
            continue
        segments = []
        for segment, (place, details) in _by_id(entry, "segments_info", problems, where, low=1).items():
            category, crowd = 0, False
            try:
                category = integer(details, "category_id")
                if category not in categories:
                    raise ValueError(f"category_id must be that of a listed category, got {category}")
                crowd = _flag(details, "iscrowd", False)
            except ValueError as problem:
                problems.append(f"{place}: {problem}")
            segments.append({**details, "id": segment, "category_id": category, "iscrowd": int(crowd)})
        images[number] = ImageSegments(number, *listed[number], segments, png_folder / file_name)
        problems += [f"{where}: {problem}" for problem in _png_problems(images[number])]
    notes["images without an annotation, left out"] = len(listed) - len(images)
    _refuse(op, name, problems)
    return Panoptic(images, categories, isthing, _spell(notes))


def encode_masks(
    masks: np.ndarray,
    scores: np.ndarray | None = None,
    iscrowd: np.ndarray | None = None,
    *,
    id: int = 0,
    file_name: str = "",
) -> ImageInstances:
    """The instances of an image from plain masks.

    Args:
        masks: (M, H, W) bool; they may overlap.
        scores: (M,) float, finite; default 1.
        iscrowd: (M,) bool; default none is.
        id: of the image.
        file_name: of the image.

    Returns:
        The instances, category 1, with the areas of their masks.

    Raises:
        TypeError: masks is not a bool array.
        ValueError: shapes do not agree, or a score is not finite.
        RuntimeError: pycocotools is not installed.

    Example:
        >>> encode_masks(np.ones((1, 2, 3), dtype=bool)).instances[0].area
        6.0
    """
    api = mask_api("encode_masks")
    if not isinstance(masks, np.ndarray) or masks.dtype != bool:
        got = masks.dtype if isinstance(masks, np.ndarray) else type(masks).__name__
        raise TypeError(f"encode_masks: masks must be a bool array, got {got}")
    if masks.ndim != 3 or 0 in masks.shape[1:]:
        raise ValueError(f"encode_masks: masks must be (M, H, W), got {masks.shape}")
    count, height, width = masks.shape
    values = np.ones(count) if scores is None else np.asarray(scores, dtype=np.float64)
    crowds = np.zeros(count, dtype=bool) if iscrowd is None else np.asarray(iscrowd, dtype=bool)
    for name, value in (("scores", values), ("iscrowd", crowds)):
        if value.shape != (count,):
            raise ValueError(f"encode_masks: {name} must be ({count},), one for each mask, got {value.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"encode_masks: scores must be finite, got {values[~np.isfinite(values)][0]}")
    rles = api.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8)) if count else []
    areas = [np.count_nonzero(mask) for mask in masks]  # ten times as fast as a sum
    instances = [
        Instance(rle["counts"], 1, float(area), bool(crowd), float(score))
        for rle, area, crowd, score in zip(rles, areas, crowds, values, strict=True)
    ]
    return ImageInstances(id, height, width, file_name, instances)


def _read_instances(op: str, data: Any, name: str, *, results: bool) -> Instances:
    """Read the instances of an annotation file or, where results are read, of a list; messages call it `name`."""
    api = mask_api(op)
    bare = isinstance(data, list)
    if bare:
        data = {"results": data}
    problems: list[str] = []
    notes: Counter[str] = Counter()
    images: dict[int, ImageInstances] = {}
    if not bare:
        images = {number: ImageInstances(number, *image, []) for number, image in _images(data, problems).items()}
    listed = _by_id(data, "categories", problems) if "categories" in data else {}
    categories = {category: str(entry.get("name", category)) for category, (_, entry) in listed.items()}
    seen: set[int] = set()
    for where, entry in _entries(data, "results" if bare else "annotations", problems):
        try:
            if "id" in entry and not bare:
                seen.add(_unique(integer(entry, "id"), seen))
            number, segmentation = integer(entry, "image_id"), entry.get("segmentation")
            if bare:
                images.setdefault(number, ImageInstances(number, *rle_size(segmentation), "", []))
            if number not in images:
                raise ValueError(f"image_id must be that of a listed image, got {number}")
            image = images[number]
            if image.height == 0:  # a problem that is listed already
                continue
            size = image.height, image.width
            if (
                isinstance(segmentation, Mapping)
                and not image.instances
                and size != rle_size(segmentation) == size[::-1]
            ):
                images[number] = image = replace(image, height=image.width, width=image.height)
                notes["images with height and width exchanged, the size of their masks taken"] += 1
            counts = encode(api, segmentation, image.height, image.width, notes)
            pixels = float(api.area({"size": [image.height, image.width], "counts": counts}))
            notes["masks without a pixel"] += pixels == 0
            category = integer(entry, "category_id")
            notes["instances of a category without a name"] += bool(categories) and category not in categories
            score = _finite(entry, "score", None if bare else 1.0)
            if results:
                instance = Instance(counts, category, pixels, score=score)
            else:
                area = _finite(entry, "area", pixels, low=0)
                notes["annotations without an area, the mask's taken"] += "area" not in entry
                instance = Instance(counts, category, area, _flag(entry, "iscrowd", False), score)
            image.instances.append(instance)
        except ValueError as problem:
            problems.append(f"{where}: {problem}")
    _refuse(op, name, problems)
    return Instances(images, categories, _spell(notes))


def mask_api(op: str) -> Any:
    """pycocotools.mask, or how to install it."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise RuntimeError(f"{op}: needs pycocotools: pip install pycocotools") from error
    return mask


def load_json(op: str, path: Any, lists: bool = False) -> tuple[Any, str]:
    """What a JSON file holds, and how messages call it."""
    name = "the given data"
    data = path
    if isinstance(path, (str, os.PathLike)):
        name = f"'{os.fspath(path)}'"
        try:
            data = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise type(error)(f"{op}: path must be a file that can be read, got {name}: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{op}: path must be a JSON file, got {name}: {error}") from error
    if not isinstance(data, (Mapping, list) if lists else Mapping):
        kinds = "a list of results or an object" if lists else "an object"
        raise ValueError(
            f"{op}: path must hold {kinds} with images and annotations, got {reprlib.repr(data)} in {name}"
        )
    return data, name


def _entries(data: Mapping[str, Any], key: str, problems: list[str], where: str = "") -> list[tuple[str, Any]]:
    """The objects of a list, each with what messages call it; what is no list or object is a problem."""
    place = f"{where}.{key}" if where else key
    entries = data.get(key)
    if not isinstance(entries, list):
        problems.append(f"{place} must be a list, got {reprlib.repr(entries)}")
        return []
    named = [(f"{place}[{index}]", entry) for index, entry in enumerate(entries)]
    problems += [f"{name} must be an object, got {reprlib.repr(x)}" for name, x in named if not isinstance(x, Mapping)]
    return [(name, entry) for name, entry in named if isinstance(entry, Mapping)]


def _by_id(
    data: Mapping[str, Any], key: str, problems: list[str], where: str = "", low: float = -math.inf
) -> dict[int, tuple[str, Mapping[str, Any]]]:
    """The objects of a list by their ids."""
    found: dict[int, tuple[str, Mapping[str, Any]]] = {}
    for place, entry in _entries(data, key, problems, where):
        try:
            found[_unique(integer(entry, "id", low), found)] = place, entry
        except ValueError as problem:
            problems.append(f"{place}: {problem}")
    return found


def _images(data: Mapping[str, Any], problems: list[str]) -> dict[int, tuple[int, int, str]]:
    """(height, width, file_name) of the listed images by id; 0 x 0 where the size is a problem."""
    images = {}
    for number, (where, entry) in _by_id(data, "images", problems).items():
        height = width = 0
        try:
            height, width = integer(entry, "height", 1), integer(entry, "width", 1)
        except ValueError as problem:
            problems.append(f"{where}: {problem}")
        images[number] = height, width, str(entry.get("file_name", ""))
    return images


def integer(entry: Mapping[str, Any], key: str, low: float = -math.inf) -> int:
    """An integer, also one written as a float."""
    value = entry.get(key)
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if value is None or not whole or isinstance(value, bool) or value < low:
        least = f" of at least {low}" if low > -math.inf else ""
        raise ValueError(f"{key} must be an integer{least}, got {reprlib.repr(value)}")
    return int(value)


def _finite(entry: Mapping[str, Any], key: str, default: float | None, low: float = -sys.float_info.max) -> float:
    value = entry.get(key, default)
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None or not real or not low <= value <= sys.float_info.max:
        least = " of at least 0" if low == 0 else ""
        raise ValueError(f"{key} must be a finite number{least}, got {reprlib.repr(value)}")
    return float(value)


def _flag(entry: Mapping[str, Any], key: str, default: bool | None = None) -> bool:
    value = entry.get(key, default)
    if value not in (0, 1):
        raise ValueError(f"{key} must be 0 or 1, got {reprlib.repr(value)}")
    return bool(value)


def _unique(value: int, seen: Container[int], key: str = "id") -> int:
    if value in seen:
        raise ValueError(f"{key} must be unique, got {value} again")
    return value


def rle_size(segmentation: Any) -> tuple[int, int]:
    """Height and width that an RLE states."""
    size = segmentation.get("size") if isinstance(segmentation, Mapping) else None
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        raise ValueError(f"segmentation must be RLE with its size, got {reprlib.repr(segmentation)}")
    height, width = (integer({"size": side}, "size", 1) for side in size)
    return height, width


def encode(api: Any, segmentation: Any, height: int, width: int, notes: Counter[str]) -> bytes:
    """Polygons or RLE as the counts of a compressed RLE, checked."""
    if isinstance(segmentation, list) and segmentation:
        rings = []
        for ring in segmentation:
            try:
                points = np.asarray(ring)
            except ValueError:
                points = np.empty((0, 0))
            odd = points.ndim != 1 or points.dtype.kind not in "iuf" or len(points) % 2 == 1
            if odd or not (abs(points) < FARTHEST).all():
                raise ValueError(f"polygon must be an even number of finite coordinates, got {reprlib.repr(ring)}")
            if len(points) < 6:  # covers nothing, and pycocotools would read two points as a box
                notes["polygons of fewer than three points, left out"] += 1
            else:
                rings.append(ring)
        empty = {"size": [height, width], "counts": [height * width]}
        return bytes(api.merge(api.frPyObjects(rings or [empty], height, width))["counts"])

    if not isinstance(segmentation, Mapping):
        raise ValueError(f"segmentation must be polygons or RLE, got {reprlib.repr(segmentation)}")
    stated, counts = rle_size(segmentation), segmentation.get("counts")
    if stated != (height, width):
        raise ValueError(f"segmentation must be of its image's size {(height, width)}, got {stated}")
    if isinstance(counts, list):
        if not all(type(run) is int for run in counts):
            raise ValueError(f"counts must be integers, got {reprlib.repr(counts)}")
        runs = np.array(counts, dtype=object)
    elif isinstance(counts, (str, bytes)):
        counts = counts.encode() if isinstance(counts, str) else counts
        runs = run_lengths(counts)
    else:
        raise ValueError(f"counts must be a list or a string, got {reprlib.repr(counts)}")
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"counts must be at least 0 and sum to {height} * {width}, got {reprlib.repr(runs.tolist())}")
    if isinstance(counts, list):
        return bytes(api.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"])
    return counts


def run_lengths(counts: bytes) -> np.ndarray:
    """Run lengths of a compressed RLE, int64; pycocotools reads past the end of strings that are cut off.

    A length is written in groups of five bits from the lowest, each a character from "0" on; bit 5 says that another
    follows, and bit 4 of the last is the sign. From the fourth on, lengths are differences to the last but one.
    """
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - ord("0")
    last = codes & 32 == 0
    if not codes.size or codes.min() < 0 or codes.max() > 63 or not last[-1]:
        raise ValueError(f"counts must be a compressed RLE, got {reprlib.repr(counts)}")
    ends = np.flatnonzero(last)
    starts = np.append(0, ends[:-1] + 1)
    digit = np.arange(codes.size) - np.repeat(starts, ends - starts + 1)
    if digit.max() > 6:  # 35 bits
        raise ValueError(f"counts must be a compressed RLE of 32-bit lengths, got {reprlib.repr(counts)}")
    runs = np.add.reduceat((codes & 31) << 5 * digit, starts)
    runs -= np.where(codes[ends] & 16, 32 << 5 * digit[ends], 0)
    for parity in (1, 2):
        runs[parity::2] = np.cumsum(runs[parity::2])
    return runs


def _png_problems(image: ImageSegments) -> list[str]:
    """What is wrong with the PNG of an image."""
    if not image.png.is_file():
        return [f"{image.png.name} must be a file of the folder, got none"]
    try:
        ids = image.segment_map()
    except Exception as error:  # damaged bytes fail in many ways
        return [f"{image.png.name} must be a readable RGB PNG, got {error}"]
    if image.height and ids.shape != (image.height, image.width):
        return [f"{image.png.name} must be {image.height} x {image.width} like its image, got {ids.shape}"]
    drawn, listed = set(np.unique(ids).tolist()) - {0}, {segment["id"] for segment in image.segments}
    problems = []
    for missing, place in ((drawn - listed, "JSON"), (listed - drawn, "PNG")):
        if missing:
            problems.append(f"segments must be in PNG and JSON, got {reprlib.repr(sorted(missing))} not in the {place}")
    return problems


def _refuse(op: str, name: str, problems: list[str]) -> None:
    """Raise what was found, if anything was."""
    if problems:
        lines = problems[:LINES]
        if len(problems) > LINES:
            lines.append(f"and {len(problems) - LINES} more")
        found = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ValueError(f"{op}: path must be free of problems, got {found} in {name}:\n  " + "\n  ".join(lines))


def _spell(notes: Counter[str]) -> tuple[str, ...]:
    return tuple(f"{text}: {count}" for text, count in notes.items() if count)
