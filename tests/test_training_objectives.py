"""Noise, times and weights of the losses against diffusers' own, and what examples are trained without."""

import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import EMAModel

from interactdiff.data.converters.base import Options
from interactdiff.data.converters.run import run as convert
from interactdiff.data.mixture import Mixture
from interactdiff.data.reading import Records
from interactdiff.errors import RecipeError
from interactdiff.scene import Entity, Interaction
from interactdiff.training.checkpoints import TrainingState, read_checkpoint
from interactdiff.training.config import checked
from interactdiff.training.interaction_config import DropsConfig, InteractionConfig
from interactdiff.training.interaction_data import Variation, inside_boxes, items_of, without_actions
from interactdiff.training.objectives import Diffusion, Flow, weighted_loss
from interactdiff.training.optimizers import make_optimizers
from interactdiff.training.pictures_config import LossConfig
from interactdiff.training.run import load_config

RIDING = Interaction("person", "riding", "bike", (0.1, 0.1, 0.6, 0.7), (0.2, 0.4, 0.9, 0.9))
BALL = Entity("ball", (0.0, 0.0, 0.5, 0.25))
CONFIGS = Path(__file__).parent.parent / "training/configs"


def config_of(prediction: str, **options: Any) -> Any:
    return DDIMScheduler(prediction_type=prediction, **options).config


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_diffusion_is_the_schedulers(prediction: str) -> None:
    objective = Diffusion(config_of(prediction), LossConfig(snr_gamma=5.0))
    latents = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    noise, times = torch.randn_like(latents), torch.tensor([0, 500, 999])
    noisy, target = objective.noisy(latents, noise, times), objective.target(latents, noise, times)
    scheduler: Any = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(1000)
    for n, time in enumerate(times):
        found = scheduler.step(target[n], time, noisy[n]).pred_original_sample
        assert torch.allclose(found, latents[n], atol=2e-2 if time == 999 else 1e-4)
    alpha = scheduler.alphas_cumprod[times]
    snr = alpha / (1 - alpha)
    by = snr if prediction == "epsilon" else snr + 1
    assert torch.allclose(objective.weights(times), snr.clamp(max=5.0) / by, rtol=1e-4)


