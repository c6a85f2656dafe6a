"""Which adapters a model gets, and loading them."""

from collections.abc import Mapping, Sequence
from typing import Any

from interactdiff.adapter import Adapter
from interactdiff.errors import AdapterError
from interactdiff.models import default_adapter, resolve
from interactdiff.registry import MethodSettings, adapter_method, methods
from interactdiff.scene_checks import shown

AdapterChoice = str | Adapter | None  # a name, a path or a Hub id; loaded; None: made without weights
GivenAdapters = Mapping[str, AdapterChoice] | Sequence[Adapter] | Adapter | str | None
UNNAMED = "an adapter given in Python"  # how a record names weights that it cannot find again


def chosen_adapters(
    model: str, given: GivenAdapters = None, used: MethodSettings | None = None
) -> dict[str, AdapterChoice]:
    """Which adapters a model is to have, by the name of their method.

    Args:
        model: packaged name, folder or Hub id.
        given: as `ScenePipeline.from_pretrained` takes them.
        used: the methods that are going to be used.

    Returns:
        Those that are given, by their names, and the packaged ones of the methods that are always attached
        or are used; None for one that needs no weights.

    Raises:
        SceneError: there is no such method.
        AdapterError: a method needs weights, and there are none.
    """
    chosen: dict[str, Any] = {}
    for name, spec in methods().items():
        own = default_adapter(model, name)
        if own is not None and (spec.always_attached or name in (used or {})):
            chosen[name] = own
        elif spec.adapter is not None and name in (used or {}):
            chosen[name] = None
    named = named_adapters(given)
    for name, at in named.items():
        method = adapter_method(name)
        if method not in methods() or methods()[method].adapter is None:
            known = ", ".join(name for name, spec in methods().items() if spec.adapter is not None)
            raise AdapterError(f"expected an adapter of {known}, got one of {shown(name)}")
        chosen[name] = chosen.get(name) if at is None else at
    for name, at in chosen.items():
        if at is None and methods()[adapter_method(name)].needs_weights:
            raise AdapterError(f"expected weights for {name}, got none for {model}: give an adapter for it")
    return chosen


def named_adapters(given: GivenAdapters) -> dict[str, AdapterChoice]:
    """Adapters by their names, whichever way they are given.

    Raises:
        AdapterError: they are given in none of the ways, or two of one method.
    """
    if given is None:
        return {}
    if isinstance(given, str):
        return {"interaction": given}
    if isinstance(given, Mapping):
        if all(at is None or isinstance(at, (str, Adapter)) for at in given.values()):
            return dict(given)
    elif isinstance(given, Adapter):
        return {given.name: given}
    elif isinstance(given, Sequence) and all(isinstance(one, Adapter) for one in given):
        if len({one.name for one in given}) < len(given):
            names = [one.name for one in given]
            raise AdapterError(f"expected adapters with a name each, see Adapter.named, got {names}")
        return {one.name: one for one in given}
    raise AdapterError(f"expected adapters by the name of their method, got {shown(given)}")


def load_adapters(chosen: Mapping[str, AdapterChoice]) -> dict[str, Adapter]:
    """Load those that are names.

    Raises:
        ModelError, AdapterError: as `ScenePipeline.from_pretrained` raises them.
    """
    loaded: dict[str, Any] = {}
    for name, at in chosen.items():
        if isinstance(at, str):
            adapter_class = methods()[adapter_method(name)].load_adapter_class()
            loaded[name] = adapter_class.from_pretrained(resolve("adapter", at))
        elif at is not None:
            loaded[name] = at
        if name in loaded and loaded[name].name != name and ":" in name:
            loaded[name].named(name.partition(":")[2])
    return loaded
