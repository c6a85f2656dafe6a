"""Runs a converter: rows are streamed aside, pictures linked or copied, the folder renamed at the end."""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from interactdiff.data.converters import CONVERTERS
from interactdiff.data.converters.base import Converted, Options
from interactdiff.data.folder import METADATA
from interactdiff.data.rows import check_relative
from interactdiff.errors import DataError, SceneError
from interactdiff.method_specs import load_attribute

Converter = Callable[[str, Options, Counter[str]], Iterator[Converted]]


def run(
    name: str,
    source: str,
    target: Path,
    options: Options,
    copy: bool = False,
    on_picture: Callable[[int], None] = lambda count: None,
) -> Counter[str]:
    """Convert a data set; the same source gives the same bytes.

    Rows are streamed into a folder beside the target, which gets the target's name at the end. Pictures are
    never changed.

    Args:
        name: one of `CONVERTERS`.
        source: a folder or a file; for stickworld the seeds FIRST:LAST.
        target: a folder that is not there yet, or is empty. With several splits it gets a folder for each.
        options: of the converters.
        copy: copy pictures in place of links to them.
        on_picture: gets the count after each picture.

    Returns:
        Counts: "pictures", "interactions", "entities", "subjects", and what was left out.

    Raises:
        DataError: the target is there, the source is not what it should be, or there is no picture in it.
        OSError: the disk fills up.
    """
    if name not in CONVERTERS:
        raise DataError(f"expected one of {', '.join(CONVERTERS)}, got {name!r}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"expected a folder that is not there yet or empty, got {target}")
    convert: Converter = load_attribute(CONVERTERS[name])
    notes: Counter[str] = Counter()
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=".aside-"))
    try:
        with ExitStack() as files:
            try:
                _write(convert(source, options, notes), aside, notes, copy, files, on_picture)
            except DataError:
                raise
            except SceneError as error:
                raise DataError(f"{source}: {error}") from None
            except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
                got = f"{type(error).__name__}: {error}"
                raise DataError(f"expected annotations of {name} in {source}, got others ({got})") from None
        if not notes["pictures"]:
            left = ", ".join(f"{count} {what}" for what, count in notes.items()) or "nothing"
            raise DataError(f"expected pictures of {name} in {source}, got none ({left})")
        aside.chmod(0o777 & ~_umask())
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return notes


def _write(
    converted: Iterator[Converted],
    folder: Path,
    notes: Counter[str],
    copy: bool,
    files: ExitStack,
    on_picture: Callable[[int], None],
) -> None:
    opened: dict[str | None, TextIO] = {}
    for one in converted:
        here = folder if one.split is None else folder / one.split
        if one.split not in opened:
            here.mkdir(exist_ok=True)
            opened[one.split] = files.enter_context(
                (here / METADATA).open("w", encoding="utf-8", newline="\n")
            )
        for name, picture in {one.name: one.picture, **one.references}.items():
            check_relative(name, here)
            path = here / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() or path.is_symlink():
                raise DataError(f"expected each picture once, got {name!r} twice")
            if isinstance(picture, bytes):
                path.write_bytes(picture)
            elif copy:
                shutil.copyfile(picture, path)
            else:
                path.symlink_to(picture.resolve())
        row: dict[str, Any] = {"file_name": one.name, **one.row}
        opened[one.split].write(json.dumps(row, ensure_ascii=False) + "\n")
        notes["pictures"] += 1
        for key in ("interactions", "entities", "subjects"):
            notes[key] += len(row.get(key, ()))
        on_picture(notes["pictures"])


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
