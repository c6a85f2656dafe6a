"""Stable Diffusion XL that takes interactions."""

from diffusers import StableDiffusionXLPipeline

from interactdiff.pipelines.interaction import InteractionMixin


class InteractionStableDiffusionXLPipeline(InteractionMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` whose call takes interactions; everything else is the stock pipeline."""

    stock = StableDiffusionXLPipeline
