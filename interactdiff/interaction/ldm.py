"""Reads checkpoints that name their weights as the original latent diffusion code does (LDM).

The published InteractDiffusion weights for SD 1.x are such U-Nets, with `position_net` and a `fuser` in each
transformer block. diffusers converts the U-Net itself; the adapter's names are converted here, so that a file
which has nothing but the adapter is read as well.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import LDM_UNET_KEY, convert_ldm_unet_checkpoint
from torch import Tensor

from interactdiff.checkpoint import check_tensors
from interactdiff.errors import AdapterError

ADAPTER_KEY = re.compile(r"(position_net|.*\.fuser)\.")
Weight = TypeVar("Weight")  # a tensor, or where one can be read
SITE = re.compile(r"(input_blocks|middle_block|output_blocks)\.(?:(\d+)\.)?1\.(.*)")


def unet_config_from_ldm(params: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of diffusers' `UNet2DConditionModel` that say what an LDM configuration says.

    Args:
        params: the parameters of LDM's `UNetModel`.

    Raises:
        AdapterError: one of them has no counterpart.
    """
    if (fuser := params.get("fuser_type", "gatedSA")) != "gatedSA":
        raise AdapterError(f"expected fusers of type 'gatedSA', got {fuser!r}")
    if not isinstance(params["num_res_blocks"], int):
        raise AdapterError(f"expected one num_res_blocks for every level, got {params['num_res_blocks']}")
    levels = range(len(params["channel_mult"]))
    channels = [params["model_channels"] * multiplier for multiplier in params["channel_mult"]]
    attends = [2**level in params["attention_resolutions"] for level in levels]
    head_channels = params.get("num_head_channels", -1)
    depth = params.get("transformer_depth", 1)
    return {
        "sample_size": params.get("image_size"),
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "block_out_channels": channels,
        "layers_per_block": params["num_res_blocks"],
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "cross_attention_dim": params["context_dim"],
        # diffusers calls the number of heads attention_head_dim
        "attention_head_dim": params["num_heads"]
        if head_channels == -1
        else [c // head_channels for c in channels],
        "transformer_layers_per_block": depth if isinstance(depth, int) else list(depth),
        "use_linear_projection": params.get("use_linear_in_transformer", False),
    }


def unet_from_ldm(tensors: Mapping[str, Tensor], params: Mapping[str, Any]) -> UNet2DConditionModel:
    """A diffusers U-Net with the weights of an LDM one; the adapter's tensors among them are left out.

    Args:
        tensors: LDM's names, without a prefix.
        params: the parameters of LDM's `UNetModel`.

    Raises:
        AdapterError: the weights are not those of such a U-Net.
    """
    unet = UNet2DConditionModel(**unet_config_from_ldm(params))
    base = {LDM_UNET_KEY + name: tensor for name, tensor in tensors.items() if not ADAPTER_KEY.match(name)}
    converted = convert_ldm_unet_checkpoint(base, unet.config)
    check_tensors("the U-Net", unet.state_dict(), converted)
    unet.load_state_dict(converted)
    return unet.eval()


def adapter_tensors_from_ldm(tensors: Mapping[str, Weight], layers_per_block: int) -> dict[str, Weight]:
    """The adapter's tensors of an LDM checkpoint, whole or adapter only, under diffusers' names.

    Args:
        tensors: LDM's names, without a prefix.
        layers_per_block: of the U-Net.
    """
    return {
        _diffusers_name(name, layers_per_block): tensor
        for name, tensor in tensors.items()
        if ADAPTER_KEY.match(name)
    }


def layers_per_block_from_ldm(names: Collection[str]) -> int:
    """How many layers a level of the U-Net has, from where the fusers are.

    The numbers of a level's layers follow each other, and after each level one is for the resampling.

    Args:
        names: of the adapter's weights, LDM's.

    Raises:
        AdapterError: no level on the way down has fusers.
    """
    matches = filter(None, map(SITE.match, names))
    numbers = {int(match[2]) for match in matches if match[1] == "input_blocks"}
    if not numbers:
        raise AdapterError("expected fusers in the input_blocks of an LDM checkpoint, got none")
    first = min(numbers)
    return next(count for count in range(1, len(numbers) + 1) if first + count not in numbers)


def _diffusers_name(name: str, layers_per_block: int) -> str:
    """LDM counts layers and resampling in one row, after the input convolution; diffusers counts by level."""
    if not (site := SITE.match(name)):
        return name
    side, number, rest = site.groups()
    if side == "middle_block":
        return f"mid_block.attentions.0.{rest}"
    position = int(number) - (side == "input_blocks")
    block, layer = divmod(position, layers_per_block + 1)
    return f"{'down' if side == 'input_blocks' else 'up'}_blocks.{block}.attentions.{layer}.{rest}"
