"""Adapters made for tests of the controller: each declares the edits that a test gives it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from interactdiff.adapter import Adapter, Binding, Edit, Host
from interactdiff.calls import Call


class EditsBinding(Binding):
    """Acts in every call; keeps the calls."""

    def __init__(self, adapter: "EditsAdapter", host: Host):
        super().__init__(adapter, host)
        self.edits = tuple(adapter.make(host))
        self.calls: list[Call] = []
        self.acts: Callable[[Call], bool] = lambda call: True

    def prepare(self, call: Call) -> Sequence[Edit]:
        self.calls.append(call)
        return self.edits if self.acts(call) else ()


class EditsAdapter(Adapter):
    """Declares what `make` returns of a host."""

    items = ()

    def __init__(self, make: Callable[[Host], Sequence[Edit]], name: str = "edits", order: int = 50):
        super().__init__()
        self.make = make
        self.name, self.order = name, order  # type: ignore[misc]
        self.weight = nn.Parameter(torch.ones(1))

    @classmethod
    def for_denoiser(cls, denoiser: Any, *args: Any, **options: Any) -> "EditsAdapter":
        return cls(*args, **options)

    @classmethod
    def from_pretrained(cls, path_or_id: Any, **options: Any) -> "EditsAdapter":
        raise NotImplementedError

    def save_pretrained(self, path: Any) -> None:
        raise NotImplementedError

    def check(self, denoiser: Any) -> None: ...

    def bind(self, host: Host) -> EditsBinding:
        return EditsBinding(self, host)
