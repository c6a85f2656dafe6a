"""The methods that there are: found, not listed.

A method is a folder of the package with a module `spec` in it, or an entry point of another package in the
group `interactdiff.methods`, that holds `SPEC = MethodSpec(...)`. The command line, the studio, scene files,
recipes, scores and benches take what they offer from here.
"""

import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache, partial
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from typing import TYPE_CHECKING, Any

from interactdiff.errors import SceneError
from interactdiff.method_specs import (
    Configurable,
    ExportSpec,
    ItemSpec,
    MethodError,
    MethodSpec,
    SamplerSpec,
)
from interactdiff.scene_checks import shown

if TYPE_CHECKING:
    from interactdiff.scene import Scene

ENTRY_POINTS = "interactdiff.methods"
MethodSettings = Mapping[str, Mapping[str, Any]]
"""The methods and the sampler that are used, by name, each with settings; the others have their defaults."""


def adapter_method(name: str) -> str:
    """The method of an adapter's name, which may be one of several of that method: "concept:cat"."""
    return name.partition(":")[0]


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
