"""interactdiff bench subject: what a reference costs in a step, at true sizes with random weights."""

import argparse
from typing import Any

from interactdiff.commands.arguments import Commands, UsageError, number, positive, quiet_libraries
from interactdiff.commands.bench_arguments import (
    DTYPES,
    add_device_and_json,
    check_json,
    chosen_device,
    write_json,
)

BASES = ("sd15", "sdxl", "flux")
FLUX_BLOCKS, FLUX_GRID = (1, 2), 32  # as 19 and 38 of them; 512 px


def add_to(kinds: Commands) -> None:
    """Add `bench subject`."""
    subject = kinds.add_parser(
        "subject",
        help="one denoising step, with and without a reference",
        description="One denoising step at true shapes with random weights, guided in U-Nets, of one joint "
        "and two single blocks in Flux: alone, with kept features of a reference, with the reference run at "
        "each step, and with a dense mask over all of its tokens; in turn within one process, medians.",
    )
    subject.set_defaults(run=_run)
    subject.add_argument("--base", nargs="+", choices=BASES, default=["sd15"], help="default: sd15")
    subject.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="default: float32")
    subject.add_argument(
        "--foreground", type=number, default=0.4, help="share of the reference (default: %(default)s)"
    )
    subject.add_argument("--rounds", type=positive, default=5, help="default: %(default)s")
    add_device_and_json(subject)


def _run(args: argparse.Namespace) -> None:
    check_json(args.json)
    if not 0 < args.foreground <= 1:
        raise UsageError(f"--foreground: expected a share above 0 and up to 1, got {args.foreground}")
    quiet_libraries()
    from interactdiff.bench.interaction import BASES
    from interactdiff.bench.joint import JointShapes
    from interactdiff.bench.subject import UNetSubjectBench, bench_subject
    from interactdiff.bench.subject_flux import FluxSubjectBench
    from interactdiff.pipeline_loading import DTYPES

    device = chosen_device(args.device)
    rows: list[dict[str, Any]] = []
    for base in args.base:
        for dtype in args.dtype:
            if base == "flux":
                shapes = JointShapes(blocks=FLUX_BLOCKS, device=device, dtype=DTYPES[dtype])
                bench = FluxSubjectBench(shapes, FLUX_GRID, args.foreground)
            else:
                bench = UNetSubjectBench(BASES[base], args.foreground, device, DTYPES[dtype])
            measured = bench_subject(bench, args.foreground, args.rounds)
            named = {"base": base, "dtype": dtype, "device": device.type, "rounds": args.rounds}
            rows.append({**named, **measured})
            print(_shown(rows[-1]), flush=True)
            write_json(args.json, {"rows": rows})  # after each: a long run that is stopped keeps what it has


def _shown(row: dict[str, Any]) -> str:
    lines = [
        f"{row['base']} {row['dtype']} {row['device']}, one step, a foreground of "
        f"{100 * row['foreground']:.0f} %, medians of {row['rounds']} rounds",
        f"{'':34}{'seconds':>9}{'over plain':>12}{'peak MB':>9}",
    ]
    for way, title in (
        ("plain", "denoiser alone"),
        ("cached", "kept features"),
        ("fresh", "the reference run at each step"),
        ("naive", "dense mask, run at each step"),
    ):
        figures = (row[what][way] for what in ("seconds", "ratios", "peak_mb"))
        lines.append("{:34}{:9.2f}{:12.3f}{:9.0f}".format(title, *figures))
    lines.append(f"kept features over plain by operations: {row['least_ratio']:.3f}")
    return "\n".join(lines)
