"""Tensors of weight files: their names and shapes at once, their values when they are used."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from interactdiff.errors import AdapterError


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is used.

    Attributes:
        shape: its shape.
        dtype: its dtype where it is stored.
        load: reads it, into memory that nothing else refers to.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """One that is in memory already, and is not copied."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def nbytes(self) -> int:
        """Its size in memory, in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def is_floating_point(self) -> bool:
        """Whether its numbers have fractions."""
        return self.dtype.is_floating_point

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Read it, in another dtype if one is given."""
        return self.load() if dtype is None else self.load().to(dtype)

    def copy(self) -> LazyTensor:
        """Another one with the same values."""
        return replace(self, load=lambda: self.load().clone())


def safetensors_tensors(file: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, by name; only its header is read.

    Raises:
        AdapterError: the file is missing, truncated, or something else.
    """

    def tensor(name: str) -> LazyTensor:
        def load() -> Tensor:
            # Opened for each tensor: the pages of the file that were read count as memory while it is mapped.
            with safe_open(file, "pt") as opened:
                return opened.get_tensor(name).clone()

        mapped = whole.get_tensor(name)  # maps the values, reads none
        return LazyTensor(tuple(mapped.shape), mapped.dtype, load)

    try:
        with safe_open(file, "pt") as whole:
            return {name: tensor(name) for name in whole.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise AdapterError(f"expected safetensors weights at {file}, got no such file") from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"expected a whole safetensors file at {file}, got {error}") from None
