"""A checkpoint: all that a training carries from step to step, in safetensors and JSON, never a pickle.

`model.safetensors` has the weights, `training.safetensors` the optimizers' moments, the weights' average and
the random states, and `state.json`, written last, the rest and the checksums of the other two.
"""

import json
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from interactdiff.checkpoint import save_tensors
from interactdiff.errors import DamagedCheckpointError, RecipeError
from interactdiff.training.sharding import local, put, whole

MODEL, TRAINING, STATE = "model.safetensors", "training.safetensors", "state.json"


class SavedState(BaseModel):
    """The contents of `state.json`.

    Attributes:
        version: of this format.
        run: the identity of the run.
        step: how many steps were taken.
        config: of the run.
        optimizers: parameter groups of each, and what its states have beside tensors.
        schedulers: state of each.
        ema_steps: how many steps were averaged.
        scaler: state of the scaler of fp16.
        random: states of Python's and numpy's generators.
        checksums: CRC-32 of each file of tensors.
        data: what says whether the data are the same, see `Recipe.data_digest`; checkpoints of before and
            recipes that make their data have none.
        own_checksum: CRC-32 of all of the above; checkpoints of before have none.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    version: Literal[1] = 1
    run: str
    step: int
    config: dict[str, Any]
    optimizers: list[dict[str, Any]]
    schedulers: list[dict[str, Any]]
    ema_steps: int
    scaler: dict[str, Any] | None
    random: dict[str, Any]
    checksums: dict[str, int]
    data: str | None = None
    own_checksum: int | None = None

    def checksum(self) -> int:
        """What `own_checksum` is to be."""
        left_out = {"own_checksum"} | ({"data"} if self.data is None else set())
        contents = json.loads(json.dumps(self.model_dump(exclude=left_out)))
        return zlib.crc32(json.dumps(contents, sort_keys=True).encode())


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory, whole and unharmed.

    Attributes:
        folder: where it was read.
        state: all but the tensors.
        tensors: by file, then by name.
        replaces: damaged ones after it, which going on from it makes anew.
    """

    folder: Path
    state: SavedState
    tensors: Mapping[str, Mapping[str, Tensor]]
    replaces: tuple[Path, ...] = ()


