"""Files are written aside and renamed: a reader sees the old file or the whole new one, never a half."""

import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from zlib import crc32

_ASIDE = re.compile(r"\.aside-([0-9a-f]{8})-(\d+)-")  # the machine and the process that writes
_DAY = 24 * 60 * 60  # seconds


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then rename it to `path`; if it fails, nothing is left behind.

    Raises:
        OSError: the folder cannot be written to, or `write` failed.
    """
    prefix = f".aside-{_machine()}-{os.getpid()}-"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=path.suffix)
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


def remove_stale_asides(folder: Path) -> None:
    """Remove what processes that were killed left unfinished in a folder.

    Files of running processes stay. Whether a process of another machine runs is not known, so its files go
    after a day without a change.
    """
    import psutil

    for path in folder.glob(".aside-*"):
        matched = _ASIDE.match(path.name)
        with suppress(OSError):  # such as a file that has just been finished
            ended = matched and matched[1] == _machine() and not psutil.pid_exists(int(matched[2]))
            if ended or time.time() - path.stat().st_mtime > _DAY:
                path.unlink()


def _machine() -> str:
    return f"{crc32(platform.node().encode()):08x}"


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
