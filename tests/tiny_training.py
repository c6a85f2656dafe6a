"""A few steps of a training on pictures; shared by the tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from interactdiff.data.converters.base import Options
from interactdiff.data.converters.run import run as convert


def exported_world(folder: Path) -> Path:
    """Renders of the embedded world, exported to a folder."""
    convert("stickworld", "0:12", folder / "world", Options(size=32))
    return folder / "world"


def config_of(base: Path, pictures: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Four tiny steps on a folder of pictures."""
    transformer = (base / "transformer").is_dir()
    sizes = {"max_interactions": 6, "hidden": 16, "init": "open"} | (
        {"token_dim": 8, "parts": 2} if transformer else {}
    )
    return {
        "recipe": "interaction",
        "output_dir": str(folder / "run"),
        "export_to": str(folder / "adapter"),
        "base": str(base),
        "data": str(pictures),
        "cache": str(folder / "cache"),
        "resolution": 32,
        "multiple": 16,
        "workers": 0,
        "adapter": sizes,
        "batch_size": 2,
        "validation": {"count": 1, "steps": 2, "guidance_scale": 3.0},
        "seed": 0,
        "steps": 4,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "lr_scheduler": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "mixed_precision": "no",
        "ema_decay": 0.0,
        "log_every": 2,
        "checkpoint_every": 2,
        "checkpoints_total_limit": 2,
        "sample_every": 4,
        **changes,
    }


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As `ulimit -f` does: files can be no larger than `size` bytes, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
