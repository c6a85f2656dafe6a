"""How a fuser acts in a U-Net: by two hooks at its site, and nothing else of the base is touched.

    the block, before              keep its input x
    its self-attention, after      a -> a + r, for which the block's own x + (a + r) is the fuser's output

Every attention processor, LoRA, ControlNet and pipeline goes on working. What a denoiser call needs of the
fusers is planned before it (`control.Control.plan`), where torch.compile does not look: the hooks only read
tensors, so that no step compiles anew; where the schedule is 0 the U-Net is a graph of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.interaction.call import Call, Reading
from interactdiff.interaction.fuser import GatedSelfAttention, KeysValues, grid_features
from interactdiff.interaction.tokens import Item, token_table
from interactdiff.scene import SceneError
from interactdiff.sites import Site, find_sites


class TokenTable:
    """Tokens for fusers: each scene's, and those of the unconditional half, which fusers read too.

    Args:
        tokens: [S + 1, 3N, token_dim] of S scenes and then of the unconditional half; or one row for each
            batch row.
        used: for each scene how many slots are not empty; None where there is a row for each batch row.
    """

    def __init__(self, tokens: Tensor, used: list[int] | None):
        self.tokens, self._index = (tokens, None) if used is None else token_table(tokens, used)
        self._used = used or []
        self.scenes, self.given = (len(tokens), True) if used is None else (len(used), False)

    def to(self, device: torch.device, dtype: torch.dtype) -> "TokenTable":
        """The same elsewhere."""
        self.tokens = self.tokens.to(device, dtype)
        self._index = None if self._index is None else self._index.to(device)
        return self

    def controls(self, scene: int, conditional: bool) -> bool:
        """Whether a batch row is controlled: in both halves of guidance, where its scene is not empty."""
        return self._used[scene] > 0

    def rows(self, scenes: list[tuple[int, bool]]) -> Tensor:
        """[R, 3N] rows of the table, for batch rows of these scenes and halves."""
        return cast(Tensor, self._index)[[scene if half else self.scenes for scene, half in scenes]]

    def seen(self, rows: Tensor | None, size: tuple[int, int]) -> Tensor | None:
        """All tokens are seen by all."""
        return None


class FusedSite:
    """A site with its fuser.

    Attributes:
        call: what the denoiser call under way needs; None where nothing is asked.
        kept: [R, L, dim], what was added last, where that was to be kept.
    """

    def __init__(self, site: Site, fuser: GatedSelfAttention):
        self.site, self.fuser = site, fuser
        self.call: Call | None = None
        self.kept: Tensor | None = None
        self._x: Tensor | None = None
        self._objects: KeysValues | None = None
        self._positions: Tensor | float = 0.0
        self._size: tuple[int, int] | None = None
        self._hooks: list[RemovableHandle] = []

    def hook(self) -> None:
        """Hook the fuser in."""
        if not self._hooks:
            block = self.site.block
            self._hooks = [
                block.register_forward_pre_hook(self._keep_input, with_kwargs=True),
                block.attn1.register_forward_hook(self._update),
            ]

    def unhook(self) -> None:
        """Take the fuser out."""
        while self._hooks:
            self._hooks.pop().remove()

    @torch.no_grad()
    def prepare(self, tokens: Tensor, size: tuple[int, int]) -> None:
        """Compute what no step changes, once: keys and values, and the positions of a grid.

        Args:
            tokens: [U, token_dim], from `tokens.token_table`.
            size: rows and columns of the latents.
        """
        if self._objects is None:
            self._objects = self.fuser.keys_values(tokens)
        if self._size != size:
            self._positions, self._size = self._positions_of(size, tokens.device), size

    def forget(self) -> None:
        """Let go of everything that belongs to a scene."""
        self.call = self.kept = self._x = self._objects = self._size = None

    def _positions_of(self, size: tuple[int, int], device: torch.device) -> Tensor | float:
        if self.fuser.grid_positions is None:
            return 0.0
        return self.fuser.positions(grid_features(*self.site.grid(*size), device))

    def _keep_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.call is not None:
            self._x = args[0] if args else kwargs["hidden_states"]

    def _update(self, _: nn.Module, __: tuple[Any, ...], attended: Tensor) -> Tensor | None:
        call, x, self._x = self.call, self._x, None
        if call is None or x is None:
            return None
        if call.controlled is None:
            return self._updated(call, x, attended)
        updated = self._updated(call, x[call.controlled], attended[call.controlled])
        return attended.index_copy(0, call.controlled, updated)

    def _updated(self, call: Call, x: Tensor, attended: Tensor) -> Tensor:
        """[R, L, dim]: what the block adds to the rows that have a scene."""
        if call.reuse:
            return attended + cast(Tensor, self.kept)
        if call.tokens is not None:
            positions = self._positions_of(call.size, x.device)
            objects = self.fuser.keys_values(call.tokens)
        else:
            positions = self._positions
            objects = KeysValues(*(t[call.rows] for t in cast(KeysValues, self._objects)))
        updated = self.fuser.update(x, attended, objects, call.scale, positions).to(attended.dtype)
        if call.keep:
            self.kept = (updated - attended).detach()
        return updated


class InUNet:
    """An adapter in a U-Net.

    Attributes:
        sites: where its fusers act.
        pipeline: whose calls these are; may be None. The call itself says all there is to know.
    """

    def __init__(self, unet: UNet2DConditionModel, adapter: InteractionAdapter, pipeline: Any):
        self._adapter, self.pipeline, fusers = adapter, pipeline, adapter.fusers
        self.sites = [FusedSite(site, fusers[site.path]) for site in find_sites(unet)]

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading:
        """What the U-Net's arguments say."""
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        return Reading(len(sample), (sample.shape[-2], sample.shape[-1]), timestep, sample.device)

    def scenes(self, scenes: Sequence[Sequence[Item]], features: Mapping[str, Tensor]) -> TokenTable:
        """Tokens of scenes, and those of the unconditional half: the same with every mask 0."""
        used = [len(scene) if any(item.strength for item in scene) else 0 for scene in scenes]
        tensors = self._adapter.scene_tensors([*scenes, ()], features)
        return TokenTable(cast(Tensor, self._adapter(**tensors)), used)

    def rows(self, tokens: Any) -> TokenTable:
        """Tokens of each batch row, as the adapter makes them.

        Raises:
            SceneError: their shape is not that.
        """
        width = self._adapter.config.token_dim
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[-1] != width:
            got = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise SceneError(f"expected tokens of shape [batch, 3N, {width}], got {got}")
        return TokenTable(tokens, None)

    def forget(self) -> None:
        """Let go of everything that belongs to a scene."""
        for site in self.sites:
            site.forget()
