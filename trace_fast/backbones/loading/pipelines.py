"""Pipelines of diffusers by parts: network, autoencoder and schedule; the text encoders once, for the empty prompt.

The only place that imports diffusers. Weights are read from safetensors alone, and code of a repository is never run.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from trace_fast.backbones.latent import get_network
from trace_fast.backbones.loading.hub import Files, checkpoint_errors, hub_errors
from trace_fast.backbones.loading.memory import check_memory, count_parameters
from trace_fast.backbones.loading.sources import Source
from trace_fast.backbones.registry import MODELS, PIPELINE_FAMILIES, explain_refusal, find_family
from trace_fast.extras import require
from trace_fast.io.files import write_atomically

__all__ = ["load_pipeline"]

NETWORKS = ("unet", "transformer")
# what old repositories of PixArt name their network; diffusers loads it as PixArtTransformer2DModel
RENAMED = ("Transformer2DModel",)
UNWANTED = ("safety_checker", "feature_extractor", "image_encoder")  # parts that no prompt needs


def load_pipeline(
    source: Source,
    *,
    dtype: torch.dtype,
    device: torch.device,
    offload: str | None = None,
    variant: str | None = None,
    empty_prompt: dict[str, Tensor] | None = None,
) -> tuple[SimpleNamespace, dict[str, Tensor]]:
    """Load the network, the autoencoder and the scheduler of a diffusers model, and its embedded empty prompt.

    The model's own pipeline embeds the empty prompt the first time, and the result is cached.

    Args:
        source: of kind `Kind.PIPELINE`.
        dtype: of the weights.
        device: where they will run, which must have memory for them; they stay in main memory here.
        offload: how they will get there, see `to_device`.
        variant: of the weight files, such as "fp16".
        empty_prompt: the embedded empty prompt where it is known, by the names of the network's arguments.

    Returns:
        The parts, by the names that they have in the pipeline, with its `config`; and the embedded empty prompt.

    Raises:
        ValueError: there is no such model, or a part is missing or of an unexpected class.
        RuntimeError: diffusers is not installed, the repository is gated, the hub cannot be reached, or memory is too
            small; the message says what to do.
    """
    files = source.files
    require("load", "diffusers", "transformers", extra="diffusion")
    with hub_errors(source.name, files.location):
        import diffusers

        index = diffusers.DiffusionPipeline.load_config(files.location, **files.hub_options)
        network = find_network(index, files)
        classes = {part: get_class(diffusers, index, part, files) for part in (network, "vae", "scheduler")}
        if classes[network].__name__ not in RENAMED:
            check_family(classes[network].__name__, files)
        with checkpoint_errors(files.location):
            counts = count_parts(source, network, variant)
        if counts is not None:
            check_memory(source.name, counts, dtype, device, offload)
        options = {"use_safetensors": True, "variant": variant, **files.hub_options}
        precision = {name_dtype(diffusers, (0, 40)): dtype}
        pipe = SimpleNamespace(config=index)
        with checkpoint_errors(files.location):
            for part in (network, "vae"):
                setattr(pipe, part, load_whole(classes[part], files, part, **precision, **options))
            pipe.scheduler = classes["scheduler"].from_pretrained(
                files.location, subfolder="scheduler", **files.hub_options
            )
        check_family(type(get_network(pipe)).__name__, files)
        if empty_prompt is None:
            empty_prompt = get_empty_prompt(diffusers, pipe, files, options, dtype)
    return pipe, empty_prompt


def name_dtype(library: Any, renamed: tuple[int, int]) -> str:
    """Return the keyword by which `from_pretrained` of a library takes a dtype, which one of its releases renamed."""
    return "dtype" if tuple(map(int, library.__version__.split(".")[:2])) >= renamed else "torch_dtype"


def load_whole(kind: Any, files: Files, part: str, **options: Any) -> Any:
    """Return a part that `from_pretrained` loads; refuse it where weights are missing, which would then be random."""
    module, report = kind.from_pretrained(files.location, subfolder=part, output_loading_info=True, **options)
    if missing := [*report["missing_keys"], *(names[0] for names in report["mismatched_keys"])]:
        raise ValueError(f"there are no weights for {min(missing)} of {part}")
    return module.eval().requires_grad_(False)


def find_network(index: dict[str, Any], files: Files) -> str:
    """Return the name of the network in a model_index.json; refuse a pipeline that cannot be loaded."""
    location = files.location
    network = next((name for name in NETWORKS if name in index), None)
    if network is None or "vae" not in index:
        raise ValueError(f"load: model must have a unet or transformer and a vae, got {sorted(index)} in {location!r}")
    missing = [name for name in (network, "vae", "scheduler") if not Path(location, name).is_dir()]
    if files.is_folder and missing:
        raise ValueError(f"load: model must be complete, got {location!r} without {' and '.join(missing)}")
    return network


def check_family(kind: str, files: Files) -> None:
    """Refuse a class of network that no family reads."""
    if kind not in PIPELINE_FAMILIES:
        raise ValueError(f"load: model {explain_refusal(kind, PIPELINE_FAMILIES)} in {files.location!r}")


def get_class(diffusers: Any, index: dict[str, Any], part: str, files: Files) -> Any:
    """Return the diffusers class of a part; refuse another library, since no remote code is run."""
    entry = index.get(part)
    match entry:
        case ["diffusers", str(name)] if hasattr(diffusers, name):
            return getattr(diffusers, name)
    raise ValueError(
        f"load: {part} must be a class of diffusers {diffusers.__version__}, got {entry} in {files.location!r}"
    )


def count_parts(source: Source, network: str, variant: str | None) -> list[int] | None:
    """Return how many weights the parts have: measured in a folder, known of a known model, else None."""
    if source.files.is_folder:
        file = "diffusion_pytorch_model." + (f"{variant}." if variant else "") + "safetensors"
        return [
            sum(
                count_parameters(path)
                for path in Path(source.files.location, part).glob("*.safetensors")
                # a repository may hold other variants, too
                if re.sub(r"-\d+-of-\d+", "", path.name) == file
            )
            for part in (network, "vae")
        ]
    return [int(MODELS[source.name].billions * 1e9)] if source.name in MODELS else None


def get_empty_prompt(
    diffusers: Any, pipe: SimpleNamespace, files: Files, options: dict[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the embedded empty prompt from the cache; it is embedded and cached where the cache does not have it."""
    cache = prompt_cache_file(files, pipe.config, dtype)
    prompt = load_cached_prompt(cache, files)
    if prompt is None:
        prompt = encode_empty_prompt(diffusers, pipe, files, options, dtype)
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(cache, "load") as file:
                file.write(save(prompt, {"encoders": text_encoder_stamp(files), "hash": hash_prompt(prompt)}))
        except OSError as error:
            warnings.warn(
                f"load: the embedded empty prompt cannot be kept in '{cache.parent}', so that it is embedded again the "
                f"next time: {error}; set TRACE_FAST_CACHE to a folder that can be written to",
                stacklevel=2,
            )
    return prompt


