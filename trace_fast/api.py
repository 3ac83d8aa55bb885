"""`trace_fast.load` and `trace_fast.edges`: which stage of TRACE serves a model is decided here and nowhere else."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor, nn

from trace_fast.backbones import find_source, models
from trace_fast.detector import Detector
from trace_fast.io.images import check_channel_order, check_output_type, convert_edges, map_images, read_image
from trace_fast.model import EdgeModel
from trace_fast.progress import LOGGER
from trace_fast.tracer import Tracer

if TYPE_CHECKING:
    import numpy as np

    from trace_fast.io.images import Picture, PictureLike

__all__ = ["edges", "load"]


class LoadOptions(TypedDict, total=False):
    """Keyword arguments of `load` that do not decide what it returns."""

    device: torch.device | str | None
    dtype: torch.dtype | None
    size: tuple[int, int] | None
    offload: str | None
    revision: str | None
    variant: str | None
    local_files_only: bool
    channel_order: str | None


class EdgesOptions(TypedDict, total=False):
    """Keyword arguments of `edges` that do not decide what it returns."""

    model: Any
    stage: int | None
    device: torch.device | str | None
    dtype: torch.dtype | None
    size: tuple[int, int] | None
    seed: int
    channel_order: str | None


@overload
def load(model: Any = "mini", *, stage: Literal[1], **options: Unpack[LoadOptions]) -> Tracer: ...


@overload
def load(model: Any = "mini", *, stage: Literal[2], **options: Unpack[LoadOptions]) -> Detector: ...


@overload
def load(model: Any = "mini", *, stage: int | None = None, **options: Unpack[LoadOptions]) -> Tracer | Detector: ...


def load(
    model: Any = "mini",
    *,
    stage: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    size: tuple[int, int] | None = None,
    offload: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
    channel_order: str | None = None,
) -> Tracer | Detector:
    """Load a model that finds instance edges: the one-step student where there is one, else the search.

    Both have the same interface: `model(image)` takes anything that `trace_fast.edges` takes, `model.edges(pixels)`
    takes and returns tensors, `model.to(device)` moves it, and `device`, `dtype`, `size` and `timestep` describe it.

    Args:
        model: a name of `trace_fast.models()`, a repository of the hub (owner/name), or a local folder: a student's, or
            one in the layout of diffusers, or of transformers, timm or ours with config.json and model.safetensors.
            Also a pipeline of diffusers or an encoder of transformers or timm, which is used as it is; a Tracer or a
            Detector is returned as it is.
        stage: 1 for the search (`Tracer`), 2 for the student (`Detector`); None is 2 where the model has or is a
            student, else 1.
        device: where to run; None is the GPU where there is one, else the CPU.
        dtype: of the weights; None is bfloat16 on a GPU (float16 before compute capability 8.0), and float32 on the CPU
            and for networks of this package.
        size: processing size in pixels, (height, width); None is the model's own, or the one that a student was trained
            at.
        offload: for a card that is too small. "model" keeps the weights in main memory and moves autoencoder and
            network to the device in turn, whole, while they run (diffusers' `enable_model_cpu_offload`); "sequential"
            does so layer by layer, which needs little of the device and is slower by far
            (`enable_sequential_cpu_offload`).
        revision: branch, tag or commit of a repository.
        variant: of the weight files, such as "fp16".
        local_files_only: never ask the hub; HF_HUB_OFFLINE=1 does the same.
        channel_order: order of the color channels in the arrays and tensors that the model will be called with: "rgb",
            or "bgr" as OpenCV, detectron2 and CutLER have them. None is "rgb", or what a loaded model has. Files and
            PIL images state it themselves, and `model.edges` takes RGB in any case.

    Returns:
        A `Tracer` (stage 1) or a `Detector` (stage 2).

    Raises:
        TypeError: `model` or `dtype` is of a kind that is not listed.
        ValueError: the name, `stage`, `offload` or `channel_order` is unknown, the model has no such stage, files are
            damaged or do not fit each other, or an option that chooses what to load is given with a model that is
            loaded already.
        RuntimeError: the device is not present, the repository is gated or out of reach, a package is needed and not
            installed, or memory is too small; the message says what to do.

    Example:
        >>> trace_fast.load("mini", device="cpu", size=(96, 128))
        Detector('mini', size=(96, 128), timestep=0, device='cpu', dtype=torch.float32)
    """
    check_stage(stage)
    if channel_order is not None:
        check_channel_order(channel_order)
    options: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "offload": offload,
        "revision": revision,
        "variant": variant,
        "local_files_only": local_files_only or None,
    }
    edge_model: Tracer | Detector
    if not isinstance(model, (str, Path)):
        edge_model = use_loaded(model, stage, size, options)
    else:
        options["local_files_only"] = local_files_only
        if stage is None:
            source = find_source(model, revision=revision, local_files_only=local_files_only)
            stage = 1 if source.student is None else 2
        edge_model = (Tracer if stage == 1 else Detector).from_pretrained(model, size=size, **options)
    LOGGER.debug("loaded %r", edge_model)
    return edge_model if channel_order is None else edge_model.reordered(channel_order)


def use_loaded(
    model: Any, stage: int | None, size: tuple[int, int] | None, options: dict[str, Any]
) -> Tracer | Detector:
    """Return a model that is in memory already as a Tracer or Detector; refuse options that choose what to load."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"load: {name} must be None for a model that is loaded already, got {value!r} with a "
                f"{type(model).__name__}"
            )
    if isinstance(model, EdgeModel):
        edge_model: Any = model if size is None else model.resized(size)
    elif isinstance(model, nn.Module):
        edge_model = Tracer.from_encoder(model, size=size)
    elif hasattr(model, "unet") or hasattr(model, "transformer"):
        edge_model = Tracer.from_pipeline(model, size=size)
    else:
        raise TypeError(
            "load: model must be a name, a folder, a Tracer, a Detector, a pipeline of diffusers or an encoder, got "
            f"{type(model).__name__}"
        )
    loaded_stage = 2 if isinstance(edge_model, Detector) else 1
    if stage not in (None, loaded_stage):
        raise ValueError(f"load: stage must be {loaded_stage} or None for this {type(model).__name__}, got {stage}")
    return edge_model


