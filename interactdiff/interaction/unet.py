"""How a fuser acts in a U-Net: as a `Residual` at every transformer block.

The block's input is x, its self-attention's output a; the edit makes a + r of a, for which the block's own
x + (a + r) is the fuser's output. What a denoiser call needs is planned before it, where torch.compile does
not look; the edit only reads tensors.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from interactdiff.adapter import Host, Residual, SiteInputs
from interactdiff.calls import Rows
from interactdiff.families import Grid
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.interaction.fuser import GatedSelfAttention, KeysValues, grid_features
from interactdiff.interaction.site_state import SiteState
from interactdiff.interaction.tokens import Item, SceneTokens, cells_in, token_table
from interactdiff.scene import SceneError
from interactdiff.sites import Site


class FuserTokenTable:
    """Tokens for fusers: each scene's, and those of the unconditional half, which fusers read too.

    Args:
        tokens: [S + 1, 3N, token_dim] of S scenes and then of the unconditional half; or one row for each
            batch row. Of `SceneTokens` each is seen in its box alone.
        used: for each scene how many slots are not empty; None where there is a row for each batch row.
    """

    def __init__(self, tokens: Tensor | SceneTokens, used: list[int] | None):
        self._regions: Tensor | None = None  # [S, 3N, 5] boxes and weights
        if isinstance(tokens, SceneTokens):
            regions = torch.cat([tokens.boxes, tokens.weights[..., None]], -1)
            self._regions = regions if used is None else token_table(regions, used)[0]
        made: Tensor = tokens.tokens if isinstance(tokens, SceneTokens) else tokens
        self.tokens, self._index = (made, None) if used is None else token_table(made, used)
        self._mask: tuple[Tensor | None, Grid, Tensor] | None = None
        self._used = used or []
        self.scenes, self.by_row = (len(made), True) if used is None else (len(used), False)

    def to(self, device: torch.device, dtype: torch.dtype) -> "FuserTokenTable":
        """The same elsewhere."""
        self.tokens = self.tokens.to(device, dtype)
        self._index = None if self._index is None else self._index.to(device)
        self._regions, self._mask = None if self._regions is None else self._regions.to(device), None
        return self

    def controls(self, scene: int, rows: Rows) -> bool:
        """Whether a batch row is controlled: in both halves of guidance, where its scene is not empty."""
        return rows != "reference" and self._used[scene] > 0

    def rows(self, scenes: Sequence[tuple[int, Rows]]) -> Tensor:
        """[R, 3N] rows of the table, for batch rows of these scenes and halves."""
        last = self.scenes
        return cast(Tensor, self._index)[[scene if half == "conditional" else last for scene, half in scenes]]

    def attn_mask(self, rows: Tensor | None, grid: Grid) -> Tensor | None:
        """`SiteState.attn_mask` of the latents' cells; made once for a grid and these rows."""
        if self._regions is None:
            return None
        if self._mask is None or self._mask[0] is not rows or self._mask[1] != grid:
            regions = self._regions if rows is None else self._regions[rows]
            seen, weights = cells_in(regions[..., :4], grid), regions[:, None, :, 4]
            self._mask = rows, grid, torch.where(seen, weights, 0.0).log()
        return self._mask[2]


