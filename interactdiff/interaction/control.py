"""From what was asked to what one denoiser call needs: which step, which half of guidance, whose tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interactdiff.checkpoint import AdapterError
from interactdiff.interaction.tokens import token_table
from interactdiff.interaction.unet import Call, FusedSite
from interactdiff.scene import SceneError
from interactdiff.schedule import StepClock, refreshes, scheduled


class Control:
    """What was asked for.

    Args:
        sites: where the fusers are.
        tokens: [S + 1, 3N, token_dim] of S scenes and then of the unconditional half; or one row for each
            batch row.
        used: for each scene how many slots are not empty; None where tokens were given instead of scenes:
            gradients flow to them, and nothing is computed ahead.
        strength: multiplies the schedule's value.
        shares: the schedule, [on, linear decay, off].
        pipeline: asked about guidance and steps; may be None.
        guidance: whether batches come in two halves; None to ask the pipeline.
        num_inference_steps: of a run without a pipeline.
        fast: whether to reuse what the fusers added at an earlier step.
    """

    def __init__(
        self,
        sites: Sequence[FusedSite],
        tokens: Tensor,
        used: list[int] | None,
        strength: float,
        shares: tuple[float, float, float],
        pipeline: Any = None,
        guidance: bool | None = None,
        num_inference_steps: int | None = None,
        fast: bool = False,
    ):
        self._tokens, self._index = (tokens, None) if used is None else token_table(tokens, used)
        self._sites, self._used, self._pipeline = sites, used, pipeline
        self._strength, self._shares, self._guidance, self._fast = strength, shares, guidance, fast
        self._clock = StepClock(pipeline, num_inference_steps)
        self._scale: tuple[float, Tensor] | None = None
        self._rows: dict[tuple[Any, ...], tuple[Tensor, Tensor | None]] = {}
        self._kept_for: tuple[Any, ...] | None = None

    def __str__(self) -> str:
        """What was asked for, in words."""
        scenes = "tokens" if self._used is None else f"{len(self._used)} scenes"
        shares = ", ".join(f"{share:g}" for share in self._shares)
        fast = ", fast" if self._fast else ""
        return f"{scenes} at strength {self._strength:g}, schedule [{shares}]{fast}"

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Follow the adapter to another device or dtype."""
        self._tokens = self._tokens.to(device, dtype)
        self._index = None if self._index is None else self._index.to(device)
        self._rows.clear()
        self._kept_for = None
        for site in self._sites:
            site.forget()

    def plan(self, sample: Tensor, timestep: Tensor | float) -> Call | None:
        """What a denoiser call needs; None if it needs nothing.

        Args:
            sample: [B, C, H, W], the latents that the call gets.
            timestep: likewise.

        Raises:
            SceneError: scenes do not explain the batch.
            AdapterError: the pipeline does not tell whether guidance is on.
        """
        step, value = self._scheduled(timestep)
        value *= self._strength
        if value == 0:
            return None
        batch, size = len(sample), (sample.shape[-2], sample.shape[-1])
        scale = self._scalar(value, sample.device)
        if self._used is None or self._index is None:
            if batch != len(self._tokens):
                raise SceneError(f"expected tokens for {batch} batch rows, got {len(self._tokens)}")
            return Call(scale, size, tokens=self._tokens)
        halves = self._halves()
        for site in self._sites:
            site.prepare(self._tokens, size)
        rows, controlled = self._rows_of(self._used, self._index, batch, halves)
        reuse = self._may_reuse(step, (batch, halves, size, value))
        keep = self._fast and step is not None
        return Call(scale, size, rows=rows, controlled=controlled, reuse=reuse, keep=keep)

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

    def _rows_of(
        self, used: list[int], index: Tensor, batch: int, halves: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """For each controlled row of the batch its tokens, and which rows those are if not all."""
        if (batch, halves) in self._rows:
            return self._rows[batch, halves]
        scenes = len(used)
        images, rest = divmod(batch, len(halves))
        if rest or images % scenes:
            raise SceneError(
                f"expected a batch of {len(halves)} times a multiple of {scenes} rows, for {scenes} scenes "
                f"with guidance {'on' if False in halves else 'off'}, got {batch} rows"
            )
        per_prompt = images // scenes
        scene_of_row = [(image // per_prompt, half) for half in halves for image in range(images)]
        controlled = [row for row, (scene, _) in enumerate(scene_of_row) if used[scene]]
        tokens_of_row = [scene if conditional else scenes for scene, conditional in scene_of_row]
        self._rows[batch, halves] = (
            index[[tokens_of_row[row] for row in controlled]],
            None if len(controlled) == batch else torch.tensor(controlled, device=index.device),
        )
        return self._rows[batch, halves]

    def _halves(self) -> tuple[bool, ...]:
        """For each part of the batch whether it is conditional, in diffusers' order."""
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
