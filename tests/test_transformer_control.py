"""Interactions in Flux and SD3: what an attached adapter does in stock pipelines."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from tiny import FEEDING, RIDING, Graphs
from tiny_dit import TEXT_LENGTH, draw, flux_inputs, sd3_inputs, trained_joint_adapter, trained_layers
from torch import Tensor, nn

from interactdiff import AdapterError, Entity, HighResolution, InteractionAdapter, attach
from interactdiff.clear import ClearConfig, linearize
from interactdiff.pipelines import InteractionFluxPipeline, InteractionStableDiffusion3Pipeline
from interactdiff.sites import denoiser_of, joint_sites

GUIDED: dict[str, dict[str, Any]] = {
    "flux_pipe": {"negative_prompt": "", "true_cfg_scale": 3.0},
    "sd3_pipe": {"guidance_scale": 3.0},
}


def guided(pipe: Any) -> dict[str, Any]:
    return GUIDED["flux_pipe" if "Flux" in type(pipe).__name__ else "sd3_pipe"]


class Predicted:
    """What a transformer predicted in each of its calls."""

    def __init__(self, transformer: nn.Module):
        self.calls: list[Tensor] = []
        self.hook = transformer.register_forward_hook(lambda _, __, out: self.calls.append(out[0].clone()))


def predictions(pipe: Any, **arguments: Any) -> list[Tensor]:
    seen = Predicted(pipe.transformer)
    draw(pipe, **arguments)
    seen.hook.remove()
    return seen.calls


def test_an_untrained_adapter_changes_no_bit(dit_pipe: Any) -> None:
    expected = draw(dit_pipe, **guided(dit_pipe))
    for init in ("published", "open"):
        adapter = InteractionAdapter.for_transformer(
            dit_pipe.transformer, hidden=8, token_dim=8, init=init, structured=init == "open"
        )
        with attach(dit_pipe, adapter) as handle:
            handle.set_scene([RIDING, FEEDING])
            assert torch.equal(draw(dit_pipe, **guided(dit_pipe)), expected)


def test_detaching_leaves_nothing(dit_pipe: Any) -> None:
    transformer = dit_pipe.transformer
    expected, names = draw(dit_pipe), transformer.state_dict().keys()
    processors = dict(transformer.attn_processors)
    handle = attach(dit_pipe, trained_joint_adapter(transformer))
    handle.set_scene([RIDING])
    assert not torch.allclose(draw(dit_pipe), expected, atol=1e-2)
    assert transformer.state_dict().keys() == names
    assert all(transformer.attn_processors[name] is own for name, own in processors.items())
    handle.clear()
    assert torch.equal(draw(dit_pipe), expected)
    handle.detach()
    handle.detach()
    hooks = [hooks for m in transformer.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]
    assert not any(hooks)
    assert torch.equal(draw(dit_pipe), expected)
    with pytest.raises(AdapterError, match="got a handle that is detached"):
        handle.set_scene([RIDING])


def test_the_unconditional_half_is_the_bases_own(dit_pipe: Any) -> None:
    asked = guided(dit_pipe) | {"num_inference_steps": 1}
    plain = predictions(dit_pipe, **asked)
    with attach(dit_pipe, trained_joint_adapter(dit_pipe.transformer)) as handle:
        handle.set_scene([RIDING])
        for _ in range(2):  # a second run begins with the prompt again
            controlled = predictions(dit_pipe, **asked)
            if "Flux" in type(dit_pipe).__name__:
                prompt, negative = (0, ...), (1, ...)
            else:
                prompt, negative = (0, 1), (0, 0)
            at = [
                (calls[prompt[0]][prompt[1]], calls[negative[0]][negative[1]])
                for calls in (plain, controlled)
            ]
            assert not torch.allclose(at[0][0], at[1][0], atol=1e-3)
            assert torch.allclose(at[0][1], at[1][1], atol=1e-6)


def test_skip_layer_guidance_calls_with_the_prompt_alone(sd3_pipe: Any) -> None:
    skipping: dict[str, Any] = {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 1.0}
    skipping |= {"skip_layer_guidance_start": -1.0, "guidance_scale": 3.0}
    plain = predictions(sd3_pipe, **skipping)
    with attach(sd3_pipe, trained_joint_adapter(sd3_pipe.transformer)) as handle:
        handle.set_scene([RIDING])
        controlled = predictions(sd3_pipe, **skipping)
    assert [len(one) for one in controlled] == [2, 1, 2, 1]
    assert not torch.allclose(plain[1], controlled[1], atol=1e-3)


def test_a_batch_of_scenes_is_each_of_them_alone(dit_pipe: Any) -> None:
    scenes = [[RIDING], [], [FEEDING, RIDING]]
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    adapter = trained_joint_adapter(dit_pipe.transformer, structured=True)

    def drawn(rows: list[int]) -> Tensor:
        latents = noise[rows]
        if "Flux" in type(dit_pipe).__name__:
            latents = dit_pipe._pack_latents(latents, len(rows), 4, 16, 16)
        handle.set_scene([scenes[row] for row in rows])
        return dit_pipe(
            ["a dog"] * len(rows), height=32, width=32, num_inference_steps=2, output_type="latent",
            max_sequence_length=TEXT_LENGTH, latents=latents, **several(len(rows)),
        ).images  # fmt: skip

    def several(count: int) -> dict[str, Any]:
        asked = guided(dit_pipe)
        return asked | {"negative_prompt": [""] * count}

    with attach(dit_pipe, adapter) as handle:
        together = drawn([0, 1, 2])
        alone = torch.cat([drawn([row]) for row in range(3)])
    assert torch.allclose(together, alone, atol=1e-4)
    assert not torch.allclose(together[0], together[2], atol=1e-2)


def test_keys_and_values_are_computed_once_a_run(dit_pipe: Any) -> None:
    adapter = trained_joint_adapter(dit_pipe.transformer)
    calls: list[int] = []
    for reader in adapter.cross_attentions.values():
        reader.to_k.register_forward_hook(lambda *_: calls.append(1))
    with attach(dit_pipe, adapter) as handle:
        handle.set_scene([RIDING])
        assert not calls
        draw(dit_pipe, **guided(dit_pipe) | {"num_inference_steps": 3})
        assert len(calls) == len(joint_sites(dit_pipe.transformer))
        draw(dit_pipe, (16, 48))
    assert len(calls) == len(joint_sites(dit_pipe.transformer))


def test_strength(dit_pipe: Any) -> None:
    plain = predictions(dit_pipe)
    with attach(dit_pipe, trained_joint_adapter(dit_pipe.transformer)) as handle:
        far = []
        for strength in (0.5, 1.0, 0.0):
            handle.set_scene([RIDING], strength)
            far.append((predictions(dit_pipe)[0] - plain[0]).norm().item())
    assert 0 == far[2] < far[0] < far[1]


def acting_calls(pipe: Any, handle: Any, **arguments: Any) -> list[bool]:
    """Of each of a run's calls whether the adapter acts in it."""
    site, acts = handle["interaction"].sites[0], []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: acts.append(site.state is not None))
    draw(pipe, **arguments)
    hook.remove()
    return acts


