"""From a scene to what one denoiser call needs: how strongly it acts there, and on which rows."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interactdiff.calls import Call, scenes_of_rows
from interactdiff.interaction.site_state import ControlledSite, SceneTokenTable, SiteState
from interactdiff.scene import SceneError
from interactdiff.schedule import refreshes, scheduled

KEPT_RUNS = 16  # of which what was added last is kept, beside the one under way


class ActiveScene:
    """A scene, or tokens, that interactions act by.

    Args:
        sites: where they act.
        table: the tokens.
        strength: multiplies the schedule's value.
        shares: the schedule, [on, linear decay, off].
        fast: whether to reuse what was added at an earlier step.
    """

    def __init__(
        self,
        sites: Sequence[ControlledSite],
        table: SceneTokenTable,
        strength: float,
        shares: tuple[float, float, float],
        fast: bool = False,
    ):
        self._sites, self._table = sites, table
        self._strength, self._shares, self._fast = strength, shares, fast
        self._scale: tuple[float, Tensor] | None = None
        self._rows: dict[tuple[Any, ...], tuple[Tensor, Tensor | None] | None] = {}
        self._autocast: torch.dtype | None = None
        self._runs: OrderedDict[Any, list[Tensor | None]] = OrderedDict()  # what each has kept at every site
        self._kept_for: dict[Any, tuple[Any, ...]] = {}
        self._run: Any = None

    def __str__(self) -> str:
        """In words."""
        count = self._table.scenes
        scenes = "tokens" if self._table.by_row else f"{count} scene{'s' * (count != 1)}"
        shares = ", ".join(f"{share:g}" for share in self._shares)
        fast = ", fast" if self._fast else ""
        return f"{scenes} at strength {self._strength:g}, schedule [{shares}]{fast}"

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Follow the adapter to another device or dtype."""
        self._table = self._table.to(device, dtype)
        self._rows.clear()
        self._forget()

    def plan(self, call: Call) -> SiteState | None:
        """What a denoiser call needs; None if it needs nothing.

        Raises:
            SceneError: scenes do not explain the batch.
            AdapterError: neither the call nor its caller tells whether guidance is on.
        """
        step, value = self._scheduled(call)
        value *= self._strength
        if value == 0:
            return None
        batch, grid = call.batch, call.grid
        scale = self._scalar(value, call.device)
        if self._table.by_row:
            if batch != self._table.scenes:
                raise SceneError(f"expected tokens for {batch} batch rows, got {self._table.scenes}")
            return SiteState(
                scale, batch, grid, self._table.tokens, attn_mask=self._table.attn_mask(None, grid)
            )
        if self._autocast != call.autocast:  # keys and values are made in it
            self._autocast = call.autocast
            self._forget()
        parts = call.rows
        found = self._rows_of(call)
        if found is None:
            return None
        keep = self._fast and step is not None
        run = (call.thread, id(call.pipeline), parts) if keep else None
        self._take_kept(run)
        for site in self._sites:
            site.prepare(self._table.tokens, grid)
        rows, controlled = found
        reuse = step is not None and self._may_reuse(run, step, (batch, grid, value))
        mask = self._table.attn_mask(rows, grid)
        return SiteState(scale, batch, grid, None, rows, controlled, mask, reuse, keep)

    def _scheduled(self, call: Call) -> tuple[int | None, float]:
        """The step, if anything depends on it, and the schedule's value at it.

        Where no step can be known, the schedule is all or nothing.
        """
        on, _, off = self._shares
        constant = 1.0 if on == 1 else 0.0 if off == 1 else None
        if constant is not None and not self._fast:
            return None, constant
        if call.step is None:
            return None, 1.0 if constant is None else constant
        return call.step[0], scheduled(*call.step, self._shares)

    def _scalar(self, value: float, device: torch.device) -> Tensor:
        if self._scale is None or self._scale[0] != value or self._scale[1].device != device:
            self._scale = value, torch.tensor(value, device=device)
        return self._scale[1]

    def _take_kept(self, run: Any) -> None:
        """Put what a run's last call has kept in the place of another run's.

        A run is one thread's calls from one pipeline with one kind of rows.
        """
        if run == self._run:
            return
        self._runs[self._run] = [site.kept for site in self._sites]
        kept = self._runs.pop(run, [None] * len(self._sites))
        for site, one in zip(self._sites, kept, strict=True):
            site.kept = one
        self._run = run
        while len(self._runs) > KEPT_RUNS:  # most of them are over
            self._kept_for.pop(self._runs.popitem(last=False)[0], None)

    def _may_reuse(self, run: Any, step: int, kept_for: tuple[Any, ...]) -> bool:
        """Whether what was added last serves this call; if not, it is to be computed again."""
        same = self._kept_for.get(run) == kept_for
        self._kept_for[run] = kept_for
        return self._fast and same and not refreshes(step)

    def _rows_of(self, call: Call) -> tuple[Tensor, Tensor | None] | None:
        """For each controlled row of the batch its tokens, and which rows those are if not all; or None."""
        batch, parts = call.batch, call.rows
        if (batch, parts) in self._rows:
            return self._rows[batch, parts]
        scene_of_row = scenes_of_rows(call, self._table.scenes)
        controlled = [row for row, scene in enumerate(scene_of_row) if self._table.controls(*scene)]
        found = None
        if controlled:
            rows = self._table.rows([scene_of_row[row] for row in controlled])
            every = len(controlled) == batch
            found = rows, None if every else torch.tensor(controlled, device=rows.device)
        self._rows[batch, parts] = found
        return found

    def _forget(self) -> None:
        self._kept_for.clear()
        self._runs.clear()
        for site in self._sites:
            site.forget()
