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
        "--overwrite", action="store_true", help="remove an older run's checkpoints from the output folder"
    )


def _run(args: argparse.Namespace) -> None:
    if not Path(args.config).is_file():
        raise UsageError(f"expected a YAML file with a training recipe, got no file {args.config}")
    for pair in args.set:
        if "=" not in pair:
            raise UsageError(f"--set: expected key=value, got {pair!r}")
    try:
        from interactdiff.training.run import run
    except ModuleNotFoundError as error:
        raise UsageError(f"expected the packages of interactdiff[train], got no {error.name}") from None
    run(args.config, args.set, args.resume_from_checkpoint, args.overwrite)
