"""interactdiff evaluate: score how well the adapter is followed."""

import argparse
import json
from pathlib import Path

from interactdiff.commands.arguments import (
    Commands,
    UsageError,
    add_models,
    number,
    positive,
    quiet_libraries,
    whole,
)
from interactdiff.files import why_unwritable, write_aside
from interactdiff.models import GUIDANCE_SCALES, MODEL


def add_to(commands: Commands) -> None:
    """Add `evaluate`."""
    parser = commands.add_parser("evaluate", help="score how well the adapter is followed")
    parser.set_defaults(run=_run)
    parser.add_argument("--world", action="store_true", required=True, help="on held-out stickworld scenes")
    parser.add_argument("--scenes", type=positive, default=50, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=whole, default=0, help="which ones, and their noise (default: 0)")
    parser.add_argument("--steps", type=positive, default=20, help="denoising steps (default: %(default)s)")
    parser.add_argument(
        "--guidance-scale", type=number, default=GUIDANCE_SCALES[MODEL], help="default: %(default)g"
    )
    parser.add_argument("--batch-size", type=positive, default=16, help="default: %(default)s")
    parser.add_argument("--fast", action="store_true", help="also score fast control")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    add_models(parser)


def _run(args: argparse.Namespace) -> None:
    if args.json is not None and (reason := why_unwritable(args.json)):
        raise UsageError(f"--json: expected a file that can be written, got {args.json}: {reason}")
    quiet_libraries()
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
        fast=args.fast,
    )
    print(format_table(table))
    if args.json is not None:
        text = json.dumps(table, indent=2) + "\n"
        write_aside(args.json, lambda aside: aside.write_text(text, encoding="utf-8"))
