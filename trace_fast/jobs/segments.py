"""The masks of each image of a job: label maps, and records of COCO's form."""

from __future__ import annotations

import functools
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trace_fast import __version__
from trace_fast.backbones import Settings
from trace_fast.evaluation.methods import read_map
from trace_fast.io import visualize
from trace_fast.io.arrays import mask_areas
from trace_fast.io.pictures import read_picture
from trace_fast.jobs.errors import FAILURES, describe
from trace_fast.jobs.finder import EdgeFinder
from trace_fast.jobs.tasks import Photo, Result, encode_overlay, read_photo
from trace_fast.masks import MaskSet, instances, keep_visible, open_masks, paint_labels, propagate
from trace_fast.masks.export import encode_palette
from trace_fast.masks.formats.maps import find_void
from trace_fast.masks.rle import encode_rles

__all__ = ["SegmentTask", "find_label_file", "list_coco_results", "read_labels"]

LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")  # of files in a folder of label maps


@dataclass
class SegmentTask:
    """Find the masks of images, or split and complete those of label maps: a label map each.

    Attributes:
        finder: the model.
        edges: folder of edge maps, in place of the model.
        save_edges: folder to which edges are written, too.
        masks: label map of the one image, or folder of label maps, to split and complete.
        ignore: labels that are void.
        mode: of `trace_fast.propagate`.
        threshold: strength from which an edge separates masks; None is the model's own.
        top: largest number of masks.
        min_area: area of the smallest mask, in pixels.
        exclusive: remove overlaps.
        bits: of each pixel of the label map, 8 or 16.
        overlay: ending of pictures of the masks over their image, as `trace_fast.jobs.tasks.encode_overlay` takes it;
            None draws none.
        max_side: of the longer side of images, in pixels; larger ones are reduced before anything else.
        coco: keep the masks of all images, for a file of COCO results.
        has_masks: whether results have masks as RLE, which need pycocotools.
    """

    finder: EdgeFinder
    edges: Path | None = None
    save_edges: Path | None = None
    masks: Path | None = None
    ignore: list[int] = field(default_factory=list)
    mode: str = "fit"
    threshold: float | None = None
    top: int | None = None
    min_area: int | None = None
    exclusive: bool = False
    bits: int = 8
    overlay: str | None = None
    max_side: int | None = None
    coco: bool = False
    has_masks: bool = False
    op, column = "segment", "labels"

    @property
    def keeps_results(self) -> bool:
        """Whether a run ends with the masks of all images."""
        return self.coco

    @property
    def file_kinds(self) -> list[str]:
        """The kinds of files of each image."""
        return ["png", *([f"overlay.{self.overlay}"] if self.overlay else [])]

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that the results depend on, for JSON."""
        own = asdict(self)
        for name in ("finder", "has_masks"):
            del own[name]
        own |= {name: None if own[name] is None else str(own[name]) for name in ("edges", "save_edges", "masks")}
        model = {} if self.edges is not None else self.finder.describe()
        return {"command": self.op, "version": __version__, **model, **own}

    @property
    def barrier(self) -> float:
        """The strength from which an edge separates masks."""
        if self.threshold is not None:
            return self.threshold
        # nothing is known of the model of edge maps
        return Settings.region_threshold if self.edges is not None else self.finder.loaded.region_threshold

    def list_companions(self, name: str) -> list[Path]:
        """Return the edge map and the label map of an image."""
        files = [] if self.edges is None else [self.edges / f"{name}.png"]
        return files if self.masks is None else [*files, find_label_file(self.masks, name) or self.masks]

    def list_additions(self, name: str) -> list[Path]:
        """Return the file to which the edges of an image are written, too."""
        return [] if self.save_edges is None else [self.save_edges / f"{name}.png"]

    def read(self, content: Path | bytes) -> Photo:
        """Return an image."""
        return read_photo(content, self.max_side)

    @property
    def is_parallel(self) -> bool:
        """Whether several threads may compute at a time."""
        return self.edges is not None or self.finder.is_parallel

    @property
    def batch_size(self) -> int:
        """The number of images of a pass."""
        return 1 if self.edges is not None else self.finder.batch_size

    def get_group(self, photo: Photo) -> Hashable:
        """Return what images of one pass have in common."""
        return self.finder.get_group(photo.pixels)

    def compute(self, names: Sequence[str], photos: Sequence[Photo]) -> list[tuple[Tensor, int | None]]:
        """Return the edges (H, W) of images, and the timestep that was read."""
        if self.edges is not None:
            return [(self._read_edges(name, photo), None) for name, photo in zip(names, photos, strict=True)]
        outputs = self.finder.find([photo.pixels for photo in photos])
        return [(edges[0, 0].cpu(), self.finder.get_timestep(traced)) for edges, traced in outputs]

    def _read_edges(self, name: str, photo: Photo) -> Tensor:
        """Return the edge map (H, W) of an image, read from the folder of edges."""
        assert self.edges is not None
        path = self.edges / f"{name}.png"
        if not os.path.isfile(path):
            raise ValueError(f"segment: edges must hold an edge map of the image, got no {path.name} in '{self.edges}'")
        edge_map = torch.from_numpy(read_map(path))
        size, got = (photo.height, photo.width), tuple(edge_map.shape)
        if got != size:
            raise ValueError(f"segment: edges must be of the image's size {size}, got {got} in '{self.edges}'")
        return edge_map

    def finish(self, name: str, photo: Photo, computed: tuple[Tensor, int | None]) -> Result:
        """Return the files and the masks of an image."""
        edge_map, timestep = computed
        for path in self.list_additions(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            visualize.write_png(path, edge_map, 16)
        if self.masks is not None:
            mask_set, labels, void = self._complete_masks(name, edge_map)
        else:
            mask_set, labels, void = self._find_masks(edge_map)
        files = {"png": encode_labels(labels, void, self.bits)}
        if self.overlay:
            picture = visualize.draw_masks(photo.pixels[0], mask_set.masks)
            files[f"overlay.{self.overlay}"] = encode_overlay(picture, self.overlay)
        records = make_records(mask_set) if self.has_masks else None
        return Result(name, photo.height, photo.width, files, records, timestep)

    def _find_masks(self, edge_map: Tensor) -> tuple[MaskSet, np.ndarray, set[int]]:
        """Return the masks that edges enclose, their label map (H, W), and its labels of void, none."""
        # without a threshold, the best masks of all levels
        if self.threshold is None and self.top is not None:
            masks, scores = instances(edge_map, k=self.top, min_area=self.min_area)
        else:
            partition = instances(edge_map, threshold=self.barrier, min_area=self.min_area)
            masks, scores = (part[: self.top] for part in partition)
        if self.exclusive:
            masks, indices = keep_visible(masks)
            scores = scores[indices]
        return MaskSet(masks, scores), paint_labels(masks).cpu().numpy(), set()

    def _complete_masks(self, name: str, edge_map: Tensor) -> tuple[MaskSet, np.ndarray, set[int]]:
        """Split and complete the masks of a label map; return them, their label map (H, W), and its labels of void."""
        assert self.masks is not None
        path = find_label_file(self.masks, name)
        if path is None:
            raise ValueError(f"segment: masks must hold a label map of the image, got no {name}.png in '{self.masks}'")
        labels = read_labels(path)
        void = find_void(labels, self.ignore or None)
        # beside the outline of a mask that is fitted, weaker edges are trusted, too
        threshold = self.threshold if self.mode == "fit" else self.barrier
        options: dict[str, Any] = {"threshold": threshold, "mode": self.mode, "min_area": self.min_area}
        # in 64 bits, which have room for the labels of all parts
        completed = propagate(labels.astype(np.int64), edge_map, ignore=void, **options)
        mask_set, restore = open_masks(completed, ignore=void)
        if self.top is not None:
            largest = mask_areas(mask_set.masks).argsort(descending=True, stable=True)[: self.top].sort().values
            mask_set = MaskSet(mask_set.masks[largest])
            completed = restore(mask_set, [[index] for index in largest.tolist()])
        return mask_set, completed, void


def find_label_file(masks: Path, name: str) -> Path | None:
    """Return the label map of an image: the file itself, or that of the image's name in a folder; None without one.

    Args:
        masks: file or folder.
        name: of the image's results.
    """
    if not os.path.isdir(masks):
        return masks
    paths = (masks / f"{name}{suffix}" for suffix in LABEL_SUFFIXES)
    return next((path for path in paths if os.path.isfile(path)), None)


def read_labels(path: Path) -> np.ndarray:
    """Read a label map (H, W) from a lossless picture of integers.

    Raises:
        ValueError: the file is another picture, or damaged.
    """
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


def encode_labels(labels: np.ndarray, void: Iterable[int], bits: int) -> bytes:
    """Return the PNG file of a label map (H, W), of 8 bits with a palette; void is the highest value."""
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
        return encode_palette("segment", labels)
    return visualize.encode_picture(Image.fromarray(labels.astype(np.uint16)), "PNG")


def make_records(mask_set: MaskSet) -> list[dict[str, Any]]:
    """Return masks as records with counts (COCO's compressed RLE), score, which may be None, and area in pixels."""
    counts = encode_rles("segment", mask_set.masks.cpu().numpy())
    areas = mask_areas(mask_set.masks).tolist()
    scores = [None] * len(counts) if mask_set.scores is None else mask_set.scores.tolist()
    return [
        {"counts": rle.decode("ascii"), "score": score, "area": area}
        for rle, score, area in zip(counts, scores, areas, strict=True)
    ]


def list_coco_results(
    names: Sequence[str], results: Mapping[str, Result]
) -> Iterator[tuple[int, list[dict[str, Any]], list[float] | None]]:
    """Yield the id, the masks and the scores of each image, as `trace_fast.masks.write_coco_results` takes them.

    Args:
        names: of all images, in order. The id of an image is its name where the names of all are numbers, else its
            position from 1.
        results: of those that did not fail, by name.
    """
    stems = [PurePosixPath(name).name for name in names]
    numbers = [int(stem) for stem in stems] if all(stem.isdecimal() for stem in stems) else []
    if len(set(numbers)) < len(names):
        numbers = list(range(1, len(names) + 1))
    for number, name in zip(numbers, names, strict=True):
        if name in results:
            result, records = results[name], results[name].masks or []
            masks = [{"size": [result.height, result.width], "counts": record["counts"]} for record in records]
            scores = [record["score"] for record in records]
            yield number, masks, None if None in scores else scores
