"""Our adapter files: a folder with `adapter.safetensors` and `config.json`.

No file is half-written. Nothing heavy is imported before it is needed, so that `AdapterError` costs nothing
to import.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interactdiff.errors import AdapterError
from interactdiff.files import write_aside

if TYPE_CHECKING:
    from torch import Tensor

    from interactdiff.lazy_tensors import LazyTensor

WEIGHTS, CONFIG = "adapter.safetensors", "config.json"


def save_adapter_files(
    path: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write an adapter into a folder, making it if need be: each file is written aside and then renamed.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(folder / WEIGHTS, lambda file: save_tensors(file, tensors))
    text = json.dumps(config, indent=2) + "\n"
    write_aside(folder / CONFIG, lambda file: file.write_text(text, encoding="utf-8"))


def save_tensors(
    file: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Args:
        file: its path.
        tensors: by name, in any memory layout and on any device.
        metadata: what its header has beside the format.

    Raises:
        OSError: the file cannot be written; safetensors has an error of its own for a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    laid_out = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(laid_out, file, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise OSError(str(error)) from None


def check_tensors(
    whose: str,
    expected: Mapping[str, Tensor],
    got: Mapping[str, Tensor] | Mapping[str, LazyTensor],
) -> None:
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
