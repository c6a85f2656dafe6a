"""Finds where a denoiser can be controlled, by what its modules are and never by what they are called."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn

from interactdiff.checkpoint import AdapterError

Denoiser = UNet2DConditionModel | FluxTransformer2DModel | SD3Transformer2DModel
KINDS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}  # by cross-attention width


@dataclass(frozen=True)
class Site:
    """One transformer block of a U-Net.

    Attributes:
        path: the block's name in the U-Net, such as "mid_block.attentions.0.transformer_blocks.0".
        block: the block.
        level: how often the latents have been halved there.
    """

    path: str
    block: BasicTransformerBlock
    level: int

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the block's tokens, for latents of this height and width."""
        return _halved(height, self.level), _halved(width, self.level)

    @property
    def dim(self) -> int:
        """Width of the block's tokens."""
        return self.block.attn1.query_dim

    @property
    def heads(self) -> int:
        """Attention heads of the block."""
        return self.block.attn1.heads


@dataclass(frozen=True)
class Base:
    """What an adapter has to know of the U-Net that it is made for.

    Attributes:
        cross_attention_dim: width of the text features that the U-Net reads.
        sites: for the path of each site, its width and its attention heads.
    """

    cross_attention_dim: int
    sites: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        """Name it as an error message does: the kind, the text width, the sites' widths."""
        kind = KINDS.get(self.cross_attention_dim, "a U-Net of no published kind")
        widths = ", ".join(str(w) for w in sorted({dim for dim, _ in self.sites.values()}))
        text = self.cross_attention_dim
        return f"{kind} (cross-attention width {text}, {len(self.sites)} sites of width {widths})"

    @classmethod
    def of(cls, unet: UNet2DConditionModel) -> "Base":
        """Read it off a U-Net.

        Raises:
            AdapterError: the U-Net has no transformer blocks, or they read text of several widths.
        """
        sites = {site.path: (site.dim, site.heads) for site in find_sites(unet)}
        if not sites:
            raise AdapterError("expected a U-Net with transformer blocks, got one without any")
        width = cast(Any, unet.config).cross_attention_dim
        widths = set(width) if isinstance(width, Sequence) else {width}
        if len(widths) != 1:
            raise AdapterError(f"expected a U-Net that reads text of one width, got {sorted(widths)}")
        return cls(widths.pop(), sites)

    def check(self, unet: UNet2DConditionModel) -> None:
        """Make sure that a U-Net is this base.

        Raises:
            AdapterError: it is another; the message names both.
        """
        got = Base.of(unet)
        if got != self:
            wanted, found = str(self), str(got)
            if wanted == found:  # the first site that tells them apart
                paths = sorted(self.sites.keys() | got.sites.keys())
                path = next(p for p in paths if self.sites.get(p) != got.sites.get(p))
                wanted, found = (f"{b} with {b.site_words(path)}" for b in (self, got))
            raise AdapterError(f"expected the base that the adapter is made for, {wanted}, got {found}")

    def site_words(self, path: str) -> str:
        """A site in words."""
        if path not in self.sites:
            return f"no {path}"
        width, heads = self.sites[path]
        return f"{path} of width {width} and {heads} heads"


@dataclass(frozen=True)
class AttentionSite:
    """One attention of a denoiser's image tokens to each other.

    Attributes:
        path: the attention's name in the denoiser, such as "transformer_blocks.0.attn".
        attention: the module.
        text: where the text tokens stand that it attends over too, or None if there are none.
        level: how often the grid of tokens has been halved there.
    """

    path: str
    attention: nn.Module
    text: Literal["first", "last"] | None
    level: int = 0

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of the image tokens here, where the denoiser's own are these."""
        return _halved(rows, self.level), _halved(columns, self.level)


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
    if not isinstance(denoiser, Denoiser):
        got = type(denoiser).__name__
        raise AdapterError(
            f"expected a UNet2DConditionModel, a FluxTransformer2DModel, an SD3Transformer2DModel, or a "
            f"pipeline that has one, got {got}"
        )
    return denoiser


def attention_sites(denoiser: Denoiser) -> list[AttentionSite]:
    """Every attention of image tokens to each other, in the order of the modules."""
    if isinstance(denoiser, UNet2DConditionModel):
        return [
            AttentionSite(f"{site.path}.attn1", site.block.attn1, None, site.level)
            for site in find_sites(denoiser)
            if not site.block.only_cross_attention
        ]
    if isinstance(denoiser, FluxTransformer2DModel):
        modules = denoiser.named_modules()
        return [AttentionSite(path, m, "first") for path, m in modules if isinstance(m, FluxAttention)]
    found = []
    for path, block in denoiser.named_modules():
        if isinstance(block, JointTransformerBlock):
            found.append(AttentionSite(f"{path}.attn", block.attn, "last"))
            if block.attn2 is not None:
                found.append(AttentionSite(f"{path}.attn2", block.attn2, None))
    return found


def unet_of(pipeline_or_unet: object) -> UNet2DConditionModel:
    """The U-Net of a pipeline, or the U-Net itself, whether or not it was compiled.

    Raises:
        AdapterError: there is none.
    """
    unet = getattr(pipeline_or_unet, "unet", pipeline_or_unet)
    unet = getattr(unet, "_orig_mod", unet)
    if not isinstance(unet, UNet2DConditionModel):
        got = type(pipeline_or_unet).__name__
        raise AdapterError(f"expected a UNet2DConditionModel or a pipeline that has one, got {got}")
    return unet


def find_sites(unet: UNet2DConditionModel) -> list[Site]:
    """Every transformer block of a U-Net, in the order of its modules."""
    levels = {id(module): level for part, level in _levels(unet) for module in part.modules()}
    return [
        Site(name, block, levels[id(block)])
        for name, block in unet.named_modules()
        if isinstance(block, BasicTransformerBlock)
    ]


def _levels(unet: UNet2DConditionModel) -> Iterator[tuple[nn.Module, int]]:
    level = 0
    for block in unet.down_blocks:
        yield block, level
        level += bool(getattr(block, "downsamplers", None))
    if unet.mid_block is not None:
        yield unet.mid_block, level
    for block in unet.up_blocks:
        yield block, level
        level -= bool(getattr(block, "upsamplers", None))
