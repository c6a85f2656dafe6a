"""The optimizers of the recipes, their learning rates, and averages of weights."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from interactdiff.errors import RecipeError
from interactdiff.training.config import RecipeConfig
from interactdiff.training.muon import Muon


def make_optimizers(parameters: list[nn.Parameter], config: RecipeConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or ("muon") Muon for matrices and kernels of convolutions and AdamW for the rest.

    Muon's steps are scaled to the size of AdamW's, so that both go by one learning rate.
    "adamw8bit" is that of bitsandbytes, "prodigy" that of prodigyopt (arXiv 2306.06101), whose learning rate
    is 1.

    Raises:
        RecipeError: the optimizer's package is missing.
    """
    shared: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(parameters, betas=(0.9, 0.99), fused=True, **shared)]
    if config.optimizer in _OPTIONAL:
        return [_optional(config.optimizer)(parameters, **shared)]
    matrices = [p for p in parameters if p.ndim in (2, 4)]
    others = [p for p in parameters if p.ndim not in (2, 4)]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices, **shared))
    if others:
        optimizers.append(torch.optim.AdamW(others, betas=(0.9, 0.99), fused=True, **shared))
    return optimizers


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: RecipeConfig, minutes: Callable[[], float]
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of an optimizer's learning rate.

    Args:
        optimizer: whose rate it is.
        config: of the run.
        minutes: since the training began, by which "cosine_by_time" goes.
    """
    if config.lr_scheduler != "cosine_by_time":
        # diffusers' "constant" ignores the warm-up
        name = "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler
        return get_scheduler(
            name,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.steps,
        )

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, minutes() / config.stop_after)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@contextmanager
def averaged(ema: EMAModel, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside the block, parameters hold their moving averages."""
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def _adamw8bit() -> Callable[..., torch.optim.Optimizer]:
    from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

    return AdamW8bit


def _prodigy() -> Callable[..., torch.optim.Optimizer]:
    from prodigyopt import Prodigy  # pyright: ignore[reportMissingImports]

    return Prodigy


_OPTIONAL = {"adamw8bit": (_adamw8bit, "bitsandbytes"), "prodigy": (_prodigy, "prodigyopt")}


def _optional(name: str) -> Callable[..., torch.optim.Optimizer]:
    load, package = _OPTIONAL[name]
    try:
        return load()
    except ImportError:
        raise RecipeError(
            f"optimizer: expected the package {package} for {name}, got none: pip install {package}"
        ) from None
