"""Makes torch.compile forget code that lacks new hooks."""

import torch
from torch import nn

from interactdiff.sites import held_denoiser


def forget_compiled(denoiser: nn.Module, *given: object) -> None:
    """Forget compiled code of a denoiser, which does not look for new hooks (torch skips those guards).

    Args:
        denoiser: the module.
        *given: pipelines or denoisers that callers hold, whose modules may be compiled wrappers.
    """
    wrapped = any(hasattr(held_denoiser(one), "_orig_mod") for one in given)
    if wrapped or any(m._compiled_call_impl is not None for m in denoiser.modules()):
        torch.compiler.reset()
