"""Export of masks: COCO results and panoptic segmentations, palette PNG files, prompts for SAM.

Files are written atomically, and those of whole data sets image by image.
"""

from __future__ import annotations

import itertools
import json
import operator
import os
import reprlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from trace_fast.io.arrays import array_to_tensor, mask_areas, mask_boxes
from trace_fast.io.files import write_atomically
from trace_fast.io.visualize import encode_picture
from trace_fast.masks import coco
from trace_fast.masks.formats import (
    MaskSet,
    convert_labels,
    convert_scores,
    keep_visible,
    open_masks,
    paint_labels,
    to_xywh,
)
from trace_fast.masks.propagation import Seeds
from trace_fast.masks.rle import decode_run_lengths, encode_rles
from trace_fast.ops import checks
from trace_fast.progress import Progress

__all__ = [
    "make_panoptic_segments",
    "make_predictor_prompts",
    "make_sam_prompts",
    "refine_results",
    "write_coco_results",
    "write_palette",
    "write_panoptic",
]

SEGMENTS = 256**3  # number of ids that the colors of a panoptic PNG can represent, void included


def write_coco_results(
    path: str | os.PathLike[str],
    results: Mapping[int, MaskSet | tuple[Any, Any]] | Iterable[tuple[int, Any, Any]],
    category_id: int = 1,
    *,
    exclusive: bool = False,
) -> None:
    """Write masks as a list of results of COCO's form.

    Each mask becomes one result with image_id, category_id, segmentation as compressed RLE, bbox XYWH and area in
    pixels, and score. If results have a bbox, pycocotools uses its area as the mask's, which moves masks between its
    small, medium and large sizes; `trace_fast.evaluation` uses the area of the mask.

    Args:
        path: the JSON file; replaced if it exists.
        results: a mapping from image id to a `MaskSet` or to (masks, scores); or an iterable of (image_id, masks,
            scores), perhaps a generator. Masks have any format that `open_masks` reads. Scores are (M,) and finite;
            None takes the scores of the masks, or 1 if they have none.
        category_id: category of masks without a class.
        exclusive: remove overlaps, as `keep_visible` does: smaller masks lie on top, and hidden ones are left out.

    Raises:
        TypeError: an image id is not an integer, masks have no accepted format, or scores are not numbers.
        ValueError: masks are malformed, or scores are not finite or not one for each mask.
        RuntimeError: pycocotools is not installed.
        FileNotFoundError: the folder of path does not exist.

    Example:
        >>> refined = ((i, propagate(sets[i], edges[i], threshold=0.5), None) for i in sets)
        >>> write_coco_results("results.json", refined)
    """
    op = "write_coco_results"
    checks.integer(op, "category_id", category_id, 0)
    with write_atomically(path, op) as file:
        triples = _list_triples(op, results)
        _write_list(
            file,
            (
                record
                for i, masks, scores in triples
                for record in _make_records(op, i, masks, scores, category_id, exclusive, with_area=True)
            ),
        )


