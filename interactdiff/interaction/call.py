"""What one denoiser call says, and what it needs of an adapter."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Reading(NamedTuple):
    """What a denoiser's arguments say.

    Attributes:
        batch: how many rows.
        size: rows and columns of a U-Net's latents, or of a transformer's image tokens.
        timestep: in the scheduler's units; of a batch the first counts.
        device: where the denoiser runs.
        text_length: text tokens of attention over text and image.
        halves: for each part of the batch whether it is conditional, in order; None where the call alone does
            not tell.
    """

    batch: int
    size: tuple[int, int]
    timestep: Tensor | float
    device: torch.device
    text_length: int = 0
    halves: tuple[bool, ...] | None = None


@dataclass
class Call:
    """What one denoiser call needs of an adapter.

    Attributes:
        scale: strength times schedule, a float32 scalar on the denoiser's device.
        batch: as in `Reading`.
        size: likewise.
        text_length: likewise.
        tokens: of each batch row, where gradients flow to them; None where each site has its keys and values
            prepared.
        rows: for each controlled batch row which of the prepared keys and values are its own.
        controlled: [R] the batch rows that have a scene; None where all have.
        seen: for a transformer, [R, 1, L or 1, M] bool: which tokens each image token sees; None for all.
        reuse: whether to add once more what was added last.
        keep: whether to keep what is added.
    """

    scale: Tensor
    batch: int
    size: tuple[int, int]
    text_length: int = 0
    tokens: Any = None
    rows: Tensor | None = None
    controlled: Tensor | None = None
    seen: Tensor | None = None
    reuse: bool = False
    keep: bool = False


class ControlledSite(Protocol):
    """A place in a denoiser where an adapter acts.

    Attributes:
        call: what the denoiser call under way needs; None where nothing is asked.
    """

    call: Call | None

    def hook(self) -> None:
        """Hook the adapter in, if it is not."""
        ...

    def unhook(self) -> None:
        """Take it out, if it is in."""
        ...

    def prepare(self, tokens: Any, size: tuple[int, int]) -> None:
        """Compute what no step changes, once."""
        ...

    def forget(self) -> None:
        """Let go of everything that belongs to a scene."""
        ...


class SceneTable(Protocol):
    """The tokens of some scenes, as the sites of one kind of denoiser want them.

    Attributes:
        scenes: how many scenes.
        given: whether there is a row for each batch row, in place of scenes.
        tokens: what sites make keys and values of.
    """

    scenes: int
    given: bool
    tokens: Any

    def to(self, device: torch.device, dtype: torch.dtype) -> "SceneTable":
        """The same elsewhere."""
        ...

    def controls(self, scene: int, conditional: bool) -> bool:
        """Whether a batch row of a scene, in one half of guidance, is controlled."""
        ...

    def rows(self, scenes: list[tuple[int, bool]]) -> Tensor:
        """Which keys and values are those of controlled batch rows, each of a scene and a half."""
        ...

    def seen(self, rows: Tensor | None, size: tuple[int, int]) -> Tensor | None:
        """`Call.seen` of these rows; None for those of all batch rows."""
        ...
