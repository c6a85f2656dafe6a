"""Loads models of transformers that score pictures: from safetensors only, so that no pickle is executed."""

from collections.abc import Callable
from textwrap import shorten
from typing import Any

import torch

from interactdiff.errors import ModelError
from interactdiff.evaluation.two_stage import BoxDetector, ClosedBoxes, PhraseBoxes, VerbScorer
from interactdiff.evaluation.verb_scorers import AskedVerbs, ContrastiveVerbs, VisionLanguage

PHRASE_TYPES = ("grounding-dino", "mm-grounding-dino", "owlv2", "owlvit")
CONTRASTIVE_TYPES = ("clip", "siglip", "siglip2")


def load_box_detector(name: str, device: torch.device) -> BoxDetector:
    """A detector of boxes, of any of the kinds that `two_stage` has.

    Args:
        name: folder or Hub id.
        device: where to.

    Raises:
        ModelError: it cannot be loaded.
    """
    import transformers

    if _model_type(name) in PHRASE_TYPES:
        model, processor = _loaded(name, transformers.AutoModelForZeroShotObjectDetection, device)
        return PhraseBoxes(model, processor, name)
    model, processor = _loaded(
        name, transformers.AutoModelForObjectDetection, device, transformers.AutoImageProcessor
    )
    return ClosedBoxes(model, processor, name)


def load_contrastive(name: str, device: torch.device) -> ContrastiveVerbs:
    """CLIP or SigLIP.

    Raises:
        ModelError: it cannot be loaded, or is something else.
    """
    import transformers

    if (kind := _model_type(name)) not in CONTRASTIVE_TYPES:
        raise ModelError(f"expected CLIP or SigLIP at {name}, got {kind}")
    return ContrastiveVerbs(*_loaded(name, transformers.AutoModel, device), name)


def load_vision_language(name: str, device: torch.device) -> VisionLanguage:
    """A language model that looks at pictures.

    Raises:
        ModelError: it cannot be loaded.
    """
    import transformers

    return VisionLanguage(*_loaded(name, transformers.AutoModelForImageTextToText, device), name)


def load_verb_scorer(name: str, device: torch.device) -> VerbScorer:
    """A scorer of verbs: CLIP, SigLIP, or else a vision-language model that answers yes or no.

    Raises:
        ModelError: it cannot be loaded.
    """
    if _model_type(name) in CONTRASTIVE_TYPES:
        return load_contrastive(name, device)
    return AskedVerbs(load_vision_language(name, device))


def _model_type(name: str) -> str:
    import transformers

    return _tried(name, lambda: transformers.AutoConfig.from_pretrained(name)).model_type


def _loaded(name: str, kind: Any, device: torch.device, processor: Any = None) -> tuple[Any, Any]:
    import transformers

    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = _tried(name, lambda: kind.from_pretrained(name, use_safetensors=True, dtype=dtype))
    made = _tried(name, lambda: (processor or transformers.AutoProcessor).from_pretrained(name))
    return model.to(device).eval(), made


def _tried(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # loaders of many kinds of files raise as many kinds of errors
        reason = shorten(str(error), 160, placeholder=" ...")
        raise ModelError(
            f"expected a model of transformers at {name}, got {type(error).__name__}: {reason}"
        ) from error
