"""Where a base fails in sampling: what is found in pictures that begin as a render under noise.

python benchmarks/from_renders.py FOLDER
python benchmarks/from_renders.py stickworld-dit --size 96

Image to image by the stock pipeline, with the scene's caption, from renders of held-out scenes of the model's
world. With strength 1.0 nothing of the render is left.
"""

import argparse
from inspect import signature

import numpy as np
import torch
from diffusers import AutoPipelineForImage2Image
from torch import Tensor

from interactdiff.commands.arguments import quiet_libraries
from interactdiff.evaluation.bootstrap import with_interval
from interactdiff.evaluation.captions import text_scores
from interactdiff.evaluation.sampling import held_out_scenes
from interactdiff.evaluation.world import packaged_detector
from interactdiff.generation import ScenePipeline
from interactdiff.pipeline_calls import call_arguments, repeatable_call
from interactdiff.stickworld.render import render
from interactdiff.training.world_data import as_images

STRENGTHS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
BATCH = 20


def main() -> None:
    """Print a row for each strength."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="packaged name, or a folder")
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="of a whole run, with strength 1.0")
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    args = parser.parse_args()
    quiet_libraries()
    stock = ScenePipeline.from_pretrained(args.model, device="cpu").detached().pipeline
    pipe = AutoPipelineForImage2Image.from_pipe(stock)
    pipe.set_progress_bar_config(disable=True)
    detector = packaged_detector()
    scenes = held_out_scenes(args.scenes, args.seed)
    # Flux's pipeline would draw larger pictures, and Stable Diffusion's takes no size
    sizes = {"height": args.size, "width": args.size}
    sizes = {name: side for name, side in sizes.items() if name in signature(pipe.__call__).parameters}
    images = as_images(np.stack([render(scene, args.size).image for scene in scenes])) / 2 + 0.5

    def drawn(first: int, strength: float) -> Tensor:
        """[B, 3, H, W] in [0, 1]."""
        batch = slice(first, first + BATCH)
        captions = [scene.caption for scene in scenes[batch]]
        return repeatable_call(
            pipe,
            **call_arguments(pipe, captions, guidance_scale=args.guidance_scale),
            image=images[batch],
            strength=strength,
            **sizes,
            num_inference_steps=args.steps,
            generator=torch.Generator().manual_seed(args.seed + first),
            output_type="pt",
        ).images

    for number, strength in enumerate(STRENGTHS):
        pictures = torch.cat([drawn(first, strength) for first in range(0, len(scenes), BATCH)])
        scores = text_scores(detector.detect(pictures), scenes)
        if number == 0:
            print(f"| strength | {' | '.join(scores)} |\n|---|{'---|' * len(scores)}")
        cells = []
        for score in scores.values():
            value, (low, high) = with_interval(score, len(scenes))
            cells.append(f"{100 * value:.0f} [{100 * low:.0f}, {100 * high:.0f}]")
        print(f"| {strength} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
