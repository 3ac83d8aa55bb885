"""Load a backbone, of whichever kind its model is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from trace_fast.backbones.base import Backbone, default_dtype
from trace_fast.backbones.loading.encoders import load_encoder
from trace_fast.backbones.loading.hub import checkpoint_errors, hub_errors
from trace_fast.backbones.loading.memory import OFFLOADS, to_device
from trace_fast.backbones.loading.pipelines import load_pipeline
from trace_fast.backbones.loading.sources import CONFIG, Kind, Source, find_source
from trace_fast.backbones.registry import NETWORK_FAMILIES, find_family, models
from trace_fast.backbones.wrap import wrap_encoder, wrap_pipeline
from trace_fast.ops import checks

__all__ = ["load_backbone"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights


def load_backbone(
    model: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    size: tuple[int, int] | None = None,
    offload: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
    empty_prompt: dict[str, Tensor] | None = None,
    prepare: Callable[[Backbone], None] | None = None,
) -> Backbone:
    """Load a model by its name, folder or repository, and move it to a device.

    Args:
        model: see `find_source`.
        device: where it runs.
        dtype: of the weights, float32, bfloat16 or float16; default bfloat16 on a GPU (float16 before compute
            capability 8.0), float32 on the CPU and for networks of this package.
        size: processing size in pixels, (height, width); None is the model's own.
        offload: None, "model" or "sequential", see `to_device`.
        revision: branch, tag or commit of a repository.
        variant: of its weight files, such as "fp16".
        local_files_only: never ask the hub.
        empty_prompt: the embedded empty prompt of a diffusers model, by the names of the network's arguments, each with
            a batch of 1. Its text encoders are then not needed.
        prepare: called with the backbone while its weights are in main memory, before it is moved or offloaded.

    Returns:
        The backbone, in evaluation mode and without gradients.

    Raises:
        TypeError: dtype is of another kind.
        ValueError: the name is unknown, or the files are missing, damaged, or do not fit each other.
        RuntimeError: the repository is gated or cannot be reached, or memory is too small.

    Example:
        >>> load_backbone("mini", device=torch.device("cpu"), size=(64, 96)).grids((64, 96))[0]
        (16, 24)
    """
    check_options(dtype, offload)
    source = find_source(model, revision=revision, local_files_only=local_files_only)
    check_base(source)
    precision = dtype or default_dtype(device)
    if source.kind is Kind.NETWORK:
        backbone = load_network(source, size)
        backbone.network.eval().requires_grad_(False).to(dtype or torch.float32)
    elif source.kind is Kind.ENCODER:
        network, pixels = load_encoder(source, device=device, dtype=precision, offload=offload, variant=variant)
        backbone = wrap_encoder(network, size=size, **pixels)
    else:
        pipe, empty_prompt = load_pipeline(
            source, device=device, dtype=precision, offload=offload, variant=variant, empty_prompt=empty_prompt
        )
        backbone = wrap_pipeline(pipe, empty_prompt, size)
    if prepare is not None:
        prepare(backbone)
    return to_device(backbone, device, offload)


def check_options(dtype: torch.dtype | None, offload: str | None) -> None:
    """Refuse a dtype that weights do not have, and an unknown way to offload."""
    if not (dtype is None or (isinstance(dtype, torch.dtype) and dtype in DTYPES)):
        raise TypeError(f"load: dtype must be {' or '.join(map(str, DTYPES))}, got {dtype!r}")
    checks.choice("load", "offload", offload, *OFFLOADS, None)


def check_base(source: Source) -> None:
    """Refuse what holds no network: an unknown name, and a student without its base model."""
    if source.kind is Kind.STUDENT:
        raise ValueError(
            f"load: model must be a base model for the search, got the student {source.name!r}; load it with stage=2"
        )
    if os.path.isfile(source.name):
        raise ValueError(f"load: model must be a folder, got the file {source.name!r}; name the folder that it is in")
    if source.kind is Kind.UNKNOWN:
        raise ValueError(
            f"load: model must be one of {', '.join(models())}, a repository of the hub (owner/name), or a folder with "
            f"config.json and model.safetensors or in the layout of diffusers, got {source.name!r}"
        )


def load_network(source: Source, size: tuple[int, int] | None) -> Backbone:
    """Return a network of this package, from its config.json and model.safetensors."""
    location = source.files.location
    with hub_errors(source.name, location), checkpoint_errors(location):
        path = source.files.get(CONFIG)
        source.files.get("model.safetensors")
        config = json.loads(path.read_text())
        family = find_family(config["family"], NETWORK_FAMILIES)
        if family is None:
            raise ValueError(f"family must be one of {', '.join(NETWORK_FAMILIES)}, got {config['family']!r}")
        backbone = family.from_folder(path.parent, config)
    return backbone if size is None else type(backbone)(backbone.network, replace(backbone.settings, size=size))
