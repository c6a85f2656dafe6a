"""The keys of the recipe `interaction`: the adapter on pictures of one's own."""

from typing import Annotated, Any, ClassVar, get_args

from pydantic import BeforeValidator, Field, model_validator

from interactdiff.data.boxes import FORMS
from interactdiff.interaction.fuser import Init
from interactdiff.scene import ACTION_REGIONS
from interactdiff.training.config import (
    Count,
    Flag,
    Keys,
    Location,
    Number,
    OptionalLocation,
    OptionalText,
    Positive,
    Rate,
    RecipeConfig,
    Share,
    Whole,
    choice,
    nothing,
    refusal,
)
from interactdiff.training.processes import world_size

DTYPES = ("float32", "float16", "bfloat16")
DENSITIES = ("uniform", "logit_normal", "mode")
WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")
OptionalCount = Annotated[Count | None, BeforeValidator(nothing)]
OptionalPositive = Annotated[Positive | None, BeforeValidator(nothing)]
PositiveOrAuto = Annotated[
    Positive | None, BeforeValidator(lambda value: None if value in ("auto", None) else value)
]


def _sources(value: Any) -> Any:
    """A path, one source, or several of them."""
    several = value if isinstance(value, list) else [value]
    return [one if isinstance(one, dict | Keys) else {"path": one} for one in several]


class AdapterSizes(Keys):
    """Arguments of `InteractionAdapter.for_unet` and `.for_transformer`; what is left out is theirs."""

    max_interactions: Count = 30
    hidden: Count = 512
    init: Annotated[str, choice(*get_args(Init))] = "published"
    feature_dim: Count | None = None
    grid_positions: Flag = False  # of a U-Net
    token_dim: Count = 1024  # of a transformer, like those that follow
    parts: Count = 4
    structured: Flag = True
    action_region: Annotated[str, choice(*ACTION_REGIONS)] = "union"


OF_A_UNET = {"grid_positions"}
OF_A_TRANSFORMER = {"token_dim", "parts", "structured", "action_region"}


class SourceConfig(Keys):
    """A data set.

    Attributes:
        path: as `interactdiff.data.reading.open_source` takes it.
        split: of it, or null.
        boxes: their form.
        columns: of tables: the row's keys and the columns that have them.
        weight: how often its pictures come in an epoch, times the weights of its rows.
    """

    path: Location
    split: OptionalText = None
    boxes: Annotated[str, choice(*FORMS)] = "shares"
    columns: dict[str, str] = Field(default_factory=dict)
    weight: Count = 1


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


class LossConfig(Keys):
    """The loss; what is noise and what is predicted is the base's.

    Attributes:
        boxes: how much more than others latents inside boxes count; 0: not more.
        snr_gamma: of a U-Net: min-SNR weighting (arXiv 2303.09556), or null.
        noise_offset: of a U-Net: standard deviation of what is added to a channel's noise.
        timestep_power: of a U-Net: timesteps are T u^power; below 1 leans to high noise.
        density: of a transformer's times, see `objectives.Flow`.
        logit_mean: of "logit_normal".
        logit_std: of "logit_normal".
        mode_scale: of "mode".
        weighting: of a transformer's times.
        shift: of a transformer's times to noise; "auto": the scheduler's.
        guidance: of a transformer that takes a guidance scale as input.
    """

    boxes: Rate = 0.0
    snr_gamma: OptionalPositive = None
    noise_offset: Rate = 0.0
    timestep_power: Positive = 1.0
    density: Annotated[str, choice(*DENSITIES)] = "logit_normal"
    logit_mean: Number = 0.0
    logit_std: Positive = 1.0
    mode_scale: Rate = 1.29
    weighting: Annotated[str, choice(*WEIGHTINGS)] = "none"
    shift: PositiveOrAuto = None
    guidance: Rate = 1.0


UNET_LOSS = {"snr_gamma", "noise_offset", "timestep_power"}
TRANSFORMER_LOSS = {
    "density",
    "logit_mean",
    "logit_std",
    "mode_scale",
    "weighting",
    "shift",
    "guidance",
}


