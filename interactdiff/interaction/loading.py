"""Opens an adapter, ours or a published one: all that decides its shapes is known, no value is read yet."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from interactdiff.interaction.config import InteractionConfig
from interactdiff.interaction.published import base_of, find_adapter, tokenizer_sizes
from interactdiff.lazy_tensors import LazyTensor
from interactdiff.sources import (
    Source,
    choose,
    file_or_source,
    is_saved_adapter,
    read_weights,
    saved_adapter,
)


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter that can be read.

    Attributes:
        words: what it was recognised as.
        config: its shapes.
        tensors: by the names of its `state_dict`.
        size: of the files that it is in, in bytes.
    """

    words: str
    config: InteractionConfig
    tensors: dict[str, LazyTensor]
    size: int


def open_adapter(
    path_or_id: str | os.PathLike[str],
    *,
    weight_name: str | None = None,
    unet: UNet2DConditionModel | None = None,
    dtype: torch.dtype | None = None,
) -> OpenedAdapter:
    """Find an adapter. The arguments and errors are those of `InteractionAdapter.from_pretrained`."""
    source, name = file_or_source(path_or_id, weight_name)
    if is_saved_adapter(source, name):
        data, weights = saved_adapter(source)
        config = InteractionConfig.from_json(data)
        if unet is not None:
            config.base.check(unet)
        return OpenedAdapter("interactdiff's own adapter", config, weights.tensors, weights.size)
    weights = read_weights(source, choose(source, name, dtype=dtype))
    found = find_adapter(weights.tensors)
    weights.check_fits(found.stored)
    return OpenedAdapter(
        found.words, published_config(found.tensors, unet, unet_config(source)), found.tensors, weights.size
    )


def published_config(
    tensors: Mapping[str, LazyTensor],
    unet: UNet2DConditionModel | None = None,
    unet_config: Mapping[str, Any] | None = None,
) -> InteractionConfig:
    """The shapes of a published adapter; the arguments and errors are those of `base_of`."""
    sizes = tokenizer_sizes(tensors)
    return InteractionConfig(
        base=base_of(tensors, unet, unet_config),
        feature_dim=sizes["feature_dim"],
        max_interactions=sizes["max_interactions"],
        hidden=sizes["hidden"],
    )


def unet_config(source: Source) -> dict[str, Any] | None:
    """What a diffusers pipeline's or U-Net's folder says of the U-Net; None for any other source."""
    contents = (source.json(name) for name in ("unet/config.json", "config.json"))
    return next((content for content in contents if content and "block_out_channels" in content), None)
