"""Readers of COCO's JSON files: instances, results and panoptic segmentations, checked before they are used.

They read the files of COCO and files of the same form, such as those of iSAID, HRSID, and the class-agnostic ones of
CutLER. Masks are kept as compressed RLE and segment maps as PNG files. Both are decoded on request and not kept, so
that memory does not grow with the number of images that were used.

All problems of a file are listed in one ValueError: repeated ids, images without a size, annotations of images that
are not listed, polygons with an odd number of coordinates, RLE whose size or counts do not fit the image, scores that
are missing or not finite, segments that only the PNG or only the JSON has. Of each annotation the first problem is
listed. Oddities that leave scores well defined are counted in `notes`: masks without pixels, polygons of fewer than
three points (left out), missing areas (measured on the mask), categories without a name, images whose height and width
are exchanged as MaskCut writes them (the size of their RLE is used), images without a panoptic annotation (left out).
"""

from __future__ import annotations

import json
import os
import reprlib
import sys
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trace_fast.io.pictures import read_picture
from trace_fast.masks.rle import (
    LEAST,
    check_pixels,
    decode_mask,
    encode_rles,
    encode_segmentation,
    import_mask_api,
    read_integer,
    read_rle_size,
)
from trace_fast.ops import checks

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

MAX_LISTED = 20  # problems that a message lists
EXCHANGED = "images with height and width exchanged, of which the size of the masks is used"


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance of an image, with its mask.

    Attributes:
        counts: compressed RLE of the image's size, as pycocotools writes it.
        category: id of its category.
        area: in pixels; for a ground truth the number in the file, which COCO measured on polygons, else the mask's.
        iscrowd: whether a ground truth marks a group of instances, which is ignored if nothing else matches.
        score: confidence of a result, higher is more certain; 1.0 where the file may leave it out.
    """

    counts: bytes
    category: int
    area: float
    iscrowd: bool = False
    score: float = 1.0


@dataclass(frozen=True, slots=True)
class ImageInstances:
    """The instances of one image, M of them; they may overlap.

    Attributes:
        id: id of the image.
        height: in pixels.
        width: in pixels.
        file_name: name of the image file; "" for a list of results, which has no names.
        instances: in the order of the file.
    """

    id: int
    height: int
    width: int
    file_name: str
    instances: list[Instance]

    def rles(self) -> list[dict[str, Any]]:
        """Return the masks as pycocotools takes them: {"size": [height, width], "counts": bytes}."""
        return [{"size": [self.height, self.width], "counts": instance.counts} for instance in self.instances]

    def masks(self) -> np.ndarray:
        """Return the masks decoded: (M, height, width) bool.

        Raises:
            ValueError: they do not fit into memory.
        """
        shape = len(self.instances), self.height, self.width
        checks.stack("masks", "instances", shape)
        masks = np.empty(shape, dtype=bool)
        for mask, instance in zip(masks, self.instances, strict=True):
            mask[...] = decode_mask(instance.counts, self.height, self.width)
        return masks


@dataclass(frozen=True)
class Instances:
    """The instances of a file.

    Attributes:
        images: images by id, including those without an instance, which a list of results does not have.
        categories: names by id, as far as the file has them.
        notes: oddities that are no problems, each with its count.
        left_out: problems of records that were left out, a line each.
    """

    images: dict[int, ImageInstances]
    categories: dict[int, str]
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImageSegments:
    """The panoptic segments of one image; they do not overlap.

    Attributes:
        id: id of the image.
        height: in pixels.
        width: in pixels.
        file_name: name of the image file.
        segments: COCO's segments_info: {"id", "category_id", "iscrowd"} and all other fields of the file.
        png: the file of the segment map.
    """

    id: int
    height: int
    width: int
    file_name: str
    segments: list[dict[str, Any]]
    png: Path

    def segment_map(self) -> np.ndarray:
        """Read the segment id of each pixel, R + 256 G + 256^2 B of the PNG: (height, width) int32, 0 is void.

        Raises:
            ValueError: the PNG is not RGB, or is damaged.
            OSError: the PNG is missing or cannot be read.
        """
        with read_picture("segment_map: png", self.png) as picture:
            if picture.mode != "RGB":
                raise ValueError(f"segment_map: {self.png.name} must be an RGB picture, got mode {picture.mode}")
            colors = np.asarray(picture)
        ids = np.zeros((*colors.shape[:2], 4), dtype=np.uint8)
        ids[..., :3] = colors
        return ids.view("<i4")[..., 0].astype(np.int32, copy=False)


@dataclass(frozen=True)
class Panoptic:
    """The panoptic segmentations of a JSON file and its folder of PNG files.

    Attributes:
        images: images by id, those that have an annotation.
        categories: names by id.
        isthing: whether a category is a thing, by its id; the others are stuff.
        notes: oddities that are no problems, each with its count.
    """

    images: dict[int, ImageSegments]
    categories: dict[int, str]
    isthing: dict[int, bool]
    notes: tuple[str, ...] = ()


def read_instances(path: str | os.PathLike[str] | Mapping[str, Any]) -> Instances:
    """Read an annotation file of COCO's form, such as a ground truth or pseudo labels.

    Args:
        path: a JSON file with images, annotations and perhaps categories, or its content. Segmentations are polygons
            or RLE, compressed or not. Crowd marks and, where there are any, scores are kept.

    Returns:
        The instances, every mask as compressed RLE.

    Raises:
        ValueError: the file is not JSON or has problems, which are all listed.
        OSError: the file is missing or cannot be read.
        RuntimeError: pycocotools is not installed.

    Example:
        >>> images = [{"id": 7, "file_name": "x.jpg", "height": 2, "width": 3}]
        >>> corner = {"id": 1, "image_id": 7, "category_id": 1, "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]]}
        >>> read_instances({"images": images, "annotations": [corner]}).images[7].masks().sum((1, 2))
        array([1])
    """
    op = "read_instances"
    return parse_instances(op, *load_json(op, path))


def read_results(path: str | os.PathLike[str] | Mapping[str, Any] | list[Any]) -> Instances:
    """Read results of COCO's form: a list with scores, or an annotation file as CutLER writes it.

    Areas are measured on the masks, and crowd marks are ignored, since results have none.

    Args:
        path: a JSON file or its content: a list of {"image_id", "category_id", "segmentation", "score"}
            whose segmentations are RLE of the image's size; or an object with images and annotations, where a missing
            score is 1.0.

    Returns:
        The instances, every mask as compressed RLE.

    Raises:
        ValueError: the file is not JSON or has problems, which are all listed.
        OSError: the file is missing or cannot be read.
        RuntimeError: pycocotools is not installed.

    Example:
        >>> left = {"size": [2, 3], "counts": [0, 2, 4]}  # runs outside and inside the mask, down the columns
        >>> results = read_results([{"image_id": 7, "category_id": 1, "segmentation": left, "score": 0.5}])
        >>> results.images[7].instances[0].area
        2.0
    """
    op = "read_results"
    return parse_instances(op, *load_json(op, path, or_list=True), as_results=True)


def read_panoptic(path: str | os.PathLike[str] | Mapping[str, Any], png_folder: str | os.PathLike[str]) -> Panoptic:
    """Read panoptic segmentations of COCO's form; every PNG is decoded once to be checked.

    Args:
        path: a JSON file with images, annotations and categories that have isthing, or its content.
        png_folder: folder of the PNG files that the annotations name.

    Returns:
        The segments; `ImageSegments.segment_map` decodes the segment map of an image.

    Raises:
        ValueError: the file is not JSON, or it or the PNG files have problems, which are all listed.
        OSError: the file is missing or cannot be read.

    Example:
        >>> truth = read_panoptic("panoptic_val2017.json", "panoptic_val2017")
        >>> maps = (image.segment_map() for image in truth.images.values())
    """
    op = "read_panoptic"
    return _parse_panoptic(op, *load_json(op, path), Path(png_folder))


def read_annotations(
    path: str | os.PathLike[str], *, results: bool = False, skip_bad: bool = False
) -> Instances | Panoptic:
    """Read a JSON file of COCO's form, panoptic segments or masks; it is parsed once.

    Args:
        path: a JSON file. If an annotation has segments_info, the file is panoptic, and its PNG files are in the folder
            of the same name without the ending: panoptic_val2017 for panoptic_val2017.json.
        results: read masks as results, as `read_results` does, instead of as annotations, as `read_instances` does.
        skip_bad: leave out results that have a problem and, of a ground truth, the images of annotations that have one.
            Files of panoptic segments, and files without the lists that they need, raise all the same.

    Returns:
        The panoptic segments or the instances; `Instances.left_out` says what was left out.

    Raises:
        ValueError: the file is not JSON or has problems, which are all listed.
        OSError: the file is missing or cannot be read.
        RuntimeError: the file holds masks, and pycocotools is not installed.

    Example:
        >>> truth = read_annotations("panoptic_val2017.json")
        >>> isinstance(truth, Panoptic)
        True
    """
    op = "read_annotations"
    content, name = load_json(op, path, or_list=results)
    entries = content.get("annotations") if isinstance(content, Mapping) else None
    if isinstance(entries, list) and any(isinstance(entry, Mapping) and "segments_info" in entry for entry in entries):
        return _parse_panoptic(op, content, name, Path(path).with_suffix(""))
    return parse_instances(op, content, name, as_results=results, skip_bad=skip_bad)


def encode_masks(
    masks: np.ndarray,
    scores: np.ndarray | None = None,
    iscrowd: np.ndarray | None = None,
    *,
    id: int = 0,
    file_name: str = "",
) -> ImageInstances:
    """Encode masks of one image as instances of category 1.

    Args:
        masks: (M, H, W) bool; they may overlap.
        scores: (M,) float, finite; None is 1 for each mask.
        iscrowd: (M,) bool; None marks no mask.
        id: id of the image.
        file_name: name of the image file.

    Returns:
        The instances, with the areas of their masks in pixels.

    Raises:
        TypeError: masks is not a bool array.
        ValueError: shapes do not agree, or a score is not finite.
        RuntimeError: pycocotools is not installed.

    Example:
        >>> encode_masks(np.ones((1, 2, 3), dtype=bool)).instances[0].area
        6.0
    """
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
    areas = [np.count_nonzero(mask) for mask in masks]  # ten times as fast as a sum
    instances = [
        Instance(counts, 1, float(area), bool(crowd), float(score))
        for counts, area, crowd, score in zip(encode_rles("encode_masks", masks), areas, crowds, values, strict=True)
    ]
    return ImageInstances(id, height, width, file_name, instances)


def load_json(op: str, path: Any, or_list: bool = False) -> tuple[Any, str]:
    """Return the content of a JSON file, an object or perhaps a list, and the name of the file for messages."""
    name, content = "the given data", path
    if isinstance(path, (str, os.PathLike)):
        name = f"'{os.fspath(path)}'"
        try:
            content = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise type(error)(f"{op}: path must be a file that can be read, got {name}: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{op}: path must be a JSON file, got {name}: {error}") from error
    if not isinstance(content, (Mapping, list) if or_list else Mapping):
        required = "a list of results or an object" if or_list else "an object"
        raise ValueError(
            f"{op}: path must hold {required} with images and annotations, got {reprlib.repr(content)} in {name}"
        )
    return content, name


def parse_instances(op: str, content: Any, name: str, *, as_results: bool = False, skip_bad: bool = False) -> Instances:
    """Read the instances of an object or, as results, also of a list; messages call it `name`."""
    api = import_mask_api(op)
    is_list = isinstance(content, list)
    if is_list:
        content = {"results": content}
    problems: list[str] = []
    notes: Counter[str] = Counter()
    images: dict[int, ImageInstances] = {}
    if not is_list:
        sizes = _read_image_sizes(content, problems)
        images = {number: ImageInstances(number, *size, []) for number, size in sizes.items()}
    categories = _read_category_names(content, problems)
    ids: set[int] = set()
    bad: list[tuple[str, Any]] = []  # the problem and the image of each bad record
    for location, entry in _list_entries(content, "results" if is_list else "annotations", problems):
        try:
            if is_list:
                number, (height, width) = read_integer(entry, "image_id"), read_rle_size(entry.get("segmentation"))
                images.setdefault(number, ImageInstances(number, height, width, "", []))
            elif "id" in entry:
                ids.add(_require_unique(read_integer(entry, "id"), ids))
            image = _find_image(images, entry, notes)
            # an image without a size is a problem that is listed already
            if image.height > 0:
                instance = _parse_instance(api, entry, image, notes, as_results=as_results, needs_score=is_list)
                nameless = bool(categories) and instance.category not in categories
                notes["instances of a category without a name"] += nameless
                image.instances.append(instance)
        except ValueError as problem:
            bad.append((f"{location}: {problem}", entry.get("image_id")))
    _exchange_others(images, {} if is_list else sizes, notes)
    lines = tuple(line for line, _ in bad)
    if not skip_bad:
        _raise_problems(op, name, [*problems, *lines])
    _raise_problems(op, name, problems)
    if not as_results:  # an image without one of its annotations is another ground truth
        incomplete = [number for _, number in bad]
        images = {number: image for number, image in images.items() if number not in incomplete}
    return Instances(images, categories, _format_notes(notes), lines)


def _exchange_others(
    images: dict[int, ImageInstances], sizes: Mapping[int, tuple[int, int, str]], notes: Counter[str]
) -> None:
    """Exchange height and width of images without an instance, where all others of a file have them exchanged."""
    is_exchanged = {
        number: image.height != sizes[number][0]
        for number, image in images.items()
        if number in sizes and image.instances and image.height != image.width
    }
    if is_exchanged and all(is_exchanged.values()):
        for number, image in images.items():
            if not image.instances and image.height != image.width:
                images[number] = replace(image, height=image.width, width=image.height)
                notes[EXCHANGED] += 1


def _parse_panoptic(op: str, content: Mapping[str, Any], name: str, png_folder: Path) -> Panoptic:
    """Read the panoptic segmentations of an object; messages call it `name`."""
    problems: list[str] = []
    sizes = _read_image_sizes(content, problems)
    categories, isthing = _read_panoptic_categories(content, problems)
    images: dict[int, ImageSegments] = {}
    for location, entry in _list_entries(content, "annotations", problems):
        try:
            number = read_integer(entry, "image_id")
            if number not in sizes:
                raise ValueError(f"image_id must be that of a listed image, got {number}")
            _require_unique(number, images, "image_id")
            file_name = entry.get("file_name")
            if not isinstance(file_name, str):
                raise ValueError(f"file_name must be that of a PNG, got {reprlib.repr(file_name)}")
        except ValueError as problem:
            problems.append(f"{location}: {problem}")
            continue
        segments = _read_segments(entry, location, categories, problems)
        images[number] = ImageSegments(number, *sizes[number], segments, png_folder / file_name)
        problems += [f"{location}: {problem}" for problem in _find_png_problems(images[number])]
    notes = Counter({"images without an annotation, which are left out": len(sizes) - len(images)})
    _raise_problems(op, name, problems)
    return Panoptic(images, categories, isthing, _format_notes(notes))


def _find_image(images: dict[int, ImageInstances], entry: Mapping[str, Any], notes: Counter[str]) -> ImageInstances:
    """Return the image of an annotation, its height and width exchanged where MaskCut wrote them so."""
    number, segmentation = read_integer(entry, "image_id"), entry.get("segmentation")
    if number not in images:
        raise ValueError(f"image_id must be that of a listed image, got {number}")
    image = images[number]
    size = image.height, image.width
    is_first_rle = image.height > 0 and isinstance(segmentation, Mapping) and not image.instances
    if is_first_rle and size != read_rle_size(segmentation) == size[::-1]:
        images[number] = image = replace(image, height=image.width, width=image.height)
        notes[EXCHANGED] += 1
    return image


def _parse_instance(
    api: Any,
    entry: Mapping[str, Any],
    image: ImageInstances,
    notes: Counter[str],
    *,
    as_results: bool,
    needs_score: bool,
) -> Instance:
    """Read an annotation or a result of an image."""
    counts = encode_segmentation(api, entry.get("segmentation"), image.height, image.width, notes)
    pixels = float(api.area({"size": [image.height, image.width], "counts": counts}))
    notes["masks without a pixel"] += pixels == 0
    category = read_integer(entry, "category_id")
    score = _read_number(entry, "score", None if needs_score else 1.0)
    if as_results:
        return Instance(counts, category, pixels, score=score)
    area = _read_number(entry, "area", pixels, least=0)
    notes["annotations without an area, for which the mask is measured"] += "area" not in entry
    return Instance(counts, category, area, _read_flag(entry, "iscrowd", False), score)


def _read_panoptic_categories(
    content: Mapping[str, Any], problems: list[str]
) -> tuple[dict[int, str], dict[int, bool]]:
    """Read the name of each category by its id, and whether it is a thing."""
    categories, isthing = {}, {}
    for category, (location, entry) in _index_by_id(content, "categories", problems).items():
        categories[category] = str(entry.get("name", category))
        try:
            isthing[category] = _read_flag(entry, "isthing")
        except ValueError as problem:
            problems.append(f"{location}: {problem}")
    return categories, isthing


def _read_segments(
    annotation: Mapping[str, Any], location: str, categories: Container[int], problems: list[str]
) -> list[dict[str, Any]]:
    """Read segments_info of an annotation."""
    segments = []
    for segment, (where, entry) in _index_by_id(annotation, "segments_info", problems, location, least=1).items():
        category, iscrowd = 0, False
        try:
            category = read_integer(entry, "category_id")
            if category not in categories:
                raise ValueError(f"category_id must be that of a listed category, got {category}")
            iscrowd = _read_flag(entry, "iscrowd", False)
        except ValueError as problem:
            problems.append(f"{where}: {problem}")
        segments.append({**entry, "id": segment, "category_id": category, "iscrowd": int(iscrowd)})
    return segments


def _list_entries(
    content: Mapping[str, Any], key: str, problems: list[str], parent: str = ""
) -> list[tuple[str, Mapping[str, Any]]]:
    """List the objects under a key, each with its location such as "images[3]" for messages."""
    location = f"{parent}.{key}" if parent else key
    entries = content.get(key)
    if not isinstance(entries, list):
        problems.append(f"{location} must be a list, got {reprlib.repr(entries)}")
        return []
    objects = []
    for index, entry in enumerate(entries):
        if isinstance(entry, Mapping):
            objects.append((f"{location}[{index}]", entry))
        else:
            problems.append(f"{location}[{index}] must be an object, got {reprlib.repr(entry)}")
    return objects


def _index_by_id(
    content: Mapping[str, Any], key: str, problems: list[str], parent: str = "", least: int = LEAST
) -> dict[int, tuple[str, Mapping[str, Any]]]:
    """Return the objects under a key, with their places, by their ids."""
    objects: dict[int, tuple[str, Mapping[str, Any]]] = {}
    for location, entry in _list_entries(content, key, problems, parent):
        try:
            objects[_require_unique(read_integer(entry, "id", least), objects)] = location, entry
        except ValueError as problem:
            problems.append(f"{location}: {problem}")
    return objects


def _read_category_names(content: Mapping[str, Any], problems: list[str]) -> dict[int, str]:
    """Read the name of each category by its id; a file may lack categories."""
    entries = _index_by_id(content, "categories", problems) if "categories" in content else {}
    return {category: str(entry.get("name", category)) for category, (_, entry) in entries.items()}


def _read_image_sizes(content: Mapping[str, Any], problems: list[str]) -> dict[int, tuple[int, int, str]]:
    """Read (height, width, file_name) of the listed images by id; 0 x 0 where the size is a problem."""
    sizes = {}
    for number, (location, entry) in _index_by_id(content, "images", problems).items():
        height = width = 0
        try:
            size = read_integer(entry, "height", 1), read_integer(entry, "width", 1)
            check_pixels("height and width", *size)
            height, width = size
        except ValueError as problem:
            problems.append(f"{location}: {problem}")
        sizes[number] = height, width, str(entry.get("file_name", ""))
    return sizes


def _read_number(
    entry: Mapping[str, Any], key: str, default: float | None, least: float = -sys.float_info.max
) -> float:
    """Read a finite number; it is required where there is no default."""
    value = entry.get(key, default)
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None or not is_real or not least <= value <= sys.float_info.max:
        bound = " of at least 0" if least == 0 else ""
        raise ValueError(f"{key} must be a finite number{bound}, got {reprlib.repr(value)}")
    return float(value)


def _read_flag(entry: Mapping[str, Any], key: str, default: bool | None = None) -> bool:
    """Read a flag, which COCO writes as 0 or 1; it is required where there is no default."""
    value = entry.get(key, default)
    if value not in (0, 1):
        raise ValueError(f"{key} must be 0 or 1, got {reprlib.repr(value)}")
    return bool(value)


def _require_unique(value: int, others: Container[int], key: str = "id") -> int:
    """Return a value that is not among others."""
    if value in others:
        raise ValueError(f"{key} must be unique, got {value} again")
    return value


def _find_png_problems(image: ImageSegments) -> list[str]:
    """List the problems of the PNG of an image."""
    if not os.path.isfile(image.png):
        return [f"{image.png.name} must be a file of the folder, got none"]
    try:
        ids = image.segment_map()
    except Exception as error:  # damaged bytes fail in many ways
        return [f"{image.png.name} must be a readable RGB PNG, got {error}"]
    if image.height and ids.shape != (image.height, image.width):
        return [f"{image.png.name} must be {image.height} x {image.width} like its image, got {ids.shape}"]
    in_png, in_json = set(np.unique(ids).tolist()) - {0}, {segment["id"] for segment in image.segments}
    problems = []
    for missing, location in ((in_png - in_json, "JSON"), (in_json - in_png, "PNG")):
        if missing:
            missing_ids = reprlib.repr(sorted(missing))
            problems.append(f"segments must be in PNG and JSON, got {missing_ids} not in the {location}")
    return problems


def _raise_problems(op: str, name: str, problems: list[str]) -> None:
    """Raise one error that lists the problems of a file, if there are any."""
    if problems:
        lines = problems[:MAX_LISTED]
        if len(problems) > MAX_LISTED:
            lines.append(f"and {len(problems) - MAX_LISTED} more")
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ValueError(f"{op}: path must be free of problems, got {count} in {name}:\n  " + "\n  ".join(lines))


def _format_notes(notes: Counter[str]) -> tuple[str, ...]:
    """Format the notes that occurred, each with its count."""
    return tuple(f"{text}: {count}" for text, count in notes.items() if count)
