"""Weights shared out over processes (torch's FSDP2): each keeps a part of weights, gradients and moments.

An adapter is sharded as one. Its weights are gathered when a step begins and stay whole until its backward
pass is done, because they act inside the base, outside of the adapter's own forward pass: what is spared is
what ZeRO-2 spares, and the weights between steps. Single numbers, such as gates, cannot be sharded: every
process has them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from interactdiff.errors import RecipeError


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a sharded one gathered, for which every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor; all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(tensor: Tensor, value: Tensor) -> Tensor:
    """Copy a whole tensor into one that may be sharded, and return that."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(
            value.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements, src_data_rank=None
        )
    return tensor.copy_(value)


class Sharding:
    """A model whose weights are shared out.

    Args:
        model: on its device; its parameters are replaced.
        count: processes.

    Raises:
        RecipeError: this torch cannot leave out single numbers.
    """

    def __init__(self, model: nn.Module, count: int):
        from torch.distributed.fsdp import fully_shard  # torch 2.6 has it

        if "ignored_params" not in signature(fully_shard).parameters:
            raise RecipeError(f"shard: expected torch 2.7 or newer, got {torch.__version__}")
        self.model: Any = model
        self.numbers = [p for p in model.parameters() if p.ndim == 0]
        device = next(model.parameters()).device
        mesh = init_device_mesh(device.type, (count,))
        fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=set(self.numbers))
        self.count = count

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Within a part of a step: gradients are shared out in its last one alone."""
        self.model.set_requires_gradient_sync(last)
        yield
        if last:
            for number in self.numbers:
                if number.grad is not None:
                    torch.distributed.all_reduce(number.grad)
                    number.grad /= self.count

    @torch.no_grad()
    def clip(self, most: float) -> None:
        """Scale gradients down to a norm of at most `most`, of all of them together."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        shards = [local(one) for one in gradients if isinstance(one, DTensor)]
        numbers = [one for one in gradients if not isinstance(one, DTensor)]
        squares = torch.stack([one.float().square().sum() for one in shards]).sum()
        torch.distributed.all_reduce(squares)
        total = (squares + sum(one.float().square() for one in numbers)).sqrt()
        factor = (most / (total + 1e-6)).clamp(max=1.0)
        for one in (*shards, *numbers):
            one.mul_(factor)

    @contextmanager
    def gathered(self) -> Iterator[dict[str, Tensor]]:
        """Within the block the model's weights are whole in every process; gives them by name."""
        tensors = {name: whole(tensor).detach() for name, tensor in self.model.state_dict().items()}
        self.model.unshard()
        try:
            yield tensors
        finally:
            self.model.reshard()
