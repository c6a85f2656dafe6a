"""The table of a base's error by level of noise: `benchmarks/denoising_error.py`."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from interactdiff.concept.denoising import Denoising
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import render

BENCH = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks/denoising_error.py"))


@pytest.fixture(params=["pipe", "flux_pipe"])
def pipeline(request: pytest.FixtureRequest) -> Any:
    """Of each family that stickworld has, tiny; the U-Net's predicts v."""
    pipe = request.getfixturevalue(request.param)
    if request.param == "pipe":
        pipe.scheduler = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    return pipe


def test_the_error_is_of_the_latents_that_the_scheduler_predicts(pipeline: Any) -> None:
    """A U-Net's oracle is the scheduler's own x; a flow's is one Euler step to no noise."""
    denoising, time = Denoising.of(pipeline), 400
    generator = torch.Generator().manual_seed(0)
    channels = pipeline.vae.config.latent_channels
    latents, noise = (torch.randn(2, channels, 8, 8, generator=generator) for _ in range(2))
    prompt, times = denoising.encode(["a dog", "a red car"], (64, 64)), torch.full((2,), time)
    with torch.no_grad():
        noisy = denoising.noisy(latents, noise, times)
        predicted = denoising.predict(noisy, times, prompt)
    if hasattr(pipeline, "unet"):
        found = pipeline.scheduler.step(predicted, time, noisy).pred_original_sample
    else:
        found = noisy - time / 1000 * predicted
    error = BENCH["squared_error"](denoising, latents, noise, times, prompt)
    torch.testing.assert_close(error, (found - latents).square())


def test_errors_are_of_persons_and_objects_apart_from_the_background(pipeline: Any) -> None:
    """More noise, more error."""
    found = BENCH["errors"](Denoising.of(pipeline), 3, 64)
    assert list(found) == ["persons and objects", "background"]
    for missed in found.values():
        assert len(missed) == len(BENCH["RATIOS"])
        assert missed[-1] > missed[0] > 0


def test_the_foreground_is_what_persons_and_objects_cover() -> None:
    """A cell counts where they cover more than half of it."""
    drawn = render(sample_scene(0), 64)
    cells = BENCH["foreground"]([drawn], 64)[0, 0].numpy()
    assert (cells == sum(thing.mask for thing in drawn.things).astype(bool)).all()
    assert 0 < BENCH["foreground"]([drawn], 16).float().mean() < 1
