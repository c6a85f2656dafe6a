"""Adapter files.

Ours is a folder with `adapter.safetensors` and `config.json`. No pickle is ever loaded, and no file is
half-written. Nothing heavy is imported before it is needed, so that `AdapterError` costs nothing to import.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interactdiff.files import write_aside

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, CONFIG = "adapter.safetensors", "config.json"


class AdapterError(ValueError):
    """An adapter, or the base it should act on, is not what is needed; the message is one sentence."""


def load_adapter_files(path_or_id: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an adapter.

    Args:
        path_or_id: a folder, or the id of a repository on the Hugging Face Hub.

    Returns:
        What `config.json` says, and the tensors of `adapter.safetensors`.

    Raises:
        AdapterError: nothing is there, or a file is missing or damaged.
    """
    folder = Path(path_or_id)
    files = {n: folder / n if folder.is_dir() else _download(str(path_or_id), n) for n in (CONFIG, WEIGHTS)}
    try:
        config = json.loads(files[CONFIG].read_text(encoding="utf-8"))
    except OSError as error:
        got = f"no {CONFIG} that can be read ({error.strerror})"
        raise AdapterError(f"expected {CONFIG} and {WEIGHTS} in {folder}, got {got}") from None
    except ValueError as error:
        raise AdapterError(f"expected JSON in {files[CONFIG]}, got {error}") from None
    return config, read_safetensors(files[WEIGHTS])


def save_adapter_files(
    path: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write an adapter into a folder, making it if need be: each file is written aside and then renamed.

    Raises:
        OSError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_aside(folder / WEIGHTS, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    text = json.dumps(config, indent=2) + "\n"
    write_aside(folder / CONFIG, lambda file: file.write_text(text, encoding="utf-8"))


def read_safetensors(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file.

    Raises:
        AdapterError: the file is missing, truncated, or something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except FileNotFoundError:
        raise AdapterError(f"expected safetensors weights at {file}, got no such file") from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"expected a whole safetensors file at {file}, got {error}") from None


def check_tensors(whose: str, expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    """Make sure that tensors have the names and shapes that a module's `state_dict` has.

    Args:
        whose: what an error calls the tensors' owner.
        expected: the module's.
        got: those to be loaded.

    Raises:
        AdapterError: naming the first that is missing, superfluous, of another shape or no floating point.
    """
    for name in sorted(expected.keys() | got.keys()):
        wanted, found = (
            list(tensors[name].shape) if name in tensors else "no such tensor" for tensors in (expected, got)
        )
        if wanted != found:
            raise AdapterError(f"expected {whose}'s {name} to be {wanted}, got {found}")
        if not got[name].is_floating_point():
            raise AdapterError(f"expected {whose}'s {name} in floating point, got {got[name].dtype}")


def _download(repo_id: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, name))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise AdapterError(
            f"expected an adapter's folder or the id of one on the Hugging Face Hub, got {repo_id!r} "
            f"({type(error).__name__} for {name})"
        ) from None
