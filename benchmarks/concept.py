"""The figure of concepts: a photo, where its concepts are, each alone, and all of them together.

    python benchmarks/concept.py --model stickworld --steps 300 --out docs/concept.png

Without --photo the photo is a render of a person and an object, and their boxes are known; with --given-masks
their masks are too. With --photo name what is in it: --photo photo.jpg --concept "<hero>=person" --concept
"<blob>=ball".
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from interactdiff import Entity, Scene
from interactdiff.commands.arguments import quiet_libraries
from interactdiff.concept import Concept, Learner, LearnOptions
from interactdiff.concept.finding import default_size
from interactdiff.concept.pictures import masks_picture, read_photo
from interactdiff.concept.scene_boxes import scene_boxes
from interactdiff.evaluation.likeness import PERSON, lone_scene, sample_known
from interactdiff.files import write_aside
from interactdiff.models import MODEL, resolve
from interactdiff.pipeline_loading import load_pipeline, usable_device
from interactdiff.stickworld.render import render

THING = "ball"
GAP = 16  # pixels between the rows


def rendered(seed: int, size: int) -> tuple[Image.Image, list[Concept], Scene, dict[str, Tensor]]:
    """A person and an object of stickworld, what they are called, and their boxes and masks."""
    rng = Random(seed)
    shown = lone_scene([sample_known(name, rng) for name in (PERSON, THING)], seed)
    things = [shown.scene.things[number] for number in shown.numbers]
    scene = Scene("", entities=tuple(Entity(thing.name, thing.box) for thing in things))
    concepts = [Concept("<hero>", PERSON), Concept("<blob>", THING)]
    drawn = render(shown.scene, size)
    pairs = zip(concepts, shown.numbers, strict=True)
    masks = {one.token: torch.from_numpy(drawn.things[number].mask > 0).float() for one, number in pairs}
    return Image.fromarray(drawn.image), concepts, scene, masks


def main(arguments: Sequence[str] | None = None) -> None:
    """Learn the concepts, and draw the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=MODEL, help="default: %(default)s")
    parser.add_argument("--photo", metavar="FILE")
    parser.add_argument("--concept", action="append", default=[], metavar="TOKEN=WORD")
    parser.add_argument(
        "--given-masks", action="store_true", help="the renderer's, where there is no --photo"
    )
    parser.add_argument("--scene", metavar="FILE", help="what the photo shows, for boxes")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="default: %(default)s")
    parser.add_argument("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="of LearnOptions")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--size", type=int, metavar="N", help="default: the model's own")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("out/concept.png"), help="default: %(default)s")
    args = parser.parse_args(arguments)
    if (args.photo is None) != (not args.concept):
        parser.error("expected --photo and --concept together")
    quiet_libraries()
    pipeline = load_pipeline(resolve("model", args.model), usable_device(args.device), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    size = args.size or default_size(pipeline)
    if args.photo is None:
        photo, concepts, scene, known = rendered(args.seed, size)
    else:
        known = {}
        photo, concepts = read_photo(args.photo), [Concept.parse(text) for text in args.concept]
        scene = None if args.scene is None else Scene.from_file(args.scene)
    boxes = scene and scene_boxes(scene, {concept.token: concept.word for concept in concepts})
    changes = LearnOptions.parsed(args.set)
    options = LearnOptions(steps=args.steps, seed=args.seed, size=size, checkpoint_every=0, **changes)
    with Learner(pipeline, photo, concepts, options) as learner:
        masks = learner.find(boxes, known if args.given_masks else None)
        with tqdm(total=args.steps, unit="step") as bar:
            learner.train(lambda _: bar.update() and None)
        rows = [masks_picture(learner.photo, masks), learner.samples()]
    width, height = max(row.width for row in rows), sum(row.height for row in rows) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    sheet.paste(rows[0], (0, 0))
    sheet.paste(rows[1], (0, rows[0].height + GAP))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_aside(args.out, lambda aside: sheet.save(aside, format="PNG", optimize=True))
    print(args.out)


if __name__ == "__main__":
    main()
