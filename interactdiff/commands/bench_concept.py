"""interactdiff bench concept: what capturing attention costs a training step, at true sizes."""

import argparse
from typing import Any

from interactdiff.commands.arguments import Commands, quiet_libraries, whole
from interactdiff.commands.bench_arguments import (
    DTYPES,
    add_device_and_json,
    check_json,
    chosen_device,
    write_json,
)

BASES = ("sd21", "sdxl", "tiny")


def add_to(kinds: Commands) -> None:
    """Add `bench concept`."""
    concept = kinds.add_parser(
        "concept",
        help="one training step of a concept, with and without the attention loss",
        description="One training step of keys and values at true shapes with random weights: on the "
        "denoising error alone, and with attention captured; and what the published capture would keep.",
    )
    concept.set_defaults(run=_run)
    concept.add_argument("--base", nargs="+", choices=BASES, default=["sd21"], help="default: sd21")
    concept.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the base (default: %(default)s)"
    )
    concept.add_argument(
        "--rounds", type=whole, default=5, help="0: the captured layers alone (default: %(default)s)"
    )
    add_device_and_json(concept)


def _run(args: argparse.Namespace) -> None:
    check_json(args.json)
    quiet_libraries()
    from interactdiff.bench.concept import BASES, bench_concept
    from interactdiff.pipeline_loading import DTYPES

    device = chosen_device(args.device)
    rows: list[dict[str, Any]] = []
    for base in args.base:
        measured = bench_concept(BASES[base], DTYPES[args.dtype], args.rounds, device)
        named = {"base": base, "dtype": args.dtype, "device": device.type, "rounds": args.rounds}
        rows.append({**named, **measured})
        print(_shown(rows[-1]), flush=True)
        write_json(args.json, {"rows": rows})


def _shown(row: dict[str, Any]) -> str:
    lines = [f"{row['base']} {row['dtype']} {row['device']}, a training step, {row['rounds']} rounds"]
    if row["rounds"]:
        more = row["attention_mb"] - row["plain_mb"]
        lines += [
            f"keys and values alone     {row['plain_s']:8.3f} s   {row['plain_mb']:9.1f} MB",
            f"with the attention loss   {row['attention_s']:8.3f} s   {row['attention_mb']:9.1f} MB   "
            f"x {row['ratio']:.3f}, {more:+.1f} MB",
        ]
    lines += [
        f"attention loss, alone     {row['columns_mb']:9.1f} MB beside queries and keys",
        f"masks, alone              {row['masks_mb']:9.1f} MB",
        f"matrices of these layers  {row['matrices_mb']:9.1f} MB, by counting",
        f"published capture         {row['published_copy_mb']:9.1f} MB a copy, by counting",
    ]
    return "\n".join(lines)
