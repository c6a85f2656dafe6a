"""Latents of pictures, computed once and kept on disk: by any number of processes, resumable, read by number.

A file holds the latents of `BLOCK` records, and its name the hash of all that they are made of: the weights
of the VAE, the crop and size of each picture, and size and time of its file. A change of any of them makes
another name, so what is there is right or is not there.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from interactdiff.checkpoint import save_tensors
from interactdiff.data.cache_files import write_cache
from interactdiff.data.examples import pixels_of
from interactdiff.data.framing import Framing, Placement
from interactdiff.data.kept import Kept
from interactdiff.data.reading import Records
from interactdiff.data.records import FileRange, ImageRecord, Stored
from interactdiff.errors import DataError
from interactdiff.files import remove_stale_asides

BLOCK = 256  # records in a file
BAD = "bad.jsonl"
_RULE = "1: EXIF applied, white behind alpha, bicubic"  # to be raised when the same bytes give other pixels
Encode = Callable[[Tensor], Tensor]
"""[B, 3, H, W] in [-1, 1] to latents [B, C, h, w]."""


def weights_key(module: nn.Module) -> str:
    """SHA-256 of a module's configuration and weights, in hexadecimal.

    The same on every device, in every folder that the weights are loaded from, and by every version of the
    library that saved them.
    """
    config: Any = getattr(module, "config", {})
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    own = {name: value for name, value in values.items() if name[0] != "_" and name != "transformers_version"}
    made_of = hashlib.sha256(json.dumps(own, default=str, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        made_of.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        made_of.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return made_of.hexdigest()


def vae_mean(vae: Any, shifted: bool = True) -> Encode:
    """The mean of a VAE's posterior, scaled as its configuration says (factor, and shift if `shifted`)."""
    shift, scale = (shifted and getattr(vae.config, "shift_factor", None)) or 0.0, vae.config.scaling_factor

    def encode(pixels: Tensor) -> Tensor:
        encoded = vae.encode(pixels.to(vae.device, vae.dtype))
        mean = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
        return (mean - shift) * scale

    return torch.no_grad()(encode)


