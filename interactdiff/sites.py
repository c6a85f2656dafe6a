"""Finds where a denoiser can be controlled, by what its modules are and never by what they are called."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from diffusers import UNet2DConditionModel
from diffusers.models import attention_processor
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from interactdiff.errors import AdapterError
from interactdiff.families import BY_DENOISER, FAMILIES, Family, Role, SiteKind, family_of
from interactdiff.families import UNET as UNET_FAMILY

Denoiser = Any
"""A U-Net or transformer of one of the families; diffusers has no common type for them."""

KINDS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}  # of U-Nets, by cross-attention width
UNET = UNET_FAMILY.denoiser


@dataclass(frozen=True)
class Site:
    """A place in a denoiser where an adapter can act.

    Attributes:
        path: the module's name in the denoiser, such as "transformer_blocks.0.attn".
        module: the attention; at a "block" the U-Net's transformer block.
        role: what kind of place it is.
        level: how often a U-Net has halved the grid of tokens there.
        kind: how a transformer's attention is laid out; None in a U-Net.
    """

    path: str
    module: Any
    role: Role
    level: int = 0
    kind: SiteKind | None = None

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of the image's tokens here, where the denoiser's own are these."""
        return _halved(rows, self.level), _halved(columns, self.level)

    @property
    def dim(self) -> int:
        """Width of the tokens of a U-Net's block, or of what a transformer's attention gathers."""
        if self.role == "block":
            return self.module.attn1.query_dim
        return self.module.inner_dim

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.module.attn1.heads if self.role == "block" else self.module.heads

    @property
    def text(self) -> Literal["first", "last"] | None:
        """Where the text's tokens stand among those that it attends over; None if there are none."""
        return None if self.kind is None else self.kind.text

    @property
    def whole(self) -> bool:
        """Whether queries and output are of text and image together."""
        return self.role == "single"

    @property
    def query(self) -> nn.Module:
        """What puts out the queries, normalised if they are, not yet rotated."""
        return self._normalised("q")

    @property
    def key(self) -> nn.Module:
        """What puts out the keys, likewise."""
        return self._normalised("k")

    @property
    def text_key(self) -> nn.Module | None:
        """What puts out the keys of the text's own stream, likewise; None where there is no such stream."""
        if self.role != "joint":
            return None
        norm = getattr(self.module, "norm_added_k", None)
        return self.module.add_k_proj if norm is None else norm

    @property
    def out(self) -> nn.Module | None:
        """What reads the gathered values, [B, L, dim or more]; None where the attention returns them."""
        name = "to_out.0" if self.kind is None else self.kind.out
        return self.module.get_submodule(name) if name else None

    @property
    def fused(self) -> bool:
        """Whether one projection makes queries, keys and values (`fuse_qkv_projections`).

        Some of diffusers' processors have a variant for that; others see that projections are fused.
        """
        name = type(self.module.processor).__name__
        if name.startswith("Fused") or hasattr(attention_processor, f"Fused{name}"):
            return name.startswith("Fused")
        return bool(getattr(self.module, "fused_projections", False)) and hasattr(self.module, "to_qkv")

    def by_head(self, states: Tensor, letter: Literal["q", "k"] = "q") -> Tensor:
        """[B, heads, L, D] of what `query` ("q") or `key` ("k") puts out."""
        if self.fused and self._norm(letter) is None:
            states = states.chunk(3, -1)["qk".index(letter)]
        if states.ndim == 4 and (self.kind is None or self.kind.heads_first):
            return states
        states = states if states.ndim == 4 else states.unflatten(2, (self.heads, -1))
        return states.transpose(1, 2)

    def _normalised(self, letter: str) -> nn.Module:
        own = "to_qkv" if self.fused else f"to_{letter}"
        norm = self._norm(letter)
        return getattr(self.module, own) if norm is None else norm

    def _norm(self, letter: str) -> nn.Module | None:
        if type(self.module.processor).__name__.startswith("Fused"):
            return None  # diffusers' processors of that name leave it out
        return getattr(self.module, f"norm_{letter}", None)


