"""The command line: interactdiff generate | demo | evaluate | train.

Bad input ends with one sentence on stderr and exit code 2, and nothing is written. Heavy imports come after
everything that can be refused without them.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NoReturn

from interactdiff import __version__
from interactdiff.checkpoint import AdapterError
from interactdiff.files import why_unwritable, write_aside
from interactdiff.models import GUIDANCE_SCALES, MODEL, ModelError
from interactdiff.picture import (
    PictureError,
    Record,
    enlarged,
    installed_versions,
    overlay,
    read_record,
    save_picture,
    side_by_side,
)
from interactdiff.scene import Interaction, Scene, SceneError

DEMO = Scene(
    prompt="a person in blue riding a red bike on the beach",
    interactions=(
        Interaction(
            subject="person in blue",
            action="riding",
            object="red bike",
            subject_box=(0.32, 0.06, 0.68, 0.68),
            object_box=(0.23, 0.58, 0.77, 0.95),
        ),
    ),
    seed=7,
)
INTERACTION_HELP = (
    'who does what to what, and where: "person|riding|bike|0.30,0.20,0.62,0.80|0.28,0.55,0.70,0.92"; boxes '
    "are x0,y0,x1,y1 as shares of width and height, the subject's first; an action of - leaves the action "
    "open (boxes only); may be repeated"
)


class UsageError(ValueError):
    """A command line that asks for nothing that can be done; the message is one sentence."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0, 2 for bad input, 130 after Ctrl-C.
    """
    try:
        args = build_parser().parse_args(argv)
        args.run(args)
    except (UsageError, SceneError, PictureError, ModelError, AdapterError) as error:
        print("interactdiff: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except OSError as error:  # a disk that fills up while it is written to
        print(f"interactdiff: expected files that can be read and written, got {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run` to its function."""
    parser = _Parser(prog="interactdiff", description="Who does what to what, and where: get that picture.")
    parser.add_argument("--version", action="version", version=f"interactdiff {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_demo(commands)
    _add_evaluate(commands)
    _add_train(commands)
    return parser


def _add_generate(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "generate",
        help="draw a scene",
        description="Draw a scene given by flags, by a scene file (docs/scene.md) or by a picture drawn "
        "before; flags override what is in the file or the picture.",
    )
    parser.set_defaults(run=_generate)
    parser.add_argument("prompt", nargs="?", help="caption of the whole picture")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--scene", metavar="FILE", help="take the scene from a JSON file")
    source.add_argument("--from", dest="drawn", metavar="PNG", help="draw a picture again, bit for bit")
    parser.add_argument("--interaction", action="append", metavar="S|A|O|BOX|BOX", help=INTERACTION_HELP)
    defaults = {field.name: field.default for field in fields(Scene)}
    for name, kind, what in (
        ("seed", _whole, "of the starting noise"),
        ("steps", _whole, "denoising steps"),
        ("strength", _number, "how strongly the interactions act, 0 to 2"),
        ("schedule", _number, "share of the steps, from the first, in which they act, 0 to 1"),
        ("guidance_scale", _number, "how strongly the prompt guides; up to 1 is off"),
        ("negative_prompt", str, "what to steer away from"),
        ("width", _whole, "pixels, a multiple of 8"),
        ("height", _whole, "pixels, a multiple of 8"),
    ):
        default = defaults[name]
        shown = "the model's own" if default is None else default if default != "" else "none"
        flag = "--" + name.replace("_", "-")
        metavar = "TEXT" if kind is str else "N" if kind is _whole else "X"
        parser.add_argument(flag, dest=name, type=kind, metavar=metavar, help=f"{what} (default: {shown})")
    parser.add_argument(
        "--out", type=Path, metavar="PNG", help="what to write (default: out.png; with --from NAME.again.png)"
    )
    parser.add_argument("--overlay", action="store_true", help="also write OUT.overlay.png, with boxes drawn")
    _add_models(parser)
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="precision (default: auto, float16 on cuda, else float32)",
    )


