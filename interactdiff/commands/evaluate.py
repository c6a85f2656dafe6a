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
from interactdiff.models import GUIDANCE_SCALES, MODEL, default_adapter
from interactdiff.scene_checks import checked_side


def add_to(commands: Commands) -> None:
    """Add `evaluate`."""
    parser = commands.add_parser(
        "evaluate",
        help="score how well the adapter is followed",
        description="Score how well the adapter is followed, and the caption without it; a model that has no "
        "adapter is scored by its captions alone.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument("--world", action="store_true", required=True, help="on held-out stickworld scenes")
    parser.add_argument("--scenes", type=positive, default=50, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=whole, default=0, help="which ones, and their noise (default: 0)")
    parser.add_argument("--steps", type=positive, default=20, help="denoising steps (default: %(default)s)")
    parser.add_argument(
        "--guidance-scale",
        type=number,
        metavar="X",
        help=f"default: what suits a packaged model, else {GUIDANCE_SCALES[MODEL]:g}",
    )
    parser.add_argument(
        "--size", type=positive, metavar="N", help="pixels, a multiple of 8 (default: the model's own size)"
    )
    parser.add_argument(
        "--interactions", type=whole, metavar="N", help="in every scene (default: as scenes have them)"
    )
    parser.add_argument(
        "--word-iou",
        type=whole,
        default=0,
        metavar="N",
        help="also whether words look where their things are, on N renders (default: 0, not at all)",
    )
    parser.add_argument(
        "--detector",
        type=Path,
        metavar="FOLDER",
        help="that scores the pictures, and whose world scenes are of (default: a packaged one)",
    )
    parser.add_argument("--batch-size", type=positive, default=16, help="default: %(default)s")
    parser.add_argument("--fast", action="store_true", help="also score fast control")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    add_models(parser)


def _run(args: argparse.Namespace) -> None:
    if args.json is not None and (reason := why_unwritable(args.json)):
        raise UsageError(f"--json: expected a file that can be written, got {args.json}: {reason}")
    model = args.model or MODEL
    if args.fast and (args.adapter or default_adapter(model)) is None:
        raise UsageError(f"--fast: expected --adapter for the model {model}, got none")
    checked_side("--size", args.size)
    quiet_libraries()
    from interactdiff.evaluation.table import format_table
    from interactdiff.evaluation.world import evaluate_world, load_detector
    from interactdiff.generate import usable_device

    table = evaluate_world(
        model,
        args.adapter,
        scenes=args.scenes,
        seed=args.seed,
        steps=args.steps,
        batch_size=args.batch_size,
        device=str(usable_device(args.device or "auto")),
        progress=True,
        guidance_scale=args.guidance_scale,
        size=args.size,
        fast=args.fast,
        n_interactions=args.interactions,
        word_iou=args.word_iou,
        detector=None if args.detector is None else load_detector(args.detector),
    )
    print(format_table(table))
    if args.json is not None:
        text = json.dumps(table, indent=2) + "\n"
        write_aside(args.json, lambda aside: aside.write_text(text, encoding="utf-8"))
