"""Stable Diffusion 1.x and 2.x that takes interactions."""

from diffusers import StableDiffusionPipeline

from interactdiff.pipelines.interaction import InteractionMixin


class InteractionStableDiffusionPipeline(InteractionMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` whose call takes interactions; everything else is the stock pipeline."""

    stock = StableDiffusionPipeline
