"""CLEAR: linear attention that makes diffusion transformers fast at high resolution (arXiv 2412.16112)."""

from interactdiff.clear.adapter import ClearAdapter, ClearConfig
from interactdiff.clear.attention import local_attention
from interactdiff.clear.handle import ClearHandle
from interactdiff.clear.linearize import linearize
from interactdiff.clear.pattern import ClearError, Pattern, proportional_scale

__all__ = [
    "ClearAdapter",
    "ClearConfig",
    "ClearError",
    "ClearHandle",
    "Pattern",
    "linearize",
    "local_attention",
    "proportional_scale",
]
