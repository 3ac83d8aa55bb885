"""The command `trace-fast segment`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trace_fast.cli.common import (
    FAILURES,
    Device,
    Dtype,
    Inputs,
    Model,
    Noising,
    Offload,
    OutputFolder,
    Seed,
    Size,
    Stage,
    Timestep,
    describe,
    list_images,
    load_edge_finder,
    open_folder,
    plan_results,
    refuse,
    refuse_failures,
    write_results,
)
from trace_fast.extras import require
from trace_fast.io.claims import claim_folder

if TYPE_CHECKING:
    from torch import Tensor

    from trace_fast.masks import MaskSet

__all__ = ["run_segment"]

LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")  # of files in a folder of label maps


def run_segment(
    inputs: Inputs,
    output: OutputFolder,
    masks: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|DIR",
            help="Label map of the masks of the one image, to split and complete; or folder of label maps NAME.png. "
            "Without it, masks are found by edges alone.",
        ),
    ] = None,
    ignore: Annotated[
        list[int],
        typer.Option(
            help="Label of --masks that is void. Repeat the option for several labels. The default is 255 of 8 bits "
            "and 65535 of 16 bits, in a map of several labels."
        ),
    ] = [],  # noqa: B006
    mode: Annotated[
        Literal["fit", "flood", "walk"], typer.Option(help="The way in which the masks of --masks are refined.")
    ] = "fit",
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Strength from which an edge separates masks. The default is the model's own or, with --edges, 0.5; "
            "to fit the masks of --masks, 0.15.",
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Write at most this number of masks: those whose outlines are strongest or, with --masks, the "
            "largest. Without --masks and --threshold they come from all levels of detail, some within others.",
        ),
    ] = None,
    min_area: Annotated[
        int | None,
        typer.Option(min=1, help="Area of the smallest mask in pixels. The default is 0.05 % of the image."),
    ] = None,
    exclusive: Annotated[
        bool, typer.Option("--exclusive", help="Remove overlaps also in --coco; smaller masks lie on top.")
    ] = False,
    bits: Annotated[
        Literal["8", "16"],
        typer.Option(help="8 for a label map with a palette, for at most 254 masks; 16 for one without."),
    ] = "8",
    coco: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write the masks of all images as COCO results, with RLE, boxes, areas and scores. The id of an "
            "image is its name where the names of all are numbers, else its position from 1.",
        ),
    ] = None,
    edges: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Use the edge maps NAME.png of this folder, and no model."),
    ] = None,
    save_edges: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the edges as NAME.png of 16 bits, for --edges.")
    ] = None,
    model: Model = "mini",
    stage: Stage = None,
    timestep: Timestep = None,
    noising: Noising = None,
    device: Device = None,
    size: Size = None,
    dtype: Dtype = None,
    offload: Offload = None,
    seed: Seed = 0,
    overlay: Annotated[bool, typer.Option("--overlay", help="Also write the masks drawn over the image.")] = False,
) -> None:
    """Write the masks of each image as DIR/NAME.png, a label map: 0 is background, each mask has a number.

    They are the regions that edges enclose or, with --masks, the masks of those files split and completed by the edges.
    With --overlay it also writes DIR/NAME_overlay.png. Files of an earlier run are replaced.
    """
    images = list_images(inputs)
    results = plan_results(images, output, ["", *["_overlay"] * overlay])
    if threshold == 0:
        refuse("--threshold must be above 0, got 0")
    label_files = _list_label_files(masks, images)
    if coco is not None:
        with refuse_failures():
            require("--coco", "pycocotools")

    from trace_fast.io import visualize
    from trace_fast.io.images import read_image
    from trace_fast.masks import write_coco_results

    def load() -> tuple[Any, Any]:
        return load_edge_finder(model, stage, timestep, noising, device, size, dtype, offload, seed)

    find_edges, own_threshold = _wrap_model(load) if edges is None else _open_edge_maps(edges)
    barrier = own_threshold if threshold is None else threshold
    # without a threshold, the best masks of all levels
    cut = None if threshold is None and top is not None else barrier
    for folder in (output, *([] if save_edges is None else [save_edges])):
        open_folder(folder)
    ids, records = _number_images(images), list[tuple[int, Any, Any]]()

    def write(image: Path, paths: dict[str, Path]) -> None:
        photo = read_image(image)
        edge_map = find_edges(photo, image)
        if save_edges is not None:
            visualize.write_png(save_edges / f"{image.stem}.png", edge_map, 16)
        if image in label_files:
            # beside the outline of a mask that is fitted, weaker edges are trusted, too
            options = {"threshold": threshold if mode == "fit" else barrier, "mode": mode, "min_area": min_area}
            mask_set, labels, void = _complete_masks(label_files[image], ignore, edge_map, top, options)
        else:
            mask_set, labels, void = _find_masks(edge_map, cut, top, min_area, exclusive)
        _write_labels(paths[""], labels, void, int(bits))
        if overlay:
            visualize.write_picture(paths["_overlay"], visualize.draw_masks(photo[0], mask_set.masks))
        if coco is not None:
            records.append((ids[image], _encode(mask_set.masks), mask_set.scores))

    finish = None if coco is None else functools.partial(write_coco_results, coco, records)
    with refuse_failures(), claim_folder(output, "segment"):
        write_results(results, output, write, finish)


def _list_label_files(masks: Path | None, images: list[Path]) -> dict[Path, Path]:
    """Return the label map of each image, from a file of one or from a folder; none without --masks."""
    if masks is None:
        return {}
    if not masks.is_dir():
        if len(images) != 1:
            refuse(f"--masks must be of one image, or a folder, got {len(images)}")
        with refuse_failures():
            _read_labels(masks)
        return {images[0]: masks}
    files = {}
    for image in images:
        paths = (masks / f"{image.stem}{suffix}" for suffix in LABEL_SUFFIXES)
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            refuse(f"--masks must hold a label map of each image, got no {image.stem}.png in '{masks}'")
        files[image] = path
    return files


def _read_labels(path: Path) -> Any:
    """Read a label map from a lossless picture of integers."""
    import numpy as np

    from trace_fast.io.pictures import read_picture

    try:
        with read_picture("segment: masks", path) as picture:
            kind, mode = picture.format, picture.mode
            labels = np.asarray(picture)
    except FAILURES as error:
        raise ValueError(f"--masks must be a readable picture, got '{path}': {describe(error)}") from error
    if kind == "JPEG" or mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        raise ValueError(
            f"--masks must be a lossless picture of one channel of integers, got '{path}': {kind} of mode {mode}"
        )
    return labels.astype(np.uint8) if mode == "1" else labels


def _wrap_model(load: Callable[[], tuple[Any, Any]]) -> tuple[Callable[[Tensor, Path], Tensor], float]:
    """Return a function that finds the edges of a photo with a model, and the model's threshold."""
    loaded, trace = load()
    return lambda photo, _: trace(photo)[0], loaded.region_threshold


