"""diffusers pipelines that take scenes as arguments."""

if __name__ != "interactdiff.pipelines":
    raise ImportError(f"import interactdiff.pipelines, not {__name__}: the bare name loads every class twice")

from interactdiff.pipelines.flux import InteractionFluxPipeline
from interactdiff.pipelines.stable_diffusion import InteractionStableDiffusionPipeline
from interactdiff.pipelines.stable_diffusion_3 import InteractionStableDiffusion3Pipeline
from interactdiff.pipelines.stable_diffusion_xl import InteractionStableDiffusionXLPipeline

__all__ = [
    "InteractionFluxPipeline",
    "InteractionStableDiffusion3Pipeline",
    "InteractionStableDiffusionPipeline",
    "InteractionStableDiffusionXLPipeline",
]
