"""`trace_fast.edges`: one function, whichever stage of TRACE a model has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trace_fast.backbones import has_student, models
from trace_fast.detector import Detector
from trace_fast.io.images import check_output_type, convert_edges, error_context, read_image
from trace_fast.tracer import Tracer

__all__ = ["edge_finder", "edges"]


def edge_finder(model: str | Path, stage: int | None = None, device: str | None = None) -> Callable[..., Tensor]:
    """What finds the edges of images, loaded: images (B, 3, H, W) in [0, 1] to (B, 1, H, W) float32; see `edges`.

    The last four are kept, those of a folder until its files change.
    """
    if not isinstance(model, (str, Path)):
        raise TypeError(f"edges: model must be a name or a folder, got {type(model).__name__}")
    if not (stage is None or (isinstance(stage, int) and not isinstance(stage, bool) and stage in (1, 2))):
        raise ValueError(f"edges: stage must be 1, 2 or None, got {stage!r}")
    if model in models() or not Path(model).is_dir():
        return _load(str(model), stage, device, ())
    folder = Path(model).resolve()
    files = [path for pattern in ("*.*", "*/*.*") for path in sorted(folder.glob(pattern)) if path.is_file()]
    return _load(str(folder), stage, device, tuple(path.stat().st_mtime_ns for path in files))


@functools.lru_cache(maxsize=4)
def _load(model: str, stage: int | None, device: str | None, _: tuple[int, ...]) -> Callable[..., Tensor]:
    if stage == 2 or (stage is None and has_student(model)):
        detector = Detector.from_pretrained(model, device=device)
        return lambda pixels, **_: detector.edges(pixels)
    tracer = Tracer.from_pretrained(model, device=device)
    return lambda pixels, seed=0: tracer(pixels, seed=seed).edges


def edges(
    image: Any,
    *,
    model: str | Path = "mini",
    stage: int | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    output_type: str | None = None,
) -> Any:
    """Instance edges of an image: where one object ends and the next begins.

    Stage 1 is the search: 1 - exp(-ABDiv / s) of the self-attention of a diffusion model, read at the noise level that
    the model's settings say (TRACE, sections 3.1 and 3.2). Stage 2 is its one-step student (section 3.3).

    Args:
        image: a path, a PIL image of any mode, an (H, W) or (H, W, C) array with C = 1, 3 or 4, uint8, uint16 or float
            in [0, 1], a (C, H, W) or (B, C, H, W) tensor likewise, or a list of any of these, sizes mixed.
        model: a name of `trace_fast.models()`, a repository of the hub, or a local folder. With stage 2, those of a
            student, too. The last four used are kept loaded.
        stage: 1, 2, or None for 2 where the model has or is a student, and 1 where there is none.
        device: where to run; default a tensor's own device, else the GPU where there is one, else the CPU.
        seed: of the noise, where the search uses any.
        output_type: "np", "pt" or "pil" instead of the kind that follows from the input.

    Returns:
        Probability in [0, 1] at the input's size, float32: (H, W) array for a path, PIL image or array; (B, 1, H, W)
        tensor on the input's device for a tensor; a list for a list. As "pil", a greyscale 8-bit picture.

    Raises:
        TypeError: the image is of a kind or dtype that is not listed.
        ValueError: its shape or values are not usable, `model` is unknown or damaged, or has no such stage.

    Example:
        >>> import numpy, trace_fast
        >>> trace_fast.edges(numpy.zeros((48, 64, 3), "uint8")).shape
        (48, 64)
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError(f"edges: image must hold at least one image, got an empty {type(image).__name__}")
        found = []
        for index, item in enumerate(image):
            with error_context(index):
                found.append(edges(item, model=model, stage=stage, device=device, seed=seed, output_type=output_type))
        return found
    check_output_type(output_type)
    if device is None:
        device = image.device if isinstance(image, Tensor) else "cuda" if torch.cuda.is_available() else "cpu"
    find = edge_finder(model, stage, str(device))
    return convert_edges(find(read_image(image), seed=seed), image, output_type)
