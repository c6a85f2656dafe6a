"""What makes a user's value usable, or says in one sentence why it is not. No torch: quick to import."""

import json
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from interactdiff.errors import SceneError

Box = tuple[float, float, float, float]
"""xyxy in [0, 1]: left, top, right, bottom, as shares of the picture's width and height."""
Schedule = float | tuple[float, float, float]
"""The share of the steps that are controlled, from the first; or shares [on, linear decay, off] of them."""

MAX_SIDE = 4096  # pixels
SIDE_MULTIPLE = 8  # pixels per latent of the usual VAEs
_EDGES = ("x0", "y0", "x1", "y1")


def shown(value: Any) -> str:
    """A value as a message shows it: on one line and not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def malformed(error: json.JSONDecodeError) -> str:
    """What stands where JSON breaks off, and the parser's reason for stopping there."""
    rest = error.doc[error.pos : error.pos + 12].split("\n")[0]
    return f"{shown(rest) if rest else 'the end of the line'} ({error.msg})"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that has a key twice, of which json would silently keep the last."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise SceneError(f"expected each key once, got {shown(key)} twice")
        values[key] = value
    return values


def json_object(values: Any, required: Sequence[str], optional: Sequence[str]) -> dict[str, Any]:
    """A JSON object with these keys and no others."""
    if not isinstance(values, dict):
        raise SceneError(f"expected an object with {', '.join(required)}, got {shown(values)}")
    known = list(dict.fromkeys((*required, *optional)))
    for key in values:
        if key not in known:
            raise SceneError(f"expected only the keys {', '.join(known)}, got {shown(key)}")
    for key in required:
        if key not in values:
            raise SceneError(f"expected the key {key}, got only {shown(list(values))}")
    return dict(values)


def checked_text(name: str, value: Any) -> str:
    """Text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise SceneError(f"{name}: expected text, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SceneError(f"{name}: expected text that UTF-8 can hold, got {shown(value)}") from None
    return value


def checked_phrase(name: str, value: Any) -> str:
    """Text that says something, its white space made single blanks."""
    phrase = " ".join(checked_text(name, value).split())
    if not phrase:
        raise SceneError(f"{name}: expected a phrase, got {shown(value)}")
    return phrase


def as_float(value: Any) -> float | None:
    """A number as a float, or None if the value is no number (bool is none)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def checked_number(name: str, value: Any, low: float, high: float) -> float:
    """A number of this range as a float."""
    number = as_float(value)
    if number is None or not low <= number <= high:
        raise SceneError(f"{name}: expected a number from {low:g} to {high:g}, got {shown(value)}")
    return number


def checked_whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number of this range."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        raise SceneError(f"{name}: expected a whole number from {low} to {high}, got {shown(value)}")
    return int(value)


def checked_flag(name: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise SceneError(f"{name}: expected true or false, got {shown(value)}")
    return value


def checked_side(name: str, value: Any) -> int | None:
    """Pixels of a picture's side, or None."""
    if value is None:
        return None
    side = checked_whole(name, value, SIDE_MULTIPLE, MAX_SIDE)
    if side % SIDE_MULTIPLE:
        raise SceneError(f"{name}: expected a multiple of {SIDE_MULTIPLE} pixels, got {side}")
    return side


def checked_box(name: str, value: Any) -> Box:
    """Check a box; lists, tuples and (through `tolist`) arrays and tensors are taken."""
    edges = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(edges, (list, tuple)) or len(edges) != 4:
        raise SceneError(f"{name}: expected four numbers x0, y0, x1, y1, got {shown(value)}")
    numbers: list[float] = []
    for edge, given in zip(_EDGES, edges, strict=True):
        number = as_float(given)
        if number is None or not 0.0 <= number <= 1.0:
            raise SceneError(
                f"{name}: expected {edge} to be a number in [0, 1], got {shown(given)} in {shown(edges)}"
            )
        numbers.append(number)
    x0, y0, x1, y1 = numbers
    for low, high, start, end in (("x0", "x1", x0, x1), ("y0", "y1", y0, y1)):
        if not start < end:
            raise SceneError(f"{name}: expected {low} < {high}, got {low} = {start} and {high} = {end}")
    return (x0, y0, x1, y1)


def checked_schedule(schedule: Any) -> tuple[float, float, float]:
    """The general form [on, decay, off] of a schedule.

    Args:
        schedule: the share of steps in [0, 1] that come first and are controlled, or three shares that add up
            to 1.

    Raises:
        SceneError: it is neither.
    """
    given = schedule if isinstance(schedule, tuple | list) else (schedule,)
    shares = [share for share in map(as_float, given) if share is not None and 0 <= share <= 1]
    if len(given) == len(shares) == 1:
        return shares[0], 0.0, 1.0 - shares[0]
    if len(given) == len(shares) == 3 and abs(sum(shares) - 1) < 1e-6:
        return shares[0], shares[1], shares[2]
    raise SceneError(
        f"schedule: expected a share in [0, 1], or three that add up to 1, got {shown(schedule)}"
    )


def parse_box(name: str, text: str) -> Box:
    """A box as the command line gives it, x0,y0,x1,y1."""
    parts = text.split(",")
    if len(parts) != 4:
        raise SceneError(f"{name}: expected four numbers x0,y0,x1,y1, got {len(parts)} in {shown(text)}")
    try:
        x0, y0, x1, y1 = (float(part) for part in parts)
    except ValueError:
        raise SceneError(f"{name}: expected four numbers x0,y0,x1,y1, got {shown(text)}") from None
    return (x0, y0, x1, y1)
