"""Training of the embedded backbone `mini` from a folder of photographs, without labels."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import platform
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from trace_fast.backbones.base import load_weights
from trace_fast.backbones.mini import Mini, MiniConfig
from trace_fast.backbones.schedule import VariancePreserving
from trace_fast.io.files import write_atomically
from trace_fast.io.images import resize
from trace_fast.ops import checks
from trace_fast.training.data import list_photographs
from trace_fast.training.state import Process, State, trapezoid

__all__ = ["PretrainConfig", "collages", "crops", "load_photographs", "pretrain"]

WEIGHTS = "model.safetensors"
PROGRESS = ("step", "seen", "seconds", "recent", "losses")
MARKS = (3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000)  # images seen, for the scaling curve


@dataclass(frozen=True)
class PretrainConfig:
    """What a training run is made of.

    Every random number follows from `seed` and the step, so a resumed run goes on exactly where it stopped. `images`
    may be another number then: the rate follows it.

    Attributes:
        photographs: folder of image files, or of tar files of them.
        output: folder for the checkpoints; a run found there is resumed.
        start: folder of weights of the same architecture to go on from, None for none.
        images: number of images to see before stopping.
        sizes: side of the training images, in pixels, small and large.
        batches: images in a step of either size, over all processes.
        large_every: every so many steps, one is at the large size.
        collages: share of every batch made of fragments of several photographs.
        levels: exponent of the noise levels drawn, 1000 u^levels with u uniform: 1 for all alike, more for lower ones.
        rate: peak learning rate of AdamW.
        warmup: steps over which it rises.
        decay: last share of the run over which it falls to zero.
        ema: decay of the moving average of the weights; the average is what is kept.
        seed: of everything random.
        compile: whether the network is compiled: two minutes at first, then a quarter less for each step on a CPU.
        device: where to train.
        workers: processes that make batches ahead of the training, 0 for none; a GPU takes more than one can make.
        save_minutes: time between two states to resume from.
        minutes: time after which a call stops, to go on in another; None for no limit.
        licence: of the photographs, for the model card.
        model: architecture.
    """

    photographs: Path
    output: Path
    start: Path | None = None
    images: int = 300_000
    sizes: tuple[int, int] = (64, 128)
    batches: tuple[int, int] = (32, 8)
    large_every: int = 6
    collages: float = 0.5
    levels: float = 1.5
    rate: float = 1.5e-3
    warmup: int = 200
    decay: float = 0.25
    ema: float = 0.999
    seed: int = 0
    compile: bool = False
    device: str = "cpu"
    workers: int = 0
    save_minutes: float = 5.0
    minutes: float | None = None
    licence: str = "not stated"
    model: MiniConfig = field(default_factory=MiniConfig)

    def __post_init__(self) -> None:
        checks.number("pretrain", "collages", self.collages, 0, 1)
        checks.number("pretrain", "levels", self.levels, 1, 100)
        checks.number("pretrain", "rate", self.rate, 0, 1)
        checks.integer("pretrain", "workers", self.workers, 0)
        if self.start is not None and not (self.start / WEIGHTS).is_file():
            raise FileNotFoundError(f"pretrain: start must be a folder with {WEIGHTS}, got '{self.start}'")

    def identity(self) -> str:
        """What a resumed run must share with the run before: all but where it runs and how far.

        Of weights to start from, the bytes.
        """
        free = (
            *("photographs", "output", "start", "images", "device", "workers"),
            *("save_minutes", "minutes", "licence"),
        )
        values = {name: value for name, value in asdict(self).items() if name not in free}
        if self.start is not None:
            values["start"] = hashlib.sha256((self.start / WEIGHTS).read_bytes()).hexdigest()
        return json.dumps(values)

    def batch(self, step: int) -> tuple[int, int]:
        """(size, number of images) of a step."""
        large = step % self.large_every == self.large_every - 1
        return self.sizes[large], self.batches[large]

    def step_rate(self, step: int, seen: int) -> float:
        """Learning rate of a step."""
        return self.rate * trapezoid(step, seen / self.images, self.warmup, self.decay)


def load_photographs(folder: Path, size: int = 256) -> np.ndarray:
    """Every image of a folder of files, or tar files of them, centre-cropped to (n, size, size, 3) uint8.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no images, or one is damaged or too small; the message names it.
    """
    photographs = []
    for photograph in tqdm(list_photographs(folder), desc="reading photographs", unit="image"):
        pixels = photograph.read()
        side = min(pixels.shape[2:])
        top, left = ((length - side) // 2 for length in pixels.shape[2:])
        square = resize(pixels[:, :, top : top + side, left : left + side], (size, size))
        photographs.append((square[0] * 255).round().byte().permute(1, 2, 0).numpy())
    return np.stack(photographs)


def crops(photographs: np.ndarray, count: int, size: int, random: np.random.Generator) -> Tensor:
    """Random square crops, flipped half of the time, resized to (count, 3, size, size) float32 in [-1, 1].

    Sides are log-uniform between `size` pixels (native detail) and the whole photograph.
    """
    from PIL import Image

    full = photographs.shape[1]
    batch = np.empty((count, size, size, 3), np.uint8)
    for row in batch:
        side = math.exp(random.uniform(math.log(min(size, full)), math.log(full)))
        left, top = random.uniform(0, full - side, 2)
        photograph = Image.fromarray(photographs[random.integers(len(photographs))])
        box = (left, top, left + side, top + side)
        picture = np.asarray(photograph.resize((size, size), Image.Resampling.BILINEAR, box=box))
        row[:] = picture[:, ::-1] if random.random() < 0.5 else picture
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1


def collages(images: Tensor, count: int, random: torch.Generator, fragments: int = 8) -> Tensor:
    """Pictures made of fragments of others: (count, 3, h, w), like `images` (n, 3, h, w) in [-1, 1].

    Each starts as one image; up to `fragments` blobs are laid over it, each cut from another image, with a contrast
    and tint of its own. A blob is an ellipse whose radius is bent by a few random harmonics.
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
        turn = uniform(0, math.pi, count, 1, 1)
        radius = torch.exp(uniform(math.log(0.06), math.log(0.4), count, 1, 1))
        stretch = torch.exp(uniform(-0.6, 0.6, count, 1, 1))
        across = ((columns - x) * turn.cos() + (rows - y) * turn.sin()) * stretch
        along = ((rows - y) * turn.cos() - (columns - x) * turn.sin()) / stretch
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
    """What a step learns from, by its number: images, noise and levels follow from the seed and the step alone."""

    def __init__(self, config: PretrainConfig, photographs: np.ndarray, steps: int):
        self.config, self.photographs, self.steps = config, photographs, steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        size, count = config.batch(step)
        random = np.random.default_rng([config.seed, step])
        generator = torch.Generator().manual_seed(int(random.integers(2**62)))
        images = crops(self.photographs, count, size, random)
        made = round(config.collages * count)
        images = torch.cat([images[: count - made], collages(images, made, generator)])
        level = (self.steps * torch.rand(count, generator=generator) ** config.levels).long()
        return images, torch.randn(images.shape, generator=generator), level


