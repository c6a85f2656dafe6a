"""Which flags of `evaluate` go with which kind of evaluation: those that would have no effect are refused."""

import argparse
from collections.abc import Mapping
from typing import Any

from interactdiff.commands.arguments import UsageError
from interactdiff.registry import methods

WORLD, DATA, COMPARE, METHOD = "--world", "--data", "--compare", "of a method"
FLAGS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("model", "adapter", "device", "steps", "guidance_scale"), (WORLD, DATA, METHOD)),
    **dict.fromkeys(("size", "detector", "batch_size"), (WORLD, DATA, METHOD)),
    **dict.fromkeys(("scenes", "seed"), (WORLD, METHOD)),
    "rows": (DATA, METHOD),
    **dict.fromkeys(("method", "set"), (METHOD,)),
    **dict.fromkeys(("interactions", "word_iou", "fast"), (WORLD,)),
    **dict.fromkeys(
        ("split", "boxes", "column", "classes", "pictures", "protocol", "seeds", "limit"), (DATA,)
    ),
    **dict.fromkeys(("paper", "out", "vcoco", "scores", "box_model", "clip_model", "vlm_model"), (DATA,)),
    "sheet": (DATA,),
}
"""The kinds of evaluation in which a flag has an effect; those that are not here have one in all."""
DRAWING = ("rows", "seeds", "steps", "guidance_scale")
"""Flags of `--data` that have one only where a model draws."""
PAPER = ("steps", "guidance_scale")
"""Flags that `--paper` decides."""


def without_defaults(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Take the defaults of `FLAGS` out of a parser, so that a flag that is not None was given.

    Returns:
        The defaults, which `check_flags` puts in.
    """
    defaults = {name: parser.get_default(name) for name in FLAGS}
    parser.set_defaults(**dict.fromkeys(FLAGS))
    return defaults


def check_flags(args: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Refuse flags that would have no effect, and put in the defaults of those that were not given.

    Raises:
        UsageError: there is one.
    """
    kind = _kind(args)
    given = [name for name in FLAGS if getattr(args, name) is not None]
    for name in given:
        if kind not in FLAGS[name]:
            raise UsageError(f"{_flag(name)}: expected {_titles(name)} beside it, got {_title(args, kind)}")
    if kind == DATA:
        for name in PAPER if args.paper else ():
            if name in given:
                raise UsageError(f"{_flag(name)}: expected none beside --paper, which has its own")
        for name in () if args.model or args.adapter else DRAWING:
            if name in given:
                raise UsageError(f"{_flag(name)}: expected --model or --adapter beside it, got none")
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def _kind(args: argparse.Namespace) -> str:
    if args.scored is not None:
        return METHOD
    return WORLD if args.world else DATA if args.data is not None else COMPARE


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _title(args: argparse.Namespace, kind: str) -> str:
    return f"--{args.scored}" if kind == METHOD else kind


def _titles(name: str) -> str:
    scored = [f"--{method}" for method, spec in methods().items() if spec.scores is not None]
    *some, last = (one for kind in FLAGS[name] for one in (scored if kind == METHOD else [kind]))
    return f"{', '.join(some)} or {last}" if some else last
