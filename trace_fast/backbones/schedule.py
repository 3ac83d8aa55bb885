"""Noise levels: how a latent at level t is made by noising or inversion, in float32, apart from any sampler."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["VariancePreserving"]


@dataclass(frozen=True)
class VariancePreserving:
    """The discrete variance-preserving schedule of Stable Diffusion.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, with abar_t the running product of 1 - beta and sqrt(beta) linear
    in t. Level 0 is all but clean (abar = 0.99915); inversion starts there from the latent as it is, as samplers do.
    """

    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012

    def coefficients(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """(signal, noise) factors, each (B, 1, 1, 1) float32, of integer levels (B,) in 0 .. steps - 1."""
        abar = _cumulative_products(self, timestep.device)[timestep][:, None, None, None]
        return abar.sqrt(), (1 - abar).sqrt()

    def noise(self, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Independent Gaussian noising: the latent (B, C, h, w) mixed with unit noise at levels (B,)."""
        signal, sigma = self.coefficients(timestep)
        return signal * latent + sigma * noise

    def velocity(self, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What a v-predicting network is trained to return: sqrt(abar) noise - sqrt(1 - abar) latent."""
        signal, sigma = self.coefficients(timestep)
        return signal * noise - sigma * latent

    def invert(self, sample: Tensor, prediction: Tensor, timestep: Tensor, following: Tensor) -> Tensor:
        """One deterministic DDIM inversion step, from levels (B,) to the noisier levels `following` (B,).

        `prediction` is the velocity of `sample`, shaped like it.
        """
        signal, sigma = self.coefficients(timestep)
        latent = signal * sample - sigma * prediction
        noise = sigma * sample + signal * prediction
        return self.noise(latent, noise, following)


@functools.lru_cache(maxsize=16)
def _cumulative_products(schedule: VariancePreserving, device: torch.device) -> Tensor:
    """The product abar at every level, (steps,) float32, worked out in float64 and copied to the device once."""
    roots = torch.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, schedule.steps, dtype=torch.float64)
    return (1 - roots.square()).cumprod(0).to(device, torch.float32)
