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
    """Add `bench interaction`, `bench joint` and `bench clear`."""
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
    _add_where(interaction)
    joint = kinds.add_parser(
        "joint",
        help="one step of a Flux-shaped transformer, with and without interactions and windows",
        description="One step of some blocks of FLUX.1's shape with random weights: alone, with "
        "interactions, with CLEAR's windows, with both; in turn within one process, medians.",
    )
    joint.set_defaults(run=_joint)
    joint.add_argument(
        "--grids",
        type=_numbers,
        default="64,128",
        metavar="N,N",
        help="sides in tokens (default: %(default)s)",
    )
    joint.add_argument("--window", type=positive, default=16, help="radius (default: %(default)s)")
    joint.add_argument("--text", type=positive, default=512, help="text tokens (default: %(default)s)")
    joint.add_argument("--heads", type=positive, default=24, help="of 128 each (default: %(default)s)")
    joint.add_argument(
        "--blocks",
        type=_numbers,
        default="1,1",
        metavar="N,N",
        help="joint and single (default: %(default)s)",
    )
    joint.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    joint.add_argument("--rounds", type=positive, default=3, help="default: %(default)s")
    _add_where(joint)
    clear = kinds.add_parser(
        "clear",
        help="one attention call, full and with CLEAR's windows",
        description="One attention call over text and a square grid of image tokens: full attention, "
        "compiled FlexAttention with the published mask, ours; in turn within one process, medians.",
    )
    clear.set_defaults(run=_clear)
    for flag, default, what in (
        ("--grids", "32,64,128,256", "sides of the grids, in tokens"),
        ("--windows", "8,16,32", "radii"),
        ("--text", "77,512", "text tokens"),
    ):
        clear.add_argument(
            flag, type=_numbers, default=default, metavar="N,N", help=f"{what} (default: %(default)s)"
        )
    clear.add_argument("--heads", type=positive, default=8, help="default: %(default)s")
    clear.add_argument("--dim", type=positive, default=64, help="of a head (default: %(default)s)")
    clear.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    clear.add_argument("--rounds", type=positive, default=5, help="default: %(default)s")
    _add_where(clear)


def _add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, cuda or else cpu"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")


def _numbers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _check_json(path: Path | None) -> None:
    if path is not None and (reason := why_unwritable(path)):
        raise UsageError(f"--json: expected a file that can be written, got {path}: {reason}")


def _write(path: Path | None, values: dict[str, Any]) -> None:
    if path is not None:
        text = json.dumps(values, indent=2) + "\n"
        write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def _interaction(args: argparse.Namespace) -> None:
    _check_json(args.json)
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
            _write(args.json, {"rows": rows})  # after each: a long run that is stopped keeps what it has


def _joint(args: argparse.Namespace) -> None:
    _check_json(args.json)
    if len(args.blocks) != 2:
        raise UsageError(f"--blocks: expected two numbers, joint and single, got {len(args.blocks)}")
    quiet_libraries()
    import torch

    from interactdiff.bench.joint import JointShapes, bench_joint
    from interactdiff.generate import DTYPES, usable_device

    best = "cuda" if torch.cuda.is_available() else "cpu"
    device = usable_device(best if args.device == "auto" else args.device)
    shapes = JointShapes(args.heads, tuple(args.blocks), args.text, device, DTYPES[args.dtype])
    run = {"heads": args.heads, "blocks": args.blocks, "text": args.text, "dtype": args.dtype}
    run |= {"device": device.type, "rounds": args.rounds}
    rows: list[dict[str, Any]] = []
    for grid in args.grids:
        rows.append(bench_joint(shapes, grid, args.window, args.rounds))
        print(_joint_shown(rows[-1], run), flush=True)
        _write(args.json, {**run, "rows": rows})


def _joint_shown(row: dict[str, Any], run: dict[str, Any]) -> str:
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


def _clear(args: argparse.Namespace) -> None:
    _check_json(args.json)
    quiet_libraries()
    import torch

    from interactdiff.bench.clear import ClearShapes, bench_clear
    from interactdiff.generate import DTYPES, usable_device

    best = "cuda" if torch.cuda.is_available() else "cpu"
    device = usable_device(best if args.device == "auto" else args.device)
    shapes = ClearShapes(args.heads, args.dim, DTYPES[args.dtype], device)
    run = {"heads": args.heads, "dim": args.dim, "device": device.type, "rounds": args.rounds}
    run |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    rows: list[dict[str, Any]] = []
    for row in bench_clear(args.grids, args.windows, args.text, shapes, args.rounds):
        if not rows or (row["grid"], row["text"]) != (rows[-1]["grid"], rows[-1]["text"]):
            print(_clear_title(row, run))
        print(_clear_line(row), flush=True)
        rows.append(row)
        _write(args.json, {**run, "rows": rows})


def _clear_title(row: dict[str, Any], run: dict[str, Any]) -> str:
    return (
        f"{row['grid']} x {row['grid']} image and {row['text']} text tokens, {run['heads']} heads x "
        f"{run['dim']}, {row['dtype']}, {run['device']}, medians of {run['rounds']} rounds\n"
        f"{'':16}{'window':>7}{'seconds':>10}{'x full':>9}{'over limit':>12}{'peak MB':>9}"
    )


def _clear_line(row: dict[str, Any]) -> str:
    name = f"{row['backend']:16}{row['window'] or '':>7}"
    if "skipped" in row:
        return f"{name}  left out: {row['skipped']}"
    line = f"{name}{row['seconds']:10.4f}"
    line += f"{row['times_full']:9.2f}{row['times_limit']:12.2f}" if "times_full" in row else f"{'':21}"
    line += f"{row['peak_mb']:9.0f}"
    if "mask_seconds" in row:
        line += f"  and {row['mask_seconds']:.2f} s for its mask, {row['compile_seconds']:.2f} s to compile"
    return line


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
