"""The controller: how adapters combine, what is refused, and what detaching leaves."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_attach import state_of
from test_edits import made, scaling
from tiny import FEEDING, RIDING, Graphs, draw, trained_adapter
from tiny_dit import draw as draw_dit
from tiny_dit import flux_inputs, trained_joint_adapter, trained_layers
from torch import nn

from interactdiff import AdapterError, SceneError, attach
from interactdiff.adapter import (
    Edit,
    Guidance,
    Host,
    OwnKeys,
    Parameter,
    Residual,
)
from interactdiff.clear import ClearConfig, linearize
from interactdiff.handle import attached_bindings

# --- combinations ---


def test_every_order_of_attaching_and_detaching_is_the_same(flux_pipe: Any) -> None:
    """Interactions, windows and another residual: all orders, at once or one after the other, off in any."""
    transformer = flux_pipe.transformer
    before, base = state_of(transformer), draw_dit(flux_pipe)
    processors = dict(transformer.attn_processors)
    adapters = {
        "interaction": trained_joint_adapter(transformer),
        "clear": trained_layers(transformer, ClearConfig(2)),
        "other": scaling(0.9, 0.1, "other", 20),
    }
    drawn = []
    for order in itertools.permutations(adapters):
        handles = [attach(flux_pipe, adapters[name]) for name in order]
        by_name = dict(zip(order, handles, strict=True))
        by_name["clear"]["clear"].configure(min_tokens=0)
        by_name["interaction"].set_scene([RIDING])
        drawn.append(draw_dit(flux_pipe))
        for name in sorted(by_name):
            by_name[name].detach()
        assert state_of(transformer) == before
        assert all(transformer.attn_processors[name] is p for name, p in processors.items())
    with attach(flux_pipe, *adapters.values()) as handle:
        handle["clear"].configure(min_tokens=0)
        handle.set_scene([RIDING])
        drawn.append(draw_dit(flux_pipe))
        handle.detach("clear")
        handle.detach("other")
        without = draw_dit(flux_pipe)
        assert list(handle) == ["interaction"]
    with attach(flux_pipe, adapters["interaction"]) as handle:
        handle.set_scene([RIDING])
        assert torch.equal(draw_dit(flux_pipe), without)
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])
    assert not torch.allclose(drawn[0], without, atol=1e-3)
    assert torch.equal(draw_dit(flux_pipe), base)
    assert state_of(transformer) == before
    assert not attached_bindings(transformer)
    assert "cache_context" not in vars(transformer)


def test_attached_together_with_nothing_asked_changes_no_bit(pipe: Any) -> None:
    base = draw(pipe)
    idle = made(lambda host: [Residual(s, lambda *_: None) for s in host.sites_of("block")])
    with attach(pipe, trained_adapter(pipe.unet), idle):
        assert torch.equal(draw(pipe), base)


# --- refusals ---

CONFLICTS: dict[str, tuple[Callable[[Host], list[Edit]], str]] = {
    "keys": (
        lambda host: [OwnKeys(s, lambda q, *_: q) for s in host.sites_of("self")],
        r"expected one adapter to choose the keys of .*attn1, got one and two",
    ),
    "guidance": (lambda host: [Guidance()], "expected one adapter to guide, got one and two"),
    "parameter": (
        lambda host: [Parameter(host.denoiser.conv_in, "bias", host.denoiser.conv_in.bias)],
        "expected one adapter to stand in for one bias of a module, got one and two",
    ),
}


@pytest.mark.parametrize("kind", CONFLICTS)
@pytest.mark.parametrize("when", ["at once", "later"])
def test_conflicts_are_refused_before_anything_is_touched(unet: Any, kind: str, when: str) -> None:
    make, words = CONFLICTS[kind]
    before, one, two = state_of(unet), made(make, "one"), made(make, "two")
    if when == "at once":
        with pytest.raises(AdapterError, match=words):
            attach(unet, one, two)
    else:
        with attach(unet, one):
            attached = state_of(unet)
            with pytest.raises(AdapterError, match=words):
                attach(unet, two)
            assert state_of(unet) == attached
    assert state_of(unet) == before


def test_items_that_nobody_takes_name_the_missing_adapter(pipe: Any) -> None:
    with linearize(pipe) as handle:
        with pytest.raises(
            SceneError, match=r"expected an attached adapter of interaction for Interaction items, got clear$"
        ):
            handle.set_scene([RIDING])
        with pytest.raises(
            AdapterError, match=r"expected an adapter of this handle \(clear\), got 'interaction'"
        ):
            handle["interaction"]
    with (
        attach(pipe, trained_adapter(pipe.unet)) as handle,
        pytest.raises(AdapterError, match="expected options of fast, schedule, strength, got slow"),
    ):
        handle.set_scene([RIDING], slow=True)


def test_items_for_another_handle_say_so(pipe: Any) -> None:
    with attach(pipe, trained_adapter(pipe.unet)), linearize(pipe) as windows:  # noqa: SIM117
        with pytest.raises(SceneError, match="interaction was attached by another handle, which takes them"):
            windows.set_scene([RIDING])


def test_a_wrapper_compiled_after_an_adapter_was_attached_to_the_bare_denoiser(
    flux_pipe: Any, graphs: Graphs
) -> None:
    transformer = flux_pipe.transformer
    plain = draw_dit(flux_pipe)
    with attach(transformer, scaling(1.0, 0.0, "bare", 1)):
        flux_pipe.transformer = torch.compile(transformer, backend=graphs, fullgraph=True)
        assert torch.allclose(draw_dit(flux_pipe), plain, atol=1e-4)
        with attach(flux_pipe, scaling(1.0, 0.5, "later", 2)):
            assert not torch.allclose(draw_dit(flux_pipe), plain, atol=1e-2)
        assert torch.allclose(draw_dit(flux_pipe), plain, atol=1e-4)
    assert len(graphs) == 3


def test_what_is_no_adapter_is_refused(pipe: Any) -> None:
    with pytest.raises(AdapterError, match="expected at least one adapter, got none"):
        attach(pipe)
    with pytest.raises(AdapterError, match=r"expected adapters, .* got Linear"):
        attach(pipe, nn.Linear(1, 1))  # type: ignore[arg-type]


def test_a_denoiser_with_adapters_is_neither_pickled_nor_copied(pipe: Any, tmp_path: Any) -> None:
    with attach(pipe, trained_adapter(pipe.unet)):
        for save in (lambda: torch.save(pipe.unet, tmp_path / "unet.pt"), lambda: copy.deepcopy(pipe.unet)):
            with pytest.raises(AdapterError, match="detach them first, or save it with save_pretrained"):
                save()
    copy.deepcopy(pipe.unet)


def test_saved_while_windows_are_attached_the_base_is_its_own(flux_pipe: Any, tmp_path: Any) -> None:
    own = {name: tensor.clone() for name, tensor in flux_pipe.transformer.state_dict().items()}
    with linearize(flux_pipe, weights=trained_layers(flux_pipe.transformer, ClearConfig(2)), min_tokens=0):
        draw_dit(flux_pipe)
        flux_pipe.transformer.save_pretrained(tmp_path)
    again = type(flux_pipe.transformer).from_pretrained(tmp_path).state_dict()
    assert again.keys() == own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in again.items())


def test_gradient_checkpointing_runs_the_blocks_again_as_they_ran(flux_pipe: Any) -> None:
    transformer, inputs = flux_pipe.transformer.requires_grad_(False), flux_inputs()
    layers = trained_layers(transformer, ClearConfig(2)).train()
    gradients = []
    for checkpointed in (False, True):
        transformer.train(checkpointed)
        (transformer.enable_gradient_checkpointing if checkpointed else lambda: None)()
        layers.zero_grad()
        with linearize(transformer, weights=layers, min_tokens=0):
            transformer(**inputs).sample.square().mean().backward()
        gradients.append(
            {name: p.grad.clone() for name, p in layers.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == set(dict(layers.named_parameters()))
    assert all(torch.allclose(gradients[1][name], grad, atol=1e-5) for name, grad in gradients[0].items())


def test_a_scene_for_another_denoiser_than_the_pipelines_is_refused(pipe: Any) -> None:
    with attach(pipe, trained_adapter(pipe.unet)) as handle:
        handle.set_scene([RIDING])
        pipe.unet = copy.deepcopy(type(pipe.unet).from_config(pipe.unet.config))
        with pytest.raises(AdapterError, match="attach to the pipeline again"):
            handle.set_scene([FEEDING])