class Pretraining:
    """The state of a run: weights, their moving average, optimiser, images seen."""

    def __init__(self, config: PretrainConfig, process: Process):
        self.config, self.process = config, process
        torch.manual_seed(config.seed)
        self.model = Mini(config.model)
        if config.start is not None:
            begin_as(self.model, config.start)
        self.model.to(process.device)
        self.network = torch.compile(self.model, dynamic=False) if config.compile else self.model
        self.average = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self.optimiser = torch.optim.AdamW(self.model.parameters(), config.rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.step = self.seen = 0
        self.seconds = 0.0
        self.recent: list[Tensor | float] = []  # losses since the last entry of `losses`
        self.losses: list[tuple[int, float]] = []  # (images seen, mean loss of the 60 steps before)
        self.schedule = VariancePreserving()
        self.state = State(
            config.output / "state.safetensors",
            dict(self.model.named_parameters()),
            self.optimiser,
            config.identity(),
            "pretrain",
            {f"average.{name}": value for name, value in self.average.items()},
        )

    def save(self) -> None:
        """Write what a later run resumes from."""
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
            "architecture": self.config.model.to_dict(),
            "images": self.seen,
            "tracing": {"size": [self.config.sizes[1]] * 2},
        }
        write(folder / WEIGHTS, save(weights))
        write(folder / "README.md", self.card().encode())
        write(folder / "config.json", (json.dumps(description, indent=2) + "\n").encode())

    def card(self) -> str:
        config, count = self.config, sum(p.numel() for p in self.model.parameters())
        loss = f"{self.losses[-1][1]:.4f}" if self.losses else "none yet"
        return "\n".join(
            [
                "# mini: a small diffusion model of photographs",
                "",
                "Made to show TRACE's first stage with no download; it is not an image generator of any quality.",
                "",
                f"- Parameters: {count:,} ({config.model})",
                f"- Data: photographs of {config.photographs.name!r}, licence {config.licence}, without labels; "
                f"{config.collages:.0%} of every batch collages of their fragments",
                *([f"- Set out from the weights in {config.start.name!r}"] if config.start else []),
                f"- Objective: v-prediction, mean squared error, {self.schedule}, levels 1000 u^{config.levels:g}",
                f"- Steps: {self.step:,}; images seen: {self.seen:,}",
                f"- Sizes: {config.sizes} px, in batches of {config.batches}, large every {config.large_every} steps",
                f"- Mean squared error of v in the last 60 steps logged: {loss}",
                f"- Machine: {platform.processor() or platform.machine()}, {self.process.device}, "
                f"{self.process.count} process(es) of {torch.get_num_threads()} thread(s), "
                f"{self.seconds / 3600:.2f} hours; torch {torch.__version__}",
                "",
            ]
        )

    def train_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Learn from a batch; returns its mean loss, (), for which nobody has waited yet."""
        config, device, count = self.config, self.process.device, len(batch[0])
        # every process draws the whole batch, so that their number changes nothing
        images, noise, level = (x[self.process.share].to(device, non_blocking=True) for x in batch)
        target, noisy = self.schedule.velocity(images, noise, level), self.schedule.noise(images, noise, level)
        rate = config.step_rate(self.step, self.seen)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        with warnings.catch_warnings(), torch.autocast(device.type, torch.bfloat16):
            warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # norms stay in float32
            prediction = self.network(noisy, level)
        loss = functional.mse_loss(prediction.float(), target) * (len(images) / count)
        loss.backward()
        self.process.sum_gradients(self.model.parameters())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        decay = min(config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.average[name].lerp_(parameter, 1 - decay)
        self.step += 1
        self.seen += count
        return self.process.sum(loss.detach())

    def run(self) -> None:
        config = self.config
        config.output.mkdir(parents=True, exist_ok=True)
        for name, value in (self.state.resume() or {}).items():
            setattr(self, name, value)
        loader = DataLoader(
            Batches(config, load_photographs(config.photographs), self.schedule.steps),
            batch_size=None,
            sampler=itertools.count(self.step),
            num_workers=config.workers,
            pin_memory=self.process.device.type == "cuda",
            generator=torch.Generator(),
        )
        batches = iter(loader)
        begun = saved = time.monotonic()
        started, others = begun - self.seconds, self.process.index > 0
        limit = math.inf if config.minutes is None else 60 * config.minutes
        with tqdm(total=config.images, initial=self.seen, unit="image", desc="pretrain", disable=others) as bar:
            while self.seen < config.images and time.monotonic() - begun < limit:
                before = self.seen
                self.recent.append(self.train_step(next(batches)))
                self.seconds = time.monotonic() - started
                bar.update(self.seen - before)
                if len(self.recent) == 60:
                    self.losses.append((self.seen, float(sum(self.recent) / 60)))
                    bar.set_postfix(loss=f"{self.losses[-1][1]:.4f}")
                    self.recent = []
                for mark in MARKS:
                    if before < mark <= self.seen:
                        self.export(config.output / f"images-{mark:08d}")
                if time.monotonic() - saved > 60 * config.save_minutes:
                    self.save()
                    saved = time.monotonic()
        self.save()
        self.export(config.output / "final")


def begin_as(model: Mini, folder: Path) -> None:
    """Take over weights; ValueError where they are damaged, or of another architecture."""
    refusal = f"pretrain: start must be a folder with weights of {model.config}, got '{folder}': "
    try:
        weights = load_weights(folder / WEIGHTS)
    except ValueError as error:
        raise ValueError(f"{refusal}{error}") from error
    shapes = [{name: tuple(x.shape) for name, x in each.items()} for each in (weights, model.state_dict())]
    if wrong := sorted(dict(shapes[0].items() ^ shapes[1].items())):
        raise ValueError(f"{refusal}{wrong[0]} differs")
    model.load_state_dict(weights)


def write(path: Path, content: bytes) -> None:
    """Replace a file in one step."""
    with write_atomically(path, "pretrain") as file:
        file.write(content)


def pretrain(config: PretrainConfig) -> Path:
    """Train `mini`; resume a run found in `config.output`. Returns the folder of the finished weights.

    Started by `accelerate launch` or `torchrun`, several processes share batches.

    Raises:
        FileNotFoundError, ValueError: the photographs cannot be read, the run found is of another configuration, or
            the weights to start from do not fit.
        RuntimeError: the device is not there.
    """
    process = Process.join(config.device, "pretrain")
    if (least := min(config.batches)) < process.count:
        raise ValueError(f"pretrain: batches must be at least the {process.count} processes, got {least}")
    Pretraining(config, process).run()
    return config.output / "final"
