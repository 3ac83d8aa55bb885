"""Stage 2 of TRACE: the one-step student, whose attention a small decoder reads in a single pass."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack, overload

import torch
from safetensors.torch import save
from torch import Tensor, nn

from trace_fast.backbones import Backbone, fetch_student, load_backbone
from trace_fast.backbones.base import STEPS, Settings, constant, get_device, load_weights
from trace_fast.backbones.capture import StopForward, network_lock
from trace_fast.backbones.loading.sources import ADAPTER, CONFIG, DECODER, EMPTY_PROMPT
from trace_fast.decoder import (
    AttentionReadout,
    BoundaryReadout,
    Decoder,
    make_decoder,
    resample_values,
    upgrade_student,
)
from trace_fast.extras import require
from trace_fast.io.files import write_files
from trace_fast.io.images import (
    check_output_type,
    convert_edges,
    error_context,
    fit_resolution,
    read_image,
    resize,
)
from trace_fast.model import EdgeModel, require_finite
from trace_fast.ops import checks
from trace_fast.progress import LOGGER

if TYPE_CHECKING:
    import numpy as np

    from trace_fast.io.images import Picture, PictureLike

__all__ = ["Detector"]

BATCH = 8  # images of a list that share a pass, at most
PIXELS = BATCH * 512**2  # pixels of a pass, at most, as the network or its decoder sees them
MOST_SCALE = 1000  # of an adapter, whose factor is about 1


class DetectorOptions(TypedDict, total=False):
    """Keyword arguments of a call of `Detector` that do not decide what it returns."""

    detect_resolution: int | None
    image_resolution: int | None
    channel_order: str | None


class Detector(EdgeModel):
    """Instance edges in one pass: the student of `Tracer`, distilled by `trace_fast.distill` (TRACE, section 3.3).

    The network runs once, at one timestep, and only as far as the last attention that is read; no attention map is
    made. Calls do not depend on one another. Those from several threads run one after the other, unless each
    thread has its own `replicated` student.

    Args:
        backbone: the network, with its adapter merged into the weights.
        decoder: the module that reads its attention, one of `trace_fast.decoder`.
        timestep: given to the network; the image itself is not noised.
        name: of the student, for messages.
        config: what `save_pretrained` writes beside the weights: see `Detector.from_pretrained`.
        adapter: the low-rank matrices that were merged, by name.
    """

    def __init__(
        self,
        backbone: Backbone,
        decoder: Decoder,
        *,
        timestep: int = 0,
        name: str = "custom",
        config: dict[str, Any] | None = None,
        adapter: dict[str, Tensor] | None = None,
    ):
        super().__init__(backbone, name)
        self._timestep = timestep
        self.decoder = decoder.to(get_device(backbone.network)).eval().requires_grad_(False)
        use_channels_last(self.decoder)
        self.config, self.adapter = dict(config or {}), dict(adapter or {})
        self._forward: Callable[[Tensor, Tensor | None], Tensor] = StudentPass(backbone, self.decoder, timestep)

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
    ) -> Detector:
        """Load a student: "mini", a local folder, or a repository of the hub; see `trace_fast.load` for the arguments.

        The folder has config.json, decoder.safetensors and lora.safetensors, and null_text.safetensors where the
        network takes a prompt. The base model is not in it: it is loaded from where config.json says, its text encoders
        are not needed, and the adapter is merged into its weights, so that the student is as fast as its base.
        `revision` is that of the student's repository, `variant` that of the base's weight files. At a `size` other
        than the one that the student was trained at, its values are interpolated.

        Raises:
            ValueError: there is no student of that name, or its files are damaged or do not fit each other.
            RuntimeError: the device is not present, a repository is out of reach, or memory is too small.

        Example:
            >>> Detector.from_pretrained("mini", device="cpu").edges(torch.rand(1, 3, 48, 64)).shape
            torch.Size([1, 1, 48, 64])
        """
        device = checks.device("load", device)
        folder = fetch_student(model, revision=revision, local_files_only=local_files_only)
        refusal = f"load: model must be the folder of a student, got {str(folder)!r}: "
        try:
            config, weights = upgrade_student(json.loads((folder / CONFIG).read_text()), load_weights(folder / DECODER))
            base, base_revision = config["base"]["model"], config["base"].get("revision")
            if not isinstance(base, str) or not isinstance(base_revision, (str, NoneType)):
                raise TypeError(f"base must have a model and a revision that are text, got {config['base']}")
            timestep, scale, options = config["timestep"], config.get("scale", 1.0), config["decoder"]
            checks.integer(CONFIG, "timestep", timestep, 0, STEPS - 1)
            checks.number(CONFIG, "scale", scale, 0, MOST_SCALE)
            # not those of the base, whose edges are others
            thresholds = {f"{name}_threshold": value for name, value in ({} | config.get("thresholds", {})).items()}
            chosen = Settings(size=tuple(config["size"]), **thresholds)
            adapter = load_weights(folder / ADAPTER)
            empty_prompt = load_weights(folder / EMPTY_PROMPT) if (folder / EMPTY_PROMPT).is_file() else None
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"{refusal}{error}") from error

        def prepare(backbone: Backbone) -> None:
            try:
                merge_adapter(backbone.network, adapter, scale)
            except (LookupError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"{refusal}{error}") from error
            if hasattr(backbone, "vae"):
                use_channels_last(backbone.vae)

        backbone = load_backbone(
            base,
            device=device,
            dtype=dtype,
            size=chosen.size,
            offload=offload,
            revision=base_revision,
            variant=variant,
            local_files_only=local_files_only,
            empty_prompt=empty_prompt,
            prepare=prepare,
        )
        try:
            backbone.settings = replace(
                backbone.settings,
                contour_threshold=chosen.contour_threshold,
                region_threshold=chosen.region_threshold,
            )
            decoder = make_decoder(grid=backbone.finest_grid(), **options)
            decoder.load_state_dict(weights)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{refusal}{error}") from error
        detector = cls(backbone, decoder, timestep=timestep, name=str(model), config=config, adapter=adapter)
        return detector if size is None else detector.resized(size)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `from_pretrained` reads: decoder, adapter, empty prompt and configuration, not the base model.

        Args:
            folder: made where it is missing; files of the same names are replaced.

        Raises:
            ValueError: the configuration does not name the base model, as of a detector made by hand.
        """
        if "base" not in self.config:
            raise ValueError(f"save_pretrained: config must name the base model, got {self.config}")
        save_student(
            Path(folder), self.config, self.decoder, self.adapter, getattr(self.backbone, "empty_prompt", None)
        )

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Upload what `save_pretrained` writes to a model repository of the hub, made where it is missing.

        Args:
            repository: owner/name; you must be logged in (`hf auth login`).
            private: of a repository that is made.

        Returns:
            The address of the commit.

        Raises:
            ValueError: as `save_pretrained`.
        """
        import tempfile

        require("push_to_hub", "huggingface_hub")
        from huggingface_hub import HfApi

        hub = HfApi()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            hub.create_repo(repository, private=private, exist_ok=True)
            return str(hub.upload_folder(repo_id=repository, folder_path=folder))

    @property
    def timestep(self) -> int:
        """The timestep that the network is given, an integer from 0 to 999."""
        return self._timestep

    def compile(self, mode: str = "reduce-overhead") -> Self:
        """Compile the whole pass, in place, and return the detector.

        The first call of each batch size takes as long as compiling does. On a GPU "reduce-overhead" records a CUDA
        graph, and passes run in a thread of the detector, whichever thread calls. A compiled pass runs the network to
        its end, though its last part is not needed.

        Args:
            mode: see `torch.compile`.

        Raises:
            RuntimeError: the model is offloaded; such a model cannot be compiled.
        """
        if any(hasattr(module, "_hf_hook") for module in self._modules()):
            raise RuntimeError("compile: the model must not be offloaded; load it again without `offload`")
        student = CompilablePass(self.backbone, self.decoder, self.timestep)
        empty = torch.zeros(1, 3, *self.size, dtype=torch.float32, device=self.device)
        photo_size = self.decoder.photo_size(self.size, self.size)
        with torch.no_grad():  # once uncompiled: what the first pass sets up would cause a second compilation
            student(empty, resize(empty, photo_size) if photo_size else None)
        compiled: Any = torch.compile(student, mode=mode)
        self._forward = OneThread(compiled) if self.device.type == "cuda" else compiled
        return self

    @overload
    def __call__(self, image: Tensor, **options: Unpack[DetectorOptions]) -> Tensor: ...

    @overload
    def __call__(self, image: PictureLike, **options: Unpack[DetectorOptions]) -> np.ndarray: ...

    @overload
    def __call__(
        self, image: list[Tensor] | tuple[Tensor, ...], **options: Unpack[DetectorOptions]
    ) -> list[Tensor]: ...

    @overload
    def __call__(
        self, image: list[Picture] | tuple[Picture, ...], **options: Unpack[DetectorOptions]
    ) -> list[np.ndarray]: ...

    @overload
    def __call__(self, image: Any, *arguments: Any, **options: Any) -> Any: ...

    def __call__(
        self,
        image: Any,
        detect_resolution: int | None = None,
        image_resolution: int | None = None,
        output_type: str | None = None,
        *,
        channel_order: str | None = None,
    ) -> Any:
        """Return the edge probability of one image, of a batch, or of a list.

        The first four arguments are those of ControlNet's annotators; `trace_fast.ControlNetAnnotator` also has their
        defaults, and returns RGB pictures as they do.

        Args:
            image: as in `trace_fast.edges`. Images of a list share passes as far as memory allows: eight of a network
                at 512 pixels and the paper's decoder, whatever their sizes; with a decoder that sees the image at its
                own aspect ratio, eight that follow one another and have one. A batch is one pass.
            detect_resolution: shorter side in pixels that the image is resized to before the model sees it, both sides
                in multiples of 64; None leaves it as it is. The network itself runs at the detector's `size` in any
                case: see `resized`.
            image_resolution: shorter side of the result in pixels, likewise; None is that of the input, whatever
                `detect_resolution` is.
            output_type: "np", "pt" or "pil" instead of the kind that follows from the input.
            channel_order: order of the color channels of arrays and tensors, "rgb" or "bgr"; None is the detector's
                `channel_order`.

        Returns:
            Probability in [0, 1] at the input's size or at `image_resolution`, float32: as in `trace_fast.edges`.

        Raises:
            TypeError, ValueError: an argument is not what is said above.
        """
        check_output_type(output_type)
        for name, value in (("detect_resolution", detect_resolution), ("image_resolution", image_resolution)):
            if value is not None:
                checks.integer("edges", name, value, 1)
        order = self.channel_order if channel_order is None else channel_order

        def prepare(item: Any) -> Photo:
            pixels = read_image(item, order)
            size = pixels.shape[-2], pixels.shape[-1]
            input_size = size if detect_resolution is None else fit_resolution(*size, detect_resolution)
            # that of the resized image is rounded, as annotators do, so that results of several of them have one size
            output_size = size if image_resolution is None else fit_resolution(*input_size, image_resolution)
            return Photo(pixels if input_size == size else resize(pixels, input_size), output_size)

        if not (isinstance(image, (list, tuple)) and image):
            return convert_edges(self._detect([prepare(image)])[0], image, output_type)  # refuses an empty list
        edges = itertools.chain.from_iterable(map(self._detect, self._group(image, prepare)))
        return [convert_edges(one, item, output_type) for one, item in zip(edges, image, strict=True)]

    def edges(self, pixels: Tensor, *, seed: int = 0) -> Tensor:
        """Return the edge probability of a batch of images.

        The host does not wait for the device, unless the images are elsewhere.

        Args:
            pixels: (B, 3, H, W) float32 in [0, 1], RGB whatever `channel_order` is.
            seed: has no effect, since a student draws no noise; so a detector is called as a tracer is.

        Returns:
            (B, 1, H, W) float32 in [0, 1], on the device of `pixels`.

        Raises:
            RuntimeError: the network gives numbers that are not finite, and `pixels` are on the CPU.
        """
        return self.detect([pixels])[0]

    def grid_edges(self, pixels: Tensor) -> Tensor:
        """Return the edge probability of a batch of images at the size at which the decoder gives it.

        It is smaller than most photographs, and `trace_fast.io.restore_edges` enlarges it as `edges` does.

        Args:
            pixels: (B, 3, H, W) float32 in [0, 1], RGB whatever `channel_order` is.

        Returns:
            (B, 1, h, w) float32 in [0, 1], on the device of `pixels`.

        Raises:
            RuntimeError: see `edges`.

        Example:
            >>> Detector.from_pretrained("mini", device="cpu").grid_edges(torch.rand(1, 3, 900, 1200)).shape
            torch.Size([1, 1, 192, 256])
        """
        return self.detect([pixels], grid=True)[0]

    def detect(self, images: Sequence[Tensor], grid: bool = False) -> list[Tensor]:
        """Return the edge probability of images, or batches, from one pass.

        Args:
            images: (B, 3, H, W) float32 in [0, 1] each, RGB; the decoder must see all of them at one size, see
                `trace_fast.decoder.Decoder.photo_size`.
            grid: at the size at which the decoder gives it, in place of the image's.

        Returns:
            (B, 1, H, W) or (B, 1, h, w) float32 in [0, 1] each, on the device of the image.

        Raises:
            RuntimeError: see `edges`; or the decoder sees images at different sizes.
        """
        return self._detect(
            [Photo(pixels, None if grid else (pixels.shape[-2], pixels.shape[-1])) for pixels in images]
        )

    def view_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size at which the model sees an image at most; pixels of a larger one have no effect on its edges.

        Args:
            height: of the image, in pixels.
            width: likewise.

        Returns:
            (height, width) in pixels, the larger of what the network and the decoder see.

        Example:
            >>> Detector.from_pretrained("mini", device="cpu").view_size(900, 1200)
            (192, 256)
        """
        decoder_size = self.decoder.photo_size((height, width), self.size) or self.size
        return max(decoder_size[0], self.size[0]), max(decoder_size[1], self.size[1])

    def _group(self, images: Sequence[Any], prepare: Callable[[Any], Photo]) -> Iterator[list[Photo]]:
        """Prepare images, and yield those that follow one another and can share a pass."""
        group: list[Photo] = []
        for index, image in enumerate(images):
            with error_context(index):
                photo = prepare(image)
            if group:
                photo_size = self._photo_size(photo.pixels)
                most = max(1, min(BATCH, PIXELS // math.prod(photo_size or self.size)))
                if len(group) == most or photo_size != self._photo_size(group[0].pixels):
                    yield group
                    group = []
            group.append(photo)
        yield group

    @torch.no_grad()
    def _detect(self, photos: Sequence[Photo]) -> list[Tensor]:
        """Return the edges of photos from one pass; the decoder must see all of them at one size."""
        on_device = [photo.pixels.to(self.device) for photo in photos]

        def resize_all(target: tuple[int, int]) -> Tensor:
            return torch.cat([resize(pixels, target) for pixels in on_device])

        photo_size = self._photo_size(photos[0].pixels)
        with network_lock(self.backbone.network):
            logits = self._forward(resize_all(self.size), resize_all(photo_size) if photo_size else None).float()
        edges = []
        for part, photo in zip(logits.split([len(pixels) for pixels in on_device]), photos, strict=True):
            # logits, not probabilities, so that edges stay sharp where they are enlarged
            enlarged = part if photo.output_size is None else resize(part, photo.output_size)
            edges.append(require_finite(enlarged.sigmoid().to(photo.pixels.device), self.name))
        return edges

    def replicated(self) -> Self:
        """Return the same student for another thread: calls of both may run at a time. Weights are shared.

        Hooks are set on a copy of the network's modules; a pass that was compiled is not in the result.
        """
        detector = copy.copy(self)
        detector.backbone = share_weights(self.backbone)
        detector._forward = StudentPass(detector.backbone, self.decoder, self.timestep)
        return detector

    def resized(self, size: tuple[int, int]) -> Self:
        """Return the same student at another processing size, its values interpolated; weights are shared.

        Args:
            size: (height, width) in pixels, in multiples that the network allows.

        Raises:
            ValueError: the network does not allow the size.
        """
        if size == self.size:
            return self
        detector = super().resized(size)
        decoder = copy.copy(self.decoder)
        decoder._parameters = dict(self.decoder._parameters)
        decoder.grid = detector.backbone.finest_grid()
        decoder.values = nn.Parameter(resample_values(self.decoder.values, self.decoder.grid, decoder.grid))
        detector.decoder = decoder
        detector.config = {**self.config, "size": list(size)} if self.config else {}
        detector._forward = StudentPass(detector.backbone, decoder, self.timestep)
        return detector

    def _photo_size(self, pixels: Tensor) -> tuple[int, int] | None:
        """Return the size at which the decoder sees an image (B, 3, H, W), or None if it does not see it."""
        return self.decoder.photo_size((pixels.shape[-2], pixels.shape[-1]), self.size)

    def _modules(self) -> list[nn.Module]:
        compiled = [self._forward] if isinstance(self._forward, nn.Module) else []
        return [*super()._modules(), self.decoder, *compiled]


@dataclass(frozen=True)
class Photo:
    """An image, or a batch of one size, that waits for its pass.

    Attributes:
        pixels: (B, 3, H, W) float32 in [0, 1].
        output_size: (height, width) of its edges in pixels; None is that of the decoder's output.
    """

    pixels: Tensor
    output_size: tuple[int, int] | None


class StudentPass(nn.Module):
    """One pass of a student, from images to logits: network, capture of its attention, decoder.

    Args:
        backbone: the network.
        decoder: the module that reads its attention.
        timestep: given to the network.
    """

    def __init__(self, backbone: Backbone, decoder: Decoder, timestep: int):
        super().__init__()
        self.backbone, self.decoder, self.timestep = backbone, decoder, timestep

    def forward(self, images: Tensor, photo: Tensor | None) -> Tensor:
        """Return logits (B, 1, h, w) of images (B, 3, *size) and, where the decoder sees it, of the photo itself."""
        return self.decoder(self.read(images), photo)

    def read(self, images: Tensor) -> Tensor:
        """Return what the decoder reads from the attention of images (B, 3, *size): (B, N, C) float32.

        The network stops after the last attention that is read.
        """
        readout = self.decoder.open_readout(self.backbone.read_grids(), self.backbone.settings.edge_scale)
        last = len(readout.grids) - 1

        def on_attention(index: int, *inputs: Any) -> None:
            readout.on_attention(index, *inputs)
            if index == last:
                raise StopForward

        def attend(index: int, query: Tensor, key: Tensor, value: Tensor, first: int) -> Tensor | None:
            if index == last:
                image = slice(first, first + math.prod(readout.grids[index]))
                on_attention(index, query[:, :, image], key[:, :, image])
            return readout.attend(index, query, key, value, first) if isinstance(readout, BoundaryReadout) else None

        timestep = constant((self.timestep,), images.device).expand(len(images))
        with contextlib.suppress(StopForward), self.backbone.capture(on_attention, attend=attend):
            self.backbone.predict(self.backbone.encode(images), timestep)
        return readout.result()


class CompilablePass(StudentPass):
    """`StudentPass` for `torch.compile`: it runs the network to its end, and its hooks are set once.

    Setting hooks during a pass would break the graph. They are set on a copy of the network that shares all weights, so
    that the network itself stays without.
    """

    timesteps: Tensor

    def __init__(self, backbone: Backbone, decoder: Decoder, timestep: int):
        own = share_weights(backbone)
        super().__init__(own, decoder, timestep)
        device = get_device(own.network)
        self.network = own.network  # moves with the pass, as its timestep does
        self.register_buffer("timesteps", torch.tensor([timestep], device=device), persistent=False)
        self.readout: AttentionReadout | BoundaryReadout | None = None  # of the pass that runs
        own.capture(self.on_attention).attach()

    def on_attention(self, index: int, *inputs: Any) -> None:
        """Read the attention of one block."""
        if self.readout is not None:
            self.readout.on_attention(index, *inputs)

    def read(self, images: Tensor) -> Tensor:
        """Return (B, N, C) float32, as `StudentPass` does."""
        readout = self.decoder.open_readout(self.backbone.read_grids(), self.backbone.settings.edge_scale)
        self.readout = readout
        self.backbone.predict(self.backbone.encode(images), self.timesteps.expand(len(images)))
        self.readout = None
        return readout.result()


class OneThread(nn.Module):
    """A compiled pass whose calls run in one thread: torch's CUDA graphs fail in any other than that of the first call.

    Args:
        compiled: the pass; called with gradients off, on the caller's stream.
    """

    def __init__(self, compiled: nn.Module):
        super().__init__()
        self.compiled = compiled
        self._worker = ThreadPoolExecutor(1, "trace_fast")

    def forward(self, images: Tensor, photo: Tensor | None) -> Tensor:
        """Return what the pass returns, in memory that the next call does not write to."""
        stream = torch.cuda.current_stream(images.device) if images.is_cuda else None

        def run() -> Tensor:
            with torch.no_grad(), torch.cuda.stream(stream):
                return self.compiled(images, photo).clone()

        return self._worker.submit(run).result()


def share_weights(backbone: Backbone) -> Backbone:
    """Return a backbone whose network has the same weights in other modules, on which other hooks are set."""
    copied = copy.copy(backbone)
    network: Any = backbone.network
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    copied.network = copy.deepcopy(network, shared)
    return copied


def use_channels_last(module: nn.Module) -> None:
    """Store the kernels of all two-dimensional convolutions with channels last, in place: they run faster so."""
    convolutions: list[Any] = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    for convolution in convolutions:
        convolution.to(memory_format=torch.channels_last)


def merge_adapter(network: nn.Module, adapter: dict[str, Tensor], scale: float) -> None:
    """Add low-rank matrices to the weights of linear layers: W += scale * B A, in float32.

    Args:
        network: changed in place.
        adapter: "<layer>.lora_A.weight" (r, in) and "<layer>.lora_B.weight" (out, r), by the layer's name.
        scale: factor of the products.

    Raises:
        ValueError: a layer is not there, the shapes differ from it, or a weight is too large for its dtype.
    """
    layers = sorted({name.rpartition(".lora_")[0] for name in adapter})
    modules = dict(network.named_modules())
    for layer in layers:
        down, up = (adapter[f"{layer}.lora_{part}.weight"] for part in "AB")
        weight = getattr(modules.get(layer), "weight", None)
        if not isinstance(weight, Tensor) or weight.shape != (up.shape[0], down.shape[1]):
            raise ValueError(f"the adapter's layer {layer} must be linear, {up.shape[0]} x {down.shape[1]}")
        change = scale * (up.to(weight.device) @ down.to(weight.device))
        weight.data.copy_(weight.data.float() + change)
        if not weight.data.isfinite().all():
            raise ValueError(f"the adapter's layer {layer} must leave finite weights in {weight.dtype}")


def save_student(
    folder: Path,
    config: dict[str, Any],
    decoder: Decoder,
    adapter: dict[str, Tensor],
    empty_prompt: dict[str, Tensor] | None,
    card: str | None = None,
) -> None:
    """Write the files of a student, its adapter in half precision; see `Detector.from_pretrained`."""
    if Path(base := config["base"]["model"]).is_absolute():
        LOGGER.warning(
            "the student in %r needs its base model, the folder %r of this machine; to use it on another, write where "
            "the base is there, such as a repository of the hub, to base.model of %s",
            str(folder),
            base,
            CONFIG,
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = {DECODER: decoder.state_dict(), ADAPTER: {name: x.half() for name, x in adapter.items()}}
    if empty_prompt:
        files[EMPTY_PROMPT] = empty_prompt
    contents = {name: save({key: x.contiguous().cpu() for key, x in file.items()}) for name, file in files.items()}
    if card is not None:
        contents["README.md"] = card.encode()
    contents[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    write_files(folder, contents, "save_pretrained")
