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
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from trace_fast.backbones.base import STEPS, Backbone, constant, load_weights
from trace_fast.backbones.loading.sources import ADAPTER, CONFIG, DECODER
from trace_fast.backbones.schedule import RectifiedFlow
from trace_fast.decoder import DECODERS, FORMAT, AttentionReadout, make_decoder, resample_values, upgrade_student
from trace_fast.detector import save_student
from trace_fast.io import visualize
from trace_fast.io.images import resize
from trace_fast.ops import checks
from trace_fast.tracer import TraceOutput, Tracer
from trace_fast.training.data import Photograph, find_bad, in_order, list_photographs
from trace_fast.training.labels import LABELS, draw_labels
from trace_fast.training.lora import inject
from trace_fast.training.shards import Shards
from trace_fast.training.state import Process, State, differences, read_progress, trapezoid

__all__ = ["DistillConfig", "dice", "distill"]

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

    def search(self, tracer: Tracer) -> Callable[[Tensor], TraceOutput]:
        """Return the search of one photograph, as this configuration says."""
        return functools.partial(
            tracer, timestep=self.timestep, noising=self.noising, seed=self.seed, return_abdiv=True
        )

    def shards(self, photographs: Sequence[Photograph]) -> Shards:
        """The pseudo edges of photographs, where this run keeps them."""
        return Shards(self.edges or self.output / "edges", self.teacher(), photographs)

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


class Distillation:
    """The state of a run: base with adapters, decoder, optimiser, progress."""

    def __init__(self, config: DistillConfig, tracer: Tracer, photographs: Sequence[Photograph], process: Process):
        self.config, self.process, self.photographs = config, process, photographs
        self.backbone, self.device = tracer.backbone, tracer.device
        assert self.backbone.schedule is not None  # of an encoder, refused before
        self.schedule = self.backbone.schedule
        self.scale = tracer.backbone.settings.edge_scale
        self.half = config.dtype == "bfloat16" or (config.dtype is None and self.device.type == "cuda")
        self.shards = config.shards(photographs)
        self.level = config.level
        if self.level is None:
            self.level = FLOW_LEVEL if isinstance(self.schedule, RectifiedFlow) else 0
        torch.manual_seed(config.seed)
        self.decoder = make_decoder(config.decoder, self.backbone.finest_grid(), **config.decoder_options).to(
            self.device
        )
        self.adapters = inject(self.backbone, config.rank) if config.rate else {}
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
            student, weights = upgrade_student(
                json.loads((folder / CONFIG).read_text()), load_weights(folder / DECODER)
            )
            adapter = load_weights(folder / ADAPTER)
            grid = self.backbone.finest_grid((student["size"][0], student["size"][1]))
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
        taps = AttentionReadout(self.decoder.values, backbone.read_grids())
        # hooks stay for the backward pass, which runs the network again under checkpointing
        with backbone.capture(taps.on_attention):
            with warnings.catch_warnings(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # norms stay in float32
                prediction = backbone.predict(noisy, timestep)
                found = self.decoder(taps.result(), details).float().sigmoid()
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
        taps = AttentionReadout(self.decoder.values, self.backbone.read_grids())
        timestep = constant((self.level,), images.device).expand(len(images))
        with self.backbone.capture(taps.on_attention):
            self.backbone.predict(self.backbone.encode(images), timestep)
        found = self.decoder(taps.result(), None if details is None else details.to(self.device)).float().sigmoid()
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
            "format": FORMAT,
            "base": {"model": str(place.resolve()) if place.is_dir() else config.model, "revision": config.revision},
            "size": list(self.backbone.settings.size),
            "timestep": self.level,
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


def check_student(config: DistillConfig, backbone: Backbone) -> None:
    """Refuse what the network does not allow a student, before the hours of the search."""
    if config.size is not None:
        backbone.grids(config.size)
    if config.checkpointing and not hasattr(backbone.network, "enable_gradient_checkpointing"):
        raise ValueError(f"distill: checkpointing must be of a network of diffusers, got {config.model!r}")


def check_count(photographs: Sequence[Photograph]) -> None:
    """Refuse too few photographs."""
    if len(photographs) <= PREVIEW:
        raise ValueError(f"distill: images must be more than {PREVIEW} photographs, got {len(photographs)}")


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
    shards = config.shards(photographs)
    missing = shards.missing()
    read_progress(config.output / STATE, config.identity(), "distill")  # refused now, not after the search
    if missing:
        teacher = tracer(config.teacher_size or config.size)
        check_student(config, teacher.backbone)
        bad = find_bad(missing, config.skip_bad, process)
        photographs, missing = ([each for each in some if each not in bad] for some in (photographs, missing))
        check_count(photographs)
        shards.make(config.search(teacher), missing, config.shard, process.share)
        del teacher  # the student takes its place
        process.wait()
    return Distillation(config, tracer(config.size), photographs, process).run()
