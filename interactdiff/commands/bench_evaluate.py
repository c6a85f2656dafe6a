"""interactdiff bench evaluate: what scoring detections costs, with made-up ones."""

import argparse
from pathlib import Path

from interactdiff.commands.arguments import Commands, positive
from interactdiff.commands.bench_arguments import check_json, write_json


def add_to(kinds: Commands) -> None:
    """Add `bench evaluate`."""
    parser = kinds.add_parser(
        "evaluate",
        help="scoring as many detections as HICO-DET has pictures to test on",
        description="Match made-up detections of as many pictures as HICO-DET has to test on, and compute "
        "mAP by several protocols, on one core.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument("--pictures", type=positive, default=9546, help="default: %(default)s")
    parser.add_argument("--pairs", type=positive, default=100, help="in each picture (default: %(default)s)")
    parser.add_argument("--protocol", nargs="+", metavar="NAME", help="as of evaluate (default: five)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures as JSON")


def _run(args: argparse.Namespace) -> None:
    check_json(args.json)
    from interactdiff.bench.evaluate import bench_evaluate
    from interactdiff.evaluation.hoi_protocols import DEFAULT_PROTOCOLS, chosen_protocols

    protocols = tuple(one.name for one in chosen_protocols(args.protocol or DEFAULT_PROTOCOLS))
    figures = bench_evaluate(args.pictures, args.pairs, protocols)
    cpu, wall = (sum(figures[name].values()) for name in ("cpu_seconds", "wall_seconds"))
    print(
        f"{args.pictures} pictures of {args.pairs} detected pairs, {', '.join(protocols)}: "
        f"{cpu:.1f} s on one core ({wall:.1f} s by the clock), {figures['kept_mb']:.0f} MB kept of detections"
    )
    write_json(args.json, figures)
