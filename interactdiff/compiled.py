"""What torch.compile has to be told."""

import torch
from torch import nn


def forget_compiled(denoiser: nn.Module, given: object) -> None:
    """Forget compiled code of a denoiser, which does not look for new hooks (torch skips those guards).

    Args:
        denoiser: the module.
        given: the pipeline or denoiser that the caller holds, whose module may be a compiled wrapper.
    """
    outer = getattr(given, "unet", None) or getattr(given, "transformer", None) or given
    if hasattr(outer, "_orig_mod") or any(m._compiled_call_impl is not None for m in denoiser.modules()):
        torch.compiler.reset()
