"""Finds out which pipeline calls a denoiser, and what it denoises, from the stack of the call."""

from functools import lru_cache
from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor

from interactdiff.errors import AdapterError
from interactdiff.pipeline_calls import call_parameters
from interactdiff.sites import held_denoiser

GUIDER_BATCH, GUIDER_NAME = "guider_state_batch", "__guidance_identifier__"  # diffusers' modular pipelines


class Caller(NamedTuple):
    """The code that calls a denoiser.

    Attributes:
        pipeline: the nearest on the stack that holds it; None if none does.
        guider: the name of its guider's batch, of a modular pipeline.
        latents: its variable of that name: what it denoises, one row a picture.
    """

    pipeline: Any = None
    guider: str | None = None
    latents: Tensor | None = None


def caller_of(frame: FrameType | None, denoiser: object) -> Caller:
    """Find out from the stack who calls.

    Args:
        frame: the innermost.
        denoiser: the one that is called.
    """
    found = Caller()
    while frame is not None:
        names = frame.f_code.co_varnames + frame.f_code.co_cellvars  # of those, what a comprehension reads
        for name in ("self", "components"):  # modular pipelines hand theirs to their blocks
            if name not in names:
                continue
            owner = frame.f_locals.get(name)
            if found.pipeline is None and _holds(owner, denoiser):
                batch = frame.f_locals.get(GUIDER_BATCH)
                found = Caller(owner, getattr(batch, GUIDER_NAME, None))
            if owner is not None and owner is found.pipeline and "latents" in names:
                latents = frame.f_locals.get("latents")
                return found._replace(latents=latents if isinstance(latents, Tensor) else None)
        frame = frame.f_back
    return found


def _holds(owner: Any, denoiser: object) -> bool:
    if "scheduler" not in getattr(owner, "__dict__", ()):
        return False
    held = held_denoiser(owner)
    return getattr(held, "_orig_mod", held) is denoiser


def check_guidance(pipeline: Any) -> None:
    """Refuse a pipeline that guides by pictures too, such as InstructPix2Pix.

    Raises:
        AdapterError: it does.
    """
    if pipeline is not None and _guides_by_pictures(type(pipeline)):
        raise AdapterError(
            f"expected guidance by the prompt alone, got {type(pipeline).__name__}: it guides by pictures too"
        )


@lru_cache
def _guides_by_pictures(pipeline: type) -> bool:
    return "image_guidance_scale" in call_parameters(pipeline)
