"""What the benchmarks' command lines share."""

import argparse
import json
from pathlib import Path
from typing import Any

from interactdiff.commands.arguments import UsageError, positive
from interactdiff.files import why_unwritable, write_aside

DTYPES = ("float32", "bfloat16", "float16")


def add_device_and_json(parser: argparse.ArgumentParser) -> None:
    """Flags of where it runs, and of where its figures go."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, cuda or else cpu"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")


def numbers(text: str) -> list[int]:
    """A flag's whole numbers from 1 up, with commas between them."""
    return [positive(part) for part in text.split(",")]


def check_json(path: Path | None) -> None:
    """Refuse a file that could not be written."""
    if path is not None and (reason := why_unwritable(path)):
        raise UsageError(f"--json: expected a file that can be written, got {path}: {reason}")


def write_json(path: Path | None, values: dict[str, Any]) -> None:
    """Write the figures, if there is a file for them."""
    if path is not None:
        text = json.dumps(values, indent=2) + "\n"
        write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def chosen_device(name: str) -> Any:
    """The torch device of a name; "auto" is cuda or else cpu.

    Raises:
        ModelError: there is no such device here.
    """
    import torch

    from interactdiff.pipeline_loading import usable_device

    best = "cuda" if torch.cuda.is_available() else "cpu"
    return usable_device(best if name == "auto" else name)
