"""Sources of edge maps behind one interface: classical detectors, folders of maps, and models of this package."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trace_fast.api import load
from trace_fast.evaluation.data import Photo
from trace_fast.extras import require
from trace_fast.io.folders import is_litter
from trace_fast.io.images import read_image
from trace_fast.io.pictures import read_picture
from trace_fast.jobs.inputs import SHARD_SUFFIXES
from trace_fast.jobs.shards import EdgeShards

__all__ = ["Method", "open_method", "read_map", "split_name"]

CANNY_THRESHOLDS = 99


@dataclass(frozen=True)
class Method:
    """A source of edge maps.

    Attributes:
        name: as tables show it.
        identity: everything that the maps depend on beside the image; results are cached under it.
        edges: function that returns the edge map of a photo, (H, W) float32 in [0, 1], at the photo's size.
        source: function that returns the file that a map is made from; None where a photo has none.
        suppress: whether only the ridges of the maps are scored; False where maps hold lines already.
        threads: whether several maps may be made at the same time.
        parameters: number of parameters of the network; None where there is none, or where it is not known.

    Example:
        >>> chance = Method("chance", "seed 0", lambda photo: np.random.default_rng(0).random((480, 640), np.float32))
        >>> report = trace_fast.evaluate("coco", [chance, "sobel"])  # doctest: +SKIP
    """

    name: str
    identity: str
    edges: Callable[[Photo], np.ndarray]
    source: Callable[[Photo], Path | None] = lambda photo: photo.image
    suppress: bool = True
    threads: bool = True
    parameters: int | None = None

    @property
    def slug(self) -> str:
        """The name as a part of file names."""
        return re.sub(r"[^\w.-]+", "_", self.name)


def open_method(spec: Any, *, name: str | None = None, device: str | None = None) -> Method:
    """Open a source of edge maps.

    Args:
        spec: text [NAME=]SPEC, where SPEC is `sobel`; `canny`; `maps:FOLDER`, of PNG files named after the images, or
            of the tar or parquet files that `trace-fast edges` writes; `maps:FILE`, one of these; `lines:FOLDER`, the
            same where they hold lines (thinned maps) already; or a model as `trace_fast.edges` takes it (its student
            where it has one), or its search with `@iep` or `@TIMESTEP` behind it. Also a model in memory as
            `trace_fast.load` takes it, or a `Method`.
        name: as tables show it; None is NAME, else SPEC itself, or the name of the model in memory.
        device: where named models run; None is the GPU where there is one, else the CPU.

    Returns:
        The method, its model loaded.

    Raises:
        ValueError: `spec` is not understood.
        RuntimeError: a package is not installed, or the device is not present.

    Example:
        >>> method = open_method("search=mini@iep", device="cpu")
        >>> method.name, method.parameters
        ('search', 2083728)
    """
    if isinstance(spec, Method):
        return spec if name is None else replace(spec, name=name)
    if not isinstance(spec, (str, Path)):
        model = load(spec)
        return _wrap_model(model.name if name is None else name, model.name, model)
    name, spec = split_name(str(spec)) if name is None else (name, str(spec))
    kind, _, folder = spec.partition(":")
    if spec == "sobel":
        return _open_detector(name, spec, _prepare_sobel(), suppress=True)
    if spec == "canny":
        return _open_detector(name, spec, _prepare_canny(), suppress=False)
    if kind in ("maps", "lines"):
        return _open_maps(name, Path(folder), suppress=kind == "maps")
    return _open_model(name, spec, device)


def split_name(text: str) -> tuple[str, str]:
    """Return NAME and SPEC of [NAME=]SPEC; the name is SPEC where none is given."""
    name, equals, spec = text.partition("=")
    # folders may have = in their names
    return (name, spec) if equals and not name.startswith(("maps:", "lines:")) else (text, text)


def read_map(path: str | Path | BinaryIO) -> np.ndarray:
    """Read an edge map from a PNG file of one channel, 8 or 16 bits.

    Args:
        path: the file, or its bytes as a file; black is 0, white is 1.

    Returns:
        (H, W) float32 in [0, 1].

    Raises:
        ValueError: the file has several channels, or is damaged.
        OSError: the file is missing or cannot be read.

    Example:
        >>> read_map("hed/000000000139.png").shape  # doctest: +SKIP
        (426, 640)
    """
    with read_picture("read_map: path", path) as picture:
        if picture.mode not in ("L", "I", "I;16"):
            raise ValueError(f"maps must be of one channel with 8 or 16 bits, got mode {picture.mode}")
        values = np.asarray(picture)
    largest = 255 if values.dtype == np.uint8 else 65535
    return values.astype(np.float32) / np.float32(largest)


def _open_detector(name: str, identity: str, detect: Callable[[np.ndarray], np.ndarray], *, suppress: bool) -> Method:
    """Return the method of a classical detector, which works on luminance."""
    return Method(name, identity, lambda photo: detect(_read_luminance(photo)), suppress=suppress)


def _open_maps(name: str, source: Path, *, suppress: bool) -> Method:
    """Return the method of a folder of maps, of shards of maps, or of one shard."""
    is_folder = os.path.isdir(source)
    shards = sorted(source.iterdir()) if is_folder else [source] if os.path.isfile(source) else []
    shards = [path for path in shards if path.suffix.lower() in SHARD_SUFFIXES and not is_litter(path.name)]
    if not is_folder and not shards:
        raise ValueError(
            f"evaluate: method {name} must name a folder of maps, or a tar or parquet file, got '{source}'"
        )
    maps = EdgeShards("evaluate", shards)

    def find_file(photo: Photo) -> Path:
        if photo.name in maps.positions:
            return maps.positions[photo.name][0]
        return source / f"{photo.name}.png" if is_folder else source

    def read(photo: Photo) -> np.ndarray:
        is_picture = is_folder and photo.name not in maps.positions
        return read_map(find_file(photo) if is_picture else io.BytesIO(maps.read(photo.name)))

    identity = f"{'maps' if suppress else 'lines'}:{source.resolve()}"
    return Method(name, identity, read, find_file, suppress)


def _open_model(name: str, spec: str, device: str | None) -> Method:
    """Return the method of a model by name: its student where it has one, its search where a timestep follows an @."""
    source, at, text = spec.partition("@")
    if not at:
        return _wrap_model(name, spec, load(source, device=device))
    if text != "iep" and not text.isdecimal():
        raise ValueError(f"evaluate: timestep of method {name} must be iep or an integer, got {text!r}")
    return _wrap_model(name, spec, load(source, stage=1, device=device), text if text == "iep" else int(text))


def _wrap_model(name: str, spec: str, model: Any, timestep: str | int | None = None) -> Method:
    """Return the method of a Tracer or Detector; a Tracer may read another timestep than its own."""

    def find_edges(photo: Photo) -> np.ndarray:
        assert photo.image is not None  # checked before
        pixels = read_image(photo.image)
        edges = model.edges(pixels) if timestep is None else model(pixels, timestep=timestep).edges
        return edges[0, 0].cpu().numpy()

    modules = [model.backbone.network, *([model.decoder] if hasattr(model, "decoder") else [])]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    kind = f"{type(model).__name__} {model.timestep} {model.backbone.settings} {model.device.type}"
    count = sum(parameter.numel() for parameter in parameters)
    identity = f"{spec} {kind} {model.hash_weights()}"
    return Method(name, identity, find_edges, threads=False, parameters=count)


def _read_luminance(photo: Photo) -> np.ndarray:
    """Read the luminance of a photo, (H, W) float32 in [0, 1]."""
    assert photo.image is not None  # checked before
    red, green, blue = read_image(photo.image)[0].numpy()
    return 0.2125 * red + 0.7154 * green + 0.0721 * blue


def _prepare_sobel() -> Callable[[np.ndarray], np.ndarray]:
    """Return a detector: the gradient of the luminance smoothed by sigma = 2.

    A step of full contrast is 1, and a square root spreads the weaker ones.
    """
    require("evaluate", "skimage")
    from skimage import filters

    sigma = 2.0

    def detect(luminance: np.ndarray) -> np.ndarray:
        # the filter gives sqrt(2) times the derivative, which is 1 / (sqrt(2 pi) sigma) at most
        gradient = filters.sobel(filters.gaussian(luminance, sigma)) * sigma * np.pi**0.5
        return np.sqrt(gradient.clip(0, 1)).astype(np.float32)

    return detect


def _prepare_canny() -> Callable[[np.ndarray], np.ndarray]:
    """Return a detector: the largest of 99 upper thresholds at which Canny keeps a pixel.

    The lower threshold is 0.4 of the upper one, sigma is 1.4.
    """
    require("evaluate", "cv2")
    import cv2

    largest = 1443.0  # of the gradient of 8-bit images

    def detect(luminance: np.ndarray) -> np.ndarray:
        smooth = cv2.GaussianBlur(np.rint(luminance * 255).astype(np.uint8), (0, 0), 1.4)
        across = cv2.Sobel(smooth, cv2.CV_16S, 1, 0)
        down = cv2.Sobel(smooth, cv2.CV_16S, 0, 1)
        strength = np.zeros(luminance.shape, np.float32)
        for step in range(1, CANNY_THRESHOLDS + 1):
            high = (step / (CANNY_THRESHOLDS + 1)) ** 2 * largest
            edges = cv2.Canny(across, down, 0.4 * high, high, L2gradient=True) > 0
            if not edges.any():
                break
            strength[edges] = step / (CANNY_THRESHOLDS + 1)
        return strength

    return detect
