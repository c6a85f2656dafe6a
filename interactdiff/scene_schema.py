"""The JSON Schema of a scene file, made from the limits that `scene` checks."""

from dataclasses import fields
from typing import Any

from interactdiff.scene import (
    ACTION_REGIONS,
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_STEPS,
    MAX_STRENGTH,
    Scene,
)
from interactdiff.scene_checks import MAX_SIDE, SIDE_MULTIPLE


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
    strength = {"type": "number", "minimum": 0, "maximum": MAX_STRENGTH, "default": 1.0}
    share = {"type": "number", "minimum": 0, "maximum": 1}
    interaction = {
        "type": "object",
        "properties": {
            "subject": phrase,
            "action": {**phrase, "type": ["string", "null"], "description": "null: boxes only"},
            "object": phrase,
            "subject_box": box,
            "object_box": box,
            "strength": strength,
            "action_region": {"enum": [None, *ACTION_REGIONS], "default": None},
        },
        "required": ["subject", "action", "object", "subject_box", "object_box"],
        "additionalProperties": False,
    }
    entity = {
        "type": "object",
        "properties": {"phrase": phrase, "box": box, "strength": strength},
        "required": ["phrase", "box"],
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
        "entities": {"type": "array", "items": entity},
        "negative_prompt": {"type": "string"},
        "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED},
        "steps": {"type": "integer", "minimum": 1, "maximum": MAX_STEPS},
        "guidance_scale": {"type": ["number", "null"], "minimum": 0, "maximum": MAX_GUIDANCE},
        "strength": strength,
        "schedule": {
            "oneOf": [share, {"type": "array", "items": share, "minItems": 3, "maxItems": 3}],
            "description": "a share of the steps, or shares on, linear decay, off, which add up to 1",
        },
        "fast": {"type": "boolean"},
        "width": side,
        "height": side,
    }
    for name, schema in properties.items():
        if name not in ("prompt", "interactions", "entities"):
            properties[name] = {**schema, "default": defaults[name]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "interactdiff scene",
        "type": "object",
        "properties": {"$schema": {"type": "string"}, **properties},
        "required": ["prompt"],
        "additionalProperties": False,
    }
