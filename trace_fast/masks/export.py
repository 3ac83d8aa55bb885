"""Masks on their way out: COCO's results and panoptic segmentations, palette PNG files, prompts for SAM.

A file appears under its name only when it is complete, and what is written of large sets is written image by image.
"""

from __future__ import annotations

import json
import operator
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from trace_fast.io.arrays import array_to_tensor, mask_areas, mask_boxes
from trace_fast.io.files import write_atomically
from trace_fast.masks import coco
from trace_fast.masks.formats import MaskSet, as_labels, as_scores, open_masks, paint_labels, xywh
from trace_fast.masks.propagation import Seeds
from trace_fast.ops import checks

__all__ = [
    "panoptic_segments",
    "refine_results",
    "sam_prompts",
    "write_coco_results",
    "write_palette",
    "write_panoptic",
]

SEGMENTS = 256**3  # ids that a PNG of COCO's tells apart, void included


def write_coco_results(
    path: str | os.PathLike[str],
    results: Mapping[int, MaskSet | tuple[Any, Any]] | Iterable[tuple[int, Any, Any]],
    category_id: int = 1,
) -> None:
    """Write masks as a list of results of COCO's form.

    One result a mask: image_id, category_id, segmentation as compressed RLE, bbox XYWH in pixels, score. Where results
    have a bbox, pycocotools takes its area for the mask's, which moves masks between its small, medium and large;
    `trace_fast.evaluation` does not.

    Args:
        path: the JSON file; replaced if it exists.
        results: by image id a `MaskSet`, or masks and scores; or an iterable of (image_id, masks, scores), which may be
            a generator. Masks are of any kind that `open_masks` takes, scores (M,) finite; None stands for those of the
            masks or, where they have none, 1.
        category_id: of masks that have no class.

    Raises:
        TypeError: an image id is no integer, masks are of no accepted kind, scores are no numbers.
        ValueError: masks are malformed, scores are not one for each mask or not finite.
        RuntimeError: pycocotools is not installed.
        FileNotFoundError: the folder of path does not exist.

    Example:
        >>> refined = ((i, propagate(sets[i], edges[i], threshold=0.5), None) for i in sets)
        >>> write_coco_results("results.json", refined)
    """
    op = "write_coco_results"
    checks.integer(op, "category_id", category_id, 0)
    with write_atomically(path, op) as file:
        triples = _triples(op, results)
        _write_list(
            file, (entry for i, masks, scores in triples for entry in _records(op, i, masks, scores, category_id))
        )


def refine_results(
    path: str | os.PathLike[str] | Mapping[str, Any] | list[Any],
    out: str | os.PathLike[str],
    refine: Callable[[np.ndarray, np.ndarray, int], tuple[Any, Any]],
) -> None:
    """Refine the masks of a file such as CutLER's, image by image, and write a file of the same form.

    Images without a mask stay without one. A bar shows progress where there is a terminal.

    Args:
        path: a JSON file with a list of results, or with images and annotations, or what it holds, as
            `coco.read_results` takes it.
        out: the JSON file to write; replaced if it exists. Of a file with annotations, what else is in it is kept, the
            sizes of images that MaskCut exchanged are put right, and annotations, with id, image_id, category_id,
            segmentation, bbox, area, iscrowd 0 and score, are numbered from 1.
        refine: given the masks of one image and category, (M, H, W) bool, their scores, (M,) float64, and the image's
            id, returns what they become: masks of any kind that `open_masks` takes and scores, or None for those of
            the masks or, where they have none, 1.

    Raises:
        TypeError: refine returns no pair, masks of no accepted kind or scores that are no numbers.
        ValueError: the file has problems, which are all listed, or what refine returns does not fit.
        RuntimeError: pycocotools is not installed.
        FileNotFoundError: the file or the folder of out does not exist.

    Example:
        >>> def refine(masks, scores, image_id):
        ...     found = MaskSet(torch.from_numpy(masks), torch.from_numpy(scores).float())
        ...     found = propagate(found, trace_fast.edges(f"photos/{image_id:012}.jpg"), threshold=0.5)
        ...     return found.masks, found.scores
        >>> refine_results("cutler.json", "refined.json", refine)
    """
    from tqdm import tqdm

    op = "refine_results"
    data, _ = coco.load_json(op, path, lists=True)
    images = coco.read_results(data).images
    listed = isinstance(data, list)

    def refined() -> Iterator[dict[str, Any]]:
        for image in tqdm(images.values(), desc="refine", unit="image", disable=None):
            masks, categories = image.masks(), np.array([instance.category for instance in image.instances])
            scores = np.array([instance.score for instance in image.instances])
            for category in dict.fromkeys(categories.tolist()):
                chosen = categories == category
                pair = refine(masks[chosen], scores[chosen], image.id)
                if not isinstance(pair, tuple) or len(pair) != 2:
                    raise TypeError(f"{op}: refine must return masks and scores, got {type(pair).__name__}")
                yield from _records(op, image.id, *pair, category, (image.height, image.width), area=not listed)

    with write_atomically(out, op) as file:
        if listed:
            _write_list(file, refined())
            return
        rest = {key: value for key, value in data.items() if key != "annotations"}
        sizes = {number: {"height": image.height, "width": image.width} for number, image in images.items()}
        rest["images"] = [{**entry, **sizes[int(entry["id"])]} for entry in rest["images"]]
        file.write(json.dumps(rest)[:-1].encode() + b', "annotations": ')
        _write_list(file, ({"id": number, **record, "iscrowd": 0} for number, record in enumerate(refined(), 1)))
        file.write(b"}")


