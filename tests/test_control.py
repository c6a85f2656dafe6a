"""What an attached adapter does: where the fuser acts, on which image, at which step, and how it learns."""

import copy

import pytest
import torch
from diffusers import HeunDiscreteScheduler, StableDiffusionImg2ImgPipeline
from tiny import BOXES_ONLY, FEEDING, RIDING, Calls, close, draw, trained_adapter
from torch import nn

from interactdiff.handle import attach
from interactdiff.interaction.phrases import encode_phrases
from interactdiff.interaction.tokens import scene_tensors

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")  # its schedulers with numpy 2


# --- what the fuser does there ---


def test_fuser_acts_between_self_and_cross_attention(unet, adapter):
    """The hooks against a U-Net whose blocks have the fuser where diffusers calls it itself."""
    torch.manual_seed(5)
    x, context, tokens = torch.randn(2, 4, 8, 6), torch.randn(2, 5, 24), torch.randn(2, 9, 24)
    adapter = trained_adapter(unet, grid_positions=False)
    reference = copy.deepcopy(unet)
    for path, fuser in adapter.fusers.items():
        reference.get_submodule(path).fuser = fuser
    reference.position_net = nn.Identity()
    expected = reference(x, 7, context, cross_attention_kwargs={"gligen": {"input": tokens}}).sample
    with attach(unet, adapter) as handle:
        base = unet(x, 7, context).sample
        handle["interaction"].set_tokens(tokens)
        assert close(unet(x, 7, context).sample, expected)
    assert not close(base, expected)


def test_every_role_and_the_strength_count(pipe, adapter):
    with attach(pipe, adapter) as handle:
        pictures = [draw(pipe)]
        for scene, strength in (
            ([RIDING], 1.0),
            ([RIDING], 0.5),
            ([BOXES_ONLY], 1.0),
            ([RIDING, FEEDING], 1.0),
        ):
            handle.set_scene(scene, strength=strength)
            pictures.append(draw(pipe))
    for i, one in enumerate(pictures):
        assert not any(torch.allclose(one, other, atol=1e-2) for other in pictures[:i])


def test_unconditional_half_reads_the_same_tokens_with_every_mask_0(pipe, adapter):
    """A step of the pipeline against the U-Net alone, given the tokens of both halves."""
    seen = []
    pipe.unet.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True
    )
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING])
        draw(pipe, num_inference_steps=1)
    ((sample, timestep), kwargs, (noise,)) = seen[0]
    phrases = encode_phrases(pipe.tokenizer, pipe.text_encoder, ["person", "riding", "bike"])
    tensors = scene_tensors([[RIDING]], phrases, 3)
    conditional = adapter(**tensors)
    unconditional = adapter(**{**tensors, "masks": torch.zeros(1, 3), "action_masks": torch.zeros(1, 3)})
    with torch.no_grad(), attach(pipe.unet, adapter) as handle:
        handle["interaction"].set_tokens(torch.cat([unconditional, conditional]))
        assert close(pipe.unet(sample, timestep, kwargs["encoder_hidden_states"]).sample, noise)
        handle["interaction"].set_tokens(torch.cat([conditional, conditional]))
        assert not close(pipe.unet(sample, timestep, kwargs["encoder_hidden_states"]).sample, noise)


