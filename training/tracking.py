"""What a run reports beside `log.jsonl`: to any tracker that accelerate knows."""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate import tracking as trackers
from PIL import Image

from interactdiff.errors import RecipeError
from interactdiff.training.config import nearest


def check_tracker(name: str | None) -> None:
    """Make sure that a tracker can be used.

    Raises:
        RecipeError: accelerate knows none of that name, or its package is not installed.
    """
    known = trackers.LOGGER_TYPE_TO_CLASS
    if name is None or (name in known and not _is_built_in(name)):
        return
    if name not in known:
        raise RecipeError(f"tracker: expected {', '.join(known)}, got {name!r}{nearest(name, known)}")
    if name not in map(str, trackers.get_available_trackers()):
        raise RecipeError(f"tracker: expected the package of {name}, got none: pip install {name}")


def _is_built_in(name: str) -> bool:
    return trackers.LOGGER_TYPE_TO_CLASS[name].__module__ == trackers.__name__


class Tracker:
    """A run's tracker, or none; what goes wrong with it, such as a network that is down, stops no training.

    Args:
        accelerator: of the run, made with `log_with`.
        name: of the tracker, or None.
    """

    def __init__(self, accelerator: Accelerator, name: str | None):
        self.accelerator, self.name = accelerator, name
        self.works = name is not None and accelerator.is_main_process

    def start(self, project: str, config: Mapping[str, Any]) -> None:
        """Begin a run of some project."""
        self._try(lambda: self.accelerator.init_trackers(project, dict(_flat(config))))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Report numbers."""
        self._try(lambda: self.accelerator.log(dict(values), step=step))

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Report a picture, where the tracker takes some."""

        def report() -> None:
            for one in self.accelerator.trackers:
                if "log_images" in vars(type(one)):
                    one.log_images({name: np.asarray(picture)[None]}, step=step)

        self._try(report)

    def end(self) -> None:
        """Let it write what it still has."""
        self._try(lambda: [one.finish() for one in self.accelerator.trackers])

    def _try(self, report: Any) -> None:
        if not self.works:
            return
        try:
            report()
        except Exception as error:  # each tracker has errors of its own
            self.works = False
            reason = " ".join(str(error).split())[:160]
            print(f"interactdiff: {self.name} reports no more: {reason}", file=sys.stderr)


def _flat(config: Mapping[str, Any], above: str = "") -> Any:
    """Names and values of a nested configuration, as trackers take them."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value if isinstance(value, bool | int | float | str) else str(value)
