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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderTiny

from interactdiff.training.device_files import (
    BASES,
    from_package,
    install,
    pack,
    pack_samples,
    unpack,
    with_parts,
)
from interactdiff.training.world_data import CaptionedLatents, SizeConfig, cached_renders

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Stage:
    """A model's training.

    Attributes:
        name: what `--again` calls it.
        config: the recipe's file, without its ending.
        made: the folder that it exports, in the folder of runs.
        share: of the minutes.
        settings: laid over the recipe's file; `{runs}` stands for the folder of runs.
        again: the same, to go on from what is there.
    """

    name: str
    config: str
    made: str
    share: float
    settings: dict[str, Any] = field(default_factory=dict)
    again: dict[str, Any] = field(default_factory=dict)


_SIZES = {
    128: {"renders": 32000, "batch_size": 192, "share": 0.5},
    96: {"renders": 16000, "batch_size": 256, "share": 0.2, "most": 3},
    64: {"renders": 32000, "batch_size": 512, "share": 0.2, "most": 2},
    160: {"renders": 8000, "batch_size": 128, "share": 0.05},
    192: {"renders": 8000, "batch_size": 96, "share": 0.05},
}
_TOY_SIZES = {128: {"renders": 24, "batch_size": 4, "share": 1.0}}
_TOY: dict[str, dict[str, Any]] = {  # narrow models for a trial run
    "unet": {"block_out_channels": [16, 16]},
    "transformer": {"num_single_layers": 1, "num_attention_heads": 1},
    "adapter": {"hidden": 16},
}
_BASE = {"sizes": _SIZES, "compile": False, "warmup_steps": 100}
_TEXT = Stage(
    "text", "stickworld_text", "parts/text_encoder", 0.05, {"export_to": "{runs}/parts", "batch_size": 256}
)
_T5 = Stage(
    "t5", "stickworld_t5", "parts/text_encoder_2", 0.05, {"export_to": "{runs}/parts", "batch_size": 256}
)
_VAE = Stage(
    "vae",
    "stickworld_vae",
    "parts/vae",
    0.11,
    {"export_to": "{runs}/parts/vae", "batch_size": 64, "renders": 32000},
    {"init_from": "{runs}/parts/vae"},
)
_READER = Stage(
    "reader",
    "stickworld_latent_reader",
    "readers/vae",
    0.04,
    {
        "vae": "{runs}/parts/vae",
        "export_to": "{runs}/readers/vae",
        "batch_size": 128,
        "renders": 32000,
    },
)
_DETECTOR = Stage(
    "detector",
    "stickworld_detector",
    "detector",
    0.25,
    {
        "export_to": "{runs}/detector",
        "autoencoders": ["{runs}/parts/vae"],
        "renders": 32000,
        "batch_size": 96,
    },
)
_UNET = Stage(
    "base",
    "stickworld_base",
    "stickworld",
    0.48,
    {
        "vae": "{runs}/parts/vae",
        "text": "{runs}/parts",
        "latent_reader": "{runs}/readers/vae",
        "export_to": "{runs}/stickworld",
        **_BASE,
    },
    {"init_from": "{runs}/stickworld", "learning_rate": 1.0e-3},
)
_DIT = Stage(
    "dit",
    "stickworld_dit",
    "stickworld-dit",
    0.42,
    {
        "text": "{runs}/parts",
        "latent_reader": "{runs}/readers/vae",
        "export_to": "{runs}/stickworld-dit",
        **_BASE,
    },
    {"init_from": "{runs}/stickworld-dit", "learning_rate": 1.0e-3},
)
_INTERACTION = Stage(
    "interaction",
    "stickworld_interaction",
    "stickworld-interaction",
    0.20,
    {
        "base": "{runs}/stickworld",
        "export_to": "{runs}/stickworld-interaction",
        "batch_size": 64,
        "renders": 32000,
    },
    {"init_from": "{runs}/stickworld-interaction", "learning_rate": 1.0e-3},
)
_DIT_INTERACTION = Stage(
    "dit_interaction",
    "stickworld_dit_interaction",
    "stickworld-dit-interaction",
    0.13,
    {
        "base": "{runs}/stickworld-dit",
        "export_to": "{runs}/stickworld-dit-interaction",
        "batch_size": 64,
        "renders": 32000,
    },
    {"init_from": "{runs}/stickworld-dit-interaction", "learning_rate": 1.0e-3},
)
_CLEAR = Stage(
    "clear",
    "distill_clear_stickworld",
    "stickworld-dit-clear",
    0.13,
    {"base": "{runs}/stickworld-dit", "export_to": "{runs}/stickworld-dit-clear", "batch_size": 48},
    {"init_from": "{runs}/stickworld-dit-clear", "learning_rate": 5.0e-4},
)
# What later stages read from the cache, made once for all of them: renders and captions, then latents.
_RENDERS, _LATENTS = Stage("renders", "", "", 0.0), Stage("latents", "", "", 0.0)
_NEEDED = (_VAE, _READER, _TEXT)  # by both bases
# One list after the other; the lanes of a list side by side, the stages of a lane one after the other.
PLAN: tuple[tuple[tuple[Stage, ...], ...], ...] = (
    ((_RENDERS, _VAE, _LATENTS, _READER), (_TEXT, _T5)),
    ((_UNET, _INTERACTION), (_DIT, _DIT_INTERACTION, _CLEAR), (_DETECTOR,)),
)


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
    if not stage.config.startswith("distill") and "text" not in stage.config and "t5" not in stage.config:
        values["cache_dir"] = "{runs}/cache"
    recipe = yaml.safe_load((CONFIGS / f"{stage.config}.yaml").read_text(encoding="utf-8"))
    if stage is _CLEAR:
        values["data"] = recipe["data"] | {"folder": "{runs}/cache/drawn", "batch_size": 128}
        if toy:
            values["data"] |= {"pictures": 8, "steps": 2, "batch_size": 8}
    if toy:
        small = {"batch_size": 4, "renders": 24, "held_out": 8}
        values |= {name: value for name, value in small.items() if name in recipe}
        if "sizes" in values:
            values["sizes"] = _TOY_SIZES
        for part, sizes in _TOY.items():
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
    """Fill the cache with renders, or with captions and latents, of all that later stages see."""
    began, cache = time.monotonic(), runs / "cache"
    sizes = {size: SizeConfig(**one) for size, one in (_TOY_SIZES if toy else _SIZES).items()}
    if stage is _LATENTS:
        vae: Any = AutoencoderTiny.from_pretrained(runs / "parts" / "vae").float()
        CaptionedLatents(cache, vae.to("cuda" if torch.cuda.is_available() else "cpu"), sizes, masks=True)
    else:
        for size, one in sizes.items():
            cached_renders(cache, one.renders, size, one.most)
    print(f"{stage.name}: {time.monotonic() - began:.0f} s", flush=True)


