"""What a recipe's configuration may hold: typed keys, checked before anything is loaded.

Each recipe has a `RecipeConfig` of its own. Values are read as people type them (`3e-3`, `inf`,
`mixed_precision=no`), and a wrong one is refused in one sentence that names the key, what was expected, and
the nearest known word.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from inspect import signature
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from torch import nn

from interactdiff.errors import RecipeError

MAX_SEED = 2**32 - 1  # numpy's
C = TypeVar("C", bound="Keys")
SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
PRECISIONS = ("no", "fp16", "bf16", "auto")


def computes_in_bfloat16() -> bool:
    """Whether the device that trains has instructions for bfloat16; without them it is many times slower."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")


def _chosen_precision(name: str) -> str:
    if name != "auto":
        return name
    return "bf16" if computes_in_bfloat16() else "no"


def nearest(word: object, known: Iterable[str]) -> str:
    """ ": did you mean X?", or nothing if no known word is near."""
    close = get_close_matches(str(word).lower(), list(known), 1)
    return f": did you mean {close[0]}?" if close else ""


def refusal(expected: str, got: object, hint: str = "") -> ValueError:
    """What validators raise."""
    text = repr(got)
    return ValueError(f"expected {expected}, got {text if len(text) <= 80 else text[:77] + '...'}{hint}")


def number(expected: str, low: float, high: float = math.inf, *, infinite: bool = False) -> BeforeValidator:
    """Reads a number, or text that is one: YAML 1.1 takes `3e-3` for text. Yes and no are no numbers.

    Args:
        expected: what an error calls it; "a whole number ..." has no fraction.
        low: the least.
        high: the greatest.
        infinite: whether infinity is one.
    """
    whole = expected.startswith("a whole number")

    def read(value: Any) -> Any:
        got = _number_in(value) if isinstance(value, str) else value
        if isinstance(got, bool) or not isinstance(got, int | float) or not low <= got <= high:
            raise refusal(expected, value)  # nan is not within any limits
        if math.isinf(got) and infinite:
            return got
        if math.isinf(got) or (whole and got != int(got)):
            raise refusal(expected, value)
        return int(got) if whole else got

    return BeforeValidator(read)


def _number_in(text: str) -> int | float | None:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return None


def choice(*known: str, aliases: Mapping[Any, str] | None = None) -> BeforeValidator:
    """Reads one of some words, in any case; `aliases` are other names for them."""

    def read(value: Any) -> str:
        word = value.strip().lower() if isinstance(value, str) else value
        for name, meant in (aliases or {}).items():
            if type(name) is type(word) and name == word:
                return meant
        if word not in known:
            raise refusal(f"{', '.join(known[:-1])} or {known[-1]}", value, nearest(word, known))
        return word

    return BeforeValidator(read)


def _location(value: Any) -> str:
    if not isinstance(value, str | int | float | os.PathLike) or isinstance(value, bool) or value == "":
        raise refusal("a path or a name", value)
    return os.path.normpath(os.path.expanduser(str(value)))


_FLAGS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


def _flag(value: Any) -> bool:
    if isinstance(value, str | int) and (known := _FLAGS.get(str(value).strip().lower())) is not None:
        return known
    raise refusal("true or false", value)


def nothing(value: Any) -> Any:
    """None for what people write for null, else the value."""
    return None if isinstance(value, str) and value.strip().lower() in ("", "none", "null", "~") else value


def _pair(value: Any) -> Any:
    value = nothing(value)
    if value is None or (isinstance(value, list | tuple) and len(value) == 2):
        return value
    raise refusal("two numbers, a mean and a deviation, or null", value)


