"""The controller: what each edit does, how adapters combine, what is refused, and what detaching leaves."""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from methods import EditsAdapter
from test_attach import state_of
from tiny import FEEDING, RIDING, draw, trained_adapter
from tiny_dit import draw as draw_dit
from tiny_dit import flux_inputs, tiny_flux, trained_joint_adapter, trained_layers
from torch import Tensor, nn

from interactdiff import AdapterError, SceneError, attach
from interactdiff.adapter import (
    Edit,
    EditedCall,
    Guidance,
    Host,
    Observer,
    OwnKeys,
    Parameter,
    Residual,
    SiteInputs,
)
from interactdiff.calls import Call
from interactdiff.clear import ClearConfig, linearize
from interactdiff.controller import Controller
from interactdiff.handle import attached_bindings


def made(edits: Callable[[Host], Sequence[Edit]], name: str = "edits", order: int = 50) -> EditsAdapter:
    return EditsAdapter(edits, name, order)


# --- residuals ---


def scaling(factor: float, shift: float, name: str, order: int) -> EditsAdapter:
    """Makes factor * o + shift of what attention puts out; two of them do not commute."""

    def make(host: Host) -> list[Residual]:
        sites = host.sites_of("block", "joint", "single")
        return [Residual(site, lambda inputs, output: factor * output + shift) for site in sites]

    return made(make, name, order)


@pytest.mark.parametrize("fixture", ["pipe", "flux_pipe", "sd3_pipe"])
def test_residuals_are_chained_by_order_and_not_by_attaching(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    pipe = request.getfixturevalue(fixture)
    run = draw if fixture == "pipe" else draw_dit
    plain = run(pipe)
    one, two = scaling(1.5, 0.0, "one", 20), scaling(1.0, 0.3, "two", 10)
    drawn = []
    for adapters in ([one, two], [two, one]):
        with attach(pipe, *adapters):
            drawn.append(run(pipe))
        with attach(pipe, adapters[0]), attach(pipe, adapters[1]):
            drawn.append(run(pipe))
    with attach(pipe, scaling(1.5, 1.5 * 0.3, "both", 10)):
        expected = run(pipe)
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])
    assert torch.allclose(drawn[0], expected, atol=1e-4)
    assert not torch.allclose(drawn[0], plain, atol=1e-2)
    assert torch.equal(run(pipe), plain)


def test_a_residual_reads_what_its_site_was_given(unet: Any) -> None:
    """Against a copy of the U-Net, in which blocks add the formula themselves."""
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    changed = copy.deepcopy(unet)
    for module in changed.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            kept: list[Tensor] = []
            module.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
            module.attn1.register_forward_hook(lambda _, __, out, kept=kept: out + kept.pop().tanh())

    def formula(inputs: SiteInputs, output: Tensor) -> Tensor:
        assert inputs.hidden_states is not None
        return output + inputs.hidden_states.tanh()

    with (
        torch.no_grad(),
        attach(unet, made(lambda host: [Residual(s, formula) for s in host.sites_of("block")])),
    ):
        assert torch.equal(unet(x, 1, context).sample, changed(x, 1, context).sample)


def test_token_gated_deltas_change_only_their_tokens(unet: Any) -> None:
    """A change of `to_k` and `to_v` for some of the text's tokens; for all of them it is another weight."""
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    generator = torch.Generator().manual_seed(1)
    deltas = {
        (path, at): torch.randn(layer.weight.shape, generator=generator) * 0.3
        for path, m in unet.named_modules()
        if path.endswith("attn2")
        for at, layer in (("to_k", m.to_k), ("to_v", m.to_v))
    }

    def gated(gate: Tensor, name: str = "edits") -> EditsAdapter:
        def make(host: Host) -> list[Residual]:
            return [
                Residual(
                    site,
                    lambda inputs, out, d=deltas[site.path, at]: (
                        out + gate[:, None] * (inputs.hidden_states @ d.T)
                    ),
                    at,  # type: ignore[arg-type]
                )
                for site in host.sites_of("cross")
                for at in ("to_k", "to_v")
            ]

        return made(make, name)

    changed = copy.deepcopy(unet)
    for (path, at), delta in deltas.items():
        changed.get_submodule(f"{path}.{at}").weight.data += delta
    first, rest = torch.tensor([1.0, 1, 0, 0, 0]), torch.tensor([0.0, 0, 1, 1, 1])
    with torch.no_grad():
        base, expected = unet(x, 1, context).sample, changed(x, 1, context).sample
        with attach(unet, gated(first, "first"), gated(rest, "rest")):
            assert torch.allclose(unet(x, 1, context).sample, expected, atol=1e-4)
        with attach(unet, gated(first, "first")):
            partly = unet(x, 1, context).sample
        assert torch.equal(unet(x, 1, context).sample, base)
    assert not any(torch.allclose(partly, other, atol=1e-3) for other in (base, expected))


# --- observers ---


