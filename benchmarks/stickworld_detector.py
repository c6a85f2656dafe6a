"""How often each head of the detector is right on held-out renders, and on renders through autoencoders.

python benchmarks/stickworld_detector.py --autoencoder interactdiff/stickworld/models/stickworld-dit/vae
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from interactdiff.commands.arguments import quiet_libraries
from interactdiff.evaluation.attributes import head_accuracies
from interactdiff.evaluation.sampling import held_out_scenes, reduced, render_scenes
from interactdiff.evaluation.world import load_detector
from interactdiff.stickworld import model_path
from interactdiff.stickworld.detector import Detections, Detector
from interactdiff.stickworld.world import WorldScene

BATCH = 32


@torch.no_grad()
def found_in(
    scenes: list[WorldScene], detector: Detector, size: int, autoencoder: Any = None
) -> list[Detections]:
    """What the detector finds in renders of scenes of some size, encoded and decoded if there is a way to."""
    found: list[Detections] = []
    for first in range(0, len(scenes), BATCH):
        images: Tensor = render_scenes(scenes[first : first + BATCH], size)
        if autoencoder is not None:
            latents = autoencoder.encode(2 * images - 1).latents
            images = (autoencoder.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        found += detector.detect(reduced(images, detector.size))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--detector", type=Path, default=model_path("detector"), help="its folder")
    parser.add_argument("--autoencoder", type=Path, nargs="*", default=[], help="folders of AutoencoderTiny")
    parser.add_argument("--scenes", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, help="pixels of the renders; default: those of the detector")
    args = parser.parse_args()
    quiet_libraries()
    detector = load_detector(args.detector)
    scenes = held_out_scenes(args.scenes, args.seed)
    size = args.size or detector.size
    columns = {"renders": head_accuracies(found_in(scenes, detector, size), scenes)}
    for folder in args.autoencoder:
        autoencoder = AutoencoderTiny.from_pretrained(folder).float().eval()
        columns[f"through {folder.name}"] = head_accuracies(
            found_in(scenes, detector, size, autoencoder), scenes
        )
    print(f"{args.scenes} held-out scenes of {size} px, %")
    print(f"{'':28}" + "".join(f"{title:>20}" for title in columns))
    for head in columns["renders"]:
        print(f"{head:28}" + "".join(f"{100 * shares.get(head, 0):20.1f}" for shares in columns.values()))


if __name__ == "__main__":
    main()
