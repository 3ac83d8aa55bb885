"""Networks that are already in memory, as backbones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from trace_fast.backbones.base import Backbone
from trace_fast.backbones.capture import unwrap_compiled
from trace_fast.backbones.latent import get_network
from trace_fast.backbones.registry import (
    ENCODER_FAMILIES,
    LANGUAGE_FAMILIES,
    PIPELINE_FAMILIES,
    explain_refusal,
    find_family,
)
from trace_fast.ops import checks

__all__ = ["wrap_encoder", "wrap_pipeline"]

READ = {"vision": ENCODER_FAMILIES, "language": LANGUAGE_FAMILIES}


def wrap_pipeline(
    pipe: Any, empty_prompt: dict[str, Tensor] | None = None, size: tuple[int, int] | None = None
) -> Backbone:
    """Return a backbone that reads the network of a diffusers pipeline; see `Tracer.from_pipeline`."""
    name = type(unwrap_compiled(get_network(pipe))).__name__
    family = find_family(name, PIPELINE_FAMILIES)
    if family is None:
        raise TypeError(f"from_pipeline: pipe {explain_refusal(name, PIPELINE_FAMILIES)} in {type(pipe).__name__}")
    return family.from_pipeline(pipe, empty_prompt, size)


def wrap_encoder(
    model: Any,
    *,
    read: str = "vision",
    size: tuple[int, int] | None = None,
    blocks: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Backbone:
    """Return a backbone that reads an encoder of transformers or timm, or what holds one; see `Tracer.from_encoder`."""
    checks.choice("from_encoder", "read", read, *READ)
    families = READ[read]
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if (family := find_family(type(unwrap_compiled(module)).__name__, families)) is not None:
            return family.from_model(module, size=size, blocks=blocks, mean=mean, std=std)
    raise TypeError(f"from_encoder: model must be or hold one of {', '.join(families)}, got {type(model).__name__}")
