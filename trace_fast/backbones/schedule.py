"""Timesteps: how a latent at timestep t is made by noising or inversion, in float32, apart from any sampler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trace_fast.ops import checks
from trace_fast.ops.constants import cache_constants

__all__ = ["RectifiedFlow", "Schedule", "VariancePreserving"]


class Schedule(Protocol):
    """The meaning of a network's timesteps, integers from 0 (image) to 999 (noise)."""

    def noise(self, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Return the latent (B, C, h, w) mixed with unit noise, independently at timesteps (B,)."""

    def invert(self, sample: Tensor, prediction: Tensor, timestep: Tensor, following: Tensor) -> Tensor:
        """Return the sample after one deterministic inversion step, from timesteps (B,) to noisier ones, `following`.

        `prediction` is what the network makes of `sample`, shaped like it.
        """

    def denoise(self, sample: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """Return the clean latent that the network predicts of `sample` at timesteps (B,)."""


@dataclass(frozen=True)
class VariancePreserving:
    """The discrete variance-preserving schedule of DDPM and Stable Diffusion.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, with abar_t the running product of 1 - beta, and beta or, where
    `scaled`, sqrt(beta) linear in t. Timestep 0 is all but clean (abar = 0.99915); inversion starts there from the
    latent as it is, as samplers do. The network predicts the noise (epsilon) or the velocity.

    With `zero_terminal`, sqrt(abar) is shifted and scaled so that the last timestep is all but pure noise (2^-24, as
    samplers have it) and the first stays what it was.
    """

    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    scaled: bool = True
    prediction: str = "velocity"
    zero_terminal: bool = False

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> VariancePreserving:
        """Return the schedule that a diffusers scheduler's configuration describes, whatever its sampler.

        Raises:
            TypeError, ValueError: it describes another kind of schedule or prediction, or none.
        """
        config: Mapping[str, Any] = scheduler.config
        betas = config.get("beta_schedule", "linear")
        predicted = str(config.get("prediction_type", "epsilon"))
        prediction = {"epsilon": "epsilon", "v_prediction": "velocity"}.get(predicted)
        if betas not in ("linear", "scaled_linear") or config.get("trained_betas") is not None or prediction is None:
            raise ValueError(
                "load: scheduler must have linear or scaled_linear betas and predict epsilon or v_prediction, got "
                f"{betas}, trained_betas {config.get('trained_betas')}, {predicted}"
            )
        if missing := [name for name in ("beta_start", "beta_end", "num_train_timesteps") if name not in config]:
            kind = type(scheduler).__name__
            raise ValueError(f"load: scheduler must have {' and '.join(missing)}, got {kind} without, of another kind")
        if config["num_train_timesteps"] != cls.steps:
            raise ValueError(f"load: scheduler must have {cls.steps} timesteps, got {config['num_train_timesteps']}")
        for name in ("beta_start", "beta_end"):
            checks.number("load", name, config[name], 0, 1)
        return cls(
            beta_start=config["beta_start"],
            beta_end=config["beta_end"],
            scaled=betas == "scaled_linear",
            prediction=prediction,
            zero_terminal=bool(config.get("rescale_betas_zero_snr")),
        )

    def coefficients(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of signal and noise, each (B, 1, 1, 1) float32, at timesteps (B,) from 0 to steps - 1."""
        abar = _cumulative_products(self, timestep.device)[timestep][:, None, None, None]
        return abar.sqrt(), (1 - abar).sqrt()

    def noise(self, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Return the latent (B, C, h, w) mixed with unit noise, independently at timesteps (B,)."""
        signal, sigma = self.coefficients(timestep)
        return signal * latent + sigma * noise

    def velocity(self, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Return what a v-predicting network is trained on: sqrt(abar) noise - sqrt(1 - abar) latent."""
        signal, sigma = self.coefficients(timestep)
        return signal * noise - sigma * latent

    def invert(self, sample: Tensor, prediction: Tensor, timestep: Tensor, following: Tensor) -> Tensor:
        """Return the sample after one step of DDIM inversion, from timesteps (B,) to noisier ones, `following`.

        `prediction` is the noise or velocity that the network sees in `sample`, shaped like it.
        """
        signal, sigma = self.coefficients(timestep)
        noise = prediction if self.prediction == "epsilon" else sigma * sample + signal * prediction
        return self.noise(self.denoise(sample, prediction, timestep), noise, following)

    def denoise(self, sample: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """Return the clean latent that the network predicts of `sample` at timesteps (B,)."""
        signal, sigma = self.coefficients(timestep)
        if self.prediction == "epsilon":
            return (sample - sigma * prediction) / signal
        return signal * sample - sigma * prediction


@dataclass(frozen=True)
class RectifiedFlow:
    """The straight path of Stable Diffusion 3 and FLUX.1: x = (1 - sigma) x_0 + sigma noise, sigma = t / steps.

    Sigma is not shifted: the shift of their samplers only decides at which timesteps they run. The network predicts the
    velocity noise - x_0.
    """

    steps: int = 1000

    def sigma(self, timestep: Tensor) -> Tensor:
        """Return the share of noise, (B, 1, 1, 1) float32, at timesteps (B,)."""
        return (timestep.float() / self.steps)[:, None, None, None]

    def noise(self, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Return the latent (B, C, h, w) mixed with unit noise, independently at timesteps (B,)."""
        sigma = self.sigma(timestep)
        return (1 - sigma) * latent + sigma * noise

    def invert(self, sample: Tensor, prediction: Tensor, timestep: Tensor, following: Tensor) -> Tensor:
        """Return the sample after one Euler step away from the image, from timesteps (B,) to noisier ones, `following`.

        `prediction` is the velocity of `sample`, shaped like it.
        """
        return sample + (self.sigma(following) - self.sigma(timestep)) * prediction

    def denoise(self, sample: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """Return the clean latent that the network predicts of `sample` at timesteps (B,)."""
        return sample - self.sigma(timestep) * prediction


@cache_constants(maxsize=16)
def _cumulative_products(schedule: VariancePreserving, device: torch.device) -> Tensor:
    """Return the product abar at every timestep, (steps,) float32, computed in float64 and copied once."""
    power = 0.5 if schedule.scaled else 1
    roots = torch.linspace(schedule.beta_start**power, schedule.beta_end**power, schedule.steps, dtype=torch.float64)
    abar = (1 - roots ** (1 / power)).cumprod(0)
    if schedule.zero_terminal:
        signal = abar.sqrt()
        signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
        abar = signal.square().clamp(min=2**-24)
    return abar.to(device, torch.float32)