class FuserSite:
    """A U-Net's transformer block with its fuser.

    Attributes:
        residual: the edit.
        state: what the denoiser call under way needs.
        kept: [R, L, dim], what was added last, where that was to be kept.
    """

    def __init__(self, site: Site, fuser: GatedSelfAttention):
        self.site, self.fuser = site, fuser
        self.residual = Residual(site, self._edit)
        self.state: SiteState | None = None
        self.kept: Tensor | None = None
        self._objects: KeysValues | None = None
        self._positions: Tensor | float = 0.0
        self._grid: Grid | None = None
        self._masks: tuple[Tensor, Tensor] | None = None  # of the latents' grid, and of the site's

    @torch.no_grad()
    def prepare(self, tokens: Tensor, grid: Grid) -> None:
        """Compute what no step changes, once: keys and values, and the positions of a grid.

        Args:
            tokens: [U, token_dim], from `tokens.token_table`.
            grid: rows and columns of the latents.
        """
        if self._objects is None:
            self._objects = self.fuser.keys_values(tokens)
        if self._grid != grid:
            self._positions, self._grid = self._positions_of(grid, tokens.device), grid

    def forget(self) -> None:
        """Let go of everything that belongs to a scene."""
        self.state = self.kept = self._objects = self._grid = self._masks = None

    def _positions_of(self, grid: Grid, device: torch.device) -> Tensor | float:
        if self.fuser.grid_positions is None:
            return 0.0
        return self.fuser.positions(grid_features(*self.site.grid(*grid), device))

    def _mask(self, state: SiteState) -> Tensor | None:
        """`SiteState.attn_mask` on the site's grid: a cell attends to what any latent in it attends to."""
        if (mask := state.attn_mask) is None:
            return None
        if self._masks is None or self._masks[0] is not mask:
            cells = mask.mT.unflatten(2, state.grid)
            self._masks = mask, F.adaptive_max_pool2d(cells, self.site.grid(*state.grid)).flatten(2).mT
        return self._masks[1]

    def _edit(self, inputs: SiteInputs, attended: Tensor) -> Tensor | None:
        state, x = self.state, inputs.hidden_states
        if state is None or x is None:
            return None
        if state.controlled is None:
            return self._updated(state, x, attended)
        updated = self._updated(state, x[state.controlled], attended[state.controlled])
        return attended.index_copy(0, state.controlled, updated)

    def _updated(self, state: SiteState, x: Tensor, attended: Tensor) -> Tensor:
        """[R, L, dim]: what the block adds to the rows that have a scene."""
        if state.reuse:
            return attended + cast(Tensor, self.kept)
        if state.tokens is not None:
            positions = self._positions_of(state.grid, x.device)
            objects = self.fuser.keys_values(state.tokens)
        else:
            positions = self._positions
            objects = KeysValues(*(t[state.rows] for t in cast(KeysValues, self._objects)))
        updated = self.fuser.update(x, attended, objects, state.scale, positions, self._mask(state))
        updated = updated.to(attended.dtype)
        if state.keep:
            self.kept = (updated - attended).detach()
        return updated


class UNetInteractions:
    """Interactions in a U-Net.

    Attributes:
        sites: where its fusers act.
    """

    def __init__(self, host: Host, adapter: InteractionAdapter):
        self._adapter, fusers = adapter, adapter.fusers
        self.sites = [FuserSite(site, fusers[site.path]) for site in host.sites_of("block")]

    def scenes(self, scenes: Sequence[Sequence[Item]], features: Mapping[str, Tensor]) -> FuserTokenTable:
        """Tokens of scenes, and those of the unconditional half: the same with every mask 0."""
        used = [len(scene) if any(item.strength for item in scene) else 0 for scene in scenes]
        tensors = self._adapter.scene_tensors([*scenes, ()], features)
        return FuserTokenTable(self._adapter(**tensors), used)

    def by_row(self, tokens: Any) -> FuserTokenTable:
        """Tokens of each batch row, as the adapter makes them.

        Raises:
            SceneError: their shape is not that.
        """
        width = self._adapter.config.token_dim
        kind = SceneTokens if self._adapter.config.structured else Tensor
        if not isinstance(tokens, kind):
            raise SceneError(f"expected tokens as a {kind.__name__}, got {type(tokens).__name__}")
        made = tokens.tokens if isinstance(tokens, SceneTokens) else tokens
        if made.ndim != 3 or made.shape[-1] != width:
            raise SceneError(f"expected tokens of shape [batch, 3N, {width}], got {list(made.shape)}")
        return FuserTokenTable(tokens, None)
