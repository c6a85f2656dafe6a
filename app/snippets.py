"""Code that generates a picture again, from its record; of the package's public names alone."""

import shlex
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from interactdiff.picture import Record
from interactdiff.registry import item_specs
from interactdiff.scene import CONTROLS, EXTRA_ITEMS, Scene, SceneError

LONGEST_FLAG = 1000  # letters
LONGEST_CODE = 50_000  # letters; of a scene with photos, whose pixels are code too, there would be millions


def as_python(record: Record, name: str = "downloaded.png", learned: Collection[str] = ()) -> str:
    """A script that generates the same picture.

    Args:
        record: of the picture.
        name: of its file, which is read where the scene is too long for code.
        learned: adapters that are read from their downloaded archives.
    """
    unpacked = _unpacking(record, learned)
    scene = record.scene
    own = sorted({type(item).__name__ for item in (*scene.interactions, *scene.entities)})
    names = [*own, "Scene", "generate"]
    lines = [*unpacked, f"from interactdiff import {', '.join(names)}"]
    others = sorted({(type(item).__module__, type(item).__name__) for item in scene.extra_items})
    lines += [f"from {module} import {name}" for module, name in others]
    options = {"model": record.model, "adapters": record.adapters}
    options |= {"methods": record.methods} if record.methods else {}
    options |= {"device": record.device, "dtype": record.dtype}
    lines += ["", f"scene = {_call(scene)}", "picture = generate(", "    scene,"]
    lines += [f"    {name}={value!r}," for name, value in options.items()]
    lines += [")", 'picture.save("picture.png")']
    code = "\n".join(lines) + "\n"
    if len(code) <= LONGEST_CODE:
        return code
    given = ("model", "adapters", "methods", "device", "dtype")
    options = "".join(f", {key}=record.{key}" for key in given)
    return "".join(f"{line}\n" for line in unpacked) + (
        "from interactdiff import generate\nfrom interactdiff.picture import read_record\n\n"
        f"record = read_record({name!r})  # the scene with its pictures is in the PNG: download it\n"
        f'picture = generate(record.scene{options})\npicture.save("picture.png")\n'
    )


def as_command(record: Record, name: str = "downloaded.png", learned: Collection[str] = ()) -> str:
    """A command line that generates the same picture.

    A phrase with a bar in it cannot be a flag's, nor can a picture's pixels; the scene is then a file that
    the command line writes first, or that of the picture itself.

    Args:
        record: of the picture.
        name: of its file.
        learned: as of `as_python`.
    """
    scene = record.scene
    words = ["interactdiff", "generate"]
    before = "".join(f"{line}\n" for line in _unpacking(record, learned))
    try:
        flags = _item_flags(scene) + _flags(scene)
        if any(len(flag) > LONGEST_FLAG for flag in flags):  # a picture's pixels
            raise SceneError(f"expected flags of at most {LONGEST_FLAG} letters")
    except SceneError:
        written = f"cat > scene.json <<'SCENE'\n{scene.to_json()}SCENE\n"
        if len(written) > LONGEST_CODE:
            before += "# the scene with its pictures is in the PNG: download it\n"
            words += ["--from", name]
            return before + shlex.join([*words, "--out", "picture.png"]) + "\n"
        before += written
        words += ["--scene", "scene.json"]
    else:
        words += ["--", scene.prompt] if scene.prompt.startswith("-") else [scene.prompt]
        words = words[:2] + flags + words[2:] if "--" in words else words + flags
    options = ["--model", record.model]
    for name, at in record.adapters.items():
        if at is not None:
            options += ["--adapter", at if name == "interaction" else f"{name}={at}"]
    options += ["--device", record.device, "--dtype", record.dtype]
    for name, values in record.methods.items():
        settings = ",".join(f"{key}={value!r}" for key, value in values.items())
        options += ["--method", f"{name}:{settings}" if settings else name]
    options += ["--out", "picture.png"]
    return before + shlex.join(words[:2] + options + words[2:]) + "\n"


def _unpacking(record: Record, learned: Collection[str]) -> list[str]:
    """Comments on how to get the adapters that a page offers as archives."""
    return [
        f"# what was learned is in the archive that the page offers: unzip {at}.zip -d {at}"
        for at in record.adapters.values()
        if at in learned
    ]


def _item_flags(scene: Scene) -> list[str]:
    """Of all items.

    Raises:
        SceneError: one has no form as a flag.
    """
    kinds = {spec.type: spec for spec in item_specs().values()}
    return [word for item in scene.items for word in (f"--{kinds[type(item)].name}", item.to_text())]


def _flags(scene: Scene) -> list[str]:
    """Of everything else that is not as a scene has it by default."""
    flags = []
    for field in fields(Scene):
        value = getattr(scene, field.name)
        if field.name in ("prompt", EXTRA_ITEMS, CONTROLS, *item_specs()) or value == field.default:
            continue
        flag = "--" + field.name.replace("_", "-")
        if field.name == "fast":
            flags.append(flag)
        else:
            text = ",".join(map(repr, value)) if isinstance(value, tuple) else value
            flags.append(f"{flag}={text}")
    return flags


def _call(value: Any, indent: int = 0) -> str:
    """The expression that makes a scene or an item of it, without what is as by default."""
    space = " " * (indent + 4)
    given = []
    for field in fields(value):
        one = getattr(value, field.name)
        if one == field.default:
            continue
        if isinstance(value, Scene) and field.name in ("interactions", "entities", EXTRA_ITEMS):
            listed = "".join(f"{space}    {_call(item, indent + 4)},\n" for item in one)
            given.append(f"{space}{field.name}=(\n{listed}{space}),\n")
        else:
            given.append(f"{space}{field.name}={one!r},\n")
    return f"{type(value).__name__}(\n{''.join(given)}{' ' * indent})"
