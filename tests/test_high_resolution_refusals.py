"""What HighResolution refuses, each in one sentence."""

from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchHeunDiscreteScheduler,
)
from test_high_resolution import CALL, OPTIONS, Counter

from interactdiff.clear.high_resolution import HighResolution
from interactdiff.clear.pattern import ClearError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, r"^scales: expected rising numbers from 1 up, got \(\)$"),
        ({"scales": (1, 2, 2)}, r"^scales: expected rising numbers from 1 up, got \(1, 2, 2\)$"),
        ({"scales": (0.5, 2)}, "^scales: "),
        ({"scales": (1, float("inf"))}, "^scales: "),
        ({"scales": (1, float("nan"))}, "^scales: "),
        ({"strength": 0}, "^strength: expected a number above 0 and up to 1, got 0$"),
        ({"strength": 1.1}, "^strength: .* got 1.1$"),
        ({"steps": 0}, "^steps: expected a whole number from 1 up, got 0$"),
        ({"steps": 2.0}, "^steps: .* got 2.0$"),
        ({"steps": 3, "strength": 0.3}, "^steps: expected at least 4 for strength 0.3, got 3$"),
        ({"steps": 3, "strength": 0.7}, "^steps: expected at least 4 for strength 0.7, got 3$"),
        ({"steps": 4, "strength": 0.8}, "^steps: expected at least 5 for strength 0.8, got 4$"),
        ({"shift": 0}, "^shift: expected a number above 0, got 0$"),
        ({"tile": 12}, "^tile: expected None, auto or a multiple of 8 px, got 12$"),
        ({"tile": 0}, "^tile: .* got 0$"),
        ({"tile": "small"}, "^tile: .* got 'small'$"),
    ],
)
def test_bad_options(flux_pipe: Any, options: dict[str, Any], message: str):
    with pytest.raises(ClearError, match=message):
        HighResolution(flux_pipe, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"height": 30}, "^size: expected multiples of 4 px at every scale, got 32 x 30 at scale 1$"),
        ({"width": 0}, "^width: expected a whole number from 1 up, got 0$"),
        ({"height": 24.0}, "^height: expected a whole number from 1 up, got 24.0$"),
        ({"base_steps": 0}, "^base_steps: "),
        ({"seed": -1}, "^seed: expected a whole number from 0 to 18446744073709551615, got -1$"),
        ({"seed": 2**64}, "^seed: "),
        ({"prompt": ["a cat", "a dog"]}, "^prompt: expected one prompt, got a list of 2$"),
        ({"negative_prompt": ("a", "b")}, "^negative_prompt: expected one prompt, got a tuple of 2$"),
        ({"prompt_embeds": torch.zeros(2, 3, 4)}, "^prompt_embeds: expected one prompt, got a Tensor of 2$"),
        ({"strength": 0.5}, "^expected arguments of FluxPipeline that all stages share, got strength$"),
        ({"guidance_scale": 2.0}, "^expected arguments .* got guidance_scale$"),
        ({"output_type": "latent"}, "^expected arguments .* got output_type$"),
        ({"num_images_per_prompt": 2}, "^expected arguments .* got num_images_per_prompt$"),
        ({"guidence": 2.0}, "^expected arguments .* got guidence$"),
    ],
)
def test_bad_calls(flux_pipe: Any, call: dict[str, Any], message: str):
    counter = Counter(flux_pipe)
    with pytest.raises(ClearError, match=message):
        HighResolution(flux_pipe, **OPTIONS)(**CALL | call)
    assert counter.calls == 0


def test_sizes_that_a_scale_does_not_allow(flux_pipe: Any, sd3_pipe: Any):
    with pytest.raises(
        ClearError, match=r"expected multiples of 4 px at every scale, got 54 x 36 at scale 1.5$"
    ):
        HighResolution(flux_pipe, scales=(1, 1.5)).stages(24, 36)
    assert HighResolution(flux_pipe, scales=(1, 1.5)).stages(24, 32)[1].height == 36
    helper = HighResolution(sd3_pipe, scales=(1, 2))
    assert helper.stages(64, 64)[1].grid == (32, 32), "all the positions that it has"
    message = "^size: expected at most 128 px, which SD3 has positions for, got 64 x 136 at scale 2$"
    with pytest.raises(ClearError, match=message):
        helper.stages(68, 32)


def test_pipelines_that_it_does_not_know(pipe: Any, flux_pipe: Any):
    with pytest.raises(
        ClearError, match=r"^pipeline: expected one of FluxPipeline, .* got StableDiffusionPipeline$"
    ):
        HighResolution(pipe)
    with pytest.raises(ClearError, match=r"^pipeline: .* got FluxTransformer2DModel$"):
        HighResolution(flux_pipe.transformer)
    flux_pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    message = "^scheduler: expected FlowMatchEulerDiscreteScheduler, got FlowMatchHeunDiscreteScheduler$"
    with pytest.raises(ClearError, match=message):
        HighResolution(flux_pipe)
