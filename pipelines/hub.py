"""Loads published pipeline folders, in which InteractDiffusion and its base are one U-Net of its own class.

What such a folder's code would do is not needed, and none of it is run: the U-Net is the stock one and the
fusers are an adapter's. diffusers gets to see a copy of the folder that names stock classes only.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from diffusers import (
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from interactdiff.checkpoint import check_tensors
from interactdiff.errors import AdapterError
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.interaction.loading import published_config, unet_config
from interactdiff.interaction.published import ADAPTER_KEY, find_adapter, stock_unet
from interactdiff.sources import Source, Weights, choose, read_weights

INDEX = "model_index.json"
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")
CODE_OPTIONS = ("trust_remote_code", "custom_pipeline", "custom_revision")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
UNUSED = (".py", ".msgpack", ".h5", ".onnx", ".onnx_data")
Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


def is_published_folder(path_or_id: str | os.PathLike[str], **options: Any) -> bool:
    """Whether a pipeline's U-Net has fusers in it, by its classes, its configuration or, in a folder, its
    weights' names.

    Args:
        path_or_id: a folder, or a repository on the Hub, of which the configurations are fetched at most.
        **options: as `from_pretrained` takes them.
    """
    try:
        source = _source(path_or_id, options)
        index = source.json(INDEX)
        if index is None or "unet" not in index:
            return False
        if isinstance(index.get("_class_name"), list) or not _is_stock("unet", index["unet"]):
            return True  # before anything else is read: with these diffusers would run the folder's code
        if str((unet_config(source) or {}).get("attention_type")).startswith("gated"):
            return True
        names = read_weights(source, choose(source)).tensors if Path(path_or_id).is_dir() else {}
        return any(map(ADAPTER_KEY.fullmatch, names))
    except AdapterError:  # nothing there, or damaged, of which diffusers says more
        return False


def load_hub_folder(
    load: Callable[..., Pipeline], path_or_id: str | os.PathLike[str], **options: Any
) -> tuple[Pipeline, InteractionAdapter]:
    """Take a published folder apart: into a stock pipeline and an adapter, which is not attached yet.

    Args:
        load: `StableDiffusionPipeline.from_pretrained` or `StableDiffusionXLPipeline.from_pretrained`.
        path_or_id: a folder, or a repository on the Hub.
        **options: as `load` takes them. `torch_dtype` and `variant` also decide which weights are read for
            the U-Net and the adapter; the options that would run code are ignored.

    Returns:
        What `load` returned, and the adapter in the U-Net's dtype.

    Raises:
        AdapterError: it is no such folder, it is for another pipeline, or its files are damaged or disagree.
    """
    with _stock_arguments(load, path_or_id, options) as (arguments, adapter):
        pipeline = load(**arguments)
    pipeline.register_to_config(_name_or_path=str(path_or_id))
    return pipeline, adapter


@contextmanager
def _stock_arguments(
    load: Callable[..., Any], path_or_id: str | os.PathLike[str], options: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], InteractionAdapter]]:
    """What a stock pipeline loads with, for as long as the context lasts, and the adapter."""
    source = _source(path_or_id, options)
    index = source.json(INDEX)
    if index is None:
        raise AdapterError(f"expected a diffusers pipeline in {source.where}, got no {INDEX}")
    index = _stock_index(source, index)
    loading, needed = getattr(load, "__self__", None), getattr(diffusers, index["_class_name"])
    if isinstance(loading, type) and not issubclass(loading, needed):
        raise AdapterError(
            f"expected a {needed.__name__} or our pipeline of that kind for {source.where}, "
            f"got {loading.__name__}"
        )
    dtype, variant = _unet_dtype(options), options.get("variant")
    weights = read_weights(source, choose(source, dtype=dtype, variant=variant))
    config = unet_config(source)
    if config is None:
        raise AdapterError(f"expected unet/config.json in {source.where}, got none")
    unet = options.get("unet") or _base(weights, config, dtype)
    found = find_adapter(weights.tensors)
    weights.check_fits(found.stored)
    adapter = InteractionAdapter.from_lazy(published_config(found.tensors, unet), found.tensors, dtype).eval()
    files = _component_files(source, index, variant)
    dropped = {*HUB_OPTIONS, *CODE_OPTIONS}
    if not any(_is_variant(file, variant) for file in files):
        dropped.add("variant")  # diffusers insists on it where it is given
    kept = {name: value for name, value in options.items() if name not in dropped}
    with tempfile.TemporaryDirectory(prefix="interactdiff-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for file in files:
            _link(source.fetch(file), folder / file)
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        yield {**kept, "pretrained_model_name_or_path": folder, "unet": unet}, adapter


def _source(path_or_id: str | os.PathLike[str], options: Mapping[str, Any]) -> Source:
    return Source.of(path_or_id, **{name: options[name] for name in HUB_OPTIONS if name in options})


def _unet_dtype(options: Mapping[str, Any]) -> torch.dtype:
    """What diffusers would load the U-Net in."""
    dtype = options.get("torch_dtype", options.get("dtype"))
    if isinstance(dtype, Mapping):
        dtype = dtype.get("unet", dtype.get("default"))
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _base(weights: Weights, config: Mapping[str, Any], dtype: torch.dtype) -> UNet2DConditionModel:
    """The stock U-Net, with all the weights that are not the adapter's."""
    unet = stock_unet(config)
    base = {name: tensor for name, tensor in weights.tensors.items() if not ADAPTER_KEY.fullmatch(name)}
    check_tensors("the U-Net", unet.state_dict(), base)
    weights.check_fits(base.values())
    unet.load_state_dict({name: tensor.read(dtype) for name, tensor in base.items()}, assign=True)
    return unet


