"""Pictures to train on and to evaluate with: read, checked, cropped, ordered, cached.

`read_folder(path)` streams `ImageRecord`s of any form of data; `Records.open(path)` gives them by number.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interactdiff.data.reading import Records, read_folder
    from interactdiff.data.records import ImageRecord

__all__ = ["ImageRecord", "Records", "read_folder"]

_HOMES = {
    "ImageRecord": "interactdiff.data.records",
    "Records": "interactdiff.data.reading",
    "read_folder": "interactdiff.data.reading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'interactdiff.data' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
