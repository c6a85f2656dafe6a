"""A server's varied requests to a compiled denoiser: as many graphs as without adapters."""

from typing import Any

import pytest
import torch
from conftest import TEXT_WIDTH
from diffusers import UNet2DConditionModel
from tiny import FEEDING, RIDING, Graphs, close, draw, trained_adapter
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
def unet() -> Any:
    """One level and four sites: tracing takes time for each block."""
    torch.manual_seed(0)
    make: Any = UNet2DConditionModel  # diffusers annotates tuples of any length as tuples of one
    return make(
        sample_size=8, block_out_channels=(16,), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=TEXT_WIDTH, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    ).eval()  # fmt: skip


def session(pipe: Any, handle: Any, seen: list[int], graphs: Graphs) -> dict[str, Tensor]:
    """One picture of each kind, and after each the number of graphs that there are."""
    drawn = {}
    for kind, (scene, options, prompts) in KINDS.items():
        if handle is not None:
            handle.set_scene(scene, **options)
        drawn[kind] = draw(pipe, prompts, **STEPS)
        seen.append(len(graphs))
    return drawn


def test_kinds_of_requests_are_no_graphs_of_their_own(pipe: Any, graphs: Graphs) -> None:
    adapter = trained_adapter(pipe.unet)
    with attach(pipe, adapter) as handle:
        expected = session(pipe, handle, [], [])
    plain: list[int] = []
    ours: list[int] = []
    pipe.unet.compile(backend=graphs, fullgraph=True)
    session(pipe, None, plain, graphs)
    graphs.clear()
    with attach(pipe, adapter) as handle:
        drawn = session(pipe, handle, ours, graphs)
    assert ours == plain
    assert ours[-1] == 2, "two prompts are another batch, and nothing else is"
    for kind, latents in drawn.items():
        assert torch.allclose(latents, expected[kind], atol=1e-3), kind


def test_blocks_that_are_compiled_alone_share_their_graph(flux_pipe: Any, graphs: Graphs) -> None:
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
        transformer.compile_repeated_blocks(backend=graphs, fullgraph=True)
        for options, latents in zip(scenes, expected, strict=True):
            handle.set_scene([RIDING], **options)
            assert torch.allclose(draw_dit(flux_pipe, **STEPS), latents, atol=1e-4)
    assert len(graphs) == 3


def test_compiled_under_autocast_what_an_edit_computes_is_cast_too(pipe: Any, graphs: Graphs) -> None:
    def half() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return draw(pipe, **STEPS)

    with attach(pipe, trained_adapter(pipe.unet)) as handle:
        handle.set_scene([RIDING])
        expected = half()
        pipe.unet.compile(backend="aot_eager", fullgraph=True)
        drawn = half()
    assert (drawn.float() - expected.float()).abs().mean() < 0.05 * expected.float().abs().mean()


def test_gradients_flow_through_compiled_code(unet: Any, graphs: Graphs) -> None:
    """The operator has no gradient: with gradients on, edits are part of the graph as they were."""
    adapter = trained_adapter(unet).requires_grad_(True).train()
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    gradients: list[dict[str, Tensor]] = []
    for compiled in (False, True):
        with attach(unet, adapter) as handle:
            if compiled:
                unet.compile(backend=graphs, fullgraph=True)
            handle["interaction"].set_tokens(torch.ones(1, 9, adapter.config.token_dim))
            adapter.zero_grad()
            unet(x, 1, context).sample.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in named(adapter) if p.grad is not None})
    assert gradients[0]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[1][n], g, atol=1e-5) for n, g in gradients[0].items())


def named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters())


HOW = ["attached, then compiled", "in place", "ran before"]


@pytest.mark.parametrize("how", HOW)
def test_compiled_unet_is_one_graph_from_step_to_step(
    pipe: Any, adapter: Any, graphs: Graphs, how: str
) -> None:
    def compile_unet() -> None:
        if how == "in place":
            pipe.unet.compile(backend=graphs, fullgraph=True)
        else:
            pipe.unet = torch.compile(pipe.unet, backend=graphs, fullgraph=True)

    plain = draw(pipe)
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING])
        expected = draw(pipe)
        handle.set_scene([FEEDING], strength=0.5)
        other = draw(pipe)
    if how == "ran before":
        compile_unet()
        draw(pipe)
        graphs.clear()
    with attach(pipe, adapter) as handle:
        if how != "ran before":
            compile_unet()
        handle.set_scene([RIDING])
        assert close(draw(pipe), expected)
        handle.set_scene([FEEDING], strength=0.5)
        assert close(draw(pipe), other)
        assert len(graphs) == 1, "a step or another scene compiles anew"
        handle.set_scene([RIDING], schedule=0.5)
        draw(pipe, num_inference_steps=4)
        draw(pipe, num_inference_steps=6)
        handle.set_scene([])
        assert close(draw(pipe), plain)
        assert len(graphs) == 1, "a step without control compiles anew"
    assert close(draw(pipe), plain)


def test_a_bare_unet_that_was_compiled_and_run_is_controlled(unet: Any, adapter: Any, graphs: Graphs) -> None:
    compiled = torch.compile(unet, backend=graphs, fullgraph=True)
    x, context = torch.ones(1, 4, 8, 8), torch.ones(1, 5, 24)
    features = {phrase: torch.ones(24) for phrase in ("person", "riding", "bike")}
    with torch.no_grad():
        plain = compiled(x, 1, context).sample
        with attach(compiled, adapter, phrase_encoder=lambda phrases: features) as handle:
            handle.set_scene([RIDING])
            assert not close(compiled(x, 1, context).sample, plain)
        assert close(compiled(x, 1, context).sample, plain)
