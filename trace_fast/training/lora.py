"""Low-rank adapters on the self-attention of a network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

__all__ = ["inject"]

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")  # of every self-attention that is read


def inject(network: nn.Module, attentions: Sequence[nn.Module], rank: int) -> dict[str, nn.Parameter]:
    """Put adapters on the projections of self-attention modules; their parameters by name, float32.

    Products start at zero, so that the network is unchanged at first.
    """
    from peft import LoraConfig, inject_adapter_in_model

    chosen = {id(module) for module in attentions}
    targets = [
        f"{place}.{projection}"
        for place, module in network.named_modules()
        if id(module) in chosen
        for projection in PROJECTIONS
        if projection.split(".")[0] in dict(module.named_children())
    ]
    network.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), network)
    found = {}
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            found[name.replace(".default", "")] = parameter
    return found
