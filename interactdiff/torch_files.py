"""Reads torch's weight files (.pth, .pt, .bin, .ckpt): tensors only, and only those that are used.

Such a file is a zip archive: a pickle that says which tensors there are and where, and one record of plain
bytes for each storage. Loading a pickle calls whatever the pickle names. Here no name but that of OrderedDict
becomes what it names: the few that a tensor is written with stand for plain descriptions, every other one for
an object that does nothing, so there is nothing to call. The values are then read from the file, tensor by
tensor.
"""

import io
import pickle
import pickletools
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interactdiff.errors import AdapterError
from interactdiff.lazy_tensors import LazyTensor

MAX_PICKLE = 16 * 2**20  # bytes; the pickle of Stable Diffusion with its EMA and optimizer takes about one MB
MAX_DEPTH = 8  # of dicts in dicts
MAX_NAME, MAX_TENSORS = 500, 100_000  # characters of a tensor's name; the largest models have a tenth of both
BEFORE_ZIP = 0x1950A86A20F9469CFC6C  # what files of torch before 1.6 begin with, pickled
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Nothing would come of these, as of any other name; but who writes them into weights means harm.
HOSTILE = re.compile(
    r"(os|posix|nt|sys|subprocess|commands|shutil|socket|runpy|ctypes|importlib)\b.*"
    r"|(builtins|__builtin__)\.(eval|exec|execfile|compile|open|file|__import__)"
)


