"""Models by parts, from a hub or a folder.

Of diffusers network, autoencoder and schedule, its text encoders once, then freed; of transformers and timm the encoder
alone. The only place that imports diffusers and loads with transformers or timm. Weights are read from safetensors
alone.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from trace_fast.backbones.base import Backbone
from trace_fast.backbones.latent import get_network
from trace_fast.backbones.registry import MODELS
from trace_fast.io.files import write_atomically

__all__ = ["OFFLOADS", "is_encoder", "is_student", "load_encoder", "load_pipeline", "prompt_cache_file", "to_device"]

NETWORKS = ("unet", "transformer")
OFFLOADS = ("model", "sequential")
UNCALLED = ["CLIPVisionEmbeddings", "EvaAttention"]  # modules that read the weights of a layer without calling it
# what the weights of an encoder are called in the files of a model, by its model_type: what comes before
PREFIXES = {
    "dinov2": "",
    "dinov2_with_registers": "",
    "dinov3_vit": "",
    "clip_vision_model": "",
    "qwen2_5_vl_vision": "",
    "llava": r"(model\.)?vision_tower\.",
    "qwen2_5_vl": r"(model\.)?visual\.",
}


def load_pipeline(
    model: str,
    families: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device: torch.device,
    offload: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
    empty_prompt: dict[str, Tensor] | None = None,
) -> tuple[SimpleNamespace, dict[str, Tensor]]:
    """Network, autoencoder and scheduler of a diffusers model, and what stands for the empty prompt.

    The empty prompt is embedded by the model's own pipeline the first time, and kept in `prompt_cache_file`.

    Args:
        model: a name of `registry.MODELS`, a repository of the hub, or a local folder in the same layout.
        families: `LatentBackbone` classes by the class of their network.
        dtype: of the weights.
        device: where they will go, which must have room for them; they stay in main memory here.
        offload: how they will get there, see `Tracer.from_pretrained`.
        revision: branch, tag or commit of the repository.
        variant: of the weight files, such as "fp16".
        local_files_only: never ask the hub; also HF_HUB_OFFLINE.
        empty_prompt: what stands for the empty prompt, where it is known.

    Raises:
        ValueError: there is no such model, or a part is missing or of an unexpected class.
        RuntimeError: the repository is gated, the hub is out of reach, or memory is too small; the message says what to
            do.
    """
    import diffusers

    source = MODELS[model].repo if model in MODELS else model
    where = {"revision": revision, "local_files_only": local_files_only}
    with hub_errors(model, source):
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
        check_pipeline_memory(model, source, part, dtype, device, offload)
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
        cached = prompt_cache_file(source, revision, index, dtype)
        if empty_prompt is None:
            empty_prompt = load_cached_prompt(cached, source)
        if empty_prompt is None:
            family = families.get(type(get_network(pipe)).__name__)
            if family is None:
                kind = type(get_network(pipe)).__name__
                raise ValueError(f"load: model must be of one of {', '.join(families)}, got {kind} in {source!r}")
            empty_prompt = encode_empty_prompt(diffusers, family, source, index, pipe, options)
            cached.parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(cached, "load") as file:
                file.write(save(empty_prompt, {"encoders": encoder_files(source)}))
    for name in (part, "vae"):
        getattr(pipe, name).requires_grad_(False)
    return pipe, empty_prompt


def encode_empty_prompt(
    diffusers: Any, family: Any, source: str, index: dict[str, Any], pipe: SimpleNamespace, options: dict[str, Any]
) -> dict[str, Tensor]:
    """The empty prompt through the model's own pipeline, whose text encoders are loaded where needed, and freed."""
    whole = pipe
    if family.needs_text_encoders(pipe):
        kind = getattr(diffusers, str(index.get("_class_name")), None)
        if kind is None:
            raise ValueError(f"load: model must be of a pipeline of diffusers, got {index.get('_class_name')!r}")
        given = {name: value for name, value in vars(pipe).items() if name != "config"}
        unwanted = {name: None for name in ("safety_checker", "feature_extractor", "image_encoder") if name in index}
        whole = kind.from_pretrained(source, **given, **unwanted, **options)
    with torch.no_grad():
        empty_prompt = {
            name: x.detach().clone().cpu().contiguous() for name, x in family.encode_empty_prompt(whole).items()
        }
    del whole
    gc.collect()
    return empty_prompt