def check_stage(stage: Any) -> None:
    """Refuse a stage that is not 1, 2 or None."""
    if not (stage is None or (isinstance(stage, int) and not isinstance(stage, bool) and stage in (1, 2))):
        raise ValueError(f"load: stage must be 1, 2 or None, got {stage!r}")


@overload
def edges(image: Tensor, *, output_type: None = None, **options: Unpack[EdgesOptions]) -> Tensor: ...


@overload
def edges(image: PictureLike, *, output_type: None = None, **options: Unpack[EdgesOptions]) -> np.ndarray: ...


@overload
def edges(
    image: list[Tensor] | tuple[Tensor, ...], *, output_type: None = None, **options: Unpack[EdgesOptions]
) -> list[Tensor]: ...


@overload
def edges(
    image: list[Picture] | tuple[Picture, ...], *, output_type: None = None, **options: Unpack[EdgesOptions]
) -> list[np.ndarray]: ...


@overload
def edges(image: Any, *, output_type: str | None = None, **options: Unpack[EdgesOptions]) -> Any: ...


def edges(
    image: Any,
    *,
    model: Any = "mini",
    stage: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    output_type: str | None = None,
    channel_order: str | None = None,
) -> Any:
    """Return the instance edges of an image: where one object ends and the next begins.

    Stage 1 is the search: 1 - exp(-ABDiv / s) of the self-attention of a diffusion model, read at the timestep that the
    model's settings say (TRACE, sections 3.1 and 3.2). Stage 2 is its one-step student (section 3.3).

    Args:
        image: a path, a PIL image of any mode, an (H, W) or (H, W, C) array with C = 1, 3 or 4, uint8, uint16 or float
            in [0, 1], a (C, H, W) or (B, C, H, W) tensor likewise, or a list of any of these, sizes mixed.
        model: a name of `trace_fast.models()`, a repository of the hub, a local folder, or a model in memory; see
            `trace_fast.load`. The last four names and folders used are kept loaded. A pipeline's empty prompt is
            embedded at every call: `load` it once for many images.
        stage: 1, 2, or None for 2 where the model has or is a student, else 1.
        device: where to run; None is a tensor's own device, else the GPU where there is one, else the CPU.
        dtype: of the weights; see `trace_fast.load`.
        size: processing size in pixels, (height, width); None is the model's own.
        seed: seed of the Gaussian noise, where the search draws any.
        output_type: "np", "pt" or "pil" instead of the kind that follows from the input.
        channel_order: order of the color channels of arrays and tensors: "rgb", or "bgr" as OpenCV's `imread` returns
            them. None is "rgb", or that of a model in memory. Files and PIL images state it themselves.

    Returns:
        Probability in [0, 1] at the input's size, float32: (H, W) array for a path, PIL image or array; (B, 1, H, W)
        tensor on the input's device for a tensor; a list for a list. As "pil", a grayscale 8-bit picture.

    Raises:
        TypeError: the image is of a kind or dtype that is not listed.
        ValueError: its shape or values are not usable, or `load` refuses the model.

    Example:
        >>> import numpy, trace_fast
        >>> trace_fast.edges(numpy.zeros((48, 64, 3), "uint8")).shape
        (48, 64)
    """
    check_output_type(output_type)
    named = isinstance(model, (str, Path))
    loaded = None if named else load(model, stage=stage, device=device, dtype=dtype, size=size)
    own_order = loaded.channel_order if loaded else "rgb"
    order = own_order if channel_order is None else channel_order
    check_channel_order(order)

    def find_edges(item: Any) -> Any:
        item_device = item.device if device is None and isinstance(item, Tensor) else device
        pixels = read_image(item, order)  # before a model is loaded, which may take minutes
        edge_model = loaded or load_cached(model, stage, item_device, dtype, size)
        return convert_edges(edge_model.edges(pixels, seed=seed), item, output_type)

    return map_images(find_edges, image)


def load_cached(
    model: str | Path,
    stage: int | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    size: tuple[int, int] | None,
) -> Tracer | Detector:
    """Return a model by name from the last four that were used; a folder is read again after its files change."""
    check_stage(stage)
    name = str(model)
    times: tuple[int, ...] = ()
    if name not in models() and os.path.isdir(model):
        folder = Path(model).resolve()
        files = [path for pattern in ("*.*", "*/*.*") for path in sorted(folder.glob(pattern)) if path.is_file()]
        name, times = str(folder), tuple(path.stat().st_mtime_ns for path in files)
    return _load_once(name, stage, None if device is None else str(device), dtype, size, times)


@functools.lru_cache(maxsize=4)
def _load_once(
    model: str,
    stage: int | None,
    device: str | None,
    dtype: torch.dtype | None,
    size: tuple[int, int] | None,
    _: tuple[int, ...],
) -> Tracer | Detector:
    return load(model, stage=stage, device=device, dtype=dtype, size=size)
