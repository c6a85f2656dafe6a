"""Trains all models of the embedded world in some minutes on one GPU.

Models that do not need one another are trained side by side, each by a process of its own: so small ones
leave most of a GPU idle.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderTiny

from interactdiff.data.converters.base import Options
from interactdiff.data.converters.run import run as convert
from interactdiff.stickworld.render import SIZE
from interactdiff.training.device_files import (
    BASES,
    from_package,
    install,
    pack,
    pack_samples,
    unpack,
    with_parts,
)
from interactdiff.training.device_stages import (
    CLEAR,
    LATENTS,
    NEEDED,
    PARTS,
    PLAN,
    REFERENCES,
    SIZES,
    TOY,
    TOY_SIZES,
    VAE,
    Stage,
)
from interactdiff.training.world_data import CaptionedLatents, SizeConfig, cached_renders

CONFIGS = Path(__file__).parent / "configs"


def settings_of(stage: Stage, runs: Path, minutes: float, again: bool, toy: bool) -> list[str]:
    """`key=value` overrides of a stage's recipe."""
    values = dict(stage.settings)
    if again:
        values |= stage.again
    values |= {
        "output_dir": f"{{runs}}/run-{stage.name}",
        "lr_scheduler": "cosine_by_time",
        "stop_after": round(minutes, 3),
        "steps": 10**6,
        "checkpoint_every": 10**6,
        "sample_every": 10**6,
        "log_every": 5 if toy else 100,
    }
    if stage.name != "detector" or not toy:
        values["mixed_precision"] = "no" if toy else "bf16"
    recipe = yaml.safe_load((CONFIGS / f"{stage.config}.yaml").read_text(encoding="utf-8"))
    if "cache_dir" in recipe:
        values["cache_dir"] = "{runs}/cache"
    if stage is CLEAR:
        values["data"] = recipe["data"] | {"folder": "{runs}/cache/drawn", "batch_size": 128}
        if toy:
            values["data"] |= {"pictures": 8, "steps": 2, "batch_size": 8}
    if toy:
        small = {"batch_size": 4, "renders": 24, "portraits": 24, "held_out": 8, "validation": {"count": 0}}
        values |= {name: value for name, value in small.items() if name in recipe}
        if "sizes" in values:
            values["sizes"] = TOY_SIZES
        for part, sizes in TOY.items():
            if part in recipe:
                values[part] = recipe[part] | sizes
    return [f"{name}={_as_yaml(value)}".replace("{runs}", str(runs)) for name, value in values.items()]


def _as_yaml(value: Any) -> str:
    """A value on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def train(stage: Stage, runs: Path, minutes: float, again: bool, toy: bool) -> None:
    """Run one stage's recipe in a process of its own, its log beside it.

    Raises:
        RuntimeError: the recipe failed; with the end of its log.
    """
    log = runs / f"{stage.name}.log"
    command = [sys.executable, "-m", "interactdiff", "train", str(CONFIGS / f"{stage.config}.yaml")]
    command += ["--overwrite", "--set", *settings_of(stage, runs, minutes, again, toy)]
    began = time.monotonic()
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    print(f"{stage.name}: {time.monotonic() - began:.0f} s, exit code {code}", flush=True)
    if code:
        raise RuntimeError(f"{stage.name} failed:\n{log.read_text(errors='replace')[-3000:]}")


def prepare(stage: Stage, runs: Path, toy: bool) -> None:
    """Make what later stages see: renders, captions and latents in the cache, pictures with references."""
    began, cache = time.monotonic(), runs / "cache"
    if stage is REFERENCES:
        each = 3 if toy else 750
        with ProcessPoolExecutor(PARTS) as pool:
            list(pool.map(_references, [runs / "subjects"] * PARTS, range(PARTS), [each] * PARTS))
        print(f"{stage.name}: {time.monotonic() - began:.0f} s", flush=True)
        return
    sizes = {size: SizeConfig(**one) for size, one in (TOY_SIZES if toy else SIZES).items()}
    if stage is LATENTS:
        vae: Any = AutoencoderTiny.from_pretrained(runs / "parts" / "vae").float()
        CaptionedLatents(cache, vae.to("cuda" if torch.cuda.is_available() else "cpu"), sizes, masks=True)
    else:
        for size, one in sizes.items():
            cached_renders(cache, one.renders, size, one.most)
    print(f"{stage.name}: {time.monotonic() - began:.0f} s", flush=True)


def _references(folder: Path, part: int, each: int) -> None:
    """Render a part of the pictures with references, unless it is there."""
    if not (folder / str(part)).exists():
        seeds = f"{part * each}:{(part + 1) * each}"
        convert("stickworld", seeds, folder / str(part), Options(size=SIZE, subjects=2))


def _lane(stages: Sequence[Stage], runs: Path, minutes: float, again: Sequence[str], toy: bool) -> None:
    for stage in stages:
        if not stage.config:
            prepare(stage, runs, toy)
            continue
        there = (runs / stage.made).exists()
        if there and stage.name not in again:
            print(f"{stage.name}: there already", flush=True)
            continue
        train(stage, runs, stage.share * minutes, there, toy)


def _fork_lane(*arguments: Any) -> subprocess.Popen[bytes]:
    """A lane in a process of its own."""
    names, runs, minutes, again, toy = arguments
    command = [sys.executable, "-m", "interactdiff.training.on_device", "--lane", *names, "--out", str(runs)]
    command += ["--minutes", str(minutes), *(["--toy"] if toy else []), "--again", *again]
    return subprocess.Popen(command)


def minutes_to_share(runs: Path, minutes: float, again: Sequence[str]) -> float:
    """By which stages' shares count: those of an autoencoder that is there go to the rest."""
    there = (runs / VAE.made).exists() and VAE.name not in again
    return minutes / (1 - VAE.share) if there else minutes


