"""Memory that weights need, and how they get to the device."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trace_fast.backbones.base import Backbone
from trace_fast.extras import require

__all__ = ["OFFLOADS", "check_memory", "count_parameters", "to_device"]

OFFLOADS = ("model", "sequential")
# main memory that looks taken may be freed or swapped out: weights are refused where they need this multiple of what is
# available, and below it there is a warning
CERTAIN = 2
MAX_HEADER = 100_000_000  # bytes of the header of a safetensors file, as in its specification
MEMORY_FILE = Path("/proc/meminfo")  # of Linux
UNCALLED = ["CLIPVisionEmbeddings", "EvaAttention"]  # modules that read the weights of a layer without calling it


def to_device(backbone: Backbone, device: torch.device, offload: str | None) -> Backbone:
    """Move a backbone to a device, or let accelerate move its parts there while they run.

    Args:
        backbone: it is changed in place.
        device: where it runs.
        offload: None moves all weights at once; "model" moves a part when it runs, "sequential" a layer.

    Returns:
        The same backbone.
    """
    parts = [part for name in ("vae", "network") if (part := getattr(backbone, name, None))]  # in the order of running
    if offload is None:
        for part in parts:
            part.to(device)
        return backbone
    require("load", "accelerate")
    from accelerate import cpu_offload, cpu_offload_with_hook

    if offload == "sequential":
        for part in parts:
            cpu_offload(part, device, preload_module_classes=UNCALLED)
        return backbone
    hooks: list[Any] = []
    for part in parts:
        hooks.append(cpu_offload_with_hook(part, device, *hooks[-1:])[1])
    if len(hooks) > 1:  # the first part moves the last one away when the next image comes
        hooks[0].hook.prev_module_hook = hooks[-1]
    return backbone


def check_memory(
    name: str, parts: Sequence[int], dtype: torch.dtype, device: torch.device, offload: str | None
) -> None:
    """Refuse weights that do not fit, before any are read; warn of those that may not fit into main memory.

    Args:
        name: the model, as the caller named it.
        parts: number of weights of each part that is moved at once.
        dtype: of the weights.
        device: where they run.
        offload: see `to_device`.

    Raises:
        RuntimeError: memory is too small; the message names the option with which the weights would fit.
    """
    missing = missing_memory(parts, dtype.itemsize, device, offload, CERTAIN)
    is_certain = missing is not None
    missing = missing or missing_memory(parts, dtype.itemsize, device, offload)
    if missing is None:
        return
    options = [f"offload={way!r}" for way in OFFLOADS if not missing_memory(parts, dtype.itemsize, device, way)]
    if dtype.itemsize > 2 and not missing_memory(parts, 2, device, offload):
        options.insert(0, "dtype=torch.bfloat16")
    needed, full = missing
    text = (
        f"load: {name} needs {needed / 2**30:.1f} GiB for its weights in {str(dtype).removeprefix('torch.')}, "
        f"{full} has {free_bytes(full) / 2**30:.1f} GiB free; "
        + (f"{options[0]} would fit" if options else "take a smaller model or a larger device")
    )
    if is_certain:
        raise RuntimeError(text)
    warnings.warn(text, stacklevel=2)


def missing_memory(
    parts: Sequence[int], itemsize: int, device: torch.device, offload: str | None, factor: float = 1
) -> tuple[int, torch.device] | None:
    """Return the bytes that are needed and the device that does not have them; None where all weights fit.

    Main memory counts `factor` times. What a GPU has free is known exactly.
    """
    needs = [(sum(parts), device if offload is None else torch.device("cpu"))]
    if offload == "model":
        needs.append((max(parts), device))
    for count, full in needs:
        if count * itemsize > free_bytes(full) * (factor if full.type == "cpu" else 1):
            return count * itemsize, full
    return None


def free_bytes(device: torch.device) -> float:
    """Return the memory that a device has for weights, in bytes, infinity where it is not known.

    Memory that caches of files, or of torch, would give back counts as free.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return math.inf
    with contextlib.suppress(ImportError):  # accelerate brings it, for every system
        psutil: Any = importlib.import_module("psutil")
        return int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError):
        if match := re.search(r"^MemAvailable: *(\d+) kB$", MEMORY_FILE.read_text(), re.MULTILINE):
            return int(match[1]) * 1024
    return math.inf


def count_parameters(path: Path, prefix: re.Pattern[str] = re.compile("")) -> int:
    """Return how many numbers a safetensors file holds, from its header alone.

    Args:
        path: of the file.
        prefix: count the tensors whose names begin so.

    Raises:
        ValueError: the header is damaged.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, MAX_HEADER)))
        shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__" and prefix.match(name)]
        return sum(math.prod(shape) for shape in shapes)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