def refine_results(
    path: str | os.PathLike[str] | Mapping[str, Any] | list[Any],
    out: str | os.PathLike[str],
    refine: Callable[[np.ndarray, np.ndarray, int], tuple[Any, Any]],
    *,
    exclusive: bool = False,
) -> None:
    """Refine the masks of a file such as CutLER's, image by image, and write a file of the same form.

    Every refined mask takes the fields of the mask that it overlaps most, in IoU; one that overlaps none has new ones.
    Of these fields, segmentation, area and bbox are made again where the mask is another. The first mask that takes the
    fields of an annotation also takes its id, and others have ids that are new in the file. Images without masks are
    not refined. A bar shows the progress on a terminal.

    Args:
        path: a JSON file with a list of results, or with images and annotations, or its content, as `read_results`
            takes it.
        out: the JSON file to write; replaced if it exists. If the file has annotations, its other content is kept, the
            sizes of images that MaskCut exchanged are corrected, and annotations without an id, a bbox, an area,
            iscrowd or a score get them.
        refine: called as refine(masks, scores, image_id) with the masks of one image and category, (M, H, W) bool, and
            their scores, (M,) float64; returns masks of any format that `open_masks` reads, and their scores, or None
            for the scores of the masks, or 1 if they have none.
        exclusive: remove overlaps in each image, also between categories, as `keep_visible` does: smaller masks lie on
            top, and hidden ones are left out. panopticapi's converters need it.

    Raises:
        TypeError: refine does not return a pair, or its masks have no accepted format or its scores are not numbers.
        ValueError: the file has problems, which are all listed, or the masks and scores that refine returns do not fit.
        RuntimeError: pycocotools is not installed.
        FileNotFoundError: the file or the folder of out does not exist.

    Example:
        >>> def refine(masks, scores, image_id):
        ...     mask_set = MaskSet(torch.from_numpy(masks), torch.from_numpy(scores).float())
        ...     mask_set = propagate(mask_set, trace_fast.edges(f"photos/{image_id:012}.jpg"), threshold=0.5)
        ...     return mask_set.masks, mask_set.scores
        >>> refine_results("cutler.json", "refined.json", refine)
    """
    op = "refine_results"
    content, name = coco.load_json(op, path, or_list=True)
    images = coco.parse_instances(op, content, name, as_results=True).images
    is_list = isinstance(content, list)
    entries: dict[int, list[dict[str, Any]]] = {}
    for entry in content if is_list else content["annotations"]:
        entries.setdefault(int(entry["image_id"]), []).append(entry)
    known = (int(entry.get("id", 0)) for image in entries.values() for entry in image)
    ids = itertools.count(1 + max(known, default=0))

    def refine_images() -> Iterator[dict[str, Any]]:
        with Progress("refine", "image", len(images)) as progress:
            for image in images.values():
                records = _refine_image(op, image, entries.get(image.id, []), refine, with_defaults=not is_list)
                if exclusive:
                    records = _keep_visible_records(records, (image.height, image.width))
                for record in records:
                    yield record if is_list or "id" in record else {"id": next(ids), **record}
                progress.update()

    with write_atomically(out, op) as file:
        if is_list:
            _write_list(file, refine_images())
            return
        rest = {key: value for key, value in content.items() if key != "annotations"}
        sizes = {number: {"height": image.height, "width": image.width} for number, image in images.items()}
        rest["images"] = [{**entry, **sizes[int(entry["id"])]} for entry in rest["images"]]
        file.write(json.dumps(rest)[:-1].encode() + b', "annotations": ')
        _write_list(file, refine_images())
        file.write(b"}")


