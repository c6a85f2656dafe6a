"""interactdiff train: run a training recipe."""

import argparse
from pathlib import Path

from interactdiff.commands.arguments import Commands, UsageError


def add_to(commands: Commands) -> None:
    """Add `train`."""
    parser = commands.add_parser("train", help="run a training recipe")
    parser.set_defaults(run=_run)
    parser.add_argument("config", help="a YAML file, such as training/configs/stickworld_base.yaml")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override the file"
    )
    parser.add_argument("--resume_from_checkpoint", metavar="latest|FOLDER", help="go on where a run stopped")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="remove an older run's checkpoints, log and samples from the output folder",
    )
    parser.add_argument(
        "--plan",
        nargs="?",
        type=_gigabytes,
        const=0.0,
        metavar="GB",
        help="say what memory it takes, and what would fit a card of GB (this machine's, or common ones), "
        "and train nothing",
    )


def _gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected GB of memory, got {text!r}")
    return value


def _run(args: argparse.Namespace) -> None:
    if not Path(args.config).is_file():
        raise UsageError(f"expected a YAML file with a training recipe, got no file {args.config}")
    for pair in args.set:
        if "=" not in pair:
            raise UsageError(f"--set: expected key=value, got {pair!r}")
    try:
        from interactdiff.training.run import plan, run
    except ModuleNotFoundError as error:
        raise UsageError(f"expected the packages of interactdiff[train], got no {error.name}") from None
    if args.plan is not None:
        print(plan(args.config, args.set, args.plan or None))
        return
    run(args.config, args.set, args.resume_from_checkpoint, args.overwrite)
