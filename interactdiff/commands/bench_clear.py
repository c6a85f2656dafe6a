"""interactdiff bench clear: what attention within windows costs, with random inputs."""

import argparse
from typing import Any

from interactdiff.commands.arguments import Commands, positive, quiet_libraries
from interactdiff.commands.bench_arguments import (
    DTYPES,
    add_device_and_json,
    check_json,
    chosen_device,
    numbers,
    write_json,
)


def add_to(kinds: Commands) -> None:
    """Add `bench clear`."""
    clear = kinds.add_parser(
        "clear",
        help="one attention call, full and with CLEAR's windows",
        description="One attention call over text and a square grid of image tokens: full attention, "
        "compiled FlexAttention with the published mask, ours; in turn within one process, medians.",
    )
    clear.set_defaults(run=_run)
    for flag, default, what in (
        ("--grids", "32,64,128,256", "sides of the grids, in tokens"),
        ("--windows", "8,16,32", "radii"),
        ("--text", "77,512", "text tokens"),
    ):
        clear.add_argument(
            flag, type=numbers, default=default, metavar="N,N", help=f"{what} (default: %(default)s)"
        )
    clear.add_argument("--heads", type=positive, default=8, help="default: %(default)s")
    clear.add_argument("--dim", type=positive, default=64, help="of a head (default: %(default)s)")
    clear.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    clear.add_argument("--rounds", type=positive, default=5, help="default: %(default)s")
    add_device_and_json(clear)


def _run(args: argparse.Namespace) -> None:
    check_json(args.json)
    quiet_libraries()
    import torch

    from interactdiff.bench.clear import ClearShapes, bench_clear
    from interactdiff.pipeline_loading import DTYPES

    device = chosen_device(args.device)
    shapes = ClearShapes(args.heads, args.dim, DTYPES[args.dtype], device)
    run = {"heads": args.heads, "dim": args.dim, "device": device.type, "rounds": args.rounds}
    run |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    rows: list[dict[str, Any]] = []
    for row in bench_clear(args.grids, args.windows, args.text, shapes, args.rounds):
        if not rows or (row["grid"], row["text"]) != (rows[-1]["grid"], rows[-1]["text"]):
            print(_clear_title(row, run))
        print(_clear_line(row), flush=True)
        rows.append(row)
        write_json(args.json, {**run, "rows": rows})


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
