"""Muon, for matrices and for kernels of convolutions (Jordan et al. 2024).

Source: https://kellerjordan.github.io/posts/muon/. `torch.optim.Muon` computes in bfloat16 on every device,
which takes most of a step on a CPU without bfloat16 instructions, and it refuses kernels.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration
ITERATIONS = 5


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices near the nearest semi-orthogonal ones, by Newton-Schulz iteration.

    Args:
        matrices: [N, R, C].

    Returns:
        [N, R, C], with singular values of about 0.7 to 1.2.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalized momentum (Nesterov's), scaled to the size of AdamW's steps.

    The scale is that of arXiv 2502.16982, section 2.2, so that AdamW's learning rates and weight decay fit.

    Args:
        parameters: matrices [R, C], and kernels [R, ...], each taken as a matrix of R rows.
        lr: learning rate.
        weight_decay: decoupled from the gradient, as AdamW's.
        momentum: share of the average that a step keeps.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Step once; matrices of one shape are orthogonalized together."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._momentum(parameter, group["momentum"]).flatten(1)
                    by_shape.setdefault((update.shape[0], update.shape[1]), []).append((parameter, update))
            for shape, members in by_shape.items():
                scale = -group["lr"] * 0.2 * math.sqrt(max(shape))
                updates = torch.stack([update for _, update in members])
                updates = updates.bfloat16() if updates.is_cuda else updates.float()
                for (parameter, _), update in zip(members, orthogonalized(updates), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view(parameter.shape), alpha=scale)
        return loss

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """The average of the gradients with this one in it, seen one step ahead."""
        gradient: Any = parameter.grad
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum_buffer"], momentum)
