"""interactdiff bench: what control costs, at true sizes with random weights."""

import argparse
import json
from pathlib import Path
from typing import Any

from interactdiff.commands.arguments import Commands, UsageError, positive, quiet_libraries
from interactdiff.files import why_unwritable, write_aside

BASES = ("sd15", "sdxl")
DTYPES = ("float32", "bfloat16", "float16")


def add_to(commands: Commands) -> None:
    """Add `bench interaction`."""
    parser = commands.add_parser("bench", help="time control against the base alone")
    kinds = parser.add_subparsers(title="benchmarks", metavar="WHAT", required=True)
    interaction = kinds.add_parser(
        "interaction",
        help="one guided denoising step of a U-Net, with and without interactions",
        description="One guided denoising step at true shapes with random weights: the U-Net alone, "
        "diffusers' own gated U-Net, ours exact, ours fast; in turn within one process, medians.",
    )
    interaction.set_defaults(run=_interaction)
    interaction.add_argument("--base", nargs="+", choices=BASES, default=["sd15"], help="default: sd15")
    interaction.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float32"], help="default: float32"
    )
    interaction.add_argument("--rounds", type=positive, default=5, help="default: %(default)s")
    interaction.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, cuda or else cpu"
    )
    interaction.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")


def _interaction(args: argparse.Namespace) -> None:
    if args.json is not None and (reason := why_unwritable(args.json)):
        raise UsageError(f"--json: expected a file that can be written, got {args.json}: {reason}")
    quiet_libraries()
    import torch

    from interactdiff.bench.interaction import BASES, bench_interaction
    from interactdiff.generate import DTYPES, usable_device

    best = "cuda" if torch.cuda.is_available() else "cpu"
    device = usable_device(best if args.device == "auto" else args.device)
    rows: list[dict[str, Any]] = []
    for base in args.base:
        for dtype in args.dtype:
            measured = bench_interaction(BASES[base], DTYPES[dtype], args.rounds, device)
            named = {"base": base, "dtype": dtype, "device": device.type, "rounds": args.rounds}
            rows.append({**named, **measured})
            print(_shown(rows[-1]), flush=True)
            if args.json is not None:  # after each row: a long run that is stopped keeps what it has
                text = json.dumps({"rows": rows}, indent=2) + "\n"
                write_aside(args.json, lambda aside, text=text: aside.write_text(text, encoding="utf-8"))


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
