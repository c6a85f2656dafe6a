"""Concepts: several things of one photo as words of their own (AttenCraft, arXiv 2405.17965).

Names are imported when they are first used: the command line reads `words` without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interactdiff.concept.adapter import ConceptAdapter
    from interactdiff.concept.config import ConceptConfig
    from interactdiff.concept.finding import Looking, find_masks
    from interactdiff.concept.folding import fold
    from interactdiff.concept.learner import Learner, StepReport, learn
    from interactdiff.concept.masks import ConceptMasks, MaskSettings
    from interactdiff.concept.options import LearnOptions
    from interactdiff.concept.words import Concept, ConceptError, NotFoundError

__all__ = [
    "Concept",
    "ConceptAdapter",
    "ConceptConfig",
    "ConceptError",
    "ConceptMasks",
    "LearnOptions",
    "Learner",
    "Looking",
    "MaskSettings",
    "NotFoundError",
    "StepReport",
    "find_masks",
    "fold",
    "learn",
]

_HOMES = {
    "Concept": "words",
    "ConceptAdapter": "adapter",
    "ConceptConfig": "config",
    "ConceptError": "words",
    "ConceptMasks": "masks",
    "LearnOptions": "options",
    "Learner": "learner",
    "Looking": "finding",
    "MaskSettings": "masks",
    "NotFoundError": "words",
    "StepReport": "learner",
    "find_masks": "finding",
    "fold": "folding",
    "learn": "learner",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'interactdiff.concept' has no attribute {name!r}")
    return getattr(import_module(f"interactdiff.concept.{_HOMES[name]}"), name)
