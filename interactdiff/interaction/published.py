"""Finds the adapter in published weights, whatever else is in the file and whatever the names begin with.

names                     InteractDiffusion       GLIGEN (where training starts)
LDM's, of the U-Net       v1.0, v1.1, v1.2        the original files
LDM's, adapter only       the AUTOMATIC1111 files
diffusers', of the U-Net  SD 1.5, SDXL            SD 1.4, SDXL
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from interactdiff.errors import AdapterError
from interactdiff.interaction.ldm import adapter_tensors_from_ldm, layers_per_block_from_ldm
from interactdiff.interaction.tokens import InteractionTokenizer
from interactdiff.lazy_tensors import LazyTensor
from interactdiff.sites import KINDS, Base

LDM_BLOCKS, DIFFUSERS_BLOCKS = "input_blocks|middle_block|output_blocks", "down_blocks|mid_block|up_blocks"
SITE = rf"(?:{LDM_BLOCKS}|{DIFFUSERS_BLOCKS})(?:\.(?:\d{{1,3}}|attentions|transformer_blocks))+"
PREFIX = r"(?:(?:module|model|unet|ema|model_ema|state_dict|diffusion_model)\.)*"
ADAPTER_KEY = re.compile(rf"(?P<prefix>{PREFIX})(?P<name>position_net\..+|{SITE}\.fuser\..+)")
TOKENIZER = "position_net."
FUSER_WIDTH = ".fuser.linear.weight"  # [width of the site, width of the tokens]
LINEARS = {f"linears.{layer}.{what}" for layer in (0, 2, 4) for what in ("weight", "bias")}
GLIGEN = LINEARS | {"null_positive_feature", "null_position_feature"}
TABLE_STD = 0.02
HEADS = {768: 8}  # by cross-attention width; in every later kind a head is 64 wide


@dataclass(frozen=True)
class Found:
    """An adapter among weights.

    Attributes:
        words: what it is.
        tensors: the adapter's, by the names of its `state_dict`.
        stored: those of them that are in the file: a start from GLIGEN has more.
    """

    words: str
    tensors: dict[str, LazyTensor]
    stored: tuple[LazyTensor, ...]


def find_adapter(tensors: Mapping[str, LazyTensor]) -> Found:
    """Pick the adapter out of weights. Of a model and its moving average (EMA), the model, as published.

    GLIGEN's weights become a start for training: its phrase network also serves actions, and the tables that
    tell slots and roles apart begin as random numbers, the same at every call.

    Raises:
        AdapterError: there is no adapter, or one of another kind.
    """
    copies: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        if match := ADAPTER_KEY.fullmatch(name):
            copies.setdefault(match["prefix"], {})[match["name"]] = tensor
    prefixes = [prefix for prefix in copies if "ema" not in prefix] or list(copies)
    if not prefixes:
        some = next(iter(tensors), "nothing")
        raise AdapterError(
            "expected InteractDiffusion's weights, got none named position_net or fuser among "
            f"{len(tensors)} tensors such as {some}"
        )
    if len(prefixes) > 1:
        raise AdapterError(f"expected one adapter among the weights, got one below each of {prefixes}")
    adapter, names = copies[prefixes[0]], "diffusers'"
    if any(re.match(LDM_BLOCKS, name) for name in adapter):
        names = "LDM's"
        adapter = adapter_tensors_from_ldm(adapter, layers_per_block_from_ldm(adapter))
    stored = tuple(adapter.values())
    parts = {name.removeprefix(TOKENIZER) for name in adapter if name.startswith(TOKENIZER)}
    if parts == GLIGEN:
        return Found(f"GLIGEN under {names} names", _started_from_gligen(adapter), stored)
    if {"linears_text.0.weight", "linears_image.0.weight"} & parts:
        raise AdapterError(
            "expected InteractDiffusion's weights, or GLIGEN's for boxes with text, got GLIGEN's for "
            "text and images"
        )
    if not parts & LINEARS:
        got = ", ".join(sorted(parts)[:3]) or "nothing"
        raise AdapterError(f"expected InteractDiffusion's or GLIGEN's position_net, got one of {got}")
    return Found(f"InteractDiffusion under {names} names", adapter, stored)


def tokenizer_sizes(tensors: Mapping[str, LazyTensor]) -> dict[str, int]:
    """The sizes of `InteractionTokenizer`, by the names of its arguments.

    Raises:
        AdapterError: a tensor is missing, or has no such shape.
    """
    shapes = {
        name.removeprefix(TOKENIZER): torch.empty(t.shape, device="meta") for name, t in tensors.items()
    }
    try:
        return InteractionTokenizer.sizes_of(shapes)
    except KeyError as missing:
        raise AdapterError(f"expected InteractDiffusion's weights, got none named {missing}") from None
    except (ValueError, IndexError):
        raise AdapterError("expected InteractDiffusion's weights, got some of other shapes") from None


def base_of(
    tensors: Mapping[str, LazyTensor],
    unet: UNet2DConditionModel | None = None,
    unet_config: Mapping[str, Any] | None = None,
) -> Base:
    """The base that an adapter is made for. Its numbers of heads are in no tensor.

    Args:
        tensors: the adapter's.
        unet: the base, if it is at hand.
        unet_config: what the folder of the weights says of its U-Net.

    Raises:
        AdapterError: there are no fusers, they are made for another base than `unet`, or nothing tells how
            many heads there are.
    """
    text_width = tokenizer_sizes(tensors)["token_dim"]
    fusers = {n.removesuffix(FUSER_WIDTH): t.shape for n, t in tensors.items() if n.endswith(FUSER_WIDTH)}
    if not fusers or any(len(shape) != 2 for shape in fusers.values()):
        raise AdapterError(f"expected fusers among the weights, got {len(fusers)} of them of a known shape")
    widths = {path: width for path, (width, _) in fusers.items()}
    if unet is not None:
        heads = {path: heads for path, (_, heads) in Base.of(unet).sites.items()}
        base = Base(text_width, {path: (width, heads.get(path, 1)) for path, width in widths.items()})
        base.check(unet)
        return base
    if unet_config is not None:
        base = Base.of(stock_unet(unet_config))
        if (
            base.cross_attention_dim == text_width
            and {p: dim for p, (dim, _) in base.sites.items()} == widths
        ):
            return base
    if text_width not in KINDS:
        raise AdapterError(
            "expected unet= or a folder with the U-Net's config.json to tell the number of attention heads, "
            f"got weights alone, for {Base(text_width, {p: (w, 1) for p, w in widths.items()})}"
        )
    return Base(
        text_width, {path: (width, HEADS.get(text_width, width // 64)) for path, width in widths.items()}
    )


def stock_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """The stock U-Net of a configuration that may have been written for another class; without weights.

    Args:
        config: of any U-Net that is a stock one but for fusers and a `position_net`.

    Raises:
        AdapterError: no stock U-Net can be made of it.
    """
    known = inspect.signature(UNet2DConditionModel.__init__).parameters
    stock = {key: value for key, value in config.items() if key in known} | {"attention_type": "default"}
    make = cast(Any, UNet2DConditionModel)
    try:
        with torch.device("meta"):
            return make(**stock).eval()
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise AdapterError(
            f"expected the configuration of a U-Net, got {type(error).__name__}: {error}"
        ) from None


def _started_from_gligen(adapter: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    last, null = adapter[f"{TOKENIZER}linears.4.weight"], adapter[f"{TOKENIZER}null_positive_feature"]
    width = last.shape[0] if last.shape else 0
    slots = 32 if KINDS.get(width) == "SDXL" else 30
    return {
        **adapter,
        **{
            f"{TOKENIZER}{n.replace('linears', 'linear_action')}": adapter[TOKENIZER + n].copy()
            for n in LINEARS
        },
        f"{TOKENIZER}null_action_feature": null.copy(),
        f"{TOKENIZER}interaction_embedding.emb.weight": _random(slots, width, last.dtype, seed=0),
        f"{TOKENIZER}position_embedding.emb.weight": _random(3, width, last.dtype, seed=1),
    }


def _random(rows: int, width: int, dtype: torch.dtype, seed: int) -> LazyTensor:
    def load() -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows, width, generator=generator).mul(TABLE_STD).to(dtype)

    return LazyTensor((rows, width), dtype, load)
