"""Convolutions with standardized kernels, which train as well as with batch normalization, and do without it in use.

Every kernel is trained as a direction and a length: its mean is subtracted, and it is scaled to the length (Qiao et
al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization", 2019). Unlike batch
normalization, this does not depend on the other images of a batch, so that photos and scenes can be mixed, and a batch
can be shared by processes. A student's files hold the kernels that result.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trace_fast.decoder import Decoder

__all__ = ["fold_kernels", "standardize_kernels"]


class StandardizedKernels(nn.Module):
    """The parametrization of a convolution's kernels by direction and length."""

    def forward(self, direction: Tensor, length: Tensor) -> Tensor:
        """Return kernels (outputs, inputs, r, c) of mean 0 and of `length` (outputs, 1, 1, 1)."""
        centered = direction - direction.mean((1, 2, 3), keepdim=True)
        return centered * (length / measure(centered))

    def right_inverse(self, kernels: Tensor) -> tuple[Tensor, Tensor]:
        """Return direction and length of kernels."""
        return kernels, measure(kernels - kernels.mean((1, 2, 3), keepdim=True))


def measure(kernels: Tensor) -> Tensor:
    """Return the length of every kernel, (outputs, 1, 1, 1)."""
    return torch.linalg.vector_norm(kernels, dim=(1, 2, 3), keepdim=True) + 1e-6


def standardize_kernels(decoder: Decoder) -> None:
    """Train the kernels of a decoder by direction and length from now on, where the decoder is made for it.

    Args:
        decoder: changed in place; see `Decoder.standardized`.

    Example:
        >>> decoder = make_decoder("unet", (4, 6), columns=8, channels=4)
        >>> standardize_kernels(decoder)
        >>> "down.0.0.parametrizations.weight.original1" in dict(decoder.named_parameters())
        True
    """
    for convolution in decoder.standardized():
        parametrize.register_parametrization(convolution, "weight", StandardizedKernels())


def fold_kernels(decoder: Decoder) -> Decoder:
    """Return a copy of a decoder whose parameters are plain kernels, as a student's files hold them.

    Args:
        decoder: see `standardize_kernels`.

    Example:
        >>> decoder = make_decoder("unet", (4, 6), columns=8, channels=4)
        >>> standardize_kernels(decoder)
        >>> "down.0.0.weight" in dict(fold_kernels(decoder).named_parameters())
        True
    """
    folded = copy.deepcopy(decoder)
    for convolution in folded.standardized():
        if parametrize.is_parametrized(convolution):
            parametrize.remove_parametrizations(convolution, "weight")
    return folded
