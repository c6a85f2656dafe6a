"""Casts weights to a denoiser's dtype and back: they come out of every use bit for bit as they were."""

import torch
from torch import Tensor


class ExactWeights:
    """What the weights of a module were before they were cast, in main memory until they are restored."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def kept(self) -> bool:
        """Whether anything is cast."""
        return bool(self._kept)

    @torch.no_grad()
    def cast(self, own: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        """Move a parameter or buffer in place, cast from what it was before any other cast.

        Args:
            own: the parameter or buffer; one of integers keeps its dtype.
            device: where to.
            dtype: of floating point.
        """
        dtype = dtype if own.is_floating_point() else own.dtype
        if (own.device, own.dtype) == (device, dtype):
            return
        exact = self.of(own)
        self._kept.pop(id(own), None)
        if exact.dtype != dtype and not own.is_meta:
            self._kept[id(own)] = own, exact.detach().cpu()
        own.data = exact.detach().to(device, dtype)

    def of(self, own: Tensor) -> Tensor:
        """What a parameter was before it was cast; itself, if it was not or somebody has changed it since."""
        held, exact = self._kept.get(id(own), (None, own))
        if held is not own or not exact.to(own.device, own.dtype).equal(own):
            return own
        return exact

    @torch.no_grad()
    def restore(self) -> None:
        """Give every weight its own dtype and bits, where it lies now."""
        for own, _ in list(self._kept.values()):
            own.data = self.of(own).detach().to(own.device)
        self._kept.clear()
