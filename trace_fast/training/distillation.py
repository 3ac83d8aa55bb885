"""Self-distillation: a one-step student learns from the edges that its own search found (TRACE, section 3.3).

Two phases, both resumable. First the search visits every photograph once, and what it found is kept in shards. Then
low-rank adapters on the self-attention and a small decoder learn to give these edges in one pass. No label is used.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from trace_fast.backbones.base import STEPS, Backbone, constant, load_weights
from trace_fast.backbones.schedule import RectifiedFlow
from trace_fast.decoder import DECODERS, Taps, make_decoder, resample_values
from trace_fast.detector import ADAPTER, CONFIG, DECODER, finest, listen, reading, save_student
from trace_fast.io import visualize
from trace_fast.io.files import write_atomically
from trace_fast.io.images import resize
from trace_fast.ops import checks
from trace_fast.tracer import Tracer
from trace_fast.training.data import REFUSAL, Photograph, find_damaged, list_photographs
from trace_fast.training.state import Process, State, differences, read_progress, require_same, trapezoid

__all__ = ["LABELS", "DistillConfig", "crests", "dice", "distill", "draw_labels", "pseudo_labels"]

LABELS = ("ternary", "binary", "soft", "sharp", "crisp")
CRISP = (0.42, 12.0)  # the sharp probability that crisp labels make 0.5, and how steeply they rise there
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")  # of every self-attention that is read
PREVIEW = 6  # photographs of the live picture, which are not trained on
FLOW_LEVEL = 20  # of rectified flow, where the reconstruction has no gradient at 0
STATE = "state.safetensors"
PROGRESS = ("step", "seconds", "recent", "losses")


@dataclass(frozen=True)
class DistillConfig:
    """What a distillation is made of.

    Every random number follows from `seed` and the step, so that a resumed run goes on exactly where it stopped, but
    for what the kernels of a GPU add up in any order. `epochs` may be another number then: the rate follows it.
    Photographs may be added or removed, too: the search visits only those that it has not seen.

    Attributes:
        model: the teacher and the student's base: a name, a repository of the hub, or a folder.
        images: folder of image files, or of tar files of them.
        output: folder for states and the student; a run found there is resumed.
        edges: folder for the shards of pseudo edges, which several students may share; None is `edges` in `output`.
        size: (height, width) in pixels that the student works at; None is the model's own.
        teacher_size: that the search works at; None is the student's.
        timestep: level that the search reads: "iep", an integer, or None for what the model prefers.
        noising: of the search; None for what the model prefers.
        start: folder of a student of the same model, rank and decoder to go on from, None for none: one for photographs
            of another kind, or at another size, where its values are interpolated.
        labels: "ternary" leaves out what is neither (the paper's), "binary" calls it interior, "soft" takes the
            probability 1 - exp(-ABDiv / s), "sharp" that probability drawn to the crests of the photograph's contrast,
            "crisp" that again, pushed towards 0 and 1.
        interior: share of the cells that are interior at least, the lowest, where fewer lie below mean minus deviation.
        decoder: "conv" or "pixels", see `trace_fast.decoder`.
        decoder_options: of the decoder.
        level: noise level of the student's pass; None is 0, and 20 for rectified flow.
        reconstruction: weight of the reconstruction loss; 0 turns it off.
        recolour: share of the pictures whose colours are exchanged (red, green and blue shuffled), against a taste for
            the colours of few photographs.
        rank: of the adapters.
        rate: peak learning rate of the adapters, AdamW; 0 leaves them out, and the network as it is.
        decoder_rate: of the decoder.
        warmup: steps over which the rate rises.
        decay: last share of the run over which it falls to zero.
        epochs: passes over the photographs.
        batch: photographs in a step, over all processes.
        limit: only so many photographs, drawn with `seed`; those that are skipped count.
        skip_bad: leave out photographs that are damaged or too small, and tell which; else they are refused.
        seed: of everything random.
        dtype: of the training: "float32", "bfloat16" (autocast), or None for bfloat16 on a GPU and float32 on the CPU.
            The base's weights are as `Tracer.from_pretrained` reads them, or float32; adapters and decoder are float32.
        checkpointing: recompute activations in the backward pass, which takes less memory and more time.
        device: where to train; None is the GPU where there is one.
        shard: photographs in a file of pseudo edges.
        save_minutes: time between two states to resume from.
        revision: of the model's repository.
        licence: of the photographs, for the model card.
    """

    model: str
    images: Path
    output: Path
    edges: Path | None = None
    size: tuple[int, int] | None = None
    teacher_size: tuple[int, int] | None = None
    timestep: str | int | None = None
    noising: str | None = None
    start: Path | None = None
    labels: str = "ternary"
    interior: float = 0.16
    decoder: str = "conv"
    decoder_options: dict[str, int] = field(default_factory=dict)
    level: int | None = None
    reconstruction: float = 1.0
    recolour: float = 0.0
    rank: int = 64
    rate: float = 1e-4
    decoder_rate: float = 3e-3
    warmup: int = 100
    decay: float = 0.5
    epochs: float = 10
    batch: int = 8
    limit: int | None = None
    skip_bad: bool = False
    seed: int = 0
    dtype: str | None = None
    checkpointing: bool = False
    device: str | None = None
    shard: int = 64
    save_minutes: float = 5.0
    revision: str | None = None
    licence: str = "not stated"

    def __post_init__(self) -> None:
        checks.one_of("distill", "labels", self.labels, *LABELS)
        checks.one_of("distill", "decoder", self.decoder, *DECODERS)
        checks.one_of("distill", "dtype", self.dtype, None, "float32", "bfloat16")
        for name, least in {"rank": 1, "batch": 1, "shard": 1, "warmup": 1}.items():
            checks.integer("distill", name, getattr(self, name), least)
        for name in ("reconstruction", "rate", "decoder_rate", "epochs"):
            checks.number("distill", name, getattr(self, name), 0)
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"distill: {name} must be finite, got {getattr(self, name)}")
        checks.number("distill", "save_minutes", self.save_minutes, 0)
        checks.number("distill", "interior", self.interior, 0, 1)
        checks.number("distill", "recolour", self.recolour, 0, 1)
        checks.number("distill", "decay", self.decay, 0.01, 1)
        if self.level is not None:
            checks.integer("distill", "level", self.level, 0)
            checks.number("distill", "level", self.level, 0, STEPS - 1)
        with torch.random.fork_rng(devices=[]):  # told now, not after the search
            decoder = make_decoder(self.decoder, (64, 64), **self.decoder_options)
        if self.start is not None:
            self.check_start(decoder.options())
        if self.limit is not None:
            checks.integer("distill", "limit", self.limit, PREVIEW + 1)

    def check_start(self, decoder: dict[str, Any]) -> None:
        """Refuse a student that this run cannot go on from, as far as its folder tells."""
        assert self.start is not None
        try:
            adapter = load_weights(self.start / ADAPTER)
            ranks = sorted({x.shape[0] for name, x in adapter.items() if ".lora_A." in name})
            found = {**json.loads((self.start / CONFIG).read_text())["decoder"], "rank": ranks}
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"distill: start must be the folder of a student, got '{self.start}': {error}") from error
        ranks = [self.rank] if self.rate else []
        if told := differences(found, {**decoder, "rank": ranks}):
            raise ValueError(
                f"distill: start must be a student with decoder {self.decoder} and adapters of rank {ranks}, got {told}"
            )

    def teacher(self) -> str:
        """What pseudo edges depend on beside their photograph."""
        names = ("model", "revision", "teacher_size", "size", "timestep", "noising", "seed")
        values = {name: getattr(self, name) for name in names}
        values["dtype"] = "float32" if self.dtype == "float32" else None
        values["size"] = values.pop("teacher_size") or values["size"]
        return json.dumps(values)

    def identity(self) -> str:
        """What a resumed run must share with the run before: all but where it runs, how far, and how often it saves.

        Of a student to start from, the bytes.
        """
        free = ("images", "output", "edges", "start", "epochs", "skip_bad", "device", "save_minutes", "licence")
        values = {name: value for name, value in asdict(self).items() if name not in free}
        if self.start is not None:
            files = [(self.start / name).read_bytes() for name in (DECODER, ADAPTER)]
            values["start"] = hashlib.sha256(b"".join(files)).hexdigest()
        return json.dumps(values)


def pseudo_labels(abdiv: Tensor, kind: str = "ternary", interior: float = 0.16, scale: float = 0.1) -> Tensor:
    """Pseudo edges from the divergence of each image: TRACE's ternary labels, or simpler ones.

    Above the image's mean plus one standard deviation is edge, below the mean minus one is interior, the rest is left
    out. ABDiv leans to the right, so that few cells or none may lie below: at least the lowest share `interior` is
    interior. Of a normal distribution 0.16 lie below.

    Args:
        abdiv: (B, h, w) float, nats.
        kind: "ternary"; "binary", where the rest is interior, too; or "soft", 1 - exp(-abdiv / scale). "sharp" and
            "crisp" are soft here: `draw_labels` draws them to the crests.
        interior: share of the cells, from 0 to 1.
        scale: s, in nats.

    Returns:
        (2, B, h, w) float32: the label in [0, 1], and 1 where it counts, else 0.

    Example:
        >>> label, counts = pseudo_labels(torch.rand(2, 3, 4))
    """
    abdiv = abdiv.float()
    if kind not in ("ternary", "binary"):
        label = 1 - torch.exp(-abdiv.clamp(min=0) / scale)
        return torch.stack([label, torch.ones_like(label)])
    cells = abdiv.flatten(1)
    mean, deviation = cells.mean(1)[:, None, None], cells.std(1, correction=0)[:, None, None]
    edge = (abdiv > mean + deviation).float()
    if kind == "binary":
        return torch.stack([edge, torch.ones_like(edge)])
    low = torch.maximum(mean - deviation, torch.quantile(cells, interior, dim=1)[:, None, None])
    inside = (abdiv <= low).float() * (1 - edge)
    return torch.stack([edge, edge + inside])


def draw_labels(
    abdiv: Tensor, size: Sequence[int], photographs: Tensor, kind: str, interior: float, scale: float
) -> Tensor:
    """Pseudo labels at another size; thresholds are those of the grid.

    Args:
        abdiv: (B, h, w) float, nats.
        size: (height, width).
        photographs: (B, 3, H, W) in [0, 1], to whose crests at that size sharp and crisp labels are drawn.
        kind: one of LABELS.
        interior: see `pseudo_labels`.
        scale: likewise.

    Returns:
        (2, B, 1, *size) float32: the label in [0, 1], and 1 where it counts, else 0.
    """
    label, counts = pseudo_labels(abdiv, kind, interior, scale)
    size = (size[0], size[1])

    def carry(x: Tensor) -> Tensor:
        return functional.interpolate(x, size, mode="bilinear", align_corners=False)

    if kind not in ("ternary", "binary"):
        label = carry(label[:, None])
        if kind != "soft":
            label = label * crests(resize(photographs, size)).sqrt()
        if kind == "crisp":
            middle, steepness = CRISP
            label = torch.sigmoid(steepness * (label - middle))
        return torch.stack([label, torch.ones_like(label)])
    if size == tuple(abdiv.shape[1:]):
        return torch.stack([label, counts])[:, :, None]
    stretched = carry(torch.stack([label * counts, (1 - label) * counts], 1))
    edge, inside = stretched[:, :1] > 0.5, stretched[:, 1:] > 0.5
    return torch.stack([edge.float(), (edge | inside).float()])


def crests(photograph: Tensor, radius: int = 3) -> Tensor:
    """Where the contrast of a picture peaks among its surroundings, whatever its strength: about 1 on an outline.

    The gradient's length over its average maximum, of the picture smoothed by one pixel. Attention tells what is a
    boundary in tokens of several pixels; this tells in which of the pixels it lies.

    Args:
        photograph: (B, C, H, W) float in [0, 1].
        radius: of the surroundings, in pixels.

    Returns:
        (B, 1, H, W) of the same dtype, in [0, 1]; 0 where nothing changes.

    Example:
        >>> crests(torch.rand(2, 3, 24, 32)).shape
        torch.Size([2, 1, 24, 32])
    """

    def average(x: Tensor, kernel: Tensor) -> Tensor:
        rows, columns = kernel.shape
        padded = functional.pad(x, (columns // 2, columns // 2, rows // 2, rows // 2), mode="replicate")
        return functional.conv2d(padded, kernel.expand(x.shape[1], 1, rows, columns), groups=x.shape[1])

    smooth = photograph.new_tensor([[1, 4, 6, 4, 1]]) / 16  # sigma = 1
    slope = photograph.new_tensor([[-1, 0, 1]]) / 2
    softened = average(average(photograph, smooth), smooth.T)
    steepness = (average(softened, slope) ** 2 + average(softened, slope.T) ** 2).sum(1, keepdim=True).sqrt()
    side = 2 * radius + 1
    highest = functional.max_pool2d(steepness, side, 1, radius)
    box = photograph.new_full((1, side), 1 / side)
    return (steepness / (average(average(highest, box), box.T) + 1e-3)).clamp(max=1)


def dice(found: Tensor, label: Tensor, counts: Tensor) -> Tensor:
    """Dice loss where it counts: 1 - (2 sum of products + 1) / (sum of squares of both + 1), mean over images.

    With squares (V-Net's form), a soft label is matched best by itself, not by 0 or 1.

    Args:
        found: (B, 1, h, w) probabilities.
        label: (B, 1, h, w) in [0, 1].
        counts: (B, 1, h, w), 1 or 0.

    Returns:
        A number from 0 (equal) to 1.
    """
    found, label = (x.flatten(1) * counts.flatten(1) for x in (found, label))
    return (1 - (2 * (found * label).sum(1) + 1) / ((found**2).sum(1) + (label**2).sum(1) + 1)).mean()


class Shards:
    """The pseudo edges of a list of photographs: files of up to `config.shard` each, whole or not there.

    A file tells the photographs that it is of. They are found by that, so that others may come and go.

    Args:
        config: of the run.
        photographs: all of them, in order.
    """

    def __init__(self, config: DistillConfig, photographs: Sequence[Photograph]):
        self.config, self.photographs = config, photographs
        self.folder = config.edges or config.output / "edges"

    @functools.cached_property
    def places(self) -> dict[str, tuple[Path, int]]:
        """File and row of what was there when this was asked for first. A damaged file is told, and made again.

        Raises:
            ValueError: a file is of another teacher.
        """
        places: dict[str, tuple[Path, int]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as stored:
                    metadata = stored.metadata() or {}
            except (SafetensorError, OSError) as error:
                tqdm.write(f"trace-fast: {path} is damaged and made again: {error}", file=sys.stderr)
                continue
            require_same("distill", "teacher and photographs", metadata.get("teacher"), self.config.teacher(), path)
            places |= {key: (path, row) for row, key in enumerate(json.loads(metadata["photographs"]))}
        return places

    def missing(self) -> list[Photograph]:
        """Photographs whose pseudo edges are not there.

        Raises:
            ValueError: files are there, but of other photographs alone, or of another teacher.
        """
        missing = [photograph for photograph in self.photographs if photograph.key not in self.places]
        if self.places and len(missing) == len(self.photographs):
            raise ValueError(
                "distill: output must be empty or hold a run of the same teacher and photographs, got others alone in "
                f"{str(self.folder)!r}"
            )
        return missing

    def make(self, tracer: Tracer, photographs: Sequence[Photograph], share: slice = slice(None)) -> None:
        """Search photographs that are missing; of the files of all of them, only a share is made here."""
        self.folder.mkdir(parents=True, exist_ok=True)
        taken = {path for path, _ in self.places.values()}
        paths = (self.folder / f"{number:06d}.safetensors" for number in itertools.count())
        free = (path for path in paths if path not in taken)
        starts = range(0, len(photographs), self.config.shard)
        parts = [(next(free), photographs[start : start + self.config.shard]) for start in starts][share]
        with tqdm(total=sum(len(part) for _, part in parts), desc="pseudo edges", unit="image", disable=None) as bar:
            for path, part in parts:
                strengths, levels = [], []
                for photograph in part:
                    traced = tracer(
                        photograph.read(),
                        timestep=self.config.timestep,
                        noising=self.config.noising,
                        seed=self.config.seed,
                        return_abdiv=True,
                    )
                    assert traced.abdiv is not None
                    strengths.append(traced.abdiv.half().cpu())
                    levels.append(traced.timestep.cpu())
                    bar.update()
                tensors = {"abdiv": torch.cat(strengths), "timestep": torch.cat(levels)}
                keys = json.dumps([photograph.key for photograph in part])
                with write_atomically(path, "distill") as file:
                    file.write(save(tensors, {"teacher": self.config.teacher(), "photographs": keys}))

    def read(self, indices: Sequence[int]) -> Tensor:
        """ABDiv (B, h, w) float32 of photographs by their place in the list."""
        rows = []
        for index in indices:
            path, row = self.places[self.photographs[index].key]
            rows.append(self._open(path).get_slice("abdiv")[row : row + 1])
        return torch.cat(rows).float()

    @functools.lru_cache(maxsize=256)  # noqa: B019 (one object a run)
    def _open(self, path: Path) -> Any:
        return safe_open(path, "pt")


class Distillation:
    """The state of a run: base with adapters, decoder, optimiser, progress."""

    def __init__(self, config: DistillConfig, tracer: Tracer, photographs: Sequence[Photograph], process: Process):
        self.config, self.process, self.photographs = config, process, photographs
        self.backbone, self.device = tracer.backbone, tracer.device
        assert self.backbone.schedule is not None  # of an encoder, refused before
        self.schedule = self.backbone.schedule
        self.scale = tracer.backbone.settings.edge_scale
        self.half = config.dtype == "bfloat16" or (config.dtype is None and self.device.type == "cuda")
        self.shards = Shards(config, photographs)
        self.level = config.level
        if self.level is None:
            self.level = FLOW_LEVEL if isinstance(self.schedule, RectifiedFlow) else 0
        torch.manual_seed(config.seed)
        self.decoder = make_decoder(config.decoder, finest(self.backbone), **config.decoder_options).to(self.device)
        self.adapters = inject(self.backbone.network, self.backbone.attentions(), config) if config.rate else {}
        if config.start is not None:
            self.begin_as(config.start)
        groups = [
            {"params": list(self.adapters.values()), "peak": config.rate},
            {"params": list(self.decoder.parameters()), "peak": config.decoder_rate},
        ][not self.adapters :]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
        check_student(config, self.backbone)
        if config.checkpointing:
            network: Any = self.backbone.network
            network.enable_gradient_checkpointing()
            network.train()
        self.step, self.seconds = 0, 0.0
        self.recent: list[list[float]] = []
        self.losses: list[list[float]] = []  # step, mean Dice loss and mean reconstruction loss since the last entry
        self.steps = max(1, round(config.epochs * (len(photographs) - PREVIEW) / config.batch))
        trained = self.adapters | {f"decoder.{name}": value for name, value in self.decoder.named_parameters()}
        self.state = State(config.output / STATE, trained, self.optimiser, config.identity(), "distill")

    @torch.no_grad()
    def begin_as(self, folder: Path) -> None:
        """Take over adapters and decoder of a student; ValueError where they are of another network."""
        try:
            size = json.loads((folder / CONFIG).read_text())["size"]
            weights, adapter = load_weights(folder / DECODER), load_weights(folder / ADAPTER)
            grid = finest(self.backbone, (size[0], size[1]))
            weights["values"] = resample_values(weights["values"], grid, self.decoder.grid)
            self.decoder.load_state_dict(weights)
            if {name: x.shape for name, x in adapter.items()} != {name: x.shape for name, x in self.adapters.items()}:
                raise ValueError("its adapters are of other layers")
        except (KeyError, ValueError, RuntimeError, OSError) as error:
            raise ValueError(f"distill: start must be a student of the same model, got '{folder}': {error}") from error
        for name, parameter in self.adapters.items():
            parameter.copy_(adapter[name])

    def indices(self, step: int) -> list[int]:
        """Photographs of a step, by their place in the list: one permutation of all but the first few after another."""
        count, batch = len(self.photographs) - PREVIEW, self.config.batch
        chosen = []
        for place in range(step * batch, (step + 1) * batch):
            epoch, position = divmod(place, count)
            chosen.append(PREVIEW + int(self._order(epoch)[position]))
        return chosen

    @functools.lru_cache(maxsize=2)  # noqa: B019 (one object a run)
    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.config.seed, epoch]).permutation(len(self.photographs) - PREVIEW)

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Photographs at the processing size, as the decoder sees them, and their ABDiv."""
        size, detail = self.backbone.settings.size, self.decoder.detail
        images, details = [], []
        for index in indices:
            pixels = self.photographs[index].read()
            images.append(resize(pixels, size))
            if detail:
                details.append(resize(pixels, (size[0] * detail, size[1] * detail)))
        return torch.cat(images), torch.cat(details) if details else None, self.shards.read(indices)

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """What this process sees of every step that is left, read ahead; half of the pictures are mirrored."""
        share = self.process.share

        def prepare(step: int) -> tuple[Tensor, Tensor | None, Tensor]:
            chosen, random = self.indices(step), np.random.default_rng([self.config.seed, step, 1])
            mirrored = torch.from_numpy(random.random(len(chosen)) < 0.5)[share]
            # red, green and blue, or their places after a shuffle
            orders = [random.permutation(3) if random.random() < self.config.recolour else range(3) for _ in chosen]
            channels = torch.tensor(np.array(orders))[share, :, None, None]
            images, details, abdiv = self.load(chosen[share])

            def change(x: Tensor) -> Tensor:
                x = torch.where(mirrored.view(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)
                return x.gather(1, channels.expand_as(x)) if x.ndim == 4 else x

            return change(images), None if details is None else change(details), change(abdiv)

        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(prepare, step) for step in range(self.step, min(self.step + 3, self.steps))]
            for step in range(self.step, self.steps):
                yield waiting.pop(0).result()
                if step + 3 < self.steps:
                    waiting.append(pool.submit(prepare, step + 3))

    def train_step(self, images: Tensor, details: Tensor | None, abdiv: Tensor) -> None:
        """One step of the optimiser on this process's share of a batch."""
        config, backbone, schedule = self.config, self.backbone, self.schedule
        images, abdiv = images.to(self.device), abdiv.to(self.device)
        details = None if details is None else details.to(self.device)
        share = trapezoid(self.step, self.step / self.steps, config.warmup, config.decay)
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * share
        self.optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            latent = backbone.encode(images)
        timestep = constant((self.level,), images.device).expand(len(images))
        generator = torch.Generator().manual_seed(
            int(np.random.default_rng([config.seed, self.step, 2]).integers(2**62))
        )
        # of the whole batch: the same for any number of processes
        noise = torch.randn(config.batch, *latent.shape[1:], generator=generator)[self.process.share].to(latent)
        noisy = schedule.noise(latent, noise, timestep)
        taps = Taps(self.decoder.values, reading(backbone))
        # hooks stay for the backward pass, which runs the network again under checkpointing
        with listen(backbone, taps.hear):
            with warnings.catch_warnings(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # norms stay in float32
                prediction = backbone.predict(noisy, timestep)
                found = self.decoder(taps.total(), details).float().sigmoid()
            label, counts = self.targets(abdiv, found.shape[-2:], images if details is None else details)
            edges = dice(found, label, counts)
            rebuilt = schedule.denoise(noisy, prediction.float(), timestep)
            reconstruction = functional.mse_loss(rebuilt, latent)
            loss = edges + config.reconstruction * reconstruction
            weight = len(images) / config.batch
            (loss * weight).backward()
        trained = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        self.process.sum_gradients(trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimiser.step()
        self.step += 1
        figures = self.process.sum(torch.stack([edges.detach(), reconstruction.detach()]) * weight)
        self.recent.append(figures.tolist())

    def targets(self, abdiv: Tensor, size: Sequence[int], photographs: Tensor) -> Tensor:
        """Labels and where they count, as this run's configuration says; see `draw_labels`."""
        config = self.config
        return draw_labels(abdiv, size, photographs, config.labels, config.interior, self.scale)

    @torch.no_grad()
    def preview(self) -> None:
        """The live picture: photographs that are not trained on, their pseudo edges, the student's."""
        images, details, abdiv = self.load(range(PREVIEW))
        images = images.to(self.device)
        taps = Taps(self.decoder.values, reading(self.backbone))
        timestep = constant((self.level,), images.device).expand(len(images))
        with listen(self.backbone, taps.hear):
            self.backbone.predict(self.backbone.encode(images), timestep)
        found = self.decoder(taps.total(), None if details is None else details.to(self.device)).float().sigmoid()
        size, rows = self.backbone.settings.size, []
        label, counts = self.targets(abdiv, found.shape[-2:], images.cpu() if details is None else details)
        label, counts = (functional.interpolate(x, size) for x in (label, counts))
        found = resize(found, size).clamp(0, 1).cpu()
        soft = 1 - torch.exp(-resize(abdiv[:, None], size).clamp(min=0) / self.scale)
        for index, photograph in enumerate(images.cpu()):
            # left out is grey
            target = torch.where(counts[index, 0] > 0, label[index, 0], torch.tensor(0.5))
            columns = [photograph, soft[index, 0], target, found[index, 0]]
            titles = ["photograph", "ABDiv", "pseudo edges", "student"] if index == 0 else [""] * 4
            rows.append(visualize.panel(columns, titles, height=192))
        from PIL import Image

        sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
        for row, top in zip(rows, itertools.accumulate((row.height for row in rows), initial=0), strict=False):
            sheet.paste(row, (0, top))
        visualize.write_picture(self.config.output / "preview.png", sheet)

    def save(self) -> None:
        """Write what a later run resumes from, and the live picture."""
        if self.process.index == 0:
            self.state.save({name: getattr(self, name) for name in PROGRESS})
            self.preview()

    def export(self) -> Path:
        """Write the student, with a model card; see `Detector.from_pretrained`."""
        config, folder = self.config, self.config.output / "student"
        place = Path(config.model)
        description = {
            "base": {"model": str(place.resolve()) if place.is_dir() else config.model, "revision": config.revision},
            "size": list(self.backbone.settings.size),
            "level": self.level,
            "decoder": self.decoder.options(),
            "scale": 1.0,  # of the adapter's products: alpha is the rank
        }
        adapter = {name: value.detach() for name, value in self.adapters.items()}
        empty_prompt = getattr(self.backbone, "empty_prompt", None)
        save_student(folder, description, self.decoder, adapter, empty_prompt, self.card())
        return folder

    def card(self) -> str:
        """What the student is, in Markdown."""
        config, size = self.config, "x".join(map(str, self.backbone.settings.size))
        count = sum(value.numel() for value in self.decoder.parameters())
        low = sum(value.numel() for value in self.adapters.values())
        losses = f"{self.losses[-1][1]:.4f} and {self.losses[-1][2]:.4f}" if self.losses else "not logged"
        return "\n".join(
            [
                f"# A one-step student of {config.model}",
                "",
                "Instance edges in one pass, distilled from those that the model's own attention gives. No labels.",
                "",
                f"- Decoder: {config.decoder}, {count:,} parameters; adapters of rank {config.rank}, "
                f"{low:,} parameters",
                f"- Works at {size} pixels and level {self.level}",
                f"- Teacher: ABDiv at {config.teacher_size or self.backbone.settings.size} pixels, timestep "
                f"{'as the model prefers' if config.timestep is None else config.timestep}; {config.labels} labels",
                f"- Data: {len(self.photographs) - PREVIEW:,} photographs of {config.images.name!r}, licence "
                f"{config.licence}",
                *([f"- Set out from the student in {config.start.name!r}"] if config.start else []),
                f"- Training: {self.step:,} steps of {config.batch}, AdamW, rates {config.rate:g} (adapters) and "
                f"{config.decoder_rate:g} (decoder), reconstruction weight {config.reconstruction:g}, "
                f"seed {config.seed}",
                f"- Dice and reconstruction loss of the last steps logged: {losses}",
                f"- Machine: {platform.processor() or platform.machine()}, {self.device}, "
                f"{torch.get_num_threads()} thread(s), {self.seconds / 3600:.2f} hours; torch {torch.__version__}",
                "",
            ]
        )

    def run(self) -> Path:
        """Train to the end, from the state in the output folder if there is one; returns the student's folder."""
        config = self.config
        for name, value in (self.state.resume() or {}).items():
            setattr(self, name, value)
        started, saved = time.monotonic() - self.seconds, time.monotonic()
        hidden = None if self.process.index == 0 else True
        with tqdm(total=self.steps, initial=self.step, unit="step", desc="distill", disable=hidden) as bar:
            for batch in self.batches():
                self.train_step(*batch)
                self.seconds = time.monotonic() - started
                bar.update()
                if len(self.recent) == 50:
                    means = np.mean(self.recent, 0).tolist()
                    self.losses.append([self.step, *means])
                    self.recent = []
                    bar.set_postfix(dice=f"{means[0]:.3f}", reconstruction=f"{means[1]:.4f}")
                if time.monotonic() - saved > 60 * config.save_minutes:
                    self.save()
                    saved = time.monotonic()
        self.save()
        return self.export()


def inject(network: nn.Module, attentions: Sequence[nn.Module], config: DistillConfig) -> dict[str, nn.Parameter]:
    """Put adapters on the projections of self-attention modules; their parameters by name, float32.

    Products start at zero, so that the network is unchanged at first.
    """
    from peft import LoraConfig, inject_adapter_in_model

    chosen = {id(module) for module in attentions}
    targets = [
        f"{place}.{projection}"
        for place, module in network.named_modules()
        if id(module) in chosen
        for projection in PROJECTIONS
        if projection.split(".")[0] in dict(module.named_children())
    ]
    network.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=targets), network)
    found = {}
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            found[name.replace(".default", "")] = parameter
    return found


def check_student(config: DistillConfig, backbone: Backbone) -> None:
    """Refuse what the network does not allow a student, before the hours of the search."""
    if config.size is not None:
        backbone.grids(config.size)
    if config.checkpointing and not hasattr(backbone.network, "enable_gradient_checkpointing"):
        raise ValueError(f"distill: checkpointing must be of a network of diffusers, got {config.model!r}")


def in_order(photographs: Sequence[Photograph], seed: int) -> list[Photograph]:
    """Shuffled with a seed, so that adding or removing one moves no other: by a hash of each one's name."""

    def place(photograph: Photograph) -> bytes:
        return hashlib.sha256(f"{seed} {photograph.name}".encode(errors="surrogateescape")).digest()

    return sorted(photographs, key=place)


def check_count(photographs: Sequence[Photograph]) -> None:
    """Refuse too few photographs."""
    if len(photographs) <= PREVIEW:
        raise ValueError(f"distill: images must be more than {PREVIEW} photographs, got {len(photographs)}")


def find_bad(photographs: Sequence[Photograph], config: DistillConfig, process: Process) -> dict[Photograph, str]:
    """Those that cannot be read, of which each process reads its share: refused, or told once and to be left out."""
    found = process.gather(find_damaged(photographs[process.share], quiet=process.index > 0))
    bad = {photograph: told for each in found for photograph, told in each.items()}
    lines = "\n  ".join(["", *sorted(bad.values())])
    if bad and not config.skip_bad:
        raise ValueError(f"{REFUSAL}{len(bad)} damaged or too small; --skip-bad goes on without:{lines}")
    if bad and process.index == 0:
        tqdm.write(
            f"trace-fast: photographs that cannot be read are left out, {len(bad)} of them:{lines}", file=sys.stderr
        )
    return bad


def distill(config: DistillConfig) -> Path:
    """Distil a student; resume a run found in `config.output`. Returns the student's folder.

    Started by `accelerate launch` or `torchrun`, several processes share shards and batches.

    Raises:
        FileNotFoundError, ValueError: photographs cannot be read, all of which are told; the run found is of another
            configuration; or the model cannot be distilled.
        RuntimeError: the device is not there, or the model does not fit.
    """
    photographs = in_order(list_photographs(config.images), config.seed)[: config.limit]
    check_count(photographs)
    process = Process.join(config.device, "distill")
    if config.batch < process.count:
        raise ValueError(f"distill: batch must be at least the {process.count} processes, got {config.batch}")
    dtype = torch.float32 if config.dtype == "float32" else None

    def tracer(size: tuple[int, int] | None) -> Tracer:
        found = Tracer.from_pretrained(
            config.model, size=size, device=process.device, dtype=dtype, revision=config.revision
        )
        if found.backbone.schedule is None:
            raise ValueError(f"distill: model must be a diffusion model, got the encoder {config.model!r}")
        return found

    config.output.mkdir(parents=True, exist_ok=True)
    shards = Shards(config, photographs)
    missing = shards.missing()
    read_progress(config.output / STATE, config.identity(), "distill")  # refused now, not after the search
    if missing:
        teacher = tracer(config.teacher_size or config.size)
        check_student(config, teacher.backbone)
        bad = find_bad(missing, config, process)
        photographs, missing = ([each for each in some if each not in bad] for some in (photographs, missing))
        check_count(photographs)
        shards.make(teacher, missing, process.share)
        del teacher  # the student takes its place
        process.wait()
    return Distillation(config, tracer(config.size), photographs, process).run()
