"""What a method declares: its settings, items, sampler, scores, recipes and commands.

Specs are imported without torch; what needs it is named as "module:attribute" and imported when it is used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from interactdiff.errors import InteractdiffError, SceneError
from interactdiff.scene_checks import Box, checked_number, checked_whole, shown

if TYPE_CHECKING:
    from PIL.Image import Image

    from interactdiff.generation import OnStep, ScenePipeline
    from interactdiff.scene import Scene


class MethodError(InteractdiffError):
    """A method that cannot be found or loaded."""


@dataclass(frozen=True)
class Setting:
    """A number that can be set of a method or a sampler.

    Attributes:
        name: as code has it.
        label: as people read it.
        default: its type is the setting's, int or float.
        minimum: the least value.
        maximum: the greatest value.
        description: one sentence.
        choices: the only values, if there are only some.
    """

    name: str
    label: str
    default: int | float
    minimum: int | float
    maximum: int | float
    description: str
    choices: tuple[int | float, ...] = ()

    def checked(self, value: Any) -> int | float:
        """The value as the setting's type.

        Raises:
            SceneError: it is of another type or out of range.
        """
        if isinstance(self.default, int):
            if isinstance(value, float) and value.is_integer():  # a slider's
                value = int(value)
            value = checked_whole(self.name, value, int(self.minimum), int(self.maximum))
        else:
            value = checked_number(self.name, value, self.minimum, self.maximum)
        if self.choices and value not in self.choices:
            raise SceneError(f"{self.name}: expected one of {', '.join(map(str, self.choices))}, got {value}")
        return value


@dataclass(frozen=True)
class Configurable:
    """What has a name that users type, a panel in the studio, and settings.

    Attributes:
        name: as code and command lines have it.
        title: as people read it.
        description: one or two sentences.
        settings: what can be set.
    """

    name: str
    title: str
    description: str
    settings: tuple[Setting, ...] = ()

    def checked(self, model: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """All settings: those that are given, and for the others what suits the model, or the defaults.

        Raises:
            SceneError: there is no such setting, or its value is out of range.
        """
        from interactdiff.models import model_info

        settings = {setting.name: setting for setting in self.settings}
        for name in values:
            if name not in settings:
                known = ", ".join(settings) or "none"
                raise SceneError(f"{self.name}: expected settings of {known}, got {shown(name)}")
        given = {name: setting.default for name, setting in settings.items()}
        given |= {**model_info(model).settings.get(self.name, {}), **values}
        try:
            return {name: settings[name].checked(value) for name, value in given.items()}
        except SceneError as error:
            raise SceneError(f"{self.name}, {error}") from None


@dataclass(frozen=True)
class ItemSpec:
    """A kind of item that a scene can hold.

    Attributes:
        type: a frozen dataclass that checks itself, with `parse(text)`, which reads the command line's form,
            `from_dict(values)` and `to_text()`. Its name in lower case is the command line's flag and what
            errors call an item. An attribute `box`, or any that ends in `_box`, is drawn over pictures.
        key: the list of such items in a scene file.
        form: of the command line, such as "PHRASE|BOX".
        description: one or two sentences, of the flag and of the studio's field.
        schema: the JSON Schema of an item in a scene file; {} says nothing of it.
        from_box: makes an item of a phrase and a box that are drawn on the studio's canvas; None if it takes
            more than that.
        from_picture: makes an item of a phrase, a picture, its mask or None and a box or None; None if it
            takes no picture. The studio then has fields for these. The item has a `phrase` and a `box`.
        preview: "module:attribute" of a function of such an item that returns its picture with what of it is
            not taken shaded, and one sentence about how that was found.
        most: of them in a scene; more are refused before any of them is read.
    """

    type: type
    key: str
    form: str
    description: str
    schema: Mapping[str, Any] = field(default_factory=dict, compare=False)
    from_box: Callable[[str, Box], Any] | None = None
    from_picture: Callable[[str, Any, Any, Box | None], Any] | None = None
    preview: str | None = None
    most: int | None = None

    @property
    def name(self) -> str:
        """What a single item is called: the flag without its dashes."""
        return self.type.__name__.lower()


@dataclass(frozen=True)
class Cost:
    """What a picture costs: pixels of the largest one generated on the way, and denoising steps in all."""

    pixels: int
    steps: int


@dataclass(frozen=True)
class EvaluationOptions:
    """What `interactdiff evaluate` is given.

    Attributes:
        scenes: how many.
        changes: of `--set`, "NAME=VALUE" each, for methods whose `scores_take_changes`.
        seed: which ones, and their noise.
        steps: denoising steps.
        batch_size: pictures at a time.
        guidance_scale: None for what suits the model.
        size: height and width in pixels; None for the model's own.
        rows: of the table; all of them where there are none.
        detector: a `stickworld.detector.Detector` that looks at the pictures; None for the packaged one.
        settings: those that are given, of the method's `score_settings`.
    """

    scenes: int
    changes: tuple[str, ...] = field(default=(), kw_only=True)
    seed: int
    steps: int
    batch_size: int
    guidance_scale: float | None = None
    size: int | None = None
    rows: tuple[str, ...] = ()
    detector: Any = None
    settings: Mapping[str, int | float] = field(default_factory=dict)


class Sampler(Protocol):
    """Generates a picture in a way of its own, in place of one call of the pipeline."""

    def unsupported(self, pipeline: Any) -> str | None:
        """Why the sampler cannot work with a diffusers pipeline, in words; None if it can."""
        ...

    def cost(self, pipeline: "ScenePipeline", settings: dict[str, Any], scene: "Scene") -> Cost:
        """What `generate` will cost.

        Raises:
            SceneError: the settings do not fit each other or the scene.
        """
        ...

    def generate(
        self, pipeline: "ScenePipeline", settings: dict[str, Any], scene: "Scene", on_step: "OnStep | None"
    ) -> "Image":
        """Generate a scene that `pipeline.set_scene` has taken."""
        ...


@dataclass(frozen=True)
class SamplerSpec(Configurable):
    """A way of sampling; one picture has at most one.

    Attributes:
        sampler: "module:attribute" of a `Sampler`.
    """

    sampler: str = ""

    def load(self) -> Sampler:
        """The sampler itself."""
        return load_attribute(self.sampler)


@dataclass(frozen=True)
class ExportSpec:
    """A form in which `interactdiff convert --export NAME` writes an adapter.

    Attributes:
        name: as command lines have it.
        description: what is written, in a few words.
        export: "module:attribute" of a function of the source, as `Adapter.from_pretrained` takes it, the
            folder to write, and the model that the adapter is for, as `--model` names it, or None. It returns
            what it did, in one line.
    """

    name: str
    description: str
    export: str


@dataclass(frozen=True)
class MethodSpec(Configurable):
    """A method: an adapter and what users say to it.

    Attributes:
        adapter: "module:attribute" of an `interactdiff.adapter.Adapter`; None for a method that is a sampler
            alone.
        items: what the adapter takes of a scene.
        settings: as of any `Configurable`; the binding takes them by `configure(**settings)`.
        needs_weights: whether the adapter has to be loaded; else `for_denoiser` makes one that works.
        always_attached: whether a packaged model's packaged adapter is attached by default. It
            has to be idle, bit for bit, until a scene has an item for it.
        sampler: a way of sampling that comes with the method.
        scores: "module:attribute" of a function of a `ScenePipeline` and `EvaluationOptions` that returns
            {score: number}, or {"rows": {row: {score: number}}, ...}; `interactdiff evaluate --NAME` prints
            them.
        scores_need_adapter: whether that function is given a pipeline with the method's adapter.
        score_settings: what `evaluate --NAME --method NAME:SETTING=X` may set: of the method, or of how it
            is scored.
        recipes: names that a recipe's YAML file may have, and their "module:attribute": a class with a
            `config_type` (`training/recipe.py`, `training/config.py`).
        benches: modules with an `add_to(parsers)`, which `interactdiff bench` adds.
        commands: modules with an `add_to(commands)`, which `interactdiff` adds.
        exports: what `interactdiff convert --export NAME` can make of an adapter's files.
        scores_take_changes: whether `evaluate --NAME` takes `--set`, whose values `scores` reads.
    """

    adapter: str | None = None
    items: tuple[ItemSpec, ...] = ()
    needs_weights: bool = True
    always_attached: bool = False
    sampler: SamplerSpec | None = None
    scores: str | None = None
    scores_need_adapter: bool = True
    score_settings: tuple[Setting, ...] = ()
    recipes: Mapping[str, str] = field(default_factory=dict)
    benches: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    exports: tuple[ExportSpec, ...] = ()
    scores_take_changes: bool = False

    def load_adapter_class(self) -> Any:
        """The class of the method's adapters.

        Raises:
            MethodError: the method has none.
        """
        if self.adapter is None:
            raise MethodError(f"expected a method with an adapter, got {self.name}, which has none")
        return load_attribute(self.adapter)


def load_attribute(path: str) -> Any:
    """Import what "module:attribute" names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
