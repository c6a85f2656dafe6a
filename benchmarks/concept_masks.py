"""How well attention finds the things of renders, by layers, by power and by the number of noise levels.

    python benchmarks/concept_masks.py --model stickworld --photos 20

Masks of the words of each render of stickworld, a person and an object, with their IoU with the renderer's
masks, as a table in Markdown: a row for each choice of layers and each power, a column for each number of
noise levels.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from interactdiff import ConceptAdapter, attach
from interactdiff.commands.arguments import quiet_libraries
from interactdiff.concept import ConceptMasks, Looking, MaskSettings
from interactdiff.concept.capture import Layers
from interactdiff.concept.denoising import Denoising
from interactdiff.concept.finding import Finder, default_settings, default_size
from interactdiff.concept.masks import make_masks, refined, with_background
from interactdiff.evaluation.likeness import PERSON, lone_scene, sample_known
from interactdiff.evaluation.words import mask_iou
from interactdiff.files import write_aside
from interactdiff.models import MODEL, resolve
from interactdiff.pipeline_loading import load_pipeline, usable_device
from interactdiff.sites import Denoiser, denoiser_of, find_sites
from interactdiff.stickworld.render import render
from interactdiff.stickworld.world import OBJECTS

TIMESTEPS = (25, 50, 75, 100, 125, 150, 175, 200)
TIMES = {1: [5], 2: [3, 7], 4: [1, 3, 5, 7], 8: list(range(8))}
"""Which of `TIMESTEPS` are read, by their number: 150 alone as published, and four by default."""
POWERS = (0, 1, 2, 4, 8)
TEMPLATE = "a {0} and a {1}"


def chosen_layers(denoiser: Denoiser) -> dict[str, Layers]:
    """The default ones; of a U-Net each level, of a transformer thirds of its blocks, and all of them."""
    found = {"default": Layers.of(denoiser)}
    sites = find_sites(denoiser)
    joint = [site.path for site in sites if site.role in ("joint", "single")]
    if joint:
        third = -(-len(joint) // 3)
        parts = {
            name: tuple(joint[n * third : (n + 1) * third])
            for n, name in enumerate(("first", "middle", "last"))
        }
        found |= {f"{name} third": Layers(paths, paths) for name, paths in parts.items() if paths}
        if len(found["default"].own) < len(joint):
            found["all"] = Layers(tuple(joint), tuple(joint))
        return found
    for level in sorted({site.level for site in sites if site.role == "cross"}):
        cross, own = (
            tuple(site.path for site in sites if site.role == role and site.level == level)
            for role in ("cross", "self")
        )
        if own:
            found[f"1/{2**level} of the latents' side"] = Layers(cross, own)
    return found


def rendered(number: int, seed: int, size: int) -> tuple[Image.Image, list[str], list[np.ndarray]]:
    """A render of a person and an object, their words, and their masks [size, size]."""
    rng = Random(f"masks {seed} {number}")
    names = [PERSON, rng.choice(sorted(OBJECTS))]
    shown = lone_scene([sample_known(name, rng) for name in names], seed * 100_000 + number)
    drawn = render(shown.scene, size)
    return Image.fromarray(drawn.image), names, [drawn.things[n].mask > 0 for n in shown.numbers]


def overlaps(masks: ConceptMasks, truths: Sequence[np.ndarray]) -> list[float]:
    """The IoU of each concept's mask with the renderer's."""
    found = masks.masks[: len(truths)].float()[None]
    large = F.interpolate(found, truths[0].shape)[0].numpy() > 0.5
    return [mask_iou(one, truth) for one, truth in zip(large, truths, strict=True)]


def scored(
    pipeline: Any, photos: int, size: int, settings: MaskSettings, seed: int
) -> dict[tuple[str, int], list[float]]:
    """Mean IoU by layers and power, for each of `TIMES`.

    Args:
        pipeline: from text.
        photos: how many renders.
        size: their side in pixels.
        settings: how masks are made; `power` is varied.
        seed: of the renders and of the noise.
    """
    layers = chosen_layers(denoiser_of(pipeline))
    values: dict[tuple[str, int], list[list[float]]] = {
        (name, power): [[] for _ in TIMES] for name in layers for power in POWERS
    }
    adapter = ConceptAdapter.for_pipeline(pipeline).named("masks")
    with attach(pipeline, adapter) as handle:
        for number in tqdm(range(photos), unit="photo"):
            photo, names, truths = rendered(number, seed, size)
            looking = Looking(TIMESTEPS, seed, masks=settings)
            photo = Denoising.of(pipeline).sized(photo, size)
            finder = Finder(Denoising.of(pipeline), handle["concept:masks"], photo, names, TEMPLATE, looking)
            for name, chosen in layers.items():
                finder.layers = chosen
                capture, columns = finder.look()
                for power in POWERS:
                    maps = refined(capture, columns, replace(settings, power=power))
                    for column, rows in enumerate(TIMES.values()):
                        scores = with_background(maps[rows].mean(0), settings).cpu()
                        values[name, power][column] += overlaps(make_masks(names, scores, settings), truths)
    return {key: [float(np.mean(ious)) for ious in columns] for key, columns in values.items()}


def as_markdown(values: dict[tuple[str, int], list[float]]) -> str:
    """The table, in percent; the best of each column is bold."""
    best = [max(column) for column in zip(*values.values(), strict=True)]
    heads = [f"{count} noise level{'s' * (count > 1)}" for count in TIMES]
    lines = ["| layers | power | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    for (name, power), row in values.items():
        cells = (
            f"**{100 * v:.1f}**" if v == top else f"{100 * v:.1f}" for v, top in zip(row, best, strict=True)
        )
        lines.append(f"| {name} | {power} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=MODEL, help="default: %(default)s")
    parser.add_argument("--photos", type=int, default=20, metavar="N", help="default: %(default)s")
    parser.add_argument("--size", type=int, metavar="N", help="default: the model's own")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--threshold", type=float, default=0.1, metavar="X", help="default: %(default)s")
    parser.add_argument("--exponent", type=float, default=2.0, metavar="X", help="default: %(default)s")
    parser.add_argument("--background", choices=("start", "template", "complement"))
    parser.add_argument("--nearest", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the table there")
    args = parser.parse_args(arguments)
    quiet_libraries()
    pipeline = load_pipeline(resolve("model", args.model), usable_device(args.device), torch.float32)
    settings = replace(
        default_settings(pipeline),
        threshold=args.threshold,
        exponent=args.exponent,
        unassigned="nearest" if args.nearest else "ignore",
        **({"background": args.background} if args.background else {}),
    )
    size = args.size or default_size(pipeline)
    table = as_markdown(scored(pipeline, args.photos, size, settings, args.seed))
    print(table, end="")
    if args.out is not None:
        write_aside(args.out, lambda aside: aside.write_text(table, encoding="utf-8"))


if __name__ == "__main__":
    main()
