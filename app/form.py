"""The fields of the page: made, read as a request, and filled from a picture or a scene."""

import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import gradio as gr

from interactdiff.app.document import Document
from interactdiff.app.limits import Limits
from interactdiff.app.picture_items import PictureItems, PlacedItem
from interactdiff.app.worker import GenerationRequest
from interactdiff.method_specs import Configurable, ItemSpec, MethodSpec, Setting
from interactdiff.models import PACKAGED, default_adapter, model_info
from interactdiff.picture import Record
from interactdiff.registry import configurables, methods
from interactdiff.scene import MAX_SEED, MAX_STRENGTH, Scene, SceneError, numbered
from interactdiff.scene_checks import checked_schedule, shown

OWN = "the model's own"
RANDOM_SEEDS = 2**31  # numbers that are not too long to read


def error_place(error: Exception) -> str:
    """Beside which field an error belongs: "prompt", "model", "settings", "canvas", or a panel by its name.

    A panel has a place of its own if it takes pictures.
    """
    if not isinstance(error, SceneError):
        return "model"
    panels = [*configurables(), *(item.name for spec in configurables().values() for item in items_of(spec))]
    numbers = ("seed", "steps", "guidance_scale", "schedule", "width", "height", "images")
    own = {
        name: (name, *(item.key for item in items_of(panel)))
        for name, panel in configurables().items()
        if has_pictures(panel)
    }
    places = own | {  # by how the message begins
        "prompt": ("prompt", "negative_prompt"),
        "model": ("expected an adapter for", "method"),
        "settings": (*numbers, *panels),
    }
    return next((place for place, starts in places.items() if str(error).startswith(starts)), "canvas")


def settings_fields(limits: Limits, model: str, adapters: Mapping[str, str], size: int) -> dict[str, Any]:
    """The fields of how a picture is generated, by name.

    Numbers have no limits here: Gradio would say so in a passing note, and not beside the field.
    """
    models = list(dict.fromkeys([*PACKAGED, model]))
    fields: dict[str, Any] = {}
    elsewhere = _elsewhere(limits)
    with gr.Row():
        fields["model"] = gr.Dropdown(
            models, value=model, label="Model", allow_custom_value=True, info=elsewhere, elem_id="model"
        )
        fields["interaction.adapter"] = _adapter_field("interaction", limits, adapters)
    with gr.Row():
        steps = min(30, limits.steps)
        fields["steps"] = gr.Number(steps, label="Steps", precision=0, elem_id="steps")
        fields["images"] = gr.Number(1, label="Pictures", precision=0, elem_id="images")
        fields["guidance_scale"] = gr.Number(None, label="Guidance scale", placeholder=OWN)
    fields["strength"] = gr.Slider(0, MAX_STRENGTH, value=1.0, step=0.05, label="Control strength")
    with gr.Row():
        fields["on"] = gr.Slider(
            0, 1, value=1.0, step=0.05, label="Control schedule: on", info="share of the steps"
        )
        fields["decay"] = gr.Slider(
            0, 1, value=0.0, step=0.05, label="Linear decay", info="share of the steps"
        )
    with gr.Row():
        fields["width"] = gr.Number(size, label="Width", precision=0, step=8, elem_id="width", info="pixels")
        fields["height"] = gr.Number(
            size, label="Height", precision=0, step=8, elem_id="height", info="pixels"
        )
    fields["negative_prompt"] = gr.Textbox(label="Negative prompt", lines=1)
    with gr.Row():
        fields["compare"] = gr.Checkbox(False, label="Also generate each without control", elem_id="compare")
        fields["fast"] = gr.Checkbox(False, label="Fast control")
        fields["record_attention"] = gr.Checkbox(True, label="Record attention maps")
    return fields


