"""Files of one JSON value a line, read strictly and in constant memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from interactdiff.data.problems import Problem, Problems
from interactdiff.errors import DataError
from interactdiff.scene_checks import SceneError, malformed, unique_keys

MAX_LINE = 16 * 2**20  # bytes
_BOM = b"\xef\xbb\xbf"


def parse_json(text: str | bytes) -> Any:
    """Parse one JSON text: no key twice, no NaN, no infinity.

    Raises:
        DataError: the text is no such JSON; its `column` is where it breaks off, if that is known.
    """
    try:
        text = (text.decode() if isinstance(text, bytes) else text).rstrip()
        return json.loads(text, object_pairs_hook=unique_keys, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        reason, column = (
            f"expected text in UTF-8, got the byte {error.object[error.start]:#04x}",
            error.start + 1,
        )
    except json.JSONDecodeError as error:
        reason, column = f"expected JSON, got {malformed(error)}", error.colno
    except SceneError as error:
        reason, column = str(error), None
    except (RecursionError, ValueError):
        reason, column = "expected a row, got JSON nested too deep or digits too many", None
    raise DataError(reason, column=column)


def read_line(file: BinaryIO) -> Any:
    """Parse the line that starts where the file stands."""
    return parse_json(file.readline(MAX_LINE).removeprefix(_BOM))


def json_lines(path: Path, name: str, problems: Problems) -> Iterator[tuple[int, int, Any]]:
    """The values of a file, one a line; blank lines are passed over.

    Args:
        path: the file.
        name: what messages call it.
        problems: takes the lines that are no JSON.

    Yields:
        Line from 1, offset of its first byte, and value.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            offset, line = 0, 0
            while data := file.readline(MAX_LINE):
                line += 1
                start, offset = offset, offset + len(data)
                if len(data) == MAX_LINE and not data.endswith(b"\n"):
                    problems.add(
                        Problem("json", name, f"expected a line under {MAX_LINE:,} bytes, got more", line)
                    )
                    while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                        offset += len(rest)
                    offset += len(rest)
                    continue
                if not (text := data.removeprefix(_BOM) if line == 1 else data).strip():
                    continue
                try:
                    value = parse_json(text)
                except DataError as error:
                    problems.add(Problem("json", name, str(error), line, column=error.column))
                    continue
                yield line, start, value
    except OSError as error:
        raise DataError(f"expected a file of rows at {path}, got {error.strerror}") from None


def _refuse_constant(name: str) -> Any:
    raise SceneError(f"expected JSON, got {name}")
