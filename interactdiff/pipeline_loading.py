"""Loads diffusers pipelines from text, onto a device of this machine."""

import json
from contextlib import ExitStack
from inspect import signature
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from diffusers import DiffusionPipeline

from interactdiff.errors import AdapterError, ModelError
from interactdiff.model_weights import as_safetensors, chosen_variant
from interactdiff.models import check_model_folder
from interactdiff.sites import denoiser_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

IMAGE_OPTIONAL = ("Flux2Pipeline", "Flux2KleinPipeline")  # from text, and from pictures if there are any


def checked_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a name; "auto" is float16 on cuda, else float32.

    Raises:
        ModelError: there is no such dtype.
    """
    precision = name if name != "auto" else "float16" if device.type == "cuda" else "float32"
    if precision not in DTYPES:
        raise ModelError(f"expected a dtype of {', '.join(DTYPES)} or auto, got {precision!r}")
    return DTYPES[precision]


def load_pipeline(
    path_or_id: str, device: torch.device, dtype: torch.dtype, variant: str | None = None
) -> Any:
    """Load a diffusers pipeline from a folder or the Hub. No pickle is executed.

    Args:
        path_or_id: a folder, in which `.bin` files do where there is no safetensors, or a Hub id.
        device: where it is to run.
        dtype: in what precision.
        variant: of the weights, such as "fp16"; of a folder None takes the plain ones, or else those that are
            there.

    Raises:
        ModelError: there is none, it has no such variant, or it is damaged.
    """
    folder = Path(path_or_id)
    with ExitStack() as stack:
        source = path_or_id
        if folder.is_dir():
            check_model_folder(folder)
            variant = chosen_variant(folder, variant, dtype)
            source = str(stack.enter_context(as_safetensors(folder)))
        pipeline = _loaded(path_or_id, source, variant, device, dtype)
    kind = type(pipeline).__name__
    for part in ("tokenizer", "text_encoder"):
        if getattr(pipeline, part, None) is None:
            raise ModelError(f"expected a pipeline from text at {path_or_id}, got a {kind} without a {part}")
    if "image" in signature(pipeline.__call__).parameters and kind not in IMAGE_OPTIONAL:
        raise ModelError(f"expected a pipeline from text at {path_or_id}, got a {kind}")
    try:
        denoiser_of(pipeline)
    except AdapterError as error:
        raise ModelError(f"{path_or_id}: {error}") from None
    return pipeline


def _loaded(
    path_or_id: str, source: str, variant: str | None, device: torch.device, dtype: torch.dtype
) -> Any:
    try:
        loaded = DiffusionPipeline.from_pretrained(
            source, use_safetensors=True, variant=variant, **_missing_encoders(source)
        )
        return loaded.to(device, dtype)  # a tensor that was missing is found here
    except Exception as error:  # loaders of a dozen kinds of files raise as many kinds of errors
        reason = shorten(str(error), 160, placeholder=" ...")
        raise ModelError(
            f"expected a diffusers model at {path_or_id}, got {type(error).__name__}: {reason}"
        ) from error


def _missing_encoders(source: str) -> dict[str, None]:
    """Text encoders that a folder was saved without, such as SD3's T5, as the loader wants them named."""
    index = Path(source) / "model_index.json"
    parts = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    return {
        name: None
        for name, kind in parts.items()
        if name.startswith(("text_encoder", "tokenizer")) and kind == [None, None]
    }


def usable_device(name: str) -> torch.device:
    """The torch device of a name, or for "auto" the best there is: cuda, mps, cpu.

    Raises:
        ModelError: there is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):  # unknown, absent, without storage
        raise ModelError(f"expected a device of this machine such as cpu or cuda, got {name!r}") from None
    return device
