"""A scene is the denoiser's, for all threads: found out where threads set scenes over each other's."""

import threading
from typing import Any

from interactdiff.calls import Call
from interactdiff.errors import AdapterError


class SceneThread:
    """Which thread has set the scene that a denoiser's calls are controlled by."""

    def __init__(self) -> None:
        self._count = 0
        self._local = threading.local()

    def changed(self, has_scene: bool) -> None:
        """Note that this thread has set the scene, or cleared it."""
        self._count += 1
        self._local.drawn = self._count
        if has_scene:
            self._local.set = self._count
        else:
            vars(self._local).pop("set", None)

    def check(self, call: Call, has_scene: bool) -> bool | None:
        """Make sure that a call is controlled by this thread's scene, or by one that was set before its run.

        Args:
            call: the call under way.
            has_scene: whether there is a scene now.

        Returns:
            Whether a run starts; None if there is no way to know.

        Raises:
            AdapterError: another thread has set or cleared the scene since.
        """
        local = self._local
        before = getattr(local, "timesteps", None)  # of the run under way, while it has a scene
        timesteps = _timesteps(call) if has_scene or before is not None else None
        starts = None if timesteps is None else timesteps is not before
        local.timesteps = timesteps if has_scene or starts is False else None
        expected = getattr(local, "set", self._count if starts is not False else local.drawn)
        local.drawn = self._count
        if expected != self._count and (has_scene or starts is False):
            raise AdapterError(
                "expected the scene that this thread draws, got one that another thread has set or cleared "
                "since: set scenes and draw within one lock, or attach to a denoiser for each thread"
            )
        return starts


def _timesteps(call: Call) -> Any:
    """The very timesteps of the caller's run, which every run lays out anew."""
    return getattr(getattr(call.pipeline, "scheduler", None), "timesteps", None)