def prompt_cache_file(source: str, revision: str | None, index: dict[str, Any], dtype: torch.dtype) -> Path:
    """Where the embedded empty prompt of a model is kept: $TRACE_FAST_CACHE, or trace_fast in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trace_fast"
    folder = Path(os.environ.get("TRACE_FAST_CACHE") or default)
    place = str(Path(source).resolve()) if Path(source).is_dir() else source
    identity = json.dumps([place, revision, index, str(dtype)], sort_keys=True, default=str)
    return folder / "empty_prompts" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.safetensors"


def load_cached_prompt(cached: Path, source: str) -> dict[str, Tensor] | None:
    """The embedded empty prompt in a file of `prompt_cache_file`; None without one, or where encoders have changed."""
    if not cached.is_file():
        return None
    with safe_open(cached, "pt") as file:
        encoders = (file.metadata() or {}).get("encoders")
    return load_file(cached) if encoder_files(source) in ("", encoders) else None


def encoder_files(source: str) -> str:
    """Sizes and times of the files of a folder's text encoders; empty where it has none."""
    stats = [path.stat() for path in sorted(Path(source).glob("text_encoder*/*"))]
    return " ".join(f"{stat.st_size}@{stat.st_mtime_ns}" for stat in stats)


def class_of(diffusers: Any, index: dict[str, Any], name: str, source: str) -> Any:
    """The diffusers class of a part; remote code is never run."""
    library, kind = index.get(name) or ("", "")
    if library != "diffusers" or not hasattr(diffusers, kind):
        raise ValueError(f"load: {name} must be a class of diffusers, got {library}.{kind} in {source!r}")
    return getattr(diffusers, kind)


def is_encoder(model: str, *, revision: str | None = None, local_files_only: bool = False, **_: Any) -> bool:
    """Whether a model is of transformers or timm, for `load_encoder`; a repository that cannot be asked is not."""
    if model in MODELS:
        return MODELS[model].encoder
    if Path(model).is_dir():
        return Path(model, "config.json").is_file()
    return not {"model_type", "architecture"}.isdisjoint(hub_config(model, revision, local_files_only))


def is_student(repository: str) -> bool:
    """Whether a repository of the hub holds a student; one that cannot be asked does not."""
    return {"base", "decoder"} <= hub_config(repository, None, False).keys()


def hub_config(repository: str, revision: str | None, local_files_only: bool) -> dict[str, Any]:
    """The config.json of a repository; empty where there is none, or where it cannot be had: told when it is loaded."""
    try:
        path = hub_file(repository, "config.json", revision, local_files_only)
    except OSError:
        return {}
    return {} if path is None else json.loads(path.read_text())


