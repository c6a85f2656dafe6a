"""Adds a constant to the tokens inside the badges' boxes, at every attention."""

import os
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from interactdiff.adapter import Adapter, Binding, Edit, Host, Residual, SiteInputs
from interactdiff.badge.items import Badge  # type: ignore[import-not-found]
from interactdiff.calls import Call
from interactdiff.errors import AdapterError
from interactdiff.sites import Denoiser, Site


class BadgeAdapter(Adapter):
    """One number."""

    name = "badge"
    items = (Badge,)
    order = 50

    def __init__(self, level: float = 0.5):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(level))

    @classmethod
    def for_denoiser(cls, denoiser: Any) -> "BadgeAdapter":
        """The default."""
        return cls()

    @classmethod
    def from_pretrained(cls, path_or_id: str | os.PathLike[str]) -> "BadgeAdapter":
        """Read a folder."""
        file = Path(path_or_id) / "adapter.safetensors"
        if not file.is_file():
            raise AdapterError(f"expected a badge adapter in {path_or_id}, got none")
        return cls(float(load_file(file)["level"])).eval()

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a folder."""
        Path(path).mkdir(exist_ok=True)
        save_file({"level": self.level.detach().reshape(1)}, Path(path) / "adapter.safetensors")

    def check(self, denoiser: Denoiser) -> None:
        """Any denoiser will do."""

    def bind(self, host: Host) -> Binding:
        """Act at every attention over the image's tokens."""
        return BadgeBinding(self, host)


class BadgeBinding(Binding):
    """An attached `BadgeAdapter`."""

    adapter: BadgeAdapter

    def __init__(self, adapter: BadgeAdapter, host: Host):
        super().__init__(adapter, host)
        self.gain = 1.0
        self._grid = (1, 1)
        sites = host.sites_of("block", "joint", "single")
        self.edits = tuple(Residual(site, partial(self._raise, site)) for site in sites)

    def configure(self, gain: float) -> None:
        """How much more is added."""
        self.gain = gain

    def encode(
        self, items: Sequence[Sequence[Badge]], strength: float = 1.0
    ) -> list[tuple[Badge, float]] | None:
        """The badges of the first prompt, each with its strength."""
        badges = [(badge, badge.strength * strength) for badge in items[0]]
        return badges or None

    def prepare(self, call: Call) -> Collection[Edit]:
        """Remember the grid."""
        self._grid = call.grid
        return super().prepare(call)

    def _raise(self, site: Site, inputs: SiteInputs, output: Tensor) -> Tensor:
        rows, columns = site.grid(*self._grid)
        inside = torch.zeros(rows, columns)
        for badge, strength in self.scene:
            x0, y0, x1, y1 = badge.box
            inside[round(y0 * rows) : round(y1 * rows), round(x0 * columns) : round(x1 * columns)] = strength
        return output + (self.gain * self.adapter.level * inside.flatten()[:, None]).to(output)
