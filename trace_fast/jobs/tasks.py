"""The task of a job, the steps from an image to its results, and the one that finds edges."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from trace_fast import __version__
from trace_fast.io import visualize
from trace_fast.io.images import read_image, resize
from trace_fast.io.pictures import open_picture
from trace_fast.jobs.finder import EdgeFinder

if TYPE_CHECKING:
    from PIL import Image

    from trace_fast.tracer import TraceOutput

__all__ = ["OVERLAY_FORMATS", "EdgesTask", "Photo", "Result", "Task", "encode_overlay", "read_photo"]

ORIENTATION = 0x0112  # tag of EXIF

# by the ending of files: Pillow's name, and options that write a picture to look at fast
OVERLAY_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpg": ("JPEG", {"quality": 90}),
    "webp": ("WEBP", {"quality": 85, "method": 0}),
    "png": ("PNG", {"compress_level": 1}),
}


@dataclass(frozen=True)
class Photo:
    """An image that was read, perhaps at a reduced scale.

    Attributes:
        pixels: (1, 3, h, w) float32 in [0, 1].
        height: of its results, in pixels.
        width: likewise.
    """

    pixels: Tensor
    height: int
    width: int


@dataclass(frozen=True)
class Result:
    """The results of an image, or the reason why there are none.

    Attributes:
        name: of the image, without its ending where that is enough; its key in shards.
        height: of the image, in pixels; None where it cannot be read.
        width: likewise.
        files: contents of the files of results, by their kind such as "png" or "overlay.jpg".
        masks: as records with counts (COCO's compressed RLE), score and area in pixels; None where a task finds none.
        timestep: whose attention was read; None where none was.
        error: why there is no result; None where there is one.
    """

    name: str
    height: int | None = None
    width: int | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    masks: list[dict[str, Any]] | None = None
    timestep: int | None = None
    error: str | None = None


class Task(Protocol):
    """The steps from an image to its results, which may run in several threads; see `trace_fast.jobs.pipeline`.

    Attributes:
        op: name of the command, for messages.
        column: of parquet files, for the files without a word in their kind.
        has_masks: whether results have masks.
        keeps_results: whether a run ends with the results of all pictures, without their files.
        file_kinds: of the files of each image, see `trace_fast.jobs.inputs.name_file`.
        settings: what results depend on beside the image, for JSON.
        is_parallel: whether several threads may compute at a time; images are computed one by one then.
        batch_size: images that are computed together.
    """

    op: str
    column: str
    has_masks: bool

    @property
    def keeps_results(self) -> bool: ...  # noqa: D102

    @property
    def file_kinds(self) -> list[str]: ...  # noqa: D102

    @property
    def settings(self) -> dict[str, Any]: ...  # noqa: D102

    @property
    def is_parallel(self) -> bool: ...  # noqa: D102

    @property
    def batch_size(self) -> int: ...  # noqa: D102

    def list_companions(self, name: str) -> list[Path]:
        """Return the other files that the results of an image depend on."""
        ...

    def list_additions(self, name: str) -> list[Path]:
        """Return the files outside of the output folder that the results of an image are written to, too."""
        ...

    def read(self, content: Path | bytes) -> Photo:
        """Return an image, given its file or its bytes."""
        ...

    def get_group(self, photo: Photo) -> Hashable:
        """Return what images that are computed together have in common."""
        ...

    def compute(self, names: Sequence[str], photos: Sequence[Photo]) -> list[Any]:
        """Return what the network, or whatever else is one for all images, finds in images of one group."""
        ...

    def finish(self, name: str, photo: Photo, computed: Any) -> Result:
        """Return the results of an image."""
        ...


def read_photo(
    content: Path | bytes, max_side: int | None = None, view_size: Callable[[int, int], tuple[int, int]] | None = None
) -> Photo:
    """Read an image, and reduce one that is larger than needed; a JPEG file is decoded at a reduced scale then.

    Args:
        content: its file or its bytes.
        max_side: of the longer side, in pixels; None leaves images as they are.
        view_size: returns the size from which more pixels have no effect, given height and width; None is that of the
            image.

    Returns:
        The image, at its size or that of `max_side`; with `view_size` pixels may be fewer than height and width say.
    """
    with contextlib.ExitStack() as stack:
        source: Any = content
        if not isinstance(content, Path):
            source = open_picture("edges: image", io.BytesIO(content), "an image in memory")
        elif max_side is not None or view_size is not None:
            file = stack.enter_context(open(content, "rb"))
            source = open_picture("edges: image", file, repr(str(content)))
        if max_side is None and view_size is None:
            pixels = read_image(source)
            return Photo(pixels, pixels.shape[2], pixels.shape[3])
        is_rotated = lies_on_its_side(source)
        height, width = (source.width, source.height) if is_rotated else (source.height, source.width)
        if max_side is not None:
            scale = min(1, max_side / max(height, width))
            height, width = max(1, round(height * scale)), max(1, round(width * scale))
        least = (height, width) if view_size is None else view_size(height, width)
        # the least scale that gives this size at least; other formats are decoded as they are
        source.draft(None, least if is_rotated else least[::-1])
        pixels = read_image(source)
    return Photo(pixels if view_size is not None else resize(pixels, (height, width)), height, width)


def encode_overlay(picture: Image.Image, ending: str) -> bytes:
    """Return the file of a picture over an image.

    Args:
        picture: of any mode that the format has.
        ending: one of `OVERLAY_FORMATS`.
    """
    image_format, options = OVERLAY_FORMATS[ending]
    return visualize.encode_picture(picture, image_format, **options)


def lies_on_its_side(picture: Image.Image) -> bool:
    """Return whether the EXIF data of a picture exchange its height and width."""
    # damaged data are ignored
    with contextlib.suppress(Exception):
        return picture.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    return False


def plot_curve(traced: TraceOutput | None) -> bytes | None:
    """Return a PNG file of the KL curve of a search; None without one."""
    if traced is None:
        return None
    file = io.BytesIO()
    visualize.plot_curve(traced).savefig(file, format="png", dpi=visualize.PLOT_DPI)
    return file.getvalue()


@dataclass
class EdgesTask:
    """Find the edges of images: a grayscale PNG file each.

    Attributes:
        finder: the model.
        bits: of each pixel, 8 or 16.
        overlay: ending of pictures of the edges over their image, one of `OVERLAY_FORMATS`; None draws none.
        curve: also plot the KL curve of the search.
        max_side: of the longer side of images, in pixels; larger ones are reduced before anything else.
        grid: write edges at the size of the decoder's output, see `trace_fast.Detector.grid_edges`.
    """

    finder: EdgeFinder
    bits: int = 8
    overlay: str | None = None
    curve: bool = False
    max_side: int | None = None
    grid: bool = False
    op, column, has_masks, keeps_results = "edges", "edges", False, False

    @property
    def file_kinds(self) -> list[str]:
        """The kinds of files of each image."""
        return ["png", *([f"overlay.{self.overlay}"] if self.overlay else []), *["curve.png"] * self.curve]

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that the results depend on, for JSON."""
        if self.grid:
            self.finder.load_detector()
        own = {name: value for name, value in asdict(self).items() if name != "finder"}
        return {"command": self.op, "version": __version__, **self.finder.describe(), **own}

    def list_companions(self, name: str) -> list[Path]:
        """Return the other files that the results of an image depend on: none."""
        return []

    def list_additions(self, name: str) -> list[Path]:
        """Return the files outside of the output folder: none."""
        return []

    def read(self, content: Path | bytes) -> Photo:
        """Return an image, decoded at a reduced scale where its pixels would have no effect."""
        return read_photo(content, self.max_side, self.finder.load_detector().view_size if self.grid else None)

    @property
    def is_parallel(self) -> bool:
        """Whether several threads may compute at a time."""
        return self.finder.is_parallel

    @property
    def batch_size(self) -> int:
        """The number of images of a pass."""
        return self.finder.batch_size

    def get_group(self, photo: Photo) -> Hashable:
        """Return what images of one pass have in common."""
        return self.finder.get_group(photo.pixels)

    def compute(self, names: Sequence[str], photos: Sequence[Photo]) -> list[tuple[Tensor, int | None, bytes | None]]:
        """Return the edges (1, 1, H, W) of images, the timestep that was read, and the plot of the curve."""
        outputs = self.finder.find([photo.pixels for photo in photos], self.curve, self.grid)
        return [
            (edges.cpu(), self.finder.get_timestep(traced), plot_curve(traced) if self.curve else None)
            for edges, traced in outputs
        ]

    def finish(self, name: str, photo: Photo, computed: tuple[Tensor, int | None, bytes | None]) -> Result:
        """Return the files of an image."""
        edges, timestep, plot = computed
        files = {"png": visualize.encode_png(edges, self.bits)}
        if self.overlay:
            picture = visualize.draw_edges(photo.pixels[0], edges[0, 0])
            files[f"overlay.{self.overlay}"] = encode_overlay(picture, self.overlay)
        if plot is not None:
            files["curve.png"] = plot
        return Result(name, photo.height, photo.width, files, timestep=timestep)
