"""What the commands learn and masks share: a photo, its concepts, and what is known of where they are."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interactdiff.commands.arguments import UsageError, add_models, number, positive, whole
from interactdiff.concept.scene_boxes import scene_boxes
from interactdiff.scene import Scene
from interactdiff.scene_checks import Box, SceneError, parse_box

if TYPE_CHECKING:
    from interactdiff.concept.finding import Looking


def add_photo(parser: argparse.ArgumentParser, form: str, example: str) -> None:
    """Flags that say what is in a photo.

    Args:
        parser: of the command.
        form: of `--concept`.
        example: of it.
    """
    parser.add_argument("photo", help="a picture file")
    parser.add_argument(
        "--concept",
        action="append",
        required=True,
        metavar=form,
        help=f"{example}; repeat it for each concept",
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", help='that names all concepts (default: "a photo of {0} and {1}")'
    )
    parser.add_argument(
        "--mask",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a picture that is white where the concept is, in the place of what would be found",
    )
    parser.add_argument(
        "--box",
        action="append",
        default=[],
        metavar="NAME=x0,y0,x1,y1",
        help="outside which the concept is not, as shares of width and height",
    )
    parser.add_argument(
        "--scene",
        metavar="FILE",
        help="what the photo shows, as a scene file: the boxes of phrases that are a concept's word are its",
    )
    parser.add_argument(
        "--timesteps",
        metavar="T,T",
        help="noise levels at which the photo is looked at, 0 to 999 (default: 50,100,150,200)",
    )
    parser.add_argument(
        "--threshold",
        type=number,
        metavar="X",
        help="by how much a concept wins a pixel (default: what suits a packaged model, else 0.1)",
    )
    parser.add_argument(
        "--exponent",
        type=number,
        metavar="X",
        help="of the maps before they are spread (default: what suits a packaged model, else 2)",
    )
    parser.add_argument(
        "--power",
        type=whole,
        metavar="N",
        help="how often the photo's attention to itself spreads the maps (default: what suits a packaged "
        "model, else 4)",
    )
    parser.add_argument(
        "--background",
        choices=("start", "template", "complement"),
        help="which rows of the text stand for the background (default: what suits the base)",
    )
    parser.add_argument(
        "--nearest", action="store_true", help="give pixels that no concept wins to the best one"
    )
    parser.add_argument(
        "--blocks", metavar="N,N", help="of a transformer, which of its blocks look, from 0 (default: six)"
    )
    parser.add_argument(
        "--size",
        type=positive,
        metavar="N",
        help="side in pixels at which the photo is used (default: the model's own)",
    )
    parser.add_argument(
        "--seed", type=whole, default=0, metavar="N", help="of all noise (default: %(default)s)"
    )
    add_models(parser)


def named(flag: str, texts: list[str]) -> dict[str, str]:
    """Values of a flag of the form NAME=VALUE by their names.

    Raises:
        UsageError: one is of another form.
    """
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise UsageError(f"{flag}: expected NAME=VALUE, got {text!r}")
        values[name] = value
    return values


def boxes(args: argparse.Namespace, words: Mapping[str, str]) -> dict[str, Box]:
    """Boxes by the names of their concepts: those of the flag, and for others those of the scene.

    Args:
        args: as they were typed.
        words: of the concepts, by their names.

    Raises:
        UsageError: a box is none.
        SceneError: there is no such scene.
        ConceptError: none of the scene's phrases is a concept's word.
    """
    own = _boxes(args.box)
    return own if args.scene is None else {**scene_boxes(Scene.from_file(args.scene), words), **own}


def _boxes(texts: list[str]) -> dict[str, Box]:
    try:
        return {name: parse_box("box", text) for name, text in named("--box", texts).items()}
    except SceneError as error:
        raise UsageError(f"--box: {error}") from None


def whole_numbers(flag: str, text: str) -> tuple[int, ...]:
    """Of a flag's value with commas.

    Raises:
        UsageError: they are none.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{flag}: expected whole numbers with commas, got {text!r}") from None


def checked_photo(args: argparse.Namespace) -> None:
    """Refuse what can be refused before anything heavy is imported.

    Raises:
        UsageError: there is no such photo, or no such mask.
    """
    for path in (args.photo, *named("--mask", args.mask).values()):
        if not Path(path).is_file():
            raise UsageError(f"expected a picture file, got no file {path}")
    _boxes(args.box)
    if args.scene is not None:
        Scene.from_file(args.scene)
    for flag in ("timesteps", "blocks"):
        if getattr(args, flag) is not None:
            whole_numbers(f"--{flag}", getattr(args, flag))


def loaded(args: argparse.Namespace) -> tuple[Any, int]:
    """The pipeline of `--model`, and the side in pixels at which a photo is used.

    Raises:
        InteractdiffError: there is no such model or device.
    """
    import torch

    from interactdiff.concept.finding import default_size
    from interactdiff.models import MODEL, resolve
    from interactdiff.pipeline_loading import load_pipeline, usable_device

    if args.adapter:
        raise UsageError("--adapter: expected none beside a photo's concepts, got some")
    model = args.model or MODEL
    pipeline = load_pipeline(resolve("model", model), usable_device(args.device or "auto"), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, args.size or default_size(pipeline)


def looking(args: argparse.Namespace, pipeline: Any, base: "Looking | None" = None) -> "Looking":
    """How a photo is looked at.

    Args:
        args: flags that are left out change nothing.
        pipeline: whose text encoder says what stands for the background where nobody does.
        base: what flags change; None for the defaults.

    Raises:
        ConceptError: a value is out of range.
    """
    from interactdiff.concept.finding import Looking, default_settings

    base = base or Looking()
    names = ("threshold", "exponent", "power", "background")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.nearest:
        given["unassigned"] = "nearest"
    lists = ("timesteps", "blocks")
    chosen: dict[str, Any] = {
        name: whole_numbers(f"--{name}", text) for name in lists if (text := getattr(args, name)) is not None
    }
    settings = replace(base.masks or default_settings(pipeline), **given)
    return replace(base, seed=args.seed, masks=settings, **chosen)