@pytest.mark.parametrize("steps", [4, 60])
def test_schedule(dit_pipe: Any, steps: int) -> None:
    """At 60 steps timesteps in bfloat16 would fall together."""
    dit_pipe.to(torch.bfloat16)
    with attach(dit_pipe, trained_joint_adapter(dit_pipe.transformer)) as handle:
        handle.set_scene([RIDING], schedule=0.5)
        acts = acting_calls(dit_pipe, handle, num_inference_steps=steps)
    assert acts == [True] * (steps // 2) + [False] * (steps // 2)


def test_fast_reads_at_some_steps(dit_pipe: Any) -> None:
    adapter = trained_joint_adapter(dit_pipe.transformer)
    asked = guided(dit_pipe) | {"num_inference_steps": 4}
    reads: list[int] = []
    reader = next(iter(adapter.cross_attentions.values()))
    reader.register_forward_hook(lambda *_: reads.append(1))
    with attach(dit_pipe, adapter) as handle:
        handle.set_scene([RIDING])
        exact = predictions(dit_pipe, **asked)
        assert len(reads) == 4
        handle.set_scene([RIDING], fast=True)
        fast = predictions(dit_pipe, **asked)
    assert len(reads) == 4 + 2  # at steps 0 and 1
    calls = len(exact) // 4
    assert torch.equal(exact[calls], fast[calls])
    assert not torch.equal(exact[3 * calls], fast[3 * calls])


def test_several_pictures_of_a_prompt(dit_pipe: Any) -> None:
    with attach(dit_pipe, trained_joint_adapter(dit_pipe.transformer)) as handle:
        handle.set_scene([RIDING])
        drawn = draw(dit_pipe, **guided(dit_pipe), num_images_per_prompt=2)
        one = draw(dit_pipe, **guided(dit_pipe))
    assert torch.allclose(drawn[0], one[0], atol=1e-3)
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-2)