@pytest.mark.parametrize("guidance_scale", [3.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("per_prompt", [1, 2])
def test_each_image_of_a_batch_is_what_it_is_alone(pipe, adapter, guidance_scale, per_prompt):
    prompts, negative = ["a dog", "a bike", "a child"], ["blurry", "dark", "grey"]
    scenes = [[RIDING], [], [FEEDING, RIDING]]
    noise = torch.randn(3 * per_prompt, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    options = {"guidance_scale": guidance_scale}
    with attach(pipe, adapter) as handle:
        handle.set_scene(scenes)
        batch = draw(
            pipe,
            prompts,
            negative_prompt=negative,
            num_images_per_prompt=per_prompt,
            latents=noise,
            **options,
        )
        assert len(batch) == 3 * per_prompt
        for number, image in enumerate(batch):
            prompt = number // per_prompt
            handle.set_scene(scenes[prompt])
            alone = draw(
                pipe,
                prompts[prompt],
                negative_prompt=negative[prompt],
                latents=noise[number : number + 1],
                **options,
            )
            assert close(alone[0], image), f"image {number}"
    assert not close(
        batch, draw(pipe, prompts, latents=noise[::per_prompt], **options).repeat_interleave(per_prompt, 0)
    )


def test_one_scene_serves_every_prompt(pipe, adapter):
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING])
        shared = draw(pipe, ["a dog", "a bike"])
        handle.set_scene([[RIDING], [RIDING]])
        assert close(draw(pipe, ["a dog", "a bike"]), shared)


def test_unguided_bare_unet_takes_scenes_from_a_phrase_encoder(unet, adapter):
    x, context = torch.randn(4, 4, 8, 8), torch.randn(4, 5, 24)
    with attach(unet, adapter, phrase_encoder=lambda phrases: {p: torch.ones(24) for p in phrases}) as handle:
        base = unet(x, 1, context).sample
        handle.set_scene([[RIDING], []])
        out = unet(x, 1, context).sample
        assert [torch.equal(a, b) for a, b in zip(out, base, strict=True)] == [False, False, True, True]
        handle.set_scene([[RIDING], []], guidance=True)
        out = unet(x, 1, context).sample
        assert [torch.equal(a, b) for a, b in zip(out, base, strict=True)] == [False, True, False, True]


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_grid_positions_follow_the_picture_s_shape(unet, adapter, size):
    """The fuser is told the grid of its own level, not square and not the first one seen."""
    seen = {}
    for path, fuser in adapter.fusers.items():
        fuser.grid_positions.register_forward_hook(
            lambda _, args, __, path=path: seen.update({path: args[0]})
        )
    with attach(unet, adapter) as handle:
        handle["interaction"].set_tokens(torch.randn(1, 9, 24))
        for height, width in ((4, 4), size):
            unet(torch.randn(1, 4, height, width), 1, torch.randn(1, 5, 24))
    cells = {path: len(features) for path, features in seen.items()}
    assert cells["down_blocks.0.attentions.0.transformer_blocks.0"] == size[0] * size[1]
    assert cells["mid_block.attentions.0.transformer_blocks.1"] == size[0] * size[1] // 4
    wide = seen["down_blocks.0.attentions.0.transformer_blocks.0"]
    lowest_frequency_left_edge = torch.sin(torch.arange(size[1]) / size[1])
    assert torch.allclose(wide[: size[1], 0], lowest_frequency_left_edge, atol=1e-5)


# --- nothing is computed twice ---


def test_phrases_objects_and_positions_are_computed_once_a_scene(pipe, adapter):
    fusers = adapter.fusers.values()
    text = Calls(pipe.text_encoder)
    constant = Calls(*(m for f in fusers for m in (f.linear, f.grid_positions)))
    each_step = Calls(*(f.attn.to_q for f in fusers))
    with attach(pipe, adapter) as handle:
        handle.set_scene([[RIDING, RIDING], [BOXES_ONLY]])
        assert text.count == 1
        draw(pipe, ["a dog", "a bike"], num_inference_steps=4, guidance_scale=1.0)
    assert constant.count == 2 * len(fusers)
    assert each_step.count == 4 * len(fusers)


@pytest.mark.parametrize(
    ("scheduler", "pipeline_class", "schedule", "controlled", "calls"),
    [
        pytest.param(None, None, 0.5, 2, 4, id="one call a step"),
        pytest.param(HeunDiscreteScheduler, None, 0.5, 3, 7, id="heun"),
        pytest.param(None, StableDiffusionImg2ImgPipeline, 0.5, 1, 2, id="half of half, image to image"),
        pytest.param(None, None, (0.25, 0.5, 0.25), 2, 4, id="decay, which ends at 0"),
    ],
)
def test_schedule_counts_the_steps_of_the_run(
    pipe, adapter, scheduler, pipeline_class, schedule, controlled, calls
):
    options = {}
    if scheduler:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    if pipeline_class:
        pipe = pipeline_class(**pipe.components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        options = {"image": torch.rand(1, 3, 16, 16), "strength": 0.5, "latents": None}
    all_calls, fused_calls = Calls(pipe.unet), Calls(next(iter(adapter.fusers.values())).attn.to_q)
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING], schedule=schedule)
        for run in (1, 2):
            if pipeline_class:
                options.pop("latents", None)
                pipe("a dog", output_type="latent", num_inference_steps=calls * 2, **options)
            else:
                draw(pipe, num_inference_steps=4, **options)
            assert (fused_calls.count, all_calls.count) == (controlled * run, calls * run)


