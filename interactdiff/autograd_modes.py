"""Modes of PyTorch in which tensors that are kept must not be made."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain_tensors(autocast: bool = False) -> Iterator[None]:
    """Within the block tensors are made that may be kept and used in any mode.

    Those of `torch.inference_mode` cannot be saved for a backward pass, and those of `torch.autocast` are
    rounded.

    Args:
        autocast: whether that stays as it is.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        if not autocast:
            for kind in {"cpu", "cuda"}:
                if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
        yield
