"""interactdiff evaluate: score a model and its adapters."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from interactdiff.commands.arguments import (
    Commands,
    UsageError,
    adapters_of,
    add_models,
    method_settings,
    number,
    positive,
    quiet_libraries,
    whole,
)
from interactdiff.commands.evaluate_flags import check_flags, without_defaults
from interactdiff.commands.evaluate_layouts import LAYOUT_STEPS, ROWS, add_layouts, compare, evaluate_data
from interactdiff.files import why_unwritable, write_aside
from interactdiff.method_specs import EvaluationOptions, MethodSpec, load_attribute
from interactdiff.models import MODEL, default_adapter, model_info
from interactdiff.registry import methods
from interactdiff.scene import MAX_GUIDANCE, MAX_STEPS
from interactdiff.scene_checks import checked_number, checked_side, checked_whole

STEPS = 20


def add_to(commands: Commands) -> None:
    """Add `evaluate`."""
    parser = commands.add_parser(
        "evaluate",
        help="score a model and its adapters",
        description="Score a model and its adapters: --world on scenes with interactions, with the adapter "
        "and from the caption alone; --data on layouts of a data set, as papers do (docs/evaluation.md); "
        "--compare says which differences between two such runs are larger than chance; any other by the "
        "scores of its method.",
    )
    parser.set_defaults(scored=None)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--world", action="store_true", help="on held-out stickworld scenes")
    add_layouts(parser, what)
    for name, spec in methods().items():
        if spec.scores is not None:
            what.add_argument(
                f"--{name}", dest="scored", action="store_const", const=name, help=f"scores of {spec.title}"
            )
    parser.add_argument("--scenes", type=positive, default=50, help="how many (default: 50)")
    for name in ("subjects", "photos"):
        parser.add_argument(
            f"--{name}",
            dest="scenes",
            type=positive,
            default=argparse.SUPPRESS,
            metavar="N",
            help=f"how many of a method that is scored on {name}",
        )
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="ROW",
        help=f"of the table of a method, or of --data: {', '.join(ROWS)} (default: all that can be)",
    )
    parser.add_argument(
        "--method",
        action="append",
        metavar="NAME:SETTING=X,...",
        help="settings of the method that is scored, subject:reference_weight=8; may be repeated",
    )
    parser.add_argument("--seed", type=whole, default=0, help="which ones, and their noise (default: 0)")
    parser.add_argument("--steps", type=positive, help="denoising steps (default: 20, with --data 50)")
    parser.add_argument(
        "--guidance-scale",
        type=number,
        metavar="X",
        help=f"default: what suits a packaged model, else {model_info(MODEL).guidance_scale:g}",
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
        "--set",
        nargs="+",
        action="extend",
        metavar="OPTION=VALUE",
        help="how a method that is scored learns; of --concept options of interactdiff.concept.LearnOptions, "
        "such as steps=200 projections=v rank=8",
    )
    parser.add_argument(
        "--detector",
        metavar="DETECTOR",
        help="that scores the pictures: a folder with one of stickworld (default: the packaged one); "
        "with --data also file:PATH or two-stage:BOXES,VERBS",
    )
    parser.add_argument("--batch-size", type=positive, default=16, help="default: 16")
    parser.add_argument("--fast", action="store_true", help="also score fast control")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    add_models(parser)
    parser.set_defaults(run=partial(_run, without_defaults(parser)))


def _run(defaults: Mapping[str, Any], args: argparse.Namespace) -> None:
    check_flags(args, defaults)
    if args.json is not None and (reason := why_unwritable(args.json)):
        raise UsageError(f"--json: expected a file that can be written, got {args.json}: {reason}")
    if args.compare is not None:
        if args.json in args.compare:
            raise UsageError(f"--json: expected another file than the two to compare, got {args.json}")
        _write(args.json, compare(*args.compare))
        return
    model, adapters = args.model or MODEL, adapters_of(args)
    if args.fast and "interaction" not in adapters and default_adapter(model) is None:
        raise UsageError(f"--fast: expected --adapter for the model {model}, got none")
    checked_side("--size", args.size)
    checked_whole("--seed", args.seed, 0, 2**32 - 1)
    if args.steps is None:
        args.steps = LAYOUT_STEPS if args.data is not None else STEPS
    checked_whole("--steps", args.steps, 1, MAX_STEPS)
    if args.guidance_scale is not None:
        checked_number("--guidance-scale", args.guidance_scale, 0.0, MAX_GUIDANCE)
    quiet_libraries()
    if args.data is not None:
        evaluate_data(args)
        return
    table = _world(args, model, adapters) if args.scored is None else _method(args, model, adapters)
    _write(args.json, table)


def _write(file: Path | None, table: Mapping[str, Any]) -> None:
    if file is not None:
        text = json.dumps(table, indent=2) + "\n"
        write_aside(file, lambda aside: aside.write_text(text, encoding="utf-8"))


def _world(args: argparse.Namespace, model: str, adapters: dict[str, str]) -> dict[str, Any]:
    from interactdiff.clear import ClearAdapter
    from interactdiff.evaluation.table import format_table
    from interactdiff.evaluation.world import evaluate_world, load_detector
    from interactdiff.pipeline_loading import usable_device

    if unknown := set(adapters) - {"interaction", "clear"}:
        raise UsageError(
            f"--adapter: expected one of interactions or of clear for --world, got {', '.join(unknown)}"
        )
    table = evaluate_world(
        model,
        adapters.get("interaction"),
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
        detector=None if args.detector is None else load_detector(Path(args.detector)),
        clear=ClearAdapter.from_pretrained(adapters["clear"]) if "clear" in adapters else None,
    )
    print(format_table(table))
    return table


def _method(args: argparse.Namespace, model: str, adapters: dict[str, str]) -> dict[str, Any]:
    """The scores that a method brings with it."""
    from interactdiff.evaluation.table import format_scores
    from interactdiff.evaluation.world import load_detector
    from interactdiff.generation import ScenePipeline

    spec = methods()[args.scored]
    assert spec.scores is not None
    settings = _settings(spec, args.method or [])
    changes = tuple(args.set or ())
    if changes and not spec.scores_take_changes:
        raise UsageError(f"--set: expected none beside --{spec.name}, got {' '.join(changes)!r}")
    detector = None if args.detector is None else load_detector(Path(args.detector))
    used = {spec.name: {}} if spec.scores_need_adapter else {}
    pipeline = ScenePipeline.from_pretrained(model, adapters, args.device or "auto", methods=used)
    pipeline.check_side("--size", args.size)
    pipeline.pipeline.set_progress_bar_config(disable=True)  # of each picture; scores have bars of their own
    options = EvaluationOptions(
        args.scenes,
        args.seed,
        args.steps,
        args.batch_size,
        args.guidance_scale,
        args.size,
        tuple(args.rows or ()),
        detector,
        settings,
    )
    options = replace(options, changes=changes)
    scores = load_attribute(spec.scores)(pipeline, options)
    print(format_scores(scores))
    run = {field.name: getattr(options, field.name) for field in fields(options)}
    del run["detector"], run["rows"]
    run |= {"method": spec.name, "model": pipeline.model, "adapters": dict(pipeline.adapters)}
    return {**run, **(scores if "rows" in scores else {"scores": scores})}


def _settings(spec: MethodSpec, texts: list[str]) -> dict[str, int | float]:
    """What `--method` sets of the method that is scored."""
    known = {setting.name: setting for setting in spec.score_settings}
    given = method_settings(texts)
    for name, values in given.items():
        if name != spec.name:
            raise UsageError(f"--method: expected {spec.name} beside --{spec.name}, got {name!r}")
        if unknown := next((key for key in values if key not in known), None):
            of = ", ".join(known) or "none"
            raise UsageError(f"--method {name}: expected settings of {of}, got {unknown!r}")
    return {key: known[key].checked(value) for key, value in given.get(spec.name, {}).items()}
