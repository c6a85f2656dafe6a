"""How an autoencoder's latents spread their variance over spatial frequencies, beside pictures made as small.

python benchmarks/latent_spectrum.py interactdiff/stickworld/models/stickworld-dit/vae

Denoising decides low frequencies first. Latents whose variance falls with frequency, as pictures' does, are
learnt from coarse to fine; latents near white noise give a denoiser all their detail to decide at once.
"""

import argparse
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import render
from interactdiff.stickworld.world import HELD_OUT

EDGES = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2)  # cycles a latent


def shares(grids: Tensor) -> list[float]:
    """Shares of the variance of [B, C, S, S] in the bands between `EDGES`, upper ends included."""
    power = torch.fft.fft2(grids - grids.mean((0, 2, 3), keepdim=True)).abs().square().mean((0, 1))
    frequencies = torch.fft.fftfreq(grids.shape[-1]).abs()
    highest = torch.maximum(frequencies[:, None], frequencies)
    power = power / power.sum()
    bands = [(highest > low) & (highest <= high) for low, high in pairwise(EDGES)]
    bands[0] |= highest == 0
    return [float(power[band].sum()) for band in bands]


@torch.no_grad()
def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", help="autoencoders")
    parser.add_argument("--renders", type=int, default=96, help="held-out scenes (default: 96)")
    parser.add_argument("--size", type=int, default=128, help="pixels (default: 128)")
    args = parser.parse_args()
    renders = [render(sample_scene(HELD_OUT + seed), args.size).image for seed in range(args.renders)]
    images = torch.from_numpy(np.stack(renders)).permute(0, 3, 1, 2).float() / 127.5 - 1
    print("| share of variance up to | 1/32 | 1/16 | 1/8 | 1/4 | 3/8 | 1/2 | PSNR, dB |")
    print("|---|---|---|---|---|---|---|---|")
    print(f"| pictures | {' | '.join(f'{share:.2f}' for share in shares(F.avg_pool2d(images, 4)))} | |")
    for folder in args.folders:
        model = AutoencoderTiny.from_pretrained(folder).float().eval()
        latents = model.encode(images).latents
        error = (model.decode(latents).sample.clamp(-1, 1) - images).square().mean((1, 2, 3))
        ratio = float((10 * (4 / error).log10()).mean())
        print(f"| {folder} | {' | '.join(f'{share:.2f}' for share in shares(latents))} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
