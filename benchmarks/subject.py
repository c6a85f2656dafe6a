"""Persons from rendered references on the packaged transformer, in some ways, side by side.

    python benchmarks/subject.py --out docs/subject.png

Columns: the reference; text only; seen by all tokens, in its own positions; in a box, its middle on the box's
middle, at reference weights 3 and 8. No weights are trained for it.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from interactdiff import Subject, SubjectAdapter, attach
from interactdiff.commands.arguments import quiet_libraries
from interactdiff.files import write_aside
from interactdiff.generation import ScenePipeline
from interactdiff.models import model_info
from interactdiff.picture import side_by_side
from interactdiff.pipeline_calls import call_arguments
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import render

MODEL = "stickworld-dit"
CAPTION = "a person riding a yellow bike on the beach"
BOX = (0.25, 0.0, 0.75, 0.75)
SIZE, STEPS = 128, 20


def references(colours: tuple[str, ...]) -> list[Subject]:
    """One rendered person in each colour, with the mask that the renderer knows."""
    found = {}
    for number in range(1000):
        scene = sample_scene(number, 1)
        colour = scene.triplets[0].subject_appearance.colour
        if colour in colours and colour not in found:
            drawn = render(scene, SIZE)
            mask = Image.fromarray(drawn.things[0].mask).convert("L")
            found[colour] = Subject("person", Image.fromarray(drawn.image), mask)
    return [found[colour] for colour in colours]


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/subject.png"))
    parser.add_argument("--colours", nargs="+", default=["green", "purple"])
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    quiet_libraries()
    pipe = ScenePipeline.from_pretrained(MODEL, device="cpu").detached().pipeline
    pipe.set_progress_bar_config(disable=True)
    arguments = call_arguments(pipe, CAPTION, None, model_info(MODEL).guidance_scale)
    arguments |= {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS}

    def draw() -> Image.Image:
        return pipe(**arguments, generator=torch.Generator().manual_seed(args.seed)).images[0]

    rows, plain = [], draw()
    with attach(pipe, SubjectAdapter()) as handle:
        for one in references(tuple(args.colours)):
            row = [one.image.image, plain]
            for box, weight in ((None, 3.0), (BOX, 3.0), (BOX, 8.0)):
                handle["subject"].configure(reference_weight=weight)
                handle.set_scene([Subject(one.phrase, one.image, one.mask, box)], prompt=CAPTION)
                row.append(draw())
            rows.append(
                side_by_side(*(image.resize((2 * SIZE,) * 2, Image.Resampling.LANCZOS) for image in row))
            )
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows) + 16 * (len(rows) - 1)), "white")
    for number, row in enumerate(rows):
        sheet.paste(row, (0, number * (row.height + 16)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_aside(args.out, lambda aside: sheet.save(aside, format="PNG", optimize=True))
    print(args.out)


if __name__ == "__main__":
    main()
