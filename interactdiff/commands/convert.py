"""interactdiff convert: of any published file, the adapter alone, in our format or in another one."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from interactdiff.checkpoint import CONFIG, WEIGHTS, AdapterError
from interactdiff.commands.arguments import Commands, UsageError, quiet_libraries
from interactdiff.files import why_unwritable
from interactdiff.method_specs import load_attribute
from interactdiff.registry import exports

DTYPES = ("float16", "bfloat16", "float32", "keep")


@dataclass(frozen=True)
class Converted:
    """What was done.

    Attributes:
        words: what was recognised, and for which base.
        target: the folder that was written.
        before: size of the files that were read, in bytes.
        after: size of the weights that were written, in bytes.
    """

    words: str
    target: Path
    before: int
    after: int

    def __str__(self) -> str:
        """In one line, sizes in megabytes of 10^6 bytes."""
        sizes = " -> ".join(f"{size / 1e6:,.1f} MB" for size in (self.before, self.after))
        return f"{self.target}: {self.words}, {sizes}"


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    weight_name: str | None = None,
    dtype: str = "float16",
) -> Converted:
    """Write an adapter as `InteractionAdapter.save_pretrained` does. The base's weights are not read.

    Args:
        source: as `InteractionAdapter.from_pretrained` takes it.
        target: a folder, made if need be.
        weight_name: as `InteractionAdapter.from_pretrained` takes it.
        dtype: of the weights: "float16", "bfloat16", "float32", or "keep" for what they are stored in.

    Raises:
        AdapterError: the folder cannot be written, or there is no adapter that can be read.
        OSError: the disk fills up.
    """
    target = Path(target)
    if reason := _why_unwritable_folder(target):
        raise AdapterError(f"expected a folder that can be written, got {str(target)!r}: {reason}")
    if dtype not in DTYPES:
        raise AdapterError(f"expected a dtype of {', '.join(DTYPES)}, got {dtype!r}")
    import torch

    from interactdiff.interaction.adapter import InteractionAdapter
    from interactdiff.interaction.loading import open_adapter

    wanted = None if dtype == "keep" else getattr(torch, dtype)
    opened = open_adapter(source, weight_name=weight_name, dtype=wanted)
    InteractionAdapter.from_lazy(opened.config, opened.tensors, wanted).save_pretrained(target)
    words = f"{opened.words}, for {opened.config.base}"
    return Converted(words, target, opened.size, (target / WEIGHTS).stat().st_size)


def add_to(commands: Commands) -> None:
    """Add `convert`."""
    parser = commands.add_parser(
        "convert",
        help="make a small adapter of published weights",
        description="Write the adapter alone as safetensors, out of any published file: InteractDiffusion's "
        "for SD 1.x and SDXL, or GLIGEN's as a start for training. No code in the file is run.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument("source", metavar="IN", help="a file, a folder or a Hugging Face Hub id")
    parser.add_argument("target", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument("--weight-name", metavar="FILE", help="which file of IN, where it has several")
    parser.add_argument("--dtype", choices=DTYPES, help=f"default: {DTYPES[0]}")
    forms = "; ".join(f"{name}: {one.description}" for name, one in exports().items())
    parser.add_argument(
        "--export", choices=tuple(exports()), help=f"write an adapter in another form; {forms}"
    )
    parser.add_argument(
        "--fold", dest="export", action="store_const", const="fold", help="the same as --export fold"
    )
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help="of --export: the model that the adapter is for"
    )


def _run(args: argparse.Namespace) -> None:
    if args.export is None and args.model is not None:
        raise UsageError("--model: expected it with --export, got it alone")
    quiet_libraries()
    if args.export is not None:
        for flag, given in (("--weight-name", args.weight_name), ("--dtype", args.dtype)):
            if given is not None:
                raise UsageError(f"{flag}: expected it without --export or --fold, got it beside them")
        if reason := _why_unwritable_folder(args.target):
            raise UsageError(f"expected a folder that can be written, got {str(args.target)!r}: {reason}")
        print(load_attribute(exports()[args.export].export)(args.source, args.target, args.model))
        return
    print(convert(args.source, args.target, weight_name=args.weight_name, dtype=args.dtype or DTYPES[0]))


def _why_unwritable_folder(folder: Path) -> str | None:
    """Why `save_pretrained` could not write there, or None."""
    if folder.is_dir():
        return why_unwritable(folder / WEIGHTS) or why_unwritable(folder / CONFIG)
    if folder.exists():
        return "a file"
    nearest = next(parent for parent in folder.parents if parent.exists())
    return why_unwritable(nearest / folder.name) if nearest.is_dir() else f"{nearest} is a file"
