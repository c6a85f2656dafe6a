"""Flux that takes interactions."""

from diffusers import FluxPipeline

from interactdiff.pipelines.interaction import InteractionMixin


class InteractionFluxPipeline(InteractionMixin, FluxPipeline):
    """`FluxPipeline` whose call takes interactions; everything else is the stock pipeline."""

    stock = FluxPipeline
