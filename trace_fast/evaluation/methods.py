"""What makes edge maps: classical detectors, folders of others' maps, and our own models, behind one interface."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trace_fast.evaluation.data import Photo

__all__ = ["Method", "parse_method"]

LEVELS = 99  # thresholds at which Canny is run
SAMPLED = 4096  # numbers of each tensor, at most twice as many, that tell a model's weights from others


@dataclass(frozen=True)
class Method:
    """Something that makes edge maps.

    Attributes:
        name: as tables show it.
        identity: what its maps depend on beside the image; results are kept under it.
        edges: makes the map (H, W) float32 in [0, 1] of a photo, at its size.
        source: the file that a map is made from.
        suppress: whether ridges are to be found first; False where maps hold lines already.
        threads: whether several maps may be made at the same time.
        parameters: of the network; None where there is none, or where it is not known.
    """

    name: str
    identity: str
    edges: Callable[[Photo], np.ndarray]
    source: Callable[[Photo], Path | None]
    suppress: bool = True
    threads: bool = True
    parameters: int | None = None

    @property
    def slug(self) -> str:
        """The name as a part of file names."""
        return re.sub(r"[^\w.-]+", "_", self.name)


def parse_method(text: str, *, device: str | None = None) -> Method:
    """A method from what the command line says.

    Args:
        text: [NAME=]SPEC, where SPEC is `sobel`; `canny`; `maps:FOLDER`, of PNG files named after the images;
            `lines:FOLDER`, the same where they hold lines (thinned maps) already; or a model as `trace_fast.edges`
            takes it: its student where it has one, its search with `@iep` or `@LEVEL` behind it.
        device: for models.

    Returns:
        The method, its model loaded.

    Raises:
        ValueError: SPEC is none of these.
        RuntimeError: a package is not installed.
    """
    name, named, spec = text.partition("=")
    if not named or name.startswith(("maps:", "lines:")):  # folders may have = in their names
        name = spec = text
    if spec in ("sobel", "canny"):
        make = _prepare_sobel() if spec == "sobel" else _prepare_canny()
        return Method(name, spec, lambda photo: make(_grey(photo)), lambda photo: photo.image, suppress=spec == "sobel")
    kind, _, place = spec.partition(":")
    if kind in ("maps", "lines"):
        folder = Path(place)
        if not folder.is_dir():
            raise ValueError(f"evaluate: method {name} must name a folder of maps, got '{place}'")

        def find(photo: Photo) -> Path:
            return folder / f"{photo.name}.png"

        identity = f"{kind}:{folder.resolve()}"
        return Method(name, identity, lambda photo: read_map(find(photo)), find, suppress=kind == "maps")
    return _of_model(name, spec, device)


def read_map(path: Path) -> np.ndarray:
    """A PNG file of one channel, 8 or 16 bits, as float32 in [0, 1]."""
    from PIL import Image

    with Image.open(path) as picture:
        if picture.mode not in ("L", "I", "I;16"):
            raise ValueError(f"maps must be of one channel with 8 or 16 bits, got mode {picture.mode}")
        levels = np.asarray(picture)
    largest = 255 if levels.dtype == np.uint8 else 65535
    return levels.astype(np.float32) / np.float32(largest)


def _of_model(name: str, spec: str, device: str | None) -> Method:
    from trace_fast.backbones import has_student
    from trace_fast.detector import Detector
    from trace_fast.io.images import read_image
    from trace_fast.tracer import Tracer

    model, _, level = spec.partition("@")
    timestep = level if level in ("", "iep") else int(level) if level.isdecimal() else None
    if timestep is None:
        raise ValueError(f"evaluate: level of method {name} must be iep or an integer, got {level!r}")
    found: Detector | Tracer
    if timestep == "" and has_student(model):
        found = detector = Detector.from_pretrained(model, device=device)
        modules, own = [detector.backbone.network, detector.decoder], f"level {detector.timestep}"

        def find(photo: Photo) -> np.ndarray:
            assert photo.image is not None  # checked before
            return detector.edges(read_image(photo.image))[0, 0].cpu().numpy()
    else:
        found = tracer = Tracer.from_pretrained(model, device=device)
        modules, own = [tracer.backbone.network], ""
        options: dict[str, Any] = {} if timestep == "" else {"timestep": timestep}

        def find(photo: Photo) -> np.ndarray:
            assert photo.image is not None  # checked before
            return tracer(photo.image, **options).edges[0, 0].cpu().numpy()

    weights = hashlib.sha256()
    parameters = [parameter for module in modules for parameter in module.parameters()]
    for x in (*parameters, *getattr(found.backbone, "empty_prompt", {}).values()):
        x = x.detach().flatten()[:: max(1, x.numel() // SAMPLED)]  # of billions of numbers a part tells enough
        weights.update(x.float().cpu().numpy().tobytes())
    kind = f"{type(found).__name__} {own} {found.backbone.settings} {found.device.type}"
    identity = f"{spec} {kind} {weights.hexdigest()}"
    count = sum(parameter.numel() for parameter in parameters)
    return Method(name, identity, find, lambda photo: photo.image, threads=False, parameters=count)


def _grey(photo: Photo) -> np.ndarray:
    """Luminance (H, W) float32 in [0, 1]."""
    from trace_fast.io.images import read_image

    assert photo.image is not None
    red, green, blue = read_image(photo.image)[0].numpy()
    return 0.2125 * red + 0.7154 * green + 0.0721 * blue


def _prepare_sobel() -> Callable[[np.ndarray], np.ndarray]:
    """Gradient of the luminance smoothed by sigma = 2; a step of full contrast is 1, a square root spreads the rest."""
    try:
        from skimage import filters
    except ImportError as error:
        raise RuntimeError("evaluate: sobel needs scikit-image: pip install scikit-image") from error
    sigma = 2.0

    def run(grey: np.ndarray) -> np.ndarray:
        # the filter gives sqrt(2) times the derivative, which is 1 / (sqrt(2 pi) sigma) at most
        gradient = filters.sobel(filters.gaussian(grey, sigma)) * sigma * np.pi**0.5
        return np.sqrt(gradient.clip(0, 1)).astype(np.float32)

    return run


def _prepare_canny() -> Callable[[np.ndarray], np.ndarray]:
    """The largest of 99 upper thresholds at which Canny (lower one 0.4 of it, sigma = 1.4) keeps a pixel."""
    try:
        import cv2
    except ImportError as error:
        raise RuntimeError("evaluate: canny needs OpenCV: pip install opencv-python-headless") from error
    largest = 1443.0  # of the gradient of 8-bit images

    def run(grey: np.ndarray) -> np.ndarray:
        smooth = cv2.GaussianBlur(np.rint(grey * 255).astype(np.uint8), (0, 0), 1.4)
        across = cv2.Sobel(smooth, cv2.CV_16S, 1, 0)
        down = cv2.Sobel(smooth, cv2.CV_16S, 0, 1)
        strength = np.zeros(grey.shape, np.float32)
        for level in range(1, LEVELS + 1):
            high = (level / (LEVELS + 1)) ** 2 * largest
            found = cv2.Canny(across, down, 0.4 * high, high, L2gradient=True) > 0
            if not found.any():
                break
            strength[found] = level / (LEVELS + 1)
        return strength

    return run
