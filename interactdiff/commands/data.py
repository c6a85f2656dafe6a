"""interactdiff data: check, look at, count, shard and convert pictures to train on."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interactdiff.commands.arguments import (
    Commands,
    UsageError,
    add_boxes,
    add_columns,
    check_picture_path,
    columns_of,
    number,
    positive,
    whole,
)
from interactdiff.data.converters import CONVERTERS
from interactdiff.errors import DataError
from interactdiff.files import why_unwritable

if TYPE_CHECKING:
    from interactdiff.data.framing import Framing
    from interactdiff.data.reading import Records

_EVERY = 1000  # pictures between lines of progress


def add_to(commands: Commands) -> None:
    """Add `data`, and below it its commands."""
    parser = commands.add_parser("data", help="check, show, count, shard and convert pictures to train on")
    kinds = parser.add_subparsers(title="commands", metavar="WHAT", required=True)
    _add_check(kinds)
    _add_show(kinds)
    _add_stats(kinds)
    _add_shard(kinds)
    _add_convert(kinds)


def _add_check(kinds: Commands) -> None:
    parser = _reader(kinds, "check", _check, "find everything that would stop training", framing=True)
    parser.add_argument("--slots", type=positive, default=30, help="items of one picture (default: 30)")
    parser.add_argument("--no-flip", action="store_true", help="training does not mirror pictures")
    parser.add_argument("--quick", action="store_true", help="read headers of pictures only, do not decode")
    parser.add_argument("--strict", action="store_true", help="warnings are errors")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="that counts the tokens of phrases (default: words are counted)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_show(kinds: Commands) -> None:
    parser = _reader(
        kinds, "show", _show, "a sheet of pictures and boxes as training sees them", framing=True
    )
    parser.add_argument("--count", type=positive, default=16, help="pictures (default: %(default)s)")
    parser.add_argument("--seed", type=whole, default=0, help="which ones (default: 0)")
    parser.add_argument("--flip", action="store_true", help="mirrored, as half of training sees them")
    parser.add_argument("--out", type=Path, default=Path("contact_sheet.png"), help="default: %(default)s")


def _add_stats(kinds: Commands) -> None:
    parser = _reader(kinds, "stats", _stats, "phrases, box sizes, slots, what cropping costs", framing=True)
    parser.add_argument("--slots", type=positive, default=30, help="items of one picture (default: 30)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_shard(kinds: Commands) -> None:
    parser = _reader(kinds, "shard", _shard, "pack data into tar shards with an index")
    parser.add_argument("target", metavar="OUT", type=Path, help="the folder of shards")
    parser.add_argument(
        "--pictures", type=positive, default=1000, metavar="N", help="in a shard (default: 1000)"
    )
    parser.add_argument(
        "--bytes", type=positive, default=10**9, metavar="N", help="of a shard at most (default: 10^9)"
    )


def _add_convert(kinds: Commands) -> None:
    parser = kinds.add_parser("convert", help="make a folder of pictures with metadata.jsonl")
    parser.set_defaults(run=_convert)
    parser.add_argument("kind", choices=tuple(CONVERTERS), metavar="KIND", help=", ".join(CONVERTERS))
    parser.add_argument("source", metavar="SRC", help="a folder or file; of stickworld the seeds FIRST:LAST")
    parser.add_argument("target", metavar="OUT", type=Path, help="a folder that is not there yet")
    parser.add_argument("--images", type=Path, metavar="DIR", help="where the pictures are")
    parser.add_argument("--split", help="only this one")
    parser.add_argument("--copy", action="store_true", help="copy pictures in place of links to them")
    parser.add_argument("--skip-missing", action="store_true", help="leave out rows whose picture is missing")
    parser.add_argument(
        "--spelling", choices=("source", "fixed"), default="source", help="of HICO-DET's gerunds (controling)"
    )
    parser.add_argument(
        "--merge-iou", type=number, metavar="X", help="HICO-DET: actions of one pair share its boxes (0.7)"
    )
    parser.add_argument("--names", type=Path, metavar="FILE", help="swig, hoia: names of classes")
    parser.add_argument("--predicates", type=Path, metavar="FILE", help="vg: those that are kept, one a line")
    parser.add_argument("--size", type=positive, default=128, help="stickworld: pixels (default: 128)")
    parser.add_argument(
        "--no-colours", action="store_true", help="stickworld: phrases that its detector knows (bike)"
    )
    parser.add_argument(
        "--subjects",
        type=whole,
        default=0,
        metavar="N",
        help="stickworld: up to N persons and objects of a picture have a reference picture (default: 0)",
    )
    add_boxes(parser)


def _reader(
    kinds: Commands, name: str, run: Any, words: str, framing: bool = False
) -> argparse.ArgumentParser:
    """A command that reads data."""
    parser = kinds.add_parser(name, help=words)
    parser.set_defaults(run=run)
    parser.add_argument("path", metavar="PATH", help="a folder, a parquet file or a Hub id like owner/name")
    parser.add_argument("--split", help="only this one; needed if there are several")
    add_columns(parser)
    add_boxes(parser)
    if framing:
        parser.add_argument("--resolution", type=positive, default=512, help="of training (default: 512)")
        parser.add_argument(
            "--multiple", type=positive, default=64, help="of sides; 16 for DiTs (default: 64)"
        )
        parser.add_argument("--square", action="store_true", help="a centre crop in place of aspect buckets")
    return parser


def _check(args: argparse.Namespace) -> None:
    from interactdiff.data.checking import MAX_TOKENS, CheckOptions, check

    tokens, most = None, MAX_TOKENS
    if args.tokenizer is not None:
        tokens, most = _tokens(args.tokenizer)
    options = CheckOptions(
        form=args.boxes,
        columns=columns_of(args),
        framing=_framing(args),
        slots=args.slots,
        flip=not args.no_flip,
        decode=not args.quick,
        tokens=tokens,
        max_tokens=most,
    )
    report = check(args.path, args.split, options)
    print(json.dumps(report.to_dict(), indent=2) if args.json else "\n".join(report.lines()))
    wrong = len(report.errors) + (len(report.warnings) if args.strict else 0)
    if wrong:
        words = "errors and warnings" if args.strict else "errors"
        raise DataError(f"expected data without {words} in {args.path}, got {wrong}")


def _show(args: argparse.Namespace) -> None:
    from interactdiff.data.contact_sheet import contact_sheet
    from interactdiff.files import write_aside

    check_picture_path(args.out)
    sheet = contact_sheet(_records(args), _framing(args), args.count, args.seed, args.flip)
    write_aside(args.out, lambda aside: sheet.save(aside, format="PNG"))
    print(args.out)


def _stats(args: argparse.Namespace) -> None:
    from interactdiff.data.statistics import lines, statistics

    numbers = statistics(_records(args), _framing(args), args.slots)
    print(json.dumps(numbers, indent=2) if args.json else "\n".join(lines(numbers)))


def _shard(args: argparse.Namespace) -> None:
    from interactdiff.data.reading import read_folder, splits
    from interactdiff.data.shards import write_shards

    if args.target.exists() and not args.target.is_dir():
        raise UsageError(f"expected a folder for shards, got the file {args.target}")
    for split in splits(args.path) if args.split is None else [args.split]:
        records = read_folder(args.path, split, args.boxes, columns_of(args))
        made = write_shards(records, args.target, split or "train", args.pictures, args.bytes)
        pictures, size = (sum(one[key] for one in made.values()) for key in ("count", "bytes"))
        words = f"{pictures:,} pictures in {len(made):,} shards, {size / 1e6:,.1f} MB"
        print(f"{args.target}: {split or 'train'}, {words}")


def _convert(args: argparse.Namespace) -> None:
    from interactdiff.data.converters.base import Options
    from interactdiff.data.converters.run import run

    if args.merge_iou is not None and not 0 < args.merge_iou <= 1:
        raise UsageError(f"--merge-iou: expected a number over 0 and up to 1, got {args.merge_iou}")
    parent = next(parent for parent in args.target.absolute().parents if parent.exists())
    if reason := why_unwritable(parent / args.target.name) if not args.target.exists() else None:
        raise UsageError(f"expected a folder that can be written, got {args.target}: {reason}")
    options = Options(
        images=args.images,
        split=args.split,
        skip_missing=args.skip_missing,
        spelling=args.spelling,
        merge_iou=args.merge_iou,
        names=args.names,
        predicates=args.predicates,
        form=args.boxes,
        size=args.size,
        colours=not args.no_colours,
        subjects=args.subjects,
    )

    def progress(count: int) -> None:
        if count % _EVERY == 0:
            print(f"{count:,} pictures", file=sys.stderr)

    notes = run(args.kind, args.source, args.target, options, args.copy, progress)
    print(f"{args.target}: " + ", ".join(f"{count:,} {what}" for what, count in notes.items() if count))


def _framing(args: argparse.Namespace) -> "Framing":
    from interactdiff.data.framing import Framing

    return Framing(args.resolution, args.multiple, args.square)


def _records(args: argparse.Namespace) -> "Records":
    from interactdiff.data.reading import Records

    return Records.open(args.path, args.split, args.boxes, columns_of(args))


def _tokens(folder: str) -> tuple[Any, int]:
    """What counts the tokens of a phrase, and how many there may be."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises errors of many libraries
        raise UsageError(f"--tokenizer: expected one in {folder}, got {type(error).__name__}") from None
    return lambda phrase: len(tokenizer(phrase, verbose=False).input_ids), tokenizer.model_max_length
