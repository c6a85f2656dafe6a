"""The layouts that weights are published in, made from an adapter that acts."""

import copy
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from test_ldm import ldm_shapes
from torch import Tensor

from interactdiff.interaction.adapter import InteractionAdapter

SD15 = {
    "image_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_heads": 8,
    "num_res_blocks": 2,
    "transformer_depth": 1,
    "context_dim": 768,
    "channel_mult": [1, 2, 4, 4],
    "attention_resolutions": [4, 2, 1],
}


def ldm_name(name: str, layers_per_block: int) -> str:
    """LDM's name of an adapter's weight, from diffusers'."""
    if name.startswith("mid_block"):
        return re.sub(r"mid_block\.attentions\.0", "middle_block.1", name)
    if not (site := re.fullmatch(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.*)", name)):
        return name
    number = int(site[2]) * (layers_per_block + 1) + int(site[3])
    return (
        f"input_blocks.{number + 1}.1.{site[4]}"
        if site[1] == "down"
        else f"output_blocks.{number}.1.{site[4]}"
    )


def under_ldm_names(tensors: Mapping[str, Tensor], layers_per_block: int) -> dict[str, Tensor]:
    return {ldm_name(name, layers_per_block): tensor for name, tensor in tensors.items()}


def as_gligen(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What GLIGEN has of an adapter's tensors."""
    ours = ("linear_action", "null_action_feature", "interaction_embedding", "position_embedding")
    return {name: t for name, t in tensors.items() if not any(part in name for part in ours)}


def write_unet_folder(
    folder: Path, unet: UNet2DConditionModel, adapter: InteractionAdapter, **options: Any
) -> None:
    """`unet/` of containers C and D: base and adapter in one U-Net, written by diffusers."""
    merged: Any = copy.deepcopy(unet)
    merged.position_net = adapter.position_net
    for path, fuser in adapter.fusers.items():
        merged.get_submodule(path).fuser = fuser
    merged.save_pretrained(folder, **options)


def sd15_checkpoint() -> dict[str, Any]:
    """Container A of SD 1.5's shapes, in memory that nothing has touched, so that it takes none."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        adapter = InteractionAdapter.for_unet(unet)
    names = under_ldm_names(adapter.state_dict(), 2)
    shapes: Iterable[tuple[str, Any]] = [*ldm_shapes(SD15).items(), *((n, t.shape) for n, t in names.items())]
    return {
        "autoencoder": {"all of it": torch.empty(83_653_863)},
        "text_encoder": {"all of it": torch.empty(123_060_480)},
        "model": {name: torch.empty(shape) for name, shape in shapes},
        "iters": 500_000,
    }


def publish(folder: Path, pipeline: Any, adapter: InteractionAdapter, **options: Any) -> Path:
    """Container C or D: classes of the folder's own, whose code leaves a trace where it runs."""
    pipeline.save_pretrained(folder, **options)
    shutil.rmtree(folder / "unet")
    write_unet_folder(folder / "unet", pipeline.unet, adapter, **options)
    edit(
        folder / "model_index.json", _class_name=["pipeline_own", "OwnPipeline"], unet=["own_unet", "OwnUNet"]
    )
    edit(folder / "unet" / "config.json", _class_name="OwnUNet", attention_type="gated-own", own_key=3)
    for name in ("pipeline_own.py", "unet/own_unet.py", "own_unet.py"):
        (folder / name).write_text(f"open({str(folder / 'trace')!r}, 'w').close()\n")
    return folder


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
