"""Compiling what is trained on inputs of several sizes."""

import torch._dynamo
from torch import nn

SHAPES = 64  # graphs of one module; by torch's limit of 8 the ninth shape and all after it run eagerly


def compile_each_shape(module: nn.Module, backend: str = "inductor") -> None:
    """Compile a module in place, with a graph for every shape of its inputs.

    A graph of dynamic shapes, torch's way from the second shape on, does not compile for a U-Net (2.13).

    Args:
        module: whose `forward` is compiled.
        backend: of `torch.compile`.
    """
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, SHAPES)
    module.compile(dynamic=False, backend=backend)
