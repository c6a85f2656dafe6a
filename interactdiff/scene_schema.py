"""The JSON Schema of a scene file, made from the limits that `scene` checks."""

from dataclasses import fields
from typing import Any

from interactdiff.scene import (
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    MAX_STRENGTH,
    SIDE_MULTIPLE,
    Interaction,
    Scene,
)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a scene file, for editors; docs/scene.schema.json holds this.

    A schema cannot say x0 < x1: `Scene.from_dict` is the judge.
    """
    defaults = {field.name: field.default for field in fields(Scene)}
    phrase = {"type": "string", "pattern": r"\S"}
    box = {
        "type": "array",
        "items": {"type": "number", "minimum": 0, "maximum": 1},
        "minItems": 4,
        "maxItems": 4,
        "description": "x0, y0, x1, y1 as shares of width and height, x0 < x1 and y0 < y1",
    }
    interaction = {
        "type": "object",
        "properties": {
            "subject": phrase,
            "action": {**phrase, "type": ["string", "null"], "description": "null: boxes only"},
            "object": phrase,
            "subject_box": box,
            "object_box": box,
        },
        "required": [field.name for field in fields(Interaction)],
        "additionalProperties": False,
    }
    side = {
        "type": ["integer", "null"],
        "minimum": SIDE_MULTIPLE,
        "maximum": MAX_SIDE,
        "multipleOf": SIDE_MULTIPLE,
    }
    properties: dict[str, dict[str, Any]] = {
        "prompt": {"type": "string"},
        "interactions": {"type": "array", "items": interaction},
        "negative_prompt": {"type": "string"},
        "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED},
        "steps": {"type": "integer", "minimum": 1, "maximum": MAX_STEPS},
        "guidance_scale": {"type": ["number", "null"], "minimum": 0, "maximum": MAX_GUIDANCE},
        "strength": {"type": "number", "minimum": 0, "maximum": MAX_STRENGTH},
        "schedule": {"type": "number", "minimum": 0, "maximum": 1},
        "width": side,
        "height": side,
    }
    for name, schema in properties.items():
        if name not in ("prompt", "interactions"):
            properties[name] = {**schema, "default": defaults[name]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "interactdiff scene",
        "type": "object",
        "properties": {"$schema": {"type": "string"}, **properties},
        "required": ["prompt"],
        "additionalProperties": False,
    }
