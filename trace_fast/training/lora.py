"""Low-rank adapters on the self-attention of a network."""

from __future__ import annotations

from torch import nn

from trace_fast.backbones.base import Backbone
from trace_fast.extras import require

__all__ = ["inject"]


def inject(backbone: Backbone, rank: int) -> dict[str, nn.Parameter]:
    """Put adapters on the projections that a family declares for its self-attention, and return their parameters.

    Products start at zero, so that the network is unchanged at first. No other parameter of it is trained.

    Args:
        backbone: its network is changed in place.
        rank: of the adapters.

    Returns:
        Parameters by name, float32.

    Raises:
        ValueError: a self-attention that is read has none of the projections, so that it would not be trained.
    """
    require("distill", "peft")
    from peft import LoraConfig, inject_adapter_in_model

    network, attentions = backbone.network, backbone.attentions()
    names = {id(module): name for name, module in network.named_modules()}
    targets = []
    for module in attentions:
        children = dict(module.named_children())
        targets += [
            f"{names[id(module)]}.{projection}"
            for projection in backbone.find_layout(module).adapters
            if projection.partition(".")[0] in children
        ]
    network.requires_grad_(False)
    if targets:
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), network)
    parameters = {}
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            parameters[name.replace(".default", "")] = parameter
    if without := [
        names[id(module)]
        for module in attentions
        if not any(name.startswith(f"{names[id(module)]}.") for name in parameters)
    ]:
        raise ValueError(
            f"distill: every self-attention must have a projection that {type(backbone).__name__} declares for "
            f"adapters, got none in {', '.join(without)}"
        )
    return parameters
