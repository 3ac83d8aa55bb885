"""Self-distillation: a one-step student learns the edges that its teacher finds (TRACE, section 3.3).

There are two phases, and both can be resumed. First the teacher searches every photo once, and its divergences are
written to files. Then low-rank adapters on the self-attention and a small decoder are trained to give these edges in
one pass. No annotation is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trace_fast.backbones.base import NOISINGS, STEPS, check_timestep, constant, default_dtype, load_weights
from trace_fast.backbones.loading.sources import ADAPTER, CONFIG, DECODER, find_repository
from trace_fast.backbones.schedule import RectifiedFlow
from trace_fast.decoder import DECODERS, FORMAT, make_decoder, resample_values, upgrade_student
from trace_fast.detector import StudentPass, save_student, use_channels_last
from trace_fast.io import visualize
from trace_fast.io.images import resize
from trace_fast.jobs.parts import ALONE, Part, parse_part
from trace_fast.progress import LOGGER, Progress
from trace_fast.tracer import Tracer
from trace_fast.training.batches import PREVIEW, Batch, Batches
from trace_fast.training.cards import describe_machine, format_card
from trace_fast.training.data import PhotoFile, list_photos, shuffle_photos
from trace_fast.training.labels import LABELS
from trace_fast.training.lora import inject
from trace_fast.training.losses import LOSSES, compute_loss
from trace_fast.training.options import check_options, document_options, option, to_json
from trace_fast.training.scenes import SceneFile, list_scenes
from trace_fast.training.search import HELPER_SCALES, check_student, list_missing, search_photos, take_photos
from trace_fast.training.shards import Shards
from trace_fast.training.standardization import fold_kernels, standardize_kernels
from trace_fast.training.state import Process, State, list_differences, read_progress, trapezoid

__all__ = ["DistillConfig", "distill"]

FLOW_TIMESTEP = 20  # of the student's pass for rectified flow
STATE = "state.safetensors"
PROGRESS = ("step", "seconds", "recent", "losses")


@document_options
@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """The configuration of a distillation.

    All random numbers depend on `seed` and the step alone, so that a resumed run continues exactly where it stopped,
    except for the order in which kernels of a GPU add numbers up. A resumed run may have another number of epochs; the
    learning rate follows it. Photos may be added or removed, too; only those that are new are searched.

    Raises:
        TypeError: the value of an option is of a wrong type.
        ValueError: the value of an option is out of range, or the student to start from does not fit.

    Example:
        >>> config = DistillConfig(images=Path("photos"), output=Path("student"), size=(96, 128), rank=16)
        >>> config.rank
        16
    """

    images: Path = option(
        help="The folder of image files to learn from, or of tar files of them. No annotations are needed.", fixed=False
    )
    scenes: Path | None = option(
        None,
        help="The folder of drawn scenes to learn from beside the photos; see `trace-fast scenes`. The edges of scenes "
        "are known exactly.",
        fixed=False,
    )
    scenes_share: float = option(
        0.5,
        help="The share of the images in a step that are scenes, where there are scenes. With 1, photos serve for the "
        "preview alone.",
        least=0,
        most=1,
    )
    output: Path = option(
        help="The folder for the state of the run and the student. A run in that folder is resumed.", fixed=False
    )
    model: str = option(
        "mini",
        help="The teacher, which is the base of the student, too: a name that `trace-fast models` lists, a repository "
        "of the hub, or a folder.",
    )
    revision: str | None = option(
        None, help="The branch, tag or commit of the model's repository. The default is its main branch."
    )
    labels_dir: Path | None = option(
        None,
        help="The folder for the divergences that the teacher finds, from which labels are computed. Several students "
        "may share it. The default is the folder `labels` in the output folder.",
        fixed=False,
    )
    size: tuple[int, int] | None = option(
        None, help="The height and width in pixels that the student works at. The default is the model's own size."
    )
    teacher_size: tuple[int, int] | None = option(
        None, help="The height and width in pixels that the teacher works at. The default is the student's size."
    )
    teacher_timestep: str | int | None = option(
        None,
        help="The timestep whose attention the teacher reads: an integer, or iep to search for it. The default is what "
        "the model prefers.",
    )
    teacher_noising: str | None = option(
        None,
        help="The way in which the teacher brings an image to a timestep. The default is what the model prefers.",
        choices=NOISINGS,
    )
    init_from: Path | None = option(
        None,
        help="The folder of a student to start from. It must be of the same model, decoder and rank, or have no "
        "adapters. If its size is another one, the values of its decoder are interpolated.",
        fixed=False,
    )
    labels: str = option(
        "ternary",
        help="The kind of the labels. Those of the paper are ternary: tokens that are neither clearly edge nor clearly "
        "interior have no label. In binary labels, they are interior. Soft labels are the probability "
        "1 - exp(-ABDiv / s). Sharpened labels are soft labels times the ridges of the image's gradient. Binarized "
        "labels are sharpened labels pushed towards 0 and 1. Combined labels are the weighted geometric mean of soft "
        "labels and of the edges of the student that `labels_student` names.",
        choices=LABELS,
    )
    labels_student: Path | None = option(
        None,
        help="The folder of a student whose edges, averaged over mirrored copies and two sizes of a photo, help to "
        "label it, so that it teaches its successor. Only combined labels use it.",
        fixed=False,
    )
    student_weight: float = option(
        0.5,
        help="The weight of that student's edges in combined labels; the search has the rest.",
        least=0,
        most=1,
    )
    interior: float = option(
        0.16,
        help="The smallest share of tokens that ternary labels call interior, those of the lowest divergence.",
        least=0,
        most=1,
    )
    decoder: str = option(
        "conv",
        help="The decoder of the student. That of the paper is conv, one convolution over the attention map; pixels is "
        "a small network that sees the image, too, and unet a larger one.",
        choices=tuple(DECODERS),
    )
    decoder_options: dict[str, float] = option(
        dict,
        help="Further options of the decoder, such as columns=8,channels=4 for pixels, or abdiv=0.35 for unet, whose "
        "edges are then weighted by ABDiv in place of a readout.",
    )
    timestep: int | None = option(
        None,
        help="The timestep of the student's pass. The default is 0, and 20 for rectified flow, where the "
        "reconstruction loss has no gradient at 0.",
        least=0,
        most=STEPS - 1,
    )
    window: int | None = option(
        None,
        help="The height and width in pixels, a multiple of 16, of a random window of the photo, as the decoder sees "
        "it, that a step trains on. The network sees the whole photo. The default is the whole photo; a decoder that "
        "sees photos at their own aspect ratio then needs photos of one shape.",
        least=32,
    )
    loss: str = option("dice", help="The loss of the edges.", choices=LOSSES)
    edge_weight: float = option(
        1.0, help="The number of times that a pixel of an edge counts in the cross-entropy.", least=0.01, most=1000
    )
    blank_attention: float = option(
        0.0,
        help="The share of steps in which the decoder sees the photo alone. The network does not run in such a step, "
        "which saves most of its time.",
        least=0,
        most=1,
    )
    reconstruction: float = option(1.0, help="The weight of the reconstruction loss. 0 turns it off.", least=0)
    channel_shuffle: float = option(
        0.0,
        help="The share of images whose red, green and blue channels are shuffled, so that the student does not rely "
        "on colors that are common in few images.",
        least=0,
        most=1,
    )
    jitter: float = option(
        0.0,
        help="The largest change of an image's contrast, as a share of it; brightness changes by half as much.",
        least=0,
        most=1,
    )
    rank: int = option(64, help="The rank of the adapters.", least=1)
    rate: float = option(
        1e-4,
        help="The peak learning rate of the adapters. 0 leaves them out, so that the network stays as it is.",
        least=0,
    )
    decoder_rate: float = option(3e-3, help="The peak learning rate of the decoder.", least=0)
    warmup: int = option(100, help="The number of steps over which the learning rates rise.", least=1)
    decay: float = option(
        0.5, help="The last share of the run, over which the learning rates fall to zero.", least=0.01, most=1
    )
    epochs: float = option(10, help="The number of passes over the photos.", least=0, fixed=False)
    batch: int = option(8, help="The number of photos in a step, over all processes.", least=1)
    limit: int | None = option(
        None,
        help="The largest number of photos to use, drawn with the seed. The default is all of them.",
        least=PREVIEW + 1,
    )
    skip_bad: bool = option(
        False,
        help="Leave out photos that are damaged or too small, and list them. Without this option, they are an error.",
        fixed=False,
    )
    seed: int = option(0, help="The seed of all random numbers.", least=0)
    dtype: str | None = option(
        None,
        help="The number format of the training. The default is bfloat16 on a GPU and float32 on the CPU. Adapters and "
        "decoder are float32 in any case.",
        choices=("float32", "bfloat16"),
    )
    checkpointing: bool = option(
        False, help="Recompute activations in the backward pass, which takes less memory and more time."
    )
    device: str | None = option(
        None,
        help="The device to train on, such as cuda:1. The default is the GPU where there is one, else the CPU.",
        fixed=False,
    )
    shard: int = option(64, help="The number of photos in a file of the labels folder.", least=1)
    part: str | None = option(
        None,
        help="Only search the photos, and only a part of them: I/N is the part I, from 0, of N parts, each of another "
        "process, on this machine or another one. When all are done, the command without this option trains.",
        fixed=False,
    )
    save_minutes: float = option(
        5.0, help="The time in minutes between two states from which a run can be resumed.", least=0, fixed=False
    )
    license: str = option("not stated", help="The license of the photos, for the model card.", fixed=False)

    def __post_init__(self) -> None:
        check_options("distill", self)
        self.get_part()
        if self.teacher_timestep is not None:
            check_timestep(self.teacher_timestep)
        if self.window is not None and self.window % 16:
            raise ValueError(f"distill: window must be a multiple of 16 pixels, got {self.window}")
        if (self.labels == "combined") != (self.labels_student is not None):
            raise ValueError(
                f"distill: labels_student must name a student for combined labels, and for them alone, got "
                f"{self.labels_student} with {self.labels} labels"
            )
        # these errors would otherwise appear after the search, which may take hours
        with torch.random.fork_rng(devices=[]):
            decoder = make_decoder(self.decoder, (64, 64), **self.decoder_options)
        if decoder.photo_size((64, 64), (64, 64)) is None and (self.window is not None or self.blank_attention):
            raise ValueError(
                f"distill: decoder must be one that sees the photo where window or blank_attention is used, got "
                f"{self.decoder}"
            )
        if self.rate and not decoder.values.shape[1]:
            raise ValueError(
                f"distill: rate must be 0 where the decoder reads ABDiv, through which adapters get no gradient, got "
                f"{self.rate:g}"
            )
        if self.init_from is not None:
            self.check_init_from(decoder.options())

    def check_init_from(self, decoder: dict[str, Any]) -> None:
        """Refuse a student that this run cannot start from, as far as its folder shows."""
        assert self.init_from is not None
        try:
            adapter = load_weights(self.init_from / ADAPTER)
            ranks = sorted({tensor.shape[0] for name, tensor in adapter.items() if ".lora_A." in name})
            options = json.loads((self.init_from / CONFIG).read_text())["decoder"]
            with torch.random.fork_rng(devices=[]):
                stored = make_decoder(grid=(64, 64), **options).options() | {"rank": ranks}
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(
                f"distill: init_from must be the folder of a student, got '{self.init_from}': {error}"
            ) from error
        # adapters that the student does not have start without an effect
        ranks = [self.rank] if self.rate and ranks else []
        # what no weights depend on: the size at which the photo is seen, and ABDiv in place of features of tokens
        free = [*["detail"] * (self.decoder == "unet"), *["columns", "abdiv"] * bool(decoder.get("abdiv"))]
        stored |= {name: decoder[name] for name in free}
        if difference := list_differences(stored, {**decoder, "rank": ranks}):
            raise ValueError(
                f"distill: init_from must be a student with decoder {self.decoder} and adapters of rank {ranks}, got "
                f"{difference}"
            )

    def get_part(self) -> Part:
        """Return the part of the photos that is searched."""
        return ALONE if self.part is None else parse_part("distill: part", self.part)

    def count_scenes(self) -> int:
        """Return the number of scenes in a step."""
        return 0 if self.scenes is None else round(self.scenes_share * self.batch)

    def describe_teacher(self) -> str:
        """Return what divergences depend on beside their photo, as JSON."""
        description = {
            "model": self.model,
            "revision": self.revision,
            "size": self.teacher_size or self.size,
            "timestep": self.teacher_timestep,
            "noising": self.teacher_noising,
            "seed": self.seed,
            "dtype": "float32" if self.dtype == "float32" else None,
        }
        return json.dumps(description)

    def describe_run(self) -> str:
        """Return what a resumed run must share with the run before, as JSON; of a student to start from, its bytes."""
        students = {name: hash_student(getattr(self, name)) for name in ("init_from", "labels_student")}
        return to_json(self, {name: digest for name, digest in students.items() if digest})

    @property
    def shards_folder(self) -> Path:
        """The folder of what the teacher, and the student that helps it, find in photos."""
        return self.labels_dir or self.output / "labels"

    def open_divergences(self, photos: Sequence[PhotoFile]) -> Shards:
        """Return the divergences of photos, (1, h, w) float16 each, in nats."""
        return Shards(self.shards_folder, self.describe_teacher(), photos)

    def open_helper(self, photos: Sequence[PhotoFile]) -> Shards | None:
        """Return the edges of the student that helps the teacher, (1, 1, h, w) uint8 each, or None without one."""
        if (digest := hash_student(self.labels_student)) is None:
            return None
        source = json.dumps({"student": digest, "scales": HELPER_SCALES})
        return Shards(self.shards_folder / f"student-{digest[:16]}", source, photos)


def hash_student(folder: Path | None) -> str | None:
    """Return a hash of the weights in the folder of a student, or None for None."""
    if folder is None:
        return None
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in (DECODER, ADAPTER))).hexdigest()


class Distillation:
    """A run: the base with adapters, the decoder, the optimizer and the progress.

    Args:
        config: of the run.
        tracer: the base, which is changed in place.
        photos: all of them, in order; the first `PREVIEW` are not trained on.
        process: this process.
        scenes: drawn scenes; may be empty.
    """

    def __init__(
        self,
        config: DistillConfig,
        tracer: Tracer,
        photos: Sequence[PhotoFile],
        process: Process,
        scenes: Sequence[SceneFile] = (),
    ):
        self.config, self.process = config, process
        self.backbone, self.device = tracer.backbone, tracer.device
        assert self.backbone.schedule is not None  # of an encoder, refused before
        self.schedule = self.backbone.schedule
        self.half = config.dtype == "bfloat16" or (
            config.dtype is None and default_dtype(self.device) is torch.bfloat16
        )
        default = FLOW_TIMESTEP if isinstance(self.schedule, RectifiedFlow) else 0
        self.timestep = default if config.timestep is None else config.timestep
        torch.manual_seed(config.seed)
        decoder = make_decoder(config.decoder, self.backbone.finest_grid(), **config.decoder_options)
        self.decoder = decoder.to(self.device)
        use_channels_last(self.decoder)
        settings = self.backbone.settings
        shards = config.open_divergences(photos), config.open_helper(photos)
        self.batches = Batches(config, photos, scenes, *shards, decoder, settings.size, settings.edge_scale)
        self.adapters = inject(self.backbone, config.rank) if config.rate else {}
        if config.init_from is not None:
            self.initialize_from(config.init_from)
        standardize_kernels(self.decoder)
        groups = [
            {"params": list(self.adapters.values()), "peak": config.rate},
            {"params": list(self.decoder.parameters()), "peak": config.decoder_rate},
        ][not self.adapters :]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        check_student(config, self.backbone)
        if config.checkpointing:
            network: Any = self.backbone.network
            network.enable_gradient_checkpointing()
            network.train()
        self.step, self.seconds = 0, 0.0
        # loss of the edges and reconstruction loss of every step since the last entry of `losses`
        self.recent: list[list[float | None]] = []
        # step, and the means of both losses since the entry before; the second is None without attention
        self.losses: list[list[float | None]] = []
        trained = self.adapters | {f"decoder.{name}": value for name, value in self.decoder.named_parameters()}
        self.state = State(config.output / STATE, trained, self.optimizer, config.describe_run(), "distill")

    @torch.no_grad()
    def initialize_from(self, folder: Path) -> None:
        """Load adapters and decoder of a student; ValueError if they belong to another network."""
        try:
            student, weights = upgrade_student(
                json.loads((folder / CONFIG).read_text()), load_weights(folder / DECODER)
            )
            adapter = load_weights(folder / ADAPTER)
            grid = self.backbone.finest_grid((student["size"][0], student["size"][1]))
            weights["values"] = resample_values(weights["values"], grid, self.decoder.grid)
            if not self.decoder.values.shape[1]:
                weights = {name: value for name, value in weights.items() if not name.startswith("tokens.")}
                weights["values"] = weights["values"][:, :0]
            self.decoder.load_state_dict(weights)
            shapes, expected = (
                {name: tensor.shape for name, tensor in group.items()} for group in (adapter, self.adapters)
            )
            if shapes and shapes != expected:
                raise ValueError("its adapters belong to other layers")
        except (KeyError, ValueError, RuntimeError, OSError) as error:
            raise ValueError(
                f"distill: init_from must be a student of the same model, got '{folder}': {error}"
            ) from error
        for name, value in adapter.items():
            self.adapters[name].copy_(value)

    def train_step(self, batch: Batch) -> None:
        """Train one step on this process's share of a batch."""
        config, batch = self.config, batch.to(self.device)
        factor = trapezoid(self.step, self.step / self.batches.steps, config.warmup, config.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        weight = len(batch.images) / config.batch
        random = np.random.default_rng([config.seed, self.step, 2])
        seed, blank = int(random.integers(2**62)), random.random() < config.blank_attention
        # the hooks stay for the backward pass, which runs the network again under checkpointing
        readout = self.decoder.open_readout(self.backbone.read_grids(), self.backbone.settings.edge_scale)
        with contextlib.nullcontext() if blank else self.backbone.capture(readout.on_attention):
            reconstruction_loss = torch.zeros((), device=self.device) if blank else self.reconstruct(batch.images, seed)
            with self.autocast():
                logits = self.decoder(None if blank else readout.result(), batch.photos, batch.windows).float()
            edge_loss = compute_loss(config.loss, logits, batch.labels, batch.weights, config.edge_weight)
            loss = edge_loss + config.reconstruction * reconstruction_loss
            (loss * weight).backward()
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.process.sum_gradients(trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        self.step += 1
        losses = self.process.sum(torch.stack([edge_loss.detach(), reconstruction_loss.detach()]) * weight).tolist()
        self.recent.append([losses[0], None if blank else losses[1]])

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute in bfloat16 where this run does."""
        with warnings.catch_warnings(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # norms stay in float32
            yield

    def reconstruct(self, images: Tensor, seed: int) -> Tensor:
        """Run the network on images at the student's timestep, and return the reconstruction loss of their latents."""
        with torch.no_grad():
            latent = self.backbone.encode(images)
        timestep = constant((self.timestep,), images.device).expand(len(images))
        # drawn for the whole batch, so that it is the same for any number of processes
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.config.batch, *latent.shape[1:], generator=generator)[self.process.share].to(latent)
        noisy = self.schedule.noise(latent, noise, timestep)
        with self.autocast():
            prediction = self.backbone.predict(noisy, timestep)
        return functional.mse_loss(self.schedule.denoise(noisy, prediction.float(), timestep), latent)

    @torch.no_grad()
    def write_preview(self) -> None:
        """Write preview.png: photos that are not trained on, their divergences and labels, and the student's edges."""
        student, batches = StudentPass(self.backbone, self.decoder, self.timestep), self.batches
        size, rows = self.backbone.settings.size, []
        for index in range(PREVIEW):
            whole = batches.load_photo(index)
            photos = None if whole.photos is None else whole.photos.to(self.device)
            logits = student(whole.images.to(self.device), photos)
            abdiv = batches.divergences.read(index).float()
            soft = 1 - torch.exp(-resize(abdiv[:, None], size).clamp(min=0) / batches.scale)
            label, weight = (functional.interpolate(maps, size) for maps in (whole.labels, whole.weights))
            target = torch.where(weight > 0, label, 0.5)  # pixels without a label are gray
            edges = resize(logits.float().sigmoid(), size).clamp(0, 1).cpu()
            titles = ["photo", "ABDiv", "labels", "student"] if index == 0 else [""] * 4
            pictures = [whole.images[0], *(maps[0, 0] for maps in (soft, target, edges))]
            rows.append(visualize.panel(pictures, titles, height=192))
        visualize.write_picture(self.config.output / "preview.png", visualize.grid(rows, 1))

    def save(self) -> None:
        """Write the state from which a later run resumes, and the preview."""
        if self.process.index == 0:
            self.state.save({name: getattr(self, name) for name in PROGRESS})
            self.write_preview()

    def export(self) -> Path:
        """Write the student with a model card, and return its folder; see `Detector.from_pretrained`."""
        config, folder = self.config, self.config.output / "student"
        base = Path(config.model)
        description = {
            "format": FORMAT,
            "base": {"model": str(base.resolve()) if base.is_dir() else config.model, "revision": config.revision},
            "size": list(self.backbone.settings.size),
            "timestep": self.timestep,
            "decoder": self.decoder.options(),
            "scale": 1.0,  # of the adapters' products: alpha is the rank
        }
        adapter = {name: value.detach() for name, value in self.adapters.items()}
        empty_prompt = getattr(self.backbone, "empty_prompt", None)
        save_student(folder, description, fold_kernels(self.decoder), adapter, empty_prompt, self.write_card())
        return folder

    def write_card(self) -> str:
        """Return the model card."""
        config, size = self.config, "x".join(map(str, self.backbone.settings.size))
        teacher_size = "x".join(map(str, config.teacher_size or self.backbone.settings.size))
        decoder_count = sum(value.numel() for value in self.decoder.parameters())
        adapter_count = sum(value.numel() for value in self.adapters.values())
        adapters = f"adapters of rank {config.rank}, {adapter_count:,} parameters" if adapter_count else "no adapters"
        facts = [
            f"Decoder: {config.decoder}, {decoder_count:,} parameters; {adapters}",
            f"Student: {size} pixels, timestep {self.timestep}",
        ]
        if photo_count := len(self.batches.photos) - PREVIEW:
            timestep = "as the model prefers" if config.teacher_timestep is None else config.teacher_timestep
            facts += [
                f"Teacher: ABDiv at {teacher_size} pixels, timestep {timestep}; {config.labels} labels",
                f"Data: {photo_count:,} photos of {config.images.name!r}, license {config.license}",
            ]
        if scenes := self.batches.scenes:
            facts.append(f"Scenes: {len(scenes):,}, {config.scenes_share:.0%} of the images of a step")
        if config.blank_attention:
            facts.append(f"Attention was left out in {config.blank_attention:.0%} of the steps")
        if config.init_from is not None:
            facts.append(f"Initial weights: the student in {config.init_from.name!r}")
        edge_loss, reconstruction_loss = self.losses[-1][1:] if self.losses else (None, None)
        facts += [
            f"Training: {self.step:,} steps of {config.batch}, AdamW, rates {config.rate:g} (adapters) and "
            f"{config.decoder_rate:g} (decoder), reconstruction weight {config.reconstruction:g}, seed {config.seed}",
            f"Loss of the last steps that were logged: edges ({config.loss}) {format_loss(edge_loss)}, reconstruction "
            f"{format_loss(reconstruction_loss)}",
            describe_machine(self.device, self.process.count, self.seconds),
        ]
        source = "distilled from the self-attention of the model" if photo_count else "learned from drawn scenes"
        summary = f"Instance edges in one pass, {source}. No annotations were used."
        repository = find_repository(config.model)
        metadata = {} if repository is None else {"base_model": repository}
        return format_card(f"A one-step student of {config.model}", summary, facts, metadata)

    def run(self) -> Path:
        """Train to the end, from the state in the output folder if there is one, and return the student's folder."""
        config = self.config
        for name, value in (self.state.resume() or {}).items():
            setattr(self, name, value)
        hidden = self.process.index > 0
        if not hidden:
            LOGGER.info(self.describe_start())
        started, saved = time.monotonic() - self.seconds, time.monotonic()
        with Progress("distill", "step", self.batches.steps, initial=self.step, hidden=hidden) as progress:
            for batch in self.batches.iterate(self.step, self.process.share):
                self.train_step(batch)
                self.seconds = time.monotonic() - started
                progress.update()
                if len(self.recent) == 50:
                    means = [average(losses) for losses in zip(*self.recent, strict=True)]
                    self.losses.append([self.step, *means])
                    self.recent = []
                    progress.set_postfix(edges=format_loss(means[0]), reconstruction=format_loss(means[1]))
                if time.monotonic() - saved > 60 * config.save_minutes:
                    self.save()
                    saved = time.monotonic()
        self.save()
        folder = self.export()
        if not hidden:
            LOGGER.info(self.describe_end(folder))
        return folder

    def describe_start(self) -> str:
        """Return what the run is about to do."""
        photos, scenes, steps = self.batches.photos, self.batches.scenes, self.batches.steps
        learned = f"{len(photos) - PREVIEW} photos" + (f" and {len(scenes)} scenes" if scenes else "")
        text = f"distill: {steps} steps of {self.config.batch} from {learned}, {PREVIEW} photos for the preview alone"
        if self.step == steps:
            return f"{text}; already finished by an earlier run"
        return f"{text}; continued at step {self.step}" if self.step else text

    def describe_end(self, folder: Path) -> str:
        """Return what the run has done, and how its student is used."""
        means = self.losses or [[self.step, *map(average, zip(*self.recent, strict=True))]]
        first, last = (format_loss(row[1]) for row in (means[0], means[-1]))
        return (
            f"distill: {self.step} steps took {self.seconds:.0f} s; loss of edges {last}, at first {first}; "
            f"loss of the reconstruction {format_loss(means[-1][2])}; to use the student: "
            f"trace-fast edges photos/ -o edges/ --model {shlex.quote(str(folder))}"
        )


def average(losses: Sequence[float | None]) -> float | None:
    """Return the mean of the losses that were measured, or None if none was."""
    measured = [loss for loss in losses if loss is not None]
    return float(np.mean(measured)) if measured else None


def format_loss(loss: float | None) -> str:
    """Return a loss in words."""
    return "not measured" if loss is None else f"{loss:.4f}"


def distill(config: DistillConfig) -> Path:
    """Distill a one-step student from photos; a run in the output folder is resumed.

    Several processes, started by `accelerate launch` or `torchrun`, share the search and the batches.

    Args:
        config: see `DistillConfig`.

    Returns:
        The folder of the student, which `trace_fast.load` and `Detector.from_pretrained` read; with `part`, the folder
        of what the search has found.

    Raises:
        FileNotFoundError: the folder of photos does not exist.
        ValueError: photos are damaged (the message lists them all) or too few, the output folder holds a run of another
            configuration, or the model cannot be distilled.
        RuntimeError: the device is not present, memory is too small for the model, or another run writes to the output
            folder.

    Example:
        >>> folder = distill(DistillConfig(images=Path("photos"), output=Path("run"), size=(96, 128)))
        >>> edges = trace_fast.edges("photo.jpg", model=folder)
    """
    photos = take_photos(config, shuffle_photos(list_photos(config.images), config.seed)[: config.limit])
    process = Process.connect(config.device, "distill")
    if config.batch < process.count:
        raise ValueError(f"distill: batch must be at least the {process.count} processes, got {config.batch}")
    dtype = torch.float32 if config.dtype == "float32" else None

    def load_tracer(size: tuple[int, int] | None) -> Tracer:
        tracer = Tracer.from_pretrained(
            config.model, size=size, device=process.device, dtype=dtype, revision=config.revision
        )
        if tracer.backbone.schedule is None:
            raise ValueError(f"distill: model must be a diffusion model, got the encoder {config.model!r}")
        return tracer

    scenes = list_scenes(config.scenes) if config.scenes is not None else []
    with process.claim(config.output, "distill", config.get_part().index):
        missing = list_missing(config, photos)
        # refused before the search, not after it
        read_progress(config.output / STATE, config.describe_run(), "distill")
        if process.index == 0:
            LOGGER.info("distill: %d photos, of which %d must be searched for labels", len(photos), len(missing[0][1]))
        damaged = search_photos(config, photos, missing, process, load_tracer)
        if config.part is not None:
            return config.shards_folder
        photos = take_photos(config, [photo for photo in photos if photo not in damaged])
        return Distillation(config, load_tracer(config.size), photos, process, scenes).run()
