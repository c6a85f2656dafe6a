"""Say who does what to what, and where, and get that picture from the diffusion model you already use.

The public names are imported when they are first used, so that `import interactdiff` costs no torch.
"""

import sys
from importlib import import_module, metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interactdiff.attach import Handle, attach
    from interactdiff.checkpoint import AdapterError
    from interactdiff.clear.adapter import ClearAdapter
    from interactdiff.clear.high_resolution import HighResolution
    from interactdiff.clear.linearize import linearize
    from interactdiff.clear.pattern import ClearError
    from interactdiff.interaction.adapter import InteractionAdapter
    from interactdiff.scene import Entity, Interaction, Scene, SceneError
    from interactdiff.scene_forms import interactions_from_lists, interactions_from_text

__version__ = metadata.version("interactdiff")
__all__ = [
    "AdapterError",
    "ClearAdapter",
    "ClearError",
    "Entity",
    "Handle",
    "HighResolution",
    "Interaction",
    "InteractionAdapter",
    "Scene",
    "SceneError",
    "__version__",
    "attach",
    "interactions_from_lists",
    "interactions_from_text",
    "linearize",
]

_HOMES = {
    "AdapterError": "interactdiff.checkpoint",
    "ClearAdapter": "interactdiff.clear.adapter",
    "ClearError": "interactdiff.clear.pattern",
    "Entity": "interactdiff.scene",
    "Handle": "interactdiff.attach",
    "HighResolution": "interactdiff.clear.high_resolution",
    "Interaction": "interactdiff.scene",
    "InteractionAdapter": "interactdiff.interaction.adapter",
    "Scene": "interactdiff.scene",
    "SceneError": "interactdiff.scene",
    "attach": "interactdiff.attach",
    "interactions_from_lists": "interactdiff.scene_forms",
    "interactions_from_text": "interactdiff.scene_forms",
    "linearize": "interactdiff.clear.linearize",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'interactdiff' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # Importing the submodule interactdiff.attach would put it in the place of the function attach.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
