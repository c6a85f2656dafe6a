"""The command line: interactdiff generate | app | demo | evaluate | train | convert | bench | doctor.

Bad input ends with one sentence on stderr and exit code 2, and nothing is written. Heavy imports come after
everything that can be refused without them.
"""

import sys
from collections.abc import Sequence

from interactdiff import __version__
from interactdiff.checkpoint import AdapterError
from interactdiff.commands import app, bench, convert, demo, doctor, evaluate, generate, train
from interactdiff.commands.arguments import Parser, UsageError
from interactdiff.models import ModelError
from interactdiff.picture import PictureError
from interactdiff.scene import SceneError

COMMANDS = (generate, app, demo, evaluate, train, convert, bench, doctor)


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


def build_parser() -> Parser:
    """The parser of all commands; each sets `run` to its function."""
    parser = Parser(prog="interactdiff", description="Who does what to what, and where: get that picture.")
    parser.add_argument("--version", action="version", version=f"interactdiff {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_to(commands)
    return parser
