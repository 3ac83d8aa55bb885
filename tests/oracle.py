"""An independent witness of what attention is computed from."""

import torch
from torch.overrides import TorchFunctionMode


class AttentionOracle(TorchFunctionMode):
    """Records query and key of every scaled_dot_product_attention, knowing nothing of the network."""

    def __init__(self):
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            query, key = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key")))
            self.calls.append((query.clone(), key.clone()))
        return function(*args, **kwargs)
