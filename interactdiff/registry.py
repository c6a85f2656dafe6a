"""The methods that there are: found, not listed.

A method is a folder of the package with a module `spec` in it, or an entry point of another package in the
group `interactdiff.methods`, that holds `SPEC = MethodSpec(...)`. The command line, the studio, scene files,
recipes, scores and benches take what they offer from here. Specs are imported without torch; what needs it is
named as "module:attribute" and imported when it is used.
"""

import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, partial
from importlib import import_module, metadata
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from typing import TYPE_CHECKING, Any, Protocol

from interactdiff.errors import InteractdiffError, SceneError
from interactdiff.scene_checks import Box, checked_number, checked_whole, shown

if TYPE_CHECKING:
    from PIL.Image import Image

    from interactdiff.generation import OnStep, ScenePipeline
    from interactdiff.scene import Scene

ENTRY_POINTS = "interactdiff.methods"
MethodSettings = Mapping[str, Mapping[str, Any]]
"""The methods and the sampler that are used, by name, each with settings; the others have their defaults."""


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
    """

    type: type
    key: str
    form: str
    description: str
    schema: Mapping[str, Any] = field(default_factory=dict, compare=False)
    from_box: Callable[[str, Box], Any] | None = None
    from_picture: Callable[[str, Any, Any, Box | None], Any] | None = None
    preview: str | None = None

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
        seed: which ones, and their noise.
        steps: denoising steps.
        batch_size: pictures at a time.
        guidance_scale: None for what suits the model.
        size: height and width in pixels; None for the model's own.
        rows: of the table; all of them where there are none.
        detector: a `stickworld.detector.Detector` that looks at the pictures; None for the packaged one.
    """

    scenes: int
    seed: int
    steps: int
    batch_size: int
    guidance_scale: float | None = None
    size: int | None = None
    rows: tuple[str, ...] = ()
    detector: Any = None


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
        recipes: names that a recipe's YAML file may have, and their "module:attribute": a class with a
            `config_type` (`training/recipe.py`, `training/config.py`).
        benches: modules with an `add_to(parsers)`, which `interactdiff bench` adds.
        commands: modules with an `add_to(commands)`, which `interactdiff` adds.
        exports: what `interactdiff convert --export NAME` can make of an adapter's files.
    """

    adapter: str | None = None
    items: tuple[ItemSpec, ...] = ()
    needs_weights: bool = True
    always_attached: bool = False
    sampler: SamplerSpec | None = None
    scores: str | None = None
    scores_need_adapter: bool = True
    recipes: Mapping[str, str] = field(default_factory=dict)
    benches: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    exports: tuple[ExportSpec, ...] = ()

    def load_adapter_class(self) -> Any:
        """The class of the method's adapters.

        Raises:
            MethodError: the method has none.
        """
        if self.adapter is None:
            raise MethodError(f"expected a method with an adapter, got {self.name}, which has none")
        return load_attribute(self.adapter)


def adapter_method(name: str) -> str:
    """The method of an adapter's name, which may be one of several of that method: "concept:cat"."""
    return name.partition(":")[0]


