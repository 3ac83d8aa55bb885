"""The batches of a distillation: photos with pseudo labels of the teacher, and drawn scenes with exact edges.

All random numbers depend on the seed and the step alone, so that batches are the same in a resumed run and for any
number of processes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trace_fast.decoder import Decoder
from trace_fast.io.images import resize
from trace_fast.training.data import PhotoFile
from trace_fast.training.labels import label_scene, make_labels
from trace_fast.training.scenes import SceneFile, read_scene
from trace_fast.training.shards import Shards

if TYPE_CHECKING:
    from trace_fast.training.distillation import DistillConfig

__all__ = ["PREVIEW", "Augmentation", "Batch", "Batches"]

PREVIEW = 6  # photos of the preview, which are not trained on
AHEAD = 3  # batches that are prepared ahead


@dataclass(frozen=True)
class Batch:
    """B images with labels.

    Attributes:
        images: (B, 3, h, w) float32 in [0, 1], as the network sees them.
        photos: (B, 3, H, W) float32 in [0, 1], as the decoder sees them, which may be a window; None if it does not.
        windows: (B, 4) float32, the top, left, bottom and right of each window as shares of the whole; None if whole.
        labels: (B, 1, H, W) float32 in [0, 1], 1 is edge; (H, W) is the size of the decoder's output.
        weights: (B, 1, H, W) float32 in [0, 1], 0 where there is no label.
    """

    images: Tensor
    photos: Tensor | None
    windows: Tensor | None
    labels: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        photos = None if self.photos is None else self.photos.to(device)
        windows = None if self.windows is None else self.windows.to(device)
        return Batch(self.images.to(device), photos, windows, self.labels.to(device), self.weights.to(device))

    @classmethod
    def concatenate(cls, parts: Sequence[Batch]) -> Batch:
        """Return one batch of several."""
        photos = [part.photos for part in parts if part.photos is not None]
        windows = [part.windows for part in parts if part.windows is not None]
        return cls(
            torch.cat([part.images for part in parts]),
            torch.cat(photos) if photos else None,
            torch.cat(windows) if windows else None,
            torch.cat([part.labels for part in parts]),
            torch.cat([part.weights for part in parts]),
        )


@dataclass(frozen=True)
class Augmentation:
    """Random changes of an image of a batch.

    Attributes:
        mirrored: whether left and right are exchanged.
        channels: the order of red, green and blue.
        gain: factor of the contrast.
        offset: added to the brightness.
        position: of the window, as shares of the room that it has down and across.
    """

    mirrored: bool = False
    channels: tuple[int, ...] = (0, 1, 2)
    gain: float = 1.0
    offset: float = 0.0
    position: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def sample(cls, random: np.random.Generator, channel_shuffle: float, jitter: float) -> Augmentation:
        """Return a random augmentation; the arguments are options of `DistillConfig`."""
        mirrored = bool(random.random() < 0.5)
        shuffled = random.random() < channel_shuffle
        channels = tuple(random.permutation(3).tolist()) if shuffled else (0, 1, 2)
        gain, offset = 1 + jitter * random.uniform(-1, 1), jitter / 2 * random.uniform(-1, 1)
        return cls(mirrored, channels, gain, offset, (random.random(), random.random()))

    def change_colors(self, image: Tensor) -> Tensor:
        """Return an image (1, 3, h, w) in [0, 1] in other colors."""
        image = image[:, list(self.channels)]
        if (self.gain, self.offset) == (1.0, 0.0):
            return image
        return ((image - 0.5) * self.gain + 0.5 + self.offset).clamp(0, 1)


class Batches:
    """The batches of a run by their step.

    Args:
        config: of the run.
        photos: all of them, in order; the first `PREVIEW` are not trained on.
        scenes: drawn scenes; may be empty.
        divergences: of the photos, which the teacher found.
        helper: edges of the photos, which a student found that helps to label, or None.
        decoder: whose view of a photo, and output, decide the sizes.
        size: (height, width) in pixels that the network works at.
        scale: s of the probability 1 - exp(-ABDiv / s), in nats.
    """

    def __init__(
        self,
        config: DistillConfig,
        photos: Sequence[PhotoFile],
        scenes: Sequence[SceneFile],
        divergences: Shards,
        helper: Shards | None,
        decoder: Decoder,
        size: tuple[int, int],
        scale: float,
    ):
        self.config, self.photos, self.scenes = config, photos, scenes
        self.divergences, self.helper = divergences, helper
        self.decoder, self.size, self.scale = decoder, size, scale
        self.scene_count = config.count_scenes()
        self.photo_count = config.batch - self.scene_count
        count = (len(photos) - PREVIEW) / self.photo_count if self.photo_count else len(scenes) / self.scene_count
        self.steps = max(1, round(config.epochs * count))

    def get_indices(self, step: int) -> tuple[list[int], list[int]]:
        """Return the photos, and the scenes, of a step by their indices: permutations of each, in turn."""
        photos = self._take_turns(step * self.photo_count, self.photo_count, len(self.photos) - PREVIEW, 0)
        scenes = self._take_turns(step * self.scene_count, self.scene_count, len(self.scenes), 1)
        return [PREVIEW + index for index in photos], scenes

    def _take_turns(self, start: int, count: int, length: int, kind: int) -> list[int]:
        """Return numbers `start` to `start + count` of an endless row of permutations."""
        pairs = [divmod(number, length) for number in range(start, start + count)]
        return [int(self._permute(epoch, length, kind)[index]) for epoch, index in pairs]

    @functools.lru_cache(maxsize=4)  # noqa: B019 (one object a run)
    def _permute(self, epoch: int, length: int, kind: int) -> np.ndarray:
        return np.random.default_rng([self.config.seed, epoch, kind]).permutation(length)

    def load_photo(self, index: int, augmentation: Augmentation | None = None) -> Batch:
        """Return a photo by its index, with pseudo labels, as a batch of one; whole and as it is by default."""
        photo = self.photos[index].read()
        view, size = self._show(photo)
        config = self.config
        labels, weights = make_labels(
            self.divergences.read(index).float(),
            size,
            photo if view is None else view,
            config.labels,
            config.interior,
            self.scale,
            None if self.helper is None else self.helper.read(index).float() / 255,
            config.student_weight,
        )
        return self._cut(photo, view, labels, weights, augmentation)

    def load_scene(self, index: int, augmentation: Augmentation | None = None) -> Batch:
        """Return a scene by its index, with exact labels, as a batch of one; whole and as it is by default."""
        pixels, instances = read_scene(self.scenes[index])
        photo = pixels[None].float() / 255
        view, size = self._show(photo)
        return self._cut(photo, view, *label_scene(instances, size), augmentation)

    def _show(self, photo: Tensor) -> tuple[Tensor | None, tuple[int, int]]:
        """Return a photo (1, 3, H, W) as the decoder sees it, if it does, and the size of the decoder's output."""
        size = self.decoder.photo_size((photo.shape[-2], photo.shape[-1]), self.size)
        if size is None:
            return None, self.decoder.grid
        if self.config.window is not None and (scale := self.config.window / min(size)) > 1:
            size = round(size[0] * scale), round(size[1] * scale)  # a narrow photo is enlarged until the window fits in
        return resize(photo, size), size

    def _cut(
        self, photo: Tensor, view: Tensor | None, labels: Tensor, weights: Tensor, augmentation: Augmentation | None
    ) -> Batch:
        """Return an image with its labels (1, 1, H, W), augmented, and cut to the window."""
        images, windows = resize(photo, self.size), None
        if augmentation is None:
            return Batch(images, view, None, labels, weights)
        if augmentation.mirrored:
            images, labels, weights = images.flip(-1), labels.flip(-1), weights.flip(-1)
            view = None if view is None else view.flip(-1)
        if view is not None and (side := self.config.window) is not None:
            height, width = view.shape[-2:]
            down, across = augmentation.position
            top, left = int(down * (height - side + 1)), int(across * (width - side + 1))
            view, labels, weights = (
                maps[..., top : top + side, left : left + side] for maps in (view, labels, weights)
            )
            windows = torch.tensor([[top / height, left / width, (top + side) / height, (left + side) / width]])
        view = None if view is None else augmentation.change_colors(view)
        return Batch(augmentation.change_colors(images), view, windows, labels, weights)

    def load(self, step: int, share: slice = slice(None)) -> Batch:
        """Return a batch, or the share of it that a process trains on."""
        photos, scenes = self.get_indices(step)
        random = np.random.default_rng([self.config.seed, step, 1])
        augmentations = [
            Augmentation.sample(random, self.config.channel_shuffle, self.config.jitter) for _ in (*photos, *scenes)
        ]
        loaders = [(self.load_photo, index) for index in photos] + [(self.load_scene, index) for index in scenes]
        parts = [
            load(index, augmentation)
            for (load, index), augmentation in list(zip(loaders, augmentations, strict=True))[share]
        ]
        if len(shapes := {tuple(part.labels.shape[-2:]) for part in parts}) > 1:
            raise ValueError(
                "distill: window must be given for a decoder that sees photos at their own aspect ratio, where these "
                f"differ, got {self.config.window} and photos of {' and '.join(map(str, sorted(shapes)[:2]))} pixels"
            )
        return Batch.concatenate(parts)

    def iterate(self, start: int, share: slice) -> Iterator[Batch]:
        """Yield the shares of all batches from a step on, prepared ahead."""
        with ThreadPoolExecutor(2) as pool:
            pending = [pool.submit(self.load, step, share) for step in range(start, min(start + AHEAD, self.steps))]
            for step in range(start, self.steps):
                yield pending.pop(0).result()
                if step + AHEAD < self.steps:
                    pending.append(pool.submit(self.load, step + AHEAD, share))
