"""The keys that all recipes on pictures of one's own share."""

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from interactdiff.data.boxes import FORMS
from interactdiff.training.config import (
    Count,
    Flag,
    Keys,
    Location,
    Number,
    OptionalCount,
    OptionalLocation,
    OptionalText,
    Positive,
    Rate,
    RecipeConfig,
    Share,
    Whole,
    choice,
    nothing,
)
from interactdiff.training.launch import world_size
from interactdiff.training.quantization import BYTES
from interactdiff.training.run_folder import CHECKPOINT, SAMPLES

DTYPES = ("float32", "float16", "bfloat16")
DENSITIES = ("uniform", "logit_normal", "mode")
WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")
OptionalPositive = Annotated[Positive | None, BeforeValidator(nothing)]
PositiveOrAuto = Annotated[
    Positive | None, BeforeValidator(lambda value: None if value in ("auto", None) else value)
]


def _sources(value: Any) -> Any:
    """A path, one source, or several of them."""
    several = value if isinstance(value, list) else [value]
    return [one if isinstance(one, dict | Keys) else {"path": one} for one in several]


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

    def misplaced(self, in_unet: bool) -> set[str]:
        """Keys that are set and are for the other kind of base."""
        others = TRANSFORMER_LOSS if in_unet else UNET_LOSS
        return {f"loss.{name}" for name in self.model_fields_set & others}


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


class DrawingConfig(Keys):
    """How pictures are drawn.

    Attributes:
        steps: denoising steps.
        guidance_scale: null: the pipeline's default.
    """

    steps: Count = 30
    guidance_scale: OptionalPositive = None


class ValidationConfig(DrawingConfig):
    """The pictures that are drawn every `sample_every` steps, with and without the adapter.

    Attributes:
        data: folder whose first pictures' scenes are drawn; null: those of the training data.
        count: how many; 0: none.
    """

    data: OptionalLocation = None
    count: Whole = 4


class PicturesConfig(RecipeConfig):
    """The keys of `PictureRecipe`.

    Attributes:
        base: packaged name, pipeline folder or Hub id: Stable Diffusion 1.x and 2.x, SDXL, Stable
            Diffusion 3 and 3.5, Flux.
        base_dtype: of the frozen base; "auto" goes by `mixed_precision`.
        base_quantization: "int8", "fp8" or "nf4" for the linear layers in its denoiser's blocks, see
            `quantization.quantize`; or "none".
        data: one data set or several; a path stands for one; no run writes there.
        allow_changed_data: whether a run goes on from a checkpoint of other data, such as with a row more.
        cache: folder of latents and text states.
        resolution: pixels, see `interactdiff.data.framing.Framing`.
        multiple: that sides are multiples of; null: 64 for a U-Net, 16 for a transformer.
        square: a centre crop to a square in place of aspect buckets.
        min_box: least area of a box, in shares of the picture's.
        min_visible: least share of a box that a crop has to leave.
        flip: probability of mirroring.
        text_tokens: to which captions are padded for T5; null: as the pipeline draws.
        workers: processes that read examples, for each process that trains; 0: none of their own.
        init_from: adapter to go on from; or null.
        batch_size: examples at a time in each process.
        accumulate: parts of a step, of `batch_size` each.
        processes: how many there are to be; null: as many as were started.
        shard: share weights, gradients and moments out over processes (FSDP2).
        gradient_checkpointing: compute blocks again in the backward pass in place of keeping what they made.
        loss: its weights.
        validation: what is drawn.
    """

    may_change: ClassVar[frozenset[str]] = RecipeConfig.may_change | {
        "batch_size",
        "accumulate",
        "processes",
        "workers",
        "allow_changed_data",
        "cache",
        "gradient_checkpointing",
        "validation",
    }

    base: Location
    base_dtype: Annotated[str, choice("auto", *DTYPES)] = "auto"
    base_quantization: Annotated[
        str, choice("none", *BYTES, aliases={None: "none", False: "none", "null": "none"})
    ] = "none"
    data: Annotated[list[SourceConfig], BeforeValidator(_sources)]
    allow_changed_data: Flag = False
    cache: Location
    resolution: Count
    multiple: OptionalCount = None
    square: Flag = False
    min_box: Share = 0.001
    min_visible: Share = 0.5
    flip: Share = 0.5
    text_tokens: OptionalCount = None
    workers: Whole = 2
    init_from: OptionalLocation = None
    batch_size: Count
    accumulate: Count = 1
    processes: OptionalCount = None
    shard: Flag = False
    gradient_checkpointing: Flag = False
    loss: LossConfig = Field(default_factory=LossConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)

    @model_validator(mode="after")
    def _fits_together(self) -> "PicturesConfig":
        if not self.data:
            raise ValueError("data: expected at least one data set, got none")
        self._check_folders()
        if self.lr_scheduler == "cosine_by_time" and world_size() > 1:  # each would go by a clock of its own
            raise ValueError(
                "lr_scheduler: expected one that goes by steps with several processes, got 'cosine_by_time'"
            )
        if self.mixed_precision == "no" and self.base_dtype not in ("auto", "float32"):
            raise ValueError(f"base_dtype: expected float32 with mixed_precision=no, got {self.base_dtype!r}")
        if self.shard and self.optimizer != "adamw":
            raise ValueError(f"optimizer: expected adamw with shard=true, got {self.optimizer!r}")
        if self.shard and self.mixed_precision == "fp16":
            raise ValueError("mixed_precision: expected bf16 or no with shard=true, got 'fp16'")
        return self

    def _check_folders(self) -> None:
        """Refuse to write among the pictures, or to read them where a run removes what it wrote."""
        folders = [one.path for one in self.data]
        folders += [] if self.validation.data is None else [self.validation.data]
        for data in folders:
            read, output = Path(data).resolve(), Path(self.output_dir).resolve()
            for key in ("output_dir", "export_to"):
                if Path(written := getattr(self, key)).resolve().is_relative_to(read):
                    raise ValueError(f"{key}: expected a folder outside of the data {data}, got {written}")
            if read.is_relative_to(output):
                first = read.relative_to(output).parts[0]
                if first == SAMPLES or first.lstrip(".").startswith(CHECKPOINT):
                    raise ValueError(f"data: expected a folder that is not a run's {first}, got {data}")

    @property
    def global_batch(self) -> int:
        """Examples of a step, of all processes and parts."""
        return self.batch_size * self.accumulate * world_size()

    def to_json(self) -> dict[str, Any]:
        """As a checkpoint has it, with the global batch, which must not change when a run goes on."""
        return super().to_json() | {"global_batch": self.global_batch}