def _add_demo(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser("demo", help="draw a bundled scene, beside what was asked")
    parser.set_defaults(run=_demo)
    parser.add_argument(
        "--out", type=Path, metavar="PNG", default=Path("out/demo.png"), help="default: %(default)s"
    )


def _add_evaluate(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser("evaluate", help="score how well the adapter is followed")
    parser.set_defaults(run=_evaluate)
    parser.add_argument("--world", action="store_true", required=True, help="on held-out stickworld scenes")
    parser.add_argument("--scenes", type=_positive, default=50, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=_whole, default=0, help="which ones, and their noise (default: 0)")
    parser.add_argument("--steps", type=_positive, default=20, help="denoising steps (default: %(default)s)")
    parser.add_argument(
        "--guidance-scale", type=_number, default=GUIDANCE_SCALES[MODEL], help="default: %(default)g"
    )
    parser.add_argument("--batch-size", type=_positive, default=16, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    _add_models(parser)


def _add_train(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser("train", help="run a training recipe")
    parser.set_defaults(run=_train)
    parser.add_argument("config", help="a YAML file, such as training/configs/stickworld_base.yaml")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override the file"
    )
    parser.add_argument("--resume_from_checkpoint", metavar="latest|FOLDER", help="go on where a run stopped")


def _add_models(parser: argparse.ArgumentParser) -> None:
    where = "packaged name, folder or Hugging Face Hub id"
    parser.add_argument("--model", metavar="PATH_OR_ID", help=f"{where} (default: {MODEL})")
    parser.add_argument(
        "--adapter",
        metavar="PATH_OR_ID",
        help=f"{where} (default: the packaged one of a packaged model)",
    )
    parser.add_argument("--device", help="auto, cpu, cuda, mps (default: auto)")


def _generate(args: argparse.Namespace) -> None:
    record = read_record(args.drawn) if args.drawn else None
    scene = _scene(args, record)
    out = args.out or (Path(args.drawn).with_suffix(".again.png") if args.drawn else Path("out.png"))
    _check_picture_path(out)
    beside = out.with_suffix(".overlay.png") if args.overlay else None
    if beside is not None:
        _check_picture_path(beside)
    if record is not None:
        _note_other_versions(record)
        _take_over(args, record)
    _quiet_libraries()
    from interactdiff.generate import Drawer

    drawer = Drawer.load(args.model or MODEL, args.adapter, args.device or "auto", args.dtype or "auto")
    image = drawer.draw(scene)
    drawn_as = drawer.record(scene)
    save_picture(image, out, drawn_as)
    print(out)
    if beside is not None:
        save_picture(overlay(image, scene.interactions), beside, drawn_as)
        print(beside)


def _demo(args: argparse.Namespace) -> None:
    if args.out.parent.exists():
        _check_picture_path(args.out)
    else:
        _check_picture_name(args.out)
    _quiet_libraries()
    from interactdiff.generate import Drawer

    drawer = Drawer.load()
    image = drawer.draw(DEMO)
    pair = side_by_side(enlarged(image), overlay(image, DEMO.interactions))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_picture(pair, args.out, drawer.record(DEMO))
    print(args.out)


def _evaluate(args: argparse.Namespace) -> None:
    if args.json is not None and (reason := why_unwritable(args.json)):
        raise UsageError(f"--json: expected a file that can be written, got {args.json}: {reason}")
    _quiet_libraries()
    from interactdiff.evaluation.world import evaluate_world, format_table
    from interactdiff.generate import usable_device
    from interactdiff.models import default_adapter

    model = args.model or MODEL
    adapter = args.adapter or default_adapter(model)
    if adapter is None:
        raise UsageError(f"expected --adapter for the model {model}, got none")
    table = evaluate_world(
        model,
        adapter,
        scenes=args.scenes,
        seed=args.seed,
        steps=args.steps,
        batch_size=args.batch_size,
        device=str(usable_device(args.device or "auto")),
        progress=True,
        guidance_scale=args.guidance_scale,
    )
    print(format_table(table))
    if args.json is not None:
        text = json.dumps(table, indent=2) + "\n"
        write_aside(args.json, lambda aside: aside.write_text(text, encoding="utf-8"))


def _train(args: argparse.Namespace) -> None:
    if not Path(args.config).is_file():
        raise UsageError(f"expected a YAML file with a training recipe, got no file {args.config}")
    for pair in args.set:
        if "=" not in pair:
            raise UsageError(f"--set: expected key=value, got {pair!r}")
    try:
        from interactdiff.training.run import RecipeError, run
    except ModuleNotFoundError as error:
        raise UsageError(f"expected the packages of interactdiff[train], got no {error.name}") from None
    try:
        run(args.config, args.set, args.resume_from_checkpoint)
    except RecipeError as error:
        raise UsageError(str(error)) from None


def _scene(args: argparse.Namespace, record: Record | None) -> Scene:
    """The scene of the file or the picture, if there is one, and over it what the flags say."""
    names = {field.name for field in fields(Scene)} - {"interactions"}
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.interaction is not None:
        given["interactions"] = tuple(_parsed(n, text) for n, text in enumerate(args.interaction, start=1))
    if record is not None:
        return replace(record.scene, **given)
    if args.scene is not None:
        return replace(Scene.from_file(args.scene), **given)
    if args.prompt is None:
        raise UsageError("expected a prompt, --scene FILE or --from PNG, got none of them")
    return Scene(**given)


def _parsed(number: int, text: str) -> Interaction:
    try:
        return Interaction.parse(text)
    except SceneError as error:
        raise SceneError(f"interaction {number}: {error}") from None


def _check_picture_name(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise UsageError(f"--out: expected a file name that ends in .png, got {str(path)!r}")


def _check_picture_path(path: Path) -> None:
    _check_picture_name(path)
    if reason := why_unwritable(path):
        raise UsageError(f"--out: expected a file that can be written, got {str(path)!r}: {reason}")


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


def _quiet_libraries() -> None:
    """Keep advice for programmers off the user's terminal; errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()  # of loading; the one of drawing stays


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None


def _positive(text: str) -> int:
    if (number := _whole(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
