"""The JSON Schema of a scene file, made from the limits that `scene` checks."""

from dataclasses import fields
from typing import Any

from interactdiff.registry import item_specs
from interactdiff.scene import MAX_GUIDANCE, MAX_SEED, MAX_STEPS, Scene
from interactdiff.scene_checks import MAX_SIDE, SIDE_MULTIPLE
from interactdiff.scene_items import MAX_STRENGTH

STRENGTH: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": MAX_STRENGTH, "default": 1.0}


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a scene file, for editors; docs/scene.schema.json holds this.

    A schema cannot say x0 < x1: `Scene.from_dict` is the judge.
    """
    defaults = {field.name: field.default for field in fields(Scene)}
    share = {"type": "number", "minimum": 0, "maximum": 1}
    side = {
        "type": ["integer", "null"],
        "minimum": SIDE_MULTIPLE,
        "maximum": MAX_SIDE,
        "multipleOf": SIDE_MULTIPLE,
    }
    properties: dict[str, dict[str, Any]] = {
        "prompt": {"type": "string"},
        **{key: {"type": "array", "items": dict(spec.schema)} for key, spec in item_specs().items()},
        "negative_prompt": {"type": "string"},
        "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED},
        "steps": {"type": "integer", "minimum": 1, "maximum": MAX_STEPS},
        "guidance_scale": {"type": ["number", "null"], "minimum": 0, "maximum": MAX_GUIDANCE},
        "strength": STRENGTH,
        "schedule": {
            "oneOf": [share, {"type": "array", "items": share, "minItems": 3, "maxItems": 3}],
            "description": "a share of the steps, or shares on, linear decay, off, which add up to 1",
        },
        "fast": {"type": "boolean"},
        "width": side,
        "height": side,
        "controls": {
            "type": ["object", "null"],
            "additionalProperties": {"type": "object", "additionalProperties": {"type": "number"}},
            "description": "settings of methods and of a sampler, by their names",
        },
    }
    for name, schema in properties.items():
        if name != "prompt" and name not in item_specs():
            properties[name] = {**schema, "default": defaults[name]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "interactdiff scene",
        "type": "object",
        "properties": {"$schema": {"type": "string"}, **properties},
        "required": ["prompt"],
        "additionalProperties": False,
    }
