"""Stage 2 of TRACE: the one-step student, whose attention a tiny decoder reads in a single pass."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from trace_fast.backbones import Backbone, fetch_student, load_backbone
from trace_fast.backbones.base import Turns, constant, device_of, load_weights
from trace_fast.backbones.loading.sources import ADAPTER, CONFIG, DECODER, EMPTY_PROMPT
from trace_fast.decoder import AttentionReadout, Decoder, make_decoder, resample_values, upgrade_student
from trace_fast.io.files import write_atomically
from trace_fast.io.images import check_output_type, convert_edges, error_context, read_image, resize
from trace_fast.ops import checks

__all__ = ["Detector"]

BATCH = 8  # images of a list that share a pass, at most
PIXELS = BATCH * 512**2  # and of how many pixels in all, as the network or its decoder sees them


class HeardError(Exception):
    """Every attention that a decoder reads has been heard: what the network would still do is not needed."""


class Detector:
    """Instance edges in one pass: the student of `Tracer`, distilled by `trace_fast.distill` (TRACE, section 3.3).

    The network runs once, at one noise level, and only as far as the last attention that is read; no attention map is
    made. Calls do not depend on one another, and calls from several threads take turns.

    Args:
        backbone: the network, with its adapter merged into the weights.
        decoder: what reads its attention, one of `trace_fast.decoder`.
        level: noise level that the network is told; the image itself is not noised.
        name: of the student, for messages.
        config: what `save_pretrained` writes beside the weights: see `Detector.from_pretrained`.
        adapter: the low-rank matrices that were merged, by name.
    """

    def __init__(
        self,
        backbone: Backbone,
        decoder: Decoder,
        *,
        level: int = 0,
        name: str = "custom",
        config: dict[str, Any] | None = None,
        adapter: dict[str, Tensor] | None = None,
    ):
        self.backbone, self.level, self.name = backbone, level, name
        self.decoder = decoder.to(device_of(backbone.network)).eval().requires_grad_(False)
        self.config, self.adapter = dict(config or {}), dict(adapter or {})
        self._lock = Turns()  # hooks sit on the network, which all threads share
        self._run: Any = self.predict

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "mini",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> Detector:
        """Read a student: "mini", a local folder, or a repository of the hub that holds one.

        The folder has config.json, decoder.safetensors and lora.safetensors, and null_text.safetensors where the
        network takes a prompt. The base model is not in it: it is loaded from where config.json says, its text encoders
        are not needed, and the adapter is merged into its weights, so that the student is as fast as its base.

        Args:
            model: name of an embedded student, folder, or repository (owner/name).
            device: where to run; default the GPU where there is one, else the CPU.
            dtype: of the base model's weights; default bfloat16 on a GPU, float32 on the CPU and for networks of this
                package.
            revision: branch, tag or commit of the repository.
            local_files_only: never ask the hub, neither for the student nor for its base.

        Raises:
            ValueError: there is no student of that name, or its files are damaged or do not fit each other.
            RuntimeError: the device is not there, a repository is out of reach, or memory is too small.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = checks.device("load", device)
        folder = fetch_student(model, revision=revision, local_files_only=local_files_only)
        try:
            config, weights = upgrade_student(json.loads((folder / CONFIG).read_text()), load_weights(folder / DECODER))
            source, revision = config["base"]["model"], config["base"].get("revision")
            level, size, options = int(config["timestep"]), tuple(config["size"]), config["decoder"]
            adapter = load_weights(folder / ADAPTER)
            empty_prompt = load_weights(folder / EMPTY_PROMPT) if (folder / EMPTY_PROMPT).is_file() else None
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"load: model must be the folder of a student, got {str(folder)!r}: {error}") from error
        backbone = load_backbone(
            source,
            device=device,
            dtype=dtype,
            size=size,
            revision=revision,
            local_files_only=local_files_only,
            empty_prompt=empty_prompt,
        )
        try:
            decoder = make_decoder(grid=finest(backbone), **options)
            decoder.load_state_dict(weights)
            merge(backbone.network, adapter, config.get("scale", 1.0))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"load: model must be the folder of a student, got {str(folder)!r}: {error}") from error
        if hasattr(backbone, "vae"):  # its convolutions are faster so
            backbone.vae.to(memory_format=torch.channels_last)
        return cls(backbone, decoder, level=level, name=str(model), config=config, adapter=adapter)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `from_pretrained` reads: decoder, adapter, empty prompt and configuration, not the base model.

        Args:
            folder: made where it is missing; files of the same names are replaced.

        Raises:
            ValueError: nothing says what the base model is, of a detector that was not read or distilled but put
                together.
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

        from huggingface_hub import HfApi

        hub = HfApi()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            hub.create_repo(repository, private=private, exist_ok=True)
            return str(hub.upload_folder(repo_id=repository, folder_path=folder))

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return device_of(self.backbone.network)

    def to(self, device: torch.device | str) -> Detector:
        """Move network, autoencoder and decoder; returns the detector."""
        if isinstance(device, torch.dtype):
            raise TypeError(f"to: device must be a torch device, got {device}; give from_pretrained a dtype")
        device = checks.device("to", device)
        for module in (self.backbone.network, getattr(self.backbone, "vae", None), self.decoder):
            if module is not None:
                module.to(device)
        return self

    def compile(self, mode: str = "reduce-overhead") -> Detector:
        """Compile the whole of a pass; returns the detector.

        The first call of each batch size takes as long as compiling does. On a GPU "reduce-overhead" records a CUDA
        graph. A compiled pass runs the network to its end, whose last part is not needed.

        Args:
            mode: of `torch.compile`.
        """
        backbone, decoder = self.backbone, self.decoder
        now: dict[str, AttentionReadout] = {}  # empty between calls, or each call would be compiled anew
        # these hooks stay, since setting hooks would break the graph; the network is the detector's own
        listen(backbone, lambda *heard: now["taps"].on_attention(*heard) if now else None).__enter__()
        timestep = constant((self.level,), self.device)

        def run(images: Tensor, photograph: Tensor | None) -> Tensor:
            taps = now["taps"] = AttentionReadout(decoder.values, reading(backbone))
            backbone.predict(backbone.encode(images), timestep.expand(len(images)))
            now.clear()
            return decoder(taps.result(), photograph)

        size, detail = backbone.settings.size, decoder.detail
        empty = torch.zeros(1, 3, *size, dtype=torch.float32, device=self.device)
        with torch.no_grad():  # once as it is: what the hooks note of the first pass would ask for a second compilation
            run(empty, resize(empty, (size[0] * detail, size[1] * detail)) if detail else None)
        self._run = torch.compile(run, mode=mode)
        return self

    def __call__(
        self,
        image: Any,
        *,
        detect_resolution: int | None = None,
        output_type: str | None = None,
    ) -> Any:
        """Edge probability of one image, of a batch, or of a list; called as ControlNet's annotators are.

        Args:
            image: as in `trace_fast.edges`; images of a list share passes, whatever their sizes, as far as memory
                allows: eight of a network at 512 pixels and the paper's decoder, one at a time where a decoder sees
                2048 pixels. A batch is one pass.
            detect_resolution: side in pixels that the image is squashed to, a multiple of what the network allows;
                None is what the student was trained with. For another one the decoder's values, which belong to the
                grid they were trained on, are interpolated.
            output_type: "np", "pt" or "pil" instead of the kind that follows from the input.

        Returns:
            Probability in [0, 1] at the input's size, float32: as in `trace_fast.edges`.

        Raises:
            TypeError, ValueError: an argument is not what is said above.
        """
        check_output_type(output_type)
        if detect_resolution is not None:
            return self.resized((detect_resolution, detect_resolution))(image, output_type=output_type)
        if not isinstance(image, (list, tuple)):
            return convert_edges(self.edges(read_image(image)), image, output_type)
        if not image:
            raise ValueError(f"edges: image must hold at least one image, got an empty {type(image).__name__}")
        found = []
        height, width = (side * max(1, self.decoder.detail) for side in self.backbone.settings.size)
        batch = max(1, min(BATCH, PIXELS // (height * width)))
        for start in range(0, len(image), batch):
            some, pictures = image[start : start + batch], []
            for index, item in enumerate(some, start):
                with error_context(index):
                    pictures.append(read_image(item))
            parts = self.edges_of(pictures)
            found += [convert_edges(part, item, output_type) for part, item in zip(parts, some, strict=True)]
        return found

    def edges(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, H, W) float32 in [0, 1] to edge probability (B, 1, H, W) float32, on the device of the images.

        The host does not wait for the device, unless the images are elsewhere.
        """
        return self.edges_of([pixels])[0]

    @torch.no_grad()
    def edges_of(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """Edges of images of several sizes, each (B, 3, H, W), in one pass; see `edges`."""
        size, detail = self.backbone.settings.size, self.decoder.detail
        images = [pixels.to(self.device) for pixels in pictures]

        def squash(side: tuple[int, int]) -> Tensor:
            return torch.cat([resize(pixels, side) for pixels in images])

        photographs = squash((size[0] * detail, size[1] * detail)) if detail else None
        with self._lock:
            logits = self._run(squash(size), photographs).float()
        found = []
        for part, pixels in zip(logits.split([len(pixels) for pixels in pictures]), pictures, strict=True):
            # logits, not probabilities: edges stay sharp where they are stretched
            height, width = pixels.shape[-2:]
            found.append(resize(part, (height, width)).sigmoid().to(pixels.device))
        return found

    def predict(self, images: Tensor, photograph: Tensor | None) -> Tensor:
        """One pass: images (B, 3, *size) and what the decoder sees of them to logits (B, 1, h, w)."""
        backbone = self.backbone
        taps = AttentionReadout(self.decoder.values, reading(backbone))
        last = len(taps.grids) - 1

        def hear(index: int, query: Tensor, key: Tensor) -> None:
            taps.on_attention(index, query, key)
            if index == last:
                raise HeardError

        timestep = constant((self.level,), images.device).expand(len(images))
        try:
            with listen(backbone, hear):
                backbone.predict(backbone.encode(images), timestep)
        except HeardError:
            pass
        return self.decoder(taps.result(), photograph)

    def resized(self, size: tuple[int, int]) -> Detector:
        """The same student at another processing size in pixels, its values interpolated; weights are shared.

        Raises:
            ValueError: the network does not allow the size.
        """
        if size == self.backbone.settings.size:
            return self
        backbone = copy.copy(self.backbone)
        backbone.settings = replace(self.backbone.settings, size=size)
        decoder = copy.copy(self.decoder)
        decoder._parameters = dict(self.decoder._parameters)
        decoder.grid = finest(backbone)
        decoder.values = nn.Parameter(resample_values(self.decoder.values, self.decoder.grid, decoder.grid))
        config = {**self.config, "size": list(size)} if self.config else None
        found = Detector(backbone, decoder, level=self.level, name=self.name, config=config, adapter=self.adapter)
        found._lock = self._lock  # the network is the same
        return found


def reading(backbone: Backbone, size: tuple[int, int] | None = None) -> list[tuple[int, int]]:
    """Grids of the blocks that are read, in order; of the backbone's own size in pixels, or another."""
    grids = backbone.grids(size or backbone.settings.size)
    blocks = backbone.settings.blocks
    return grids if blocks is None else [grids[index] for index in blocks]


def finest(backbone: Backbone, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """The grid of the aggregated map."""
    return max(reading(backbone, size), key=lambda grid: grid[0] * grid[1])


def listen(backbone: Backbone, hear: Any) -> Any:
    """The context in which blocks that are read are heard."""
    modules, blocks = backbone.attentions(), backbone.settings.blocks
    chosen = modules if blocks is None else [modules[index] for index in blocks]
    return backbone.capture(chosen, hear, [height * width for height, width in reading(backbone)])


def merge(network: nn.Module, adapter: dict[str, Tensor], scale: float) -> None:
    """Add low-rank matrices to the weights of linear layers: W += scale * B A, in float32.

    Args:
        network: changed in place.
        adapter: "<layer>.lora_A.weight" (r, in) and "<layer>.lora_B.weight" (out, r), by the layer's name.
        scale: factor of the products.

    Raises:
        ValueError: a layer is not there, or the shapes differ from it.
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


def save_student(
    folder: Path,
    config: dict[str, Any],
    decoder: Decoder,
    adapter: dict[str, Tensor],
    empty_prompt: dict[str, Tensor] | None,
    card: str | None = None,
) -> None:
    """Write the files of a student, its adapter in half precision; see `Detector.from_pretrained`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {DECODER: decoder.state_dict(), ADAPTER: {name: x.half() for name, x in adapter.items()}}
    if empty_prompt:
        files[EMPTY_PROMPT] = empty_prompt
    contents = {name: save({key: x.contiguous().cpu() for key, x in file.items()}) for name, file in files.items()}
    if card is not None:
        contents["README.md"] = card.encode()
    contents[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    for name, content in contents.items():
        with write_atomically(folder / name, "save_pretrained") as file:
            file.write(content)
