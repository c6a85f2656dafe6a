"""Reads concept files: ours, and those of AttenCraft and Custom Diffusion; writes the latter.

Theirs are a `pytorch_custom_diffusion_weights.bin`, with matrices for each cross-attention under the name of
its processor and empty entries for each self-attention, and a `<new1>.bin` for each token, a row that
AttenCraft saves as a view of the whole table. The keys say which projections there are.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interactdiff.concept.adapter import MASKS, ConceptAdapter
from interactdiff.concept.config import Acts, ConceptConfig
from interactdiff.concept.projections import projection_weight
from interactdiff.concept.words import Concept
from interactdiff.errors import AdapterError
from interactdiff.files import write_aside
from interactdiff.lazy_tensors import LazyTensor, safetensors_tensors
from interactdiff.module_paths import checked_path
from interactdiff.sites import UNET, Denoiser, find_sites, known_family
from interactdiff.sources import Source, file_or_source, is_saved_adapter, saved_adapter
from interactdiff.torch_files import torch_tensors

WEIGHTS_STEM = "pytorch_custom_diffusion_weights"
WEIGHT = re.compile(r"(?P<path>.+)\.processor\.(?P<at>to_[kv])_custom_diffusion\.weight")
OTHER = re.compile(r".+\.processor\.to_(q|out)_custom_diffusion\..+")
CHECKPOINT = re.compile(r"checkpoint-(\d+)/.+")
TOKEN_FILE = re.compile(r"(<[\w-]+>)\.(bin|safetensors)")


def open_concept(
    path_or_id: str | os.PathLike[str], weight_name: str | None = None, acts_on: Acts | None = None
) -> tuple[ConceptConfig, dict[str, Tensor]]:
    """The configuration and the tensors of a concept, under the names of `ConceptAdapter.state_dict`.

    Raises:
        AdapterError: there is none, or it is damaged.
    """
    source, name = file_or_source(path_or_id, weight_name)
    if is_saved_adapter(source, name):
        data, weights = saved_adapter(source)
        if acts_on is not None:
            data["acts_on"] = acts_on
        config = ConceptConfig.from_json(data)
        names = set(weights.tensors)
        if MASKS in names and weights.tensors[MASKS].dtype != torch.uint8:
            raise AdapterError(f"expected masks as uint8 in {source.where}, got another dtype")
        try:
            for one in names - {MASKS}:
                if not one.startswith("concept_tokens."):
                    checked_path(one.rpartition(".")[0])
        except ValueError as error:
            raise AdapterError(f"expected names of a base's modules in {source.where}, got {error}") from None
        return config, {one: tensor.read() for one, tensor in weights.tensors.items()}
    return _published(source, name, acts_on)


def _published(
    source: Source, name: str | None, acts_on: Acts | None
) -> tuple[ConceptConfig, dict[str, Tensor]]:
    name = name or _weights_name(source)
    folder = name.rpartition("/")[0]
    stored = _tensors(source.fetch(name))
    tensors: dict[str, Tensor] = {}
    letters = set()
    for key, tensor in stored.items():
        match = WEIGHT.fullmatch(key)
        if match is None or len(tensor.shape) != 2:
            what = (
                "queries or outputs, which concepts leave as they are" if OTHER.fullmatch(key) else repr(key)
            )
            raise AdapterError(
                f"expected keys and values of a Custom Diffusion file at {source.where}, got {what}"
            )
        try:
            path = checked_path(match["path"])
        except ValueError as error:
            raise AdapterError(f"expected names of a base's modules in {name}, got {error}") from None
        letters.add(match["at"][-1])
        tensors[f"{path}.{match['at']}.weight"] = tensor.read(torch.float32)
    vectors = _token_vectors(source, folder)
    if not tensors and not vectors:
        raise AdapterError(f"expected concepts in {source.where}, got {name} without any")
    concepts = tuple(Concept(token, token.strip("<>"), len(rows)) for token, rows in vectors.items())
    width = next(iter(vectors.values())).shape[1] if vectors else 0
    for token, rows in vectors.items():
        if rows.shape[1] != width:
            raise AdapterError(
                f"expected tokens of one width in {source.where}, got {width} and {rows.shape[1]}"
            )
        tensors[f"concept_tokens.{token}.text_encoder"] = rows
    config = ConceptConfig(
        concepts,
        {"text_encoder": width} if vectors else {},
        projections="".join(sorted(letters)) or "none",
        acts_on=acts_on or "all",
        stored="weights",
    )
    return config, tensors


def _weights_name(source: Source) -> str:
    """The file of matrices: in the folder itself, or else in that of its last checkpoint."""
    found = [n for n in source.names if n.rpartition("/")[2].partition(".")[0] == WEIGHTS_STEM]
    own = sorted(n for n in found if "/" not in n)
    if own:
        return own[-1]  # .safetensors rather than .bin
    checkpoints = [(int(m[1]), n) for n in found if (m := CHECKPOINT.fullmatch(n))]
    if not checkpoints:
        raise AdapterError(
            f"expected adapter.safetensors or {WEIGHTS_STEM}.bin in {source.where}, got neither"
        )
    return max(checkpoints)[1]


def _token_vectors(source: Source, folder: str) -> dict[str, Tensor]:
    """[vectors, width] of each `<token>.bin` or `.safetensors` in a folder."""
    vectors: dict[str, Tensor] = {}
    for name in sorted(source.names):
        within, _, leaf = name.rpartition("/")
        if within != folder or not (match := TOKEN_FILE.fullmatch(leaf)):
            continue
        stored = _tensors(source.fetch(name))
        if list(stored) != [match[1]] or len(stored[match[1]].shape) not in (1, 2):
            raise AdapterError(
                f"expected one vector of {match[1]} in {name}, got {', '.join(stored) or 'none'}"
            )
        vectors[match[1]] = stored[match[1]].read(torch.float32).reshape(-1, stored[match[1]].shape[-1])
    return vectors


def _tensors(file: Path) -> Mapping[str, LazyTensor]:
    """Of a torch file, or of a safetensors file under whichever name: AttenCraft calls both .bin."""
    try:
        with open(file, "rb") as opened:
            start = opened.read(9)
    except OSError as error:
        raise AdapterError(f"expected weights at {file}, got {error.strerror}") from None
    is_safe = len(start) == 9 and start[8:] == b"{"
    return safetensors_tensors(file) if is_safe else torch_tensors(file)


def save_custom_diffusion(
    adapter: ConceptAdapter, denoiser: Denoiser, folder: str | os.PathLike[str]
) -> None:
    """Write what diffusers and AttenCraft read: `pytorch_custom_diffusion_weights.bin` and a file a token.

    These files have no `acts_on`: loaded elsewhere, a concept acts on all words.

    Args:
        adapter: for a U-Net with one text encoder, with keys and values changed.
        denoiser: whose matrices are changed.
        folder: made if need be.

    Raises:
        AdapterError: the format cannot hold the adapter, or other files are in the folder.
        OSError: the folder cannot be written.
    """
    adapter.check(denoiser)
    if known_family(denoiser).denoiser != UNET or list(adapter.config.widths) != ["text_encoder"]:
        raise AdapterError(
            "expected a concept of a U-Net with one text encoder for Custom Diffusion's format, got one of "
            f"{type(denoiser).__name__} with {', '.join(adapter.config.widths) or 'no tokens'}"
        )
    if adapter.config.projections != "kv":
        raise AdapterError(
            f"expected a concept with keys and values for Custom Diffusion's format, got projections "
            f"{adapter.config.projections!r}"
        )
    state: dict[str, Any] = {}
    with torch.no_grad():
        for site, at in adapter.changed(denoiser):
            folded: Any = adapter.projection(site, at).folded  # type: ignore[union-attr]
            weight = folded(projection_weight(site, at)).cpu()
            state[f"{site.path}.processor.{at}_custom_diffusion.weight"] = weight
    for site in find_sites(denoiser):
        if site.role == "self":
            state[f"{site.path}.processor"] = {}
    files = {f"{WEIGHTS_STEM}.bin": state}
    for concept in adapter.config.concepts:
        rows = adapter.vectors_of(concept, "text_encoder").detach().float().cpu().clone()
        files[f"{concept.token}.bin"] = {concept.token: rows[0] if len(rows) == 1 else rows}
    Path(folder).mkdir(parents=True, exist_ok=True)
    if others := [file.name for file in Path(folder).iterdir() if file.name not in files]:
        raise AdapterError(  # a token's file that is there would be read as one of this concept's
            f"expected a folder for Custom Diffusion's files that is empty, got one with {others[0]}"
        )
    for name, content in files.items():
        write_aside(Path(folder) / name, lambda file, content=content: torch.save(content, file))


def export_custom_diffusion(source: str, target: Path, model: str | None) -> str:
    """`interactdiff convert IN OUT --export custom-diffusion --model M`."""
    from interactdiff.concept.folding import loaded_for

    adapter, pipeline = loaded_for(source, model)
    save_custom_diffusion(
        adapter, pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer, target
    )
    return f"{target}: {len(adapter.shapes)} matrices and {', '.join(adapter.tokens)}, for Custom Diffusion"


def export_concept(source: str, target: Path, model: str | None) -> str:
    """`interactdiff convert IN OUT --export concept`: a published file in our format."""
    adapter = ConceptAdapter.from_pretrained(source)
    adapter.save_pretrained(target)
    return f"{target}: {len(adapter.shapes)} matrices and {', '.join(adapter.tokens) or 'no tokens'}"
