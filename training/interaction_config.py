"""The keys of the recipe `interaction`: the adapter on pictures of one's own."""

from typing import Annotated, ClassVar, get_args

from pydantic import Field, model_validator

from interactdiff.interaction.fuser import Init
from interactdiff.scene import ACTION_REGIONS
from interactdiff.training.config import (
    Count,
    Flag,
    Keys,
    OptionalText,
    Share,
    choice,
    refusal,
)
from interactdiff.training.pictures_config import PicturesConfig, ValidationConfig


class AdapterSizes(Keys):
    """Arguments of `InteractionAdapter.for_unet` and `.for_transformer`; what is left out is theirs."""

    max_interactions: Count = 30
    hidden: Count = 512
    init: Annotated[str, choice(*get_args(Init))] = "published"
    feature_dim: Count | None = None
    structured: Flag | None = None  # of a transformer true, of a U-Net false
    grid_positions: Flag = False  # of a U-Net
    token_dim: Count = 1024  # of a transformer, like those that follow
    parts: Count = 4
    action_region: Annotated[str, choice(*ACTION_REGIONS)] = "union"


OF_A_UNET = {"grid_positions"}
OF_A_TRANSFORMER = {"token_dim", "parts", "action_region"}


class DropsConfig(Keys):
    """What an example is trained without, drawn anew for every example.

    Attributes:
        keep_caption: probability of the whole caption.
        strip_caption: probability of the caption without its actions; otherwise there is none.
        captions_without_items: whether a picture without any item always has its whole caption.
        all: probability of neither caption nor items.
        action: probability of an interaction without its action.
        item: probability that an item is left out; one stays.
        jitter: greatest shift of a box's edges, in shares of its sides.
        slots: whether items take slots drawn anew; else the first ones.
    """

    keep_caption: Share = 0.5
    strip_caption: Share = 0.2
    captions_without_items: Flag = True
    all: Share = 0.1
    action: Share = 0.1
    item: Share = 0.05
    jitter: Share = 0.02
    slots: Flag = True

    @model_validator(mode="after")
    def _captions_are_shared_out(self) -> "DropsConfig":
        if (both := self.keep_caption + self.strip_caption) > 1 + 1e-9:
            raise refusal("keep_caption and strip_caption of at most 1 in all", both)
        return self


class ProbedValidation(ValidationConfig):
    """Pictures that are drawn, and looked at.

    Attributes:
        detector: that looks whether boxes are followed, see `probe.load_probe`; null: none looks.
    """

    detector: OptionalText = None


class HubConfig(Keys):
    """Where what was trained is uploaded to, when it is done.

    Attributes:
        id: owner/name of the repository, made if need be; null: nothing is uploaded.
        private: whether it is.
        license: of the weights, for the card; null: the card has none.
    """

    id: OptionalText = None
    private: Flag = True
    license: OptionalText = None


class InteractionConfig(PicturesConfig):
    """The keys of `InteractionRecipe`.

    Attributes:
        adapter: its sizes.
        init_from: adapter to go on from, also a published one or GLIGEN's; or null.
        drops: what examples are trained without.
        validation: what is drawn, and what looks at it.
        hub: where the adapter goes when it is done.
    """

    may_change: ClassVar[frozenset[str]] = PicturesConfig.may_change | {"hub"}

    adapter: AdapterSizes = Field(default_factory=AdapterSizes)
    drops: DropsConfig = Field(default_factory=DropsConfig)
    validation: ProbedValidation = Field(default_factory=ProbedValidation)  # pyright: ignore[reportIncompatibleVariableOverride]
    hub: HubConfig = Field(default_factory=HubConfig)