def train_all(runs: Path, minutes: float, again: Sequence[str], toy: bool) -> None:
    """Train what is not there yet, within the minutes.

    Raises:
        RuntimeError: a stage failed; the others have run to their ends.
    """
    minutes = minutes_to_share(runs, minutes, again)
    for lanes in PLAN:
        processes = [_fork_lane([stage.name for stage in lane], runs, minutes, again, toy) for lane in lanes]
        failed = [p for p in processes if p.wait()]
        if failed:
            print(f"{len(failed)} of {len(lanes)} lanes failed", flush=True)
        if not all((runs / one.made).exists() for one in NEEDED):
            names = ", ".join(one.name for one in NEEDED)
            raise RuntimeError(f"expected {names} to be trained, got not all: nothing can go on")
    for base in BASES:
        if (runs / base).exists():
            with_parts(runs, base)


def evaluate(runs: Path, scenes: int, steps: int) -> dict[str, Any]:
    """Score both bases with their adapters and subject encoders; an error of one is its score."""
    report: dict[str, Any] = {}
    for base in BASES:
        if not (runs / base).exists():
            continue
        shared = ["--model", str(runs / base), "--scenes", str(scenes), "--steps", str(steps)]
        shared += ["--size", "128", "--batch-size", "128", "--guidance-scale", "4"]
        if (runs / "detector").exists():
            shared += ["--detector", str(runs / "detector")]
        interaction, clear = [], []
        if (runs / f"{base}-interaction").exists():
            interaction = ["--adapter", f"interaction={runs / f'{base}-interaction'}"]
            if (runs / f"{base}-clear").exists():
                clear = ["--adapter", f"clear={runs / f'{base}-clear'}"]
        report[base] = _score(["--world", *shared, *interaction, *clear], runs / f"{base}.json")
        if (runs / f"{base}-subject").exists():
            subject = [*interaction, "--adapter", f"subject={runs / f'{base}-subject'}"]
            subject += ["--rows", "text", "encoder", "--method", "subject:encoder_weight=1.5"]
            name = f"{base}-subject"
            report[name] = _score(["--subject", *shared, *subject], runs / f"{name}.json")
    return report


def _score(arguments: Sequence[str], file: Path) -> Any:
    """What `interactdiff evaluate` writes to a file, or the end of its error."""
    command = [sys.executable, "-m", "interactdiff", "evaluate", *arguments, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout[-3000:], done.stderr[-2000:] if done.returncode else "", flush=True)
    return json.loads(file.read_text()) if file.exists() else done.stderr[-2000:]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see `on_device.sh`."""
    parser = argparse.ArgumentParser(prog="on_device.sh", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, help="where the files are written")
    parser.add_argument(
        "--from-package", action="store_true", help="take autoencoder, text encoders and detector from it"
    )
    parser.add_argument("--start", type=Path, help="files that an earlier call wrote")
    parser.add_argument("--again", nargs="*", default=[], metavar="STAGE", help="train these on")
    parser.add_argument("--install", type=Path, metavar="DIR", help="put packed models into the package")
    parser.add_argument("--toy", action="store_true", help="a few steps of everything, on any device")
    parser.add_argument("--lane", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.install is not None:
        install(args.install)
        return
    if args.lane is not None:
        by_name = {stage.name: stage for lanes in PLAN for lane in lanes for stage in lane}
        _lane([by_name[name] for name in args.lane], args.out, args.minutes, args.again, args.toy)
        return
    if args.out is None:
        parser.error("expected --out or --install")
    began = time.monotonic()
    runs = Path(os.environ.get("RUNS", "build/on_device_runs")).resolve()
    if args.from_package:
        from_package(runs)
    if args.start is not None:
        unpack(args.start, runs)
    runs.mkdir(parents=True, exist_ok=True)
    print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}"
    )
    try:
        train_all(runs, args.minutes - 1.5, args.again, args.toy)
    finally:
        pack(runs, args.out)
        pack_samples(runs, args.out)
    report = evaluate(runs, 4 if args.toy else 100, 2 if args.toy else 20)
    report |= {"minutes": (time.monotonic() - began) / 60, "torch": torch.__version__}
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
