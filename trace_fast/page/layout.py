"""The page in the browser: a form, pictures, and what happens on a click. The work itself is in `analysis`."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio
from PIL import Image
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from torch import Tensor

from trace_fast.io import visualize
from trace_fast.io.images import read_image
from trace_fast.jobs.errors import FAILURES, describe
from trace_fast.masks import instances
from trace_fast.page.analysis import Models, draw_attention, write_files
from trace_fast.scan import Scan, draw_abdiv, scan_photo

__all__ = ["Page", "serve"]

SHOWN = 1024  # longer side of the pictures on the page, in pixels; files have the photograph's own size
STUDENT, SEARCH = "student, in one step", "search over timesteps"
USERS = 2  # whose work runs at the same time
NO_PHOTO, MEASURING = "Choose a photograph first.", "Measuring every timestep ..."
HELP = (
    "Choose a photograph: its instance edges, the masks that they enclose, and what the search measures follow. Then "
    "click on a timestep for its ABDiv, and on the photograph for what that point attends to. All of it stays on this "
    "machine."
)

Updates = dict[Any, Any]  # new values of components


class CanceledError(Exception):
    """A visitor has canceled the work of this thread."""


@dataclass
class Session:
    """The results of one visitor of the page so far.

    Attributes:
        name: of the photograph's file.
        photo: (1, 3, H, W) float32 in [0, 1].
        edges: (H, W) float32 in [0, 1].
        masks: (M, H, W) bool.
        scores: (M,) float32.
        scan: what the search measured; None before.
        index: of the timestep that is shown.
        point: row and column of the pixel that was clicked; None before.
        folder: of the files to download, which go with the session.
    """

    name: str
    photo: Tensor
    edges: Tensor
    masks: Tensor
    scores: Tensor
    scan: Scan | None = None
    index: int = 0
    point: tuple[int, int] | None = None
    folder: Any = field(default_factory=lambda: tempfile.TemporaryDirectory(prefix="trace_fast-"))

    def describe(self) -> str:
        """Return a line on what there is."""
        height, width = self.edges.shape
        text = f"{width} x {height} pixels, {len(self.masks)} masks."
        if self.scan is not None:
            text += f" The model reads t = {self.scan.timesteps[self.scan.read]}."
            if self.scan.peak is not None:
                text += f" The KL curve peaks at t* = {self.scan.timesteps[self.scan.peak]}."
        return text


class Page:
    """The page as components of gradio, and the functions that their events call.

    Args:
        models: what it shows.

    Attributes:
        blocks: what gradio serves.
    """

    def __init__(self, models: Models):
        self.models = models
        self.canceled: dict[str | None, bool] = {}  # by visitor, while there is work for them
        self.thread = threading.local()
        for network in {model.backbone.network for model in (models.tracer, models.detector) if model is not None}:
            network.register_forward_pre_hook(self.stop_if_canceled)
        with gradio.Blocks(title="trace_fast", analytics_enabled=False, delete_cache=(3600, 3600)) as self.blocks:
            self.session = gradio.State(None)
            gradio.Markdown(f"# Instance edges by {models.tracer.name}\n{HELP}")
            with gradio.Row():
                with gradio.Column(scale=1, min_width=260):
                    self._make_form()
                with gradio.Column(scale=3):
                    self._make_results()
            gradio.Markdown("## What the search sees")
            self._make_search()
        self._connect()

    def _make_form(self) -> None:
        """Create what a visitor chooses."""
        models = self.models
        stages = [SEARCH] if models.detector is None else [STUDENT, SEARCH]
        self.file = gradio.File(label="Photograph", height=130, elem_id="file")
        self.stage = gradio.Radio(stages, value=stages[0], label="Edges by")
        self.threshold = gradio.Slider(
            0,
            1,
            (models.detector or models.tracer).region_threshold,
            step=0.01,
            label="Threshold of regions",
            info="At 0, masks of all levels of detail, some within others",
        )
        self.count = gradio.Slider(1, 100, 30, step=1, label="Largest number of masks", elem_id="count")
        with gradio.Row():
            self.start = gradio.Button("Find edges", variant="primary", min_width=80, elem_id="start")
            self.cancel = gradio.Button("Cancel", min_width=80, elem_id="cancel")
        self.status = gradio.Markdown(NO_PHOTO, elem_id="status")
        self.files = gradio.File(label="Download", file_count="multiple", interactive=False, elem_id="files")

    def _make_results(self) -> None:
        """Create the pictures of edges and masks."""
        self.slider = gradio.ImageSlider(label="Photograph and edges", elem_id="slider", max_height=440)
        with gradio.Row():
            self.edges, self.masks, self.overlay = (make_picture(name) for name in ("Edges", "Masks", "Overlay"))

    def _make_search(self) -> None:
        """Create the pictures of what the search measures."""
        self.strip = gradio.Gallery(
            label="ABDiv at every timestep: click on one", columns=6, allow_preview=False, elem_id="strip"
        )
        with gradio.Row():
            self.photo = gradio.Image(label="Click on a point", interactive=False, elem_id="photo", buttons=[])
            self.attention = make_picture("Attention of the point")
        self.token = gradio.Markdown("", elem_id="token")
        with gradio.Row():
            self.abdiv = make_picture("ABDiv")
            self.curve = gradio.Plot(label="KL curve", elem_id="curve")

    def _connect(self) -> None:
        """Connect events to functions."""
        choices = [self.threshold, self.count]
        shown = [self.session, self.slider, self.edges, self.masks, self.overlay, self.files, self.status]
        search = [self.strip, self.photo, self.attention, self.token, self.abdiv, self.curve]
        with self.blocks:
            started = gradio.on([self.start.click, self.file.upload], self.begin, None, self.status, queue=False)
            run = [self.file, self.stage, *choices]
            started.then(self.run, run, shown + search, trigger_mode="once")
            self.cancel.click(self.stop, None, self.status, queue=False)
            changes = [choice.change for choice in choices]
            gradio.on(changes, self.change_masks, [self.session, *choices], shown, trigger_mode="always_last")
            self.strip.select(self.choose_timestep, self.session, [self.status, *search])
            self.photo.select(self.choose_point, self.session, [self.status, *search])

    def begin(self, request: gradio.Request) -> str:
        """Begin the work of a visitor, which may wait for that of others."""
        self.canceled[request.session_hash] = False
        return "Finding edges ..."

    def stop(self, request: gradio.Request) -> str:
        """Cancel the work of a visitor, which says when it has ended."""
        if request.session_hash not in self.canceled:
            return "There is nothing to cancel."
        self.canceled[request.session_hash] = True
        return "Canceling ..."

    @contextmanager
    def work_for(self, visitor: str | None) -> Iterator[None]:
        """Let the network stop in this thread as soon as the visitor cancels."""
        self.thread.visitor = visitor
        try:
            yield
        finally:
            del self.thread.visitor

    def stop_if_canceled(self, *_: Any) -> None:
        """Raise `CanceledError` before a pass of the network that the visitor of this thread has canceled."""
        if self.canceled.get(getattr(self.thread, "visitor", None), False):
            raise CanceledError

    def run(
        self, path: str | None, stage: str, threshold: float, count: int, request: gradio.Request
    ) -> Iterator[Updates]:
        """Find edges and masks and measure every timestep, and show what there is, until the visitor cancels."""
        visitor = request.session_hash
        try:
            with sentences():
                yield from self.compute(path, stage, threshold, count, visitor)
        except CanceledError:
            yield {self.status: "Canceled."}
        finally:
            self.canceled.pop(visitor, None)

    def compute(
        self, path: str | None, stage: str, threshold: float, count: int, visitor: str | None
    ) -> Iterator[Updates]:
        """Find edges and masks, show them, and then measure every timestep."""
        if path is None:
            raise ValueError(NO_PHOTO)
        photo = read_image(path)
        detector = self.models.detector if stage == STUDENT else None
        with self.work_for(visitor):
            edges = (detector or self.models.tracer).edges(photo)[0, 0].cpu()
        session = Session(Path(path).stem, photo, edges, *find_masks(edges, threshold, count))
        yield {
            self.slider: (shrink(photo), shrink(edges)),
            self.edges: shrink(edges),
            self.overlay: shrink(visualize.overlay(photo[0], edges)),
            self.photo: shrink(photo),
            self.attention: None,
            self.token: "",
            **self.show_masks(session),
            self.status: MEASURING,
        }
        with self.work_for(visitor):
            scan = session.scan = scan_photo(self.models.tracer, photo)
        session.index = scan.read
        pictures = [(draw_abdiv(scan, index), scan.describe(index)) for index in range(len(scan.timesteps))]
        yield {
            self.strip: pictures,
            self.curve: None if scan.output.kl is None else visualize.plot_curve(scan.output),
            **self.show_timestep(session),
            self.session: session,
            self.status: session.describe(),
        }

    def change_masks(self, session: Session | None, threshold: float, count: int) -> Updates:
        """Find the masks again."""
        with sentences():
            if session is None:
                return {self.status: NO_PHOTO}
            session.masks, session.scores = find_masks(session.edges, threshold, count)
            return {**self.show_masks(session), self.status: session.describe()}

    def choose_timestep(self, session: Session | None, event: gradio.SelectData) -> Updates:
        """Show another timestep."""
        with sentences():
            if session is None:
                return {self.status: NO_PHOTO}
            if session.scan is not None and event.index not in range(len(session.scan.timesteps)):
                raise ValueError(f"app: timestep must be one of those that are shown, got {event.index}")
            session.index = event.index
            return self.show_timestep(session)

    def choose_point(self, session: Session | None, event: gradio.SelectData) -> Updates:
        """Show what another point attends to."""
        with sentences():
            if session is None:
                return {self.status: NO_PHOTO}
            session.point = find_pixel(session.photo, *event.index)
            return self.show_timestep(session)

    def show_masks(self, session: Session) -> Updates:
        """Return the picture of the masks, and the files."""
        files = write_files(Path(session.folder.name), session.name, session.edges, session.masks, session.scores)
        return {
            self.masks: shrink(visualize.draw_masks(session.photo[0], session.masks)),
            self.files: [str(file) for file in files],
            self.session: session,
        }

    def show_timestep(self, session: Session) -> Updates:
        """Return ABDiv at the timestep of the session, and what its point attends to."""
        scan, photo = session.scan, session.photo
        if scan is None:
            return {self.status: MEASURING}
        picture = shrink(draw_abdiv(scan, session.index, photo.shape[-2:]))
        updates: Updates = {self.abdiv: gradio.Image(picture, label=f"ABDiv at {scan.describe(session.index)}")}
        if session.point is not None:
            timestep = scan.timesteps[session.index]
            picture, text = draw_attention(self.models.tracer, photo, session.masks, timestep, *session.point)
            updates |= {self.attention: shrink(picture), self.token: text}
        return updates


def serve(models: Models, port: int | None = None, *, open_browser: bool = False, wait: bool = True) -> str:
    """Serve the page to this machine alone.

    Args:
        models: what it shows.
        port: of 127.0.0.1; None is the first free one from 7860.
        open_browser: open the page.
        wait: until the process is interrupted.

    Returns:
        The address.

    Raises:
        OSError: the port is taken.
    """
    blocks = Page(models).blocks.queue(default_concurrency_limit=USERS)
    _, address, _ = blocks.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        inbrowser=open_browser,
        prevent_thread_lock=not wait,
        ssr_mode=False,  # which would load a font from another machine
        footer_links=[],
        # a page of another host, whose name leads to this machine, could ask as if it were this page
        app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])]},
    )
    return str(address)


@contextmanager
def sentences() -> Iterator[None]:
    """Show what a user, a file or the machine may cause as a message on the page."""
    try:
        yield
    except FAILURES as error:
        raise gradio.Error(describe(error), print_exception=False) from error


def make_picture(label: str) -> Any:
    """Create a picture that is shown only, named after its label."""
    return gradio.Image(label=label, interactive=False, elem_id=label.split()[0].lower(), buttons=["fullscreen"])


def find_masks(edges: Tensor, threshold: float, count: int) -> tuple[Tensor, Tensor]:
    """Return at most `count` masks and their scores; of all levels of detail where the threshold is 0."""
    masks, scores = instances(edges, threshold=threshold or None, k=int(count))
    return masks[: int(count)], scores[: int(count)]


def shrink(image: Any) -> Image.Image:
    """Return an image of any kind as a PIL image whose longer side is at most `SHOWN` pixels."""
    picture = image if isinstance(image, Image.Image) else visualize.panel([image], [""])
    if max(picture.size) > SHOWN:
        picture.thumbnail((SHOWN, SHOWN))
    return picture


def find_pixel(photo: Tensor, x: float, y: float) -> tuple[int, int]:
    """Return row and column in a photograph (1, 3, H, W) of a point in the picture of it on the page."""
    height, width = photo.shape[-2:]
    ratio = max(1.0, max(height, width) / SHOWN)
    return max(0, min(int(y * ratio), height - 1)), max(0, min(int(x * ratio), width - 1))