def make_panoptic_segments(mask_set: MaskSet) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Make a panoptic segmentation of masks with classes, such as those of `semantic_masks` after `propagate`.

    Where masks overlap, smaller ones lie on top; hidden masks are left out. Stuff is one segment for each class and
    image: the caller unites such masks before.

    Args:
        mask_set: masks and their classes.

    Returns:
        The segment map (H, W) int32, 0 is void; and COCO's segments_info, with id from 1 in the order of the masks,
        category_id, area in pixels, bbox XYWH in pixels and iscrowd 0.

    Raises:
        TypeError: mask_set is not a `MaskSet`, or its tensors have another dtype.
        ValueError: mask_set has no classes, or its tensors have another shape.

    Example:
        >>> make_panoptic_segments(MaskSet(torch.ones(1, 2, 3, dtype=torch.bool), classes=torch.tensor([7])))[1]
        [{'id': 1, 'category_id': 7, 'area': 6, 'bbox': [0, 0, 3, 2], 'iscrowd': 0}]
    """
    op = "make_panoptic_segments"
    if not isinstance(mask_set, MaskSet):
        raise TypeError(f"{op}: mask_set must be a MaskSet, got {type(mask_set).__name__}")
    mask_set, _ = open_masks(mask_set)
    if mask_set.classes is None:
        raise ValueError(f"{op}: mask_set must have classes, got None")
    painted = paint_labels(mask_set.masks).cpu()
    visible = painted.unique()
    visible = visible[visible > 0]
    # numbers from 1 without gaps
    segment_map = torch.searchsorted(visible, painted, right=True)
    categories = mask_set.classes.cpu()[visible - 1].tolist()
    infos = [{"id": number, "category_id": category} for number, category in enumerate(categories, 1)]
    return segment_map.to(torch.int32).numpy(), _measure_segments(segment_map, infos)


def write_panoptic(
    path: str | os.PathLike[str],
    png_folder: str | os.PathLike[str],
    images: Iterable[tuple[int, str, np.ndarray | Tensor, Sequence[Mapping[str, Any]]]],
    categories: Sequence[Mapping[str, Any]],
) -> None:
    """Write panoptic segmentations of COCO's form: one PNG file for each image, and a JSON file.

    The color of a segment is its id, R + 256 G + 256^2 B. The JSON file appears last, when all PNG files are there.

    Args:
        path: the JSON file; replaced if it exists.
        png_folder: folder for the PNG files, which are named after their images; made if it is missing.
        images: (image_id, file_name, segment map, segments_info) of each image, perhaps from a generator: the name of
            the image file; (H, W) integers from 0, which is void, to 256^3 - 1; and {"id", "category_id"} of each
            segment. Area, bbox and, if missing, iscrowd 0 are added.
        categories: {"id", "name", "isthing"} of each category, and perhaps its "color", [R, G, B] from 0 to 255; those
            without one are written with a color that no other has.

    Raises:
        TypeError: a segment map or an image id is not of integers.
        ValueError: a map is not (H, W) or out of range, the segments of a map and its segments_info differ, a category
            is not listed or lacks isthing, or two images have the same id or PNG file.
        FileNotFoundError: the folder of path or of png_folder does not exist.

    Example:
        >>> categories = [{"id": 7, "name": "cat", "isthing": 1}]
        >>> segments = make_panoptic_segments(mask_set)
        >>> write_panoptic("panoptic.json", "panoptic", [(1, "cat.jpg", *segments)], categories)
    """
    op = "write_panoptic"
    folder = Path(png_folder)
    for category in categories:
        if not {"id", "name"} <= category.keys() or category.get("isthing") not in (0, 1):
            raise ValueError(f"{op}: categories must have id, name and isthing 0 or 1, got {dict(category)}")
    known = {category["id"] for category in categories}
    listed: dict[int, dict[str, Any]] = {}
    annotations: dict[str, dict[str, Any]] = {}  # by PNG file
    with write_atomically(path, op) as file:
        folder.mkdir(exist_ok=True)
        for number, file_name, segments, infos in images:
            image_id, png = _check_image_id(op, number), Path(file_name).with_suffix(".png").name
            if image_id in listed or png in annotations:
                raise ValueError(f"{op}: images must differ in id and file name, got {image_id} and {png} again")
            segment_map = _check_segments(op, segments, infos, known, png)
            _write_segment_map(folder / png, segment_map)
            height, width = segment_map.shape
            listed[image_id] = {"id": image_id, "file_name": file_name, "height": height, "width": width}
            segments_info = _measure_segments(segment_map, infos)
            annotations[png] = {"image_id": image_id, "file_name": png, "segments_info": segments_info}
        content = {
            "images": list(listed.values()),
            "annotations": list(annotations.values()),
            "categories": _add_colors(categories),
        }
        file.write(json.dumps(content).encode())


def write_palette(path: str | os.PathLike[str], class_map: np.ndarray | Tensor) -> None:
    """Write a semantic map as a palette PNG file with the colors of PASCAL VOC, as DHR's are.

    Args:
        path: the file, ending in .png; replaced if it exists.
        class_map: (H, W) integers from 0, the background, to 255, void; array or tensor on any device.

    Raises:
        TypeError: class_map is not an integer array or tensor.
        ValueError: class_map is not (H, W) or out of range, or path has another ending.
        FileNotFoundError: the folder of path does not exist.

    Example:
        >>> write_palette("photo.png", np.array([[0, 15, 255]], dtype=np.uint8))
    """
    op = "write_palette"
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{op}: path must end in .png, got '{path}'")
    content = encode_palette(op, class_map)
    with write_atomically(path, op) as file:
        file.write(content)


def encode_palette(op: str, class_map: np.ndarray | Tensor) -> bytes:
    """Return the bytes of the file that `write_palette` writes.

    Args:
        op: name of the calling function, for messages.
        class_map: see `write_palette`.

    Raises:
        TypeError, ValueError: see `write_palette`.

    Example:
        >>> encode_palette("segment", np.array([[0, 15, 255]], dtype=np.uint8))[1:4]
        b'PNG'
    """
    from PIL import Image

    classes = convert_labels(op, "class_map", class_map).cpu()
    low, high = (int(end) for end in classes.aminmax())
    if low < 0 or high > 255:
        raise ValueError(f"{op}: class_map must be from 0 to 255, got {low} to {high}")
    picture = Image.fromarray(classes.numpy().astype(np.uint8))
    picture.putpalette(_find_colors(np.arange(256)).astype(np.uint8).tobytes())
    return encode_picture(picture, "PNG")


def _find_colors(classes: np.ndarray) -> np.ndarray:
    """Return the colors of PASCAL VOC, (n, 3) from 0 to 255, of classes (n,) from 0 to 256^3 - 1."""
    # bit k of a class is bit 7 - k // 3 of red, green and blue in turn
    bits = classes[:, None] >> np.arange(24) & 1
    return (bits.reshape(-1, 8, 3) << np.arange(7, -1, -1)[:, None]).sum(1)


def _add_colors(categories: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return categories with a color each, which panopticapi needs."""
    taken = {tuple(category["color"]) for category in categories if "color" in category}
    count = len(categories) + len(taken) + 1
    free = (color for color in _find_colors(np.arange(1, count)).tolist() if tuple(color) not in taken)
    return [{**category, "color": category["color"] if "color" in category else next(free)} for category in categories]


