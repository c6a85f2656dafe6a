"""Where weights come from, a file, a folder or a repository on the Hub, and which of them to take."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from interactdiff.checkpoint import CONFIG, WEIGHTS
from interactdiff.errors import AdapterError
from interactdiff.lazy_tensors import LazyTensor, safetensors_tensors
from interactdiff.torch_files import torch_tensors

DIFFUSERS_STEM = "diffusion_pytorch_model"
UNET = "unet/"
VARIANTS = {torch.float16: "fp16", torch.bfloat16: "bf16"}
VARIANT = r"(?:\.(fp16|bf16|fp32|non_ema))?"
# sharded weights have an index: model.safetensors.index.json, model.safetensors.index.fp16.json
WEIGHT_FILE = re.compile(
    rf"(?P<stem>({UNET})?[^/]+?){VARIANT}\.(?P<format>safetensors|pth|pt|ckpt|bin)(?P<index>\.index{VARIANT}\.json)?"
)
SHARD = re.compile(r"-\d{5}-of-\d{5}$")
SMALL_FILES = ["*config.json", "*.index.json", "*.index.*.json", "model_index.json", "README.md"]


@dataclass(frozen=True)
class Source:
    """A folder, or a repository on the Hub.

    Attributes:
        where: what messages call it.
        names: its files and those one folder deeper, by their paths in it.
        fetch: where on this computer a file is, downloaded if need be.
    """

    where: str
    names: frozenset[str]
    fetch: Callable[[str], Path]

    @classmethod
    def of(cls, path_or_id: str | os.PathLike[str], **hub: Any) -> Source:
        """A folder if there is one of that name, or else a repository.

        Args:
            path_or_id: a folder, or the id of a repository on the Hub; of it, what is cached where the Hub
                cannot be reached.
            **hub: `revision`, `token`, `cache_dir`, `local_files_only` as the Hub's functions take them.

        Raises:
            AdapterError: there is neither.
        """
        folder = Path(path_or_id)
        if folder.is_dir():
            return cls(str(folder), _names(folder), folder.joinpath)
        return _hub_source(str(path_or_id), **hub)

    def json(self, name: str) -> dict[str, Any] | None:
        """What a JSON file says; None if it is not there.

        Raises:
            AdapterError: the file is no JSON object.
        """
        if name not in self.names:
            return None
        file = self.fetch(name)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise AdapterError(
                f"expected JSON in {file}, got a file that cannot be read: {error.strerror}"
            ) from None
        except ValueError as error:
            raise AdapterError(f"expected JSON in {file}, got {error}") from None
        if not isinstance(content, dict):
            raise AdapterError(f"expected a JSON object in {file}, got {type(content).__name__}")
        return content


@dataclass(frozen=True)
class Weights:
    """Weight files that belong together.

    Attributes:
        files: one, or the shards.
        tensors: of all of them.
    """

    files: tuple[Path, ...]
    tensors: dict[str, LazyTensor]

    @property
    def size(self) -> int:
        """Of the files, in bytes."""
        return sum(file.stat().st_size for file in self.files)

    def check_fits(self, tensors: Collection[LazyTensor]) -> None:
        """Make sure that tensors are no larger than the files: several names for the same bytes could be.

        Raises:
            AdapterError: they are.
        """
        if (wanted := sum(tensor.nbytes for tensor in tensors)) > self.size:
            raise AdapterError(
                f"expected tensors of at most the {self.size} bytes of {self.files[0]}, got {wanted} bytes"
            )


def file_or_source(path_or_id: str | os.PathLike[str], weight_name: str | None) -> tuple[Source, str | None]:
    """A source, and the name of the one file in it that is meant, if one is.

    Raises:
        AdapterError: there is nothing of that name.
    """
    path = Path(path_or_id)
    if path.is_file():
        return Source.of(path.parent), path.name
    return Source.of(path_or_id), weight_name


def read_weights(source: Source, name: str) -> Weights:
    """Open weights: of a file, or of all the files of an index.

    Raises:
        AdapterError: a file is missing or damaged.
    """
    names = _shards(source, name) if name.endswith(".json") else [name]
    files = [source.fetch(n) for n in names]
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        tensors |= safetensors_tensors(file) if file.suffix == ".safetensors" else torch_tensors(file)
    return Weights(tuple(files), tensors)


def is_saved_adapter(source: Source, weight_name: str | None = None) -> bool:
    """Whether this is what `save_pretrained` makes of an adapter, whole or not."""
    if weight_name is None and WEIGHTS in source.names:
        return True
    return weight_name in (None, WEIGHTS) and "method" in (source.json(CONFIG) or {})


def saved_adapter(source: Source) -> tuple[dict[str, Any], Weights]:
    """What `save_pretrained` wrote: the configuration and the weights.

    Raises:
        AdapterError: a file is missing or damaged.
    """
    if (config := source.json(CONFIG)) is None:
        raise AdapterError(f"expected {CONFIG} and {WEIGHTS} in {source.where}, got no {CONFIG}")
    return config, read_weights(source, WEIGHTS)


def choose(
    source: Source,
    weight_name: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> str:
    """Which file, or index of files, has the weights of the U-Net or the adapter.

    The U-Net's of a diffusers pipeline or model come first, then whatever file is the only one. Of several
    copies, the variant of the wanted dtype or else the full one, and safetensors rather than pickles.

    Args:
        source: where to look.
        weight_name: the file, if the user says which.
        dtype: what the weights will be used in.
        variant: such as "fp16", if it has to be this one.

    Raises:
        AdapterError: there is no such file, or there are several.
    """
    if weight_name is not None:
        if weight_name not in source.names:
            got = ", ".join(sorted(filter(WEIGHT_FILE.fullmatch, source.names))) or "no weights"
            raise AdapterError(f"expected {weight_name} in {source.where}, got {got}")
        return weight_name
    found = [match for name in source.names if (match := WEIGHT_FILE.fullmatch(name))]
    found = [match for match in found if not SHARD.search(match["stem"])]
    stems = sorted({match["stem"] for match in found})
    preferred = [stem for stem in (UNET + DIFFUSERS_STEM, DIFFUSERS_STEM) if stem in stems][:1]
    stems = preferred or [stem for stem in stems if "/" not in stem]
    if not stems:
        raise AdapterError(f"expected weights in {source.where}, got no file of them")
    copies = [match for match in found if match["stem"] in stems]
    if len(stems) > 1:
        names = ", ".join(sorted(match[0] for match in copies))
        raise AdapterError(
            f"expected weight_name to say which file of {source.where} to take, got several: {names}"
        )
    if variant is not None:
        copies = [match for match in copies if variant in match.groups()]
        if not copies:
            raise AdapterError(f"expected the variant {variant} in {source.where}, got none of {stems[0]}")
    wanted = [VARIANTS.get(dtype) if dtype else None, None]
    formats = ["safetensors", "pth", "pt", "ckpt", "bin"]

    def rank(match: re.Match[str]) -> tuple[int, int, bool]:
        its = match[3] or match[6]
        return (
            wanted.index(its) if its in wanted else 2,
            formats.index(match["format"]),
            bool(match["index"]),
        )

    return min(copies, key=rank)[0]


def _shards(source: Source, index: str) -> list[str]:
    folder = index.rpartition("/")[0]
    content = source.json(index) or {}
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise AdapterError(
            f"expected a weight_map from tensors to files in {index} of {source.where}, got none"
        )
    names = []
    for shard in sorted(set(shards.values())):
        name = f"{folder}/{shard}" if folder else shard
        if not re.fullmatch(r"\w[\w.-]*", shard) or name not in source.names:
            raise AdapterError(
                f"expected the files that {index} names beside it in {source.where}, got no {shard!r}"
            )
        names.append(name)
    return names


def _names(folder: Path) -> frozenset[str]:
    files = [*folder.glob("*"), *folder.glob("*/*")]
    return frozenset(file.relative_to(folder).as_posix() for file in files if file.is_file())


def _hub_source(repo_id: str, **hub: Any) -> Source:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetched(get: Callable[[], str], what: str) -> Path:
        try:
            return Path(get())
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise AdapterError(
                "expected an adapter's folder or the id of one on the Hugging Face Hub, or its weights, "
                f"got {repo_id!r} ({type(error).__name__}{what})"
            ) from None

    def fetch(name: str) -> Path:
        return fetched(lambda: hf_hub_download(repo_id, name, **hub), f" for {name}")

    cached = fetched(lambda: snapshot_download(repo_id, allow_patterns=SMALL_FILES, **hub), "")
    if hub.get("local_files_only"):
        return Source(repo_id, _names(cached), fetch)
    try:
        names = HfApi(token=hub.get("token")).list_repo_files(repo_id, revision=hub.get("revision"))
    except Exception:  # no answer, which HTTP libraries say in many ways: what is cached has to do
        return Source(repo_id, _names(cached), fetch)
    return Source(repo_id, frozenset(names), fetch)
