"""The precision of sums."""

import torch
from torch import Tensor


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which sums are taken: float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)
