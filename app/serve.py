"""The page behind a server: its queue, its limits, and what it may read."""

import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from interactdiff.app import theme
from interactdiff.app.limits import MAX_UPLOAD, Limits
from interactdiff.app.studio import Studio
from interactdiff.app.worker import Worker
from interactdiff.models import MODEL

PUBLIC = Limits(steps=100, pixels=2**20, images=4)  # for whoever comes along
LOCAL = Limits(folders=(Path.cwd(),), hub=True, learn_steps=2000)  # for oneself


def limits_for(host: str, share: bool) -> Limits:
    """What is allowed by default: on one's own machine more than to the world."""
    return LOCAL if host in ("127.0.0.1", "localhost", "::1") and not share else PUBLIC


def make_studio(
    limits: Limits,
    model: str = MODEL,
    adapters: Mapping[str, str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Studio:
    """Load a model and build the page, with its queue.

    Raises:
        ModelError: there is no such model.
        AdapterError: there is no such adapter, or it is for another base.
    """
    adapters = adapters or {}
    limits = replace(limits, names=(*limits.names, model, *adapters.values()))
    worker = Worker(limits, device, dtype)
    # Gradio copies no file that is in its own folder, and what else it copies goes with the pictures.
    os.environ["GRADIO_TEMP_DIR"] = str(worker.folder)
    studio = Studio(worker, model, adapters)
    studio.blocks.queue(max_size=limits.queue)
    return studio


def leave_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does, with everything cleaned up, and exit code 143."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)


# Arguments of `Blocks.launch`, whoever calls it.
LAUNCH: dict[str, Any] = {
    "theme": theme.THEME,
    "css": theme.CSS,
    "max_file_size": MAX_UPLOAD,
    "show_error": True,
    "footer_links": ["api"],
}