class ValidationConfig(Keys):
    """The pictures that are drawn every `sample_every` steps, with and without the adapter.

    Attributes:
        data: folder whose first pictures' scenes are drawn; null: those of the training data.
        count: how many; 0: none.
        steps: denoising steps.
        guidance_scale: null: the pipeline's default.
        detector: that looks whether boxes are followed, see `probe.load_probe`; null: none looks.
    """

    data: OptionalLocation = None
    count: Whole = 4
    steps: Count = 30
    guidance_scale: OptionalPositive = None
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


class InteractionConfig(RecipeConfig):
    """The keys of `InteractionRecipe`.

    Attributes:
        base: packaged name, pipeline folder or Hub id: Stable Diffusion 1.x and 2.x, SDXL, Stable
            Diffusion 3 and 3.5, Flux.
        base_dtype: of the frozen base; "auto" goes by `mixed_precision`.
        data: one data set or several; a path stands for one.
        cache: folder of latents and text states.
        resolution: pixels, see `interactdiff.data.framing.Framing`.
        multiple: that sides are multiples of; null: 64 for a U-Net, 16 for a transformer.
        square: a centre crop to a square in place of aspect buckets.
        min_box: least area of a box, in shares of the picture's.
        min_visible: least share of a box that a crop has to leave.
        flip: probability of mirroring.
        text_tokens: to which captions are padded for T5; null: as the pipeline draws.
        workers: processes that read examples, for each process that trains; 0: none of their own.
        adapter: its sizes.
        init_from: adapter to go on from, also a published one or GLIGEN's; or null.
        batch_size: examples at a time in each process.
        accumulate: parts of a step, of `batch_size` each.
        processes: how many there are to be; null: as many as were started.
        gradient_checkpointing: compute blocks again in the backward pass in place of keeping what they made.
        drops: what examples are trained without.
        loss: its weights.
        validation: what is drawn.
        hub: where the adapter goes when it is done.
    """

    may_change: ClassVar[frozenset[str]] = RecipeConfig.may_change | {
        "batch_size",
        "accumulate",
        "processes",
        "workers",
        "cache",
        "gradient_checkpointing",
        "validation",
        "hub",
    }

    base: Location
    base_dtype: Annotated[str, choice("auto", *DTYPES)] = "auto"
    data: Annotated[list[SourceConfig], BeforeValidator(_sources)]
    cache: Location
    resolution: Count
    multiple: OptionalCount = None
    square: Flag = False
    min_box: Share = 0.001
    min_visible: Share = 0.5
    flip: Share = 0.5
    text_tokens: OptionalCount = None
    workers: Whole = 2
    adapter: AdapterSizes = Field(default_factory=AdapterSizes)
    init_from: OptionalLocation = None
    batch_size: Count
    accumulate: Count = 1
    processes: OptionalCount = None
    gradient_checkpointing: Flag = False
    drops: DropsConfig = Field(default_factory=DropsConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    hub: HubConfig = Field(default_factory=HubConfig)

    @model_validator(mode="after")
    def _fits_together(self) -> "InteractionConfig":
        if not self.data:
            raise ValueError("data: expected at least one data set, got none")
        if self.lr_scheduler == "cosine_by_time":
            raise ValueError("lr_scheduler: expected one that goes by steps, got 'cosine_by_time'")
        if self.mixed_precision == "no" and self.base_dtype not in ("auto", "float32"):
            raise ValueError(f"base_dtype: expected float32 with mixed_precision=no, got {self.base_dtype!r}")
        return self

    @property
    def global_batch(self) -> int:
        """Examples of a step, of all processes and parts."""
        return self.batch_size * self.accumulate * world_size()

    def to_json(self) -> dict[str, Any]:
        """As a checkpoint has it, with the global batch, which must not change when a run goes on."""
        return super().to_json() | {"global_batch": self.global_batch}
