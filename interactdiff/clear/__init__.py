"""CLEAR: linear attention that makes diffusion transformers fast at high resolution (arXiv 2412.16112)."""

from interactdiff.clear.adapter import ClearAdapter, ClearConfig
from interactdiff.clear.attention import BACKENDS, choose_backend, least_tokens, local_attention
from interactdiff.clear.binding import ClearBinding
from interactdiff.clear.flex import can_run_flex
from interactdiff.clear.pattern import ClearError, Pattern, proportional_scale
from interactdiff.clear.tiles import can_run_tiles
from interactdiff.clear.windows import linearize

__all__ = [
    "BACKENDS",
    "ClearAdapter",
    "ClearBinding",
    "ClearConfig",
    "ClearError",
    "Pattern",
    "can_run_flex",
    "can_run_tiles",
    "choose_backend",
    "least_tokens",
    "linearize",
    "local_attention",
    "proportional_scale",
]
