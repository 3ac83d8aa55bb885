"""Stage 1 of TRACE: noise an image step by step, find t*, and read instance edges out of self-attention."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch.nn import functional

from trace_fast import ops
from trace_fast.attention import MeanAttention
from trace_fast.backbones import Backbone, load_backbone, wrap_encoder, wrap_pipeline
from trace_fast.backbones.base import STEPS, check_noising, check_timestep, constant
from trace_fast.backbones.capture import run_captured, unwrap_compiled
from trace_fast.io import visualize
from trace_fast.io.images import convert_edges, map_images, read_image, resize
from trace_fast.io.notebook import format_html
from trace_fast.model import EdgeModel, require_finite
from trace_fast.ops import checks
from trace_fast.ops.constants import cache_constants

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from trace_fast.io.images import ImageLike

__all__ = ["TIMESTEPS", "TraceOutput", "Tracer"]

TIMESTEPS = (0, *range(99, 1000, 100))  # stride 100 of a 1000-step schedule, and the image itself
SHOWN = 4  # images of an output that a notebook shows
MAP_BYTES = 2**30  # attention maps held at once when independent timesteps run as a batch, on a CPU


@dataclass(frozen=True)
class TraceOutput:
    """The result of `Tracer` for one image, or for a batch of one size.

    Attributes:
        edges: (B, 1, H, W) float32 in [0, 1], edge probability at the input's size.
        timestep: (B,) int64, the timestep whose attention was read: t*, or the fixed one.
        timesteps: (T,) int64, all timesteps at which the network ran, rising.
        kl: (B, T - 1) float32, nats; kl[:, k] = KL(SA(timesteps[k]) || SA(timesteps[k + 1])). None unless measured.
        abdiv: (B, h, w) float32, nats, at `timestep`; None unless asked for.
        model: name or folder of the backbone.
        noising: "inversion" or "gaussian"; "none" of an encoder.
        size: processing size in pixels, (height, width).
    """

    edges: Tensor
    timestep: Tensor
    timesteps: Tensor
    kl: Tensor | None
    abdiv: Tensor | None
    model: str
    noising: str
    size: tuple[int, int]

    def plot(self) -> Figure:
        """Plot the edges and, where they are there, ABDiv and the KL curve; this needs matplotlib.

        Returns:
            The matplotlib figure.

        Example:
            >>> figure = Tracer.from_pretrained("mini", device="cpu")("photo.jpg", return_kl=True).plot()
        """
        return visualize.plot_output(self)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: edges of the first images, ABDiv where it is there, and facts."""
        maps = {f"edges {index}": edges for index, edges in enumerate(self.edges[:SHOWN, 0])}
        if self.abdiv is not None:
            strongest = self.abdiv.amax((1, 2), keepdim=True).clamp(min=1e-9)
            maps |= {f"ABDiv {index}": values for index, values in enumerate((self.abdiv / strongest)[:SHOWN])}
        pictures = {name: convert_edges(values[None, None], name, "pil") for name, values in maps.items()}
        facts = {
            "model": self.model,
            "images": f"{len(self.edges)} of {self.edges.shape[2]} x {self.edges.shape[3]}",
            "processing size": self.size,
            "noising": self.noising,
            "timestep read": self.timestep.tolist(),
            "KL at the peak, nats": None if self.kl is None else [round(peak, 4) for peak in self.kl.amax(1).tolist()],
        }
        return format_html("TraceOutput", facts, pictures)


class TraceOptions(TypedDict, total=False):
    """Keyword arguments of a call of `Tracer`."""

    timestep: str | int | None
    timesteps: Sequence[int] | None
    noising: str | None
    seed: int
    return_kl: bool
    return_abdiv: bool
    channel_order: str | None


