"""What a frozen base has learnt to predict, and the loss of an adapter by it: diffusion and rectified flow.

Noise and times are drawn for each example from a generator of its own, so that they are the same at any
number of processes, micro-batches and loaders.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from torch import Tensor

from interactdiff.errors import RecipeError
from interactdiff.training.interaction_config import LossConfig

PREDICTIONS = ("epsilon", "v_prediction")


class Objective(Protocol):
    """How latents are made noisy, and what is to be predicted of them."""

    def draw(self, latents: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """An example's random numbers: "noise" [C, H, W] and "times" [], of its latents [C, H, W]."""
        ...

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Noisy latents, [B, C, H, W] as the latents are."""
        ...

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What is to be predicted, [B, C, H, W]."""
        ...

    def weights(self, times: Tensor) -> Tensor:
        """[B] what each example's squared error counts."""
        ...


class Diffusion:
    """A U-Net's: epsilon or v at whole timesteps, by the schedule of its scheduler's configuration.

    Args:
        scheduler: the configuration of the pipeline's scheduler.
        config: of the loss.

    Raises:
        RecipeError: the base predicts something else.
    """

    def __init__(self, scheduler: Mapping[str, Any], config: LossConfig):
        self.config = config
        self.scheduler: Any = DDPMScheduler.from_config(dict(scheduler))
        self.prediction = self.scheduler.config.prediction_type
        if self.prediction not in PREDICTIONS:
            raise RecipeError(f"expected a base that predicts epsilon or v, got {self.prediction!r}")

    def draw(self, latents: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """See `Objective`."""
        noise = torch.randn(latents.shape, generator=generator)
        if self.config.noise_offset:
            offset = torch.randn(len(latents), 1, 1, generator=generator)
            noise = noise + self.config.noise_offset * offset
        count = self.scheduler.config.num_train_timesteps
        uniform = torch.rand((), generator=generator) ** self.config.timestep_power
        return {"noise": noise, "times": (uniform * count).long().clamp(max=count - 1)}

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """See `Objective`."""
        return self.scheduler.add_noise(latents, noise, times)

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """See `Objective`."""
        return noise if self.prediction == "epsilon" else self.scheduler.get_velocity(latents, noise, times)

    def weights(self, times: Tensor) -> Tensor:
        """1, or min-SNR's (arXiv 2303.09556): min(snr, gamma) over snr for epsilon, over snr + 1 for v."""
        if self.config.snr_gamma is None:
            return torch.ones(times.shape, device=times.device)
        snr = compute_snr(self.scheduler, times).float()
        least = snr.clamp(max=self.config.snr_gamma)
        if self.prediction == "v_prediction":
            return least / (snr + 1)
        return torch.where(snr > 0, least / snr.clamp(min=1e-12), 1.0)


class Flow:
    """A transformer's: of x_s = (1 - s) x + s n the flow n - x (arXiv 2403.03206, section 3).

    Times are drawn as "uniform", "logit_normal" or "mode" (section 3.1) and then shifted to noise,
    s <- f s / (1 + (f - 1) s), by the factor f that the scheduler draws by at the picture's size.

    Args:
        scheduler: the configuration of the pipeline's scheduler.
        config: of the loss.
        patch: latents a token's side has.
    """

    def __init__(self, scheduler: Mapping[str, Any], config: LossConfig, patch: int = 2):
        self.scheduler, self.config, self.patch = dict(scheduler), config, patch

    def shift(self, latents: Tensor) -> float:
        """The factor f for latents [..., H, W]."""
        if self.config.shift is not None:
            return self.config.shift
        options = self.scheduler
        if not options.get("use_dynamic_shifting"):
            return options.get("shift", 1.0)
        tokens = latents.shape[-2] * latents.shape[-1] / self.patch**2
        low, high = options["base_image_seq_len"], options["max_image_seq_len"]
        slope = (options["max_shift"] - options["base_shift"]) / (high - low)
        mu = options["base_shift"] + slope * (tokens - low)
        return math.exp(mu) if options.get("time_shift_type", "exponential") == "exponential" else mu

    def draw(self, latents: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """See `Objective`."""
        config = self.config
        noise = torch.randn(latents.shape, generator=generator)
        drawn: Any = compute_density_for_timestep_sampling(
            config.density,
            1,
            config.logit_mean,
            config.logit_std,
            config.mode_scale,
            generator=generator,
        )
        factor = self.shift(latents)
        return {"noise": noise, "times": (factor * drawn / (1 + (factor - 1) * drawn))[0]}

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """See `Objective`."""
        share = times[:, None, None, None]
        return (1 - share) * latents + share * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """See `Objective`."""
        return noise - latents

    def weights(self, times: Tensor) -> Tensor:
        """Those of the times' weighting (arXiv 2403.03206, section 3.1): none, "sigma_sqrt" or "cosmap"."""
        return compute_loss_weighting_for_sd3(self.config.weighting, times).float()


def weighted_loss(error: Tensor, weights: Tensor, inside: Tensor | None = None, more: float = 0.0) -> Tensor:
    """The mean of the examples' mean squared errors.

    Args:
        error: [B, C, H, W], squared.
        weights: [B] of the examples.
        inside: [B, 1, H, W], 1 in boxes and else 0.
        more: how much more than others latents inside count.
    """
    if inside is None or not more:
        return (error.flatten(1).mean(1) * weights).mean()
    counts = 1 + more * inside
    each = (error.mean(1, keepdim=True) * counts).flatten(1).sum(1) / counts.flatten(1).sum(1)
    return (each * weights).mean()