class Panel(NamedTuple):
    """A method's or a sampler's panel.

    Attributes:
        fields: whether it is used, its items, adapter and settings, by name.
        tools: by the name of a field of items the button that fills it from the canvas.
        pictures: by the name of a field of items that take pictures what the field is part of.
    """

    fields: dict[str, Any]
    tools: dict[str, Any]
    pictures: dict[str, PictureItems]


def panel_fields(panel: Configurable, limits: Limits, model: str, adapters: Mapping[str, str]) -> Panel:
    """Make a method's or a sampler's panel."""
    values = model_info(model).settings.get(panel.name, {})
    fields: dict[str, Any] = {f"{panel.name}.used": gr.Checkbox(False, label="Use")}
    tools: dict[str, Any] = {}
    pictures: dict[str, PictureItems] = {}
    gr.Markdown(panel.description)
    for item in items_of(panel):
        if item.from_picture is not None:
            name = f"{panel.name}.items.{item.key}"
            pictures[name] = PictureItems(item)
            fields[name] = pictures[name].kept
            continue
        label, info = item.key.capitalize(), f"a line each: {item.description}"
        name = f"{panel.name}.items.{item.key}"
        fields[name] = gr.Textbox(label=label, info=info, lines=2, placeholder=item.form)
        if item.from_box is not None:
            tools[name] = gr.Button(f"Take {item.key} from the canvas", size="sm")
    if isinstance(panel, MethodSpec) and panel.adapter is not None:
        fields[f"{panel.name}.adapter"] = _adapter_field(panel.name, limits, adapters)
    for setting in panel.settings:
        value = values.get(setting.name, setting.default)
        fields[f"{panel.name}.{setting.name}"] = _setting_field(setting, value)
    return Panel(fields, tools, pictures)


def items_of(panel: Configurable) -> tuple[ItemSpec, ...]:
    """The kinds of items that a panel has fields for."""
    return panel.items if isinstance(panel, MethodSpec) else ()


def has_pictures(panel: Configurable) -> bool:
    """Whether a panel has items that take pictures."""
    return any(item.from_picture is not None for item in items_of(panel))


def adapter_choices(method: str) -> list[str]:
    """The adapters of a method that can be chosen by name."""
    return [OWN, *(info.adapters[method] for info in PACKAGED.values() if method in info.adapters)]


def _adapter_field(method: str, limits: Limits, adapters: Mapping[str, str]) -> Any:
    chosen = adapters.get(method, OWN)
    return gr.Dropdown(
        list(dict.fromkeys([*adapter_choices(method), chosen])),
        value=chosen,
        label="Adapter",
        allow_custom_value=True,
        info=_elsewhere(limits),
    )


def _elsewhere(limits: Limits) -> str | None:
    return "or a folder, or a Hub id" if limits.hub else "or a folder" if limits.folders else None


def _setting_field(setting: Setting, value: Any) -> Any:
    if setting.choices:
        return gr.Dropdown(list(setting.choices), value=value, label=setting.label, info=setting.description)
    step = 1 if isinstance(setting.default, int) else 0.05
    return gr.Slider(
        setting.minimum,
        setting.maximum,
        value=value,
        step=step,
        label=setting.label,
        info=setting.description,
    )


def request_of(document: Document, values: Mapping[str, Any]) -> GenerationRequest:
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
    used, extra = {}, []
    for name, panel in configurables().items():
        given = ((spec, values.get(f"{name}.items.{spec.key}")) for spec in items_of(panel))
        items = [item for spec, value in given for item in _items(spec, value, document)]
        if items or values.get(f"{name}.used"):
            used[name] = {setting.name: values[f"{name}.{setting.name}"] for setting in panel.settings}
        extra += items
    scene = Scene(
        values["prompt"] or "",
        interactions,
        entities,
        negative_prompt=values["negative_prompt"] or "",
        seed=whole_number("seed", values["seed"]),
        steps=whole_number("steps", values["steps"]),
        guidance_scale=values["guidance_scale"],
        strength=values["strength"],
        schedule=(on, decay, max(0.0, 1 - on - decay)) if decay else on,
        fast=bool(values["fast"]),
        width=None if values["width"] is None else whole_number("width", values["width"]),
        height=None if values["height"] is None else whole_number("height", values["height"]),
        extra_items=tuple(extra),
    )
    adapters = adapters_of(values)
    return GenerationRequest(
        scene,
        whole_number("images", values["images"]),
        bool(values["compare"]),
        str(values["model"] or ""),
        {name: at for name, at in adapters.items() if name == "interaction" or name in used},
        used,
        bool(values["record_attention"]),
    )