def test_a_prompt_that_a_callback_changes_is_still_the_prompt(flux_pipe: Any) -> None:
    def other(_: Any, __: int, ___: float, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_embeds": kwargs["prompt_embeds"] + 1}

    changing: dict[str, Any] = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    changing |= {"callback_on_step_end": other, "num_inference_steps": 3}
    with attach(flux_pipe, trained_joint_adapter(flux_pipe.transformer)) as handle:
        handle.set_scene([RIDING])
        acts = acting_calls(flux_pipe, handle, **guided(flux_pipe) | changing)
    assert acts == [True, False] * 3


def test_a_base_in_half_precision(dit_pipe: Any) -> None:
    transformer = dit_pipe.to(torch.bfloat16).transformer
    adapter = trained_joint_adapter(transformer)
    with attach(dit_pipe, adapter) as handle:
        handle.set_scene([RIDING, FEEDING])
        assert torch.isfinite(draw(dit_pipe)).all()
        assert adapter.position_net.null_positive_feature.dtype == torch.bfloat16
    adapter.float().train()
    features = {phrase: torch.randn(adapter.config.feature_dim) for phrase in ("person", "riding", "bike")}
    inputs = flux_inputs() if "Flux" in type(dit_pipe).__name__ else sd3_inputs()
    with attach(transformer, adapter) as handle:
        handle["interaction"].set_tokens(adapter(**adapter.scene_tensors([[RIDING]] * 2, features)))
        half = {n: t if "ids" in n or n == "timestep" else t.bfloat16() for n, t in inputs.items()}
        transformer(**half).sample.float().square().mean().backward()
    assert all(reader.to_v.weight.grad is not None for reader in adapter.cross_attentions.values())


class WithoutQueries:
    """A processor of someone's that has no use for the attention's own queries."""

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **_: Any) -> Any:
        gathered = attn.to_out[0](torch.zeros_like(hidden_states))
        return gathered if encoder_hidden_states is None else (gathered, encoder_hidden_states)


def test_processors_that_make_no_queries_are_named(sd3_pipe: Any) -> None:
    with attach(sd3_pipe, trained_joint_adapter(sd3_pipe.transformer)) as handle:
        handle.set_scene([RIDING])
        sd3_pipe.transformer.set_attn_processor(WithoutQueries())
        with pytest.raises(AdapterError, match=r"got none of them: .* beside WithoutQueries$"):
            draw(sd3_pipe)


def test_an_items_own_strength(flux_pipe: Any) -> None:
    with attach(flux_pipe, trained_joint_adapter(flux_pipe.transformer)) as handle:
        handle.set_scene([RIDING])
        alone = draw(flux_pipe)
        handle.set_scene([RIDING, replace(FEEDING, strength=0.0)])
        assert torch.allclose(draw(flux_pipe), alone, atol=1e-5)
        handle.set_scene([Entity("dog", (0.1, 0.1, 0.5, 0.5))])
        assert not torch.allclose(draw(flux_pipe), alone, atol=1e-2)


