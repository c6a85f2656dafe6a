"""The pipelines that take interactions: stock ones, and a few arguments."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from tiny import FEEDING, RIDING, Calls, close, draw, trained_adapter

from interactdiff.checkpoint import AdapterError
from interactdiff.handle import attach
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.interaction.phrases import pipeline_phrases
from interactdiff.pipelines import (
    InteractionStableDiffusionPipeline,
    InteractionStableDiffusionXLPipeline,
)
from interactdiff.scene import Entity, SceneError

BALL = Entity("red ball", (0.6, 0.0, 0.9, 0.3))
OURS = {
    StableDiffusionPipeline: InteractionStableDiffusionPipeline,
    StableDiffusionXLPipeline: InteractionStableDiffusionXLPipeline,
}


@pytest.fixture(params=["sd", "sdxl"])
def models(request) -> tuple[Any, InteractionAdapter]:
    """A stock pipeline and an adapter for it."""
    names = ("pipe", "adapter") if request.param == "sd" else ("xl_pipe", "xl_adapter")
    return tuple(map(request.getfixturevalue, names))


@pytest.fixture
def stock(models) -> Any:
    return models[0]


@pytest.fixture
def trained(models) -> InteractionAdapter:
    return models[1]


@pytest.fixture
def ours(stock, trained, tmp_path) -> Any:
    """Loaded from a stock pipeline's folder and an adapter's."""
    stock.save_pretrained(tmp_path / "base")
    trained.save_pretrained(tmp_path / "adapter")
    pipeline = OURS[type(stock)].from_pretrained(tmp_path / "base", adapter=tmp_path / "adapter")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("guidance_scale", [3.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize(
    ("strength", "schedule", "fast"), [(0.8, 0.7, False), (2.0, (0.4, 0.4, 0.2), False), (1.0, 1.0, True)]
)
def test_draws_what_attaching_draws(ours, stock, trained, guidance_scale, strength, schedule, fast):
    """And not what the other ways of asking draw."""
    scene = [RIDING, FEEDING, BALL]
    options = {
        "negative_prompt": "blurry",
        "num_images_per_prompt": 2,
        "num_inference_steps": 5,
        "guidance_scale": guidance_scale,
    }
    with attach(stock, trained) as handle:
        handle.set_scene(scene, strength, schedule, fast=fast)
        expected = draw(stock, **options)
    asked = {
        "interactions": scene,
        "interaction_strength": strength,
        "interaction_schedule": schedule,
        "interaction_fast": fast,
    }
    assert torch.equal(draw(ours, **asked, **options), expected)
    for other in ({"interaction_strength": 0.5}, {"interaction_schedule": 0.2}, {"interactions": [RIDING]}):
        assert not torch.allclose(draw(ours, **{**asked, **other}, **options), expected, atol=1e-3)
    assert torch.equal(draw(ours, **options), draw(stock, **options))


def test_is_the_stock_pipeline_without_interactions(ours, stock):
    """Also after a run with them, and after one that failed."""
    expected = draw(stock)
    neighbour = type(stock).from_pipe(ours)
    neighbour.set_progress_bar_config(disable=True)
    assert torch.equal(draw(ours), expected)
    assert not torch.equal(draw(ours, interactions=[RIDING]), expected)
    assert torch.equal(draw(neighbour), expected), "the scene outlived the call"
    assert torch.equal(draw(ours), expected)
    with pytest.raises(SceneError):
        draw(ours, ["a dog", "a bike"], interactions=[[RIDING]] * 3)
    assert torch.equal(draw(ours), expected)


def test_draws_a_scene_for_each_prompt_to_an_image(ours):
    images = ours(
        ["a dog"] * 2,
        interactions=[[RIDING], [BALL]],
        generator=[torch.Generator().manual_seed(1) for _ in range(2)],
        num_inference_steps=2,
        output_type="np",
    ).images
    assert images.shape == (2, 16, 16, 3)
    assert not np.allclose(images[0], images[1])


@pytest.mark.parametrize("guidance_scale", [3.0, 1.0], ids=["guided", "unguided"])
def test_each_image_of_a_batch_is_what_it_is_alone(ours, guidance_scale):
    prompts, scenes = ["a dog", "a bike", "a child"], [[RIDING], [], [BALL, FEEDING]]
    noise = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    options = {"guidance_scale": guidance_scale}
    batch = draw(ours, prompts, interactions=scenes, num_images_per_prompt=2, latents=noise, **options)
    for number, image in enumerate(batch):
        prompt, scene = prompts[number // 2], scenes[number // 2]
        alone = draw(ours, prompt, interactions=scene, latents=noise[number : number + 1], **options)
        assert close(alone[0], image), f"image {number}"


def test_scenes_are_counted_by_prompts(ours):
    for scenes in ([[RIDING], [FEEDING]], [[RIDING], [BALL]]):
        with pytest.raises(
            SceneError, match=r"^expected interactions for each of 4 prompts, got 2 lists of them$"
        ):
            draw(ours, ["a dog"] * 4, interactions=scenes)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"interactions": RIDING}, "expected items of Interaction or Entity, or a sequence"),
        ({"interactions": ["riding"]}, "expected items of Interaction or Entity, or a sequence"),
        ({"interactions": [RIDING] * 4}, "expected at most 3 interactions an image, got 4"),
        ({"interaction_strength": 2.1}, "strength: expected a number from 0 to 2, got 2.1"),
        ({"interaction_schedule": (0.5, 0.6, 0.1)}, "schedule: expected a share in"),
    ],
)
def test_nothing_is_drawn_when_refused(ours, asked, message):
    work = Calls(ours.unet, ours.text_encoder)
    with pytest.raises(SceneError, match=message):
        draw(ours, **{"interactions": [RIDING], **asked})
    assert work.count == 0


def test_embeddings_stand_for_prompts(ours):
    """As many scenes as embeddings, whatever they are the embeddings of."""
    names = [f"{kind}prompt_embeds" for kind in ("", "negative_", "pooled_", "negative_pooled_")]
    asked = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    encoded = ours.encode_prompt(prompt=["a dog", "a bike"], **asked)
    options = dict(zip(names, encoded, strict=False)) | {
        "latents": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)),
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "output_type": "latent",
    }
    expected = draw(ours, ["a dog", "a bike"], interactions=[[RIDING], [BALL]])
    assert torch.equal(ours(interactions=[[RIDING], [BALL]], **options).images, expected)
    with pytest.raises(SceneError, match="expected interactions for each of 2 prompts, got 3 lists of them"):
        ours(interactions=[[RIDING], [BALL], []], **options)


def test_positional_arguments_and_callbacks_reach_the_stock_call(ours):
    steps = []

    def callback(pipeline, step, timestep, tensors):
        steps.append(step)
        return tensors

    prompts = ["a dog"] * (2 if hasattr(ours, "text_encoder_2") else 1)  # SDXL's second argument is prompt_2
    image = ours(
        *prompts, 16, 16, num_inference_steps=2, interactions=[RIDING], callback_on_step_end=callback
    ).images[0]
    assert image.size == (16, 16)
    assert steps == [0, 1]


def test_no_loop_is_copied(ours):
    """The call has nothing but our arguments and the published ones, and passes the rest on."""
    parameters = inspect.signature(type(ours).__call__).parameters
    added = parameters.keys() - {"self", "args", "kwargs"}
    assert all(name.startswith(("interact", "subject")) for name in added)


def test_loading_another_adapter_replaces_the_first(ours, stock):
    other = trained_adapter(stock.unet, grid_positions=False)
    before = draw(ours, interactions=[RIDING])
    ours.load_interaction_adapter(other)
    assert not torch.equal(draw(ours, interactions=[RIDING]), before)
    misfit = trained_adapter(stock.unet)
    misfit.config.base.sites.clear()
    with pytest.raises(AdapterError, match="expected the base that"):
        ours.load_interaction_adapter(misfit)
    assert ours.interaction is not None
    assert ours.interaction["interaction"].adapter is other


def test_interactions_need_an_adapter(ours, stock):
    expected = draw(stock)
    ours.unload_interaction_adapter()
    assert torch.equal(draw(ours), expected)
    with pytest.raises(AdapterError, match="expected an adapter to be loaded for the interactions, got none"):
        draw(ours, interactions=[RIDING])


def test_saved_base_is_free_of_the_adapter(ours, stock, tmp_path):
    """A person without interactdiff reads what ours saved, and so does ours."""
    ours.save_pretrained(tmp_path / "saved")
    others = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(others) is type(stock)
    again = type(ours).from_pretrained(tmp_path / "saved")
    assert type(again) is type(ours)
    assert again.interaction is None
    assert others.unet.state_dict().keys() == stock.unet.state_dict().keys()
    others.set_progress_bar_config(disable=True)
    assert torch.equal(draw(others), draw(stock))


def test_sdxl_phrases_are_read_by_both_encoders(xl_pipe):
    """The first encoder's pooled output before projection, and the second's after it, by hand."""
    first, second = xl_pipe.text_encoder, xl_pipe.text_encoder_2
    phrases = ["person", "red ball"]
    got = pipeline_phrases(xl_pipe, 40)(phrases)
    for phrase in phrases:
        ids = xl_pipe.tokenizer(phrase, return_tensors="pt").input_ids
        with torch.no_grad():
            pooled, projected = first(ids).pooler_output[0], second(ids)
        assert got[phrase].shape == (24 + 16,)
        assert torch.allclose(got[phrase], torch.cat([pooled, projected.text_embeds[0]]), atol=1e-6)
        unprojected = projected.last_hidden_state[0, -1]
        assert not torch.allclose(got[phrase][24:], unprojected, atol=1e-2)


def test_second_prompt_of_sdxl_does_not_count(xl_pipe, xl_adapter):
    ours = InteractionStableDiffusionXLPipeline(**xl_pipe.components, add_watermarker=False)
    ours.set_progress_bar_config(disable=True)
    ours.load_interaction_adapter(xl_adapter)
    prompts, scenes = ["a dog", "a bike"], [[RIDING], [FEEDING]]
    one = draw(ours, prompts, interactions=scenes)
    assert torch.equal(draw(ours, prompts, prompt_2=prompts, interactions=scenes), one)
    assert not close(draw(ours, prompts, prompt_2=["a child", "a cat"], interactions=scenes), one)


def test_adapter_of_another_base_is_named(xl_pipe, adapter, tmp_path):
    """From a file too, before what was attached is let go."""
    xl_pipe.save_pretrained(tmp_path / "base")
    adapter.save_pretrained(tmp_path / "adapter")
    for given in (adapter, tmp_path / "adapter"):
        with pytest.raises(AdapterError, match=r"made for, .* width 24, .* got .* width 40, "):
            InteractionStableDiffusionXLPipeline.from_pretrained(tmp_path / "base", adapter=given)


@pytest.mark.parametrize("kind", ["controlnet", "inpaint"])
def test_other_stock_pipelines_take_the_adapter(pipe, adapter, kind):
    picture = {"image": torch.rand(1, 3, 16, 16), "num_inference_steps": 2, "output_type": "latent"}
    if kind == "controlnet":
        torch.manual_seed(8)
        net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8))
        other: Any = StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=net)
    else:
        other = StableDiffusionInpaintPipeline.from_pipe(pipe)
        picture["mask_image"] = torch.ones(1, 1, 16, 16)
    other.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        return other("a dog", generator=torch.Generator().manual_seed(9), **picture).images

    base = run()
    with attach(other, adapter) as handle:
        assert torch.equal(run(), base)
        handle.set_scene([RIDING])
        assert not torch.allclose(run(), base, atol=1e-2)
    assert torch.equal(run(), base)


def test_image_to_image_of_sdxl_takes_the_adapter(xl_pipe, xl_adapter):
    other: Any = StableDiffusionXLImg2ImgPipeline.from_pipe(xl_pipe)
    other.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    options = {"strength": 0.8, "num_inference_steps": 4, "output_type": "latent"}

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(9)
        return other("a dog", image=picture, generator=generator, **options).images

    base = run()
    with attach(other, xl_adapter) as handle:
        handle.set_scene([RIDING])
        assert not torch.allclose(run(), base, atol=1e-2)
    assert torch.equal(run(), base)


def test_bare_name_is_refused():
    """Importing the folder by its bare name would load every class twice."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", "import pipelines"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert run.returncode != 0
    assert "import interactdiff.pipelines" in run.stderr