def make_sam_prompts(
    points: np.ndarray | Tensor | Seeds, boxes: np.ndarray | Tensor | None = None
) -> dict[str, list[Any]]:
    """Make prompts of one image for `SamProcessor` and `Sam2Processor` of transformers: one object for each point.

    Args:
        points: (k, 2), (x, y) of a pixel of each object; or `Seeds`, whose points and boxes are used.
        boxes: (k, 4), (x0, y0, x1, y1) of the first and last column and row of each object; None prompts with points
            only.

    Returns:
        Nested lists: input_points (1, k, 1, 2), input_labels (1, k, 1), all 1, and with boxes input_boxes (1, k, 4).

    Raises:
        TypeError: points or boxes are not an array or a tensor.
        ValueError: a shape is another, there is no point, a coordinate is not finite, or boxes are given with `Seeds`.

    Example:
        >>> make_sam_prompts(np.array([[4.0, 2.0]]))
        {'input_points': [[[[4.0, 2.0]]]], 'input_labels': [[[1]]]}
        >>> inputs = processor(images=image, return_tensors="pt", **make_sam_prompts(seeds(edges, 8, threshold=0.5)))
    """
    coordinates, corners = _read_prompts("make_sam_prompts", points, boxes)
    prompts: dict[str, list[Any]] = {
        "input_points": [coordinates[:, None].tolist()],
        "input_labels": [[[1]] * len(coordinates)],
    }
    if corners is not None:
        prompts["input_boxes"] = [corners.tolist()]
    return prompts


