"""When an adapter acts: a share of a run's denoising steps, however many denoiser calls a step takes."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def scheduled(step: int, steps: int, shares: tuple[float, float, float]) -> float:
    """The schedule's value s at a step, in [0, 1]. Of few steps a share above 0 has the first one at least.

    Args:
        step: which step, from 0.
        steps: how many the run has.
        shares: [on, decay, off].
    """
    on, decay = (math.floor(share * steps + 1e-6) for share in shares[:2])  # 0.29 * 100 is 28.999999999999996
    if shares[0] > 0:
        on = max(on, 1)
    elif shares[1] > 0:
        decay = max(decay, 2)
    if step < on:
        return 1.0
    return max(0.0, 1 - (step - on + 1) / decay) if decay else 0.0


def refreshes(step: int) -> bool:
    """Whether fast control computes anew at a step rather than reusing what it computed before.

    It does at the squares, 0, 1, 4, 9, 16 ..., since a picture is decided early and what the fusers add
    changes less and less. Of 20 steps that is 5, of 50 it is 8.
    """
    return math.isqrt(step) ** 2 == step


def steps_of_calls(timesteps: Sequence[float], num_inference_steps: int | None, order: int) -> list[int]:
    """Which step each denoiser call of a run belongs to.

    Multistep schedulers call once a step. Heun's and PNDM's evaluate some timesteps twice: the timestep is
    the step, so that both evaluations of one noise level are controlled alike. KDPM2's and DPM++ SDE's add
    timesteps in between: `order` calls make a step.

    Args:
        timesteps: the scheduler's, one for each call.
        num_inference_steps: the number of steps of the run, if the scheduler knows.
        order: the scheduler's order, calls a step.

    Returns:
        For each call its step, from 0.
    """
    levels = list(dict.fromkeys(timesteps))
    if num_inference_steps in (None, len(timesteps)):
        return list(range(len(timesteps)))
    if len(levels) == num_inference_steps:
        return [levels.index(timestep) for timestep in timesteps]
    return [call // order for call in range(len(timesteps))]


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
        self._call = -1

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
        self._read_scheduler(now)
        off = [abs(timestep - now) for timestep, _ in self._table]
        # of equal timesteps the next one: KDPM2's ancestral ends with two that belong to different steps
        self._call = min(range(len(off)), key=lambda call: (off[call], call <= self._call))
        first, last = self._table[0][1], self._table[-1][1]
        return self._table[self._call][1] - first, last - first + 1

    def _read_scheduler(self, now: float) -> None:
        """Lay out the pipeline's run from its first call on.

        Image to image starts late in the scheduler's timesteps; SDXL's `denoising_end` ends early, which not
        every pipeline says in its number of timesteps.
        """
        scheduler = self._pipeline.scheduler
        calls = getattr(self._pipeline, "num_timesteps", None) or len(scheduler.timesteps)
        if self._run is not None and self._run[0] is scheduler.timesteps and self._run[1] == calls:
            return
        timesteps = [float(t) for t in scheduler.timesteps.tolist()]
        steps = steps_of_calls(timesteps, getattr(scheduler, "num_inference_steps", None), scheduler.order)
        first = min(range(len(timesteps)), key=lambda call: abs(timesteps[call] - now))
        table = list(zip(timesteps, steps, strict=True))[first : first + calls]
        if isinstance(end := getattr(self._pipeline, "denoising_end", None), float) and 0 < end < 1:
            trained = scheduler.config.num_train_timesteps
            table = [entry for entry in table if entry[0] >= round(trained * (1 - end))] or table
        self._table = table
        self._run, self._call = (scheduler.timesteps, calls), -1
