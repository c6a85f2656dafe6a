"""Errors that speak to users: each message is one sentence, what was expected and what came."""


class InteractdiffError(ValueError):
    """Parent of all errors that front ends show as they are, without a traceback."""


class SceneError(InteractdiffError):
    """A scene, or something in it, that cannot be drawn."""


class AdapterError(InteractdiffError):
    """An adapter, or the denoiser it should act in, is not what is needed."""


class ModelError(InteractdiffError):
    """A model that cannot be loaded or run here."""


class ClearError(InteractdiffError):
    """Attention within windows that cannot be computed as configured."""


class RecipeError(InteractdiffError):
    """A training recipe that cannot be run."""


class DataError(InteractdiffError):
    """Pictures and their annotations that cannot be read."""