def torch_tensors(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a torch file, by name; names of dicts in dicts are joined by dots.

    Args:
        file: what `torch.save` wrote, from torch 1.6 on.

    Raises:
        AdapterError: the file is missing, damaged, of another format, or tries what no weights have to.
    """
    try:
        records, pickled = _open(file)
        _check_opcodes(pickled)
        content = _Reader(io.BytesIO(pickled)).load()
        stored = dict(_named_tensors(content))
    except OSError as error:
        raise AdapterError(f"expected torch weights at {file}, got {error.strerror}") from None
    except _Refused as refused:
        raise AdapterError(f"expected torch weights at {file}, got {refused}") from None
    except Exception as error:  # a damaged pickle can end in any exception of the interpreter's own types
        raise AdapterError(
            f"expected torch weights at {file}, got a file that is damaged ({type(error).__name__}: {error})"
        ) from None
    return {name: _lazy(file, records, name, tensor) for name, tensor in stored.items()}


class _Refused(Exception):
    """What was found instead of torch weights, to be said after "got"."""


@dataclass(frozen=True)
class _Record:
    """Where the bytes of a storage are: from `start` on, `size` of them."""

    start: int
    size: int


def _open(file: Path) -> tuple[dict[str, _Record], bytes]:
    """The storages by their keys, and the pickle. Everything that can be checked before it, is.

    Torch stores its records as they are and one after the other: compressed or overlapping ones, which could
    make a small file fill the memory, are no torch file's.
    """
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        with open(file, "rb") as opened:
            raise _Refused(_other_format(opened.read(16))) from None
    with archive, open(file, "rb") as opened:
        entries = {entry.filename: entry for entry in archive.infolist()}
        for name, entry in entries.items():
            if re.match(r"/|[a-zA-Z]:", name) or "\\" in name or ".." in name.split("/"):
                raise _Refused(f"a zip archive with {name!r}, which points out of it")
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise _Refused(f"a zip archive whose {name} is compressed: torch writes it as it is")
        if sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size:
            raise _Refused("a zip archive whose records overlap")
        roots = [name.removesuffix("/data.pkl") for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(roots) != 1:
            raise _Refused(f"a zip archive with {len(roots)} records data.pkl")
        root = roots[0]
        if f"{root}/constants.pkl" in entries:
            raise _Refused("a TorchScript program: save its state_dict() instead")
        if (size := entries[f"{root}/data.pkl"].file_size) > MAX_PICKLE:
            raise _Refused(f"a pickle of {size} bytes, where {MAX_PICKLE} would do for the largest models")
        if f"{root}/byteorder" in entries:
            with archive.open(f"{root}/byteorder") as record:
                if record.read(16) != sys.byteorder.encode():
                    raise _Refused(f"one of another byte order than this computer's, {sys.byteorder}")
        data = f"{root}/data/"
        records = {
            name.removeprefix(data): _Record(_start(opened, entry), entry.file_size)
            for name, entry in entries.items()
            if name.startswith(data)
        }
        return records, archive.read(f"{root}/data.pkl")


def _other_format(start: bytes) -> str:
    if start.startswith(b"PK"):
        return "a zip archive that is not whole"
    if start.startswith(pickle.dumps(BEFORE_ZIP, protocol=2)):
        return (
            "the format from before torch 1.6: read it with torch.load(file, weights_only=True) and write it "
            "again with torch.save"
        )
    return "a pickle outside of any archive" if start.startswith(b"\x80") else "something else"


def _start(opened: io.BufferedReader, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind a header of its own, whose length only the header knows."""
    opened.seek(entry.header_offset)
    header = opened.read(30)
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise _Refused(f"a zip archive whose {entry.filename} is damaged")
    name, extra = struct.unpack("<HH", header[26:])
    return entry.header_offset + len(header) + name + extra


def _check_opcodes(pickled: bytes) -> None:
    """Refuse what makes an unpickler reach for more than the pickle holds."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("EXT1", "EXT2", "EXT4"):
            raise _Refused("a pickle that names objects of this program by their numbers")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(pickled):
            raise _Refused("a pickle that asks for more memory than it can use")


class _Inert:
    """Stands for whatever a pickle names: takes all that is done to it, and does nothing."""

    __slots__ = ()

    def __new__(cls, *args: object, **kwargs: object) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object):
        """Whatever is given is dropped."""

    def __setstate__(self, state: object) -> None:
        """Attributes are dropped."""

    def __setitem__(self, key: object, value: object) -> None:
        """Items of a dict are dropped."""

    def add(self, item: object) -> None:
        """Items of a list or a set are dropped."""

    append = extend = add


class _Storage(NamedTuple):
    """A storage, as the pickle describes it. Made for the pickle, never by it."""

    dtype: torch.dtype
    key: str


class _Tensor(NamedTuple):
    """A tensor, as the pickle describes it: anything can be in it. Stands for `_rebuild_tensor_v2`."""

    storage: Any
    offset: Any
    shape: Any
    stride: Any
    requires_grad: Any = False
    hooks: Any = None
    metadata: Any = None

    def __setstate__(self, state: object) -> None:  # without it, a pickle could set this class's attributes
        raise pickle.UnpicklingError("a tensor has no further state")


class _Parameter:
    """Stands for `_rebuild_parameter`: what it is called with first."""

    def __new__(cls, data: object, *rest: object) -> Any:
        return data

    def __setstate__(self, state: object) -> None:  # as above
        raise pickle.UnpicklingError("a parameter has no further state")


class _StorageKind(NamedTuple):
    """A class of storages, such as torch.FloatStorage."""

    dtype: torch.dtype


_STAND_INS = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": _Tensor,
    "torch._utils._rebuild_parameter": _Parameter,
    "torch._utils._rebuild_parameter_with_state": _Parameter,
    **{f"torch.{name}": _StorageKind(dtype) for name, dtype in STORAGES.items()},
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if HOSTILE.fullmatch(path):
            raise _Refused(f"a pickle that calls {path}")
        return _STAND_INS.get(path, _Inert)

    def persistent_load(self, pid: Any) -> Any:
        what, kind, key, *_ = pid
        if what != "storage" or not isinstance(key, str):
            raise _Refused("a pickle that refers to something else than storages")
        return _Storage(kind.dtype, key) if isinstance(kind, _StorageKind) else _Inert()


def _named_tensors(content: object) -> Iterator[tuple[str, _Tensor]]:
    """The tensors in dicts in dicts. A dict is looked into once, whatever refers to it."""
    todo, seen, count = [("", content, 0)], set(), 0
    while todo:
        name, value, depth = todo.pop()
        if isinstance(value, _Tensor) and isinstance(value.storage, _Storage):
            if (count := count + 1) > MAX_TENSORS:
                raise _Refused(f"more than {MAX_TENSORS} tensors")
            yield name, value
        elif isinstance(value, dict) and depth < MAX_DEPTH and id(value) not in seen:
            seen.add(id(value))
            inner = [
                (f"{name}.{k}" if name else k, v, depth + 1)
                for k, v in value.items()
                if isinstance(k, str) and len(name) + len(k) < MAX_NAME
            ]
            todo += reversed(inner)  # so that they come in the file's order


def _lazy(file: Path, records: Mapping[str, _Record], name: str, tensor: _Tensor) -> LazyTensor:
    """What is needed to read a tensor, once it is sure that its bytes are in the file."""
    shape, stride, dtype = tensor.shape, tensor.stride, tensor.storage.dtype
    record = records.get(tensor.storage.key)
    if not (
        record is not None
        and isinstance(shape, tuple)
        and isinstance(stride, tuple)
        and len(shape) == len(stride)
        and all(type(number) is int and number >= 0 for number in (tensor.offset, *shape, *stride))
    ):
        raise AdapterError(f"expected torch weights at {file}, got some whose {name} is damaged")
    last = sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    length = (0 if 0 in shape else last + 1) * dtype.itemsize
    first = tensor.offset * dtype.itemsize
    if first + length > record.size:
        raise AdapterError(
            f"expected torch weights at {file}, got some whose {name} reaches out of its record"
        )

    def load() -> Tensor:
        content = torch.empty(length, dtype=torch.uint8)
        with open(file, "rb") as opened:
            opened.seek(record.start + first)
            if opened.readinto(content.numpy().data) != length:
                raise AdapterError(f"expected torch weights at {file}, got some whose {name} is not whole")
        return content.view(dtype).as_strided(shape, stride).contiguous()

    return LazyTensor(shape, dtype, load)
