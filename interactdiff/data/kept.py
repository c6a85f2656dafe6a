"""Results that are kept in memory, and left behind where their owner goes to another process."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any


class Kept:
    """A function of which the latest results are kept.

    What holds an `lru_cache` cannot be pickled, so it does not reach workers that are spawned. This is
    pickled without its results, which may be open files.

    Args:
        make: the function, of arguments that can be hashed.
        most: results that are kept.
    """

    def __init__(self, make: Callable[..., Any], most: int):
        self._make, self._most = make, most
        self._cached = lru_cache(maxsize=most)(make)

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        return self._cached(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, (self._make, self._most)