class LatentCache:
    """Latents of a data set's records at the crops of a `Framing`, plain and mirrored.

    Args:
        folder: where the files are; made if need be.
        records: the data.
        framing: the sizes and crops.
        key: of what encodes, such as `weights_key(vae)`.
        flip: whether mirrored latents are kept too.
        dtype: of the latents on disk.
        control: whether they are of control images; records without one have none.
    """

    def __init__(
        self,
        folder: Path,
        records: Records,
        framing: Framing,
        key: str,
        flip: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        control: bool = False,
    ):
        self.folder, self.records, self.framing = folder, records, framing
        self.flip, self.dtype, self.control = flip, dtype, control
        self.key = f"{_RULE} {key} {framing} {flip} {dtype}{' control' * control}"
        self._keys: dict[int, str] = {}
        self._open = Kept(self._opened, 64)

    @property
    def _noted(self) -> Path:
        made_of = hashlib.sha256(f"{self.key} {self.records.files_digest} {BLOCK}".encode())
        return self.folder / f"keys-{made_of.hexdigest()[:16]}.json"

    def _recall(self) -> None:
        """Take the blocks' noted keys, so that rows stay unread; the digest in the name vouches for them."""
        try:
            noted = json.loads(self._noted.read_text(encoding="utf-8"))
            if len(noted) == self._blocks:
                self._keys = dict(enumerate(map(str, noted)))
        except (OSError, ValueError, TypeError):
            return

    def _note_keys(self) -> None:
        """Keep the keys of all blocks."""
        noted = [self._block_key(block) for block in range(self._blocks)]
        write_cache(self._noted, lambda aside: aside.write_text(json.dumps(noted), encoding="utf-8"))

    def build(self, encode: Encode, rank: int = 0, world_size: int = 1, batch_size: int = 8) -> Iterator[int]:
        """Compute what is missing; blocks are dealt to the processes in turn.

        It may be stopped at any moment and started again: a file is there as a whole or not at all. Pictures
        that cannot be read are written to `bad.jsonl` and have no latents.

        Args:
            encode: such as `vae_mean(vae)`.
            rank: of this process.
            world_size: processes in all.
            batch_size: pictures of one bucket that are encoded at a time.

        Yields:
            After each block: the records that are done.

        Raises:
            DataError: the disk is full.
        """
        remove_stale_asides(self.folder)
        self._recall()
        if rank == 0 and len(self._keys) < self._blocks:
            self._note_keys()
        for block in range(rank, self._blocks, world_size):
            if not (path := self._path(block)).is_file():
                tensors, bad = self._encoded(block, encode, batch_size)
                meta = {"bad": json.dumps(bad)}
                write_cache(path, lambda aside, t=tensors, m=meta: save_tensors(aside, t, m))
                self._note(bad)
            yield min(len(self.records), (block + 1) * BLOCK)

    def bad(self) -> dict[int, str]:
        """The records whose pictures could not be read, and why, once all is built.

        Raises:
            DataError: a file is not there, or damaged.
        """
        found: dict[int, str] = {}
        for block in range(self._blocks):
            found |= {int(index): reason for index, reason in _bad(self._open(block)).items()}
        return found

    def get(self, index: int, flipped: bool) -> Tensor:
        """The latents [C, h, w] of a record, in the dtype that they are kept in.

        Raises:
            DataError: they are not there: they are not computed, or the picture could not be read.
        """
        file = self._open(index // BLOCK)
        name = _name(index, flipped)
        if name not in file.keys():  # noqa: SIM118 - no mapping
            missing = f"expected cached latents of record {index}, got none"
            raise DataError(_bad(file).get(str(index), missing))
        return file.get_tensor(name)

    @property
    def _blocks(self) -> int:
        return -(-len(self.records) // BLOCK)

    def _opened(self, block: int) -> Any:
        path = self._path(block)
        try:
            return safe_open(path, framework="pt")
        except (OSError, ValueError) as error:
            raise DataError(
                f"expected cached latents at {path}, got {type(error).__name__}: {error}"
            ) from None
        except Exception as error:  # SafetensorError is no ValueError
            raise DataError(f"expected a whole file of latents at {path}, got {error}") from None

    def _path(self, block: int) -> Path:
        return self.folder / f"latents-{block:06d}-{self._block_key(block)[:16]}.safetensors"

    def _block_key(self, block: int) -> str:
        if block not in self._keys:
            made_of = hashlib.sha256(f"{self.key} {block}".encode())
            for index in self._indices(block):
                record = self.records[index]
                placement = self._placement(index, record)
                flip = self.flip and record.may_flip
                stamp = _stamp(self.records, record, record.control if self.control else record.stored)
                made_of.update(f"{stamp} {placement} {flip}".encode())
            self._keys[block] = made_of.hexdigest()
        return self._keys[block]

    def _indices(self, block: int) -> range:
        return range(block * BLOCK, min(len(self.records), (block + 1) * BLOCK))

    def _encoded(
        self, block: int, encode: Encode, batch_size: int
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        waiting: dict[tuple[int, int], list[tuple[str, Tensor]]] = {}
        done: dict[str, Tensor] = {}
        bad: dict[str, str] = {}

        def run(size: tuple[int, int]) -> None:
            names, pixels = zip(*waiting.pop(size), strict=True)
            latents = encode(torch.stack(pixels)).to("cpu", self.dtype)
            done.update((name, one.contiguous()) for name, one in zip(names, latents, strict=True))

        for index in self._indices(block):
            record = self.records[index]
            try:
                images = self._pixels(index, record)
            except DataError as error:
                bad[str(index)] = str(error)
                continue
            for flipped, size, pixels in images:
                waiting.setdefault(size, []).append((_name(index, flipped), pixels))
                if len(waiting[size]) == batch_size:
                    run(size)
        for size in list(waiting):
            run(size)
        return done, bad

    def _placement(self, index: int, record: ImageRecord) -> Placement:
        width, height = int(self.records.widths[index]), int(self.records.heights[index])
        return self.framing.place(width, height, record.items)

    def _pixels(self, index: int, record: ImageRecord) -> list[tuple[bool, tuple[int, int], Tensor]]:
        if self.control and record.control is None:
            return []
        plain = self._placement(index, record)
        pixels = pixels_of(record, plain, self.control)
        made = [(False, plain.size, pixels)]
        if self.flip and record.may_flip:
            made.append((True, plain.size, pixels.flip(-1)))
        return made

    def _note(self, bad: dict[str, str]) -> None:
        if bad:
            with (self.folder / BAD).open("a", encoding="utf-8") as file:
                for index, reason in bad.items():
                    row = {"record": int(index), "name": self.records[int(index)].name, "reason": reason}
                    file.write(json.dumps(row) + "\n")


def _bad(file: Any) -> dict[str, str]:
    """The records of a file whose pictures could not be read, and why."""
    return json.loads((file.metadata() or {}).get("bad", "{}"))


def _name(index: int, flipped: bool) -> str:
    return f"{index}.flipped" if flipped else str(index)


def _stamp(records: Records, record: ImageRecord, stored: Stored | None) -> str:
    """What changes when a picture does, found without reading it.

    Size and time of its file; for a part of a shard the shard's checksum; for a table its fingerprint.
    """
    if not isinstance(stored, FileRange):
        return f"{record.name} {records.files_digest}"
    index = getattr(records.source, "index", None)
    if index is not None:
        return f"{record.name} {index[stored.path.name]['sha256']}"
    stat = stored.path.stat()
    return f"{record.name} {stat.st_size} {stat.st_mtime_ns} {stored.offset}"
