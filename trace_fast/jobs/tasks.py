"""What is computed for each image of a job: edges and their pictures."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from trace_fast import __version__
from trace_fast.io import visualize
from trace_fast.io.images import read_image
from trace_fast.io.pictures import open_picture
from trace_fast.jobs.finder import EdgeFinder

__all__ = ["OVERLAY_FORMATS", "EdgesTask", "Result", "Task", "read_photo"]

# by the ending of files: Pillow's name, and options that write a picture to look at fast
OVERLAY_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpg": ("JPEG", {"quality": 90}),
    "webp": ("WEBP", {"quality": 85, "method": 0}),
    "png": ("PNG", {"compress_level": 1}),
}


@dataclass(frozen=True)
class Result:
    """What was computed for an image.

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
    """The steps from an image to its results; `read` and `finish` run in threads of their own.

    Attributes:
        op: name of the command, for messages.
        column: of parquet files, for the files without a word in their kind.
        has_masks: whether results have masks.
        keeps_results: whether a run ends with the results of all pictures, without their files.
        file_kinds: of the files of each image, see `trace_fast.jobs.inputs.name_file`.
        settings: what results depend on beside the image, for JSON.
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

    def list_companions(self, name: str) -> list[Path]:
        """Return the other files that the results of an image depend on."""
        ...

    def read(self, content: Path | bytes) -> Tensor:
        """Return the pixels of an image (1, 3, H, W) float32 in [0, 1], given its file or its bytes."""
        ...

    def compute(self, name: str, photo: Tensor) -> Any:
        """Return what the network, or whatever else is one for all images, finds in an image."""
        ...

    def finish(self, name: str, photo: Tensor, computed: Any) -> Result:
        """Return the results of an image."""
        ...


def read_photo(content: Path | bytes) -> Tensor:
    """Read an image (1, 3, H, W) float32 in [0, 1], given its file or its bytes."""
    if isinstance(content, Path):
        return read_image(content)
    return read_image(open_picture("edges: image", io.BytesIO(content), "an image in memory"))


@dataclass
class EdgesTask:
    """Find the edges of images: a grayscale PNG file each.

    Attributes:
        finder: the model.
        bits: of each pixel, 8 or 16.
        overlay: ending of pictures of the edges over their image, one of `OVERLAY_FORMATS`; None draws none.
        curve: also plot the KL curve of the search.
    """

    finder: EdgeFinder
    bits: int = 8
    overlay: str | None = None
    curve: bool = False
    op, column, has_masks, keeps_results = "edges", "edges", False, False

    @property
    def file_kinds(self) -> list[str]:
        """The kinds of files of each image."""
        return ["png", *([f"overlay.{self.overlay}"] if self.overlay else []), *["curve.png"] * self.curve]

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """What the results depend on beside the image."""
        own = {name: value for name, value in asdict(self).items() if name != "finder"}
        return {"command": self.op, "version": __version__, **self.finder.describe(), **own}

    def list_companions(self, name: str) -> list[Path]:
        """Return the other files that the results of an image depend on: none."""
        return []

    def read(self, content: Path | bytes) -> Tensor:
        """Return the pixels of an image."""
        return read_photo(content)

    def compute(self, name: str, photo: Tensor) -> tuple[Tensor, int | None, bytes | None]:
        """Return the edges (1, 1, H, W), the timestep that was read, and the plot of the curve."""
        edges, traced = self.finder.find(photo, self.curve)
        timestep = self.finder.loaded.timestep if traced is None else int(traced.timestep[0])
        plot = None
        if self.curve and traced is not None:
            file = io.BytesIO()
            visualize.plot_curve(traced).savefig(file, format="png", dpi=visualize.PLOT_DPI)
            plot = file.getvalue()
        return edges.cpu(), timestep if isinstance(timestep, int) else None, plot

    def finish(self, name: str, photo: Tensor, computed: tuple[Tensor, int | None, bytes | None]) -> Result:
        """Return the files of an image."""
        edges, timestep, plot = computed
        files = {"png": visualize.encode_png(edges, self.bits)}
        if self.overlay:
            image_format, options = OVERLAY_FORMATS[self.overlay]
            picture = visualize.draw_edges(photo[0], edges[0, 0])
            files[f"overlay.{self.overlay}"] = visualize.encode_picture(picture, image_format, **options)
        if plot is not None:
            files["curve.png"] = plot
        return Result(name, photo.shape[2], photo.shape[3], files, timestep=timestep)