def test_schedule_follows_each_run_s_number_of_steps(pipe, adapter):
    fused = Calls(next(iter(adapter.fusers.values())).attn.to_q)
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING], schedule=0.5)
        for steps, controlled in ((2, 1), (6, 1 + 3), (4, 1 + 3 + 2)):
            draw(pipe, num_inference_steps=steps)
            assert fused.count == controlled


def test_bare_unet_counts_steps_if_told_how_many(unet, adapter):
    fused = Calls(next(iter(adapter.fusers.values())).attn.to_q)
    with attach(unet, adapter) as handle:
        handle["interaction"].set_tokens(torch.randn(1, 9, 24), schedule=0.5, num_inference_steps=4)
        for timestep in (900, 600, 300, 1):
            unet(torch.randn(1, 4, 8, 8), timestep, torch.randn(1, 5, 24))
    assert fused.count == 2


# --- training ---


def loss_and_gradients(unet, adapter) -> tuple[float, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(6)
    phrases = {
        p: torch.randn(24, generator=generator)
        for p in ("person", "riding", "bike", "child", "feeding", "dog")
    }
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 24, generator=generator)
    with attach(unet, adapter) as handle:
        handle["interaction"].set_tokens(adapter(**scene_tensors([[RIDING], [FEEDING]], phrases, 3)))
        loss = unet(x, torch.tensor([5, 700]), context).sample.square().mean()
        adapter.zero_grad()
        loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}


def test_gradients_reach_every_weight_with_and_without_checkpointing(unet, adapter):
    unet.requires_grad_(False)
    loss, gradients = loss_and_gradients(unet, adapter)
    assert {name for name, gradient in gradients.items() if gradient.any()} == set(adapter.state_dict())
    unet.train()
    unet.enable_gradient_checkpointing()
    runs = Calls(next(iter(adapter.fusers.values())).attn.to_q)
    again, checkpointed = loss_and_gradients(unet, adapter)
    assert runs.count == 2, "nothing was run again"
    assert again == pytest.approx(loss)
    assert all(torch.allclose(checkpointed[name], gradients[name], atol=1e-5) for name in gradients)


@pytest.mark.parametrize("init", ["published", "open"])
def test_an_untrained_adapter_changes_no_bit(unet, adapter, init):
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    untrained = type(adapter).for_unet(unet, init=init, grid_positions=True)
    base = unet(x, 1, context).sample
    with attach(unet, untrained) as handle:
        handle["interaction"].set_tokens(torch.randn(1, 90, 24))
        assert torch.equal(unet(x, 1, context).sample, base)


def test_training_keeps_float32_weights_on_a_half_precision_base(unet, adapter):
    unet.to(torch.bfloat16)
    with attach(unet, adapter.train()) as handle, torch.autocast("cpu", dtype=torch.bfloat16):
        handle["interaction"].set_tokens(torch.randn(1, 9, 24, requires_grad=True))
        x, context = torch.randn(1, 4, 8, 8).bfloat16(), torch.randn(1, 5, 24).bfloat16()
        out = unet(x, 1, context).sample
        out.float().sum().backward()
    gradients = [parameter.grad for fuser in adapter.fusers.values() for parameter in fuser.parameters()]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)
