"""A server's varied requests to a compiled denoiser: as many graphs as without adapters."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import FEEDING, RIDING, draw, trained_adapter
from tiny_dit import draw as draw_dit
from tiny_dit import tiny_flux, trained_joint_adapter
from torch import Tensor, nn

from interactdiff import attach

KINDS: dict[str, tuple[list[Any], dict[str, Any], list[str]]] = {
    "exact": ([RIDING], {}, ["a dog"]),
    "fast": ([RIDING, FEEDING], {"fast": True}, ["a dog"]),
    "schedule": ([RIDING], {"schedule": (0.3, 0.4, 0.3)}, ["a dog"]),
    "no scene": ([], {}, ["a dog"]),
    "two prompts, one with a scene": ([[RIDING], []], {}, ["a dog", "a bike"]),
    "two prompts, fast": ([[RIDING], [FEEDING]], {"fast": True}, ["a dog", "a bike"]),
}
STEPS: dict[str, Any] = {"num_inference_steps": 4}


@pytest.fixture
def graphs() -> Iterator[list[Any]]:
    torch.compiler.reset()
    yield []
    torch.compiler.reset()


def counting(graphs: list[Any]) -> Callable[..., Any]:
    def backend(graph: Any, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    return backend


def session(pipe: Any, handle: Any, seen: list[int], graphs: list[Any]) -> dict[str, Tensor]:
    """One picture of each kind, and after each the number of graphs that there are."""
    drawn = {}
    for kind, (scene, options, prompts) in KINDS.items():
        if handle is not None:
            handle.set_scene(scene, **options)
        drawn[kind] = draw(pipe, prompts, **STEPS)
        seen.append(len(graphs))
    return drawn


def test_kinds_of_requests_are_no_graphs_of_their_own(pipe: Any, graphs: list[Any]) -> None:
    adapter = trained_adapter(pipe.unet)
    with attach(pipe, adapter) as handle:
        expected = session(pipe, handle, [], [])
    plain: list[int] = []
    ours: list[int] = []
    pipe.unet.compile(backend=counting(graphs), fullgraph=True)
    session(pipe, None, plain, graphs)
    graphs.clear()
    with attach(pipe, adapter) as handle:
        drawn = session(pipe, handle, ours, graphs)
    assert ours == plain
    assert ours[-1] == 2, "two prompts are another batch, and nothing else is"
    for kind, latents in drawn.items():
        assert torch.allclose(latents, expected[kind], atol=1e-3), kind


def test_blocks_that_are_compiled_alone_share_their_graph(flux_pipe: Any, graphs: list[Any]) -> None:
    """Each site has an edit of its own, and finds it at run time.

    Flux has two kinds of blocks; its first single block reads states of other strides than the later ones.
    """
    flux_pipe.register_modules(transformer=tiny_flux(num_single_layers=4))
    transformer = flux_pipe.transformer
    adapter = trained_joint_adapter(transformer)
    scenes: list[dict[str, Any]] = [{}, {"fast": True}, {"schedule": 0.5}]
    with attach(flux_pipe, adapter) as handle:
        expected = []
        for options in scenes:
            handle.set_scene([RIDING], **options)
            expected.append(draw_dit(flux_pipe, **STEPS))
    with attach(flux_pipe, adapter) as handle:
        transformer.compile_repeated_blocks(backend=counting(graphs), fullgraph=True)
        for options, latents in zip(scenes, expected, strict=True):
            handle.set_scene([RIDING], **options)
            assert torch.allclose(draw_dit(flux_pipe, **STEPS), latents, atol=1e-4)
    assert len(graphs) == 3


def test_compiled_under_autocast_what_an_edit_computes_is_cast_too(pipe: Any, graphs: list[Any]) -> None:
    def half() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return draw(pipe, **STEPS)

    with attach(pipe, trained_adapter(pipe.unet)) as handle:
        handle.set_scene([RIDING])
        expected = half()
        pipe.unet.compile(backend="aot_eager", fullgraph=True)
        drawn = half()
    assert (drawn.float() - expected.float()).abs().mean() < 0.05 * expected.float().abs().mean()


def test_gradients_flow_through_compiled_code(unet: Any, graphs: list[Any]) -> None:
    """The operator has no gradient: with gradients on, edits are part of the graph as they were."""
    adapter = trained_adapter(unet).requires_grad_(True).train()
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    gradients: list[dict[str, Tensor]] = []
    for compiled in (False, True):
        with attach(unet, adapter) as handle:
            if compiled:
                unet.compile(backend=counting(graphs), fullgraph=True)
            handle["interaction"].set_tokens(torch.ones(1, 9, adapter.config.token_dim))
            adapter.zero_grad()
            unet(x, 1, context).sample.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in named(adapter) if p.grad is not None})
    assert gradients[0]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[1][n], g, atol=1e-5) for n, g in gradients[0].items())


def named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters())