def _open_edge_maps(folder: Path) -> tuple[Callable[[Tensor, Path], Tensor], float]:
    """Return a function that reads the edge map of an image from a folder, and a threshold."""
    import torch

    from trace_fast.backbones import Settings
    from trace_fast.evaluation.methods import read_map

    if not folder.is_dir():
        refuse(f"--edges must be a folder of edge maps, got '{folder}'")

    def read_edges(photo: Tensor, image: Path) -> Tensor:
        edge_map = torch.from_numpy(read_map(folder / f"{image.stem}.png"))
        if edge_map.shape != photo.shape[-2:]:
            size, got = tuple(photo.shape[-2:]), tuple(edge_map.shape)
            raise ValueError(f"segment: edges must be of the image's size {size}, got {got} in '{folder}'")
        return edge_map

    return read_edges, Settings.region_threshold  # nothing is known of their model


def _encode(masks: Tensor) -> list[dict[str, Any]]:
    """Encode masks (M, H, W) as COCO's RLE, which takes little memory."""
    from trace_fast.masks.rle import encode_rles

    size = list(masks.shape[1:])
    return [{"size": size, "counts": counts} for counts in encode_rles("segment", masks.cpu().numpy())]


def _find_masks(
    edge_map: Tensor, threshold: float | None, top: int | None, min_area: int | None, exclusive: bool
) -> tuple[MaskSet, Any, set[int]]:
    """Return the masks that edges enclose, their label map (H, W), and its labels of void, none."""
    from trace_fast.masks import MaskSet, instances, keep_visible, paint_labels

    if threshold is None:
        masks, scores = instances(edge_map, k=top or 1, min_area=min_area)
    else:
        masks, scores = (part[:top] for part in instances(edge_map, threshold=threshold, min_area=min_area))
    if exclusive:
        masks, indices = keep_visible(masks)
        scores = scores[indices]
    return MaskSet(masks, scores), paint_labels(masks, range(1, len(masks) + 1)).cpu().numpy(), set()


def _complete_masks(
    path: Path, ignore: list[int], edge_map: Tensor, top: int | None, options: dict[str, Any]
) -> tuple[MaskSet, Any, set[int]]:
    """Split and complete the masks of a label map, and return them, their label map (H, W), and its labels of void."""
    import numpy as np

    from trace_fast.io.arrays import mask_areas
    from trace_fast.masks import MaskSet, open_masks, propagate
    from trace_fast.masks.formats.maps import find_void

    labels = _read_labels(path)
    void = find_void(labels, ignore or None)
    # in 64 bits, which have room for the labels of all parts
    completed = propagate(labels.astype(np.int64), edge_map.cpu(), ignore=void, **options)
    mask_set, restore = open_masks(completed, ignore=void)
    if top is not None:
        largest = mask_areas(mask_set.masks).argsort(descending=True, stable=True)[:top].sort().values
        mask_set = MaskSet(mask_set.masks[largest])
        completed = restore(mask_set, [[index] for index in largest.tolist()])
    return mask_set, completed, void


def _write_labels(path: Path, labels: Any, void: set[int], bits: int) -> None:
    """Write a label map as a PNG file, of 8 bits with a palette; void is the highest value."""
    import numpy as np
    from PIL import Image

    from trace_fast.io import visualize
    from trace_fast.masks import write_palette

    highest = 2**bits - 1
    is_void = np.isin(labels, list(void))
    most = int(labels[~is_void].max(initial=0))
    if most >= highest:
        hint = ": give --bits 16" if bits == 8 else ""
        raise ValueError(
            f"segment: masks must be at most {highest - 1} for a map of {bits} bits, got label {most}{hint}"
        )
    labels = np.where(is_void, highest, labels)
    if bits == 8:
        write_palette(path, labels)
    else:
        visualize.write_picture(path, Image.fromarray(labels.astype(np.uint16)))


def _number_images(images: list[Path]) -> dict[Path, int]:
    """Return the id of each image: its name where all are numbers, else its position from 1."""
    names = [image.stem for image in images]
    numbers = [int(name) for name in names] if all(name.isdecimal() for name in names) else []
    if len(set(numbers)) < len(images):
        numbers = list(range(1, len(images) + 1))
    return dict(zip(images, numbers, strict=True))
