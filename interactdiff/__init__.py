"""Say who does what to what, and where, and get that picture from the diffusion model you already use.

The public names are imported when they are first used, so that `import interactdiff` costs no torch.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interactdiff.clear.adapter import ClearAdapter
    from interactdiff.clear.high_resolution import HighResolution
    from interactdiff.clear.windows import linearize
    from interactdiff.concept.adapter import ConceptAdapter
    from interactdiff.errors import AdapterError, ClearError, InteractdiffError, ModelError, SceneError
    from interactdiff.generation import GeneratedImage, ScenePipeline, generate
    from interactdiff.handle import Handle, attach
    from interactdiff.interaction.adapter import InteractionAdapter
    from interactdiff.scene import Entity, Interaction, Scene
    from interactdiff.scene_forms import interactions_from_lists, interactions_from_text
    from interactdiff.stickworld import model_path
    from interactdiff.subject.adapter import SubjectAdapter
    from interactdiff.subject.items import Subject

__version__ = metadata.version("interactdiff")
__all__ = [
    "AdapterError",
    "ClearAdapter",
    "ClearError",
    "ConceptAdapter",
    "Entity",
    "GeneratedImage",
    "Handle",
    "HighResolution",
    "InteractdiffError",
    "Interaction",
    "InteractionAdapter",
    "ModelError",
    "Scene",
    "SceneError",
    "ScenePipeline",
    "Subject",
    "SubjectAdapter",
    "__version__",
    "attach",
    "generate",
    "interactions_from_lists",
    "interactions_from_text",
    "linearize",
    "model_path",
]

_HOMES = {
    "AdapterError": "interactdiff.errors",
    "ClearAdapter": "interactdiff.clear.adapter",
    "ClearError": "interactdiff.errors",
    "ConceptAdapter": "interactdiff.concept.adapter",
    "Entity": "interactdiff.scene",
    "GeneratedImage": "interactdiff.generation",
    "Handle": "interactdiff.handle",
    "HighResolution": "interactdiff.clear.high_resolution",
    "InteractdiffError": "interactdiff.errors",
    "Interaction": "interactdiff.scene",
    "InteractionAdapter": "interactdiff.interaction.adapter",
    "ModelError": "interactdiff.errors",
    "Scene": "interactdiff.scene",
    "SceneError": "interactdiff.errors",
    "ScenePipeline": "interactdiff.generation",
    "Subject": "interactdiff.subject.items",
    "SubjectAdapter": "interactdiff.subject.adapter",
    "attach": "interactdiff.handle",
    "generate": "interactdiff.generation",
    "interactions_from_lists": "interactdiff.scene_forms",
    "interactions_from_text": "interactdiff.scene_forms",
    "linearize": "interactdiff.clear.windows",
    "model_path": "interactdiff.stickworld",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'interactdiff' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
