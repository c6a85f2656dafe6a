"""Files of caches."""

from collections.abc import Callable
from pathlib import Path

from interactdiff.errors import DataError
from interactdiff.files import write_aside


def write_cache(path: Path, write: Callable[[Path], object]) -> None:
    """`write_aside` for a file of a cache, whose folder is made if need be.

    Raises:
        DataError: it cannot be written, as where the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, write)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise DataError(f"expected disk space for a cache in {path.parent}, got {reason}") from None
