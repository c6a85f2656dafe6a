"""How a fuser acts in a U-Net: by two hooks at its site, and nothing else of the base is touched.

    the block, before              keep its input x
    its self-attention, after      a -> a + r, for which the block's own x + (a + r) is the fuser's output

Every attention processor, LoRA, ControlNet and pipeline goes on working. What a denoiser call needs of the
fusers is planned before it (`control.Control.plan`), where torch.compile does not look: the hooks only read
tensors, so that no step compiles anew; where the schedule is 0 the U-Net is a graph of its own.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from interactdiff.interaction.fuser import GatedSelfAttention, KeysValues, grid_features
from interactdiff.sites import Site


@dataclass
class Call:
    """What one denoiser call needs of the fusers.

    Attributes:
        scale: strength times schedule, a float32 scalar on the U-Net's device.
        size: rows and columns of the latents.
        tokens: [B, 3N, token_dim], a row for each batch row, where gradients flow to them; None where each
            site has its keys and values prepared.
        rows: [R, 3N] for each controlled batch row where its keys and values are among those prepared.
        controlled: [R] the batch rows that have a scene; None where all have.
        reuse: whether to add once more what was added last.
        keep: whether to keep what is added.
    """

    scale: Tensor
    size: tuple[int, int]
    tokens: Tensor | None = None
    rows: Tensor | None = None
    controlled: Tensor | None = None
    reuse: bool = False
    keep: bool = False


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

    def hook(self) -> list[RemovableHandle]:
        """Hook the fuser in."""
        block = self.site.block
        return [
            block.register_forward_pre_hook(self._keep_input, with_kwargs=True),
            block.attn1.register_forward_hook(self._update),
        ]

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
