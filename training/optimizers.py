"""The optimizers of the recipes, their learning rates, and averages of weights."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from interactdiff.errors import RecipeError
from interactdiff.training.config import RecipeConfig


def make_optimizers(parameters: list[nn.Parameter], config: RecipeConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or ("muon") Muon for matrices and kernels of convolutions and AdamW for the rest.

    Muon (Jordan et al. 2024) steps along the nearest orthogonal matrix to the momentum; its steps are scaled
    to the size of AdamW's (arXiv 2502.16982, section 2.2), so that both go by one learning rate.
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
    if not hasattr(torch.optim, "Muon"):
        raise RecipeError("optimizer: expected adamw, since muon needs torch 2.9, got 'muon'")
    matrices = [p for p in parameters if p.ndim == 2]
    kernels = [p for p in parameters if p.ndim == 4]
    others = [p for p in parameters if p.ndim not in (2, 4)]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **shared))
    if kernels:
        optimizers.append(KernelMuon(kernels, **shared))
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


_MUON: Any = getattr(torch.optim, "Muon", torch.optim.Optimizer)  # torch 2.9 has it


class KernelMuon(_MUON):
    """Muon for kernels of convolutions, [O, I, H, W], each taken as a matrix of O rows."""

    def __init__(self, kernels: list[nn.Parameter], **options: float):
        self._kernels = kernels
        self._matrices = [nn.Parameter(_as_matrix(kernel.detach())) for kernel in kernels]
        super().__init__(self._matrices, adjust_lr_fn="match_rms_adamw", **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step on the kernels themselves, which may have moved to another device meanwhile."""
        for kernel, matrix in zip(self._kernels, self._matrices, strict=True):
            matrix.data = _as_matrix(kernel.detach())
            matrix.grad = None if kernel.grad is None else _as_matrix(kernel.grad, kernel)
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the kernels' gradients."""
        super().zero_grad(set_to_none)
        for kernel in self._kernels:
            kernel.grad = None


def _as_matrix(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """[O, I, H, W] as [O, I * H * W], in the order in which a kernel (`like`, or itself) lies in memory.

    Of a kernel itself it is a view.
    """
    by_rows = (tensor if like is None else like).is_contiguous()
    return tensor.flatten(1) if by_rows else tensor.permute(0, 2, 3, 1).flatten(1)  # else channels last
