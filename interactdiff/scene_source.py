"""What an adapter's scene was made of, and making it anew where that has changed since."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from interactdiff.adapter import Binding
from interactdiff.autograd_modes import plain_tensors
from interactdiff.errors import AdapterError
from interactdiff.fingerprints import fingerprint

ORIGINAL = "_interactdiff_tokens"
"""Of an adapter's copy of a tokenizer: what it was made of, and the tokens that were added."""


class Components:
    """The parts of a pipeline that an adapter has read.

    Args:
        binding: of the adapter.
        remedy: what to do where one of them is replaced.
    """

    def __init__(self, binding: Binding, remedy: str):
        self._binding, self._remedy = binding, remedy
        self._read = {name: original_of(one) for name, one in binding.components().items()}

    def check(self, pipeline: object) -> None:
        """Make sure that they are a pipeline's still. One that was taken out is no other.

        Args:
            pipeline: nothing is checked if it is not the one that was attached to.

        Raises:
            AdapterError: one of them was replaced.
        """
        if self._binding.host.pipeline is not pipeline:
            return
        for name, now in self._binding.components().items():
            before = self._read.get(name)
            if now is not None and before is not None and original_of(now) is not before:
                raise AdapterError(f"expected the {name} that {self._remedy}")


class SceneSource(Components):
    """A scene's items, and the components and weights that they were encoded with.

    Args:
        binding: whose scene it is.
        items: as `Binding.encode` took them.
        options: likewise.
        encoded: what it returned.
    """

    def __init__(
        self,
        binding: Binding,
        items: Sequence[Sequence[Any]],
        options: Mapping[str, Any],
        encoded: Any,
    ):
        super().__init__(binding, "the scene was encoded with, got another: set the scene again")
        self._items, self._options, self._encoded = items, options, encoded
        self._fingerprint = self._now(True)
        self._dtype = _dtype(binding)

    def use(self) -> None:
        """Act by the scene from the next call on."""
        self._binding.use(self._encoded)

    def refresh(self, device: torch.device, values: bool) -> None:
        """Encode the scene anew if weights, LoRAs or tokens that it was made with have changed.

        Args:
            device: where the denoiser runs.
            values: see `fingerprint`: whether to look closely, as at the start of a run.
        """
        if self._encoded is None or self._binding.scene is not self._encoded:
            return
        self._binding.follow(device)
        now = self._now(values)
        missing = any(one is None for one in self._binding.components().values())
        dtype = _dtype(self._binding)
        if missing and dtype != self._dtype:  # the text encoder was taken out, and the scene has been cast
            self._dtype, self._fingerprint = dtype, now
        elif any(a is not None and a != b for a, b in zip(now, self._fingerprint, strict=False)):
            with plain_tensors():
                self._encoded = self._binding.encode(self._items, **self._options)
            self.use()
            self._fingerprint, self._dtype = self._now(True), dtype

    def _now(self, values: bool) -> list[Any]:
        found: list[Any] = list(fingerprint(self._binding.adapter, values))
        if values:
            for one in self._binding.components().values():
                found.append(fingerprint(one) if isinstance(one, nn.Module) else _length(one))
        return found


def original_of(component: Any) -> Any:
    """A component, or what an adapter's copy of it was made of."""
    return getattr(component, ORIGINAL, (component,))[0]


def _dtype(binding: Binding) -> torch.dtype | None:
    return next((one.dtype for one in binding.adapter.parameters()), None)


def _length(tokenizer: Any) -> int | None:
    return len(tokenizer) if hasattr(tokenizer, "__len__") else None
