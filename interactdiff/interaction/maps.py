"""Attention maps: how much the image's tokens attend to each item of a scene.

Recorded beside the adapter by hooks of their own, from the queries and keys that it computes anyway; what is
drawn stays the same. Where `fast` reuses what was added before, or a schedule is over, there is nothing to
record.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interactdiff.interaction.fuser import KeysValues, SelfAttention
from interactdiff.interaction.transformer import CrossAttentionSite
from interactdiff.interaction.unet import FuserSite

ROLES = ("subject", "action", "object")
FINEST = 64  # rows or columns of a map at most: more is more than an eye needs
QUERIES_AT_ONCE = 512  # attention weights of so many image tokens are in memory at a time


@dataclass(frozen=True)
class AttentionMaps:
    """How much of its attention each image token gave to each interaction token.

    Attributes:
        weights: [steps, 3, N, H, W] float32 in [0, 1], means over heads and sites; roles as in `ROLES`, N
            slots, first those of the scene's items in order; H and W of the finest grid that attends, at most
            `FINEST` each.
        steps: which denoising steps were recorded, from 0.
    """

    weights: Tensor
    steps: tuple[int, ...]

    def of(self, role: str, slot: int, step: int | None = None) -> Tensor:
        """One token's [H, W] map: at a step, or the mean over all that were recorded.

        Raises:
            ValueError: there is no such role, slot or step.
        """
        if role not in ROLES or not 0 <= slot < self.weights.shape[2]:
            slots = self.weights.shape[2]
            raise ValueError(
                f"expected a role of {', '.join(ROLES)} and a slot below {slots}, got {role}, {slot}"
            )
        maps = self.weights[:, ROLES.index(role), slot]
        if step is None:
            return maps.mean(0)
        if step not in self.steps:
            raise ValueError(f"expected a recorded step, {self.steps[0]} to {self.steps[-1]}, got {step}")
        return maps[self.steps.index(step)]


class AttentionRecorder:
    """Records while pictures are drawn, one at a time; of a batch the last row.

    Args:
        sites: where interactions act.
        parts: keys of each token.
        slots: how many of the slots to keep, from the first; None for all.
    """

    def __init__(
        self, sites: Sequence[FuserSite] | Sequence[CrossAttentionSite], parts: int, slots: int | None = None
    ):
        self._sites, self._parts, self._slots = sites, parts, slots
        self._timesteps: list[float] = []
        self._sums: dict[int, dict[tuple[int, int], tuple[Tensor, int]]] = {}  # by step and grid

    def maps(self) -> AttentionMaps | None:
        """What was recorded since the recorder was made or cleared; None if nothing was."""
        if not self._sums:
            return None
        finest = max(
            (grid for sums in self._sums.values() for grid in sums), key=lambda grid: grid[0] * grid[1]
        )
        means = []
        for sums in self._sums.values():
            total = sum(F.interpolate(maps, finest, mode="bilinear") for maps, _ in sums.values())
            means.append(total / sum(sites for _, sites in sums.values()))
        return AttentionMaps(torch.stack(means), tuple(self._sums))

    def clear(self) -> None:
        """Forget what was recorded, before another picture."""
        self._timesteps.clear()
        self._sums.clear()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Hook the recorder in until the block is left."""
        hooks = [
            _attention_of(site).register_forward_pre_hook(partial(self._record, site)) for site in self._sites
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def begin(self, timestep: float) -> None:
        """Before each denoiser call: calls of one timestep in a row are one step."""
        if not self._timesteps or self._timesteps[-1] != timestep:
            self._timesteps.append(timestep)

    @torch.no_grad()
    def _record(self, site: FuserSite | CrossAttentionSite, module: nn.Module, args: tuple[Any, ...]) -> None:
        state = site.state
        if state is None:
            return
        if isinstance(site, FuserSite):
            weights, (rows, columns) = fuser_attention(module, *args), site.site.grid(*state.grid)
        else:
            weights, (rows, columns) = joint_attention(module, *args), state.grid
        by_token = weights.unflatten(1, (len(ROLES), -1, self._parts)).sum(-1)[
            :, :, : self._slots
        ]  # [L, 3, N]
        maps = by_token.permute(1, 2, 0).unflatten(2, (rows, columns)).float()
        grid = min(rows, FINEST), min(columns, FINEST)
        if grid != (rows, columns):
            maps = F.adaptive_avg_pool2d(maps, grid)
        sums = self._sums.setdefault(len(self._timesteps) - 1, {})
        total, sites = sums.get(grid, (torch.zeros(()), 0))
        sums[grid] = total + maps.cpu(), sites + 1


def fuser_attention(
    attention: Any, queries: Tensor, keys: Tensor, _: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """[L, M], of the last batch row: the share of a fuser's attention that goes to each interaction token.

    Args:
        attention: a fuser's `SelfAttention`.
        queries: [R, L, dim] of the image.
        keys: [R, L + M, dim] of the image and the interaction tokens.
        attn_mask: [R, 1, L, L + M], added to the scores; None adds nothing.
    """
    assert isinstance(attention, SelfAttention)
    q, k = (t[-1].unflatten(-1, (attention.heads, -1)).transpose(0, 1) for t in (queries, keys))
    parts = []
    for first in range(0, queries.shape[1], QUERIES_AT_ONCE):
        some = slice(first, first + QUERIES_AT_ONCE)
        scores = _scores(q[:, some], k)
        if attn_mask is not None:
            scores = scores + attn_mask[-1, :, some]
        parts.append(scores.softmax(-1)[..., queries.shape[1] :].mean(0))
    return torch.cat(parts)


def joint_attention(
    _: Any, queries: Tensor, scenes: KeysValues, positions: Tensor, __: Any, attn_mask: Tensor | None = None
) -> Tensor:
    """[L, M], of the last batch row: what each image token reads of each interaction token.

    Args:
        queries: [R, heads, L, D].
        scenes: keys [R, heads, M + 1, D], the last one zeros.
        positions: what is added to the queries.
        attn_mask: as from `SceneTokens.attn_mask`, or None.
    """
    scores = _scores(queries[-1] + positions, scenes.keys[-1])
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask[-1], -torch.inf)
    return scores.softmax(-1)[..., :-1].mean(0)


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    return queries.float() @ keys.float().mT * queries.shape[-1] ** -0.5


def _attention_of(site: FuserSite | CrossAttentionSite) -> nn.Module:
    """The module whose arguments hold queries and keys."""
    return site.fuser.attn if isinstance(site, FuserSite) else site.cross_attention
