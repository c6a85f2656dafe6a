"""interactdiff generate: draw a scene given by flags, by a scene file or by a picture drawn before."""

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path

from interactdiff.commands.arguments import (
    Commands,
    UsageError,
    add_models,
    check_picture_path,
    number,
    quiet_libraries,
    schedule,
    whole,
)
from interactdiff.models import MODEL
from interactdiff.picture import Record, installed_versions, overlay, read_record, save_picture
from interactdiff.scene import Entity, Interaction, Scene, numbered

INTERACTION_HELP = (
    'who does what to what, and where: "person|riding|bike|0.30,0.20,0.62,0.80|0.28,0.55,0.70,0.92"; boxes '
    "are x0,y0,x1,y1 as shares of width and height, the subject's first; an action of - leaves the action "
    "open (boxes only); |strength=0.5 and |action_region=union may follow; may be repeated"
)


def add_to(commands: Commands) -> None:
    """Add `generate`."""
    parser = commands.add_parser(
        "generate",
        help="draw a scene",
        description="Draw a scene given by flags, by a scene file (docs/scene.md) or by a picture drawn "
        "before; flags override what is in the file or the picture.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument("prompt", nargs="?", help="caption of the whole picture")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--scene", metavar="FILE", help="take the scene from a JSON file")
    source.add_argument("--from", dest="drawn", metavar="PNG", help="draw a picture again, bit for bit")
    parser.add_argument("--interaction", action="append", metavar="S|A|O|BOX|BOX", help=INTERACTION_HELP)
    parser.add_argument(
        "--entity",
        action="append",
        metavar="PHRASE|BOX",
        help='what else is where: "red ball|0.70,0.60,0.90,0.80"; |strength=0.5 may follow; may be repeated',
    )
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
        ("guidance_scale", number, "how strongly the prompt guides; up to 1 is off"),
        ("negative_prompt", str, "what to steer away from"),
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
        help="reuse what control added at earlier steps: most of its time is saved (default: no)",
    )
    parser.add_argument("--overlay", action="store_true", help="also write OUT.overlay.png, with boxes drawn")
    parser.add_argument(
        "--method",
        action="append",
        metavar="NAME[:SETTING=X,...]",
        help="draw by a method too: high_resolution:scale=2 (docs/clear.md); may be repeated",
    )
    add_models(parser)
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="precision (default: auto, float16 on cuda, else float32)",
    )


def _run(args: argparse.Namespace) -> None:
    record = read_record(args.drawn) if args.drawn else None
    scene, asked = _scene(args, record), _methods(args, record)
    out = args.out or (Path(args.drawn).with_suffix(".again.png") if args.drawn else Path("out.png"))
    check_picture_path(out)
    beside = out.with_suffix(".overlay.png") if args.overlay else None
    if beside is not None:
        check_picture_path(beside)
    if record is not None:
        _note_other_versions(record)
        _take_over(args, record)
    quiet_libraries()
    from interactdiff.generate import Drawer
    from interactdiff.methods import checked_methods, draw

    drawer = Drawer.load(args.model or MODEL, args.adapter, args.device or "auto", args.dtype or "auto")
    image = draw(drawer, scene, asked)
    drawn_as = drawer.record(scene, checked_methods(drawer, asked))
    save_picture(image, out, drawn_as)
    print(out)
    if beside is not None:
        save_picture(overlay(image, scene.interactions, scene.entities), beside, drawn_as)
        print(beside)


def _scene(args: argparse.Namespace, record: Record | None) -> Scene:
    """The scene of the file or the picture, if there is one, and over it what the flags say."""
    names = {field.name for field in fields(Scene)} - {"interactions", "entities"}
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    for name, kind, texts in (
        ("interactions", Interaction, args.interaction),
        ("entities", Entity, args.entity),
    ):
        if texts is not None:
            made = (numbered(kind, n, lambda t=t, k=kind: k.parse(t)) for n, t in enumerate(texts, start=1))
            given[name] = tuple(made)
    if record is not None:
        return replace(record.scene, **given)
    if args.scene is not None:
        return replace(Scene.from_file(args.scene), **given)
    if args.prompt is None:
        raise UsageError("expected a prompt, --scene FILE or --from PNG, got none of them")
    return Scene(**given)


def _methods(args: argparse.Namespace, record: Record | None) -> dict[str, dict[str, float]]:
    """Those of the picture, if there is one, and over them what the flags say."""
    asked = {} if record is None else {name: dict(values) for name, values in record.methods.items()}
    for text in args.method or []:
        name, _, settings = text.partition(":")
        values = asked.setdefault(name.strip(), {})
        for part in filter(None, settings.split(",")):
            key, _, value = part.partition("=")
            try:
                values[key.strip()] = float(value)
            except ValueError:
                raise UsageError(f"--method: expected NAME:SETTING=number, got {text!r}") from None
    return asked


def _take_over(args: argparse.Namespace, record: Record) -> None:
    """Where flags are silent, draw with what the picture was drawn with."""
    if args.model is None:
        args.model, args.adapter = record.model, args.adapter or record.adapter
    args.device, args.dtype = args.device or record.device, args.dtype or record.dtype


def _note_other_versions(record: Record) -> None:
    """Say on stderr why a picture drawn again may differ."""
    for name, now in installed_versions().items():
        then = record.versions.get(name)
        if then != now:
            print(f"interactdiff: drawn with {name} {then}, now {now}: pixels may differ", file=sys.stderr)
