"""Code that draws a picture again, from its record."""

import shlex
from dataclasses import fields
from typing import Any

from interactdiff.picture import Record
from interactdiff.scene import NULL_ACTION, Entity, Interaction, Scene


def as_python(record: Record) -> str:
    """A script that draws the same picture."""
    names = [
        kind.__name__
        for kind in (Entity, Interaction)
        if any(isinstance(i, kind) for i in record.scene.items)
    ]
    where = [repr(record.model), repr(record.adapter), f"device={record.device!r}", f"dtype={record.dtype!r}"]
    lines = [
        f"from interactdiff import {', '.join([*names, 'Scene'])}",
        "from interactdiff.generation import ScenePipeline",
    ]
    drawing, kept = "drawer.generate(scene)", "drawer.record(scene)"
    if record.methods:
        lines.append("from interactdiff.methods import draw")
        drawing, kept = "draw(drawer, scene, methods)", "drawer.record(scene, methods)"
    lines += ["from interactdiff.picture import save_picture", "", f"scene = {_call(record.scene)}"]
    if record.methods:
        lines.append(f"methods = {record.methods!r}")
    lines += [
        f"drawer = ScenePipeline.from_pretrained({', '.join(where)})",
        f'save_picture({drawing}, "picture.png", {kept})',
    ]
    return "\n".join(lines) + "\n"


def as_command(record: Record) -> str:
    """A command line that draws the same picture.

    A phrase with a bar in it cannot be a flag's; the scene is then a file that the command line writes first.
    """
    scene = record.scene
    words = ["interactdiff", "generate"]
    before = ""
    phrases = [text for item in scene.items for text in vars(item).values() if isinstance(text, str)]
    if any("|" in phrase for phrase in phrases) or any(
        isinstance(item, Interaction) and item.action == NULL_ACTION for item in scene.items
    ):
        before = f"cat > scene.json <<'SCENE'\n{scene.to_json()}SCENE\n"
        words += ["--scene", "scene.json"]
    else:
        words += ["--", scene.prompt] if scene.prompt.startswith("-") else [scene.prompt]
        flags = _flags(scene)
        words = words[:2] + flags + words[2:] if "--" in words else words + flags
    chosen = {
        "model": record.model,
        "adapter": record.adapter,
        "device": record.device,
        "dtype": record.dtype,
    }
    where = [text for name, value in chosen.items() if value is not None for text in (f"--{name}", value)]
    for name, values in record.methods.items():
        settings = ",".join(f"{key}={value!r}" for key, value in values.items())
        where += ["--method", f"{name}:{settings}"]
    where += ["--out", "picture.png"]
    words = words[:2] + where + words[2:]
    return before + shlex.join(words) + "\n"


def _flags(scene: Scene) -> list[str]:
    """Of everything that is not as a scene has it by default."""
    flags = []
    for one in scene.interactions:
        boxes = (_numbers(box) for box in (one.subject_box, one.object_box))
        parts = [one.subject, one.action or NULL_ACTION, one.object, *boxes, *_options(one)]
        flags += ["--interaction", "|".join(parts)]
    for one in scene.entities:
        flags += ["--entity", "|".join([one.phrase, _numbers(one.box), *_options(one)])]
    for field in fields(Scene):
        value = getattr(scene, field.name)
        if field.name in ("prompt", "interactions", "entities") or value == field.default:
            continue
        flag = "--" + field.name.replace("_", "-")
        if field.name == "fast":
            flags.append(flag)
        else:
            flags.append(f"{flag}={_numbers(value) if isinstance(value, tuple) else value}")
    return flags


def _options(item: Interaction | Entity) -> list[str]:
    options = [] if item.strength == 1 else [f"strength={item.strength!r}"]
    region = getattr(item, "action_region", None)
    return options if region is None else [*options, f"action_region={region}"]


def _numbers(values: tuple[float, ...]) -> str:
    return ",".join(map(repr, values))


def _call(value: Any, indent: int = 0) -> str:
    """The expression that makes a scene or an item of it, without what is as by default."""
    space = " " * (indent + 4)
    given = []
    for field in fields(value):
        one = getattr(value, field.name)
        if one == field.default:
            continue
        if field.name in ("interactions", "entities"):
            listed = "".join(f"{space}    {_call(item, indent + 4)},\n" for item in one)
            given.append(f"{space}{field.name}=(\n{listed}{space}),\n")
        else:
            given.append(f"{space}{field.name}={one!r},\n")
    return f"{type(value).__name__}(\n{''.join(given)}{' ' * indent})"