def _lane(stages: Sequence[Stage], runs: Path, minutes: float, again: Sequence[str], toy: bool) -> None:
    for stage in stages:
        if stage in (_RENDERS, _LATENTS):
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
    there = (runs / _VAE.made).exists() and _VAE.name not in again
    return minutes / (1 - _VAE.share) if there else minutes


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
        if not all((runs / one.made).exists() for one in _NEEDED):
            names = ", ".join(one.name for one in _NEEDED)
            raise RuntimeError(f"expected {names} to be trained, got not all: nothing can go on")
    for base in BASES:
        if (runs / base).exists():
            with_parts(runs, base)


def evaluate(runs: Path, scenes: int, steps: int) -> dict[str, Any]:
    """Score both bases with their adapters; an error of one is its score."""
    report: dict[str, Any] = {}
    for base in BASES:
        if not (runs / base).exists():
            continue
        file = runs / f"{base}.json"
        command = [sys.executable, "-m", "interactdiff", "evaluate", "--world", "--model", str(runs / base)]
        command += ["--scenes", str(scenes), "--steps", str(steps), "--size", "128", "--batch-size", "128"]
        command += ["--json", str(file), "--guidance-scale", "4"]
        if (runs / "detector").exists():
            command += ["--detector", str(runs / "detector")]
        if (runs / f"{base}-interaction").exists():
            command += ["--adapter", f"interaction={runs / f'{base}-interaction'}"]
            if (runs / f"{base}-clear").exists():
                command += ["--adapter", f"clear={runs / f'{base}-clear'}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout[-3000:], done.stderr[-2000:] if done.returncode else "", flush=True)
        report[base] = json.loads(file.read_text()) if file.exists() else done.stderr[-2000:]
    return report


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
