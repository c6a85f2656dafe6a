"""Compiling what is trained on several sizes."""

import torch
from torch._dynamo.utils import counters

from interactdiff.training.compiling import SHAPES, compile_each_shape


class Twice(torch.nn.Module):
    """A module of one graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def test_every_shape_has_a_graph_of_its_own() -> None:
    module = Twice()
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        compile_each_shape(module, "eager")
        for rows in range(2, 14):
            assert module(torch.ones(rows)).sum() == 2 * rows
        assert torch._dynamo.config.recompile_limit == SHAPES
    assert counters["stats"]["unique_graphs"] == 12