def make_predictor_prompts(
    points: np.ndarray | Tensor | Seeds,
    boxes: np.ndarray | Tensor | None = None,
    *,
    size: tuple[int, int] | None = None,
    side: int = 1024,
) -> dict[str, np.ndarray]:
    """Make prompts of one image for the predictors of segment-anything and of SAM 2: one object for each point.

    `SamPredictor.predict` takes the points of a single object. `SamPredictor.predict_torch` takes several objects, as
    tensors, in pixels of the image as the network sees it: give `size`, and `torch.from_numpy` of each array.
    `SAM2ImagePredictor.predict` takes the arrays as they are without `size`.

    Args:
        points: (k, 2), (x, y) of a pixel of each object; or `Seeds`, whose points and boxes are used.
        boxes: (k, 4), (x0, y0, x1, y1) of the first and last column and row of each object; None prompts with points
            only.
        size: (height, width) of the image in pixels, to transform coordinates for `SamPredictor`; None leaves them.
        side: longer side of the image as the network sees it, in pixels.

    Returns:
        Arrays: point_coords (k, 1, 2) float32, point_labels (k, 1) int32, all 1, and with boxes (k, 4) float32, which
        are called boxes with a size and box without one, as the predictors call them.

    Raises:
        TypeError: points or boxes are not an array or a tensor, or size or side is not of integers.
        ValueError: a shape is another, there is no point, a coordinate is not finite, or boxes are given with `Seeds`.

    Example:
        >>> make_predictor_prompts(np.array([[4.0, 2.0]]), size=(512, 768))["point_coords"]
        array([[[5.3333335, 2.6679688]]], dtype=float32)
        >>> prompts = make_predictor_prompts(seeds(edges, 8, threshold=0.5), size=image.shape[:2])
        >>> prompts = {name: torch.from_numpy(array) for name, array in prompts.items()}
        >>> masks, scores, _ = predictor.predict_torch(**prompts, multimask_output=False)
    """
    op = "make_predictor_prompts"
    coordinates, corners = _read_prompts(op, points, boxes)
    scale = torch.ones(2, dtype=torch.float64, device="cpu")
    if size is not None:
        for name, value in (("height", size[0]), ("width", size[1]), ("side", side)):
            checks.integer(op, name, value, 1)
        # of the size that the image is resized to, in whole pixels
        factor = side / max(size)
        scale = torch.tensor([int(length * factor + 0.5) / length for length in reversed(size)], dtype=torch.float64)
    coordinates = coordinates.cpu() * scale
    prompts = {
        "point_coords": coordinates[:, None].float().numpy(),
        "point_labels": np.ones((len(coordinates), 1), np.int32),
    }
    if corners is not None:
        prompts["box" if size is None else "boxes"] = (corners.cpu() * scale.repeat(2)).float().numpy()
    return prompts


