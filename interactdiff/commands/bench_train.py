"""interactdiff bench train: a training step at true shapes with random weights, and what its data takes."""

import argparse
from typing import Any

from interactdiff.commands.arguments import Commands, UsageError, positive, quiet_libraries, whole
from interactdiff.commands.bench_arguments import (
    DTYPES,
    add_device_and_json,
    check_json,
    chosen_device,
    write_json,
)

BASES = ("sd15", "sd21", "sdxl", "sd35", "flux")


def add_to(kinds: Commands) -> None:
    """Add `bench train`."""
    train = kinds.add_parser(
        "train",
        help="a training step of an adapter, and the data that feeds it",
        description="Forward, backward and an AdamW step at true shapes with random weights, with all "
        "activations kept and with gradient checkpointing; the loader alone; the start on cached pictures.",
    )
    train.set_defaults(run=_run)
    train.add_argument("--base", nargs="+", choices=BASES, default=["sd15"], help="default: sd15")
    train.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, float32 on cpu")
    train.add_argument("--resolution", type=positive, metavar="PX", help="default: the base's own")
    train.add_argument("--batch-size", type=positive, default=1, help="default: %(default)s")
    train.add_argument("--rounds", type=positive, default=3, help="default: %(default)s")
    train.add_argument("--workers", type=whole, default=2, help="that read examples (%(default)s)")
    train.add_argument(
        "--pictures", type=positive, default=38_000, help="whose start is timed (%(default)s, HICO-DET's)"
    )
    add_device_and_json(train)


def _run(args: argparse.Namespace) -> None:
    check_json(args.json)
    quiet_libraries()
    try:
        from interactdiff.training.bench import BASES as SHAPES
        from interactdiff.training.bench import bench_training
    except ModuleNotFoundError as error:
        raise UsageError(f"expected the packages of interactdiff[train], got no {error.name}") from None
    from interactdiff.pipeline_loading import DTYPES as TORCH_DTYPES

    device = chosen_device(args.device)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    rows: list[dict[str, Any]] = []
    for base in args.base:
        measured = bench_training(
            SHAPES[base],
            args.resolution,
            args.batch_size,
            args.rounds,
            args.workers,
            args.pictures,
            device,
            TORCH_DTYPES[dtype],
        )
        named = {"base": base, "dtype": dtype, "device": device.type, "batch_size": args.batch_size}
        rows.append({**named, "rounds": args.rounds, "pictures": args.pictures, **measured})
        print(_shown(rows[-1]), flush=True)
        write_json(args.json, {"rows": rows})


def _shown(row: dict[str, Any]) -> str:
    lines = [
        f"{row['base']} {row['dtype']} {row['device']}, {row['resolution']} px, batch {row['batch_size']}, "
        f"medians of {row['rounds']} steps",
        f"{'activations':14}{'step s':>9}{'examples/s':>12}{'waiting':>9}{'peak MB':>9}",
    ]
    for way, one in row["ways"].items():
        lines.append(
            f"{way:14}{one['step_s']:9.2f}{one['examples_per_s']:12.3f}{one['waiting']:9.1%}"
            f"{one['peak_mb']:9.0f}"
        )
    start = row["start_s"]
    return "\n".join(
        [
            *lines,
            f"without caches: {row['encode_s']:.2f} s more a step, {row['waiting_without_caches']:.0%} of it",
            f"the loader alone: {row['loader_per_s']:.0f} examples/s, {row['loader_over_step']:.0f} times "
            "what a step takes",
            f"{row['pictures']} pictures to the first batch: {start['first']:.1f} s without caches, "
            f"{start['cached']:.1f} s with them",
        ]
    )
