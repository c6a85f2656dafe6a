"""Persons and objects by one picture each on a packaged model, drawn in each of the ways that are scored.

    python benchmarks/subject.py --subjects 5 --out docs/subject.png

Columns: the reference; by words alone; with the subject encoder; with self-subject attention; with both; and
as the model is set up, with the interaction in its boxes, of which one places the subject.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from PIL import Image

from interactdiff import Scene, Subject
from interactdiff.commands.arguments import quiet_libraries
from interactdiff.evaluation.likeness import prompt_of
from interactdiff.evaluation.subjects import NEEDS_ENCODER, ROWS, row_settings, subject_task
from interactdiff.files import write_aside
from interactdiff.generation import ScenePipeline
from interactdiff.models import MODEL
from interactdiff.picture import side_by_side

COLUMNS = ("text", "encoder", "attention", "both")
SHOWN = 192  # pixels a side
GAP = 12


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=MODEL, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/subject.png"))
    parser.add_argument("--subjects", type=int, default=4, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of subjects and noise (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    args = parser.parse_args()
    quiet_libraries()
    pipeline = ScenePipeline.from_pretrained(args.model, methods={"subject": {}})
    pipeline.pipeline.set_progress_bar_config(disable=True)
    assert pipeline.handle is not None
    has_encoder = pipeline.handle["subject"].adapter.config is not None
    columns = [name for name in COLUMNS if has_encoder or name not in NEEDS_ENCODER]
    rows = []
    for number in range(args.subjects):
        task = subject_task(number, args.seed, pipeline.size)
        wanted, name = task.wanted[0], task.known.name
        prompt = prompt_of(wanted.scene, {wanted.numbers[0]: f"a {name}"})
        pictures = [task.image]
        for column in columns:
            items = () if ROWS[column] is None else (Subject(name, task.image, task.mask),)
            scene = Scene(prompt, seed=args.seed + number, steps=args.steps, extra_items=items)
            settings = {"subject": row_settings(column, {})} if items else {}
            pictures.append(pipeline.generate(scene, methods=settings))
        placed = replace(scene, interactions=wanted.scene.interactions(colours=False))
        pictures.append(pipeline.generate(placed))
        print(f"{name}: {prompt}")
        rows.append(side_by_side(*(one.resize((SHOWN, SHOWN), Image.Resampling.LANCZOS) for one in pictures)))
    height = sum(row.height for row in rows) + GAP * (len(rows) - 1)
    sheet = Image.new("RGB", (rows[0].width, height), "white")
    for number, row in enumerate(rows):
        sheet.paste(row, (0, number * (row.height + GAP)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_aside(args.out, lambda aside: sheet.save(aside, format="PNG", optimize=True))
    print(args.out)


if __name__ == "__main__":
    main()
