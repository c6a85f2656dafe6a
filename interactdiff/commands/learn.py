"""interactdiff learn: the things of one photo as new words."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interactdiff.checkpoint import CONFIG, WEIGHTS
from interactdiff.commands.arguments import Commands, UsageError, positive, quiet_libraries, whole
from interactdiff.commands.concept_arguments import (
    add_photo,
    boxes,
    checked_photo,
    loaded,
    looking,
    named,
)
from interactdiff.concept.words import Concept, check_distinct, joint_prompt
from interactdiff.files import why_unwritable, write_aside

if TYPE_CHECKING:
    from interactdiff.concept.learner import Learner
    from interactdiff.concept.options import LearnOptions

PRESETS = ("ours", "published", "custom-diffusion")
MASKS, SAMPLES = "masks.png", "samples"


def add_to(commands: Commands) -> None:
    """Add `learn`."""
    parser = commands.add_parser(
        "learn",
        help="learn the things of one photo as new words",
        description="Find things in a photo by a model's attention, and learn each as a word of its own. "
        "Interrupted, the same command goes on where it stopped. docs/concept.md",
    )
    parser.set_defaults(run=_run)
    add_photo(parser, "TOKEN=WORD", 'what it is to be called, and what it is: "<hero>=person"')
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--steps", type=positive, default=500, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--vectors",
        type=positive,
        default=1,
        metavar="N",
        help="embeddings of each token (default: %(default)s)",
    )
    parser.add_argument(
        "--sample-every",
        type=whole,
        default=250,
        metavar="N",
        help="steps between sample grids; 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default=PRESETS[0],
        help="where options start from (default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="OPTION=VALUE",
        help="further options of interactdiff.concept.LearnOptions, such as learning_rate=1e-4 rank=8",
    )


def _run(args: argparse.Namespace) -> None:
    concepts = [Concept.parse(text, args.vectors) for text in args.concept]
    check_distinct([concept.token for concept in concepts])
    joint_prompt(args.prompt, [concept.token for concept in concepts])
    checked_photo(args)
    _check_folder(args.out)
    quiet_libraries()
    from tqdm import tqdm

    from interactdiff.concept.learner import Learner
    from interactdiff.concept.pictures import masks_picture, read_masks, read_photo

    photo = read_photo(args.photo)
    places = boxes(args, {concept.token: concept.word for concept in concepts})
    given = read_masks(named("--mask", args.mask), photo)
    pipeline, size = loaded(args)
    options = _options(args, pipeline, size)
    with Learner(pipeline, photo, concepts, options, args.prompt, args.out) as learner:
        masks = learner.find(places, given)
        args.out.mkdir(parents=True, exist_ok=True)
        picture = masks_picture(learner.photo, masks)
        write_aside(args.out / MASKS, lambda file: picture.save(file, format="PNG"))
        print(f"{args.out / MASKS}: " + ", ".join(f"{n} {100 * a:.0f} %" for n, a in masks.areas.items()))
        with tqdm(total=options.steps, initial=learner.step, unit="step") as bar:

            def show(report: Any) -> None:
                bar.update()
                bar.set_postfix(loss=f"{report.loss:.4f}", refresh=False)
                if options.sample_every and report.step % options.sample_every == 0:
                    _sample(learner, args)

            try:
                learner.train(show)
            except KeyboardInterrupt:
                bar.close()
                print(f"stopped after step {learner.step}: the same command goes on from there")
                raise
        learner.adapter.eval().save_pretrained(args.out)
        learner.forget()
    print(args.out)


def _options(args: argparse.Namespace, pipeline: Any, size: int) -> "LearnOptions":
    """Of the preset, with what flags say.

    Raises:
        ConceptError: there is no such option, or a value is out of range.
    """
    from interactdiff.concept.options import LearnOptions

    makers = (LearnOptions, LearnOptions.published, LearnOptions.custom_diffusion)
    preset = dict(zip(PRESETS, makers, strict=True))[args.preset]()
    own = {"steps": args.steps, "vectors": args.vectors, "sample_every": args.sample_every, "seed": args.seed}
    changes = LearnOptions.parsed(args.set)
    return replace(preset, looking=looking(args, pipeline, preset.looking), size=size, **own, **changes)


def _sample(learner: "Learner", args: argparse.Namespace) -> None:
    folder = args.out / SAMPLES
    folder.mkdir(exist_ok=True)
    picture = learner.samples()
    write_aside(folder / f"{learner.step:06}.png", lambda file: picture.save(file, format="PNG"))


def _check_folder(folder: Path) -> None:
    if (folder / WEIGHTS).exists() or (folder / CONFIG).exists():
        raise UsageError(f"--out: expected a new folder, got {str(folder)!r}, which has an adapter in it")
    if folder.is_dir():
        reason = why_unwritable(folder / WEIGHTS)
    elif folder.exists():
        reason = "a file"
    else:
        nearest = next(parent for parent in folder.absolute().parents if parent.exists())
        reason = why_unwritable(nearest / folder.name)
    if reason:
        raise UsageError(f"--out: expected a folder that can be written, got {str(folder)!r}: {reason}")
