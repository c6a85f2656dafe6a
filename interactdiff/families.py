"""The denoisers that adapters can act in: one row for each family of transformers, and one for U-Nets.

A row says where attention is and how its processor lays out queries and outputs (`SiteKind`), and what a
call's arguments mean (`CallKind`). Another family of transformers is one more row, and a test. Classes go by
their names: nothing is imported for a family that is not used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from interactdiff.errors import AdapterError

Role = Literal["block", "self", "cross", "joint", "single"]
"""A U-Net's transformer block, its self- and cross-attention; a transformer's attention over text and image,
in two streams or in a single one. A transformer's attention of the image alone is "self"."""

Grid = tuple[int, int]


@dataclass(frozen=True)
class SiteKind:
    """How one attention of a transformer's blocks is laid out by its stock processor.

    Attributes:
        blocks: the transformer's list of blocks.
        attention: the attention's name in such a block.
        role: what it attends over.
        processor: the stock processor, which decides everything below.
        heads_first: whether `norm_q` gives [B, heads, L, D], else [B, L, heads, D]. Without a norm the
            queries are what `to_q` gives, [B, L, C].
        out: the module that reads what attention gathers; "" where the attention returns that.
        text: where the text's tokens stand; None if it attends to the image alone.
    """

    blocks: str
    attention: str
    role: Role
    processor: str
    heads_first: bool = False
    out: str = "to_out.0"
    text: Literal["first", "last"] | None = "first"


def _unchanged(timestep: Any) -> Any:
    return timestep


def _thousandfold(timestep: Any) -> Any:
    return timestep * 1000


@dataclass(frozen=True)
class CallKind:
    """What the arguments of a denoiser's call mean.

    Attributes:
        grid: of the arguments by name and the denoiser's configuration, rows and columns of the image's
            tokens, or of a U-Net's latents.
        image: the argument that holds the latents, one row a picture.
        text: the argument that holds the text's features.
        timestep: the argument that holds the timestep.
        scheduler_units: turns it into the scheduler's units.
        guidance: how guidance by an unconditional prediction comes: as the halves of one batch, or as calls
            of their own, the prompt's first.
        conditional: for each half of a batch whether it is the prompt's.
    """

    grid: Callable[[Mapping[str, Any], Mapping[str, Any]], Grid]
    image: str = "hidden_states"
    text: str = "encoder_hidden_states"
    timestep: str = "timestep"
    scheduler_units: Callable[[Any], Any] = _unchanged
    guidance: Literal["batch", "calls"] = "batch"
    conditional: tuple[bool, bool] = (False, True)


@dataclass(frozen=True)
class Family:
    """A family of denoisers.

    Attributes:
        name: as messages have it.
        denoiser: its class's name.
        call: what a call's arguments mean.
        sites: of a transformer; a U-Net's are found by its blocks' class.
        text_width: the configuration's name for the width of the text's features.
        phrases: what a phrase's feature is: "pooled" by CLIP encoders, or the "mean" of the last hidden
            states of the only encoder.
        feature_width: of the configuration, the width of phrases' features.
    """

    name: str
    denoiser: str
    call: CallKind
    sites: tuple[SiteKind, ...] = ()
    text_width: str = "joint_attention_dim"
    phrases: Literal["pooled", "mean"] = "pooled"
    feature_width: Callable[[Mapping[str, Any]], int] = field(
        default=lambda config: config["pooled_projection_dim"]
    )


# --- grids ---


def grid_of_ids(ids: Tensor) -> Grid:
    """Rows and columns of the image's tokens, of their places (time, row, column, ...).

    Tokens of further pictures, at another time, come after those of the one that is denoised. The places may
    begin anywhere, and lie any distance apart.

    Args:
        ids: [L, 3 or 4], or [B, L, ...].

    Raises:
        AdapterError: the first picture's tokens are not one whole grid in raster order.
    """
    ids = (ids[0] if ids.ndim == 3 else ids).float()
    own = ids[ids[:, 0] == ids[0, 0]]
    (rows, row), (columns, column) = (
        (len(lines), line)
        for lines, line in (ids[: len(own), axis].unique(return_inverse=True) for axis in (1, 2))
    )
    places = row * columns + column
    if rows * columns != len(own) or not places.equal(torch.arange(len(own)).to(places)):
        raise AdapterError(
            f"expected image tokens in one grid, row by row, got {len(own)} tokens with places in "
            f"{rows} x {columns}"
        )
    return rows, columns


def _one_picture(arguments: Mapping[str, Any], config: Mapping[str, Any]) -> Grid:
    ids = arguments["img_ids"]
    rows, columns = grid_of_ids(ids)
    if rows * columns != (count := ids.shape[-2]):
        raise AdapterError(
            f"expected image tokens of one picture, got {count} tokens with places in {rows} x {columns}"
        )
    return rows, columns


def _first_picture(arguments: Mapping[str, Any], config: Mapping[str, Any]) -> Grid:
    if (mode := arguments.get("kv_cache_mode")) is not None:
        raise AdapterError(f"expected Flux2 without a cache of reference tokens, got kv_cache_mode {mode!r}")
    return grid_of_ids(arguments["img_ids"])


