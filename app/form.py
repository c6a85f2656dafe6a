"""The fields of the page: made, read as an order, and filled from a picture or a scene."""

import random
from collections.abc import Mapping
from typing import Any

import gradio as gr

from interactdiff.app.artist import Order
from interactdiff.app.document import Document
from interactdiff.app.limits import Limits
from interactdiff.methods import Method, Setting, methods
from interactdiff.models import ADAPTERS, MODELS, default_adapter
from interactdiff.picture import Record
from interactdiff.scene import MAX_SEED, MAX_STRENGTH, Scene, SceneError
from interactdiff.scene_checks import checked_schedule, shown

OWN = "the model's own"
# Beside which fields a refused scene is explained, by how the message begins; else beside the canvas.
PLACES = {
    "prompt": ("prompt", "negative_prompt"),
    "model": ("expected an adapter for", "method"),
    "settings": ("seed", "steps", "guidance_scale", "schedule", "width", "height", "images", *methods()),
}
RANDOM_SEEDS = 2**31  # numbers that are not too long to read


def place_of(error: Exception) -> str:
    """Which field a refusal belongs beside: "model", "canvas" or another one of `PLACES`."""
    if not isinstance(error, SceneError):
        return "model"
    return next((place for place, starts in PLACES.items() if str(error).startswith(starts)), "canvas")


def settings_fields(limits: Limits, model: str, adapter: str | None, size: int) -> dict[str, Any]:
    """The fields of how a picture is drawn, by name.

    Numbers have no limits here: Gradio would say so in a passing note, and not beside the field.
    """
    models = list(dict.fromkeys([*MODELS, model]))
    adapters = list(dict.fromkeys([OWN, *ADAPTERS.values(), adapter or OWN]))
    fields: dict[str, Any] = {}
    elsewhere = "or a folder, or a Hub id" if limits.hub else "or a folder" if limits.folders else None
    with gr.Row():
        fields["model"] = gr.Dropdown(
            models, value=model, label="Model", allow_custom_value=True, info=elsewhere, elem_id="model"
        )
        fields["adapter"] = gr.Dropdown(
            adapters, value=adapter or OWN, label="Adapter", allow_custom_value=True, info=elsewhere
        )
    with gr.Row():
        steps = min(30, limits.steps)
        fields["steps"] = gr.Number(steps, label="Steps", precision=0, elem_id="steps")
        fields["images"] = gr.Number(1, label="Pictures", precision=0, elem_id="images")
        fields["guidance_scale"] = gr.Number(None, label="Guidance", placeholder=OWN)
    fields["strength"] = gr.Slider(0, MAX_STRENGTH, value=1.0, step=0.05, label="Strength of control")
    with gr.Row():
        fields["on"] = gr.Slider(
            0, 1, value=1.0, step=0.05, label="Control acts for", info="share of the steps"
        )
        fields["decay"] = gr.Slider(
            0, 1, value=0.0, step=0.05, label="and fades over", info="share of the steps"
        )
    with gr.Row():
        fields["width"] = gr.Number(size, label="Width", precision=0, step=8, elem_id="width", info="pixels")
        fields["height"] = gr.Number(
            size, label="Height", precision=0, step=8, elem_id="height", info="pixels"
        )
    fields["negative_prompt"] = gr.Textbox(label="Steer away from", lines=1)
    with gr.Row():
        fields["compare"] = gr.Checkbox(False, label="Also draw each without control", elem_id="compare")
        fields["fast"] = gr.Checkbox(False, label="Fast control")
        fields["look"] = gr.Checkbox(True, label="Record where it looks")
    return fields


def method_fields(method: Method, model: str) -> dict[str, Any]:
    """A panel's fields: whether the method is used, and its settings."""
    suited = method.suited.get(model, {})
    fields: dict[str, Any] = {f"{method.name}.used": gr.Checkbox(False, label="Draw by this method")}
    gr.Markdown(method.about)
    for setting in method.settings:
        fields[f"{method.name}.{setting.name}"] = _field_of(
            setting, suited.get(setting.name, setting.default)
        )
    return fields


