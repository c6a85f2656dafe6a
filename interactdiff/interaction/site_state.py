"""What one denoiser call needs at the sites where interactions act, and the tokens that it is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from interactdiff.adapter import Residual
from interactdiff.calls import Rows
from interactdiff.families import Grid


@dataclass
class SiteState:
    """What one denoiser call needs at every site.

    Attributes:
        scale: strength times schedule, a float32 scalar on the denoiser's device.
        batch: rows of the batch.
        grid: rows and columns of a transformer's image tokens, or of a U-Net's latents.
        tokens: of each batch row, where gradients flow to them; None where each site has its keys and values
            prepared.
        rows: for each controlled batch row which of the prepared keys and values are its own.
        controlled: [R] the batch rows that have a scene; None where all have.
        attn_mask: which tokens each image token attends to; None for all. For a transformer [R, 1, L or 1, M]
            bool; for a U-Net [R, H * W, 3N] of the latents' cells, what is added to scores: the log of the
            token's weight, or -inf.
        reuse: whether to add once more what was added last.
        keep: whether to keep what is added.
    """

    scale: Tensor
    batch: int
    grid: Grid
    tokens: Any = None
    rows: Tensor | None = None
    controlled: Tensor | None = None
    attn_mask: Tensor | None = None
    reuse: bool = False
    keep: bool = False


class ControlledSite(Protocol):
    """A site where interactions act.

    Attributes:
        residual: the edit.
        state: what the denoiser call under way needs.
        kept: what was added last, where that was to be kept.
    """

    residual: Residual
    state: SiteState | None
    kept: Tensor | None

    def prepare(self, tokens: Any, grid: Grid) -> None:
        """Compute what no step changes, once."""
        ...

    def forget(self) -> None:
        """Let go of everything that belongs to a scene."""
        ...


class SceneTokenTable(Protocol):
    """The tokens of some scenes, as the sites of one kind of denoiser read them.

    Attributes:
        scenes: how many scenes.
        by_row: whether there is a row for each batch row, in place of scenes.
        tokens: what sites make keys and values of.
    """

    scenes: int
    by_row: bool
    tokens: Any

    def to(self, device: torch.device, dtype: torch.dtype) -> "SceneTokenTable":
        """The same elsewhere."""
        ...

    def controls(self, scene: int, rows: Rows) -> bool:
        """Whether batch rows of a scene are controlled, in the part of the batch that is for `rows`."""
        ...

    def rows(self, scenes: Sequence[tuple[int, Rows]]) -> Tensor:
        """Which keys and values are those of controlled batch rows, each of a scene and a part."""
        ...

    def attn_mask(self, rows: Tensor | None, grid: Grid) -> Tensor | None:
        """`SiteState.attn_mask` of these rows; None for those of all batch rows."""
        ...