def _of_latents(arguments: Mapping[str, Any], config: Mapping[str, Any]) -> Grid:
    sample = arguments["sample"] if "sample" in arguments else arguments["hidden_states"]
    patch = config.get("patch_size", 1)
    return sample.shape[-2] // patch, sample.shape[-1] // patch


def _of_shapes(arguments: Mapping[str, Any], config: Mapping[str, Any]) -> Grid:
    """Of Qwen's (frames, rows, columns), for each row of the batch a list with the denoised picture first."""
    shapes = {tuple(shapes[0]) if isinstance(shapes, list) else shapes for shapes in arguments["img_shapes"]}
    frames, rows, columns = next(iter(shapes))
    if len(shapes) != 1 or frames != 1:
        raise AdapterError(f"expected pictures of one size in a batch, got {sorted(shapes)}")
    return rows, columns


def _of_list(arguments: Mapping[str, Any], config: Mapping[str, Any]) -> Grid:
    """Of Z-Image's list of latents [C, frames, H, W]."""
    pictures = arguments["x"]
    if isinstance(pictures[0], list):
        raise AdapterError("expected Z-Image's latents, one picture a row, got its lists of several pictures")
    sizes = {tuple(picture.shape[1:]) for picture in pictures}
    frames, height, width = next(iter(sizes))
    if len(sizes) != 1 or frames != 1:
        raise AdapterError(f"expected pictures of one size in a batch, got {sorted(sizes)}")
    patch = arguments.get("patch_size", 2)
    return height // patch, width // patch


# --- the families ---

UNET = Family(
    name="U-Net",
    denoiser="UNet2DConditionModel",
    call=CallKind(_of_latents, image="sample"),
    text_width="cross_attention_dim",
)
FAMILIES = (
    Family(
        name="Flux",
        denoiser="FluxTransformer2DModel",
        call=CallKind(_one_picture, guidance="calls", scheduler_units=_thousandfold),
        sites=(
            SiteKind("transformer_blocks", "attn", "joint", "FluxAttnProcessor"),
            SiteKind("single_transformer_blocks", "attn", "single", "FluxAttnProcessor", out=""),
        ),
    ),
    Family(
        name="SD3",
        denoiser="SD3Transformer2DModel",
        call=CallKind(_of_latents),
        sites=(
            SiteKind(
                "transformer_blocks", "attn", "joint", "JointAttnProcessor2_0", heads_first=True, text="last"
            ),
            SiteKind(
                "transformer_blocks", "attn2", "self", "JointAttnProcessor2_0", heads_first=True, text=None
            ),
        ),
    ),
    Family(
        name="Chroma",
        denoiser="ChromaTransformer2DModel",
        call=CallKind(_one_picture, guidance="calls", scheduler_units=_thousandfold),
        sites=(
            SiteKind("transformer_blocks", "attn", "joint", "FluxAttnProcessor"),
            SiteKind("single_transformer_blocks", "attn", "single", "FluxAttnProcessor", out=""),
        ),
        phrases="mean",  # T5
        feature_width=lambda config: config["joint_attention_dim"],
    ),
    Family(
        name="Flux2",
        denoiser="Flux2Transformer2DModel",
        call=CallKind(_first_picture, guidance="calls", scheduler_units=_thousandfold),
        sites=(
            SiteKind("transformer_blocks", "attn", "joint", "Flux2AttnProcessor"),
            SiteKind(
                "single_transformer_blocks", "attn", "single", "Flux2ParallelSelfAttnProcessor", out="to_out"
            ),
        ),
        phrases="mean",  # Mistral (dev) or Qwen3 (klein), of which the transformer reads three layers
        feature_width=lambda config: config["joint_attention_dim"] // 3,
    ),
    Family(
        name="Qwen-Image",
        denoiser="QwenImageTransformer2DModel",
        call=CallKind(_of_shapes, guidance="calls", scheduler_units=_thousandfold),
        sites=(SiteKind("transformer_blocks", "attn", "joint", "QwenDoubleStreamAttnProcessor2_0"),),
        phrases="mean",  # Qwen2.5-VL
        feature_width=lambda config: config["joint_attention_dim"],
    ),
    Family(
        name="Z-Image",
        denoiser="ZImageTransformer2DModel",
        call=CallKind(
            _of_list, image="x", text="cap_feats", timestep="t", conditional=(True, False),
            scheduler_units=lambda t: 1000 - t * 1000,
        ),
        sites=(SiteKind("layers", "attention", "single", "ZSingleStreamAttnProcessor", text="last"),),
        text_width="cap_feat_dim",
        phrases="mean",  # Qwen3
        feature_width=lambda config: config["cap_feat_dim"],
    ),
)  # fmt: skip
BY_DENOISER = {family.denoiser: family for family in (UNET, *FAMILIES)}


def family_of(denoiser: object) -> Family | None:
    """The family of a denoiser, which may be a subclass; None if it is of none."""
    names = (kind.__name__ for kind in type(denoiser).__mro__)
    return next((BY_DENOISER[name] for name in names if name in BY_DENOISER), None)