def _stock_index(source: Source, index: Mapping[str, Any]) -> dict[str, Any]:
    """`model_index.json` with stock classes for the pipeline and the U-Net.

    Raises:
        AdapterError: another component is of a class that neither diffusers nor transformers has.
    """
    pipeline = StableDiffusionXLPipeline if "text_encoder_2" in index else StableDiffusionPipeline
    stock = {**index, "_class_name": pipeline.__name__, "unet": ["diffusers", UNet2DConditionModel.__name__]}
    for name, value in stock.items():
        if isinstance(value, list) and not name.startswith("_") and not _is_stock(name, value):
            raise AdapterError(
                f"expected classes of diffusers and transformers in {source.where}, got {value} for {name}"
            )
    return stock


def _is_stock(component: str, value: object) -> bool:
    """Whether this names a class that is installed; a U-Net's has to be the one that we know."""
    match value:
        case [None, None]:
            return True
        case [str(library), str(name)]:
            homes: dict[str, object] = {"diffusers": diffusers, "transformers": transformers}
            home = homes.get(library) or getattr(diffusers.pipelines, library, None)
            known = isinstance(home, ModuleType) and isinstance(getattr(home, name, None), type)
            return known and (component != "unet" or name == UNet2DConditionModel.__name__)
    return False


def _component_files(source: Source, index: Mapping[str, Any], variant: str | None) -> list[str]:
    """The files of every component but the U-Net: no code, and each of its weights once."""
    files = []
    for component in (name for name, value in index.items() if isinstance(value, list) and name != "unet"):
        names = [n for n in source.names if n.startswith(f"{component}/") and not n.endswith(UNUSED)]
        weights = [n for n in names if n.endswith(WEIGHTS)]
        full = [n for n in weights if Path(n).name.count(".") == 1]
        wanted = [n for n in weights if _is_variant(n, variant)] or full or weights
        wanted = [n for n in wanted if n.endswith(".safetensors")] or wanted
        files += [n for n in names if n not in weights or n in wanted]
    return sorted(files)


def _is_variant(file: str, variant: str | None) -> bool:
    return variant is not None and f".{variant}" in file


def _link(file: Path, name: Path) -> None:
    name.parent.mkdir(parents=True, exist_ok=True)
    try:
        name.symlink_to(file.resolve())
    except OSError:  # Windows lets administrators alone make links
        shutil.copyfile(file, name)