def _read_prompts(
    op: str, points: np.ndarray | Tensor | Seeds, boxes: np.ndarray | Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Check points and boxes, and return them as float64 (k, 2) and (k, 4)."""
    if isinstance(points, Seeds):
        if boxes is not None:
            raise ValueError(f"{op}: boxes must be None with Seeds, which have boxes, got {type(boxes).__name__}")
        boxes, points = points.boxes, points.points
    prompts: list[Tensor | None] = []
    for name, value, length in (("points", points, 2), ("boxes", boxes, 4)):
        if value is None and name == "boxes":
            prompts.append(None)
            continue
        if not isinstance(value, (np.ndarray, Tensor)):
            raise TypeError(f"{op}: {name} must be an array or a tensor, got {type(value).__name__}")
        coordinates = (value if isinstance(value, Tensor) else array_to_tensor(value)).double()
        count = len(points)
        if coordinates.shape != (count, length) or not count:
            required = f"k = {count}" if name == "boxes" else "k of at least 1"
            raise ValueError(f"{op}: {name} must be (k, {length}), {required}, got {tuple(coordinates.shape)}")
        if not coordinates.isfinite().all():
            raise ValueError(f"{op}: {name} must be finite, got {coordinates[~coordinates.isfinite()][0].item()}")
        prompts.append(coordinates)
    first, second = prompts
    assert first is not None
    return first, second


def _refine_image(
    op: str,
    image: coco.ImageInstances,
    entries: Sequence[dict[str, Any]],
    refine: Callable[[np.ndarray, np.ndarray, int], tuple[Any, Any]],
    with_defaults: bool,
) -> list[dict[str, Any]]:
    """Refine the masks of an image, and return them as records with the fields of the entries that they come from."""
    size = image.height, image.width
    masks = image.masks()
    categories = np.array([instance.category for instance in image.instances])
    scores = np.array([instance.score for instance in image.instances])
    records: list[dict[str, Any]] = []
    for category in dict.fromkeys(categories.tolist()):
        chosen = np.flatnonzero(categories == category)
        pair = refine(masks[chosen], scores[chosen], image.id)
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"{op}: refine must return masks and scores, got {type(pair).__name__}")
        new = list(_make_records(op, image.id, *pair, category, size=size, with_area=with_defaults))
        refined = open_masks([record["segmentation"] for record in new], size)[0].masks.numpy()
        sources = _find_sources(refined, masks[chosen])
        taken: set[int] = set()
        for record, mask, source in zip(new, refined, sources, strict=True):
            if source is None:
                records.append({**record, "iscrowd": 0} if with_defaults else record)
                continue
            entry = dict(entries[chosen[source]])
            if source in taken:
                entry.pop("id", None)
            taken.add(source)
            is_same = np.array_equal(mask, masks[chosen[source]])
            records.append(_merge_fields(entry, record, is_same, with_defaults))
    return records


def _merge_fields(
    entry: Mapping[str, Any], record: Mapping[str, Any], is_same: bool, with_defaults: bool
) -> dict[str, Any]:
    """Return the fields of an entry with those of its refined mask, in the form that the entry has them in."""
    remade = {key: value for key, value in record.items() if with_defaults or key in entry}
    fields = {**entry, **remade, **(entry if is_same else {})}
    counts = entry["segmentation"]["counts"] if isinstance(entry["segmentation"], Mapping) else ""
    if isinstance(counts, bytes):  # JSON has none
        fields["segmentation"] = record["segmentation"]
    elif isinstance(counts, list) and not is_same:
        runs = decode_run_lengths(record["segmentation"]["counts"].encode())
        fields["segmentation"] = {**record["segmentation"], "counts": runs.tolist()}
    if with_defaults:
        fields.setdefault("iscrowd", 0)
    return {**fields, "category_id": entry["category_id"], "score": record["score"]}


def _find_sources(refined: np.ndarray, masks: np.ndarray) -> list[int | None]:
    """Find the mask (M, H, W) that each refined mask (K, H, W) overlaps most, in IoU; None where it overlaps none."""
    flat, sources = masks.reshape(len(masks), -1), list[int | None]()
    areas = np.count_nonzero(flat, axis=1)
    for mask in refined:
        common = np.count_nonzero(flat & mask.ravel(), axis=1)
        best = int((common / (areas + np.count_nonzero(mask) - common).clip(1)).argmax())
        sources.append(best if common[best] or np.array_equal(mask, masks[best]) else None)
    return sources


def _keep_visible_records(records: Sequence[dict[str, Any]], size: tuple[int, int]) -> list[dict[str, Any]]:
    """Remove the overlaps of records of one image."""
    if not records:
        return []
    mask_set, restore = open_masks(list(records), size)
    visible, indices = keep_visible(mask_set.masks)
    return restore(MaskSet(visible), [[index] for index in indices.tolist()])


def _check_segments(
    op: str, segments: np.ndarray | Tensor, infos: Sequence[Mapping[str, Any]], categories: Container[int], png: str
) -> Tensor:
    """Check a segment map and its segments_info; the map as int64 (H, W) on the CPU."""
    segment_map = convert_labels(op, "segment map", segments).cpu()
    low, high = (int(bound) for bound in segment_map.aminmax())
    if low < 0 or high >= SEGMENTS:
        raise ValueError(f"{op}: segment map must be from 0 to {SEGMENTS - 1}, got {low} to {high} for {png}")
    in_map, in_infos = set(segment_map.unique().tolist()) - {0}, [info.get("id") for info in infos]
    if set(in_infos) != in_map or len(in_infos) != len(in_map):
        raise ValueError(f"{op}: segments_info must list {sorted(in_map)}, the ids of {png}, got {in_infos}")
    for category in (info.get("category_id") for info in infos):
        if category not in categories:
            raise ValueError(f"{op}: category_id must be one of categories, got {category} for {png}")
    return segment_map


def _write_segment_map(path: Path, segment_map: Tensor) -> None:
    """Write a segment map (H, W) as a PNG file whose colors are the ids."""
    from PIL import Image

    colors = np.stack([segment_map.numpy() >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)
    with write_atomically(path, "write_panoptic") as file:
        Image.fromarray(colors).save(file, format="PNG")


def _list_triples(op: str, results: Mapping[int, Any] | Iterable[Any]) -> Iterator[tuple[int, Any, Any]]:
    """List results as (image_id, masks, scores)."""
    if isinstance(results, Mapping):
        results = (
            (number, entry, None) if isinstance(entry, MaskSet) else (number, *entry)
            for number, entry in results.items()
        )
    for entry in results:
        if not isinstance(entry, (tuple, list)) or len(entry) != 3:
            raise TypeError(f"{op}: results must be (image_id, masks, scores), got {reprlib.repr(entry)}")
        yield entry[0], entry[1], entry[2]


def _check_image_id(op: str, value: Any) -> int:
    """Return an image id as an int."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{op}: image_id must be an integer, got {value!r}") from error


