"""How interactions act in a transformer: as a `Residual` at every attention over text and image.

What the attention gathers for the image's tokens, o, becomes o + what `JointCrossAttention` reads, before its
output projection. The attention's processor is left alone, so whichever is there goes on working: diffusers'
own, CLEAR's, one of an IP-Adapter. Published adapters that come as processors fight over that one place.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from interactdiff.adapter import Host, Residual, SiteInputs
from interactdiff.calls import Rows
from interactdiff.families import Grid
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.interaction.config import JointConfig
from interactdiff.interaction.fuser import KeysValues, grid_features
from interactdiff.interaction.joint import JointCrossAttention
from interactdiff.interaction.site_state import SiteState
from interactdiff.interaction.tokens import Item, SceneTokens
from interactdiff.scene import SceneError
from interactdiff.sites import Site


class CrossAttentionSite:
    """An attention over text and image with the adapter's cross-attention beside it.

    Attributes:
        residual: the edit.
        state: what the transformer call under way needs.
        kept: [R, L, dim], what was read last, where that was to be kept.
    """

    def __init__(self, site: Site, cross_attention: JointCrossAttention):
        self.site, self.cross_attention = site, cross_attention
        self.residual = Residual(site, self._edit)
        self.state: SiteState | None = None
        self.kept: Tensor | None = None
        self._scenes: KeysValues | None = None
        self._positions: tuple[Grid, Tensor] | None = None

    def prepare(self, tokens: SceneTokens, grid: Grid) -> None:
        """Compute what no step changes, once: keys and values, and the positions of a grid."""
        with torch.no_grad():
            if self._scenes is None:
                self._scenes = self.cross_attention.keys_values(tokens)
            if self._positions is None or self._positions[0] != grid:
                self._positions = grid, self._positions_of(grid, tokens.tokens.device)

    def forget(self) -> None:
        """Let go of everything that belongs to a scene."""
        self.state = self.kept = self._scenes = self._positions = None

    def _positions_of(self, grid: Grid, device: torch.device) -> Tensor:
        return self.cross_attention.positions(grid_features(*grid, device))

    def _edit(self, inputs: SiteInputs, gathered: Tensor) -> Tensor | None:
        state = self.state
        if state is None:
            return None
        read = self.kept if state.reuse else self._computed(state, cast(Tensor, inputs.queries))
        if state.keep:
            self.kept = cast(Tensor, read).detach()
        read = cast(Tensor, read)
        if state.controlled is not None:
            read = read.new_zeros(state.batch, *read.shape[1:]).index_copy(0, state.controlled, read)
        return gathered + read.to(gathered.dtype)

    def _computed(self, state: SiteState, queries: Tensor) -> Tensor:
        """[R, L, dim]: what the rows that have a scene read."""
        if state.controlled is not None:
            queries = queries[state.controlled]
        if state.tokens is not None:
            scenes = self.cross_attention.keys_values(state.tokens)
            positions = self._positions_of(state.grid, queries.device)
        else:
            scenes = KeysValues(*(t[state.rows] for t in cast(KeysValues, self._scenes)))
            positions = cast(tuple[Any, Tensor], self._positions)[1]
        return self.cross_attention(queries, scenes, positions, state.scale, state.attn_mask)


class CrossAttentionTokenTable:
    """Tokens for joint attentions: of each scene those of the slots that it fills.

    Published fusers read the tokens of empty slots, and in the unconditional half nothing else. A joint
    attention has no need of that: an image without a scene, and the unconditional half, are the base's own.

    Args:
        tokens: of S scenes, or of each batch row.
        structured: whether only the cells of a token's region may attend to it.
        by_row: whether there is a row for each batch row.
    """

    def __init__(self, tokens: SceneTokens, structured: bool, by_row: bool):
        self.tokens, self._structured, self.by_row = tokens, structured, by_row
        self.scenes = len(tokens.tokens)
        self._filled = [] if by_row else [bool(one) for one in (tokens.weights != 0).any(1).tolist()]
        self._mask: tuple[Tensor | None, Grid, Tensor | None] | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> "CrossAttentionTokenTable":
        """The same elsewhere."""
        tokens, weights, boxes = (t.to(device) for t in self.tokens)
        self.tokens, self._mask = SceneTokens(tokens.to(dtype), weights, boxes), None
        return self

    def controls(self, scene: int, rows: Rows) -> bool:
        """Whether a batch row is controlled: in the conditional half, where its scene is not empty."""
        return rows == "conditional" and self._filled[scene]

    def rows(self, scenes: Sequence[tuple[int, Rows]]) -> Tensor:
        """[R] the scenes of batch rows."""
        return torch.tensor([scene for scene, _ in scenes], device=self.tokens.tokens.device)

    def attn_mask(self, rows: Tensor | None, grid: Grid) -> Tensor | None:
        """Which tokens each image token may attend to; made once for a grid and these rows."""
        if self._mask is None or self._mask[0] is not rows or self._mask[1] != grid:
            mask = self.tokens.attn_mask(grid, self._structured)
            self._mask = rows, grid, mask if mask is None or rows is None else mask[rows]
        return self._mask[2]


class TransformerInteractions:
    """Interactions in a transformer.

    Attributes:
        sites: where its cross-attentions act.
    """

    def __init__(self, host: Host, adapter: InteractionAdapter):
        self._adapter = adapter
        self._structured = cast(JointConfig, adapter.config.joint).structured
        modules = adapter.cross_attentions
        self.sites = [
            CrossAttentionSite(site, modules[site.path]) for site in host.sites_of("joint", "single")
        ]

    def scenes(
        self, scenes: Sequence[Sequence[Item]], features: Mapping[str, Tensor]
    ) -> CrossAttentionTokenTable:
        """Tokens of scenes, as many slots as the fullest one fills."""
        made = self._adapter(**self._adapter.scene_tensors(scenes, features))
        there = (made.weights != 0).any(0)
        tokens = SceneTokens(made.tokens[:, there], made.weights[:, there], made.boxes[:, there])
        return CrossAttentionTokenTable(tokens, self._structured, by_row=False)

    def by_row(self, tokens: Any) -> CrossAttentionTokenTable:
        """Tokens of each batch row, as the adapter makes them.

        Raises:
            SceneError: they are not that.
        """
        width = self._adapter.config.token_dim
        if not isinstance(tokens, SceneTokens) or tokens.tokens.shape[-1] != width:
            got = type(tokens).__name__
            got = f"width {tokens.tokens.shape[-1]}" if isinstance(tokens, SceneTokens) else got
            raise SceneError(f"expected SceneTokens of width {width}, got {got}")
        return CrossAttentionTokenTable(tokens, self._structured, by_row=True)
