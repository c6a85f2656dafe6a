"""interactdiff masks: where things are in a photo, by a model's attention to their words."""

import argparse
import re
from collections.abc import Collection
from pathlib import Path

from interactdiff.commands.arguments import Commands, check_picture_path, quiet_libraries
from interactdiff.commands.concept_arguments import (
    add_photo,
    boxes,
    checked_photo,
    loaded,
    looking,
    named,
)
from interactdiff.files import write_aside


def add_to(commands: Commands) -> None:
    """Add `masks`."""
    parser = commands.add_parser(
        "masks",
        help="find things in a photo by a model's attention to their words",
        description="Noises a photo a little, reads where the model attends to each word, and writes the "
        "masks as a picture, and with --each one PNG a word.",
    )
    parser.set_defaults(run=_run)
    add_photo(parser, "WORD", 'what is in the photo, such as "dog"')
    parser.add_argument(
        "--out", type=Path, default=Path("masks.png"), metavar="PNG", help="default: %(default)s"
    )
    parser.add_argument(
        "--each",
        action="store_true",
        help="also write OUT.WORD.png of the photo's size for each word, white where it is",
    )


def _run(args: argparse.Namespace) -> None:
    check_picture_path(args.out)
    checked_photo(args)
    quiet_libraries()
    import numpy as np
    from PIL import Image

    from interactdiff.concept.denoising import Denoising
    from interactdiff.concept.finding import find_masks
    from interactdiff.concept.pictures import masks_picture, read_masks, read_photo

    photo = read_photo(args.photo)
    given = read_masks(named("--mask", args.mask), photo)
    words = [word.rpartition("=")[2] for word in args.concept]
    places = boxes(args, dict(zip(words, words, strict=True)))
    pipeline, size = loaded(args)
    masks = find_masks(
        pipeline,
        photo,
        words,
        size=size,
        prompt=args.prompt,
        looking=looking(args, pipeline),
        boxes=places,
        given=given,
    )
    denoising = Denoising.of(pipeline)
    crop = denoising.crop(photo.size, size)
    written = {args.out: masks_picture(denoising.sized(photo, size), masks)}
    if args.each:
        for number, name in enumerate(masks.names):
            white = Image.fromarray(masks.masks[number].numpy().astype(np.uint8) * 255)
            written[_beside(args.out, name, written)] = crop.restored(white, photo.size)
    for path, picture in written.items():
        write_aside(path, lambda file, picture=picture: picture.save(file, format="PNG"))
        print(path)
    for name, area in masks.areas.items():
        print(f"{name}: {100 * area:.1f} % of the photo")


def _beside(out: Path, word: str, taken: Collection[Path]) -> Path:
    """A file of its own for a word, of letters that every file system takes."""
    name = re.sub(r"[^\w-]+", "_", word)[:60]
    names = (f"{out.stem}.{name}{end}.png" for end in ("", *(f"-{n}" for n in range(2, len(taken) + 2))))
    return next(path for one in names if (path := out.with_name(one)) not in taken)
