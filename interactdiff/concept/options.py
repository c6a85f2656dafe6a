"""How concepts are learned. Each published behaviour that is a bug is an option, off by default."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import inf
from typing import Any, get_args

from interactdiff.concept.config import PROJECTIONS, Acts
from interactdiff.concept.denoising import TRAIN_STEPS
from interactdiff.concept.finding import Looking
from interactdiff.concept.masks import MaskSettings
from interactdiff.concept.words import MAX_SEED, MAX_VECTORS, PREFIX, ConceptError, check_range

USUAL = {
    "learning_rate": 1e-4,
    "token_learning_rate": 1e-3,
    "max_timestep": TRAIN_STEPS,
    "prefix": PREFIX,
}
"""Options whose default is what suits the base: their values for bases of which nothing is known."""
PARSED = (bool, int, float, str)  # types of options that a command line can give
WITH_FLAGS = ("steps", "vectors", "seed", "sample_every")  # that have one of their own there
WHOLE_NUMBERS = {
    "steps": (1, inf),
    "batch_size": (1, inf),
    "rank": (0, inf),
    "vectors": (1, MAX_VECTORS),
    "refresh_every": (0, inf),
    "prior_pictures": (0, inf),
    "max_timestep": (1, TRAIN_STEPS),
    "seed": (0, MAX_SEED),
    "checkpoint_every": (0, inf),
    "sample_every": (0, inf),
}
NUMBERS = {
    "learning_rate": (0, inf),
    "token_learning_rate": (0, inf),
    "weight_decay": (0, inf),
    "attention_weight": (0, inf),
    "full_image_weight": (0, 1),
    "joint_share": (0, 1),
    "least_overlap": (0, 1),
    "prior_weight": (0, inf),
}


@dataclass(frozen=True)
class LearnOptions:
    """Options of `learn`.

    Attributes:
        steps: of training.
        batch_size: noised copies of the photo in a step, at noise levels spread evenly.
        learning_rate: of keys and values; None for what suits the base: of a packaged model by measurement,
            of others as in `USUAL`.
        token_learning_rate: of the tokens' embeddings; None likewise.
        max_timestep: of 1000, up to which the photo is noised; None likewise. Below 1000 steps are spent on
            looks rather than on pose and layout, which much noise decides and which new pictures have of
            their own.
        weight_decay: of keys and values; tokens have none.
        projections: of text that are changed: "kv", "k", "v" or "none".
        rank: of the changes; 0 for whole matrices.
        acts_on: the rows of the text that are changed, see `ConceptConfig`.
        vectors: embeddings for each token.
        attention_loss: "normalised" (ours), "published" or "none".
        attention_weight: of that loss.
        full_image_weight: share of the denoising error over the whole picture, in [0, 1]; the published code
            has 0.5.
        prefix: of prompts that name some of the concepts; None for what suits the base, else "a photo of ".
        sampling: of concepts for each step: "uniform" over all subsets, or "reweighted", which draws those
            alone more often that attention finds less well.
        joint_share: of the steps, with all concepts, where sampling is reweighted; in [0, 1].
        refresh_every: steps between looks at the photo for better masks; 0 keeps the first ones.
        least_overlap: IoU with the last masks that better ones have, for each concept; in [0, 1].
        looking: how the photo is looked at.
        prior_pictures: of the base's own for `prior_prompt`, on which it has to stay as it is; 0 for none.
        prior_prompt: what they show.
        prior_weight: of that loss.
        mixed_precision: "no" or "bf16"; what is trained stays in float32.
        seed: of everything that is drawn, 0 to 4294967295.
        checkpoint_every: steps between checkpoints; 0 for none but that of an interruption.
        sample_every: steps between sample grids; 0 for none.
        size: side in pixels; None for the model's own.
        published_error: masks enter squared and enlarged by bicubic interpolation, channels are summed, and
            the divisor is the picture's area.
        published_refresh: masks are looked for at one noise level of all, and taken if SSIM says that they
            are like the last ones.
        freeze_last_token: the last concept's embedding gets no gradient.
        detach_start: the keys and values of the text's first token are constants, as in Custom Diffusion.
    """

    steps: int = 500
    batch_size: int = 1
    learning_rate: float | None = None
    token_learning_rate: float | None = None
    max_timestep: int | None = None
    weight_decay: float = 1e-2
    projections: str = "kv"
    rank: int = 0
    acts_on: Acts = "own"
    vectors: int = 1
    attention_loss: str = "normalised"
    attention_weight: float = 0.02
    full_image_weight: float = 0.0
    prefix: str | None = None
    sampling: str = "uniform"
    joint_share: float = 1 / 3
    refresh_every: int = 50
    least_overlap: float = 0.7
    looking: Looking = field(default_factory=Looking)
    prior_pictures: int = 0
    prior_prompt: str = "a photo"
    prior_weight: float = 1.0
    mixed_precision: str = "no"
    seed: int = 0
    checkpoint_every: int = 100
    sample_every: int = 0
    size: int | None = None
    published_error: bool = False
    published_refresh: bool = False
    freeze_last_token: bool = False
    detach_start: bool = False

    def __post_init__(self) -> None:
        for name, known in (
            ("attention_loss", ("normalised", "published", "none")),
            ("projections", PROJECTIONS),
            ("acts_on", get_args(Acts)),
            ("sampling", ("uniform", "reweighted")),
            ("mixed_precision", ("no", "bf16")),
        ):
            if getattr(self, name) not in known:
                raise ConceptError(f"expected {name} of {', '.join(known)}, got {getattr(self, name)!r}")
        for name, (low, high) in {**WHOLE_NUMBERS, **NUMBERS}.items():
            if name not in USUAL or getattr(self, name) is not None:
                check_range(name, getattr(self, name), low, high, whole=name in WHOLE_NUMBERS)
        if self.size is not None:
            check_range("size", self.size, 1, whole=True)
        if self.prior_pictures and self.acts_on == "own":
            raise ConceptError(
                "expected acts_on 'all' with prior_pictures, got 'own', which changes no prompt without a "
                "concept"
            )

    @property
    def needs_masks(self) -> bool:
        """Whether any loss reads them."""
        return self.attention_loss != "none" or self.full_image_weight < 1

    def suited(self, own: Mapping[str, int | float | str]) -> "LearnOptions":
        """The same without None of `USUAL`: what is given, else a base's own, else the usual values."""
        values: dict[str, Any] = {**USUAL, **own}
        return replace(self, **{name: value for name, value in values.items() if getattr(self, name) is None})

    @classmethod
    def parsed(
        cls, texts: Sequence[str], flags: Collection[str] = WITH_FLAGS, without: Collection[str] = ()
    ) -> dict[str, Any]:
        """Options of the command line, "name=value" each, as keyword arguments.

        Args:
            texts: as they were typed.
            flags: options that have a flag of their own there.
            without: options that mean nothing there.

        Raises:
            ConceptError: there is no such option, it has a flag of its own, or its value is of another type.
        """
        own = [one for one in fields(cls) if one.name not in (*flags, *without)]
        kinds = {one.name: type(USUAL.get(one.name, one.default)) for one in own}
        simple = {name: kind for name, kind in kinds.items() if kind in PARSED}
        values: dict[str, Any] = {}
        for text in texts:
            name, _, value = text.partition("=")
            if name in flags:
                raise ConceptError(f"expected --{name.replace('_', '-')} for {name}, got {text!r} of --set")
            kind = simple.get(name)
            if kind is None:
                raise ConceptError(f"expected an option of {', '.join(simple)}, got {text!r}")
            if kind is bool:
                kind = {"true": True, "false": False}.__getitem__
            try:
                values[name] = kind(value)  # type: ignore[operator]
            except (ValueError, KeyError):
                like = USUAL.get(name, getattr(cls, name))
                raise ConceptError(f"expected {name} like {like!r}, got {value!r}") from None
        return values

    @classmethod
    def published(cls, **changes: Any) -> "LearnOptions":
        """What AttenCraft's released code does, bugs included, at its learning rate."""
        masks = MaskSettings(unassigned="ignore", minimum_area=0.0)
        options = cls(
            learning_rate=1e-4,
            token_learning_rate=1e-4,
            max_timestep=TRAIN_STEPS,
            prefix=PREFIX,
            acts_on="all",
            attention_loss="published",
            attention_weight=1.0,
            full_image_weight=0.5,
            refresh_every=20,
            least_overlap=0.8,
            looking=Looking(timesteps=(150,), masks=masks),
            prior_pictures=200,
            prior_prompt="a photo at the beach",
            published_error=True,
            published_refresh=True,
            freeze_last_token=True,
            detach_start=True,
        )
        return replace(options, **changes)

    @classmethod
    def custom_diffusion(cls, **changes: Any) -> "LearnOptions":
        """Custom Diffusion (arXiv 2212.04488): no masks in any loss, keys and values of all words."""
        options = cls(
            acts_on="all",
            attention_loss="none",
            full_image_weight=1.0,
            refresh_every=0,
            detach_start=True,
        )
        return replace(options, **changes)
