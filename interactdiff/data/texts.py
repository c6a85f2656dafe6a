"""States of texts, computed once for each distinct text and kept on disk, without padding."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from interactdiff.checkpoint import save_tensors
from interactdiff.data.cache_files import write_cache
from interactdiff.data.framing import Framing, phrases_of_item
from interactdiff.data.kept import Kept
from interactdiff.data.mixture import Mixture
from interactdiff.data.reading import Records
from interactdiff.data.records import ImageRecord
from interactdiff.data.words import swap_sides
from interactdiff.errors import DataError
from interactdiff.files import remove_stale_asides
from interactdiff.scene_checks import shown

EncodeTexts = Callable[[Sequence[str]], Mapping[str, Mapping[str, Tensor]]]
"""Texts to the named tensors of each: {"states": [L, D], "pooled": [D]}, L its own tokens without padding."""
_CHUNK = 512  # texts in a file


class TextCache:
    """Named tensors of texts.

    Every `build` adds files with what was missing; none is ever rewritten.

    Args:
        folder: where the files are; made if need be.
        key: of what encodes, such as `latents.weights_key(text_encoder)`.
        dtype: of the tensors on disk.
    """

    def __init__(self, folder: Path, key: str, dtype: torch.dtype = torch.bfloat16):
        self.folder, self.dtype = folder, dtype
        self.key = hashlib.sha256(f"{key} {dtype}".encode()).hexdigest()[:16]
        self.files: dict[str, Path] = {}
        self._open = Kept(_opened, 64)
        self.refresh()

    def refresh(self) -> None:
        """See what is there, such as what other processes have written."""
        known = set(self.files.values())
        for path in sorted(self.folder.glob(f"texts-{self.key}-*.safetensors")):
            if path not in known:
                for text in json.loads((self._open(path).metadata() or {}).get("texts", "[]")):
                    self.files[text] = path

    def missing(self, texts: Sequence[str]) -> list[str]:
        """The distinct texts that are not there yet, in the order of their hashes."""
        return sorted((t for t in dict.fromkeys(texts) if _hash(t) not in self.files), key=_hash)

    def build(
        self,
        texts: Sequence[str],
        encode: EncodeTexts,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 32,
    ) -> Iterator[int]:
        """Encode what is missing; texts are dealt to the processes by their hashes.

        It may be stopped at any moment and started again.

        Args:
            texts: any number, also several times the same.
            encode: the text encoders.
            rank: of this process.
            world_size: processes in all.
            batch_size: texts that are encoded at a time.

        Yields:
            After each file: how many texts are done.

        Raises:
            DataError: the disk is full.
        """
        remove_stale_asides(self.folder)
        mine = [text for text in self.missing(texts) if int(_hash(text), 16) % world_size == rank]
        for first in range(0, len(mine), _CHUNK):
            chunk = mine[first : first + _CHUNK]
            tensors: dict[str, Tensor] = {}
            names: list[str] = []
            for start in range(0, len(chunk), batch_size):
                batch = chunk[start : start + batch_size]
                with torch.no_grad():
                    encoded = encode(batch)
                names = sorted(encoded[batch[0]])  # of every text: the encoders are the same
                for text in batch:
                    for name, tensor in encoded[text].items():
                        tensors[f"{_hash(text)}.{name}"] = tensor.detach().to("cpu", self.dtype).contiguous()
            hashes = [_hash(text) for text in chunk]
            contents = hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]
            path = self.folder / f"texts-{self.key}-{contents}.safetensors"
            meta = {"texts": json.dumps(hashes), "names": json.dumps(names)}
            write_cache(path, lambda aside, t=tensors, m=meta: save_tensors(aside, t, m))
            self.files |= dict.fromkeys(hashes, path)
            yield first + len(chunk)

    def get(self, text: str) -> dict[str, Tensor]:
        """The named tensors of a text.

        Raises:
            DataError: it is not there, or its file is damaged.
        """
        if (path := self.files.get(_hash(text))) is None:
            raise DataError(f"expected cached states of every text, got none of {shown(text)}")
        file, prefix = self._open(path), f"{_hash(text)}."
        names = json.loads(file.metadata()["names"])
        return {name: file.get_tensor(prefix + name) for name in names}


def captions_of(
    records: Records | Mixture, framing: Framing, flip: bool = True
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every caption that training may draw, with the items that it sees.

    Mirrored too, and without the clauses of items that a crop takes.
    """
    for number in range(len(records)):
        record = records[number]
        sides = int(records.widths[number]), int(records.heights[number])
        for flipped in (False, True) if flip and record.may_flip else (False,):
            placement = framing.place(*sides, record.items, flipped)
            items = framing.items(placement, record.items)
            for prompt in record.prompts:
                yield placement.prompt(prompt, record.items, items), items


def phrases_of(records: Sequence[ImageRecord], flip: bool = True) -> Iterator[str]:
    """Every phrase of records' items, mirrored ones included."""
    for number in range(len(records)):
        record = records[number]
        for item in record.items:
            for _, phrase in phrases_of_item(item):
                yield phrase
                if flip and record.may_flip:
                    yield swap_sides(phrase)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # SafetensorError is no ValueError
        raise DataError(f"expected a whole file of text states at {path}, got {error}") from None