def test_lora_before_or_after(dit_pipe: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    def with_lora() -> None:
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
        inject_adapter_in_model(config, dit_pipe.transformer)

    adapter = trained_joint_adapter(dit_pipe.transformer)
    with attach(dit_pipe, adapter) as handle:
        handle.set_scene([RIDING])
        draw(dit_pipe)
        with_lora()
        after = draw(dit_pipe)
    plain = draw(dit_pipe)
    with attach(dit_pipe, adapter) as handle:
        handle.set_scene([RIDING])
        assert torch.equal(draw(dit_pipe), after)
    assert not torch.allclose(plain, after, atol=1e-2)


@pytest.mark.parametrize("detaching", ["first in, first out", "last in, first out"])
def test_with_clear_in_either_order(dit_pipe: Any, detaching: str) -> None:
    transformer = dit_pipe.transformer
    base = draw(dit_pipe)
    adapter, layers = trained_joint_adapter(transformer), trained_layers(transformer, ClearConfig(2, 2))

    def interaction() -> Any:
        handle = attach(dit_pipe, adapter)
        handle.set_scene([RIDING])
        return handle

    def clear() -> Any:
        return linearize(dit_pipe, weights=layers, min_tokens=0)

    drawn = []
    for makers in ([interaction, clear], [clear, interaction]):
        handles = [make() for make in makers]
        drawn.append(draw(dit_pipe))
        for handle in handles if detaching == "first in, first out" else handles[::-1]:
            handle.detach()
        assert torch.equal(draw(dit_pipe), base)
    assert torch.equal(*drawn)
    with clear():
        assert not torch.allclose(draw(dit_pipe), drawn[0], atol=1e-3)


def test_a_window_over_everything_is_full_attention_with_interactions_too(dit_pipe: Any) -> None:
    with attach(dit_pipe, trained_joint_adapter(dit_pipe.transformer, structured=True)) as handle:
        handle.set_scene([RIDING, FEEDING])
        full = draw(dit_pipe)
        with linearize(dit_pipe, window=100, min_tokens=0):
            assert torch.allclose(draw(dit_pipe), full, atol=1e-4)


def test_compiled_in_one_graph(flux_pipe: Any, graphs: Graphs) -> None:
    with attach(flux_pipe, trained_joint_adapter(flux_pipe.transformer)) as handle:
        handle.set_scene([RIDING])
        expected = draw(flux_pipe)
        flux_pipe.transformer.compile(backend=graphs, fullgraph=True)
        assert torch.allclose(draw(flux_pipe), expected, atol=1e-5)
        assert len(graphs) == 1


def test_image_to_image_follows_the_schedule_from_where_it_starts(flux_pipe: Any) -> None:
    pipe = FluxImg2ImgPipeline.from_pipe(flux_pipe)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    how: dict[str, Any] = {"image": image, "strength": 0.5, "num_inference_steps": 4}
    with attach(pipe, trained_joint_adapter(pipe.transformer)) as handle:
        handle.set_scene([RIDING], schedule=0.5)
        acts = acting_calls(pipe, handle, **how, **guided(flux_pipe))
    assert acts == [True, False, False, False]  # two steps of two calls: prompt and negative prompt


def test_tokens_of_two_pictures_are_refused(flux_pipe: Any) -> None:
    ids = torch.cat([flux_inputs()["img_ids"], flux_inputs()["img_ids"]])
    inputs = flux_inputs() | {"img_ids": ids, "hidden_states": torch.randn(2, 128, 16)}
    with attach(flux_pipe, trained_joint_adapter(flux_pipe.transformer)) as handle:
        handle.set_scene([RIDING])
        with pytest.raises(AdapterError, match="got 128 tokens with places in 8 x 8"):
            flux_pipe.transformer(**inputs)


@pytest.mark.parametrize(
    ("stock", "kind"),
    [("flux_pipe", InteractionFluxPipeline), ("sd3_pipe", InteractionStableDiffusion3Pipeline)],
)
def test_pipelines_take_interactions(stock: str, kind: Any, request: pytest.FixtureRequest) -> None:
    base = request.getfixturevalue(stock)
    adapter = trained_joint_adapter(denoiser_of(base))
    with attach(base, adapter) as handle:
        handle.set_scene([RIDING], 0.5)
        expected = draw(base)
    pipe = kind(**base.components)
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe)
    pipe.load_interaction_adapter(adapter)
    assert torch.equal(draw(pipe, interactions=[RIDING], interaction_strength=0.5), expected)
    assert torch.equal(draw(pipe), plain)
    pipe.unload_interaction_adapter()
    with pytest.raises(AdapterError, match="expected an adapter to be loaded"):
        draw(pipe, interactions=[RIDING])


def test_interactions_follow_every_stage_of_a_large_picture(dit_pipe: Any) -> None:
    """Each stage has a schedule of its own, whatever the pipeline drew before."""
    guidance = {"base_guidance_scale": 3.0} if "guidance_scale" in guided(dit_pipe) else guided(dit_pipe)
    adapter = trained_joint_adapter(dit_pipe.transformer)
    read: list[int] = []
    with attach(dit_pipe, adapter) as handle:
        handle.set_scene([RIDING], schedule=0.5)
        draw(dit_pipe, **guided(dit_pipe))
        hook = next(iter(adapter.cross_attentions.values())).register_forward_hook(lambda *_: read.append(0))
        enlarge = HighResolution(
            dit_pipe, scales=(1, 2), steps=4, strength=0.7, guidance_scale=3.0, progress=False
        )
        enlarge(
            "a cat", height=16, width=16, base_steps=4, max_sequence_length=TEXT_LENGTH, **guidance,
            before_stage=lambda _: read.append(1),
        )  # fmt: skip
        hook.remove()
    assert read == [1, 0, 0, 1, 0]  # half of 4 steps, then of the 3 that are taken