def encode_empty_prompt(
    diffusers: Any, pipe: SimpleNamespace, files: Files, options: dict[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the empty prompt as the model's own pipeline embeds it; text encoders are loaded if needed, and freed."""
    import transformers

    index = pipe.config
    family = find_family(type(get_network(pipe)).__name__, PIPELINE_FAMILIES)
    pipeline: Any = pipe
    if family.needs_text_encoders(pipe):
        kind = getattr(diffusers, str(index.get("_class_name")), None)
        if kind is None:
            raise ValueError(f"load: model must be of a pipeline of diffusers, got {index.get('_class_name')!r}")
        loaded = {name: part for name, part in vars(pipe).items() if name != "config"}
        unwanted = {name: None for name in UNWANTED if name in index}
        precision = {name_dtype(transformers, (4, 56)): dtype}
        with checkpoint_errors(files.location):
            for name, entry in index.items():
                match entry:
                    case ["transformers", str(encoder)] if name.startswith("text_encoder"):
                        loaded[name] = load_whole(getattr(transformers, encoder), files, name, **precision, **options)
            pipeline = kind.from_pretrained(files.location, **loaded, **unwanted, **options)
    with torch.no_grad(), checkpoint_errors(files.location):
        prompt = family.encode_empty_prompt(pipeline)
    prompt = {name: value.detach().clone().cpu().contiguous() for name, value in prompt.items()}
    del pipeline
    gc.collect()
    return prompt


def prompt_cache_file(files: Files, index: dict[str, Any], dtype: torch.dtype) -> Path:
    """Return the file of an embedded empty prompt: in $TRACE_FAST_CACHE, or in trace_fast in the user's cache."""
    try:
        home = Path.home()
    except RuntimeError:
        home = Path(os.devnull)  # a user without a home: there is no such folder, and nothing is kept
    default = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "trace_fast"
    folder = Path(os.environ.get("TRACE_FAST_CACHE") or default)
    location = str(Path(files.location).resolve()) if files.is_folder else files.location
    identity = json.dumps([location, files.revision, index, str(dtype)], sort_keys=True, default=str)
    return folder / "empty_prompts" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.safetensors"


def load_cached_prompt(cache: Path, files: Files) -> dict[str, Tensor] | None:
    """Return the embedded empty prompt of a cache file; None without one, or where the text encoders have changed.

    A damaged file is reported, and counts as none.
    """
    try:
        if not cache.is_file():
            return None
        with safe_open(cache, "pt") as file:
            metadata = file.metadata() or {}
        prompt = load_file(cache)
        if hash_prompt(prompt) != metadata.get("hash"):
            raise ValueError("its content is not what was written")
        return prompt if text_encoder_stamp(files) in ("", metadata.get("encoders")) else None
    except (OSError, SafetensorError, ValueError) as error:
        warnings.warn(f"load: '{cache}' is damaged, and the empty prompt is embedded again: {error}", stacklevel=2)
        return None


def hash_prompt(prompt: dict[str, Tensor]) -> str:
    """Return a hash of an embedded prompt, which shows a changed value where safetensors would not."""
    return hashlib.sha256(save(dict(sorted(prompt.items())))).hexdigest()


def text_encoder_stamp(files: Files) -> str:
    """Return sizes and times of the text encoders' files in a folder; empty where it has none."""
    stats = [path.stat() for path in sorted(Path(files.location).glob("text_encoder*/*"))]
    return " ".join(f"{stat.st_size}@{stat.st_mtime_ns}" for stat in stats)
