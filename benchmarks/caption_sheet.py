"""A sheet of what a model of stickworld draws of 16 held-out captions, each beside the scene's render.

python benchmarks/caption_sheet.py --out docs/captions.png

Prints the captions, row by row.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from interactdiff.commands.arguments import quiet_libraries
from interactdiff.evaluation.sampling import PictureRequest, Sampling, draw_pictures, held_out_scenes
from interactdiff.generation import ScenePipeline
from interactdiff.models import model_info
from interactdiff.stickworld.render import render

COUNT, COLUMNS = 16, 4


def main() -> None:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="stickworld-dit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance-scale", type=float, help="the model's own if not given")
    args = parser.parse_args()
    quiet_libraries()
    info = model_info(args.model)
    pipeline = ScenePipeline.from_pretrained(args.model, device="cpu").detached()
    scenes = held_out_scenes(COUNT, args.seed)
    requests = [PictureRequest(number, scene.caption) for number, scene in enumerate(scenes)]
    how = Sampling(args.steps, args.guidance_scale or info.guidance_scale, pipeline.size)
    drawn = draw_pictures(requests, pipeline, args.seed, how).permute(0, 2, 3, 1)
    pairs = [
        np.concatenate([render(scene, pipeline.size).image, (255 * picture).round().byte().numpy()], 1)
        for scene, picture in zip(scenes, drawn, strict=True)
    ]
    rows = [np.concatenate(pairs[first : first + COLUMNS], 1) for first in range(0, COUNT, COLUMNS)]
    Image.fromarray(np.concatenate(rows)).save(args.out)
    print("\n".join(scene.caption for scene in scenes))


if __name__ == "__main__":
    main()
