"""Opens a subject adapter, ours or in the published layout: its shapes are known, no value is read yet.

The published layout is that of `subject-encoder-sd15`: `subject_encoder/` holds the image tower and the
mapper, `unet/` a whole U-Net with `se_norm` and `se_attn` in each of its blocks, of which only these are
read.
"""

from __future__ import annotations

import os
import re

from interactdiff.errors import AdapterError
from interactdiff.interaction.published import HEADS
from interactdiff.lazy_tensors import LazyTensor
from interactdiff.sites import Base
from interactdiff.sources import Source, is_saved_adapter, read_weights, saved_adapter
from interactdiff.subject.config import CLIP_LARGE, METHOD, VERSION, SubjectConfig

ENCODER, UNET = "subject_encoder", "unet"
WEIGHTS = r"{}/diffusion_pytorch_model(\.fp16)?\.(safetensors|bin)(\.index(\.fp16)?\.json)?"
SITE = re.compile(r"(?P<path>.+\.transformer_blocks\.\d+)\.(?P<name>se_(?:attn|norm)\..+)")
TOWER = re.compile(r"image_encoder\.vision_model\.")  # of published files, and of transformers 4
HEAD_DIM = 64  # of CLIP's towers


def open_subject_adapter(
    path_or_id: str | os.PathLike[str],
) -> tuple[SubjectConfig | None, dict[str, LazyTensor]]:
    """Find an adapter.

    Returns:
        Its configuration, None for one without an encoder, and its tensors by the names of its `state_dict`.

    Raises:
        AdapterError: as `SubjectAdapter.from_pretrained` raises it.
    """
    source = Source.of(path_or_id)
    if is_saved_adapter(source):
        data, weights = saved_adapter(source)
        if (data.get("method"), data.get("version")) == (METHOD, VERSION) and "base" not in data:
            return None, {}
        return SubjectConfig.from_json(data), weights.tensors
    return _published(source)


def name_in_file(name: str) -> str:
    """A tensor's name in files of ours: the image tower's are those of transformers 5."""
    return TOWER.sub("image_encoder.", name)


def _published(source: Source) -> tuple[SubjectConfig, dict[str, LazyTensor]]:
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in read_weights(source, _file(source, ENCODER)).tensors.items():
        if name.endswith("position_ids"):  # which earlier versions of transformers saved
            continue
        tensors[name_in_file(name)] = tensor
    sites: dict[str, tuple[int, int]] = {}
    for name, tensor in read_weights(source, _file(source, UNET)).tensors.items():
        if match := SITE.fullmatch(name):
            tensors[name] = tensor
            if match["name"] == "se_attn.to_k.weight":
                dim, width = tensor.shape
                sites[match["path"]] = (dim, HEADS.get(width, max(dim // 64, 1)))
    if not sites or "mapper.proj.weight" not in tensors:
        raise AdapterError(
            f"expected a mapper and se_attn layers in {source.where}, got {len(sites)} such layers"
        )
    width = tensors["mapper.proj.weight"].shape[0]
    return SubjectConfig(Base(width, sites), _vision(tensors), width, close_up=False), tensors


def _file(source: Source, folder: str) -> str:
    """The weights in a folder: safetensors and full precision first."""
    pattern = re.compile(WEIGHTS.format(folder))
    found = sorted(
        (name for name in source.names if pattern.fullmatch(name)),
        key=lambda name: (".safetensors" not in name, ".fp16" in name, name),
    )
    if not found:
        raise AdapterError(
            f"expected a subject adapter in {source.where}, or weights in {ENCODER} and {UNET}, got none "
            f"in {folder}"
        )
    return found[0]


def _vision(tensors: dict[str, LazyTensor]) -> dict[str, int]:
    """The image tower's shapes; heads are 64 wide in all of CLIP's."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        width, _, patch, _ = shapes["image_encoder.embeddings.patch_embedding.weight"]
        tokens, _ = shapes["image_encoder.embeddings.position_embedding.weight"]
        inside, _ = shapes["image_encoder.encoder.layers.0.mlp.fc1.weight"]
    except (KeyError, ValueError):
        raise AdapterError("expected a CLIP image tower beside the mapper, got none") from None
    layers = {name.split(".")[3] for name in shapes if name.startswith("image_encoder.encoder.layers.")}
    return {
        **CLIP_LARGE,
        "hidden_size": width,
        "intermediate_size": inside,
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(width // HEAD_DIM, 1),
        "image_size": round((tokens - 1) ** 0.5) * patch,
        "patch_size": patch,
    }