def adapters_of(values: Mapping[str, Any]) -> dict[str, str]:
    """The adapters that the fields name, by their method; the model's own are left out."""
    named = {name: values.get(f"{name}.adapter") for name in methods()}
    return {name: str(value) for name, value in named.items() if value not in (None, "", OWN)}


def _items(spec: ItemSpec, value: Any, document: Document) -> list[Any]:
    """The items of a panel's field: of text one a line; of those with pictures where the canvas has them."""
    if spec.from_picture is not None:
        return [one.on(document) for one in value or ()]
    lines = [line for line in (value or "").splitlines() if line.strip()]
    return [
        numbered(spec.type, number, lambda line=line: spec.type.parse(line))
        for number, line in enumerate(lines, start=1)
    ]


def filled(record: Record, size: int | None) -> dict[str, Any]:
    """Values of the fields that generate a picture again.

    Args:
        record: of the picture.
        size: the model's own, for a scene that names none; None leaves such fields as they are.

    Raises:
        SceneError: the record has settings that there are not.
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
    }
    for name in methods():
        adapter = record.adapters.get(name)
        own = adapter in (None, default_adapter(record.model, name))
        values[f"{name}.adapter"] = OWN if own else adapter
    for name, panel in configurables().items():
        settings = panel.checked(record.model, record.methods[name]) if name in record.methods else None
        values[f"{name}.used"] = settings is not None
        values |= {f"{name}.{key}": value for key, value in (settings or {}).items()}
        for spec in items_of(panel):
            items = [item for item in scene.extra_items if isinstance(item, spec.type)]
            has_pictures = spec.from_picture is not None
            listed = tuple(map(PlacedItem, items)) if has_pictures else "\n".join(i.to_text() for i in items)
            values[f"{name}.items.{spec.key}"] = listed
    return values


def taken_from_canvas(spec: ItemSpec, document: Document, text: str | None) -> tuple[Document, str]:
    """Make items of the canvas's boxes that take part in no interaction.

    Args:
        spec: the kind of items.
        document: the canvas.
        text: what the field of items holds.

    Returns:
        The canvas without those boxes, and the field with a line for each.

    Raises:
        SceneError: a box has no phrase yet.
    """
    assert spec.from_box is not None
    linked = {end for link in document.links for end in (link.subject, link.object)}
    taken = [box for box in document.boxes if box.id not in linked]
    lines = [line for line in (text or "").splitlines() if line.strip()]
    lines += [spec.from_box(box.phrase, box.box).to_text() for box in taken]
    left = tuple(box for box in document.boxes if box.id in linked)
    return document.changed(boxes=left), "\n".join(lines)


def with_layout(document: Document, scene: Scene, size: int | None) -> Document:
    """The canvas of a scene, in the shape of its picture; where nobody says that, in the shape it has."""
    wide, high = scene.width or size, scene.height or size
    aspect = wide / high if wide and high else document.aspect
    return document.with_scene(scene).changed(aspect=aspect, picture=None)


def random_seed() -> int:
    """A seed that nobody chose."""
    return random.SystemRandom().randrange(min(RANDOM_SEEDS, MAX_SEED))


def whole_number(name: str, value: Any) -> int:
    """A number of a field.

    Raises:
        SceneError: it is not whole, or none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise SceneError(f"{name}: expected a whole number, got {shown(value)}")
    return int(value)
