"""Finds where a denoiser can be controlled, by what its modules are and never by what they are called."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn

from interactdiff.checkpoint import AdapterError

Transformer = FluxTransformer2DModel | SD3Transformer2DModel
Denoiser = UNet2DConditionModel | Transformer
KINDS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}  # of U-Nets, by cross-attention width
UNET = UNet2DConditionModel.__name__
TRANSFORMERS = {FluxTransformer2DModel.__name__: "Flux", SD3Transformer2DModel.__name__: "SD3"}


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
        if self.denoiser in TRANSFORMERS:
            return f"{TRANSFORMERS[self.denoiser]} (text width {text}, {where})"
        kind = KINDS.get(self.cross_attention_dim, "a U-Net of no published kind")
        return f"{kind} (cross-attention width {text}, {where})"

    @classmethod
    def of(cls, denoiser: Denoiser) -> "Base":
        """Read it off a denoiser.

        Raises:
            AdapterError: a U-Net has no transformer blocks, or they read text of several widths.
        """
        if not isinstance(denoiser, UNet2DConditionModel):
            width = cast(Any, denoiser.config).joint_attention_dim
            joint = {site.path: (site.dim, site.heads) for site in joint_sites(denoiser)}
            return cls(width, joint, type(denoiser).__name__)
        sites = {site.path: (site.dim, site.heads) for site in find_sites(denoiser)}
        if not sites:
            raise AdapterError("expected a U-Net with transformer blocks, got one without any")
        width = cast(Any, denoiser.config).cross_attention_dim
        widths = set(width) if isinstance(width, Sequence) else {width}
        if len(widths) != 1:
            raise AdapterError(f"expected a U-Net that reads text of one width, got {sorted(widths)}")
        return cls(widths.pop(), sites)

    def check(self, denoiser: Denoiser) -> None:
        """Make sure that a denoiser is this base.

        Raises:
            AdapterError: it is another; the message names both.
        """
        got = Base.of(denoiser)
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


@dataclass(frozen=True)
class JointSite:
    """One attention of a transformer over text and image: where its queries are, and what it gathers.

    Attributes:
        path: the attention's name in the transformer, such as "transformer_blocks.0.attn".
        attention: the module.
    """

    path: str
    attention: Any

    @property
    def dim(self) -> int:
        """Width of what it gathers, all heads together."""
        return self.attention.inner_dim

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.attention.heads

    @property
    def query(self) -> nn.Module:
        """What puts out the queries, normalised if they are, not yet rotated.

        [B, heads, L, D] with `heads_first`, else [B, L, heads, D] or [B, L, dim].
        """
        return self.attention.to_q if self.attention.norm_q is None else self.attention.norm_q

    @property
    def heads_first(self) -> bool:
        """See `query`."""
        return not isinstance(self.attention, FluxAttention) and self.attention.norm_q is not None

    @property
    def out(self) -> nn.Module | None:
        """What reads the image's share of what was gathered, [B, L, dim].

        None where the attention returns that, of text and image; its queries are those of both then, too.
        """
        out = getattr(self.attention, "to_out", None)
        return None if out is None else out[0]


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


def joint_sites(transformer: Transformer) -> list[JointSite]:
    """Every attention over text and image, in the order of the modules.

    Another transformer takes part once its attentions are described here and in `JointSite`.
    """
    sites = attention_sites(transformer)
    return [JointSite(site.path, site.attention) for site in sites if site.text is not None]


class TokenGrid:
    """Tells rows and columns of a denoiser's image tokens, or of a U-Net's latents, from a call's arguments.

    Flux is told the place of each token, the same tensor at every step of a run; it is read once.
    """

    def __init__(self):
        self._ids: tuple[Tensor | None, tuple[int, int]] = (None, (0, 0))

    def __call__(self, denoiser: Denoiser, call: Mapping[str, Any]) -> tuple[int, int]:
        """Rows and columns.

        Raises:
            AdapterError: the tokens are not one whole grid in raster order.
        """
        if isinstance(denoiser, FluxTransformer2DModel):
            ids = call["img_ids"]
            if self._ids[0] is not ids:
                self._ids = ids, _grid_of(ids)
            return self._ids[1]
        sample = call["sample" if isinstance(denoiser, UNet2DConditionModel) else "hidden_states"]
        patch = getattr(denoiser.config, "patch_size", 1)
        return sample.shape[-2] // patch, sample.shape[-1] // patch


def _grid_of(ids: Tensor) -> tuple[int, int]:
    ids = (ids[0] if ids.ndim == 3 else ids).float()
    rows, columns = (int(n) + 1 for n in ids[:, 1:].amax(0))
    places = ids[:, 1] * columns + ids[:, 2]
    if rows * columns != len(ids) or not places.equal(torch.arange(len(ids)).to(places)):
        raise AdapterError(
            f"expected image tokens in one grid, row by row, got {len(ids)} tokens with places in "
            f"{rows} x {columns}"
        )
    return rows, columns


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
