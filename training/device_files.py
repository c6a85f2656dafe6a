"""How models travel to a machine with a GPU and back: a few files, packed, unpacked and installed."""

import shutil
import subprocess
import tarfile
from pathlib import Path

from interactdiff.stickworld import model_path
from interactdiff.training.tokenizer import make_portable

# The files that are written, with the folders in them; a model's own parts only, since bases share theirs.
FILES: dict[str, tuple[str, ...]] = {
    "parts.tar": (
        "parts/vae",
        "parts/text_encoder",
        "parts/tokenizer",
        "parts/text_encoder_2",
        "parts/tokenizer_2",
    ),
    "readers.tar": ("readers/vae", "readers/image-tower"),
    "detector.tar": ("detector",),
    "unet.tar": ("stickworld/unet", "stickworld/scheduler", "stickworld/model_index.json"),
    "transformer.tar": (
        "stickworld-dit/transformer",
        "stickworld-dit/scheduler",
        "stickworld-dit/model_index.json",
    ),
    "adapters.tar": (
        "stickworld-interaction",
        "stickworld-subject",
        "stickworld-dit-interaction",
        "stickworld-dit-clear",
        "stickworld-dit-subject",
    ),
}
BASES: dict[str, tuple[str, ...]] = {"stickworld": ("vae", "text_encoder", "tokenizer")}
BASES["stickworld-dit"] = (*BASES["stickworld"], "text_encoder_2", "tokenizer_2")
LARGEST = 16 * 2**20  # bytes of a file


def with_parts(runs: Path, base: str) -> None:
    """Put the shared parts into a base's folder, so that diffusers loads it."""
    for part in BASES[base]:
        link = runs / base / part
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(runs / "parts" / part)


def from_package(runs: Path) -> None:
    """Start from the packaged transformer's autoencoder and text encoders, and from the packaged detector."""
    for part in BASES["stickworld-dit"]:
        shutil.copytree(model_path("stickworld-dit") / part, runs / "parts" / part, dirs_exist_ok=True)
    shutil.copytree(model_path("detector"), runs / "detector", dirs_exist_ok=True)


def pack(runs: Path, out: Path) -> list[Path]:
    """Write what was made as a few files.

    Raises:
        RuntimeError: a file is too large to travel.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, folders in FILES.items():
        there = [folder for folder in folders if (runs / folder).exists()]
        if there:
            with tarfile.open(out / name, "w") as tar:
                for folder in there:
                    tar.add(runs / folder, folder)
            written.append(out / name)
    large = [path.name for path in written if path.stat().st_size > LARGEST]
    if large:
        raise RuntimeError(f"expected files of at most {LARGEST} bytes, got larger ones: {', '.join(large)}")
    return written


def pack_samples(runs: Path, out: Path) -> None:
    """Write the last sample grid of each stage."""
    with tarfile.open(out / "samples.tar", "w") as tar:
        for folder in sorted(runs.glob("run-*/samples")):
            newest = max(folder.iterdir())
            tar.add(newest, f"{folder.parent.name}{newest.suffix}")


def unpack(folder: Path, runs: Path) -> None:
    """Lay out what an earlier call packed."""
    runs.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (folder / name).is_file():
            with tarfile.open(folder / name) as tar:
                tar.extractall(runs, filter="data")


def install(folder: Path) -> None:
    """Put packed models into the package, each base with its parts; no readers, which only train."""
    runs = Path("build/on_device_models")
    unpack(folder, runs)
    for base in BASES:
        if (runs / base).exists():
            with_parts(runs, base)
    for made in sorted(set(runs.iterdir()) - {runs / "parts", runs / "readers"}):
        make_portable(made)
        subprocess.run(["cp", "-RL", str(made), str(model_path(""))], check=True)
