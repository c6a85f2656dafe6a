"""The weights in a pipeline's folder: which variants there are, and `.bin` files without their pickles."""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from interactdiff.checkpoint import save_tensors
from interactdiff.errors import AdapterError, ModelError
from interactdiff.sources import VARIANTS
from interactdiff.torch_files import torch_tensors

# model.safetensors, model.fp16.safetensors, pytorch_model-00001-of-00002.bin,
# model.fp16-00001-of-00002.safetensors, and of older versions of diffusers model-00001-of-00002.fp16.bin
_WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<first>\w+))?(?:-\d+-of-\d+)?"
    r"(?:\.(?P<last>\w+))?\.(?P<format>safetensors|bin)"
)


def variants(folder: Path) -> dict[str, set[str | None]]:
    """The variants of each of a pipeline's parts that has weights; None are the plain ones."""
    found: dict[str, set[str | None]] = {}
    for file in folder.glob("*/*"):
        if match := _WEIGHTS.fullmatch(file.name):
            found.setdefault(file.parent.name, set()).add(match["first"] or match["last"])
    return found


def chosen_variant(folder: Path, variant: str | None, dtype: torch.dtype) -> str | None:
    """Which variant to load.

    Args:
        folder: of a pipeline.
        variant: the requested one; None chooses.
        dtype: that the weights are going to be used in.

    Returns:
        None for the plain weights. Parts that lack a variant have their plain ones loaded.

    Raises:
        ModelError: there is no such variant, or none that all parts have.
    """
    found = variants(folder)
    there = {name for names in found.values() for name in names if name is not None}
    if variant is not None:
        if variant not in there:
            got = ", ".join(sorted(there)) or "plain weights alone"
            raise ModelError(f"expected weights of the variant {variant} in {folder}, got {got}")
        lacking = sorted(part for part, names in found.items() if not names & {variant, None})
        if lacking:
            part = lacking[0]
            raise ModelError(f"expected weights of the variant {variant} in {folder}, got none of {part}")
        return variant
    if all(None in names for names in found.values()):
        return None
    order = [VARIANTS.get(dtype), *VARIANTS.values(), *sorted(there)]
    for name in order:
        if name is not None and all(names & {name, None} for names in found.values()):
            return name
    parts = "; ".join(
        f"{part}: {', '.join(sorted(map(str, names)))}" for part, names in sorted(found.items())
    )
    raise ModelError(f"expected one variant that all parts in {folder} have, got {parts}")


@contextmanager
def as_safetensors(folder: Path) -> Iterator[Path]:
    """A pipeline's folder in which all weights are safetensors.

    Where a part has `.bin` files alone, their tensors are read without executing the pickle, and written into
    a temporary folder that links to everything else.

    Yields:
        The folder itself, if nothing has to be read so.

    Raises:
        ModelError: a `.bin` file is damaged, or no file of weights.
    """
    pickled = [part for part in sorted(folder.iterdir()) if part.is_dir() and _needs_reading(part)]
    if not pickled:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="interactdiff-", ignore_cleanup_errors=True) as name:
        aside = Path(name)
        for entry in folder.iterdir():
            if entry not in pickled:
                (aside / entry.name).symlink_to(entry.resolve())
        for part in pickled:
            (aside / part.name).mkdir()
            for file in part.iterdir():
                _read(file, aside / part.name)
        yield aside


def _needs_reading(part: Path) -> bool:
    formats: dict[str | None, set[str]] = {}
    for file in part.iterdir():
        if match := _WEIGHTS.fullmatch(file.name):
            formats.setdefault(match["first"] or match["last"], set()).add(match["format"])
    return any(found == {"bin"} for found in formats.values())


def _safetensors_name(name: str) -> str:
    """What diffusers and transformers call the file when it is safetensors."""
    return re.sub(r"^pytorch_model", "model", name).replace(".bin", ".safetensors")


def _read(file: Path, into: Path) -> None:
    """Write a `.bin` file, or the index of several, as safetensors; link to any other file."""
    target = into / _safetensors_name(file.name)
    if re.search(r"\.bin\.index\.(\w+\.)?json$", file.name):
        index = json.loads(file.read_text(encoding="utf-8"))
        index["weight_map"] = {name: _safetensors_name(shard) for name, shard in index["weight_map"].items()}
        target.write_text(json.dumps(index), encoding="utf-8")
        return
    match = _WEIGHTS.fullmatch(file.name)
    if match is None or match["format"] != "bin":
        (into / file.name).symlink_to(file.resolve())
        return
    if (file.parent / target.name).exists():
        return  # there in both formats
    try:
        tensors = {name: tensor.load() for name, tensor in torch_tensors(file).items()}
    except AdapterError as error:
        raise ModelError(str(error)) from None
    save_tensors(target, tensors)