def panoptic_segments(found: MaskSet) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """A panoptic segmentation from masks with classes, such as those of `semantic_masks` after they were split.

    Where masks overlap, smaller ones lie on top; a mask that is hidden is left out. Masks of a class of stuff, which is
    one segment an image, are for the caller to unite before.

    Args:
        found: masks and their classes.

    Returns:
        The segment map (H, W) int32, 0 is void, and COCO's segments_info: id, from 1 in the order of the masks,
        category_id, area in pixels, bbox XYWH, iscrowd 0.

    Raises:
        TypeError, ValueError: found is not what `MaskSet` says, or has no classes.

    Example:
        >>> panoptic_segments(MaskSet(torch.ones(1, 2, 3, dtype=torch.bool), classes=torch.tensor([7])))[1]
        [{'id': 1, 'category_id': 7, 'area': 6, 'bbox': [0, 0, 3, 2], 'iscrowd': 0}]
    """
    op = "panoptic_segments"
    if not isinstance(found, MaskSet):
        raise TypeError(f"{op}: found must be a MaskSet, got {type(found).__name__}")
    found, _ = open_masks(found)
    if found.classes is None:
        raise ValueError(f"{op}: found must have classes, got None")
    painted = paint_labels(found.masks, range(1, len(found.masks) + 1)).cpu()
    seen = painted.unique()
    seen = seen[seen > 0]
    segment_map = torch.searchsorted(seen, painted, right=True)  # numbers from 1 without gaps
    categories = found.classes.cpu()[seen - 1].tolist()
    infos = [{"id": number, "category_id": category} for number, category in enumerate(categories, 1)]
    return segment_map.to(torch.int32).numpy(), _measure(segment_map, infos)


