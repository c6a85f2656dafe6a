"""The table of a base's error by level of noise: `benchmarks/denoising_error.py`."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from interactdiff.concept.denoising import Denoising
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import render
from interactdiff.stickworld.world import HELD_OUT

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
        error = BENCH["squared_error"](denoising, latents, noise, times, prompt)
    if hasattr(pipeline, "unet"):
        found = pipeline.scheduler.step(predicted, time, noisy).pred_original_sample
    else:
        found = noisy - time / 1000 * predicted
    torch.testing.assert_close(error, (found - latents).square())


def test_levels_of_noise_are_those_of_the_table(pipeline: Any) -> None:
    """As the scheduler's own table, or the time of a flow, has them."""
    times = torch.tensor(BENCH["nearest_times"](Denoising.of(pipeline)))
    if hasattr(pipeline, "unet"):
        kept = pipeline.scheduler.alphas_cumprod[times]
        ratios = ((1 - kept) / kept).sqrt()
    else:
        ratios = times / (1000 - times)
    torch.testing.assert_close(ratios, torch.tensor(BENCH["RATIOS"]), rtol=0.05, atol=0)


@torch.no_grad()
def test_errors_are_of_persons_and_objects_apart_from_the_background(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle goes from cell to cell, of two batches."""
    monkeypatch.setitem(BENCH["main"].__globals__, "BATCH", 2)
    denoising, level = Denoising.of(pipeline), 4
    found = BENCH["errors"](denoising, range(HELD_OUT, HELD_OUT + 3), 64)
    time = BENCH["nearest_times"](denoising)[level]
    cells: dict[str, list[Any]] = {"persons and objects": [], "background": []}
    for first, scenes in ((0, (0, 1)), (2, (2,))):
        worlds = [sample_scene(HELD_OUT + n) for n in scenes]
        drawn = [render(world, 64) for world in worlds]
        latents = torch.cat([denoising.latents(Image.fromarray(one.image)) for one in drawn])
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(first))
        prompt = denoising.encode([world.caption for world in worlds], (64, 64))
        times = torch.full((len(latents),), time)
        error = BENCH["squared_error"](denoising, latents, noise, times, prompt)
        side = 64 // latents.shape[-1]
        for n, one in enumerate(drawn):
            covered = np.any([thing.mask for thing in one.things], axis=0)
            for y, x in np.ndindex(*latents.shape[2:]):
                share = covered[y * side : (y + 1) * side, x * side : (x + 1) * side].mean()
                region = "persons and objects" if share > 0.5 else "background"
                cells[region].append((latents[n, :, y, x], error[n, :, y, x]))
    for region, missed in found.items():
        values, squares = (torch.stack(part) for part in zip(*cells[region], strict=True))
        assert missed[level] == pytest.approx(float(squares.mean(0).sum() / values.var(0).sum()), rel=1e-4)
