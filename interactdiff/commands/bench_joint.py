"""interactdiff bench joint: what interactions and windows cost in a transformer, with random weights."""

import argparse
from typing import Any

from interactdiff.commands.arguments import Commands, UsageError, positive, quiet_libraries
from interactdiff.commands.bench_arguments import (
    DTYPES,
    add_device_and_json,
    check_json,
    chosen_device,
    numbers,
    write_json,
)


def add_to(kinds: Commands) -> None:
    """Add `bench joint`."""
    joint = kinds.add_parser(
        "joint",
        help="one step of a Flux-shaped transformer, with and without interactions and windows",
        description="One step of some blocks of FLUX.1's shape with random weights: alone, with "
        "interactions, with CLEAR's windows, with both; in turn within one process, medians.",
    )
    joint.set_defaults(run=_run)
    joint.add_argument(
        "--grids",
        type=numbers,
        default="64,128",
        metavar="N,N",
        help="sides in tokens (default: %(default)s)",
    )
    joint.add_argument("--window", type=positive, default=16, help="radius (default: %(default)s)")
    joint.add_argument("--text", type=positive, default=512, help="text tokens (default: %(default)s)")
    joint.add_argument("--heads", type=positive, default=24, help="of 128 each (default: %(default)s)")
    joint.add_argument(
        "--blocks",
        type=numbers,
        default="1,1",
        metavar="N,N",
        help="joint and single (default: %(default)s)",
    )
    joint.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    joint.add_argument("--rounds", type=positive, default=3, help="default: %(default)s")
    add_device_and_json(joint)


def _run(args: argparse.Namespace) -> None:
    check_json(args.json)
    if len(args.blocks) != 2:
        raise UsageError(f"--blocks: expected two numbers, joint and single, got {len(args.blocks)}")
    quiet_libraries()
    from interactdiff.bench.joint import JointShapes, bench_joint
    from interactdiff.pipeline_loading import DTYPES

    device = chosen_device(args.device)
    shapes = JointShapes(args.heads, tuple(args.blocks), args.text, device, DTYPES[args.dtype])
    run = {"heads": args.heads, "blocks": args.blocks, "text": args.text, "dtype": args.dtype}
    run |= {"device": device.type, "rounds": args.rounds}
    rows: list[dict[str, Any]] = []
    for grid in args.grids:
        rows.append(bench_joint(shapes, grid, args.window, args.rounds))
        print(_shown(rows[-1], run), flush=True)
        write_json(args.json, {**run, "rows": rows})


def _shown(row: dict[str, Any], run: dict[str, Any]) -> str:
    joint, single = run["blocks"]
    lines = [
        f"{row['grid']} x {row['grid']} image and {run['text']} text tokens, {joint} joint and {single} "
        f"single blocks of {run['heads']} heads x 128, {run['dtype']}, {run['device']}, medians of "
        f"{run['rounds']} rounds",
        f"{'':32}{'seconds':>9}{'over plain':>12}{'peak MB':>9}",
    ]
    for way, title in (
        ("plain", "transformer alone"),
        ("interaction", "interactions"),
        ("clear", f"windows of radius {row['window']}"),
        ("interaction_clear", "interactions and windows"),
    ):
        lines.append(
            f"{title:32}{row['seconds'][way]:9.2f}{row['ratios'][way]:12.3f}{row['peak_mb'][way]:9.0f}"
        )
    return "\n".join(lines)
