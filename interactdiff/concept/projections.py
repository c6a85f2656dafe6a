"""What a concept learns of a projection of keys or values: a change of its matrix, or another matrix."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interactdiff.sites import Denoiser, Site, find_sites

AT = {"cross": ("to_k", "to_v"), "joint": ("add_k_proj", "add_v_proj"), "single": ("to_k", "to_v")}


class Change(nn.Module):
    """W + dW, where dW starts at zero.

    Args:
        out_features: rows of W.
        in_features: columns of W.
    """

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))

    def forward(self, states: Tensor, output: Tensor) -> Tensor:
        """What the projection puts out, [..., out], of its input [..., in] and what W makes of it."""
        return output + F.linear(states.to(self.weight.dtype), self.weight).to(output.dtype)

    def folded(self, weight: Tensor) -> Tensor:
        """The projection's matrix [out, in] with the concept in it, of W."""
        return weight.float() + self.weight.float()


class LowRankChange(nn.Module):
    """W + up down, a LoRA (arXiv 2106.09685): `up` starts at zero.

    Args:
        out_features: rows of W.
        in_features: columns of W.
        rank: of the change.
    """

    def __init__(self, out_features: int, in_features: int, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, in_features) * in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(out_features, rank))

    def forward(self, states: Tensor, output: Tensor) -> Tensor:
        """As `Change.forward`."""
        return output + F.linear(F.linear(states.to(self.down.dtype), self.down), self.up).to(output.dtype)

    def folded(self, weight: Tensor) -> Tensor:
        """As `Change.folded`."""
        return weight.float() + self.up.float() @ self.down.float()


class Replacement(nn.Module):
    """Another matrix in the place of W, as Custom Diffusion (arXiv 2212.04488) stores it.

    Args:
        out_features: rows of W.
        in_features: columns of W.
    """

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, states: Tensor, output: Tensor) -> Tensor:
        """As `Change.forward`; what W makes of the input is dropped."""
        return F.linear(states.to(self.weight.dtype), self.weight).to(output.dtype)

    def folded(self, weight: Tensor) -> Tensor:
        """As `Change.folded`."""
        return self.weight.float()


def make_projection(kind: str, out_features: int, in_features: int, rank: int) -> nn.Module:
    """A projection whose values are `config.Stored` in this way."""
    if kind == "weights":
        return Replacement(out_features, in_features)
    return LowRankChange(out_features, in_features, rank) if rank else Change(out_features, in_features)


def text_projections(denoiser: Denoiser, letters: str, single_stream: bool) -> Iterator[tuple[Site, str]]:
    """The projections that make keys and values of text: sites, and the projections' names there.

    Args:
        denoiser: a U-Net or a transformer.
        letters: of "kv", which to take.
        single_stream: whether to take those of single-stream blocks, which project the image too.
    """
    for site in find_sites(denoiser):
        if site.role in AT and (single_stream or site.role != "single"):
            for letter, at in zip("kv", AT[site.role], strict=True):
                if letter in letters and isinstance(getattr(site.module, at, None), nn.Module):
                    yield site, at


def projection_weight(site: Site, at: str) -> Any:
    """The denoiser's own matrix W [out, in] of a projection, without what a LoRA adds."""
    layer = getattr(site.module, at)
    return getattr(layer, "base_layer", layer).weight
