"""Stable Diffusion 3 and 3.5 that take interactions."""

from diffusers import StableDiffusion3Pipeline

from interactdiff.pipelines.interaction import InteractionMixin


class InteractionStableDiffusion3Pipeline(InteractionMixin, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` whose call takes interactions; everything else is the stock pipeline."""

    stock = StableDiffusion3Pipeline
