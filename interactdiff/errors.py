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


class DamagedCheckpointError(RecipeError):
    """A checkpoint of a training that is not whole."""


class DataError(InteractdiffError):
    """A file of a data set that cannot be read, or does not say what it should."""
