"""The keys of the recipe `subject_tuning`: a base tuned on one subject from one picture."""

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from interactdiff.training.config import (
    Count,
    Flag,
    Location,
    OptionalCount,
    OptionalLocation,
    Rate,
    RecipeConfig,
    Share,
    refusal,
)
from interactdiff.training.pictures_config import DrawingConfig, LossConfig

MULTIPLE = 16  # of sides, in pixels


def _text(value: Any) -> Any:
    if not isinstance(value, str) or not value.strip():
        raise refusal("text", value)
    return " ".join(value.split())


def _texts(value: Any) -> Any:
    if not isinstance(value, list):
        raise refusal("a list of captions", value)
    return [_text(one) for one in value]


def _token(value: Any) -> Any:
    token = _text(value)
    if not (token[0] == "<" and token[-1] == ">" and token[1:-1].replace("-", "").replace("_", "").isalnum()):
        raise refusal("a token such as <subject>, of letters, digits, - and _", value)
    if token != token.lower():
        raise refusal("a token in lower case, as tokenizers have it", value)
    return token


Text = Annotated[str, BeforeValidator(_text)]


class RegularConfig(DrawingConfig):
    """The regular pictures: of the same class, much like the subject, drawn before the base is tuned.

    Attributes:
        count: how many.
        reference_weight: w_ref of self-subject attention, which sees the whole reference; 0 is off.
    """

    count: Count = 32
    reference_weight: Rate = 3.0


class TuningSamplesConfig(DrawingConfig):
    """What is drawn every `sample_every` steps.

    Attributes:
        prompts: of the pictures; none are drawn without.
    """

    prompts: Annotated[list[str], BeforeValidator(_texts)] = Field(default_factory=list)


class SubjectTuningConfig(RecipeConfig):
    """The keys of `SubjectTuningRecipe`.

    Attributes:
        base: packaged name, pipeline folder or Hub id: Stable Diffusion 1.x and 2.x, SDXL, Stable
            Diffusion 3 and 3.5, Flux.
        reference: the subject's picture.
        mask: which of its pixels are the subject; null: its alpha channel, a near-white background, or the
            segmenter say so.
        segmenter: folder or Hub id of a transformers model for image segmentation; or null.
        caption: what the reference shows, in detail.
        class_word: what the subject is, such as "dog".
        token: its new word.
        subject_encoder: folder or Hub id of a subject encoder that acts meanwhile, and does not change; or
            null.
        encoder_weight: beta of it.
        regular: the regular pictures.
        subject_weight: lambda, of the reference's loss beside that of the regular pictures.
        resolution: pixels a side; pictures are square.
        batch_size: pairs of a regular picture and the reference in a step.
        flip: probability of mirroring.
        rank: of LoRA's matrices; null: the denoiser itself is tuned.
        token_learning_rate: of the token's embedding.
        train_text_encoder: whether CLIP's text encoders are tuned as the denoiser is; of their embeddings
            only the token's changes.
        text_tokens: to which captions are padded for T5; null: as the pipeline draws.
        gradient_checkpointing: compute blocks again in the backward pass in place of keeping what they made.
        allow_changed_data: whether a run goes on with another reference or other regular pictures.
        loss: its weights.
        validation: what is drawn.
    """

    may_change: ClassVar[frozenset[str]] = RecipeConfig.may_change | {
        "gradient_checkpointing",
        "validation",
        "allow_changed_data",
    }

    base: Location
    reference: Location
    mask: OptionalLocation = None
    segmenter: OptionalLocation = None
    caption: Text
    class_word: Text
    token: Annotated[str, BeforeValidator(_token)] = "<subject>"
    subject_encoder: OptionalLocation = None
    encoder_weight: Rate = 0.2
    regular: RegularConfig = Field(default_factory=RegularConfig)
    subject_weight: Rate = 1.0
    resolution: Count
    batch_size: Count = 1
    flip: Share = 0.5
    rank: OptionalCount = None
    token_learning_rate: Rate = 5e-3
    train_text_encoder: Flag = False
    text_tokens: OptionalCount = None
    gradient_checkpointing: Flag = False
    allow_changed_data: Flag = False
    loss: LossConfig = Field(default_factory=LossConfig)
    validation: TuningSamplesConfig = Field(default_factory=TuningSamplesConfig)

    @model_validator(mode="after")
    def _can_be_tuned(self) -> "SubjectTuningConfig":
        if self.resolution % MULTIPLE:
            raise ValueError(f"resolution: expected a multiple of {MULTIPLE}, got {self.resolution}")
        if self.loss.boxes:
            raise ValueError(f"loss.boxes: expected 0, since there are no boxes, got {self.loss.boxes}")
        if self.token in self.caption.lower().split():
            raise ValueError(f"caption: expected words that are known, without {self.token}, got it in them")
        return self

    @property
    def class_prompt(self) -> str:
        """Of regular pictures."""
        return f"a {self.class_word}"

    @property
    def subject_prompt(self) -> str:
        """Of the reference."""
        return f"{self.class_prompt} {self.token}"