def load_attribute(path: str) -> Any:
    """Import what "module:attribute" names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def checked_settings(model: str, used: MethodSettings) -> dict[str, dict[str, Any]]:
    """All settings of methods and a sampler, for a model.

    Raises:
        SceneError: there is no such method, sampler or setting, a value is out of range, or there are two
            samplers.
    """
    known, settings = configurables(), {}
    for name, values in used.items():
        if name not in known:
            raise SceneError(f"method: expected one of {', '.join(known)}, got {shown(name)}")
        if not isinstance(values, Mapping):
            raise SceneError(f"{name}: expected settings by their names, got {shown(values)}")
        settings[name] = known[name].checked(model, values)
    if len(several := [name for name in settings if name in samplers()]) > 1:
        raise SceneError(f"method: expected one sampler at most, got {' and '.join(several)}")
    return settings


@cache
def methods() -> dict[str, MethodSpec]:
    """All methods by name: those in the package's folders, then those of other packages.

    Raises:
        MethodError: a spec cannot be imported, or two methods claim the same name.
    """
    from interactdiff.scene import Scene

    found: dict[str, MethodSpec] = {}
    own = {field.name for field in fields(Scene)} - {"interactions", "entities"}
    claimed = {f"the scene's key {name}": "interactdiff.scene" for name in own}
    for origin, load in _spec_loaders():
        try:
            spec = load()
        except Exception as error:  # any package may be the cause, and any of its errors
            raise MethodError(f"expected a SPEC in {origin}, got {type(error).__name__}: {error}") from error
        if not isinstance(spec, MethodSpec):
            raise MethodError(f"expected {origin} to hold a MethodSpec, got {shown(spec)}")
        for name in _claims(spec):
            if name in claimed:
                raise MethodError(f"expected one method with {name}, got it in {claimed[name]} and {origin}")
            claimed[name] = origin
        found[spec.name] = spec
    return found


def samplers() -> dict[str, SamplerSpec]:
    """All samplers by name."""
    return {spec.sampler.name: spec.sampler for spec in methods().values() if spec.sampler is not None}


def configurables() -> dict[str, Configurable]:
    """What can be switched on or set: methods with adapters, but for those always attached, and samplers."""
    found: dict[str, Configurable] = {}
    for name, spec in methods().items():
        if spec.adapter is not None and (spec.settings or not spec.always_attached):
            found[name] = spec
    return {**found, **samplers()}


def used_methods(scene: "Scene", given: MethodSettings | None = None) -> dict[str, Mapping[str, Any]]:
    """The methods that are given, and those that a scene controls or has items for, with their settings.

    What is given comes before the scene's own settings.
    """
    used: dict[str, Mapping[str, Any]] = dict(scene.controls or {})
    for name, values in (given or {}).items():
        used[name] = {**used.get(name, {}), **values} if isinstance(values, Mapping) else values
    for item in scene.items:
        name, _ = method_of(type(item))
        if name in configurables():
            used.setdefault(name, {})
    return used


def item_specs() -> dict[str, ItemSpec]:
    """All kinds of items by their key in a scene file."""
    return {item.key: item for spec in methods().values() for item in spec.items}


def method_of(kind: type) -> tuple[str, ItemSpec]:
    """The name of the method that takes a kind of item, and the spec of the kind.

    Raises:
        SceneError: no method takes such items.
    """
    for name, method in methods().items():
        for spec in method.items:
            if spec.type is kind:
                return name, spec
    known = ", ".join(spec.type.__name__ for spec in item_specs().values())
    raise SceneError(f"expected items of {known}, got {kind.__name__}")


def exports() -> dict[str, ExportSpec]:
    """All methods' forms of export by name."""
    return {one.name: one for spec in methods().values() for one in spec.exports}


def recipes() -> dict[str, str]:
    """All methods' recipes: names, and the "module:attribute" of their classes."""
    return {name: path for spec in methods().values() for name, path in spec.recipes.items()}


def _spec_loaders() -> list[tuple[str, Callable[[], Any]]]:
    """Where specs are, and what imports them."""
    import interactdiff

    loaders: list[tuple[str, Callable[[], Any]]] = []
    for folder in pkgutil.iter_modules(interactdiff.__path__):
        package = folder.module_finder.find_spec(folder.name, None) if folder.ispkg else None
        name = f"interactdiff.{folder.name}.spec"
        found = None if package is None else PathFinder.find_spec(name, package.submodule_search_locations)
        if found is not None:
            loaders.append((name, partial(_load_spec, found)))
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        loaders.append((entry.value, entry.load))
    return loaders


def _load_spec(found: ModuleSpec) -> Any:
    """Import a folder's `spec` but not its `__init__`, which may import torch."""
    if found.name not in sys.modules:
        module = module_from_spec(found)
        assert found.loader is not None
        sys.modules[found.name] = module
        try:
            found.loader.exec_module(module)
        except BaseException:
            del sys.modules[found.name]
            raise
    return sys.modules[found.name].SPEC  # type: ignore[attr-defined]


def _claims(spec: MethodSpec) -> list[str]:
    """What of a method must be its own."""
    claims = [f"the name {spec.name}", *(f"the recipe {name}" for name in spec.recipes)]
    claims += [f"the export {one.name}" for one in spec.exports]
    if spec.sampler is not None:
        claims.append(f"the name {spec.sampler.name}")
    for item in spec.items:
        claims += [f"the scene's key {item.key}", f"the flag --{item.name}"]
    return claims
