"""Fast control: what is reused, what is never reused, and that computing at every step is the exact way."""

import pytest
import torch
from tiny import FEEDING, RIDING, Calls, close, draw

import interactdiff.interaction.active_scene
from interactdiff.handle import attach
from interactdiff.schedule import refreshes

STEPS = 8
COMPUTED = [0, 1, 4]  # of 8 steps


def test_gaps_grow():
    assert [step for step in range(30) if refreshes(step)] == [0, 1, 4, 9, 16, 25]


def test_computing_at_every_step_is_the_exact_way(pipe, adapter, monkeypatch):
    with attach(pipe, adapter) as handle:
        handle.set_scene([[RIDING], [], [FEEDING]])
        exact = draw(pipe, ["a dog", "a bike", "a child"], num_inference_steps=STEPS)
        handle.set_scene([[RIDING], [], [FEEDING]], fast=True)
        fast = draw(pipe, ["a dog", "a bike", "a child"], num_inference_steps=STEPS)
        monkeypatch.setattr(interactdiff.interaction.active_scene, "refreshes", lambda step: True)
        assert torch.equal(draw(pipe, ["a dog", "a bike", "a child"], num_inference_steps=STEPS), exact)
    assert torch.equal(fast[1], exact[1]), "an image without a scene changed"
    assert not torch.equal(fast, exact)
    assert (fast - exact).abs().mean() < 0.2 * exact.abs().mean()


def test_a_step_adds_what_the_last_computed_one_added(pipe, adapter):
    """Site by site, what the self-attention says is changed by the same as before."""
    added = []
    block = next(iter(b for b in pipe.unet.modules() if hasattr(b, "attn1")))
    said = {}
    block.attn1.register_forward_hook(lambda _, __, out: said.update(plain=out))
    with attach(pipe, adapter) as handle:  # our hook is called between these two
        block.attn1.register_forward_hook(lambda _, __, out: added.append(out - said["plain"]))
        handle.set_scene([RIDING], fast=True)
        draw(pipe, num_inference_steps=STEPS)
    same = [close(added[step], added[step - 1]) for step in range(1, STEPS)]
    assert same == [step not in COMPUTED for step in range(1, STEPS)]


def computed(pipe, adapter, handle, runs) -> list[int]:
    """How many denoiser calls computed the fusers, after each run."""
    counted = Calls(next(iter(adapter.fusers.values())).attn.to_q)
    counts = []
    for run in runs:
        run()
        counts.append(counted.count)
    return [after - before for before, after in zip([0, *counts], counts, strict=False)]


def test_nothing_is_reused_from_another_run_scene_batch_or_strength(pipe, adapter):
    def ask(*items, **options):
        handle.set_scene(list(items), fast=True, **options)

    with attach(pipe, adapter) as handle:
        ask(RIDING)
        runs = [
            lambda: draw(pipe, num_inference_steps=STEPS),
            lambda: draw(pipe, num_inference_steps=STEPS),  # another run
            lambda: draw(pipe, ["a dog", "a bike"], num_inference_steps=STEPS),  # another batch
            lambda: draw(pipe, num_inference_steps=STEPS, guidance_scale=1.0),
            lambda: (ask(FEEDING), draw(pipe, num_inference_steps=STEPS)),
            lambda: (ask(RIDING, schedule=(0.0, 1.0, 0.0)), draw(pipe, num_inference_steps=STEPS)),
            lambda: (ask(RIDING, schedule=0.5), draw(pipe, num_inference_steps=STEPS)),
        ]
        counts = computed(pipe, adapter, handle, runs)
    assert counts == [3, 3, 3, 3, 3, STEPS - 1, 2]  # a strength that changes at each step reuses nothing


def test_the_second_run_is_the_first_again(pipe, adapter):
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING], fast=True)
        first = draw(pipe, num_inference_steps=STEPS)
        draw(pipe, "a bike", num_inference_steps=5)
        assert torch.equal(draw(pipe, num_inference_steps=STEPS), first)


def test_guidance_that_ends_midway_computes_anew(pipe, adapter):
    """Half of the batch is gone: what was added to both does not fit."""

    def stop_guiding(pipeline, step, _, tensors):
        if step == 1:
            pipeline._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING], fast=True)
        callback = {
            "callback_on_step_end": stop_guiding,
            "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        }
        run = [lambda: draw(pipe, num_inference_steps=STEPS, **callback)]
        assert computed(pipe, adapter, handle, run) == [4]  # steps 0, 1, 2 and 4


def test_a_base_that_moves_to_another_precision_midway_computes_anew(pipe, adapter):
    def halve(pipeline, step, _, tensors):
        if step == 4:
            pipeline.unet.to(torch.bfloat16)
            tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
        return tensors

    callback = {
        "callback_on_step_end": halve,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds", "latents"],
    }
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING], fast=True)
        run = [lambda: draw(pipe, num_inference_steps=STEPS, **callback)]
        assert computed(pipe, adapter, handle, run) == [4]  # steps 0, 1, 4 and 5


@pytest.mark.parametrize("steps", [None, STEPS])
def test_a_bare_unet_reuses_only_if_it_knows_the_steps(unet, adapter, steps):
    counted = Calls(next(iter(adapter.fusers.values())).attn.to_q)
    features = {p: torch.ones(24) for p in ("person", "riding", "bike")}
    with attach(unet, adapter, phrase_encoder=lambda phrases: features) as handle, torch.no_grad():
        handle.set_scene([RIDING], fast=True, num_inference_steps=steps)
        for timestep in range(900, 100, -100):
            unet(torch.ones(1, 4, 8, 8), timestep, torch.ones(1, 5, 24))
    assert counted.count == (STEPS if steps is None else len(COMPUTED))
