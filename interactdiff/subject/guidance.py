"""Reference guidance (DreamTuner, Eq. 4 to 6), through any pipeline: one prediction for both of its halves.

    e_r = w_r eps(c, reference) - (w_r - 1) eps(c, none)     at a share p_r of the steps
    e_c = w_c eps(c, reference, less noise) - (w_c - 1) eps(uc, reference, more noise)     at the others

The latter is what the pipeline computes by itself, with the reference in both halves. For the former the
unconditional half gets the prompt and no reference, and both halves return e_r: u + w (c - u) of equal u and
c is that. v and velocities combine likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

import torch
from torch import Tensor

from interactdiff.adapter import EditedCall
from interactdiff.calls import Call, Rows
from interactdiff.errors import AdapterError

WITHOUT_BATCH = ("img_ids", "txt_ids")  # arguments that have no row for each picture


@dataclass
class GuidedStep:
    """How the step of the call under way is guided.

    Attributes:
        gap: whether the reference's noise differs by what a row is for.
        blind: which part of the batch sees no reference.
        by_reference: whether it is guided by the reference.
        doubled: whether rows were added that the caller does not know of.
        returns: whether the caller gets what its first call of the step gave.
    """

    gap: bool = False
    blind: int | None = None
    by_reference: bool = False
    doubled: bool = False
    returns: bool = False


class ReferenceGuidance:
    """Decides how each step is guided, and combines what the denoiser predicts.

    Args:
        settings: of the method, by name; read in each call.
    """

    def __init__(self, settings: Mapping[str, float]):
        self._settings = settings
        self._returned: dict[int, tuple[float, Tensor]] = {}  # of each thread, with its timestep

    def forget(self) -> None:
        """Forget a step of which a call is missing."""
        self._returned.clear()

    def by_reference(self, call: Call, seed: int, ahead: int = 0) -> bool:
        """Whether the step of a call, or one so many steps later, is guided by the reference."""
        step = int(call.timestep) if call.step is None else call.step[0]
        return guided_by_reference(seed, step + ahead, self._settings["guidance_share"])

    def step(self, call: Call, seed: int) -> tuple[GuidedStep, EditedCall | None]:
        """How the step of a call is guided, and what the denoiser is called with instead.

        Raises:
            AdapterError: there is one row a picture, and `extra_row` is 0; or there are parts of the batch
                beside prompt and negative prompt.
        """
        step = GuidedStep(self._settings["time_gap"] > 0, by_reference=self.by_reference(call, seed))
        halves = halves_of(call.rows)
        if halves is None and not self._settings["extra_row"]:
            raise AdapterError(
                "expected batches of prompt and negative prompt for reference guidance, got one row a "
                "picture: set extra_row to 1, which adds one, or guidance to 0"
            )
        if not step.by_reference:
            return step, None
        if halves is not None:
            step.blind = halves[0]
            edited = prompt_in_both(call.arguments, call.batch, halves)
        elif call.rows == ("unconditional",):
            step.returns = True
            return step, None
        else:
            step.blind, step.doubled = 0, True
            edited = map_rows(call.arguments, call.batch, lambda t: torch.cat([t, t]))
        return step, EditedCall(edited, ("conditional", "conditional"))

    def returned(self, call: Call, step: GuidedStep, prediction: Tensor) -> Tensor | None:
        """What the caller gets of a step that is guided by the reference, the same in both halves; else None.

        Raises:
            AdapterError: the negative prompt's call came before the prompt's.
        """
        if not step.by_reference:
            return None
        if step.returns:
            time, kept = self._returned.pop(call.thread, (None, None))
            if kept is None or time != call.timestep:
                raise AdapterError(
                    "expected the prompt's call before the negative prompt's for reference guidance, got "
                    "the other order"
                )
            return kept
        assert step.blind is not None
        guided = combined(prediction, step.blind, self._settings["guidance"])
        if step.doubled:
            self._returned[call.thread] = call.timestep, guided
            return guided
        return torch.cat([guided, guided])


def guided_by_reference(seed: int, step: int, share: float) -> bool:
    """Whether a step is guided by the reference, at a share p_r of the steps, and not by the text.

    By systematic sampling: of any N steps in a row N (1 - p_r), up or down to a whole number, are guided
    by the text, and the seed draws which. Independent draws, as published, can leave a short run without.

    Args:
        seed: of the scene.
        step: from 0.
        share: p_r, in [0, 1].
    """
    start = float(torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    before, after = (floor(start + n * (1 - share)) for n in (step, step + 1))
    return before == after


def halves_of(parts: Sequence[Rows]) -> tuple[int, int] | None:
    """Which part of a batch is the unconditional one, and which the prompt's; None if it has one part.

    Raises:
        AdapterError: there are others, as those of perturbed attention.
    """
    if len(parts) == 1:
        return None
    if sorted(parts) != ["conditional", "unconditional"]:
        raise AdapterError(
            f"expected batches of prompt and negative prompt for reference guidance, got {', '.join(parts)}"
        )
    return parts.index("unconditional"), parts.index("conditional")


def map_rows(arguments: Mapping[str, Any], batch: int, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A call's arguments with every tensor changed that has a row for each of the batch."""

    def mapped(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value) if value.ndim and len(value) == batch else value
        if isinstance(value, Mapping):
            return {name: mapped(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(mapped(one) for one in value)
        return value

    return {name: value if name in WITHOUT_BATCH else mapped(value) for name, value in arguments.items()}


def prompt_in_both(arguments: Mapping[str, Any], batch: int, halves: tuple[int, int]) -> dict[str, Any]:
    """The arguments with what the prompt's half has in the other half too."""
    _, conditional = halves
    return map_rows(arguments, batch, lambda t: torch.cat([t.chunk(2)[conditional]] * 2))


def combined(prediction: Tensor, blind: int, scale: float) -> Tensor:
    """e_r of both parts' predictions, Eq. 4: of the part that sees the reference and of the blind one."""
    parts = prediction.chunk(2)
    seeing = parts[1 - blind]
    return seeing if scale == 1 else scale * seeing - (scale - 1) * parts[blind]
