"""A sheet of renders: scenes of the world above, and below one person and one object in other scenes.

python benchmarks/world_sheet.py --out docs/world.png
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import render

COLUMNS = 8


def main() -> None:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=128, help="pixels of each picture (default: 128)")
    args = parser.parse_args()
    scenes = [render(sample_scene(seed), args.size).image for seed in range(2 * COLUMNS)]
    alone = [sample_scene(seed, 1, 0) for seed in range(40, 40 + COLUMNS)]
    person, thing = (entity.appearance for entity in alone[0].things)
    same = [render(scene, args.size, (person, thing)).image for scene in alone]
    rows = [np.concatenate(row, 1) for row in (scenes[:COLUMNS], scenes[COLUMNS:], same)]
    Image.fromarray(np.concatenate(rows)).save(args.out)


if __name__ == "__main__":
    main()
