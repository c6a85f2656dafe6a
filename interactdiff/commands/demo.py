"""interactdiff demo: generate a bundled scene, and show it with and without its boxes."""

import argparse
from pathlib import Path

from interactdiff.commands.arguments import Commands, check_picture_name, check_picture_path, quiet_libraries
from interactdiff.picture import enlarged, overlay, save_picture, side_by_side
from interactdiff.scene import Interaction, Scene

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


def add_to(commands: Commands) -> None:
    """Add `demo`."""
    parser = commands.add_parser("demo", help="generate a bundled scene")
    parser.set_defaults(run=_run)
    parser.add_argument(
        "--out", type=Path, metavar="PNG", default=Path("out/demo.png"), help="default: %(default)s"
    )


def _run(args: argparse.Namespace) -> None:
    if args.out.parent.exists():
        check_picture_path(args.out)
    else:
        check_picture_name(args.out)
    quiet_libraries()
    from interactdiff.generation import ScenePipeline

    pipeline = ScenePipeline.from_pretrained()
    image = pipeline.generate(DEMO)
    pair = side_by_side(enlarged(image), overlay(image, DEMO.interactions))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_picture(pair, args.out, pipeline.record(DEMO))
    print(args.out)
