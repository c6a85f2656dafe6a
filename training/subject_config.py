"""The keys of the recipe `subject`: the subject encoder on pictures with references."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from interactdiff.subject.config import CLIP_LARGE
from interactdiff.subject.encoder import LAYERS, image_tower
from interactdiff.training.config import (
    Flag,
    Keys,
    OptionalCount,
    OptionalLocation,
    Rate,
    Share,
    arguments_of,
    number,
    refusal,
)
from interactdiff.training.pictures_config import PicturesConfig

Shrinking = Annotated[float, number("a number from 0 to 0.9", 0, 0.9)]


def _layers(value: Any) -> Any:
    whole = isinstance(value, list | tuple) and value and all(type(one) is int for one in value)
    if not whole:
        raise refusal("whole numbers of the image tower's layers, such as [-1, 4, 8, 12, 16]", value)
    return tuple(value)


def new_tower(**shapes: Any) -> Any:
    """A new image tower; shapes that are not given are CLIP's large one's."""
    return image_tower(CLIP_LARGE | shapes)


class SubjectDropsConfig(Keys):
    """What an example is trained without, drawn anew for every example.

    Attributes:
        subject: probability of no subject.
        caption: probability of an empty caption.
        all: probability of neither.
        box: probability that a subject is seen everywhere, and not in its place alone.
        control: probability of no control image, whatever else is left out.
    """

    subject: Share = 0.05
    caption: Share = 0.05
    all: Share = 0.05
    box: Share = 0.0
    control: Share = 0.0


class ReferenceChanges(Keys):
    """How a reference is changed, so that its pose and place are not learnt.

    Attributes:
        flip: probability of mirroring.
        rotation: degrees, at most, either way.
        scale: by which share it is smaller, at most: nothing of it is cut off.
        blur: radius, at most, in shares of the longer side.
        elastic: shift of a 4 x 4 grid's nodes, at most, in shares of a cell.
    """

    flip: Share = 0.5
    rotation: Rate = 20.0
    scale: Shrinking = 0.25
    blur: Share = 0.01
    elastic: Share = 0.3


class SubjectTrainingConfig(PicturesConfig):
    """The keys of `SubjectRecipe`.

    Attributes:
        image_encoder: folder or Hub id of a CLIP image tower; null beside `vision`, and beside `init_from`,
            whose own it is then.
        vision: the shapes of a new image tower, some of what a `CLIPVisionConfig` takes; or null.
        train_image_encoder: whether the image tower is trained too, as a new one has to be; else it stays as
            it is.
        token_dim: width of the tokens; null: that of the base's text features.
        layers: which of the tower's hidden states are read.
        weight: beta in training.
        controlnet: folder or Hub id of a ControlNet of the base's family, which stays as it is and is there
            in training alone; or null.
        controlnet_scale: of what it adds.
        drops: what examples are trained without.
        reference: how references are changed.
    """

    image_encoder: OptionalLocation = None
    vision: Annotated[dict[str, Any], arguments_of(new_tower, CLIP_LARGE)] | None = None
    train_image_encoder: Flag = False
    token_dim: OptionalCount = None
    layers: Annotated[tuple[int, ...], BeforeValidator(_layers)] = LAYERS
    weight: Rate = 1.0
    controlnet: OptionalLocation = None
    controlnet_scale: Rate = 1.0
    drops: SubjectDropsConfig = Field(default_factory=SubjectDropsConfig)
    reference: ReferenceChanges = Field(default_factory=ReferenceChanges)

    @model_validator(mode="after")
    def _has_a_tower(self) -> "SubjectTrainingConfig":
        given = [name for name in ("image_encoder", "vision", "init_from") if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none of them"
            raise ValueError(f"image_encoder: expected it, vision or init_from, got {got}")
        if self.vision is not None and not self.train_image_encoder:
            raise ValueError("train_image_encoder: expected true for a new image encoder, got false")
        return self