def _field_of(setting: Setting, value: Any) -> Any:
    if setting.choices:
        return gr.Dropdown(list(setting.choices), value=value, label=setting.label, info=setting.about)
    step = 1 if isinstance(setting.default, int) else 0.05
    return gr.Slider(
        setting.minimum, setting.maximum, value=value, step=step, label=setting.label, info=setting.about
    )


def order_of(document: Document, values: Mapping[str, Any]) -> Order:
    """What a filled page asks for.

    Args:
        document: the canvas.
        values: of the fields, by name.

    Raises:
        SceneError: in one sentence, for a field that is not what it should be.
    """
    interactions, entities = document.items
    on, decay = (float(values[name] or 0) for name in ("on", "decay"))
    if on + decay > 1 + 1e-6:
        raise SceneError(f"schedule: expected both shares to be at most 1 together, got {on:g} and {decay:g}")
    scene = Scene(
        values["prompt"] or "",
        interactions,
        entities,
        negative_prompt=values["negative_prompt"] or "",
        seed=_whole("seed", values["seed"]),
        steps=_whole("steps", values["steps"]),
        guidance_scale=values["guidance_scale"],
        strength=values["strength"],
        schedule=(on, decay, max(0.0, 1 - on - decay)) if decay else on,
        fast=bool(values["fast"]),
        width=None if values["width"] is None else _whole("width", values["width"]),
        height=None if values["height"] is None else _whole("height", values["height"]),
    )
    used = {name: method for name, method in methods().items() if values.get(f"{name}.used")}
    asked = {
        name: {setting.name: values[f"{name}.{setting.name}"] for setting in method.settings}
        for name, method in used.items()
    }
    return Order(
        scene,
        _whole("images", values["images"]),
        bool(values["compare"]),
        str(values["model"] or ""),
        adapter_of(values["adapter"]),
        asked,
        bool(values["look"]),
    )


def adapter_of(value: str | None) -> str | None:
    """The name of an adapter, or None for the model's own."""
    return None if value in (None, "", OWN) else str(value)


def filled(record: Record, size: int | None) -> dict[str, Any]:
    """Values of the fields that draw a picture again.

    Args:
        record: of the picture.
        size: the model's own, for a scene that names none; None leaves such fields as they are.
    """
    scene = record.scene
    on, decay, _ = checked_schedule(scene.schedule)
    values: dict[str, Any] = {
        "prompt": scene.prompt,
        "negative_prompt": scene.negative_prompt,
        "seed": scene.seed,
        "steps": scene.steps,
        "guidance_scale": scene.guidance_scale,
        "strength": scene.strength,
        "on": on,
        "decay": decay,
        "fast": scene.fast,
        "width": scene.width or size or gr.skip(),
        "height": scene.height or size or gr.skip(),
        "images": 1,
        "compare": False,
        "model": record.model,
        "adapter": OWN if record.adapter in (None, default_adapter(record.model)) else record.adapter,
    }
    for name in methods():
        asked = record.methods.get(name)
        values[f"{name}.used"] = asked is not None
        values |= {f"{name}.{key}": value for key, value in (asked or {}).items()}
    return values


def laid_out(document: Document, scene: Scene, size: int | None) -> Document:
    """The canvas of a scene, in the shape of its picture; where nobody says that, in the shape it has."""
    wide, high = scene.width or size, scene.height or size
    aspect = wide / high if wide and high else document.aspect
    return document.with_scene(scene).changed(aspect=aspect, picture=None)


def random_seed() -> int:
    """A seed that nobody chose."""
    return random.SystemRandom().randrange(min(RANDOM_SEEDS, MAX_SEED))


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise SceneError(f"{name}: expected a whole number, got {shown(value)}")
    return int(value)
