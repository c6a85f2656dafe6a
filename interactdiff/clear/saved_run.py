"""The folder of a coarse-to-fine run: its finished pictures, and what they were drawn from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from PIL.Image import Image
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from interactdiff.clear.stage import Stage
from interactdiff.errors import ClearError
from interactdiff.files import why_unwritable, write_aside

STATE_FILE = "high_resolution.json"


class SavedRun:
    """The finished pictures of a run, in a folder that knows the run's arguments and the files' digests."""

    def __init__(self, folder: Path, arguments: dict[str, Any]):
        # via JSON and back, so that they compare with what was read
        arguments = json.loads(json.dumps(arguments, default=_digest))
        self._folder, self._pictures = folder, {}
        self._state = {"arguments": arguments, "pictures": self._pictures}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            reason = why_unwritable(folder / STATE_FILE)
        except OSError as error:
            reason = error.strerror
        if reason:
            raise ClearError(f"folder: expected one that can be written, got {folder}: {reason}")
        if (folder / STATE_FILE).exists():
            self._resume(arguments)
        elif strays := sorted(folder.glob("stage_*.png")):
            raise ClearError(f"folder: expected no pictures of anything else, got {strays[0]}")
        else:
            self._save_state()

    def pictures(self, stages: Sequence[Stage]) -> list[Image]:
        """Those of the first stages, up to the first that is missing or damaged."""
        images: list[Image] = []
        for stage in stages:
            path = self._path(stage)
            data = path.read_bytes() if path.is_file() else b""
            if _digest(data) != self._pictures.get(path.name):
                break
            images.append(PngImageFile(BytesIO(data)).convert("RGB"))  # Image.open refuses very large ones
        return images

    def add(self, stage: Stage, image: Image) -> None:
        """Write a picture, then that it is finished."""
        path = self._path(stage)
        write_aside(path, lambda aside: image.save(aside, format="PNG"))
        self._pictures[path.name] = _digest(path.read_bytes())
        self._save_state()

    def _path(self, stage: Stage) -> Path:
        return self._folder / f"stage_{stage.index + 1}_{stage.width}x{stage.height}.png"

    def _save_state(self) -> None:
        text = json.dumps(self._state, indent=1)
        write_aside(self._folder / STATE_FILE, lambda aside: aside.write_text(text))

    def _resume(self, now: dict[str, Any]) -> None:
        path = self._folder / STATE_FILE
        try:
            state = json.loads(path.read_text())
            begun, pictures = dict(state["arguments"]), dict(state["pictures"])
        except (ValueError, KeyError, TypeError):
            raise ClearError(f"folder: expected the state of a run in {path}, got something else") from None
        for name in now | begun:
            if (had := begun.get(name)) != (has := now.get(name)):
                had, has = (shorten(json.dumps(value), 60, placeholder=" ...") for value in (had, has))
                raise ClearError(f"{name}: expected {had}, as the run in {self._folder} has it, got {has}")
        self._pictures.update(pictures)


def _digest(value: Any) -> str:
    """SHA-256 of bytes, or of what a tensor or a picture holds."""
    if isinstance(value, Tensor):
        bits = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        value = f"{value.dtype} {value.shape}".encode() + bits.numpy().tobytes()
    elif isinstance(value, Image):
        value = f"{value.mode} {value.size}".encode() + value.tobytes()
    elif not isinstance(value, bytes):
        raise ClearError(f"expected arguments that a folder can remember, got a {type(value).__name__}")
    return hashlib.sha256(value).hexdigest()
