"""One row of data: a JSON object in the scene's own words becomes an `ImageRecord`, or all its mistakes."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from interactdiff.data.boxes import box_fields, likely_form, to_shares
from interactdiff.data.problems import Problem, Problems, nearest
from interactdiff.data.records import CONTROL, ImageRecord, Stored
from interactdiff.errors import DataError
from interactdiff.method_specs import ItemSpec
from interactdiff.registry import item_specs
from interactdiff.scene import EXTRA_ITEMS, Scene, SceneError
from interactdiff.scene_checks import checked_flag, checked_text, checked_whole, shown
from interactdiff.scene_items import required_and_optional
from interactdiff.scene_pictures import picture_files

MAX_WEIGHT = 1000
PICTURES = ("image", "mask")  # fields of items that name pictures
OWN_KEYS = ("file_name", CONTROL, "prompt", "prompts", "weight", "source", "license", "id", "flip")
_OTHER_NAMES = {"text": "prompt", "caption": "prompt", "image": "file_name", "boxes": "entities"}


@cache
def ignored_keys() -> tuple[str, ...]:
    """Keys of a scene file that say how a picture is sampled, which training has no use for."""
    own = {field.name for field in fields(Scene)} - {"prompt", EXTRA_ITEMS, *item_specs()}
    return (*sorted(own), "$schema")


class RowParser:
    """Checks rows of one file.

    Args:
        file: what messages call the file.
        problems: takes the mistakes.
        form: of the boxes, see `boxes.FORMS`.
        folder: that pictures of items are in; None if rows have no place for them.
    """

    def __init__(self, file: str, problems: Problems, form: str = "shares", folder: Path | None = None):
        self.file, self.problems, self.form, self.folder = file, problems, form, folder
        self.ignored: dict[str, int] = {}  # keys of scene files, and in how many rows they stand

    def parse(
        self,
        values: Any,
        line: int,
        find: Callable[[Any], tuple[str, Stored]],
        sidecar: Callable[[str], str | None] = lambda name: None,
        find_control: Callable[[Any], Stored | None] | None = None,
    ) -> ImageRecord | None:
        """Make a record of a row.

        Args:
            values: the JSON value.
            line: where it stands, from 1.
            find: gives the picture's name and place for the value of `file_name` (None if there is none), or
                raises a `DataError` that says what was expected.
            sidecar: the caption in a file beside a picture of this name, or None.
            find_control: gives the control image's place for the value of `conditioning_image`, as `find`
                does; None where rows have no place for one.

        Returns:
            The record; None if the row has a mistake, all of which `problems` has then.
        """
        before = len(self.problems)

        def report(kind: str, text: str, field: str | None = None, item: str | None = None) -> None:
            self.problems.add(Problem(kind, self.file, text, line, item, field))

        if not isinstance(values, dict):
            report("row", f"expected an object with file_name, got {shown(values)}")
            return None
        self._check_keys(values, report)
        name, stored, control, size = "", None, None, None
        try:
            name, stored = find(values.get("file_name"))
        except DataError as error:
            report("file_name", str(error), "file_name")
        try:
            control = (find_control or _no_control)(values.get(CONTROL))
        except DataError as error:
            report(CONTROL, str(error), CONTROL)
        if stored is not None and self.form.startswith("pixels"):
            size = self._size(name, stored, line)
        items = self._items(values, report, size, stored)
        prompts = self._prompts(values, report, lambda: sidecar(name) if stored is not None else "")
        options = self._options(values, report)
        if len(self.problems) > before or stored is None:
            return None
        return ImageRecord(name, stored, prompts, items, line=line, control=control, **options)

    def _check_keys(self, values: Mapping[str, Any], report: Callable[..., None]) -> None:
        known = [*OWN_KEYS, *item_specs()]
        for key in values:
            if key in ignored_keys():
                self.ignored[key] = self.ignored.get(key, 0) + 1
            elif key not in known:
                other = f" (did you mean {_OTHER_NAMES[key]!r}?)" if key in _OTHER_NAMES else ""
                report("key", f"expected the keys of a row, got {shown(key)}{other or nearest(key, known)}")

    def _prompts(
        self, values: Mapping[str, Any], report: Callable[..., None], sidecar: Callable[[], str | None]
    ) -> tuple[str, ...]:
        try:
            given = [checked_text("prompt", values["prompt"])] if "prompt" in values else []
        except SceneError as error:
            report("prompt", _without_field(error), "prompt")
            return ()
        listed = values.get("prompts", [])
        if not isinstance(listed, list) or ("prompts" in values and not listed):
            report("prompt", f"expected a list of captions, got {shown(listed)}", "prompts")
            return ()
        for number, text in enumerate(listed, start=1):
            try:
                given.append(checked_text("prompts", text))
            except SceneError as error:
                report("prompt", _without_field(error), "prompts", f"caption {number}")
        if not given:
            try:
                beside = sidecar()
            except DataError as error:
                report("prompt", str(error), "prompt")
                return ()
            if beside is None:
                report("prompt", "expected a prompt, or a .txt file with it beside the picture, got neither")
                return ()
            given = [beside]
        return tuple(dict.fromkeys(given))

    def _options(self, values: Mapping[str, Any], report: Callable[..., None]) -> dict[str, Any]:
        checks: dict[str, Callable[[Any], Any]] = {
            "weight": lambda value: checked_whole("weight", value, 1, MAX_WEIGHT),
            "flip": lambda value: checked_flag("flip", value),
            "id": lambda value: (
                str(checked_whole("id", value, -(2**63), 2**63))
                if isinstance(value, int) and not isinstance(value, bool)
                else checked_text("id", value)
            ),
            "source": lambda value: checked_text("source", value),
            "license": lambda value: checked_text("license", value),
        }
        options = {}
        for key, check in checks.items():
            if values.get(key) is not None:
                try:
                    options[key] = check(values[key])
                except SceneError as error:
                    report(key, _without_field(error), key)
        return options

    def _items(
        self,
        values: Mapping[str, Any],
        report: Callable[..., None],
        size: tuple[int, int] | None,
        stored: Stored | None,
    ) -> tuple[Any, ...]:
        items = []
        for key, spec in item_specs().items():
            listed = values.get(key)
            if listed is None:  # a column of parquet that a row does not use
                continue
            if not isinstance(listed, list):
                report("item", f"expected a list, got {shown(listed)}", key)
                continue
            for number, one in enumerate(listed, start=1):
                made = self._item(spec, f"{spec.name} {number}", one, report, size, stored)
                items += [] if made is None else [made]
        return tuple(items)

    def _item(
        self,
        spec: ItemSpec,
        item: str,
        one: Any,
        report: Callable[..., None],
        size: tuple[int, int] | None,
        stored: Stored | None,
    ) -> Any:
        """Make an item, or report all that is wrong: what is wrong is replaced, and it is tried again."""
        if not isinstance(one, dict):
            report("item", f"expected an object, got {shown(one)}", item=item)
            return None
        required, optional = required_and_optional(spec.type)
        known = [*required, *optional]
        values = {key: value for key, value in one.items() if key in known}
        for key in one:
            if key not in known:
                like = nearest(key, known)
                text = f"expected the keys {', '.join(known)}, got {shown(key)}{like}"
                report("key", text, item=item)
                for name in required:  # its value is checked under the name that was meant
                    if repr(name) in like:
                        values.setdefault(name, one[key])
        boxes = box_fields(spec.type)
        for name in boxes:
            if name in values:
                values[name] = to_shares(values[name], self.form, size)
        made, wrong = None, set()
        while made is None:
            try:
                with self._pictures():
                    made = spec.type.from_dict(values)
            except SceneError as error:
                field, _, _ = str(error).partition(": expected ")
                if field in PICTURES:
                    report("reference", _without_field(error), field, item)
                    return None
                if field not in values or field in wrong:
                    report("item", str(error), item=item)
                    return None
                wrong.add(field)
                text = _without_field(error)
                if field in boxes:
                    text = self._box_text(values[field], text, size, stored)
                report("box" if field in boxes else "phrase", text, field, item)
                if field in optional:
                    del values[field]
                else:
                    values[field] = (0.0, 0.0, 1.0, 1.0) if field in boxes else "x"
        return made if not wrong and set(one) <= set(known) else None

    def _pictures(self) -> AbstractContextManager[None]:
        """Lets items name pictures of the folder."""
        return nullcontext() if self.folder is None else picture_files(self.folder, base=self.folder)

    def _box_text(self, value: Any, text: str, size: tuple[int, int] | None, stored: Stored | None) -> str:
        """The message of a box that is refused, with the form that it seems to be in."""
        if self.form != "shares":
            return text
        if size is None and stored is not None:
            try:
                info = ImageRecord("", stored, ("",)).info()
                size = info.width, info.height
            except DataError:
                size = None
        if (form := likely_form(value, size)) is None:
            return text
        if form == "shares-xywh":
            return f"{text}: are these x, y, width, height? (--boxes {form})"
        unit, _, sides = form.partition("-")
        words = f"x, y, width, height in {unit}" if sides else unit
        worst = max(value)
        picture = "" if size is None else f" of a picture {size[0]} x {size[1]}"
        return f"expected shares from 0 to 1, got {worst}{picture}: are these {words}? (--boxes {form})"

    def _size(self, name: str, stored: Stored, line: int) -> tuple[int, int] | None:
        try:
            info = ImageRecord(name, stored, ("",)).info()
        except DataError as error:
            self.problems.add(Problem("picture", name, str(error), line, of_picture=True))
            return None
        return info.width, info.height


def _without_field(error: SceneError) -> str:
    """An error's sentence without the field's name in front of it."""
    return str(error).partition(": ")[2]


def _no_control(given: Any) -> None:
    if given is not None:
        raise DataError(
            f"expected no control image of a scene file, but of a row of metadata.jsonl, got {shown(given)}"
        )


def check_relative(name: Any, folder: Path) -> None:
    """Refuse what is no path of a file inside a folder.

    Raises:
        DataError: it is no text, absolute, or leads out of the folder.
    """
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"expected the name of a picture in {folder}/, got {shown(name)}")
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or name.startswith("\\")
    if absolute or ".." in PurePosixPath(name.replace("\\", "/")).parts:
        raise DataError(f"expected a path inside {folder}/, got {shown(name)}")


def is_file(path: Path) -> bool:
    """Whether a path is a file; not if no path can be so named."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long for the system, or with a null character in it
        return False
