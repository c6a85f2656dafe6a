"""Methods that draw beside interactions, and what can be set of them: found in the package, not listed.

A method is a module named `method` of one of the package's folders, with a `METHOD` in it. The command line
and the studio offer whatever is there.
"""

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from interactdiff.scene import Scene, SceneError
from interactdiff.scene_checks import checked_number, checked_whole, shown

if TYPE_CHECKING:
    from PIL.Image import Image

    from interactdiff.generate import Drawer, OnStep

Asked = Mapping[
    str, Mapping[str, Any]
]  # of each method that is to be used, its settings; the rest are defaults


@dataclass(frozen=True)
class Setting:
    """One thing that can be set of a method.

    Attributes:
        name: as code has it.
        label: as people read it.
        default: whose type is the setting's, int or float.
        minimum: the least value.
        maximum: the greatest value.
        about: one sentence.
        choices: the only values, if there are only some.
    """

    name: str
    label: str
    default: int | float
    minimum: int | float
    maximum: int | float
    about: str
    choices: tuple[int | float, ...] = ()

    def checked(self, value: Any) -> int | float:
        """The value, or an error in one sentence.

        Raises:
            SceneError: it is not such a value.
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
class Work:
    """What a picture costs: pixels of the largest one drawn on the way, and denoising steps in all."""

    pixels: int
    steps: int


@dataclass(frozen=True)
class Method:
    """A way of drawing that a front end can offer.

    Attributes:
        name: as code has it.
        title: as people read it.
        about: one or two sentences.
        settings: what can be set.
        suited: values that suit a packaged model better than the defaults, by its name.
        why_not: of a pipeline, why the method is not for it, in words; None if it is.
        draw: draws a scene, by the drawer, settings and the way of drawing without this method.
        work: what that costs.
    """

    name: str
    title: str
    about: str
    settings: tuple[Setting, ...]
    why_not: Callable[[Any], str | None]
    draw: Callable[["Drawer", dict[str, Any], "Draw", Scene, "OnStep | None"], "Image"]
    work: Callable[["Drawer", dict[str, Any], Scene], Work]
    suited: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def checked(self, model: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """All settings: those that are given, and what suits the model for the others.

        Raises:
            SceneError: there is no such setting, or its value is out of range.
        """
        settings = {setting.name: setting for setting in self.settings}
        for name in values:
            if name not in settings:
                raise SceneError(
                    f"{self.name}: expected settings of {', '.join(settings)}, got {shown(name)}"
                )
        given = {name: setting.default for name, setting in settings.items()}
        given |= {**self.suited.get(model, {}), **values}
        try:
            return {name: settings[name].checked(value) for name, value in given.items()}
        except SceneError as error:
            raise SceneError(f"{self.name}, {error}") from None


Draw = Callable[[Scene, "OnStep | None"], "Image"]


@cache
def methods() -> dict[str, Method]:
    """All methods of the package, by their names."""
    import interactdiff

    found = {}
    for folder in pkgutil.iter_modules(interactdiff.__path__):
        where = f"interactdiff.{folder.name}.method"
        if folder.ispkg and find_spec(where) is not None:
            method: Method = import_module(where).METHOD
            found[method.name] = method
    return found


def checked_methods(drawer: "Drawer", asked: Asked) -> dict[str, dict[str, Any]]:
    """Of each method that is asked for, all its settings.

    Raises:
        SceneError: there is no such method or setting, or the method is not for the drawer's pipeline.
    """
    known, checked = methods(), {}
    for name, values in asked.items():
        if name not in known:
            raise SceneError(f"method: expected one of {', '.join(known)}, got {shown(name)}")
        if not isinstance(values, Mapping):
            raise SceneError(f"{name}: expected settings by their names, got {shown(values)}")
        if reason := known[name].why_not(drawer.pipeline):
            raise SceneError(f"{name}: {reason}")
        checked[name] = known[name].checked(drawer.model, values)
    return checked


def draw(drawer: "Drawer", scene: Scene, asked: Asked, on_step: "OnStep | None" = None) -> "Image":
    """Draw a scene by all methods that are asked for; without any, as the drawer does.

    Args:
        drawer: the models.
        scene: what to draw.
        asked: the methods and their settings.
        on_step: as in `Drawer.draw`; steps are counted over the whole drawing.

    Raises:
        SceneError: as in `checked_methods` and `Drawer.ask`.
    """
    way: Draw = drawer.draw
    for name, values in checked_methods(drawer, asked).items():
        way = partial(methods()[name].draw, drawer, values, way)
    return way(scene, on_step)


def work(drawer: "Drawer", scene: Scene, asked: Asked) -> Work:
    """What drawing a scene costs: the most that one of the methods, or none of them, says.

    Raises:
        SceneError: as in `checked_methods`.
    """
    size = (scene.width or drawer.size) * (scene.height or drawer.size)
    costs = [Work(size, scene.steps)]
    for name, values in checked_methods(drawer, asked).items():
        costs.append(methods()[name].work(drawer, values, scene))
    return Work(max(one.pixels for one in costs), max(one.steps for one in costs))
