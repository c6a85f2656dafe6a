"""The keys of the recipe `subject`: the subject encoder on pictures with references."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from interactdiff.subject.encoder import LAYERS
from interactdiff.training.config import Keys, OptionalCount, OptionalLocation, Rate, Share, refusal
from interactdiff.training.pictures_config import PicturesConfig


def _layers(value: Any) -> Any:
    whole = isinstance(value, list | tuple) and value and all(type(one) is int for one in value)
    if not whole:
        raise refusal("whole numbers of the image tower's layers, such as [-1, 4, 8, 12, 16]", value)
    return tuple(value)


class SubjectDropsConfig(Keys):
    """What an example is trained without, drawn anew for every example.

    Attributes:
        subject: probability of no subject.
        caption: probability of an empty caption.
        all: probability of neither.
    """

    subject: Share = 0.05
    caption: Share = 0.05
    all: Share = 0.05


class ReferenceChanges(Keys):
    """How a reference is changed, so that its pose and place are not learnt.

    Attributes:
        flip: probability of mirroring.
        rotation: degrees, at most, either way.
        scale: by how much it is larger or smaller, at most.
        blur: radius, at most, in shares of the longer side.
        elastic: shift of a 4 x 4 grid's nodes, at most, in shares of a cell.
    """

    flip: Share = 0.5
    rotation: Rate = 20.0
    scale: Share = 0.25
    blur: Share = 0.01
    elastic: Share = 0.3


class SubjectTrainingConfig(PicturesConfig):
    """The keys of `SubjectRecipe`.

    Attributes:
        image_encoder: folder or Hub id of a CLIP image tower, which stays as it is; null beside `init_from`,
            whose own it is then.
        token_dim: width of the tokens; null: that of the base's text features.
        layers: which of the tower's hidden states are read.
        weight: beta in training.
        drops: what examples are trained without.
        reference: how references are changed.
    """

    image_encoder: OptionalLocation = None
    token_dim: OptionalCount = None
    layers: Annotated[tuple[int, ...], BeforeValidator(_layers)] = LAYERS
    weight: Rate = 1.0
    drops: SubjectDropsConfig = Field(default_factory=SubjectDropsConfig)
    reference: ReferenceChanges = Field(default_factory=ReferenceChanges)

    @model_validator(mode="after")
    def _has_a_tower(self) -> "SubjectTrainingConfig":
        if (self.image_encoder is None) == (self.init_from is None):
            raise ValueError("image_encoder: expected it or init_from, got both or neither")
        return self