def read_state(folder: Path) -> SavedState:
    """Read `state.json` alone.

    Raises:
        DamagedCheckpointError: it is missing or not whole.
    """
    try:
        state = SavedState.model_validate(json.loads((folder / STATE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DamagedCheckpointError(f"expected {STATE} in {folder}, got none") from None
    except OSError as error:
        raise DamagedCheckpointError(f"expected {STATE} in {folder}, got {error.strerror}") from None
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        got = f"a wrong {place}" if place else "no JSON object"
        raise DamagedCheckpointError(f"expected a whole {folder / STATE}, got {got}") from None
    except (ValueError, RecursionError):
        raise DamagedCheckpointError(f"expected a whole {folder / STATE}, got no JSON") from None
    if state.own_checksum not in (None, state.checksum()):
        raise DamagedCheckpointError(f"expected a whole {folder / STATE}, got one that is damaged")
    return state


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read all of a checkpoint, so that nothing is changed by one that is not whole.

    Raises:
        DamagedCheckpointError: a file is missing or not whole.
    """
    state, tensors = read_state(folder), {}
    for name in (MODEL, TRAINING):
        file = folder / name
        try:
            intact = _checksum(file) == state.checksums.get(name)
            tensors[name] = load_file(file) if intact else {}
        except FileNotFoundError:
            raise DamagedCheckpointError(f"expected {name} in {folder}, got none") from None
        except (OSError, SafetensorError) as error:
            raise DamagedCheckpointError(f"expected a whole {file}, got {error}") from None
        if not intact:
            raise DamagedCheckpointError(f"expected a whole {file}, got one that is damaged")
    return Checkpoint(folder, state, tensors)


def _checksum(file: Path) -> int:
    crc = 0
    with open(file, "rb") as opened:
        while block := opened.read(2**20):
            crc = zlib.crc32(block, crc)
    return crc


class Collected(NamedTuple):
    """What a checkpoint has of weights, moments and average: tensors by name, and the optimizers' rest."""

    model: dict[str, Tensor]
    training: dict[str, Tensor]
    optimizers: list[dict[str, Any]]


class TrainingState:
    """What a checkpoint is made of.

    Args:
        model: the module that is trained.
        optimizers: of its parameters.
        schedulers: of their learning rates.
        ema: the average of its parameters.
        scaler: of the losses under fp16, or None.
        data: of the run, see `SavedState`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Any],
        schedulers: Sequence[Any],
        ema: EMAModel,
        scaler: Any = None,
        data: str | None = None,
    ):
        self.model, self.optimizers, self.schedulers = model, optimizers, schedulers
        self.ema, self.scaler, self.data = ema, scaler, data

    @torch.no_grad()
    def not_finite(self) -> list[str]:
        """Names of trained parameters that are not finite, as far as this process has them."""
        trained = {name: local(p) for name, p in self.model.named_parameters() if p.requires_grad}
        finite = torch.stack([p.isfinite().all() for p in trained.values()]).tolist()  # waits once
        return [name for name, good in zip(trained, finite, strict=True) if not good]

    def collect(self) -> "Collected":
        """What a checkpoint has of weights, moments and average; of sharded ones every process takes part."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        tensors = dict(self._optimizer_tensors(optimizers))
        tensors |= {f"ema.{n}": tensor for n, tensor in enumerate(self.ema.shadow_params)}
        return Collected(
            {name: whole(tensor) for name, tensor in _tensors_of(self.model).items()},
            {name: whole(tensor) for name, tensor in tensors.items()},
            [_without_tensors(one) for one in optimizers],
        )

    def save(
        self,
        folder: Path,
        run: str,
        step: int,
        config: dict[str, Any],
        collected: "Collected | None" = None,
    ) -> None:
        """Write a checkpoint into an empty folder.

        Args:
            folder: it exists.
            run: the identity of the run.
            step: how many steps were taken.
            config: of the run, as JSON has it.
            collected: what `collect` gave, where several processes had to take part.

        Raises:
            OSError: the files cannot be written.
        """
        model, tensors, optimizers = collected or self.collect()
        _, keys, *position = cast(tuple[Any, ...], np.random.get_state())
        tensors |= {"random.torch": torch.get_rng_state()}
        tensors |= {"random.numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
        if torch.cuda.is_available():
            tensors |= {f"random.cuda.{n}": one for n, one in enumerate(torch.cuda.get_rng_state_all())}
        save_tensors(folder / MODEL, model)
        save_tensors(folder / TRAINING, tensors)
        version, python, gauss = random.getstate()
        state = SavedState(
            run=run,
            step=step,
            config=config,
            optimizers=optimizers,
            schedulers=[_plain(scheduler.state_dict()) for scheduler in self.schedulers],
            ema_steps=self.ema.optimization_step,
            scaler=None if self.scaler is None else dict(self.scaler.state_dict()),
            random={"python": [version, list(python), gauss], "numpy": position},
            checksums={name: _checksum(folder / name) for name in (MODEL, TRAINING)},
            data=self.data,
        )
        state.own_checksum = state.checksum()
        (folder / STATE).write_text(json.dumps(state.model_dump(), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def _optimizer_tensors(optimizers: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Tensor]]:
        for n, optimizer in enumerate(optimizers):
            for index, state in optimizer["state"].items():
                for name, value in _flat(state):
                    yield f"optimizer.{n}.{index}.{name}", value

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint.

        Raises:
            RecipeError: it is of a model or optimizers of other shapes; nothing is changed then.
        """
        state, training = checkpoint.state, checkpoint.tensors[TRAINING]
        model, averages = _tensors_of(self.model), dict(enumerate(self.ema.shadow_params))
        saved = {int(key[4:]): tensor for key, tensor in training.items() if key.startswith("ema.")}
        _check_fits(checkpoint, "the model", model, checkpoint.tensors[MODEL])
        _check_fits(checkpoint, "the average", averages, saved)
        counts = [len(state.optimizers), len(state.schedulers)]
        if counts != [len(self.optimizers), len(self.schedulers)]:
            raise RecipeError(
                f"expected {len(self.optimizers)} optimizers in {checkpoint.folder}, got {counts[0]}"
            )
        groups = [one["param_groups"] for one in state.optimizers]
        for optimizer, theirs in zip(self.optimizers, groups, strict=True):
            sizes = [len(group["params"]) for group in optimizer.param_groups]
            if (got := [len(group["params"]) for group in theirs]) != sizes:
                raise RecipeError(
                    f"expected an optimizer of {sizes} parameters in {checkpoint.folder}, got {got}"
                )
        for name, tensor in model.items():
            put(tensor, checkpoint.tensors[MODEL][name])
        for n, average in averages.items():
            put(average, saved[n])
        self.ema.optimization_step = state.ema_steps
        for n, optimizer in enumerate(self.optimizers):
            self._load_optimizer(n, optimizer, state.optimizers[n], training)
        for scheduler, values in zip(self.schedulers, state.schedulers, strict=True):
            scheduler.load_state_dict({**values, "lr_lambdas": [None] * len(values["base_lrs"])})
        if self.scaler is not None and state.scaler is not None:
            self.scaler.load_state_dict(state.scaler)
        self._load_random(state.random, training)

    def _load_optimizer(
        self, n: int, optimizer: Any, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        states: dict[int, dict[str, Any]] = {int(index): dict(one) for index, one in saved["state"].items()}
        for key, tensor in tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "optimizer":
                number, index, name = rest.split(".", 2)
                if int(number) == n:
                    *inside, last = name.split("/")
                    state = states.setdefault(int(index), {})
                    for group in inside:
                        state = state.setdefault(group, {})
                    state[last] = tensor
        groups = [
            {
                key: tuple(value) if isinstance(mine.get(key), tuple) else value
                for key, value in theirs.items()
            }
            for mine, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True)
        ]
        optimizer.load_state_dict({"state": dict(sorted(states.items())), "param_groups": groups})
        # Loading lays moments out anew; where a layout differs from its parameter's, sums round differently.
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    state[name] = put(torch.empty_like(parameter, dtype=value.dtype), value)
                elif torch.is_tensor(value):
                    state[name] = value.clone()  # else a count of steps keeps the whole file in memory

    @staticmethod
    def _load_random(saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        version, python, gauss = saved["python"]
        random.setstate((version, tuple(python), gauss))
        keys = tensors["random.numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, *saved["numpy"]))
        torch.set_rng_state(tensors["random.torch"])
        for n in range(torch.cuda.device_count()):
            if (one := tensors.get(f"random.cuda.{n}")) is not None:
                torch.cuda.set_rng_state(one, n)


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's own tensors by name, one that has several names once."""
    named: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        named.setdefault(id(tensor), (name, tensor))
    return {name: tensor.detach() for name, tensor in named.values()}


def _check_fits(
    checkpoint: Checkpoint, what: str, mine: Mapping[Any, Tensor], saved: Mapping[Any, Tensor]
) -> None:
    for name in [*mine, *(name for name in saved if name not in mine)]:
        wanted, got = (
            f"{list(one[name].shape)}" if name in one else "no such tensor" for one in (mine, saved)
        )
        if wanted != got:
            raise RecipeError(f"expected {what}'s {name} to be {wanted} in {checkpoint.folder}, got {got}")


def _flat(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """An optimizer's tensors, also those in dictionaries, such as bitsandbytes has: "group/name"."""
    for name, value in state.items():
        if torch.is_tensor(value):
            yield name, value
        elif isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", tensor) for inner, tensor in _flat(value))


def _without_tensors(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state without its tensors, which are in a file of their own."""
    states = {
        str(index): {
            name: value
            for name, value in state.items()
            if not torch.is_tensor(value) and not isinstance(value, Mapping)
        }
        for index, state in optimizer["state"].items()
    }
    return {"state": states, "param_groups": [_plain(group) for group in optimizer["param_groups"]]}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can say of a state: without functions, which are made anew."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if name != "lr_lambdas"
    }
