"""Pretraining: the embedded diffusion model `mini` learns from a folder of photos, without annotations."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from trace_fast.backbones.base import load_weights
from trace_fast.backbones.mini import Mini, MiniConfig
from trace_fast.backbones.schedule import VariancePreserving
from trace_fast.io.files import write_files
from trace_fast.io.images import resize
from trace_fast.progress import LOGGER, Progress
from trace_fast.tracer import Tracer
from trace_fast.training.cards import describe_machine, format_card
from trace_fast.training.data import list_photos
from trace_fast.training.inside import measure_inside
from trace_fast.training.options import check_options, document_options, option, to_json
from trace_fast.training.scenes import SceneFile, list_scenes, read_scene
from trace_fast.training.state import Process, State, trapezoid

__all__ = ["PretrainConfig", "load_photos", "make_collages", "make_crops", "pretrain"]

WEIGHTS = "model.safetensors"
PROGRESS = ("step", "images_done", "seconds", "recent", "losses")
MEASURED = 32  # scenes that are not trained on
# counts of images after which weights are exported, for the scaling curve
EXPORTS = (3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000)


@document_options
@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The configuration of a pretraining.

    All random numbers depend on `seed` and the step alone, so that a resumed run continues exactly where it stopped. A
    resumed run may have another number of images; the learning rate follows it.

    Raises:
        TypeError: the value of an option is of a wrong type.
        ValueError: the value of an option is out of range.
        FileNotFoundError: there are no weights to start from.

    Example:
        >>> config = PretrainConfig(photos=Path("photos"), output=Path("mini"), size=32, large_size=48)
        >>> config.get_batch(5)
        (48, 14)
    """

    photos: Path = option(help="The folder of image files to learn from, or of tar files of them.", fixed=False)
    output: Path = option(
        help="The folder for the state of the run and the weights. A run in that folder is resumed.", fixed=False
    )
    init_from: Path | None = option(
        None, help="The folder with weights of the same architecture to start from.", fixed=False
    )
    images: int = option(300_000, help="The number of images to train on.", least=1, fixed=False)
    size: int = option(64, help="The height and width in pixels of the images in most steps.", least=16)
    large_size: int = option(128, help="The height and width in pixels of the images in the other steps.", least=16)
    large_every: int = option(6, help="The number of steps of which the last one uses the large size.", least=1)
    batch: int = option(
        32,
        help="The number of images in a step of the small size, over all processes. A step of the large size has about "
        "as many pixels.",
        least=1,
    )
    collages: float = option(
        0.5, help="The share of a batch that is made of fragments of several photos.", least=0, most=1
    )
    scenes: Path | None = option(
        None,
        help="The folder of drawn scenes to learn from beside the photos; see `trace-fast scenes`. The first "
        f"{MEASURED} serve to measure how much attention stays inside an object.",
        fixed=False,
    )
    scenes_share: float = option(
        0.5, help="The share of a batch that is made of scenes, where there are scenes.", least=0, most=1
    )
    timestep_power: float = option(
        1.5,
        help="The exponent of the timesteps that are drawn, 1000 u^power with u uniform. 1 draws all equally often, a "
        "larger one draws low timesteps more often.",
        least=1,
        most=100,
    )
    rate: float = option(1.5e-3, help="The peak learning rate.", least=0, most=1)
    warmup: int = option(200, help="The number of steps over which the learning rate rises.", least=1)
    decay: float = option(
        0.25, help="The last share of the run, over which the learning rate falls to zero.", least=0.01, most=1
    )
    ema: float = option(
        0.999, help="The decay of the moving average of the weights. The average is the result.", least=0, most=1
    )
    dim: int = option(MiniConfig.dim, help="The number of channels of the network.", least=16)
    depth: int = option(MiniConfig.depth, help="The number of blocks of the network.", least=1)
    heads: int = option(MiniConfig.heads, help="The number of attention heads of the network.", least=1)
    seed: int = option(0, help="The seed of all random numbers.", least=0)
    compile: bool = option(
        False, help="Compile the network. This takes two minutes, and saves a quarter of the time of a step on a CPU."
    )
    device: str = option("cpu", help="The device to train on, such as cuda:1.", fixed=False)
    workers: int = option(
        0,
        help="The number of processes that prepare batches ahead. 0 prepares them in the main process; a GPU needs "
        "several.",
        least=0,
        fixed=False,
    )
    save_minutes: float = option(
        5.0, help="The time in minutes between two states from which a run can be resumed.", least=0, fixed=False
    )
    minutes: float | None = option(
        None,
        help="The time in minutes after which the run stops, to be resumed later. The default is no limit.",
        least=0,
        fixed=False,
    )
    license: str = option("not stated", help="The license of the photos, for the model card.", fixed=False)

    def __post_init__(self) -> None:
        check_options("pretrain", self)
        if self.scenes is not None and self.scenes_share + self.collages > 1:
            raise ValueError(
                f"pretrain: scenes_share and collages must be at most 1 together, got {self.scenes_share} and "
                f"{self.collages}"
            )
        if self.init_from is not None and not os.path.isfile(self.init_from / WEIGHTS):
            raise FileNotFoundError(f"pretrain: init_from must be a folder with {WEIGHTS}, got '{self.init_from}'")

    @property
    def architecture(self) -> MiniConfig:
        """The architecture of the network."""
        return MiniConfig(dim=self.dim, depth=self.depth, heads=self.heads)

    @property
    def large_batch(self) -> int:
        """The number of images in a step of the large size."""
        return max(1, self.batch * self.size**2 // self.large_size**2)

    def describe_run(self) -> str:
        """Return what a resumed run must share with the run before, as JSON; of weights to start from, their bytes."""
        if self.init_from is None:
            return to_json(self, {})
        return to_json(self, {"init_from": hashlib.sha256((self.init_from / WEIGHTS).read_bytes()).hexdigest()})

    def get_batch(self, step: int) -> tuple[int, int]:
        """Return size and number of the images of a step."""
        large = step % self.large_every == self.large_every - 1
        return (self.large_size, self.large_batch) if large else (self.size, self.batch)

    def get_rate(self, step: int, images_done: int) -> float:
        """Return the learning rate of a step."""
        return self.rate * trapezoid(step, images_done / self.images, self.warmup, self.decay)


def load_photos(folder: Path, size: int = 256) -> np.ndarray:
    """Return the central square of every photo of a folder.

    Args:
        folder: of image files, or of tar files of them.
        size: height and width in pixels that the squares are resized to.

    Returns:
        (n, size, size, 3) uint8.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it has no photo, or one is damaged or too small; the message names it.
    """
    squares = []
    photos = list_photos(folder)
    with Progress("reading photos", "image", len(photos)) as progress:
        for photo in photos:
            pixels = photo.read()
            side = min(pixels.shape[2:])
            top, left = ((length - side) // 2 for length in pixels.shape[2:])
            square = resize(pixels[:, :, top : top + side, left : left + side], (size, size))
            squares.append((square[0] * 255).round().byte().permute(1, 2, 0).numpy())
            progress.update()
    return np.stack(squares)


class ScenePictures(Sequence[np.ndarray]):
    """The pictures of scenes, (H, W, 3) uint8 each, read when they are asked for.

    Args:
        scenes: of a folder; see `trace_fast.training.scenes.list_scenes`.
    """

    def __init__(self, scenes: Sequence[SceneFile]):
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: Any) -> Any:
        return read_scene(self.scenes[index])[0].permute(1, 2, 0).numpy()


def make_crops(photos: Sequence[np.ndarray] | np.ndarray, count: int, size: int, random: np.random.Generator) -> Tensor:
    """Return random square crops of random photos, half of them mirrored.

    The side of a crop is log-uniform between `size` pixels, its native resolution, and the whole photo.

    Args:
        photos: n of (side, side, 3) uint8 each, such as an array (n, side, side, 3).
        count: number of crops.
        size: height and width in pixels that crops are resized to.
        random: source of random numbers.

    Returns:
        (count, 3, size, size) float32 in [-1, 1].

    Example:
        >>> make_crops(np.zeros((2, 64, 64, 3), np.uint8), 5, 16, np.random.default_rng(0)).shape
        torch.Size([5, 3, 16, 16])
    """
    from PIL import Image

    full = len(photos[0])
    batch = np.empty((count, size, size, 3), np.uint8)
    for row in batch:
        side = math.exp(random.uniform(math.log(min(size, full)), math.log(full)))
        left, top = random.uniform(0, full - side, 2)
        photo = Image.fromarray(photos[int(random.integers(len(photos)))])
        box = (left, top, left + side, top + side)
        crop = np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR, box=box))
        row[:] = crop[:, ::-1] if random.random() < 0.5 else crop
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_collages(images: Tensor, count: int, random: torch.Generator, fragments: int = 8) -> Tensor:
    """Return images made of fragments of others.

    A collage starts as one image. Up to `fragments` blobs are laid over it, each cut from another image, with random
    contrast and tint. A blob is an ellipse whose radius varies with the angle by a few random harmonics.

    Args:
        images: (n, 3, h, w) float32 in [-1, 1].
        count: number of collages.
        random: source of random numbers.
        fragments: blobs in a collage, at most.

    Returns:
        (count, 3, h, w) float32 in [-1, 1].

    Example:
        >>> make_collages(torch.zeros(2, 3, 24, 32), 5, torch.Generator()).shape
        torch.Size([5, 3, 24, 32])
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=random)

    n, _, h, w = images.shape
    canvas = images[torch.randint(n, (count,), generator=random)]
    rows, columns = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
    present = torch.randint(1, fragments + 1, (count,), generator=random)
    orders = torch.arange(2, 7).view(1, -1, 1, 1)
    for index in range(fragments):
        y, x = uniform(0.05, 0.95, count, 1, 1), uniform(0.05, 0.95, count, 1, 1)
        angle = uniform(0, math.pi, count, 1, 1)
        radius = torch.exp(uniform(math.log(0.06), math.log(0.4), count, 1, 1))
        elongation = torch.exp(uniform(-0.6, 0.6, count, 1, 1))
        across = ((columns - x) * angle.cos() + (rows - y) * angle.sin()) * elongation
        along = ((rows - y) * angle.cos() - (columns - x) * angle.sin()) / elongation
        phase = uniform(0, 2 * math.pi, count, orders.numel(), 1, 1)
        height = torch.randn((count, orders.numel(), 1, 1), generator=random) * 0.35 / orders
        bend = (height * torch.cos(orders * torch.atan2(along, across)[:, None] + phase)).sum(1)
        alpha = torch.sigmoid((radius * (1 + bend) - torch.hypot(across, along)) * 2 * h)  # about one pixel soft
        alpha = (alpha * (index < present)[:, None, None])[:, None]
        texture = images[torch.randint(n, (count,), generator=random)]
        mean = texture.mean((2, 3), keepdim=True)
        contrast = uniform(0, 1.3, count, 1, 1, 1).clamp(max=1)
        tint = 0.15 * torch.randn((count, 3, 1, 1), generator=random)
        canvas = torch.lerp(canvas, mean + contrast * (texture - mean) + tint, alpha)
    return canvas.clamp(-1, 1)


class Batches(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """The batches of a run by their step: images, noise and timesteps depend on the seed and the step alone.

    Args:
        config: of the run.
        photos: (n, side, side, 3) uint8.
        steps: number of timesteps.
        scenes: drawn scenes to train on; may be empty.
    """

    def __init__(self, config: PretrainConfig, photos: np.ndarray, steps: int, scenes: Sequence[SceneFile] = ()):
        self.config, self.photos, self.steps = config, photos, steps
        self.scenes = ScenePictures(scenes)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        size, count = config.get_batch(step)
        random = np.random.default_rng([config.seed, step])
        generator = torch.Generator().manual_seed(int(random.integers(2**62)))
        images = make_crops(self.photos, count, size, random)
        scenes = round(config.scenes_share * count) if len(self.scenes) else 0
        collages = min(round(config.collages * count), count - scenes)
        parts = [images[: count - collages - scenes], make_collages(images, collages, generator)]
        if scenes:
            parts.append(make_crops(self.scenes, scenes, size, random))
        images = torch.cat(parts)
        timesteps = (self.steps * torch.rand(count, generator=generator) ** config.timestep_power).long()
        return images, torch.randn(images.shape, generator=generator), timesteps


class Pretraining:
    """A run: the weights, their moving average, the optimizer and the progress.

    Args:
        config: of the run.
        process: this process.
    """

    def __init__(self, config: PretrainConfig, process: Process):
        self.config, self.process = config, process
        self.scenes = [] if config.scenes is None else list_scenes(config.scenes)
        if config.scenes is not None and len(self.scenes) <= MEASURED:
            raise ValueError(f"pretrain: scenes must be more than {MEASURED}, got {len(self.scenes)}")
        torch.manual_seed(config.seed)
        self.model = Mini(config.architecture)
        if config.init_from is not None:
            initialize_from(self.model, config.init_from)
        self.model.to(process.device)
        self.network = torch.compile(self.model, dynamic=False) if config.compile else self.model
        self.average = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), config.rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.step = self.images_done = 0
        self.seconds = 0.0
        self.recent: list[Tensor | float] = []  # losses since the last entry of `losses`
        self.losses: list[tuple[int, float]] = []  # (images done, mean loss of the 60 steps before)
        self.schedule = VariancePreserving()
        self.state = State(
            config.output / "state.safetensors",
            dict(self.model.named_parameters()),
            self.optimizer,
            config.describe_run(),
            "pretrain",
            {f"average.{name}": value for name, value in self.average.items()},
        )

    def save(self) -> None:
        """Write the state from which a later run resumes."""
        if self.process.index == 0:
            self.recent = [float(loss) for loss in self.recent]
            self.state.save({name: getattr(self, name) for name in PROGRESS})

    def export(self, folder: Path) -> None:
        """Write the averaged weights in half precision, as `Tracer.from_pretrained` reads them, with a model card."""
        if self.process.index:
            return
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.half().contiguous().cpu() for name, value in self.average.items()}
        description = {
            "family": "mini",
            "architecture": self.config.architecture.to_dict(),
            "images": self.images_done,
            "tracing": {"size": [self.config.large_size] * 2},
        }
        content = (json.dumps(description, indent=2) + "\n").encode()
        write_files(folder, {WEIGHTS: save(weights), "config.json": content}, "pretrain")
        lines = []
        if measured := self.scenes[:MEASURED]:
            inside, chance = measure_inside(Tracer.from_pretrained(folder, device=self.process.device), measured)
            lines.append(
                f"Attention of a token of an object that stays inside the object, at timestep 0, in {len(measured)} "
                f"scenes that were not trained on: {inside:.3f}; by chance {chance:.3f}"
            )
            LOGGER.info("%d images: %.3f of attention inside objects, chance %.3f", self.images_done, inside, chance)
        write_files(folder, {"README.md": self.write_card(lines).encode()}, "pretrain")

    def write_card(self, measured: Sequence[str]) -> str:
        """Return the model card, with facts that were measured."""
        config, count = self.config, sum(parameter.numel() for parameter in self.model.parameters())
        loss = f"{self.losses[-1][1]:.4f}" if self.losses else "not logged"
        scenes = f", {config.scenes_share:.0%} drawn scenes" if self.scenes else ""
        facts = [
            f"Parameters: {count:,} ({config.architecture})",
            f"Data: photos of {config.photos.name!r}, license {config.license}, without annotations; "
            f"{config.collages:.0%} of every batch are collages of their fragments{scenes}",
            *([f"Initial weights: those in {config.init_from.name!r}"] if config.init_from else []),
            f"Objective: v-prediction, mean squared error, {self.schedule}, timesteps 1000 u^{config.timestep_power:g}",
            f"Steps: {self.step:,}; images: {self.images_done:,}",
            f"Sizes: {config.size} px in batches of {config.batch}, and every {config.large_every} steps "
            f"{config.large_size} px in batches of {config.large_batch}",
            f"Mean squared error of v in the last 60 steps that were logged: {loss}",
            *measured,
            describe_machine(self.process.device, self.process.count, self.seconds),
        ]
        summary = "Made to show the first stage of TRACE without a download; it is not a good image generator."
        return format_card("mini: a small diffusion model of photos", summary, facts)

    def train_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Train one step and return the mean loss of the batch, (), without waiting for the device."""
        config, device, count = self.config, self.process.device, len(batch[0])
        # every process draws the whole batch, so that the result does not depend on their number
        images, noise, timesteps = (part[self.process.share].to(device, non_blocking=True) for part in batch)
        target = self.schedule.velocity(images, noise, timesteps)
        noisy = self.schedule.noise(images, noise, timesteps)
        rate = config.get_rate(self.step, self.images_done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with warnings.catch_warnings(), torch.autocast(device.type, torch.bfloat16):
            warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # norms stay in float32
            prediction = self.network(noisy, timesteps)
        loss = functional.mse_loss(prediction.float(), target) * (len(images) / count)
        loss.backward()
        self.process.sum_gradients(self.model.parameters())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        decay = min(config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.average[name].lerp_(parameter, 1 - decay)
        self.step += 1
        self.images_done += count
        return self.process.sum(loss.detach())

    def run(self) -> None:
        """Train to the end or to the limit of time, from the state in the output folder if there is one."""
        config = self.config
        for name, value in (self.state.resume() or {}).items():
            setattr(self, name, value)
        loader = DataLoader(
            Batches(config, load_photos(config.photos), self.schedule.steps, self.scenes[MEASURED:]),
            batch_size=None,
            sampler=itertools.count(self.step),
            num_workers=config.workers,
            pin_memory=self.process.device.type == "cuda",
            generator=torch.Generator(),
        )
        batches = iter(loader)
        begun = saved = time.monotonic()
        started, is_first = begun - self.seconds, self.process.index == 0
        limit = math.inf if config.minutes is None else 60 * config.minutes
        with Progress("pretrain", "image", config.images, initial=self.images_done, hidden=not is_first) as progress:
            while self.images_done < config.images and time.monotonic() - begun < limit:
                before = self.images_done
                self.recent.append(self.train_step(next(batches)))
                self.seconds = time.monotonic() - started
                progress.update(self.images_done - before)
                if len(self.recent) == 60:
                    self.losses.append((self.images_done, float(sum(self.recent) / 60)))
                    progress.set_postfix(loss=f"{self.losses[-1][1]:.4f}")
                    self.recent = []
                for count in EXPORTS:
                    if before < count <= self.images_done:
                        self.export(config.output / f"images-{count:08d}")
                if time.monotonic() - saved > 60 * config.save_minutes:
                    self.save()
                    saved = time.monotonic()
        self.save()
        self.export(config.output / "final")


def initialize_from(model: Mini, folder: Path) -> None:
    """Load weights; ValueError if they are damaged or belong to another architecture."""
    refusal = f"pretrain: init_from must be a folder with weights of {model.config}, got '{folder}': "
    try:
        weights = load_weights(folder / WEIGHTS)
    except ValueError as error:
        raise ValueError(f"{refusal}{error}") from error
    shapes, expected = (
        {name: tuple(tensor.shape) for name, tensor in group.items()} for group in (weights, model.state_dict())
    )
    if different := sorted(dict(shapes.items() ^ expected.items())):
        raise ValueError(f"{refusal}{different[0]} differs")
    model.load_state_dict(weights)


def pretrain(config: PretrainConfig) -> Path:
    """Train `mini` on photos; a run in the output folder is resumed.

    Several processes, started by `accelerate launch` or `torchrun`, share the batches.

    Args:
        config: see `PretrainConfig`.

    Returns:
        The folder of the weights, which `trace_fast.load` and `Tracer.from_pretrained` read.

    Raises:
        FileNotFoundError: the folder of photos does not exist.
        ValueError: photos are damaged, the output folder holds a run of another configuration, or the weights to start
            from do not fit.
        RuntimeError: the device is not present, or another run writes to the output folder.

    Example:
        >>> folder = pretrain(PretrainConfig(photos=Path("photos"), output=Path("run"), images=88_000))
        >>> edges = trace_fast.edges("photo.jpg", model=folder)
    """
    process = Process.connect(config.device, "pretrain")
    if (smallest := min(config.batch, config.large_batch)) < process.count:
        raise ValueError(f"pretrain: batch must be at least the {process.count} processes, got {smallest} in a step")
    run = Pretraining(config, process)
    with process.claim(config.output, "pretrain"):
        run.run()
    return config.output / "final"
