"""From what was asked to what one denoiser call needs: which step, which half of guidance, whose tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interactdiff.checkpoint import AdapterError
from interactdiff.interaction.call import Call, ControlledSite, Reading, SceneTable
from interactdiff.scene import SceneError
from interactdiff.schedule import StepClock, refreshes, scheduled


class Control:
    """What was asked for.

    Args:
        sites: where the adapter acts.
        table: the tokens.
        strength: multiplies the schedule's value.
        shares: the schedule, [on, linear decay, off].
        pipeline: asked about guidance and steps; may be None.
        guidance: whether batches come in two halves; None to ask the pipeline.
        num_inference_steps: of a run without a pipeline.
        fast: whether to reuse what was added at an earlier step.
    """

    def __init__(
        self,
        sites: Sequence[ControlledSite],
        table: SceneTable,
        strength: float,
        shares: tuple[float, float, float],
        pipeline: Any = None,
        guidance: bool | None = None,
        num_inference_steps: int | None = None,
        fast: bool = False,
    ):
        self._sites, self._table, self._pipeline = sites, table, pipeline
        self._strength, self._shares, self._guidance, self._fast = strength, shares, guidance, fast
        self._steps = num_inference_steps
        self._clock = StepClock(pipeline, num_inference_steps)
        self._scale: tuple[float, Tensor] | None = None
        self._rows: dict[tuple[Any, ...], tuple[Tensor, Tensor | None] | None] = {}
        self._kept_for: tuple[Any, ...] | None = None

    def __str__(self) -> str:
        """What was asked for, in words."""
        scenes = "tokens" if self._table.given else f"{self._table.scenes} scenes"
        shares = ", ".join(f"{share:g}" for share in self._shares)
        fast = ", fast" if self._fast else ""
        return f"{scenes} at strength {self._strength:g}, schedule [{shares}]{fast}"

    def follow(self, pipeline: Any) -> None:
        """Ask another pipeline about guidance and steps."""
        self._pipeline, self._clock = pipeline, StepClock(pipeline, self._steps)
        self._rows.clear()
        self._kept_for = None

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Follow the adapter to another device or dtype."""
        self._table = self._table.to(device, dtype)
        self._rows.clear()
        self._kept_for = None
        for site in self._sites:
            site.forget()

    def plan(self, reading: Reading) -> Call | None:
        """What a denoiser call needs; None if it needs nothing.

        Raises:
            SceneError: scenes do not explain the batch.
            AdapterError: the pipeline does not tell whether guidance is on.
        """
        step, value = self._scheduled(reading.timestep)
        value *= self._strength
        if value == 0:
            return None
        batch, size, text_length = reading.batch, reading.size, reading.text_length
        scale = self._scalar(value, reading.device)
        if self._table.given:
            if batch != self._table.scenes:
                raise SceneError(f"expected tokens for {batch} batch rows, got {self._table.scenes}")
            seen = self._table.seen(None, size)
            return Call(scale, batch, size, text_length, tokens=self._table.tokens, seen=seen)
        halves = self._halves(reading)
        found = self._rows_of(batch, halves)
        if found is None:
            return None
        for site in self._sites:
            site.prepare(self._table.tokens, size)
        rows, controlled = found
        reuse = self._may_reuse(step, (batch, halves, size, value))
        keep = self._fast and step is not None
        seen = self._table.seen(rows, size)
        return Call(scale, batch, size, text_length, None, rows, controlled, seen, reuse, keep)

    def _scheduled(self, timestep: Tensor | float) -> tuple[int | None, float]:
        """The step, if anything depends on it, and the schedule's value at it.

        Where no step can be known, the schedule is all or nothing.
        """
        on, _, off = self._shares
        constant = 1.0 if on == 1 else 0.0 if off == 1 else None
        if constant is not None and not self._fast:
            return None, constant
        now = self._clock.read(timestep)
        if now is None:
            return None, 1.0 if constant is None else constant
        return now[0], scheduled(*now, self._shares)

    def _scalar(self, value: float, device: torch.device) -> Tensor:
        if self._scale is None or self._scale[0] != value or self._scale[1].device != device:
            self._scale = value, torch.tensor(value, device=device)
        return self._scale[1]

    def _may_reuse(self, step: int | None, kept_for: tuple[Any, ...]) -> bool:
        """Whether what the fusers added last serves this call; if not, they are to run again."""
        same, self._kept_for = self._kept_for == kept_for, kept_for
        return self._fast and step is not None and same and not refreshes(step)

    def _rows_of(self, batch: int, halves: tuple[bool, ...]) -> tuple[Tensor, Tensor | None] | None:
        """For each controlled row of the batch its tokens, and which rows those are if not all; or None."""
        if (batch, halves) in self._rows:
            return self._rows[batch, halves]
        scenes = self._table.scenes
        images, rest = divmod(batch, len(halves))
        if rest or images % scenes:
            raise SceneError(
                f"expected a batch of {len(halves)} times a multiple of {scenes} rows, for {scenes} scenes "
                f"with guidance {'on' if False in halves else 'off'}, got {batch} rows"
            )
        per_prompt = images // scenes
        scene_of_row = [(image // per_prompt, half) for half in halves for image in range(images)]
        controlled = [row for row, asked in enumerate(scene_of_row) if self._table.controls(*asked)]
        found = None
        if controlled:
            rows = self._table.rows([scene_of_row[row] for row in controlled])
            every = len(controlled) == batch
            found = rows, None if every else torch.tensor(controlled, device=rows.device)
        self._rows[batch, halves] = found
        return found

    def _halves(self, reading: Reading) -> tuple[bool, ...]:
        """For each part of the batch whether it is conditional, in diffusers' order."""
        if reading.halves is not None:
            return reading.halves
        guidance = self._guidance
        if guidance is None and self._pipeline is not None:
            guidance = getattr(self._pipeline, "do_classifier_free_guidance", None)
            if guidance is None:
                name = type(self._pipeline).__name__
                raise AdapterError(
                    f"expected a pipeline with do_classifier_free_guidance, got {name} without it: "
                    "give set_scene guidance=True or False"
                )
        perturbed = getattr(self._pipeline, "do_perturbed_attention_guidance", False)
        return (False,) * bool(guidance) + (True,) + (True,) * bool(perturbed)
