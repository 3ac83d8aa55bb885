"""Diffusers models by parts, from a hub or a folder: network, autoencoder and schedule; text encoders once, then freed.

The only place that imports diffusers. Weights are read from safetensors alone.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from trace_fast._files import whole_file
from trace_fast.backbones.registry import MODELS

__all__ = ["load_pipeline", "null_text_file"]

NETWORKS = ("unet", "transformer")


def load_pipeline(
    model: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
) -> tuple[SimpleNamespace, dict[str, Tensor]]:
    """Network, autoencoder and scheduler of a diffusers model on a device, and what stands for the empty prompt.

    The empty prompt is embedded by the model's own pipeline the first time, and kept in `null_text_file`.

    Args:
        model: a name of `registry.MODELS`, a repository of the hub, or a local folder in the same layout.
        dtype: of the weights.
        device: where they go.
        revision: branch, tag or commit of the repository.
        variant: of the weight files, such as "fp16".
        local_files_only: never ask the hub; also HF_HUB_OFFLINE.

    Raises:
        ValueError: there is no such model, or a part is missing or of an unexpected class.
        RuntimeError: the repository is gated, the hub is out of reach, or memory is too small; the message says what to
            do.
    """
    import diffusers

    source = MODELS[model].repo if model in MODELS else model
    where = {"revision": revision, "local_files_only": local_files_only}
    with explained(model, source):
        index = diffusers.DiffusionPipeline.load_config(source, **where)
        part = next((name for name in NETWORKS if name in index), None)
        if part is None or "vae" not in index:
            raise ValueError(
                f"load: model must have a unet or transformer and a vae, got {sorted(index)} in {source!r}"
            )
        missing = [
            name for name in (part, "vae", "scheduler") if Path(source).is_dir() and not Path(source, name).is_dir()
        ]
        if missing:
            raise ValueError(f"load: model must be whole, got {source!r} without {' and '.join(missing)}")
        check_memory(model, source, part, dtype, device)
        # the keyword was renamed
        precision = "dtype" if version(diffusers) >= (0, 40) else "torch_dtype"
        options = {precision: dtype, "use_safetensors": True, "variant": variant, **where}
        parts = {
            name: class_of(diffusers, index, name, source).from_pretrained(source, subfolder=name, **options).eval()
            for name in (part, "vae")
        }
        scheduler = class_of(diffusers, index, "scheduler", source).from_pretrained(
            source, subfolder="scheduler", **where
        )
        pipe = SimpleNamespace(**parts, scheduler=scheduler, config=index)
        cached = null_text_file(source, revision, index)
        if cached.is_file():
            null_text = load_file(cached)
        else:
            null_text = embed_nothing(diffusers, source, index, pipe, options)
            cached.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(cached, "load") as file:
                file.write(save(null_text))
    for name in (part, "vae"):
        getattr(pipe, name).requires_grad_(False).to(device)
    return pipe, null_text


def embed_nothing(
    diffusers: Any, source: str, index: dict[str, Any], pipe: SimpleNamespace, options: dict[str, Any]
) -> dict[str, Tensor]:
    """The empty prompt through the model's own pipeline, whose text encoders are loaded for it and freed."""
    from trace_fast.backbones import PIPELINES

    given = {name: value for name, value in vars(pipe).items() if name != "config"}
    unwanted = {name: None for name in ("safety_checker", "feature_extractor", "image_encoder") if name in index}
    kind = getattr(diffusers, index["_class_name"])
    whole = kind.from_pretrained(source, **given, **unwanted, **options)
    family = PIPELINES[type(whole.unet if "unet" in given else whole.transformer).__name__]
    with torch.no_grad():
        null_text = {name: x.detach().clone().cpu().contiguous() for name, x in family.null_text_of(whole).items()}
    del whole
    gc.collect()
    return null_text


def null_text_file(source: str, revision: str | None, index: dict[str, Any]) -> Path:
    """Where the embedded empty prompt of a model is kept: $TRACE_FAST_CACHE, or trace_fast in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trace_fast"
    folder = Path(os.environ.get("TRACE_FAST_CACHE") or default)
    place = str(Path(source).resolve()) if Path(source).is_dir() else source
    identity = json.dumps([place, revision, index], sort_keys=True, default=str)
    return folder / "null_text" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.safetensors"


def class_of(diffusers: Any, index: dict[str, Any], name: str, source: str) -> Any:
    """The diffusers class of a part; remote code is never run."""
    library, kind = index.get(name) or ("", "")
    if library != "diffusers" or not hasattr(diffusers, kind):
        raise ValueError(f"load: {name} must be a class of diffusers, got {library}.{kind} in {source!r}")
    return getattr(diffusers, kind)


def check_memory(model: str, source: str, part: str, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse to load weights that do not fit, before any is read; a folder is measured, a known model is known."""
    if Path(source).is_dir():
        files = [file for name in (part, "vae") for file in Path(source, name).glob("*.safetensors")]
        numbers = sum(count_numbers(file) for file in files)
    elif model in MODELS:
        numbers = int(MODELS[model].parameters * 1e9)
    else:
        return
    needed = numbers * dtype.itemsize
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif hasattr(os, "sysconf"):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if needed > free:
        halves = numbers * 2 <= free and dtype.itemsize > 2
        way = "dtype=torch.bfloat16 would fit" if halves else "take a smaller model or a larger device"
        raise RuntimeError(
            f"load: {model} needs {needed / 2**30:.1f} GiB for its weights in {str(dtype).removeprefix('torch.')}, "
            f"{device} has {free / 2**30:.1f} GiB free; {way}"
        )


def count_numbers(path: Path) -> int:
    """How many numbers a safetensors file holds, from its header alone."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    return sum(int(torch.Size(shape).numel()) for shape in shapes)


def version(module: Any) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@contextlib.contextmanager
def explained(model: str, source: str) -> Iterator[None]:
    """Turn what a hub or a folder may answer into one line that says what to do."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        yield
    except OSError as error:
        causes: list[BaseException] = [error]
        while cause := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(cause)

        def has(kind: type[BaseException]) -> bool:
            return any(isinstance(cause, kind) for cause in causes)

        if has(GatedRepoError):
            page = f"https://huggingface.co/{source}"
            raise RuntimeError(f"load: {model} is gated; accept its terms at {page} and run `hf auth login`") from error
        if has(RepositoryNotFoundError):
            raise ValueError(
                f"load: model must be a known name, a folder or a repository of the hub, got {source!r}, which the hub "
                "does not have or does not show you (`hf auth login`)"
            ) from error
        if not Path(source).is_dir() and (has(LocalEntryNotFoundError) or has(ConnectionError)):
            raise RuntimeError(
                f"load: {model} is not on this machine, and the hub is out of reach or not to be asked "
                "(HF_HUB_OFFLINE, local_files_only); name a local folder, or load it once with a network"
            ) from error
        raise ValueError(f"load: model must be whole, got {source!r}: {str(error).splitlines()[0]}") from error
