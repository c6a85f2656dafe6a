"""When an adapter acts: a share of a run's denoising steps, however many denoiser calls a step takes."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from interactdiff.scene import SceneError

Schedule = float | tuple[float, float, float]  # beta; or the shares [on, linear decay, off], together 1


def checked_schedule(schedule: Schedule) -> tuple[float, float, float]:
    """The general form [on, decay, off] of a schedule.

    Args:
        schedule: the share of steps in [0, 1] that come first and are controlled, or three shares that add up
            to 1.

    Raises:
        SceneError: it is neither.
    """
    shares = schedule if isinstance(schedule, tuple | list) else (schedule,)
    if all(isinstance(share, Real) and 0 <= share <= 1 for share in shares):
        if len(shares) == 1:
            return float(shares[0]), 0.0, 1.0 - shares[0]
        if len(shares) == 3 and abs(sum(shares) - 1) < 1e-6:
            return float(shares[0]), float(shares[1]), float(shares[2])
    raise SceneError(f"expected a schedule in [0, 1], or three shares that add up to 1, got {schedule!r}")


def scheduled(step: int, steps: int, shares: tuple[float, float, float]) -> float:
    """The schedule's value s at a step, in [0, 1].

    Args:
        step: which step, from 0.
        steps: how many the run has.
        shares: [on, decay, off].
    """
    on, decay = (math.floor(share * steps + 1e-6) for share in shares[:2])  # 0.29 * 100 is 28.999999999999996
    if step < on:
        return 1.0
    return max(0.0, 1 - (step - on + 1) / decay) if decay else 0.0


def steps_of_calls(timesteps: Sequence[float], num_inference_steps: int | None, order: int) -> list[int]:
    """Which step each denoiser call of a run belongs to.

    Multistep schedulers call once a step. Heun's and PNDM's evaluate some timesteps twice: the timestep is
    the step, so that both evaluations of one noise level are controlled alike. KDPM2's add timesteps in
    between: `order` calls make a step.

    Args:
        timesteps: the scheduler's, one for each call.
        num_inference_steps: the steps that were asked for, if the scheduler knows.
        order: the scheduler's order, calls a step.

    Returns:
        For each call its step, from 0.
    """
    levels = list(dict.fromkeys(timesteps))
    if num_inference_steps in (None, len(timesteps)):
        return list(range(len(timesteps)))
    calls_a_level = 1 if len(levels) == num_inference_steps else order
    return [levels.index(timestep) // calls_a_level for timestep in timesteps]


class StepClock:
    """Tells which step a denoiser call belongs to.

    Args:
        pipeline: whose scheduler knows the timesteps of the run; may be None.
        num_inference_steps: the run's steps, for a denoiser called without a pipeline: steps are then counted
            by their falling timesteps, and a rising one starts a new run.
    """

    def __init__(self, pipeline: Any, num_inference_steps: int | None):
        self._pipeline, self._steps = pipeline, num_inference_steps
        self._counted, self._last = -1, math.inf
        self._run: Any = None
        self._table: list[tuple[float, int]] = []

    def read(self, timestep: Tensor | float) -> tuple[int, int] | None:
        """The step, from 0, and how many the run has; None if there is no way to know.

        Args:
            timestep: as the denoiser got it; of a batch the first counts.
        """
        now = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        if self._steps is not None:
            if now != self._last:
                self._counted = self._counted + 1 if now < self._last else 0
            self._last = now
            return min(self._counted, self._steps - 1), self._steps
        if self._pipeline is None:
            return None
        self._read_scheduler()
        step = min(self._table, key=lambda entry: abs(entry[0] - now))[1]
        first, last = self._table[0][1], self._table[-1][1]
        return step - first, last - first + 1

    def _read_scheduler(self) -> None:
        """Lay out the pipeline's run, which starts late in the scheduler's timesteps for image to image."""
        scheduler = self._pipeline.scheduler
        calls = getattr(self._pipeline, "num_timesteps", None) or len(scheduler.timesteps)
        if self._run is not None and self._run[0] is scheduler.timesteps and self._run[1] == calls:
            return
        timesteps = [float(t) for t in scheduler.timesteps.tolist()]
        steps = steps_of_calls(timesteps, getattr(scheduler, "num_inference_steps", None), scheduler.order)
        self._table = list(zip(timesteps, steps, strict=True))[-calls:]
        self._run = (scheduler.timesteps, calls)
