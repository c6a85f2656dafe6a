"""diffusers pipelines that take scenes as arguments."""

if __name__ != "interactdiff.pipelines":
    raise ImportError(f"import interactdiff.pipelines, not {__name__}: the bare name loads every class twice")

from interactdiff.pipelines.stable_diffusion import InteractionStableDiffusionPipeline
from interactdiff.pipelines.stable_diffusion_xl import InteractionStableDiffusionXLPipeline

__all__ = ["InteractionStableDiffusionPipeline", "InteractionStableDiffusionXLPipeline"]
