"""The command line: interactdiff generate | app | demo | evaluate | train | data | convert | bench | doctor.

Methods add further commands.

Bad input ends with one sentence on stderr and exit code 2, and nothing is written. Heavy imports come after
everything that can be refused without them.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from interactdiff import __version__
from interactdiff.commands import app, bench, convert, data, demo, doctor, evaluate, generate, train
from interactdiff.commands.arguments import Parser
from interactdiff.errors import InteractdiffError
from interactdiff.registry import methods

COMMANDS = (generate, app, demo, evaluate, train, data, convert, bench, doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0, 2 for bad input or too little memory, 130 after Ctrl-C.
    """
    try:
        args = build_parser().parse_args(argv)
        args.run(args)
    except InteractdiffError as error:
        print("interactdiff: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except OSError as error:  # a disk that fills up while it is written to
        print(f"interactdiff: expected files that can be read and written, got {error}", file=sys.stderr)
        return 2
    except MemoryError:
        print("interactdiff: expected a model and a picture that fit, got no memory left", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which need not have been imported
            raise
        sentence = " ".join(str(error).split()).split(". ")[0]
        print(f"interactdiff: expected a model and a picture that fit, got {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def build_parser() -> Parser:
    """The parser of all commands; each sets `run` to its function."""
    parser = Parser(prog="interactdiff", description="Who does what to what, and where: get that picture.")
    parser.add_argument("--version", action="version", version=f"interactdiff {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    own = [import_module(module) for spec in methods().values() for module in spec.commands]
    for command in (*COMMANDS, *own):
        command.add_to(commands)
    return parser