def _make_records(
    op: str,
    image_id: int,
    masks: Any,
    scores: Any,
    category_id: int,
    exclusive: bool = False,
    size: tuple[int, int] | None = None,
    with_area: bool = False,
) -> Iterator[dict[str, Any]]:
    """Make results of the masks of an image or, with their area, annotations of COCO's form."""
    number = _check_image_id(op, image_id)
    mask_set, _ = open_masks(masks, size)
    count = len(mask_set.masks)
    if scores is None:
        scores = np.ones(count) if mask_set.scores is None else mask_set.scores
    values = convert_scores(op, "scores", scores, count).tolist()
    if not count:
        return
    categories = [category_id] * count if mask_set.classes is None else mask_set.classes.tolist()
    stack = mask_set.masks.cpu()
    if exclusive:
        stack, indices = keep_visible(stack)
        categories, values = ([column[index] for index in indices.tolist()] for column in (categories, values))
    for counts, area, category, box, score in zip(
        encode_rles(op, stack.numpy()),
        mask_areas(stack).tolist(),
        categories,
        to_xywh(mask_boxes(stack)).tolist(),
        values,
        strict=True,
    ):
        yield {
            "image_id": number,
            "category_id": category,
            "segmentation": {"size": list(stack.shape[1:]), "counts": counts.decode("ascii")},
            "bbox": box,
            **({"area": area} if with_area else {}),
            "score": score,
        }


def _measure_segments(segment_map: Tensor, infos: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add area, bbox and iscrowd to the segments_info of a map (H, W)."""
    measured = []
    for info in infos:
        mask = (segment_map == info["id"])[None]
        (area,), (box,) = mask_areas(mask).tolist(), to_xywh(mask_boxes(mask)).tolist()
        measured.append({**info, "area": area, "bbox": box, "iscrowd": info.get("iscrowd", 0)})
    return measured


def _write_list(file: BinaryIO, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON list entry by entry, one on each line."""
    separator = b"["
    for entry in entries:
        file.write(separator + json.dumps(entry).encode())
        separator = b",\n"
    file.write(b"[]" if separator == b"[" else b"]")