@pytest.mark.parametrize("fixture", ["unet", "flux"])
def test_observers_see_queries_and_keys_and_change_nothing(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    if fixture == "flux":
        denoiser: Any = tiny_flux()
        inputs, role = flux_inputs(), "joint"
    else:
        denoiser, role = request.getfixturevalue("unet"), "cross"
        text = torch.randn(1, 5, 24)
        inputs = {
            "sample": torch.randn(1, 4, 8, 8),
            "timestep": torch.tensor(1),
            "encoder_hidden_states": text,
        }
    seen: dict[str, list[SiteInputs]] = {"one": [], "two": []}

    def observing(name: str) -> EditsAdapter:
        return made(lambda host: [Observer(s, seen[name].append) for s in host.sites_of(role)], name)

    with torch.no_grad():
        base = denoiser(**inputs).sample
        with attach(denoiser, observing("one"), observing("two")):
            assert torch.equal(denoiser(**inputs).sample, base)
    sites = [site for site in Controller(denoiser).sites if site.role == role]
    assert len(seen["one"]) == len(seen["two"]) == len(sites)
    first, module = seen["one"][0], sites[0].module
    batch = len(next(iter(inputs.values())))
    tokens = 5 if role == "cross" else 64
    assert first.queries is not None
    assert first.keys is not None
    assert first.keys.shape == (batch, module.heads, tokens, module.inner_dim // module.heads)
    if role == "cross":
        expected = (
            module.to_k(inputs["encoder_hidden_states"]).unflatten(2, (module.heads, -1)).transpose(1, 2)
        )
        assert torch.equal(first.keys, expected)


# --- parameters ---


def replacing(path: str, value: Tensor | None = None) -> EditsAdapter:
    def make(host: Host) -> list[Parameter]:
        module = host.denoiser.get_submodule(path)
        new = nn.Parameter(torch.zeros_like(module.weight) if value is None else value)
        return [Parameter(module, "weight", new)]

    return made(make, "replacing")


def test_a_parameter_stands_in_only_while_a_call_runs(unet: Any) -> None:
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    changed, own = copy.deepcopy(unet), unet.get_submodule(path).weight
    changed.get_submodule(path).weight.data.zero_()
    during = []
    unet.mid_block.register_forward_hook(lambda *_: during.append(unet.get_submodule(path).weight is own))
    with torch.no_grad():
        base, values = unet(x, 1, context).sample, {n: t.clone() for n, t in unet.state_dict().items()}
        with attach(unet, replacing(path)):
            assert torch.equal(unet(x, 1, context).sample, changed(x, 1, context).sample)
            assert unet.get_submodule(path).weight is own
            assert all(torch.equal(t, values[n]) for n, t in unet.state_dict().items())
        assert torch.equal(unet(x, 1, context).sample, base)
    assert during == [True, False, True]


def test_an_error_in_a_call_gives_everything_back(unet: Any) -> None:
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    own = unet.get_submodule(path).weight
    with attach(unet, replacing(path)), pytest.raises(RuntimeError):
        unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 5, 7))
    assert unet.get_submodule(path).weight is own


# --- guidance ---


@pytest.mark.parametrize("fixture", ["pipe", "flux_pipe", "sd3_pipe"])
def test_one_prediction_in_both_halves_is_what_the_pipeline_uses(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    """Whatever the pipeline's formula and guidance scale: its scheduler is given exactly that."""
    pipe = request.getfixturevalue(fixture)
    generator = torch.Generator().manual_seed(3)
    shape = (64, 16) if fixture == "flux_pipe" else (4, 16, 16)
    chosen = torch.randn(1, *shape, generator=generator)
    given, step = [], pipe.scheduler.step
    pipe.scheduler.step = lambda prediction, *args, **options: (
        given.append(prediction) or step(prediction, *args, **options)
    )
    adapter = made(lambda host: [Guidance(prediction=lambda call, out: chosen.to(out).expand_as(out))])
    scale = (
        {"negative_prompt": "", "true_cfg_scale": 4.0} if fixture == "flux_pipe" else {"guidance_scale": 4.0}
    )
    with attach(pipe, adapter):
        draw_dit(pipe, **scale)
    assert len(given) == 2
    assert all(torch.equal(prediction, chosen) for prediction in given)


def test_guidance_edits_inputs_and_reads_a_pass_of_its_own(unet: Any) -> None:
    """Both rows get the prompt's text, and what a pass over a reference gave; nothing else acts there."""
    x, context, reference = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24), torch.randn(1, 4, 8, 8)
    passes: list[tuple[Any, ...]] = []

    found: list[Host] = []

    def inputs(call: Call) -> EditedCall:
        with found[0].calls.passing("reference"):
            found[0].denoiser(reference, 1, context[1:])
        return EditedCall({"encoder_hidden_states": context[[1, 1]]}, ("conditional", "conditional"))

    def make(host: Host) -> list[Edit]:
        found.append(host)
        return [Guidance(inputs, lambda call, out: out * 2)]

    observer = made(lambda host: [])
    with torch.no_grad():
        expected = 2 * unet(x, 1, context[[1, 1]]).sample
        with attach(unet, made(make, "guiding"), observer) as handle:
            out = unet(x, 1, context).sample
            passes = [call.rows for call in handle["edits"].calls]
    assert torch.equal(out, expected)
    assert passes == [("reference",), ("conditional", "conditional")]


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


def test_a_wrapper_compiled_after_an_adapter_was_attached_to_the_bare_denoiser(flux_pipe: Any) -> None:
    torch.compiler.reset()
    transformer, graphs = flux_pipe.transformer, []
    plain = draw_dit(flux_pipe)

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with attach(transformer, scaling(1.0, 0.0, "bare", 1)):
        flux_pipe.transformer = torch.compile(transformer, backend=count, fullgraph=True)
        assert torch.allclose(draw_dit(flux_pipe), plain, atol=1e-4)
        with attach(flux_pipe, scaling(1.0, 0.5, "later", 2)):
            assert not torch.allclose(draw_dit(flux_pipe), plain, atol=1e-2)
        assert torch.allclose(draw_dit(flux_pipe), plain, atol=1e-4)
    assert len(graphs) == 3
    torch.compiler.reset()


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
