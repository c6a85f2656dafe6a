"""The pipeline that takes interactions: a stock one, and three arguments."""

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
)
from tiny import FEEDING, RIDING, draw, trained_adapter

from interactdiff.attach import attach
from interactdiff.checkpoint import AdapterError
from interactdiff.pipelines import InteractionStableDiffusionPipeline
from interactdiff.scene import SceneError


@pytest.fixture
def folders(pipe, adapter, tmp_path):
    """A stock pipeline's folder, and an adapter's."""
    pipe.save_pretrained(tmp_path / "base")
    adapter.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


@pytest.fixture
def ours(folders) -> InteractionStableDiffusionPipeline:
    pipeline = InteractionStableDiffusionPipeline.from_pretrained(
        folders[0], adapter=folders[1], safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_draws_what_attaching_draws(ours, pipe, adapter):
    options = {"negative_prompt": "blurry", "num_images_per_prompt": 2}
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING, FEEDING], strength=0.8, schedule=0.7)
        expected = draw(pipe, **options)
    got = draw(
        ours, interactions=[RIDING, FEEDING], interaction_strength=0.8, interaction_schedule=0.7, **options
    )
    assert torch.equal(got, expected)


def test_is_the_stock_pipeline_without_interactions(ours, pipe):
    """Also after a run with them, and after one that failed."""
    expected = draw(pipe)
    neighbour = StableDiffusionPipeline(**ours.components, requires_safety_checker=False)
    neighbour.set_progress_bar_config(disable=True)
    assert torch.equal(draw(ours), expected)
    assert not torch.equal(draw(ours, interactions=[RIDING]), expected)
    assert torch.equal(draw(neighbour), expected), "the scene outlived the call"
    assert torch.equal(draw(ours), expected)
    with pytest.raises(SceneError):
        draw(ours, ["a dog", "a bike"], interactions=[[RIDING]] * 3)
    assert torch.equal(draw(ours), expected)


def test_draws_a_scene_for_each_prompt_to_an_image(ours):
    run = {"num_inference_steps": 2, "output_type": "np"}
    images = ours(
        ["a dog"] * 2,
        interactions=[[RIDING], [FEEDING]],
        generator=[torch.Generator().manual_seed(1) for _ in range(2)],
        **run,
    ).images
    assert images.shape == (2, 16, 16, 3)
    assert not np.allclose(images[0], images[1])


def test_scenes_are_counted_by_prompts(ours):
    with pytest.raises(SceneError, match="expected interactions for each of 4 prompts, got 2 lists of them"):
        draw(ours, ["a dog"] * 4, interactions=[[RIDING], [FEEDING]])


def test_positional_arguments_and_callbacks_reach_the_stock_call(ours):
    steps = []

    def callback(pipeline, step, timestep, tensors):
        steps.append(step)
        return tensors

    image = ours(
        "a dog", 16, 16, num_inference_steps=2, interactions=[RIDING], callback_on_step_end=callback
    ).images[0]
    assert image.size == (16, 16)
    assert steps == [0, 1]


def test_no_loop_is_copied():
    """The call has nothing but our arguments and passes the rest on."""
    parameters = inspect.signature(InteractionStableDiffusionPipeline.__call__).parameters
    assert set(parameters) == {
        "self", "args", "interactions", "interaction_strength", "interaction_schedule", "kwargs"
    }  # fmt: skip


def test_loading_another_adapter_replaces_the_first(ours, pipe):
    other = trained_adapter(pipe.unet, grid_positions=False)
    before = draw(ours, interactions=[RIDING])
    ours.load_interaction_adapter(other)
    assert not torch.equal(draw(ours, interactions=[RIDING]), before)
    misfit = trained_adapter(pipe.unet)
    misfit.config.base.sites.clear()
    with pytest.raises(AdapterError, match="expected the base that"):
        ours.load_interaction_adapter(misfit)
    assert ours.interaction is not None
    assert ours.interaction.adapter is other


def test_interactions_need_an_adapter(ours, pipe):
    expected = draw(pipe)
    ours.unload_interaction_adapter()
    assert torch.equal(draw(ours), expected)
    with pytest.raises(AdapterError, match="expected an adapter to be loaded for the interactions, got none"):
        draw(ours, interactions=[RIDING])


def test_saved_base_is_free_of_the_adapter(ours, tmp_path):
    """A person without interactdiff reads what ours saved, and so does ours."""
    ours.save_pretrained(tmp_path / "saved")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    assert type(stock) is StableDiffusionPipeline
    again = InteractionStableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    assert type(again) is InteractionStableDiffusionPipeline
    assert stock.unet.state_dict().keys() == ours.unet.state_dict().keys()
    assert not any("fuser" in name for name in stock.unet.state_dict())


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


def test_bare_name_is_refused():
    """Importing the folder by its bare name would load every class twice."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", "import pipelines"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert run.returncode != 0
    assert "import interactdiff.pipelines" in run.stderr
