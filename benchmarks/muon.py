"""A step of Muon on the matrices of a packaged transformer: torch's, in bfloat16, against ours.

python benchmarks/muon.py
"""

import argparse
import statistics
import time
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from interactdiff.commands.arguments import quiet_libraries
from interactdiff.stickworld import model_path
from interactdiff.training.muon import Muon


def seconds(optimizer: torch.optim.Optimizer) -> float:
    """A step's, on the CPU."""
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    """Print the median seconds of both and their ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="steps of each, in turn")
    rounds = parser.parse_args().rounds
    quiet_libraries()
    load: Any = FluxTransformer2DModel.from_pretrained
    model = load(model_path("stickworld-dit"), subfolder="transformer").float()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    torch.manual_seed(0)
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    options = {"lr": 1e-5, "weight_decay": 0.0}
    pair = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options), Muon(matrices, **options)
    for optimizer in pair:
        optimizer.step()
    times = [[seconds(optimizer) for optimizer in pair] for _ in range(rounds)]
    theirs, ours = (statistics.median(column) for column in zip(*times, strict=True))
    count = sum(matrix.numel() for matrix in matrices)
    print(f"{count / 1e6:.1f} M parameters: torch.optim.Muon {theirs:.2f} s, ours {ours:.2f} s a step")
    print(f"torch's takes {theirs / ours:.1f} times as long")


if __name__ == "__main__":
    main()
