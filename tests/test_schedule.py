"""Schedules count steps, however many denoiser calls a step takes."""

import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
)

from interactdiff.scene import SceneError
from interactdiff.scene_checks import checked_schedule
from interactdiff.schedule import StepClock, scheduled, steps_of_calls

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' schedulers with numpy 2


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (1.0, [1, 1, 1, 1, 1]),
        (0, [0, 0, 0, 0, 0]),
        (0.4, [1, 1, 0, 0, 0]),
        (0.5, [1, 1, 0, 0, 0]),
        ((0.2, 0.4, 0.4), [1, 0.5, 0, 0, 0]),
        ((0.0, 0.8, 0.2), [0.75, 0.5, 0.25, 0, 0]),
    ],
)
def test_values(schedule, values):
    shares = checked_schedule(schedule)
    assert [scheduled(step, 5, shares) for step in range(5)] == pytest.approx(values)


@pytest.mark.parametrize(
    ("schedule", "steps", "values"),
    [
        (0.9, 1, [1]),
        (0.2, 4, [1, 0, 0, 0]),
        ((0, 0.5, 0.5), 1, [0.5]),
        (0.0, 1, [0]),
        ((0, 0.1, 0.9), 4, [0.5, 0, 0, 0]),
    ],
)
def test_of_few_steps_a_share_above_0_has_one(schedule, steps, values):
    assert [scheduled(step, steps, checked_schedule(schedule)) for step in range(steps)] == values


def test_shares_survive_floating_point():
    """0.29 * 100 is 28.999999999999996, which stands for 29 steps."""
    assert sum(scheduled(step, 100, checked_schedule(0.29)) for step in range(100)) == 29


@pytest.mark.parametrize("schedule", [-0.1, 1.1, float("nan"), (0.5, 0.6, 0.2), (0.5, 0.5), "0.5", None])
def test_other_schedules_are_refused(schedule):
    with pytest.raises(SceneError, match="schedule: expected a share in"):
        checked_schedule(schedule)


@pytest.mark.parametrize(
    ("scheduler_class", "options", "steps"),
    [
        pytest.param(DDIMScheduler, {}, [0, 1, 2, 3], id="ddim"),
        pytest.param(EulerDiscreteScheduler, {}, [0, 1, 2, 3], id="euler"),
        pytest.param(DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, [0, 1, 2, 3], id="karras"),
        pytest.param(HeunDiscreteScheduler, {}, [0, 1, 1, 2, 2, 3, 3], id="heun"),
        pytest.param(PNDMScheduler, {"skip_prk_steps": True}, [0, 1, 1, 2, 3], id="pndm"),
        pytest.param(KDPM2DiscreteScheduler, {}, [0, 0, 1, 1, 2, 2, 3], id="kdpm2"),
    ],
)
def test_steps_of_real_schedulers(scheduler_class, options, steps):
    scheduler = scheduler_class(**options)
    scheduler.set_timesteps(4)
    assert (
        steps_of_calls(scheduler.timesteps.tolist(), scheduler.num_inference_steps, scheduler.order) == steps
    )


def test_without_a_pipeline_falling_timesteps_are_counted():
    clock = StepClock(None, 3)
    calls = [900.0, 900.0, 500.0, 1.0, 900.0, 500.0]
    assert [clock.read(t) for t in calls] == [(0, 3), (0, 3), (1, 3), (2, 3), (0, 3), (1, 3)]


def test_without_pipeline_and_steps_nothing_is_known():
    assert StepClock(None, None).read(500.0) is None
