"""Files are written aside and renamed: a reader sees the old file or the whole new one, never a half."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then rename it to `path`; if it fails, nothing is left behind.

    Raises:
        OSError: the folder cannot be written to, or `write` failed.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".aside-", suffix=path.suffix)
    os.close(handle)
    aside = Path(name)
    try:
        write(aside)
        mask = os.umask(0)
        os.umask(mask)
        aside.chmod(0o666 & ~mask)  # mkstemp's are the owner's only
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def why_unwritable(path: Path) -> str | None:
    """Why `write_aside` could not write there, or None: to be checked before long work, not after.

    A file is made in the folder and removed again, which is the only sure way to know.
    """
    try:
        if path.is_dir():
            return "a folder"
        if path.exists() and not os.access(path, os.W_OK):
            return "a file that may not be written"
        with tempfile.TemporaryFile(dir=path.parent):
            return None
    except OSError as error:
        return error.strerror or str(error)
