"""What training goes on from: a file of tensors and one of JSON, each whole or not there. No pickle."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from interactdiff.concept.words import ConceptError
from interactdiff.files import write_aside

TENSORS, STATE = "checkpoint.safetensors", "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """A run as it was kept.

    Attributes:
        step: how many steps are done.
        tensors: by name.
        moments: of the optimizer, for each trained parameter in order.
    """

    step: int
    tensors: dict[str, Tensor]
    moments: list[dict[str, Tensor]]


def save_checkpoint(
    folder: Path,
    step: int,
    run: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    moments: Sequence[Mapping[str, Tensor]],
) -> None:
    """Write a checkpoint over the last one.

    The tensors' file holds all that is needed; the JSON beside it says the same to people.

    Args:
        folder: made if need be.
        step: how many steps are done.
        run: what a run that goes on has to agree in, as JSON.
        tensors: by name.
        moments: of the optimizer, for each trained parameter in order.

    Raises:
        OSError: the folder cannot be written.
    """
    named = {f"tensor.{name}": tensor for name, tensor in tensors.items()}
    for number, values in enumerate(moments):
        named |= {f"moment.{number}.{name}": value for name, value in values.items()}
    named = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    state = {"step": step, "parameters": len(moments), "run": run}
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"state": json.dumps(state)}
    write_aside(folder / TENSORS, lambda file: save_file(named, file, metadata))
    text = json.dumps(state, indent=2) + "\n"
    write_aside(folder / STATE, lambda file: file.write_text(text, encoding="utf-8"))


def load_checkpoint(folder: Path, run: Mapping[str, Any]) -> Checkpoint | None:
    """Read a checkpoint; None if there is none.

    Args:
        folder: as of `save_checkpoint`.
        run: likewise.

    Raises:
        ConceptError: it is damaged, or of another run.
    """
    file = folder / TENSORS
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            state = json.loads(opened.metadata()["state"])
            named = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        step, count, kept = int(state["step"]), int(state["parameters"]), dict(state["run"])
    except Exception as error:  # a damaged file can end in any error of either library
        raise ConceptError(
            f"expected a whole checkpoint at {file}, got {type(error).__name__}: delete it to begin anew"
        ) from None
    if kept != run:
        changed = next(name for name in {**run, **kept} if kept.get(name) != run.get(name))
        raise ConceptError(
            f"expected a checkpoint of this run at {file}, got one with another {changed}: delete it to "
            "begin anew"
        )
    moments: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in named.items():
        if name.startswith("moment."):
            _, number, what = name.split(".")
            moments[int(number)][what] = tensor
    tensors = {n.removeprefix("tensor."): t for n, t in named.items() if n.startswith("tensor.")}
    return Checkpoint(step, tensors, moments)


def remove_checkpoint(folder: Path) -> None:
    """Remove a run's checkpoint, if there is one."""
    for name in (TENSORS, STATE):
        (folder / name).unlink(missing_ok=True)


def hash_of(shape: Sequence[int], values: bytes) -> str:
    """A hash of a picture or a mask, by which a checkpoint tells whether it is of the same one."""
    return hashlib.sha256(f"{tuple(shape)} ".encode() + values).hexdigest()
