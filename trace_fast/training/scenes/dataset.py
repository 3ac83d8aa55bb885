"""Folders of scenes: images and instance maps, as `trace-fast evaluate` reads any data set."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trace_fast.io.claims import claim_folder
from trace_fast.io.files import write_files
from trace_fast.io.folders import is_picture
from trace_fast.io.pictures import read_picture
from trace_fast.jobs.parts import Part, find_part, parse_part
from trace_fast.progress import Progress
from trace_fast.training.data import PhotoFile, list_photos, shuffle_photos
from trace_fast.training.options import check_options, document_options, option, to_json
from trace_fast.training.state import require_same

__all__ = ["IGNORED", "SceneFile", "ScenesConfig", "list_scenes", "load_photos", "read_scene", "write_scenes"]

IGNORED = 65535  # in instance maps: pixels at the border of two regions that are no objects
VERSION = 4  # of what is drawn: scenes of two versions are never in one folder
DESCRIPTION = "scenes.json"
PHOTO_SIDE = 128  # of the photos that colors are taken from, in pixels
CHUNK = 16  # scenes that a process draws at a time


@document_options
@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """The configuration of a data set of scenes.

    A scene depends on the options, the photos and its number alone, not on the number of processes or the count.

    Raises:
        TypeError: the value of an option is of a wrong type.
        ValueError: the value of an option is out of range.

    Example:
        >>> config = ScenesConfig(output=Path("scenes"), count=1000, size=144)
        >>> config.photos is None
        True
    """

    photos: Path | None = option(
        None,
        help="The folder of image files, or of tar files of them, from which colors and spectra are taken. The default "
        "is palettes without photos.",
        fixed=False,
    )
    output: Path = option(
        help="The folder for the scenes. Scenes that are complete there are kept, and only missing ones are drawn.",
        fixed=False,
    )
    count: int = option(1000, help="The number of scenes.", least=1, fixed=False)
    size: int = option(256, help="The height and width of the scenes in pixels.", least=32)
    seed: int = option(0, help="The seed of all random numbers.", least=0)
    most_photos: int = option(400, help="The largest number of photos that are used; the seed chooses them.", least=1)
    workers: int = option(
        0, help="The number of processes that draw. 0 draws in the main process.", least=0, fixed=False
    )
    part: str | None = option(
        None,
        help="The part of the scenes to draw: I/N is the part I, from 0, of N parts, each of another process, and all "
        "write to one folder. The default is what torchrun, accelerate launch or srun say.",
        fixed=False,
    )

    def __post_init__(self) -> None:
        check_options("scenes", self)
        self.get_part()

    def get_part(self) -> Part:
        """Return the part of the scenes that this process draws."""
        return find_part() if self.part is None else parse_part("scenes: part", self.part)


@dataclass(frozen=True)
class SceneFile:
    """The files of a scene.

    Attributes:
        image: a JPEG file.
        instances: a PNG file of 16 bits.
    """

    image: Path
    instances: Path

    def is_complete(self) -> bool:
        """Return whether both files are there."""
        return self.image.is_file() and self.instances.is_file()


def write_scenes(config: ScenesConfig) -> Path:
    """Draw scenes into a folder, except for those that are there already.

    The folder has `images/000000.jpg` and `inst/000000.png` of each scene, a README.md that describes them, and
    scenes.json with the options. Files appear in one step, so that an interrupted run can be continued.

    Args:
        config: the options.

    Returns:
        The output folder.

    Raises:
        FileNotFoundError: the folder of photos does not exist.
        ValueError: the output folder has scenes of other options or photos, or a photo is damaged.
        RuntimeError: another run writes to the output folder.

    Example:
        >>> write_scenes(ScenesConfig(output=Path("scenes"), count=8, size=96))  # doctest: +SKIP
        PosixPath('scenes')
    """
    files = [] if config.photos is None else shuffle_photos(list_photos(config.photos), config.seed)
    config.output.mkdir(parents=True, exist_ok=True)
    with claim_folder(config.output, "scenes", config.get_part().index):
        _write_missing(config, files[: config.most_photos])
    return config.output


def _write_missing(config: ScenesConfig, files: list[PhotoFile]) -> None:
    """Draw the scenes that are missing, with colors of these photos."""
    identity = _describe(config, files)
    path = config.output / DESCRIPTION
    if path.is_file():
        require_same("scenes", "output", "scenes of the same options", path.read_text(), identity, path)
    scenes = [_locate(config.output, number) for number in range(config.count)]
    # in this order: other parts write the description first
    if any(scene.image.exists() or scene.instances.exists() for scene in scenes) and not path.is_file():
        raise ValueError(
            f"scenes: output must be empty or hold scenes, got files without {DESCRIPTION} in '{path.parent}'"
        )
    for folder in (scenes[0].image.parent, scenes[0].instances.parent):
        folder.mkdir(parents=True, exist_ok=True)
    contents = {DESCRIPTION: identity.encode(), "README.md": _write_readme(config, len(files)).encode()}
    write_files(config.output, contents, "scenes")

    numbers = range(config.count)[config.get_part().share]
    missing = [number for number in numbers if not scenes[number].is_complete()]
    chunks = [missing[start : start + CHUNK] for start in range(0, len(missing), CHUNK)]
    photos = load_photos(files) if files and missing else None
    write = functools.partial(_write_chunk, config, photos)
    with Progress("drawing", "scene", len(numbers), initial=len(numbers) - len(missing)) as progress:
        for done in _run_chunks(write, chunks, config.workers):
            progress.update(done)


def load_photos(files: list[PhotoFile]) -> np.ndarray:
    """Read photos at the small size that scenes take their colors from, (P, 128, 128, 3) uint8.

    Args:
        files: at least one.

    Raises:
        ValueError: a photo is damaged.
    """
    from PIL import Image

    from trace_fast.training.scenes.fields import to_bytes

    photos = []
    for file in files:
        picture = Image.fromarray(to_bytes(file.read()[0].permute(1, 2, 0).numpy()))
        photos.append(np.asarray(picture.resize((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.BOX)))
    return np.stack(photos)


def list_scenes(folder: Path) -> list[SceneFile]:
    """Return the complete scenes of a folder, in order.

    Args:
        folder: written by `write_scenes`.

    Raises:
        ValueError: there is none.
    """
    numbers = sorted(path.stem for path in (folder / "images").glob("*.jpg") if is_picture(path.name))
    scenes = [SceneFile(folder / "images" / f"{stem}.jpg", folder / "inst" / f"{stem}.png") for stem in numbers]
    scenes = [scene for scene in scenes if scene.is_complete()]
    if not scenes:
        raise ValueError(f"scenes must be a folder that `trace-fast scenes` wrote, got no scenes in {str(folder)!r}")
    return scenes


def read_scene(scene: SceneFile) -> tuple[Tensor, Tensor]:
    """Read a scene.

    Args:
        scene: of `list_scenes`.

    Returns:
        The pixels (3, H, W) uint8, and the instances (H, W) int32: 0 no object, 1 to K objects, 65535 ignored.
    """
    with read_picture("read_scene: scene", scene.image) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    with read_picture("read_scene: scene", scene.instances) as picture:
        instances = torch.from_numpy(np.asarray(picture).astype(np.int32))
    return pixels, instances


def _locate(folder: Path, number: int) -> SceneFile:
    return SceneFile(folder / "images" / f"{number:06d}.jpg", folder / "inst" / f"{number:06d}.png")


def _describe(config: ScenesConfig, files: list[PhotoFile]) -> str:
    """Return what every scene of a folder depends on, as JSON."""
    keys = "\n".join(file.key for file in files)
    digest = hashlib.sha256(keys.encode(errors="surrogateescape")).hexdigest()[:16] if files else None
    return json.dumps(json.loads(to_json(config, {"photos": digest})) | {"photos": digest, "version": VERSION})


def _run_chunks(write: functools.partial[int], chunks: list[list[int]], workers: int) -> Iterator[int]:
    """Yield the number of scenes of each chunk that is written."""
    if not workers or not chunks:
        yield from map(write, chunks)
        return
    # a forked process would share the threads of torch
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(workers, len(chunks)), mp_context=context, initializer=_set, initargs=(write,)
    ) as pool:
        try:
            yield from pool.map(_run_stored, chunks)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_stored: list[functools.partial[int]] = []  # in a worker, what it runs; photos are sent to it once


def _set(write: functools.partial[int]) -> None:
    torch.set_num_threads(1)
    _stored[:] = [write]


def _run_stored(chunk: list[int]) -> int:
    return _stored[0](chunk)


def _write_chunk(config: ScenesConfig, photos: np.ndarray | None, numbers: list[int]) -> int:
    """Draw and write the scenes of these numbers; return how many."""
    from PIL import Image

    from trace_fast.training.scenes.scene import draw_scene

    for number in numbers:
        drawn = draw_scene(np.random.default_rng([config.seed, number]), (config.size, config.size), photos)
        file = io.BytesIO()
        Image.fromarray(drawn.instances).save(file, "PNG", compress_level=3)
        scene = _locate(config.output, number)
        write_files(scene.image.parent, {scene.image.name: drawn.jpeg}, "scenes")
        write_files(scene.instances.parent, {scene.instances.name: file.getvalue()}, "scenes")
    return len(numbers)


def _write_readme(config: ScenesConfig, photos: int) -> str:
    """Return the description of the folder, in Markdown."""
    colors = f"{photos} photos in {config.photos.name!r}" if config.photos else "palettes without photos"
    return "\n".join(
        [
            "# Scenes",
            "",
            "Drawn by `trace-fast scenes`: objects that occlude one another, with exact instance maps.",
            "",
            f"- Scenes: {config.count:,} of {config.size} x {config.size} pixels, seed {config.seed}",
            f"- Colors and spectra: {colors}",
            "- `images/`: JPEG files",
            "- `inst/`: PNG files of 16 bits: 0 no object, 1 to K objects, 65535 to ignore (borders between regions "
            "that are no objects)",
            "- `scenes.json`: what the scenes depend on",
            "",
        ]
    )
