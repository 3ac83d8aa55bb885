"""Encoders of transformers and timm: the vision encoder alone, also of a vision-language model.

The only place that loads with transformers or timm. Weights are read from safetensors alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trace_fast.backbones.loading.hub import Files, checkpoint_errors, hub_errors
from trace_fast.backbones.loading.memory import check_memory, count_parameters
from trace_fast.backbones.loading.sources import Source
from trace_fast.extras import require

__all__ = ["load_encoder"]

# what the names of an encoder's weights begin with in the files of a model, by its model_type
PREFIXES = {
    "dinov2": "",
    "dinov2_with_registers": "",
    "dinov3_vit": "",
    "clip_vision_model": "",
    "qwen2_5_vl_vision": "",
    "llava": r"(model\.)?vision_tower\.",
    "qwen2_5_vl": r"(model\.)?visual\.",
}


def load_encoder(
    source: Source,
    *,
    dtype: torch.dtype,
    device: torch.device,
    offload: str | None = None,
    variant: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Load an encoder of transformers or timm, and how its pixels are normalized.

    Of a vision-language model, only the files that hold the vision encoder are downloaded, and only the encoder is read
    from them. An encoder of timm is created so that it takes images of any size.

    Args:
        source: of kind `Kind.ENCODER`.
        dtype: of the weights.
        device: where they will run, which must have memory for them; they stay in main memory here.
        offload: how they will get there, see `to_device`.
        variant: of the weight files, such as "fp16".

    Returns:
        The encoder, and `mean` and `std` of the pixels that it was trained on, None where its files do not say.

    Raises:
        ValueError: there is no such model, it is of another kind, or its files do not fit each other.
        RuntimeError: a package is not installed, the repository is gated, the hub cannot be reached, timm cannot be
            imported, or memory is too small; the message says what to do.
    """
    require("load", "transformers", "accelerate", extra="encoders")
    files, location = source.files, source.files.location
    with hub_errors(source.name, location), checkpoint_errors(location):
        files.get("config.json")
        config = files.read_json("config.json")
        prefix = weight_prefix(config)
    if "architecture" in config:
        check_timm(source.name)
    with hub_errors(source.name, location), checkpoint_errors(location):
        paths = find_weight_files(files, prefix, variant)
        processor = files.read_json("preprocessor_config.json")
        processor = processor or files.read_json("processor_config.json").get("image_processor", {})
        count = sum(count_parameters(path, prefix) for path in paths)
    check_memory(source.name, [count], dtype, device, offload)
    with checkpoint_errors(location):
        weights = read_weights(paths, prefix)
        if "architecture" in config:
            network, missing = create_timm(config["architecture"], files.get("config.json").parent, weights, dtype)
        else:
            network, missing = create_transformers(config, weights, dtype)
        if missing:
            raise ValueError(f"there are no weights for {min(missing)}")
    network.eval().requires_grad_(False)
    return network, {"mean": processor.get("image_mean"), "std": processor.get("image_std")}


def weight_prefix(config: dict[str, Any]) -> re.Pattern[str]:
    """Return what the names of an encoder's weights begin with; refuse a model of another type."""
    if "architecture" in config:  # of timm
        return re.compile("")
    model_type: Any = config.get("model_type")
    if model_type not in PREFIXES:
        raise ValueError(f"model_type must be one of {', '.join(PREFIXES)}, got {model_type!r}")
    return re.compile(PREFIXES[model_type])


def find_weight_files(files: Files, prefix: re.Pattern[str], variant: str | None) -> list[Path]:
    """Return the paths of the files that hold weights whose names begin so."""
    suffix = f".{variant}" if variant else ""
    shards = files.read_json(f"model.safetensors.index{suffix}.json").get("weight_map", {})
    names = {file for name, file in shards.items() if prefix.match(name)} or {f"model{suffix}.safetensors"}
    return [files.get(name) for name in sorted(names)]


def read_weights(paths: Sequence[Path], prefix: re.Pattern[str]) -> dict[str, Tensor]:
    """Return the weights whose names begin so, without that beginning."""
    weights: dict[str, Tensor] = {}
    for path in paths:
        with safe_open(path, "pt") as tensors:
            weights |= {
                prefix.sub("", name, count=1): tensors.get_tensor(name)
                for name in tensors.keys()  # noqa: SIM118 (not a mapping)
                if prefix.match(name)
            }
    return weights


def create_transformers(
    config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Any, list[str]]:
    """Return a vision encoder of transformers with its weights, and the names of weights that are missing."""
    import transformers

    settings = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)
    settings = getattr(settings, "vision_config", settings)
    kind: Any = transformers.MODEL_MAPPING[type(settings)]
    network, report = kind.from_pretrained(
        None, config=settings, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    return network, report["missing_keys"]


def create_timm(
    architecture: str, folder: Path, weights: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Any, list[str]]:
    """Return an encoder of timm with its weights, and the names of weights that are missing.

    Its config.json is in `folder`.
    """
    import timm
    from accelerate import init_empty_weights
    from timm.models import eva

    if architecture not in timm.list_models(module="eva"):
        raise ValueError(f"architecture must be one of timm's module eva, got {architecture!r}")
    with init_empty_weights(include_buffers=False):  # random weights would take minutes for four billion numbers
        network = timm.create_model(f"local-dir:{folder}", dynamic_img_size=True)
    weights = {name: weight.to(dtype) for name, weight in eva.checkpoint_filter_fn(weights, network).items()}
    missing = network.load_state_dict(weights, strict=False, assign=True).missing_keys
    return (network if missing else network.to(dtype)), missing


def check_timm(name: str) -> None:
    """Refuse a model that needs timm where timm cannot be imported."""
    require("load", "timm")
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:  # beside a torchvision of another torch
        reason = str(error).splitlines()[0]
        raise RuntimeError(
            f"load: {name} needs timm, which cannot be imported ({reason}): pip install timm, with "
            f"a torchvision that fits torch {torch.__version__}"
        ) from error
