"""interactdiff bench interaction: what interactions cost in a U-Net, at true sizes with random weights."""

import argparse
from typing import Any

from interactdiff.commands.arguments import Commands, positive, quiet_libraries
from interactdiff.commands.bench_arguments import (
    DTYPES,
    add_device_and_json,
    check_json,
    chosen_device,
    write_json,
)

BASES = ("sd15", "sdxl")


def add_to(kinds: Commands) -> None:
    """Add `bench interaction`."""
    interaction = kinds.add_parser(
        "interaction",
        help="one guided denoising step of a U-Net, with and without interactions",
        description="One guided denoising step at true shapes with random weights: the U-Net alone, "
        "diffusers' own gated U-Net, ours exact, ours fast; in turn within one process, medians.",
    )
    interaction.set_defaults(run=_run)
    interaction.add_argument("--base", nargs="+", choices=BASES, default=["sd15"], help="default: sd15")
    interaction.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float32"], help="default: float32"
    )
    interaction.add_argument("--rounds", type=positive, default=5, help="default: %(default)s")
    add_device_and_json(interaction)


def _run(args: argparse.Namespace) -> None:
    check_json(args.json)
    quiet_libraries()
    from interactdiff.bench.interaction import BASES, bench_interaction
    from interactdiff.pipeline_loading import DTYPES

    device = chosen_device(args.device)
    rows: list[dict[str, Any]] = []
    for base in args.base:
        for dtype in args.dtype:
            measured = bench_interaction(BASES[base], DTYPES[dtype], args.rounds, device)
            named = {"base": base, "dtype": dtype, "device": device.type, "rounds": args.rounds}
            rows.append({**named, **measured})
            print(_shown(rows[-1]), flush=True)
            write_json(args.json, {"rows": rows})  # after each: a long run that is stopped keeps what it has


def _shown(row: dict[str, Any]) -> str:
    ratios, counted, peaks = row["ratios"], row["operations"], row["peak_mb"]
    lines = [
        f"{row['base']} {row['dtype']} {row['device']}, one guided step, medians of {row['rounds']} rounds",
        f"{'':24}{'seconds':>9}{'over plain':>12}{'operations':>12}{'peak MB':>9}",
    ]
    for way, title in (
        ("plain", "U-Net alone"),
        ("gated", "diffusers' gated U-Net"),
        ("exact", "ours, exact"),
        ("fast", "ours, fast (mean of 30)"),
    ):
        over = ratios.get(f"{way}_over_plain", 1.0)
        operations = counted.get(f"{way}_over_plain", 1.0)
        lines.append(f"{title:24}{row[way + '_s']:9.2f}{over:12.3f}{operations:12.3f}{peaks[way]:9.0f}")
    lines.append(f"ours exact over gated: {ratios['exact_over_gated']:.3f}")
    return "\n".join(lines)
