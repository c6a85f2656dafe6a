"""What the commands share: the parser, kinds of arguments, and checks made before heavy imports."""

import argparse
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from interactdiff.data.boxes import FORMS
from interactdiff.errors import InteractdiffError
from interactdiff.files import why_unwritable
from interactdiff.models import MODEL, PACKAGED
from interactdiff.registry import adapter_method, methods
from interactdiff.scene_checks import Schedule

Commands = argparse._SubParsersAction  # what `add_subparsers` returns, for which argparse has no public name


class UsageError(InteractdiffError):
    """A command line that cannot be carried out."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line by raising `UsageError`."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def add_models(parser: argparse.ArgumentParser) -> None:
    """Flags that name the model, the adapters and the device."""
    elsewhere = "folder or Hugging Face Hub id"
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help=f"{', '.join(PACKAGED)}, {elsewhere} (default: {MODEL})"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="[METHOD[:INSTANCE]=]PATH_OR_ID",
        help=f"packaged name, {elsewhere}, of interactions or of another method "
        f"({', '.join(adapter_methods())}); may be repeated (default: a packaged model's own, if it has one)",
    )
    parser.add_argument("--device", help="auto, cpu, cuda, mps (default: auto)")


def add_variant(parser: argparse.ArgumentParser) -> None:
    """The flag that chooses among a model's weights."""
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="of the model's weights, such as fp16 (default: those that are there)",
    )


def adapter_methods() -> list[str]:
    """The names of the methods that have adapters."""
    return [name for name, spec in methods().items() if spec.adapter is not None]


def adapters_of(args: argparse.Namespace) -> dict[str, str]:
    """What `--adapter` names, by the adapter's name; of two of one name the last."""
    chosen: dict[str, str] = {}
    for text in args.adapter or []:
        method, equals, path = text.partition("=")
        is_name = bool(equals) and adapter_method(method) in adapter_methods()
        name, at = (method, path) if is_name else ("interaction", text)
        chosen[name] = at
    return chosen


def method_settings(texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """What `--method NAME:SETTING=X,...` sets, by name; of two values of one setting the last."""
    used: dict[str, dict[str, float]] = {}
    for text in texts:
        name, _, settings = text.partition(":")
        values = used.setdefault(name.strip(), {})
        for part in filter(None, settings.split(",")):
            key, _, value = part.partition("=")
            try:
                values[key.strip()] = float(value)
            except ValueError:
                raise UsageError(f"--method: expected NAME:SETTING=number, got {text!r}") from None
    return used


def check_picture_name(path: Path) -> None:
    """Refuse a picture that would not be a PNG."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"--out: expected a file name that ends in .png, got {str(path)!r}")


def check_picture_path(path: Path) -> None:
    """Refuse a picture that could not be written."""
    check_picture_name(path)
    if reason := why_unwritable(path):
        raise UsageError(f"--out: expected a file that can be written, got {str(path)!r}: {reason}")


def quiet_libraries() -> None:
    """Keep advice for programmers off the user's terminal; errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()  # of loading; the one of drawing stays


def whole(text: str) -> int:
    """A flag's whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None


def positive(text: str) -> int:
    """A flag's whole number from 1 up."""
    if (value := whole(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return value


def schedule(text: str) -> Schedule:
    """A flag's share of the steps, or three shares."""
    try:
        match [float(part) for part in text.split(",")]:
            case [share]:
                return share
            case [on, decay, off]:
                return on, decay, off
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a share, or three as on,decay,off, got {text!r}")


def number(text: str) -> float:
    """A flag's number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def add_boxes(parser: Any) -> None:
    """Add the flag of the form that boxes of data are in."""
    parser.add_argument(
        "--boxes", choices=FORMS, default="shares", help="what boxes are in (default: shares)"
    )


def add_columns(parser: Any) -> None:
    """Add the flag of the columns of parquet."""
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="KEY=COLUMN",
        help="parquet: the column of image, prompt, interactions, ...; may be repeated",
    )


def columns_of(args: argparse.Namespace) -> dict[str, str]:
    """The columns of `add_columns`, by key."""
    for pair in args.column:
        if "=" not in pair:
            raise UsageError(f"--column: expected key=column, got {pair!r}")
    return dict(pair.split("=", 1) for pair in args.column)
