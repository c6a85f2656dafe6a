"""The subjects of a scene, as the sites read them: which row and which token of a call sees which."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interactdiff.adapter import KeyBlock
from interactdiff.calls import Call, Rows, scenes_of_rows
from interactdiff.families import Grid
from interactdiff.scene_checks import Box
from interactdiff.sites import Site
from interactdiff.subject.features import Features, Reference
from interactdiff.subject.passes import Positions
from interactdiff.subject.place import place

KEPT_WEIGHTS = 64
MOST_SCALED = 4.0  # times that a reference's positions lie farther apart, or closer together


@dataclass(frozen=True)
class PlacedSubject:
    """A subject's reference and where it shall be.

    Attributes:
        reference: its picture.
        boxes: where it is seen; none of them is everywhere.
        strength: of the subject.
    """

    reference: Reference
    boxes: tuple[Box, ...]
    strength: float

    def positions(self, grid: Grid, beside: float, fitted: float) -> Positions:
        """Where the reference's tokens lie in the picture's grid.

        Positions decide where a transformer draws what it sees: the middle of the subject comes to lie on the
        middle of its place, if it has one, and its size is between its own and that of its place.

        Args:
            grid: rows and columns of the picture's tokens.
            beside: without a place, how many of the reference's widths aside.
            fitted: from the subject's own height, 0, to that of its place, 1; between them, a power of it.
        """
        reference = self.reference
        if not self.boxes:
            return Positions(0.0, float(round(beside * reference.grid[1])))
        left, top, right, bottom = reference.extent
        x0, y0, x1, y1 = self.boxes[0]
        fit = (y1 - y0) * grid[0] / ((bottom - top) * reference.grid[0])
        scale = min(max(fit, 1 / MOST_SCALED), MOST_SCALED) ** fitted
        row, column = (  # a token's middle lies at its number and a half
            (low + high) / 2 * here - 0.5 - scale * ((first + last) / 2 * there - 0.5)
            for low, high, first, last, here, there in (
                (y0, y1, top, bottom, grid[0], reference.grid[0]),
                (x0, x1, left, right, grid[1], reference.grid[1]),
            )
        )
        return Positions(row, column, scale) if fitted else Positions(float(round(row)), float(round(column)))


class SubjectRows(NamedTuple):
    """What the rows of a call's batch see.

    Attributes:
        scenes: for each row the prompt that it is of.
        signs: for each row whether its reference has less noise (-1), as much, or more (1); None where a row
            sees no reference.
        kinds: for each row what it is for: "conditional", "unconditional" (the negative prompt) or
            "reference" (a row without references).
    """

    scenes: tuple[int, ...]
    signs: tuple[int | None, ...]
    kinds: tuple[Rows, ...]


@dataclass
class SubjectScene:
    """Subjects that act from the next call on.

    Attributes:
        subjects: all that there are.
        prompts: for each prompt which of them are its own.
        seed: of the draws of reference guidance.
    """

    subjects: tuple[PlacedSubject, ...]
    prompts: tuple[tuple[int, ...], ...]
    seed: int = 0
    _weights: dict[Any, Tensor] = field(default_factory=dict)

    def rows(self, call: Call, gap: bool, blind: int | None) -> SubjectRows:
        """What each row of a call sees.

        Args:
            call: the call.
            gap: whether the reference's noise differs by what a row is for.
            blind: which part of the batch sees no reference; None if there is none.

        Raises:
            SceneError: the prompts do not explain the batch.
        """
        found, parts = scenes_of_rows(call, len(self.prompts)), len(call.rows)
        signs = []
        for row, (_, kind) in enumerate(found):
            sign = 0 if not gap else 1 if kind == "unconditional" else -1
            signs.append(None if row * parts // len(found) == blind else sign)
        scenes, kinds = zip(*found, strict=True)
        return SubjectRows(scenes, tuple(signs), kinds)

    def needed(self, rows: SubjectRows) -> dict[int, tuple[int, ...]]:
        """For each subject that a row sees the signs of its reference that are needed, in order."""
        needed: dict[int, set[int]] = {}
        for scene, sign in zip(rows.scenes, rows.signs, strict=True):
            for number in self.prompts[scene] if sign is not None else ():
                if self.subjects[number].strength:
                    needed.setdefault(number, set()).add(sign)  # type: ignore[arg-type]
        return {number: tuple(sorted(signs)) for number, signs in sorted(needed.items())}

    def key_blocks(
        self,
        site: Site,
        call: Call,
        rows: SubjectRows,
        features: dict[tuple[int, int], Features],
        weight: float,
    ) -> list[KeyBlock]:
        """The references' keys at a site, and what they weigh.

        A key of the reference weighs w_ref times its subject's strength times the share of its cell that is
        the subject's; a query sees it as far as its cell lies in the subject's place (Eq. 3).

        Args:
            site: an attention.
            call: the call under way.
            rows: what its rows see.
            features: of subjects by number and sign; a subject that has none adds no keys.
            weight: w_ref.
        """
        blocks = []
        grid = site.grid(*call.grid)
        for number, signs in self.needed(rows).items():
            if (number, signs[0]) not in features:
                continue
            keys, values = features[number, signs[0]][site.path]
            if len(signs) > 1:  # rows of less and of more noise
                both = [features[number, sign][site.path] for sign in signs]
                index = [signs.index(sign) if sign in signs else 0 for sign in rows.signs]
                keys, values = (torch.cat([one[n] for one in both])[index] for n in range(2))
            reference = self.subjects[number].reference
            of_reference = site.grid(*reference.grid)
            _, shares = reference.foreground(of_reference)
            of_keys: Tensor | float = 0.0
            if bool((shares < 1).any()):
                of_keys = self._kept(
                    ("keys", number, of_reference), shares.log().view(1, 1, 1, -1), call.device
                )
            of_queries = self._query_weights(number, rows, grid, weight, call.device)
            blocks.append(KeyBlock(keys, values, of_keys, of_queries))
        return blocks

    def _query_weights(
        self, number: int, rows: SubjectRows, grid: Grid, weight: float, device: torch.device
    ) -> Tensor:
        """[B or 1, 1, Q or 1, 1]: the logarithm of what a subject's keys weigh to each query."""
        subject = self.subjects[number]
        key = ("queries", number, rows, grid, weight)
        if key in self._weights:
            return self._kept(key, None, device)
        total = torch.full((1, 1, 1, 1), math.log(weight * subject.strength))
        if subject.boxes:
            total = total + place(subject.boxes, grid).log().view(1, 1, -1, 1)
        sees = torch.tensor(
            [
                sign is not None and number in self.prompts[scene]
                for scene, sign in zip(rows.scenes, rows.signs, strict=True)
            ]
        )
        if not bool(sees.all()):
            total = total + torch.where(sees, 0.0, -math.inf).view(-1, 1, 1, 1)
        return self._kept(key, total, device)

    def encoder_shares(
        self, rows: SubjectRows, grid: Grid, weight: float, guided: float, device: torch.device
    ) -> dict[int, Tensor]:
        """For each subject, by number, [B or 1, L or 1, 1]: how much of its encoder's result a token gets.

        Where several are seen each gets its part of the whole, so that subjects do not add up.

        Args:
            rows: what the call's rows see.
            grid: of the site's tokens.
            weight: beta.
            guided: share of it, 0 to 1, that the negative prompt's rows are without.
            device: of the shares.
        """
        seen = {n for scene in rows.scenes for n in self.prompts[scene]}
        numbers: Collection[int] = sorted(n for n in seen if self.subjects[n].strength)
        made: dict[int, Tensor] = {}
        for number in numbers:
            key = ("shares", number, rows.scenes, rows.kinds if guided else None, guided, grid, weight)
            if key not in self._weights:
                whole = torch.stack([self._seen(n, rows.scenes, grid) for n in numbers]).sum(0)
                share = self._seen(number, rows.scenes, grid) / whole.clamp(min=1.0)
                share = share * weight * self.subjects[number].strength
                if guided:
                    left = {"unconditional": 1.0 - guided}
                    share = share * torch.tensor([[[left.get(kind, 1.0)]] for kind in rows.kinds])
                if bool((share == share.flatten()[0]).all()):
                    share = share[:1, :1]
                self._kept(key, share if bool(share.any()) else share[:0], device)
            if len(share := self._kept(key, None, device)):  # else no token sees it
                made[number] = share
        return made

    def _seen(self, number: int, scenes: Sequence[int], grid: Grid) -> Tensor:
        """[B, L, 1] in [0, 1]."""
        within = place(self.subjects[number].boxes, grid)
        mine = torch.tensor([float(number in self.prompts[scene]) for scene in scenes])
        return (mine[:, None] * within[None])[..., None]

    def _kept(self, key: Any, made: Tensor | None, device: torch.device) -> Tensor:
        if made is not None and key not in self._weights:
            while len(self._weights) > KEPT_WEIGHTS * max(len(self.subjects), 1):
                self._weights.pop(next(iter(self._weights)))
            self._weights[key] = made
        self._weights[key] = found = self._weights[key].to(device)
        return found
