"""What the commands learn and masks share: a photo, its concepts, and what is known of where they are."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from interactdiff.commands.arguments import UsageError, add_models, positive
from interactdiff.scene_checks import Box, SceneError, parse_box


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
        "--timesteps",
        metavar="T,T",
        default="50,100,150,200",
        help="noise levels that the photo is looked at at, 0 to 999 (default: %(default)s)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.1,
        metavar="X",
        help="by how much a concept wins a pixel (default: %(default)s)",
    )
    parser.add_argument(
        "--background",
        choices=("start", "template", "complement"),
        help="what stands for it (default: what suits the base)",
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
        "--seed", type=int, default=0, metavar="N", help="of all noise (default: %(default)s)"
    )
    add_models(parser)


def named(flag: str, texts: list[str]) -> dict[str, str]:
    """Values of a flag of the form NAME=VALUE by their names.

    Raises:
        UsageError: one is of another form.
    """
    values = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if not equals or not name or not value:
            raise UsageError(f"{flag}: expected NAME=VALUE, got {text!r}")
        values[name] = value
    return values


def boxes(texts: list[str]) -> dict[str, Box]:
    """Boxes by the names of their concepts.

    Raises:
        UsageError: one is none.
    """
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
    boxes(args.box)
    whole_numbers("--timesteps", args.timesteps)
    if args.blocks:
        whole_numbers("--blocks", args.blocks)


def loaded(args: argparse.Namespace) -> tuple[Any, int]:
    """The pipeline of `--model`, and the side in pixels at which a photo is used.

    Raises:
        InteractdiffError: there is no such model or device.
    """
    import torch

    from interactdiff.concept.finding import default_size
    from interactdiff.models import MODEL, model_info, resolve
    from interactdiff.pipeline_loading import load_pipeline, usable_device

    if args.adapter:
        raise UsageError("--adapter: expected none beside a photo's concepts, got some")
    model = args.model or MODEL
    pipeline = load_pipeline(resolve("model", model), usable_device(args.device or "auto"), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, args.size or model_info(model).size or default_size(pipeline)


def looking(args: argparse.Namespace, pipeline: Any) -> Any:
    """How a photo is looked at.

    Raises:
        ConceptError: a value is out of range.
    """
    from interactdiff.concept.finding import Looking, default_settings

    settings = replace(
        default_settings(pipeline),
        threshold=args.threshold,
        unassigned="nearest" if args.nearest else "ignore",
        **({"background": args.background} if args.background else {}),
    )
    blocks = whole_numbers("--blocks", args.blocks) if args.blocks else None
    return Looking(whole_numbers("--timesteps", args.timesteps), args.seed, blocks, settings)
