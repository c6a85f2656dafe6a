"""What each edit of an adapter does, against what it is defined as."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from methods import EditsAdapter
from tiny import draw
from tiny_dit import draw as draw_dit
from tiny_dit import flux_inputs, tiny_flux
from torch import Tensor, nn

from interactdiff import attach
from interactdiff.adapter import (
    Edit,
    EditedCall,
    Guidance,
    Host,
    Observer,
    Parameter,
    Residual,
    SiteInputs,
)
from interactdiff.calls import Call
from interactdiff.controller import Controller


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