Count = Annotated[int, number("a whole number from 1 up", 1)]
Whole = Annotated[int, number("a whole number from 0 up", 0)]
Seed = Annotated[int, number(f"a whole number from 0 to {MAX_SEED}", 0, MAX_SEED)]
Rate = Annotated[float, number("a number from 0 up", 0)]
Positive = Annotated[float, number("a number above 0", math.ulp(0.0))]
Number = Annotated[float, number("a number", -math.inf)]
Limit = Annotated[
    float,
    number("a number from 0 up, or inf", 0, infinite=True),
    BeforeValidator(lambda value: math.inf if nothing(value) is None else value),
]
Share = Annotated[float, number("a number from 0 to 1", 0, 1)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Location = Annotated[str, BeforeValidator(_location)]
OptionalCount = Annotated[Count | None, BeforeValidator(nothing)]
OptionalLocation = Annotated[Location | None, BeforeValidator(nothing)]
OptionalText = Annotated[str | None, BeforeValidator(nothing)]
MeanAndDeviation = Annotated[tuple[Number, Rate] | None, BeforeValidator(_pair)]


def arguments_of(make: Callable[..., nn.Module], known: Iterable[str]) -> AfterValidator:
    """Checks the arguments of a model's class by building the model on torch's meta device.

    Args:
        make: builds the model.
        known: the names of its arguments.
    """

    def check(value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name not in known:
                raise refusal("an argument of the model", name, nearest(name, known))
        try:
            with torch.device("meta"):
                make(**value)
        except Exception as error:  # whatever a model's class raises on arguments that do not fit together
            reason = " ".join(str(error).split())
            raise ValueError(
                f"expected arguments that fit together, got {type(error).__name__}: {reason}"
            ) from None
        return value

    return AfterValidator(check)


def arguments_named(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's or a class's arguments."""
    return tuple(name for name in signature(function).parameters if name != "self")


class Keys(BaseModel):
    """Keys of a configuration or of a part of it; others are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=True, ser_json_inf_nan="strings")


class RecipeConfig(Keys):
    """The keys that all recipes share.

    Attributes:
        recipe: its name.
        output_dir: where checkpoints, samples and the log are written.
        export_to: where the trained model is written.
        seed: of weights, batches and noise.
        steps: for which the learning rate is planned.
        optimizer: "adamw", "muon", or "adamw8bit" or "prodigy", whose packages are optional.
        learning_rate: at its height.
        warmup_steps: over which it rises.
        lr_scheduler: of `diffusers.optimization`; "cosine_by_time" plans for `stop_after` instead of `steps`,
            and such runs do not repeat bit for bit.
        weight_decay: decoupled.
        max_grad_norm: to which gradients are clipped.
        mixed_precision: "no", "fp16" (on a GPU) or "bf16"; "auto" is "bf16" where the device has instructions
            for it, else "no".
        ema_decay: of the average of the weights that is sampled and exported; 0: no average is kept.
        log_every: steps.
        checkpoint_every: steps.
        checkpoints_total_limit: how many checkpoints are kept.
        sample_every: steps.
        stop_after: minutes after which a run ends early at a checkpoint.
        stop_at: step at which it does.
        tracker: one that accelerate knows, such as "tensorboard" or "wandb", beside `log.jsonl`; or null.
    """

    may_change: ClassVar[frozenset[str]] = frozenset(
        {"output_dir", "export_to", "cache_dir", "steps", "stop_after", "stop_at", "compile", "held_out"}
        | {
            "log_every",
            "checkpoint_every",
            "checkpoints_total_limit",
            "sample_every",
            "sample_steps",
            "tracker",
        }
    )
    """Keys that may be others when a run is resumed: none of them changes what a step computes, but `steps`
    under a linear, cosine or polynomial schedule, whose learning rates are planned for them."""

    recipe: str
    output_dir: Location
    export_to: Location
    seed: Seed
    steps: Count
    optimizer: Annotated[str, choice("adamw", "muon", "adamw8bit", "prodigy")]
    learning_rate: Rate
    warmup_steps: Whole
    lr_scheduler: Annotated[str, choice(*SCHEDULERS, "cosine_by_time")]
    weight_decay: Rate
    max_grad_norm: Limit
    mixed_precision: Annotated[
        str,
        choice(
            *PRECISIONS,
            aliases={False: "no", None: "no", "none": "no", "float32": "no", "fp32": "no"}
            | {"float16": "fp16", "half": "fp16", "bfloat16": "bf16"},
        ),
        AfterValidator(_chosen_precision),
    ]
    ema_decay: Share
    log_every: Count
    checkpoint_every: Count
    checkpoints_total_limit: Count
    sample_every: Count
    stop_after: Limit = math.inf
    stop_at: Limit = math.inf
    tracker: OptionalText = None

    @model_validator(mode="after")
    def _time_to_plan_for(self) -> "RecipeConfig":
        if self.lr_scheduler == "cosine_by_time" and not 0 < self.stop_after < math.inf:
            raise ValueError(
                f"stop_after: expected minutes for lr_scheduler=cosine_by_time, got {self.stop_after}"
            )
        return self

    def to_json(self) -> dict[str, Any]:
        """As a checkpoint has it."""
        return self.model_dump(mode="json")

    def check_resumes(self, saved: Mapping[str, Any], where: object) -> None:
        """Make sure that a run under another configuration can go on under this one.

        Args:
            saved: the other one, from `to_json`.
            where: what an error calls it.

        Raises:
            RecipeError: naming the first key that must not change.
        """
        mine, saved = self.to_json(), self._completed(saved)
        for key in [*mine, *(key for key in saved if key not in mine)]:
            if key not in self.may_change and mine.get(key) != saved.get(key):
                of, wanted, got = _difference(key, saved.get(key), mine.get(key))
                raise RecipeError(f"expected {of} to be {wanted!r} as in {where}, got {got!r}")

    def _completed(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        """A saved configuration with the defaults of keys that are newer than it."""
        own = {key: value for key, value in saved.items() if key in type(self).model_fields}
        try:
            return {**saved, **type(self).model_validate(own).model_dump(mode="json")}
        except ValidationError:  # of another recipe, or with values that are none any more
            return saved


def _difference(key: str, saved: Any, mine: Any) -> tuple[str, Any, Any]:
    """The key within nested ones that differs, and its values."""
    if isinstance(saved, dict) and isinstance(mine, dict):
        name = next(name for name in [*saved, *mine] if saved.get(name) != mine.get(name))
        return _difference(f"{key}.{name}", saved.get(name), mine.get(name))
    return key, saved, mine


def checked(kind: type[C], values: Mapping[str, Any], where: str = "the recipe's file") -> C:
    """The configuration that some values make.

    Args:
        kind: its class.
        values: by key.
        where: what an error calls the place that they come from.

    Raises:
        RecipeError: the first thing that is wrong, in one sentence.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as refused:
        # a key that is misspelt is missing too
        order = {"extra_forbidden": 0, "missing": 2}
        error = min(refused.errors(include_url=False), key=lambda one: order.get(one["type"], 1))
    place = ".".join(str(name) for name in error["loc"] if name != "[key]")
    kind_of_error = error["type"]
    if kind_of_error in ("extra_forbidden", "invalid_key"):
        known = _keys_at(kind, error["loc"])
        near = nearest(error["loc"][-1], known) or f": there are {', '.join(known)}"
        raise RecipeError(f"expected a key of {where}, got {place!r}{near}")
    if kind_of_error == "missing":
        raise RecipeError(f"expected the key {place} in {where}, got none")
    if kind_of_error == "value_error":
        said = str(error.get("ctx", {})["error"])
    else:
        expected = error["msg"].removeprefix("Input should be ").partition(" or instance of ")[0]
        said = str(refusal(expected, error["input"]))
    raise RecipeError(f"{place}: {said}" if place else said)


def _keys_at(kind: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """The keys that could stand where a superfluous one does."""
    for name in place[:-1]:
        field = kind.model_fields.get(str(name))
        inner = field.annotation if field is not None else None
        parts = [inner, *getattr(inner, "__args__", ())]
        kinds = [one for one in parts if isinstance(one, type) and issubclass(one, BaseModel)]
        kind = kinds[0] if kinds else kind
    return list(kind.model_fields)