def write_panoptic(
    path: str | os.PathLike[str],
    png_folder: str | os.PathLike[str],
    images: Iterable[tuple[int, str, np.ndarray | Tensor, Sequence[Mapping[str, Any]]]],
    categories: Sequence[Mapping[str, Any]],
) -> None:
    """Write panoptic segmentations in COCO's form: a PNG file an image, id = R + 256 G + 256^2 B, and a JSON file.

    The JSON file is written last, so that it names PNG files that are there.

    Args:
        path: the JSON file; replaced if it exists.
        png_folder: where the PNG files go, named as their images; made if it is missing.
        images: (image_id, file_name, segment map, segments_info) of each, perhaps from a generator: the file name of
            the photograph; (H, W) integers from 0, void, to 256^3 - 1; and {"id", "category_id"} of each segment, area,
            bbox and, unless given, iscrowd 0 are added.
        categories: {"id", "name", "isthing"} of each.

    Raises:
        TypeError: a segment map or an id is no integer.
        ValueError: a map is not (H, W) or out of range, segments of a map and its segments_info differ, a category is
            not listed or does not say isthing, or two images have the same id or the same PNG file.
        FileNotFoundError: the folder of path or of png_folder does not exist.

    Example:
        >>> categories = [{"id": 7, "name": "cat", "isthing": 1}]
        >>> write_panoptic("panoptic.json", "panoptic", [(1, "cat.jpg", *panoptic_segments(found))], categories)
    """
    from PIL import Image

    op = "write_panoptic"
    folder = Path(png_folder)
    for category in categories:
        if not {"id", "name"} <= category.keys() or category.get("isthing") not in (0, 1):
            raise ValueError(f"{op}: categories must have id, name and isthing 0 or 1, got {dict(category)}")
    known = {category["id"] for category in categories}
    photos: dict[int, dict[str, Any]] = {}
    annotations: dict[str, dict[str, Any]] = {}  # by PNG file
    with write_atomically(path, op) as file:
        folder.mkdir(exist_ok=True)
        for number, file_name, segments, infos in images:
            image_id, png = _image_id(op, number), Path(file_name).with_suffix(".png").name
            if image_id in photos or png in annotations:
                raise ValueError(f"{op}: images must differ in id and file name, got {image_id} and {png} again")
            segment_map = as_labels(op, "segment map", segments).cpu()
            low, high = (int(end) for end in segment_map.aminmax())
            if low < 0 or high >= SEGMENTS:
                raise ValueError(f"{op}: segment map must be from 0 to {SEGMENTS - 1}, got {low} to {high} for {png}")
            drawn, described = set(segment_map.unique().tolist()) - {0}, [info.get("id") for info in infos]
            if set(described) != drawn or len(described) != len(drawn):
                raise ValueError(f"{op}: segments_info must list {sorted(drawn)}, the ids of {png}, got {described}")
            unknown = [info.get("category_id") for info in infos if info.get("category_id") not in known]
            if unknown:
                raise ValueError(f"{op}: category_id must be one of categories, got {unknown[0]} for {png}")
            colours = np.stack([segment_map.numpy() >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)
            with write_atomically(folder / png, op) as picture:
                Image.fromarray(colours).save(picture, format="PNG")
            height, width = segment_map.shape
            photos[image_id] = {"id": image_id, "file_name": file_name, "height": height, "width": width}
            segments_info = _measure(segment_map, infos)
            annotations[png] = {"image_id": image_id, "file_name": png, "segments_info": segments_info}
        content = {
            "images": list(photos.values()),
            "annotations": list(annotations.values()),
            "categories": [dict(category) for category in categories],
        }
        file.write(json.dumps(content).encode())


def write_palette(path: str | os.PathLike[str], class_map: np.ndarray | Tensor) -> None:
    """Write a semantic map as a palette PNG file in the colours of VOC, as DHR's are.

    Args:
        path: the file, ending in .png; replaced if it exists.
        class_map: (H, W) integers from 0, the background, to 255, void; array or tensor on any device.

    Raises:
        TypeError: the map is no integer array or tensor.
        ValueError: the map is not (H, W) or out of range, or the ending.
        FileNotFoundError: the folder of path does not exist.

    Example:
        >>> write_palette("photo.png", np.array([[0, 15, 255]], dtype=np.uint8))
    """
    from PIL import Image

    op = "write_palette"
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{op}: path must end in .png, got '{path}'")
    classes = as_labels(op, "class_map", class_map).cpu()
    low, high = (int(end) for end in classes.aminmax())
    if low < 0 or high > 255:
        raise ValueError(f"{op}: class_map must be from 0 to 255, got {low} to {high}")
    # bit k of a class is bit 7 - k // 3 of red, green or blue, by turns
    bits = np.arange(256)[:, None] >> np.arange(24) & 1
    palette = (bits.reshape(256, 8, 3) << np.arange(7, -1, -1)[:, None]).sum(1)  # (256, 3)
    picture = Image.fromarray(classes.numpy().astype(np.uint8))
    picture.putpalette(palette.astype(np.uint8).tobytes())
    with write_atomically(path, op) as file:
        picture.save(file, format="PNG")


def sam_prompts(points: np.ndarray | Tensor | Seeds, boxes: np.ndarray | Tensor | None = None) -> dict[str, list[Any]]:
    """Prompts of one image for the `SamProcessor` and the `Sam2Processor` of transformers: one object a point.

    Args:
        points: (k, 2) float, (x, y) of the pixel in each object; or what `seeds` returns, points and boxes at once.
        boxes: (k, 4) float, (x0, y0, x1, y1) of its first and last column and row; None prompts with points alone.

    Returns:
        input_points (1, k, 1, 2), input_labels (1, k, 1), all 1, and, of boxes, input_boxes (1, k, 4), as nested lists.

    Raises:
        TypeError: points or boxes are no array or tensor of numbers.
        ValueError: a shape, no point at all, a coordinate that is not finite, or boxes beside those of `Seeds`.

    Example:
        >>> sam_prompts(np.array([[4.0, 2.0]]))
        {'input_points': [[[[4.0, 2.0]]]], 'input_labels': [[[1]]]}
        >>> inputs = processor(images=image, return_tensors="pt", **sam_prompts(seeds(edges, 8, threshold=0.5)))
    """
    op = "sam_prompts"
    if isinstance(points, Seeds):
        if boxes is not None:
            raise ValueError(f"{op}: boxes must be None with Seeds, which have theirs, got {type(boxes).__name__}")
        boxes, points = points.boxes, points.points
    prompts: dict[str, list[Any]] = {}
    for name, value, sides in (("points", points, 2), ("boxes", boxes, 4)):
        if value is None and name == "boxes":
            continue
        if not isinstance(value, (np.ndarray, Tensor)):
            raise TypeError(f"{op}: {name} must be an array or a tensor, got {type(value).__name__}")
        found = (value if isinstance(value, Tensor) else array_to_tensor(value)).double()
        if found.ndim != 2 or found.shape[1] != sides or not len(found) or len(found) != len(points):
            count = "k of at least 1" if name == "points" else f"k = {len(points)}"
            raise ValueError(f"{op}: {name} must be (k, {sides}), {count}, got {tuple(found.shape)}")
        if not found.isfinite().all():
            raise ValueError(f"{op}: {name} must be finite, got {found[~found.isfinite()][0].item()}")
        prompts[f"input_{name}"] = [found[:, None].tolist() if name == "points" else found.tolist()]
        if name == "points":
            prompts["input_labels"] = [[[1]] * len(found)]
    return prompts


def _triples(op: str, results: Mapping[int, Any] | Iterable[Any]) -> Iterator[tuple[int, Any, Any]]:
    """Results by image id as (image_id, masks, scores)."""
    if isinstance(results, Mapping):
        results = ((i, x, None) if isinstance(x, MaskSet) else (i, *x) for i, x in results.items())
    for entry in results:
        if not isinstance(entry, (tuple, list)) or len(entry) != 3:
            raise TypeError(f"{op}: results must be (image_id, masks, scores), got {reprlib.repr(entry)}")
        yield entry[0], entry[1], entry[2]


def _image_id(op: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{op}: image_id must be an integer, got {value!r}") from error


def _records(
    op: str,
    image_id: int,
    masks: Any,
    scores: Any,
    category_id: int,
    size: tuple[int, int] | None = None,
    area: bool = False,
) -> Iterator[dict[str, Any]]:
    """The masks of an image as results, or, with their area, as annotations of COCO's form."""
    number = _image_id(op, image_id)
    found, _ = open_masks(masks, size)
    count = len(found.masks)
    if scores is None:
        scores = np.ones(count) if found.scores is None else found.scores
    values = as_scores(op, "scores", scores, count).tolist()
    if not count:
        return
    categories = [category_id] * count if found.classes is None else found.classes.tolist()
    stack = found.masks.cpu()
    image = coco.encode_masks(stack.numpy())
    corners = xywh(mask_boxes(stack)).tolist()
    for rle, instance, category, box, score in zip(
        image.rles(), image.instances, categories, corners, values, strict=True
    ):
        yield {
            "image_id": number,
            "category_id": category,
            "segmentation": {**rle, "counts": rle["counts"].decode("ascii")},
            "bbox": box,
            **({"area": int(instance.area)} if area else {}),
            "score": score,
        }


def _measure(segment_map: Tensor, infos: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """segments_info of a map (H, W) with area, bbox and iscrowd."""
    measured = []
    for info in infos:
        mask = segment_map == info["id"]
        (area,), (box,) = mask_areas(mask[None]).tolist(), xywh(mask_boxes(mask[None])).tolist()
        measured.append({**info, "area": area, "bbox": box, "iscrowd": info.get("iscrowd", 0)})
    return measured


def _write_list(file: BinaryIO, entries: Iterable[Mapping[str, Any]]) -> None:
    """A JSON list, an entry a line, as they come."""
    separator = b"["
    for entry in entries:
        file.write(separator + json.dumps(entry).encode())
        separator = b",\n"
    file.write(b"[]" if separator == b"[" else b"]")
