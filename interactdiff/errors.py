"""Errors that speak to users: each message is one sentence, what was expected and what came."""

from collections.abc import Sequence
from typing import Any


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
    """Pictures and their annotations that cannot be read.

    Attributes:
        problems: `interactdiff.data.problems.Problem`s, the first of all that were found.
        column: where a line of JSON breaks off, from 1.
    """

    def __init__(self, message: str, problems: Sequence[Any] = (), column: int | None = None):
        super().__init__(message)
        self.problems, self.column = tuple(problems), column