def test_min_snr_at_a_terminal_snr_of_zero_is_finite() -> None:
    config = config_of("epsilon", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert Diffusion(config, LossConfig(snr_gamma=5.0)).weights(torch.tensor([999])).isfinite().all()


def test_a_base_that_predicts_pictures_is_refused() -> None:
    with pytest.raises(RecipeError, match="expected a base that predicts epsilon or v, got 'sample'"):
        Diffusion(config_of("sample"), LossConfig())


def test_times_of_flow_are_shifted_as_the_scheduler_draws() -> None:
    drawn = torch.linspace(0.05, 0.95, 7)
    fixed: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    dynamic: Any = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    latents = torch.zeros(16, 128, 128)  # 1024 px: 4096 tokens
    for scheduler, expected in (
        (fixed, 3 * drawn / (1 + 2 * drawn)),
        (dynamic, dynamic.time_shift(1.15, 1, drawn)),
    ):
        factor = Flow(scheduler.config, LossConfig()).shift(latents)
        assert torch.allclose(factor * drawn / (1 + (factor - 1) * drawn), expected)
    assert Flow(dynamic.config, LossConfig()).shift(torch.zeros(16, 32, 32)) == pytest.approx(math.exp(0.5))
    assert Flow(fixed.config, LossConfig(shift=1.0)).shift(latents) == 1.0


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
def test_noise_and_times_go_by_the_generator_alone(density: str) -> None:
    objective = Flow(FlowMatchEulerDiscreteScheduler().config, LossConfig(density=density))
    latents = torch.zeros(4, 8, 8)
    one, same, other = (objective.draw(latents, torch.Generator().manual_seed(n)) for n in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["noise"], other["noise"])
    assert 0 < one["times"] < 1


def test_the_loss_weights_examples_and_boxes() -> None:
    error = torch.zeros(2, 3, 4, 4)
    error[0, :, 0, :2], error[1] = 1.0, 1.0  # the ball's box, and everything
    inside = inside_boxes([[BALL], []], 4, 4)
    assert inside[0, 0, 0].tolist() == [1, 1, 0, 0]
    assert inside.sum() == 2
    weights = torch.tensor([1.0, 0.5])
    assert weighted_loss(error, weights).item() == pytest.approx((2 / 16 + 0.5) / 2)
    assert weighted_loss(error, weights, inside, 3.0).item() == pytest.approx((8 / 22 + 0.5) / 2)


# --- examples ---


def test_a_caption_without_its_actions() -> None:
    assert without_actions("A person is riding a bike", [RIDING]) == "A person and a bike"
    assert without_actions("a person Riding a bike, striding", [RIDING]) == "a person and a bike, striding"
    assert without_actions("a person on a bike", [RIDING, BALL]) == "a person on a bike"


def test_the_largest_items_take_the_slots() -> None:
    assert items_of([BALL, RIDING, BALL], 2) == [BALL, RIDING]
    assert items_of([BALL, RIDING], 1) == [RIDING]


def test_drops_come_as_often_as_they_should() -> None:
    drops = DropsConfig(keep_caption=0.5, strip_caption=0.2, all=0.1, action=0.25, item=0.0, jitter=0.02)
    vary, rng = Variation(drops, 30), random.Random(0)
    drawn = [vary("a person is riding a bike", [RIDING], rng) for _ in range(4000)]
    shares = {
        "null": np.mean([not items for _, items in drawn]),
        "whole": np.mean(["riding" in prompt for prompt, _ in drawn]),
        "stripped": np.mean(["and" in prompt for prompt, _ in drawn]),
        "action": np.mean([items[0].action is None for _, items in drawn if items]),  # type: ignore[union-attr]
    }
    expected = {"null": 0.1, "whole": 0.45, "stripped": 0.18, "action": 0.25}
    assert shares == pytest.approx(expected, abs=0.03)
    boxes = np.array([items[0].object_box for _, items in drawn if items])  # type: ignore[union-attr]
    moved = np.abs(boxes - RIDING.object_box) / np.array([0.7, 0.5, 0.7, 0.5])
    assert 0.015 < moved.max() <= 0.02
    assert vary("a ball", [], random.Random(1))[0] == "a ball"  # nothing else says what is there


def test_data_sets_are_mixed_by_weight(tmp_path: Path) -> None:
    for name, seeds in (("one", "0:2"), ("two", "5:8")):
        convert("stickworld", seeds, tmp_path / name, Options(size=32))
    parts = [Records.open(tmp_path / name) for name in ("one", "two")]
    mixture = Mixture(parts, [1, 3])
    assert [one.name for one in mixture] == [one.name for part in parts for one in part]
    assert mixture.weights.tolist() == [1, 1, 3, 3, 3]
    assert mixture.shards.tolist() == [0, 0, 1, 1, 1]
    assert mixture.place(2) == (1, 0)


# --- configuration ---


@pytest.mark.parametrize(("name", "package"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_an_optimizer_without_its_package_is_one_sentence(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (package, f"{package}.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    values = load_config(CONFIGS / "smoke.yaml", [f"optimizer={name}"])
    config = checked(InteractionConfig, values)
    with pytest.raises(RecipeError, match=f"expected the package {package} for {name}, got none"):
        make_optimizers([torch.nn.Parameter(torch.zeros(2))], config)


@pytest.mark.parametrize(("name", "package"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_an_optimizer_of_another_package_goes_on_where_it_was(
    name: str, package: str, tmp_path: Path
) -> None:
    """With states of 8 bits, which weights of 4,096 values and more have, and others."""
    pytest.importorskip(package)
    values = load_config(CONFIGS / "smoke.yaml", [f"optimizer={name}", "learning_rate=0.5"])

    def started() -> tuple[torch.nn.Module, TrainingState]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 4))
        optimizers = make_optimizers([*model.parameters()], checked(InteractionConfig, values))
        return model, TrainingState(model, optimizers, [], EMAModel([]))

    def trained(model: torch.nn.Module, state: TrainingState, steps: range) -> list[float]:
        losses = []
        for step in steps:
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
            losses.append((loss := (model(x) - 1).square().mean()).item())
            loss.backward()
            for optimizer in state.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return losses

    model, state = started()
    trained(model, state, range(4))
    state.save(tmp_path, "a run", 4, {})
    unbroken = trained(model, state, range(4, 8))
    again, other = started()
    other.load(read_checkpoint(tmp_path))
    kinds = [
        {one.dtype for one in values.values() if torch.is_tensor(one)}
        for values in other.optimizers[0].state.values()
    ]
    assert (torch.uint8 in kinds[0]) == (name == "adamw8bit")
    assert trained(again, other, range(4, 8)) == unbroken
    assert unbroken[-1] < unbroken[0]
