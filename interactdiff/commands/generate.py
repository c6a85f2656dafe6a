"""interactdiff generate: a picture of a scene given by flags, by a scene file or by an earlier picture."""

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path

from interactdiff.commands.arguments import (
    Commands,
    UsageError,
    adapters_of,
    add_models,
    add_variant,
    check_picture_path,
    method_settings,
    number,
    quiet_libraries,
    schedule,
    whole,
)
from interactdiff.method_specs import MethodError
from interactdiff.models import MODEL
from interactdiff.picture import Record, installed_versions, overlay, read_record, save_picture
from interactdiff.registry import configurables, item_specs, used_methods
from interactdiff.scene import CONTROLS, EXTRA_ITEMS, Scene, numbered
from interactdiff.scene_pictures import picture_files


def add_to(commands: Commands) -> None:
    """Add `generate`."""
    parser = commands.add_parser(
        "generate",
        help="generate a scene",
        description="Generate a scene given by flags, by a scene file (docs/scene.md) or by a picture "
        "generated before; flags override what is in the file or the picture.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument("prompt", nargs="?", help="caption of the whole picture")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--scene", metavar="FILE", help="take the scene from a JSON file")
    source.add_argument("--from", dest="picture", metavar="PNG", help="generate a picture again, bit for bit")
    defaults = {field.name: field.default for field in fields(Scene)}
    for name, kind, what in (
        ("seed", whole, "of the starting noise"),
        ("steps", whole, "denoising steps"),
        ("strength", number, "how strongly the interactions act, 0 to 2"),
        (
            "schedule",
            schedule,
            "share of the steps in which they act, from the first; or on,decay,off",
        ),
        ("guidance_scale", number, "classifier-free guidance; up to 1 is off"),
        ("negative_prompt", str, "what not to show"),
        ("width", whole, "pixels, a multiple of 8"),
        ("height", whole, "pixels, a multiple of 8"),
    ):
        default = defaults[name]
        shown = "the model's own" if default is None else default if default != "" else "none"
        flag = "--" + name.replace("_", "-")
        metavar = "TEXT" if kind is str else "N" if kind is whole else "X"
        parser.add_argument(flag, dest=name, type=kind, metavar=metavar, help=f"{what} (default: {shown})")
    parser.add_argument(
        "--out", type=Path, metavar="PNG", help="what to write (default: out.png; with --from NAME.again.png)"
    )
    parser.add_argument(
        "--fast",
        action=argparse.BooleanOptionalAction,
        help="reuse residuals of earlier steps: most of the adapter's time is saved (default: no)",
    )
    parser.add_argument("--overlay", action="store_true", help="also write OUT.overlay.png, with boxes drawn")
    parser.add_argument(
        "--method",
        action="append",
        metavar="NAME[:SETTING=X,...]",
        help=f"use a method or a sampler ({', '.join(configurables())}), with settings: "
        "high_resolution:scale=2 (docs/clear.md); may be repeated, with one sampler at most",
    )
    add_models(parser)
    add_variant(parser)
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="precision (default: auto, float16 on cuda, else float32)",
    )

    items = parser.add_argument_group("items of the scene")
    for key, spec in item_specs().items():
        try:
            items.add_argument(
                f"--{spec.name}", dest=key, action="append", metavar=spec.form, help=spec.description
            )
        except argparse.ArgumentError as error:
            raise MethodError(f"expected items with flags of their own, got --{spec.name}: {error}") from None


def _run(args: argparse.Namespace) -> None:
    record = read_record(args.picture) if args.picture else None
    with picture_files():
        scene = _scene(args, record)
    adapters = adapters_of(args)
    used = used_methods(scene, _methods(args, record))
    out = args.out or (Path(args.picture).with_suffix(".again.png") if args.picture else Path("out.png"))
    check_picture_path(out)
    beside = out.with_suffix(".overlay.png") if args.overlay else None
    if beside is not None:
        check_picture_path(beside)
    if record is not None:
        _note_other_versions(record)
        if args.model is None:  # where flags are silent, what the picture was generated with
            args.model, adapters = record.model, {**record.adapters, **adapters}
        args.device, args.dtype = args.device or record.device, args.dtype or record.dtype
    quiet_libraries()
    from interactdiff.generation import ScenePipeline

    pipeline = ScenePipeline.from_pretrained(
        args.model or MODEL,
        adapters,
        args.device or "auto",
        args.dtype or "auto",
        methods=used,
        variant=args.variant,
    )
    image = pipeline.generate(scene, methods=used)
    if pipeline.handle is not None and scene.extra_items:  # such as what found a subject in its picture
        print(pipeline.handle.describe(), file=sys.stderr)
    saved = pipeline.record(scene, pipeline.checked_settings(used))
    save_picture(image, out, saved)
    print(out)
    if beside is not None:
        boxes = overlay(image, scene.interactions, scene.entities, scene.extra_items)
        save_picture(boxes, beside, saved)
        print(beside)


def _scene(args: argparse.Namespace, record: Record | None) -> Scene:
    """The scene of the file or the picture, if there is one, and over it what the flags say."""
    base = Scene("") if record is None else record.scene
    if args.scene is not None:
        base = Scene.from_file(args.scene)
    elif record is None and args.prompt is None:
        raise UsageError("expected a prompt, --scene FILE or --from PNG, got none of them")
    names = {field.name for field in fields(Scene)} - {EXTRA_ITEMS, CONTROLS, *item_specs()}
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    extra = base.extra_items
    for key, spec in item_specs().items():
        if (texts := getattr(args, key)) is None:
            continue
        kind = spec.type
        items = tuple(numbered(kind, n, lambda t=t, k=kind: k.parse(t)) for n, t in enumerate(texts, start=1))
        if hasattr(base, key):
            given[key] = items
        else:
            extra = (*(item for item in extra if not isinstance(item, kind)), *items)
    return replace(base, **given, extra_items=extra)


def _methods(args: argparse.Namespace, record: Record | None) -> dict[str, dict[str, float]]:
    """Those of the picture, if there is one, and over them what the flags say."""
    used = {} if record is None else {name: dict(values) for name, values in record.methods.items()}
    for name, values in method_settings(args.method or []).items():
        used.setdefault(name, {}).update(values)
    return used


def _note_other_versions(record: Record) -> None:
    """Say on stderr why a picture that is generated again may differ."""
    for name, now in installed_versions().items():
        then = record.versions.get(name)
        if then != now:
            print(f"interactdiff: drawn with {name} {then}, now {now}: pixels may differ", file=sys.stderr)