def load_encoder(
    model: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    offload: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Vision encoder of transformers or timm, and the `mean` and `std` of its pixels, None if not said.

    Of a vision-language model, only the files that hold the tower are fetched, and only the tower is read from them.
    An encoder of timm is made so that it takes images of any size.

    Args:
        model: a name of `registry.MODELS`, a repository of the hub, or a local folder in the same layout.
        dtype: of the weights.
        device: where they will go, which must have room for them; they stay in main memory here.
        offload: how they will get there, see `Tracer.from_pretrained`.
        revision: branch, tag or commit of the repository.
        variant: of the weight files, such as "fp16".
        local_files_only: never ask the hub; also HF_HUB_OFFLINE.

    Raises:
        ValueError: there is no such model, it is of another kind, or its files do not fit each other.
        RuntimeError: the repository is gated, the hub is out of reach, timm is not there, or memory is too small; the
            message says what to do.
    """
    source = MODELS[model].repo if model in MODELS else model

    def fetch(name: str, required: bool = False) -> Any:
        return hub_file(source, name, revision, local_files_only, required)

    def read(name: str, required: bool = False) -> dict[str, Any]:
        path = fetch(name, required)
        return {} if path is None else json.loads(path.read_text())

    suffix = f".{variant}" if variant else ""
    with hub_errors(model, source), checkpoint_errors(source):
        values = read("config.json", required=True)
        of_timm = "architecture" in values
        family: Any = values.get("model_type")
        if not of_timm and family not in PREFIXES:
            raise ValueError(f"model_type must be one of {', '.join(PREFIXES)}, got {family!r}")
        prefix = re.compile("" if of_timm else PREFIXES[family])
    if of_timm:
        check_timm(model)
    with hub_errors(model, source), checkpoint_errors(source):
        shards = read(f"model.safetensors.index{suffix}.json").get("weight_map", {})
        names = {file for key, file in shards.items() if prefix.match(key)} or {f"model{suffix}.safetensors"}
        files = [fetch(name, required=True) for name in sorted(names)]
        processor = read("preprocessor_config.json") or read("processor_config.json").get("image_processor", {})
        numbers = sum(count_numbers(file, prefix) for file in files)
    check_memory(model, [numbers], dtype, device, offload)
    with checkpoint_errors(source):
        weights: dict[str, Tensor] = {}
        for file in files:
            with safe_open(file, "pt") as tensors:
                weights |= {
                    prefix.sub("", name, count=1): tensors.get_tensor(name)
                    for name in tensors.keys()  # noqa: SIM118 (not a mapping)
                    if prefix.match(name)
                }
        if of_timm:
            network, missing = timm_network(values["architecture"], fetch("config.json").parent, weights, dtype)
        else:
            network, missing = transformers_network(values, weights, dtype)
        if missing:
            raise ValueError(f"no weights for {min(missing)}")
    network.eval().requires_grad_(False)
    return network, {"mean": processor.get("image_mean"), "std": processor.get("image_std")}


def transformers_network(
    values: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Any, list[str]]:
    """Vision encoder of transformers from its configuration and weights, and the names of weights that are missing."""
    import transformers

    config = transformers.CONFIG_MAPPING[values["model_type"]].from_dict(values)
    config = getattr(config, "vision_config", config)
    kind: Any = transformers.MODEL_MAPPING[type(config)]
    network, report = kind.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    return network, report["missing_keys"]


def timm_network(
    architecture: str, folder: Path, weights: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Any, list[str]]:
    """Encoder of timm from the folder of its config.json and its weights, and the names of weights that are missing."""
    import timm
    from accelerate import init_empty_weights
    from timm.models import eva

    if architecture not in timm.list_models(module="eva"):
        raise ValueError(f"architecture must be one of timm's module eva, got {architecture!r}")
    with init_empty_weights(include_buffers=False):  # of four billion numbers, random ones would take minutes
        network = timm.create_model(f"local-dir:{folder}", dynamic_img_size=True)
    weights = {name: x.to(dtype) for name, x in eva.checkpoint_filter_fn(weights, network).items()}
    missing = network.load_state_dict(weights, strict=False, assign=True).missing_keys
    return (network if missing else network.to(dtype)), missing


def check_timm(model: str) -> None:
    """RuntimeError where timm cannot be imported."""
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(
            f"load: {model} needs timm, which cannot be imported ({reason}): pip install timm, with "
            f"a torchvision that fits torch {torch.__version__}"
        ) from error


def to_device(backbone: Backbone, device: torch.device, offload: str | None) -> Backbone:
    """Bring a backbone's parts to a device, or have accelerate bring them there while they run."""
    parts = [part for name in ("vae", "network") if (part := getattr(backbone, name, None))]  # in the order of running
    if offload is None:
        for part in parts:
            part.to(device)
        return backbone
    from accelerate import cpu_offload, cpu_offload_with_hook

    if offload == "sequential":
        for part in parts:
            cpu_offload(part, device, preload_module_classes=UNCALLED)
        return backbone
    hooks: list[Any] = []
    for part in parts:
        hooks.append(cpu_offload_with_hook(part, device, *hooks[-1:])[1])
    if len(hooks) > 1:  # the first makes the last leave when the next image comes
        hooks[0].hook.prev_module_hook = hooks[-1]
    return backbone


def hub_file(
    source: str, name: str, revision: str | None, local_files_only: bool, required: bool = False
) -> Path | None:
    """A file of a folder or of a repository, fetched where it is not in the cache; None where there is none.

    Raises:
        FileNotFoundError: it is `required`, and there is none.
        OSError: the hub does not give it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if Path(source).is_dir():
        path = Path(source, name)
        if path.is_file() or not required:
            return path if path.is_file() else None
        raise FileNotFoundError(f"no {name}")
    try:
        return Path(hf_hub_download(source, name, revision=revision, local_files_only=local_files_only))
    except EntryNotFoundError as error:
        if not required:
            return None
        if isinstance(error, LocalEntryNotFoundError):
            raise
        raise FileNotFoundError(f"no {name}") from error


@contextlib.contextmanager
def checkpoint_errors(source: str) -> Iterator[None]:
    """Turn what damaged or mismatching files may cause into one line."""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"load: model must be whole and its files match, got {source!r}: {reason}") from error


def check_pipeline_memory(
    model: str, source: str, part: str, dtype: torch.dtype, device: torch.device, offload: str | None
) -> None:
    """Refuse to load weights that do not fit, before any is read; a folder is measured, a known model is known."""
    if Path(source).is_dir():
        parts = [sum(map(count_numbers, Path(source, name).glob("*.safetensors"))) for name in (part, "vae")]
        check_memory(model, parts, dtype, device, offload)
    elif model in MODELS:
        check_memory(model, [int(MODELS[model].parameters * 1e9)], dtype, device, offload)


def check_memory(
    model: str, parts: Sequence[int], dtype: torch.dtype, device: torch.device, offload: str | None = None
) -> None:
    """Refuse parts of so many numbers each where they do not fit."""
    lack = missing_memory(parts, dtype.itemsize, device, offload)
    if lack is None:
        return
    ways = [f"offload={way!r}" for way in OFFLOADS if not missing_memory(parts, dtype.itemsize, device, way)]
    if dtype.itemsize > 2 and not missing_memory(parts, 2, device, offload):
        ways.insert(0, "dtype=torch.bfloat16")
    raise RuntimeError(
        f"load: {model} needs {lack[0] / 2**30:.1f} GiB for its weights in {str(dtype).removeprefix('torch.')}, "
        f"{lack[1]} has {free_bytes(lack[1]) / 2**30:.1f} GiB free; "
        + (f"{ways[0]} would fit" if ways else "take a smaller model or a larger device")
    )


def missing_memory(
    parts: Sequence[int], itemsize: int, device: torch.device, offload: str | None
) -> tuple[int, torch.device] | None:
    """Bytes that parts of so many numbers need, and the place that does not have them; None where all fits."""
    needs = [(sum(parts), device if offload is None else torch.device("cpu"))]
    if offload == "model":
        needs.append((max(parts), device))
    return next(((count * itemsize, where) for count, where in needs if count * itemsize > free_bytes(where)), None)


def free_bytes(device: torch.device) -> float:
    """Memory that is free; infinite where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def count_numbers(path: Path, prefix: re.Pattern[str] = re.compile("")) -> int:
    """How many numbers a safetensors file holds under names that begin with `prefix`, from its header alone."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__" and prefix.match(name)]
    return sum(int(torch.Size(shape).numel()) for shape in shapes)


def version(module: Any) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@contextlib.contextmanager
def hub_errors(model: str, source: str) -> Iterator[None]:
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
    except ImportError as error:
        raise RuntimeError(f"load: {model} needs a package that is not there: {str(error).splitlines()[0]}") from error
