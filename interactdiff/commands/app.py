"""interactdiff app: the studio, a page on which to draw scenes and get pictures."""

import argparse
from dataclasses import replace
from pathlib import Path

from interactdiff.commands.arguments import (
    Commands,
    UsageError,
    adapters_of,
    add_models,
    positive,
    quiet_libraries,
    whole,
)
from interactdiff.models import MODEL

LIMITS = {
    "steps": "denoising steps of a picture",
    "pixels": "of a picture",
    "images": "pictures at a time",
    "queue": "requests that wait",
    "learn_steps": "training steps of concepts from a photo; 0: none are learned",
}


def add_to(commands: Commands) -> None:
    """Add `app`."""
    parser = commands.add_parser(
        "app",
        help="open the studio, a page on which to draw scenes",
        description="Serve the studio on this machine: a page on which to draw who does what to what, and "
        "get the picture (docs/app.md).",
    )
    parser.set_defaults(run=_run)
    add_models(parser)
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto", help="default: auto"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, for this machine alone")
    parser.add_argument("--port", type=whole, help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="also at a public address, by Gradio's server")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    parser.add_argument(
        "--allow",
        type=Path,
        action="append",
        metavar="FOLDER",
        help="where models may be opened from; may be repeated (default: the working directory if this "
        "machine alone is served, else none)",
    )
    parser.add_argument(
        "--hub",
        action=argparse.BooleanOptionalAction,
        help="whether models may be fetched from the Hugging Face Hub (default: if this machine alone is "
        "served)",
    )
    for name, what in LIMITS.items():
        kind = whole if name == "learn_steps" else positive
        parser.add_argument(f"--max-{name.replace('_', '-')}", type=kind, metavar="N", help=f"most {what}")


def _run(args: argparse.Namespace) -> None:
    for folder in args.allow or []:
        if not folder.is_dir():
            raise UsageError(f"--allow: expected a folder, got {str(folder)!r}")
    if args.port is not None and not 0 < args.port < 2**16:
        raise UsageError(f"--port: expected a number from 1 to 65535, got {args.port}")
    if args.max_learn_steps is not None and args.max_learn_steps < 0:
        raise UsageError(f"--max-learn-steps: expected a number from 0 up, got {args.max_learn_steps}")
    quiet_libraries()
    try:
        from interactdiff.app.serve import LAUNCH, leave_on_sigterm, limits_for, make_studio
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "gradio":
            raise
        raise UsageError(
            "expected gradio for the studio, got none: pip install 'interactdiff[app]'"
        ) from None
    leave_on_sigterm()
    limits = limits_for(args.host, args.share)
    given = {name: value for name in LIMITS if (value := getattr(args, f"max_{name}")) is not None}
    if args.allow is not None:
        given["folders"] = tuple(args.allow)
    if args.hub is not None:
        given["hub"] = args.hub
    limits = replace(limits, **given)
    studio = make_studio(limits, args.model or MODEL, adapters_of(args), args.device or "auto", args.dtype)
    try:
        studio.blocks.launch(
            server_name=args.host,
            server_port=args.port,
            share=args.share,
            inbrowser=args.open,
            **LAUNCH,
        )
    except OSError as error:
        at = args.host if args.port is None else f"{args.host}:{args.port}"
        raise UsageError(f"expected an address that can be served at, got {at}: {error}") from None
    finally:
        studio.worker.close()