class Tracer(EdgeModel):
    """Instance edges from the self-attention of a diffusion model, without training (TRACE, sections 3.1 and 3.2).

    A tracer holds a backbone and nothing else: calls do not depend on one another, and calls from several threads run
    one after the other.

    Args:
        backbone: the network whose self-attention is read.
        name: recorded in the output.
    """

    def __init__(self, backbone: Backbone, *, name: str = "custom"):
        super().__init__(backbone, name)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "mini",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        size: tuple[int, int] | None = None,
        offload: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        local_files_only: bool = False,
    ) -> Tracer:
        """Load a model for the search, whether it has a student or not; see `trace_fast.load` for the arguments.

        A diffusers model is loaded by parts: network, autoencoder, scheduler. Its text encoders embed the empty prompt
        the first time and are freed; the embedding is kept in the user's cache. Of a vision-language model of
        transformers, only the files that hold the vision tower are fetched, and only the tower is read from them.

        Raises:
            ValueError: the name or `offload` is unknown, or files are damaged or do not fit each other.
            RuntimeError: the device is not present, the repository is gated or out of reach, timm is needed and not
                installed, or memory is too small.

        Example:
            >>> Tracer.from_pretrained("mini", device="cpu", size=(96, 128)).size
            (96, 128)
        """
        device = checks.device("load", device)
        hub: dict[str, Any] = {"revision": revision, "variant": variant, "local_files_only": local_files_only}
        backbone = load_backbone(model, device=device, dtype=dtype, size=size, offload=offload, **hub)
        return cls(backbone, name=str(model))

    @classmethod
    def from_pipeline(
        cls,
        pipe: Any,
        *,
        size: tuple[int, int] | None = None,
        empty_prompt: dict[str, Tensor] | None = None,
    ) -> Tracer:
        """Trace with the network of a diffusers pipeline, which stays as it is: dtype, processors, adapters, device.

        Stable Diffusion 1.5 and SDXL, PixArt-alpha, Stable Diffusion 3 and 3.5, FLUX.1, FLUX.2, Qwen-Image, Z-Image:
        what `trace_fast.backbones.registry.PIPELINE_FAMILIES` lists. The empty prompt is embedded once, here, by the
        pipeline's own text encoders, which may be freed afterwards. On a card that is too small for all parts at once,
        call `pipe.enable_model_cpu_offload()` first.

        Args:
            pipe: the pipeline, or any object with its `vae`, `scheduler` and `unet` or `transformer`.
            size: processing size in pixels, (height, width); None is the model's own.
            empty_prompt: the network's arguments for the empty prompt by name, each with a batch of 1, where the
                pipeline holds no text encoders.

        Raises:
            TypeError: the pipeline's network is of another class.
            ValueError: the network does not allow the size, or the scheduler is of another kind.

        Example:
            >>> pipe = StableDiffusionPipeline.from_pretrained(folder)  # doctest: +SKIP
            >>> edges = Tracer.from_pipeline(pipe)("photo.jpg").edges  # doctest: +SKIP
        """
        with torch.no_grad():
            backbone = wrap_pipeline(pipe, empty_prompt, size)
        return cls(backbone, name=type(pipe).__name__)

    @classmethod
    def from_encoder(
        cls,
        model: Any,
        *,
        read: str = "vision",
        size: tuple[int, int] | None = None,
        blocks: Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Tracer:
        """Trace with an encoder of transformers or timm, which stays as it is: device, dtype, attention, adapters.

        DINOv2, DINOv3, EVA02 (timm's class Eva), and the vision towers of LLaVA (CLIP's) and Qwen2.5-VL. An encoder has
        no timesteps, so ABDiv alone is read, at timestep 0 (TRACE's comparison of backbones).

        Args:
            model: the encoder, or a model that holds it, such as a whole vision-language model.
            read: "vision" for the encoder, or "language" for the language model of LLaVA or Qwen2.5-VL: the image's
                tokens pass through it behind the one token that begins a text or an image, and the map is the softmax
                over all of the image's keys. The model's causal mask is left out of it, since under the mask a token
                sees only what is above it and to its left, and opposite neighbors could not be compared. Its grid is
                the tower's, of Qwen2.5-VL in units of 2 x 2 patches.
            size: processing size in pixels, (height, width), in multiples of a patch; None is the model's own, for
                Qwen2.5-VL 64 x 64 patches. A model of timm takes others only if made with `dynamic_img_size=True`.
            blocks: indices of the layers whose maps are averaged; None for all, or where some layers of an encoder
                attend inside windows alone, for all of full attention.
            mean: mean of the pixels that the model was trained on, red, green, blue, in [0, 1] (`image_mean` of its
                image processor); None for what a model of timm knows, else for ImageNet's, or CLIP's where the tower is
                of a vision-language model.
            std: standard deviation likewise (`image_std`).

        Raises:
            TypeError: the model holds nothing of the kind.
            ValueError: the model does not allow the size or the blocks.

        Example:
            >>> model = transformers.AutoModel.from_pretrained("facebook/dinov2-base")  # doctest: +SKIP
            >>> edges = Tracer.from_encoder(model, size=(518, 700))("photo.jpg").edges  # doctest: +SKIP
        """
        backbone = wrap_encoder(model, read=read, size=size, blocks=blocks, mean=mean, std=std)
        return cls(backbone, name=type(unwrap_compiled(model)).__name__)

    @property
    def timestep(self) -> int | str:
        """The timestep that is read unless a call says otherwise: an integer, or "iep" for the peak of the KL curve."""
        return self.backbone.settings.timestep

    @overload
    def __call__(self, image: ImageLike, **options: Unpack[TraceOptions]) -> TraceOutput: ...

    @overload
    def __call__(
        self, image: list[ImageLike] | tuple[ImageLike, ...], **options: Unpack[TraceOptions]
    ) -> list[TraceOutput]: ...

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        *,
        timestep: str | int | None = None,
        timesteps: Sequence[int] | None = None,
        noising: str | None = None,
        seed: int = 0,
        return_kl: bool = False,
        return_abdiv: bool = False,
        channel_order: str | None = None,
    ) -> TraceOutput | list[TraceOutput]:
        """Trace one image, a batch of one size, or a list of images of any sizes.

        Args:
            image: path, PIL image, HW or HWC array, CHW or BCHW tensor, or a list of these (see `trace_fast.edges`).
            timestep: "iep" reads the timestep where the KL divergence between consecutive maps peaks (t*); an integer
                reads that one; None follows the backbone's settings.
            timesteps: timesteps of the search, rising, 0 (the image) to 999 (noise); default 0, 99, 199, ..., 999.
                Inversion starts from the image, so its first timestep is 0.
            noising: "inversion" or "gaussian"; None follows the backbone's settings. An encoder has one timestep, 0,
                and no noising.
            seed: seed of the Gaussian noise; the same noise serves every timestep and image.
            return_kl: measure the KL curve also where a fixed timestep is read.
            return_abdiv: keep the divergence at the token grid.
            channel_order: order of the color channels of arrays and tensors, "rgb" or "bgr"; None is the tracer's
                `channel_order`.

        Returns:
            The result for the image or the batch; a list of results for a list.

        Raises:
            TypeError, ValueError: an argument is not what is said above.
            RuntimeError: the network gives numbers that are not finite, and the image is on the CPU.
        """
        settings = self.backbone.settings
        checks.integer("trace", "seed", seed, 0)
        order = self.channel_order if channel_order is None else channel_order
        if self.backbone.schedule is None:
            check_encoder(self.name, timestep=timestep, return_kl=return_kl)
        all_timesteps, noising = self._plan(timesteps, noising)
        fixed = check_timestep(settings.timestep if timestep is None else timestep)
        if (fixed is None or return_kl) and len(all_timesteps) < 2:
            raise ValueError(f"trace: timesteps must be at least two for a KL curve, got {all_timesteps}")
        if fixed is not None:  # inversion must pass through the timesteps before it
            needed = all_timesteps if return_kl else [t for t in all_timesteps if t < fixed and noising == "inversion"]
            all_timesteps = tuple(sorted({*needed, fixed}))

        def trace(item: Any) -> TraceOutput:
            pixels = read_image(item, order)
            kl, abdiv = self.scan(pixels, timesteps=all_timesteps, noising=noising, seed=seed)
            if fixed is None:
                chosen = kl.argmax(1) + 1  # the noisier map of the pair with the largest divergence
            else:
                chosen = torch.full((len(abdiv),), all_timesteps.index(fixed), device=abdiv.device)
            shared = constant(all_timesteps, abdiv.device)
            strength = abdiv[torch.arange(len(abdiv), device=abdiv.device), chosen]  # (B, h, w)
            edges = edge_probability(strength, settings.edge_scale, pixels.shape[-2:]).to(pixels.device)
            return TraceOutput(
                edges=require_finite(edges, self.name),
                timestep=shared[chosen],
                timesteps=shared.clone(),  # the constant is shared by all searches
                kl=kl if return_kl or fixed is None else None,
                abdiv=strength if return_abdiv else None,
                model=self.name,
                noising=noising,
                size=settings.size,
            )

        return map_images(trace, image)

    def edges(self, pixels: Tensor, *, seed: int = 0) -> Tensor:
        """Return the edge probability of a batch of images, searched as the backbone's settings say.

        Args:
            pixels: (B, 3, H, W) float32 in [0, 1], RGB whatever `channel_order` is.
            seed: seed of the Gaussian noise, where the search draws any.

        Returns:
            (B, 1, H, W) float32 in [0, 1], on the device of `pixels`.

        Example:
            >>> Tracer.from_pretrained("mini", device="cpu").edges(torch.rand(1, 3, 48, 64)).shape
            torch.Size([1, 1, 48, 64])
        """
        return self(pixels, seed=seed, channel_order="rgb").edges

    @torch.no_grad()
    def scan(
        self,
        images: Tensor,
        *,
        timesteps: Sequence[int] | None = None,
        noising: str | None = None,
        seed: int = 0,
        blocks: Sequence[int] | None = None,
        batch: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the network at every timestep, and measure the KL of each step and the ABDiv of each map (Eq. 1 and 2).

        The network runs once for every timestep, Gaussian ones in batches. Blocks are added up in place, so that
        attention takes `batch + 1` maps, 4 (batch + 1) B N^2 bytes, plus one of every coarser grid: 128 MiB for an
        image and N = 4096 with inversion. The host never waits for the device, and once a call has been made, another
        like it can be captured in a CUDA graph.

        Args:
            images: (B, 3, H, W) float32 in [0, 1]; they are resized to the processing size.
            timesteps: rising, in 0 .. 999; default 0, 99, 199, ..., 999, of an encoder 0. Inversion goes through
                exactly these, from the image at 0.
            noising: "inversion" or "gaussian"; None follows the backbone's settings.
            seed: seed of the Gaussian noise.
            blocks: indices of the self-attention blocks that are averaged; None follows the settings.
            batch: Gaussian timesteps that run at once; None takes as many as half of the free memory holds maps of (the
                driver is asked, so give a number where a graph is captured). Inversion runs one by one.

        Returns:
            (kl, abdiv): (B, T - 1) and (B, T, h, w), float32, nats, on the tracer's device; (h, w) is the finest grid
            of the blocks.

        Raises:
            TypeError, ValueError: an argument is not what is said above.

        Example:
            >>> tracer = Tracer.from_pretrained("mini", device="cpu")
            >>> kl, abdiv = tracer.scan(torch.rand(2, 3, 48, 64), timesteps=(0, 99))
            >>> kl.shape, abdiv.shape
            (torch.Size([2, 1]), torch.Size([2, 2, 32, 32]))
        """
        settings, schedule = self.backbone.settings, self.backbone.schedule
        all_timesteps, noising = self._plan(timesteps, noising)
        chosen = check_blocks(settings.blocks if blocks is None else blocks, len(self.backbone.attentions()))
        grids = [self.backbone.grids(settings.size)[index] for index in chosen]
        height, width = max(grids, key=math.prod)
        count, tokens = len(images), height * width
        if noising != "gaussian":
            batch = 1
        elif batch is None:
            batch = self._map_memory() // (4 * count * tokens**2) - 1
        batch = min(len(all_timesteps), max(1, batch))

        latent = self.backbone.encode(resize(images.to(self.device), settings.size))
        shared = constant(all_timesteps, self.device)
        noise = unit_noise(int(seed), (1, *latent.shape[1:]), self.device).to(latent)
        checks.memory("trace", "images", latent, 4 * (batch + 1) * count * tokens**2)
        maps = latent.new_empty((batch, count, tokens, tokens), dtype=torch.float32)
        before = torch.empty_like(maps[0])  # the last map of the timesteps before these
        kls, strengths = [], []

        def measure(previous: Tensor, current: Tensor) -> None:
            kl, strength = ops.step_kl_abdiv(previous, current, height, width)
            kls.append(kl)
            strengths.append(strength)

        sample = latent
        for start in range(0, len(all_timesteps), batch):
            timestep = shared[start : start + batch, None].expand(-1, count).flatten()  # (T' * B,)
            if schedule is not None and noising == "gaussian":
                sample = schedule.noise(latent.repeat(len(timestep) // count, 1, 1, 1), noise, timestep)
            current = maps[: len(timestep) // count]  # (T', B, N, N)
            prediction = self._attend(current.flatten(0, 1), sample, timestep, chosen, grids)
            if start == 0:
                strengths.append(ops.abdiv(current[0], height, width))
            else:
                measure(before, current[0])
            if len(current) > 1:
                measure(current[:-1].flatten(0, 1), current[1:].flatten(0, 1))
            if start + batch < len(all_timesteps):
                if batch == 1:
                    before, maps = maps[0], before[None]
                else:
                    before.copy_(current[-1])
                if schedule is not None and noising == "inversion":
                    following = shared[start + 1].expand(count)
                    sample = schedule.invert(sample, prediction, timestep, following)
        kl = torch.cat(kls).unflatten(0, (-1, count)).T if kls else maps.new_empty((count, 0))
        abdiv = torch.cat(strengths).unflatten(0, (-1, count)).transpose(0, 1)
        return kl.contiguous(), abdiv.contiguous()

    @torch.no_grad()
    def attention(
        self, images: Tensor, *, timestep: int = 0, seed: int = 0, blocks: Sequence[int] | None = None
    ) -> Tensor:
        """Return the self-attention map of images, averaged over heads and blocks.

        Args:
            images: (B, 3, H, W) float32 in [0, 1]; they are resized to the processing size.
            timestep: 0 .. 999, to which the images are brought by Gaussian noise; at 0 they are as they are. Encoders
                have 0 alone.
            seed: seed of the noise.
            blocks: as in `scan`.

        Returns:
            (B, N, N) float32 on the tracer's device; row i is what token i attends to, and sums to 1. N is the number
            of tokens of the finest grid of the blocks.

        Raises:
            TypeError, ValueError: an argument is not what is said above.

        Example:
            >>> tracer = Tracer.from_pretrained("mini", device="cpu", size=(32, 48))
            >>> tracer.attention(torch.rand(2, 3, 48, 64)).shape
            torch.Size([2, 96, 96])
        """
        settings, schedule = self.backbone.settings, self.backbone.schedule
        self._plan((timestep,), None if schedule is None else "gaussian")
        chosen = check_blocks(settings.blocks if blocks is None else blocks, len(self.backbone.attentions()))
        grids = [self.backbone.grids(settings.size)[index] for index in chosen]
        tokens = max(map(math.prod, grids))
        sample = self.backbone.encode(resize(images.to(self.device), settings.size))
        timesteps = constant((timestep,), self.device).expand(len(images))
        if schedule is not None and timestep:
            noise = unit_noise(int(seed), (1, *sample.shape[1:]), self.device).to(sample)
            sample = schedule.noise(sample, noise, timesteps)
        checks.memory("attention", "images", sample, 4 * len(images) * tokens**2)
        total = sample.new_empty((len(images), tokens, tokens), dtype=torch.float32)
        self._attend(total, sample, timesteps, chosen, grids)
        return total

    def _attend(
        self,
        total: Tensor,
        sample: Tensor,
        timestep: Tensor,
        blocks: Sequence[int],
        grids: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Run the network once; `total` (B, N, N) becomes the mean map over heads and `blocks`, of these `grids`."""
        mean = MeanAttention(total, grids)

        def attend() -> Tensor:
            mean.clear()
            with self.backbone.capture(mean.on_attention, blocks, mean.attend):
                return self.backbone.predict(sample, timestep)

        prediction = run_captured(attend)
        mean.finish()
        return prediction

    def _plan(self, timesteps: Sequence[int] | None, noising: str | None) -> tuple[tuple[int, ...], str]:
        """Return the timesteps to run at and the way of noising, checked."""
        if self.backbone.schedule is None:
            requested = None if timesteps is None else check_timesteps(timesteps, "none")
            check_encoder(self.name, timesteps=requested, noising=noising)
            return (0,), "none"
        noising = check_noising(self.backbone.settings.noising if noising is None else noising)
        return check_timesteps(timesteps, noising), noising

    def _map_memory(self) -> int:
        """Return the bytes that attention maps may take: on a GPU half of what is free or will be, else MAP_BYTES."""
        if self.device.type != "cuda":
            return MAP_BYTES
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        offloaded = sum(p.numel() * p.element_size() for p in self.backbone.network.parameters() if p.is_cpu)
        return (torch.cuda.mem_get_info(self.device)[0] + cached - offloaded) // 2


@cache_constants(maxsize=64)
def unit_noise(seed: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return standard normal float32 numbers, the same on every device, copied there once."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float32, device="cpu").to(device)


def edge_probability(abdiv: Tensor, scale: float, size: Sequence[int]) -> Tensor:
    """Return 1 - exp(-ABDiv / scale) at `size`: (B, h, w) nats to (B, 1, *size) float32 in [0, 1]."""
    strength = functional.interpolate(abdiv[:, None], tuple(size), mode="bilinear")
    return 1 - torch.exp(-strength.clamp(min=0) / scale)  # rounding may leave a divergence just below zero


def check_timesteps(timesteps: Sequence[int] | None, noising: str) -> tuple[int, ...]:
    """Return the timesteps as integers; refuse those that do not rise or are out of range, or no 0 for inversion."""
    try:
        integers = TIMESTEPS if timesteps is None else tuple(operator.index(timestep) for timestep in timesteps)
    except TypeError:
        raise TypeError(f"trace: timesteps must be a sequence of integers, got {timesteps!r}") from None
    rising = all(low < high for low, high in itertools.pairwise(integers))
    if not integers or not rising or integers[0] < 0 or integers[-1] >= STEPS:
        raise ValueError(f"trace: timesteps must rise and be from 0 to {STEPS - 1}, got {timesteps!r}")
    if noising == "inversion" and integers[0] != 0:
        raise ValueError(f"trace: timesteps must start at 0 for inversion, got {timesteps!r}")
    return integers


def check_encoder(name: str, **options: Any) -> None:
    """Refuse options that need noise, which an encoder does not have."""
    allowed = {"timestep": 0, "timesteps": (0,), "noising": "none", "return_kl": False}
    for option, value in options.items():
        if value is not None and value != allowed[option]:
            raise ValueError(
                f"trace: {option} must be {allowed[option]} for {name}, an encoder without timesteps, got {value!r}"
            )


def check_blocks(blocks: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Return the indices of the blocks, all where None; refuse those that repeat or are out of range."""
    chosen = tuple(range(count)) if blocks is None else tuple(blocks)
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= index < count for index in chosen):
        raise ValueError(f"trace: blocks must be distinct indices from 0 to {count - 1}, got {blocks!r}")
    return chosen
