"""CLEAR's distillation (arXiv 2412.16112, section 4) on pictures of one's own, of any sizes.

As `distill`, whose pictures the base draws itself; here they are read, and a step may be shared out over
processes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn

from interactdiff.clear.adapter import ClearAdapter
from interactdiff.errors import RecipeError
from interactdiff.handle import attach
from interactdiff.training.config import Keys, Rate, Share
from interactdiff.training.distill import Distillation, WindowSizes, layers_of, sharing_copy
from interactdiff.training.pictures import PictureRecipe
from interactdiff.training.pictures_config import PicturesConfig


class CaptionDrops(Keys):
    """What an example is trained without.

    Attributes:
        caption: probability of an empty caption.
    """

    caption: Share = 0.0


class DistillPicturesConfig(PicturesConfig):
    """The keys of `DistillPicturesRecipe`.

    Attributes:
        clear: the windows.
        output_weight: of the loss against the teacher's output.
        attention_weight: of the loss against its attentions' outputs.
        drops: of captions.
    """

    clear: WindowSizes
    output_weight: Rate = 1.0
    attention_weight: Rate = 1.0
    drops: CaptionDrops = Field(default_factory=CaptionDrops)

    @model_validator(mode="after")
    def _is_whole(self) -> "DistillPicturesConfig":
        if self.shard:
            raise ValueError("shard: expected false for layers that stand in for the base's, got true")
        if (kind := self.base_quantization) != "none":
            raise ValueError(f"base_quantization: expected none for layers that are trained, got {kind!r}")
        return self


class CaptionVariation:
    """Captions alone.

    Args:
        drop: probability of an empty one.
    """

    def __init__(self, drop: float):
        self.drop = drop

    def __call__(self, prompt: str, items: Sequence[Any], rng: Any) -> tuple[str, list[Any]]:
        """The caption, without items."""
        return ("" if rng.random() < self.drop else prompt), []

    def more(self, items: Sequence[Any], rng: Any) -> dict[str, Tensor]:
        """Nothing."""
        return {}


class DistillPicturesRecipe(PictureRecipe[DistillPicturesConfig]):
    """Trains a `ClearAdapter` of a Flux base: attention projections, and the weights of pooling."""

    config_type = DistillPicturesConfig

    def new_adapter(self) -> nn.Module:
        """Of a copy of the transformer, which shares all that is not trained."""
        config, teacher = self.config, self.base.denoiser
        if not isinstance(teacher, FluxTransformer2DModel):
            raise RecipeError(f"expected a Flux base to distill, got a {type(teacher).__name__}")
        self.student = sharing_copy(teacher)
        return layers_of(self.student, config.clear, config.init_from).float()

    def attached(self, adapter: ClearAdapter) -> Any:
        """Its handle in the student."""
        if self.config.gradient_checkpointing:
            self.base.denoiser.disable_gradient_checkpointing()
            self.student.enable_gradient_checkpointing()
        self.student.to(self.device)
        handle = attach(self.student, adapter)
        handle["clear"].configure(min_tokens=0)
        weights = self.config.output_weight, self.config.attention_weight
        self.distillation = Distillation(self.base.denoiser, self.student, *weights)
        return handle

    def vary(self) -> CaptionVariation:
        """Drops captions."""
        return CaptionVariation(self.config.drops.caption)

    def condition(self, batch: dict[str, Any]) -> None:
        """The windows act in every call; DDP learns that a step begins."""
        self.model()

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """See `Distillation.loss`."""
        self.condition(batch)
        inputs = self.base.noisy(batch, self.device, self.dtype)
        with torch.no_grad():
            wanted = self.base.predict(*inputs, batch)
        predicted = self.base.predict(*inputs, batch, self.student)
        return self.distillation.loss(self.base.loss_between(predicted, batch), predicted, wanted)

    def row(self, number: int) -> list[Image.Image]:
        """The picture itself, the teacher's, and the student's, from the same noise."""
        placement = self.shown_scene(number)[2]
        pictures = [placement.apply(self.shown[number].record.open())]
        for transformer in (self.base.denoiser, self.student):
            self.pipe.transformer = transformer
            pictures.append(self.draw(number))
        self.pipe.transformer = self.base.denoiser
        return pictures

    def export(self) -> None:
        adapter: ClearAdapter = self.accelerator.unwrap_model(self.model)
        half = {name: tensor.half() for name, tensor in self.weights().items()}
        ClearAdapter(adapter.config, half).save_pretrained(self.config.export_to)