@dataclass(frozen=True)
class Base:
    """What an adapter has to know of the denoiser that it is made for.

    Attributes:
        cross_attention_dim: width of the text features that the denoiser reads.
        sites: for the path of each site, its width and its attention heads.
        denoiser: its class.
    """

    cross_attention_dim: int
    sites: dict[str, tuple[int, int]]
    denoiser: str = UNET

    def __str__(self) -> str:
        """Name it as an error message does: the kind, the text width, the sites' widths."""
        widths = ", ".join(str(w) for w in sorted({dim for dim, _ in self.sites.values()}))
        text, where = self.cross_attention_dim, f"{len(self.sites)} sites of width {widths}"
        if self.denoiser != UNET and self.denoiser in BY_DENOISER:
            return f"{BY_DENOISER[self.denoiser].name} (text width {text}, {where})"
        kind = KINDS.get(self.cross_attention_dim, "a U-Net of no published kind")
        return f"{kind} (cross-attention width {text}, {where})"

    @classmethod
    def of(cls, denoiser: Denoiser) -> "Base":
        """Read it off a denoiser.

        Raises:
            AdapterError: a U-Net has no transformer blocks, or they read text of several widths.
        """
        family = known_family(denoiser)
        width = denoiser.config[family.text_width]
        roles = ("block",) if family is UNET_FAMILY else ("joint", "single")
        found = {site.path: (site.dim, site.heads) for site in find_sites(denoiser) if site.role in roles}
        if not found:
            raise AdapterError("expected a U-Net with transformer blocks, got one without any")
        widths = set(width) if isinstance(width, Sequence) else {width}
        if len(widths) != 1:
            raise AdapterError(f"expected a U-Net that reads text of one width, got {sorted(widths)}")
        return cls(widths.pop(), found, family.denoiser)

    def check(self, denoiser: Denoiser) -> None:
        """Make sure that a denoiser is this base.

        Raises:
            AdapterError: it is another; the message names both.
        """
        got = Base.of(denoiser)
        if got != self:
            expected, found = str(self), str(got)
            if expected == found:  # the first site that tells them apart
                paths = sorted(self.sites.keys() | got.sites.keys())
                path = next(p for p in paths if self.sites.get(p) != got.sites.get(p))
                expected, found = (f"{b} with {b._site_words(path)}" for b in (self, got))
            raise AdapterError(f"expected the base that the adapter is made for, {expected}, got {found}")

    def _site_words(self, path: str) -> str:
        if path not in self.sites:
            return f"no {path}"
        width, heads = self.sites[path]
        return f"{path} of width {width} and {heads} heads"


def _halved(size: int, times: int) -> int:
    return -(-size // 2**times)


def held_denoiser(pipeline_or_denoiser: object) -> object:
    """A pipeline's U-Net or transformer, or what was given itself; a compiled wrapper as it is."""
    held = (getattr(pipeline_or_denoiser, name, None) for name in ("unet", "transformer"))
    return next((denoiser for denoiser in held if denoiser is not None), pipeline_or_denoiser)


def denoiser_of(pipeline_or_denoiser: object) -> Denoiser:
    """The U-Net or transformer of a pipeline, or that module itself, whether or not it was compiled.

    Raises:
        AdapterError: there is none that is known.
    """
    denoiser = held_denoiser(pipeline_or_denoiser)
    denoiser = getattr(denoiser, "_orig_mod", denoiser)
    known_family(denoiser)
    return denoiser


def known_family(denoiser: object) -> Family:
    """The family of a denoiser.

    Raises:
        AdapterError: it is of none.
    """
    family = family_of(denoiser)
    if family is None or not isinstance(denoiser, nn.Module):
        names = ", ".join(family.name for family in FAMILIES)
        raise AdapterError(
            f"expected a UNet2DConditionModel, a transformer of {names}, or a pipeline that has one, "
            f"got {type(denoiser).__name__}"
        )
    return family


def find_sites(denoiser: Denoiser) -> list[Site]:
    """Every site of a denoiser, in the order of its modules."""
    family = known_family(denoiser)
    return list(_unet_sites(denoiser) if family is UNET_FAMILY else _transformer_sites(denoiser, family))


def attention_sites(denoiser: Denoiser) -> list[Site]:
    """Every attention of a denoiser's image tokens to each other, in the order of the modules."""
    return [site for site in find_sites(denoiser) if site.role in ("self", "joint", "single")]


def joint_sites(transformer: Denoiser) -> list[Site]:
    """Every attention of a transformer over text and image, in the order of the modules."""
    return [site for site in find_sites(transformer) if site.role in ("joint", "single")]


def _transformer_sites(transformer: Any, family: Family) -> Iterator[Site]:
    for blocks in dict.fromkeys(kind.blocks for kind in family.sites):
        for number, block in enumerate(getattr(transformer, blocks)):
            for kind in family.sites:
                attention = getattr(block, kind.attention, None) if kind.blocks == blocks else None
                if attention is not None:
                    yield Site(f"{blocks}.{number}.{kind.attention}", attention, kind.role, kind=kind)


def _unet_sites(unet: UNet2DConditionModel) -> Iterator[Site]:
    levels = {id(module): level for part, level in _levels(unet) for module in part.modules()}
    for path, block in unet.named_modules():
        if isinstance(block, BasicTransformerBlock):
            level = levels[id(block)]
            yield Site(path, block, "block", level)
            yield Site(f"{path}.attn1", block.attn1, "cross" if block.only_cross_attention else "self", level)
            if block.attn2 is not None:
                yield Site(f"{path}.attn2", block.attn2, "cross", level)


def _levels(unet: UNet2DConditionModel) -> Iterator[tuple[nn.Module, int]]:
    level = 0
    for block in unet.down_blocks:
        yield block, level
        level += bool(getattr(block, "downsamplers", None))
    if unet.mid_block is not None:
        yield unet.mid_block, level
    for block in unet.up_blocks:
        yield block, cast(int, level)
        level -= bool(getattr(block, "upsamplers", None))
