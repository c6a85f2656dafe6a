"""Kills a training at random moments, resumes it, and compares every loss with those of an unbroken run.

python benchmarks/training_kills.py --kills 20

The launcher and all of its descendants are killed (SIGKILL), anywhere between its start and its end: while
caches are made, in a step, while a checkpoint or a sample is written. Each time the next start goes on from
the latest checkpoint; when a run ends before it is killed, the next one starts anew, without caches.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

CONFIG = Path(__file__).parent.parent / "training/configs/smoke.yaml"
EVERY = 3  # steps between checkpoints


def command(folder: Path, name: str, processes: int, steps: int) -> list[str]:
    """A few steps of the packaged base on 32 px, on some processes."""
    values = {
        "data": folder / "world", "cache": folder / f"cache-{name}", "output_dir": folder / name,
        "export_to": folder / f"{name}-adapter", "steps": steps, "processes": processes,
        "batch_size": 4 // processes, "resolution": 32, "square": "true", "log_every": 1,
        "checkpoint_every": EVERY, "checkpoints_total_limit": 2, "sample_every": 5,
        "validation": "{count: 1, steps: 2}", "ema_decay": 0.9,
    }  # fmt: skip
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    train = ["interactdiff", "train", str(CONFIG), "--resume_from_checkpoint", "latest", "--set"]
    return [sys.executable, "-m", *launcher, *train, *(f"{key}={value}" for key, value in values.items())]


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(words, stdout=file, stderr=file, env=environment, start_new_session=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    """The launcher first, so that it starts nothing more; then its descendants."""
    there = psutil.Process(process.pid)
    everyone = [there, *there.children(recursive=True)]
    for one in everyone:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(everyone, timeout=30)
    process.wait()


def losses(folder: Path) -> list[tuple[int, float]]:
    """Steps and losses of a log, in its order; a line that was cut off by a kill is left out."""
    rows = []
    file = folder / "log.jsonl"
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "loss" in row:
            rows.append((row["step"], row["loss"]))
    return rows


def last_step(folder: Path) -> int:
    return max((step for step, _ in losses(folder)), default=0)


def moment(
    rng: random.Random, run: subprocess.Popen[bytes], folder: Path, steps: int, seconds: float
) -> None:
    """Wait for a random moment of a run, or for its end: mostly after some step, else while it starts."""
    until = time.monotonic() + 1e6
    step = rng.randint(last_step(folder), steps)
    if rng.random() < 0.25:
        step, until = steps + 1, time.monotonic() + rng.uniform(0.0, seconds)
    while run.poll() is None and time.monotonic() < until and last_step(folder) < step:
        time.sleep(0.05)
    if until > time.monotonic():
        time.sleep(rng.uniform(0.0, 1.5))


def compared(unbroken: Mapping[int, float], folder: Path) -> tuple[int, int, float]:
    """Rows of a broken run's log, how many differ, and the largest relative difference."""
    rows = losses(folder)
    apart = [abs(loss - unbroken[step]) / abs(unbroken[step]) for step, loss in rows]
    return len(rows), sum(one > 0 for one in apart), max(apart, default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = ["data", "convert", "stickworld", "0:12", str(folder / "world"), "--size", "32"]
        subprocess.run([sys.executable, "-m", "interactdiff", *world], check=True)
        words = command(folder, "unbroken", args.processes, args.steps)
        begun = time.monotonic()
        if code := start(words, folder / "log").wait():
            sys.exit(f"the unbroken run ended with {code}: {(folder / 'log').read_text()[-2000:]}")
        seconds = time.monotonic() - begun
        unbroken = dict(losses(folder / "unbroken"))
        print(f"unbroken: {len(unbroken)} steps on {args.processes} processes, {seconds:.0f} s", flush=True)
        words = command(folder, "broken", args.processes, args.steps)
        killed, counted, different, largest, done = 0, 0, 0, 0.0, False
        while killed < args.kills or not done:
            run, begun = start(words, folder / "log"), time.monotonic()
            if killed < args.kills:
                moment(rng, run, folder / "broken", args.steps, seconds)
            if run.poll() is None and killed < args.kills:
                kill(run)
                killed, done = killed + 1, False
                after = time.monotonic() - begun
                print(f"kill {killed} after {after:.1f} s, step {last_step(folder / 'broken')}", flush=True)
                continue
            if code := run.wait():
                sys.exit(f"a resumed run ended with {code}: {(folder / 'log').read_text()[-3000:]}")
            rows, apart, most = compared(unbroken, folder / "broken")
            counted, different, largest, done = counted + rows, different + apart, max(largest, most), True
            steps = {step for step, _ in losses(folder / "broken")}
            aside = [path for path in (folder / "broken").iterdir() if path.name.startswith(".checkpoint")]
            if steps != set(unbroken) or aside:
                sys.exit(f"expected every step and nothing half written, got {sorted(steps)} and {aside}")
            if killed < args.kills:
                for path in ("broken", "cache-broken", "broken-adapter"):
                    shutil.rmtree(folder / path)
        print(
            f"{killed} kills: {counted} logged steps, {different} losses that differ from the unbroken "
            f"run's, by {largest:.1e} at most"
        )


if __name__ == "__main__":
    main()
