"""What a checkpoint has: numbers that are finite, random states, a state that can be read."""

import gc
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipes import four_steps, names, resume

from interactdiff.cli import main
from interactdiff.errors import DamagedCheckpointError, RecipeError
from interactdiff.training.checkpoints import MODEL, STATE, Checkpoint, read_checkpoint, read_state
from interactdiff.training.run import load_config, make_recipe
from interactdiff.training.vae import VaeRecipe


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the renders of all tests are kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def file(tmp_path: Path, cache: Path) -> str:
    return four_steps(tmp_path, cache)


def nan_from(recipe: Any, step: int, monkeypatch: pytest.MonkeyPatch, gradient: bool) -> None:
    """Make the loss of a step and all later ones nan; or its gradient alone, at a finite loss."""
    own = recipe.loss

    def loss(batch: Any, generator: Any) -> torch.Tensor:
        value = own(batch, generator)
        if recipe.step + 1 < step:
            return value
        root = next(p for p in recipe.model.parameters() if p.requires_grad)
        return value + (root.sum() * 0).sqrt() if gradient else value * math.nan  # d sqrt(0) is not finite

    monkeypatch.setattr(recipe, "loss", loss)


@pytest.mark.parametrize("gradient", [False, True])
def test_nothing_that_is_not_finite_is_kept(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gradient: bool
) -> None:
    """Seen before the next checkpoint is written, however seldom the loss is logged."""
    often = ["log_every=50", "steps=20", "checkpoint_every=2", "checkpoints_total_limit=1"]
    recipe = make_recipe(load_config(file, often))
    nan_from(recipe, 4, monkeypatch, gradient)
    said = "expected finite weights after step 4" if gradient else "expected a finite loss, got nan in step 4"
    with pytest.raises(RecipeError, match=said):
        recipe.train()
    assert names(tmp_path / "r") == ["checkpoint-2"]
    kept = read_checkpoint(tmp_path / "r/checkpoint-2")
    assert all(tensor.isfinite().all() for tensor in kept.tensors[MODEL].values())
    assert not (tmp_path / "made").exists()


def test_losses_are_read_off_the_device_as_they_are_logged(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are those of the steps, bit for bit."""
    recipe = make_recipe(load_config(file, ["steps=7", "log_every=2", "checkpoint_every=3"]))
    own, made = recipe.loss, []
    monkeypatch.setattr(recipe, "loss", lambda *given: made.append(own(*given)) or made[-1])
    most, read = [], recipe._read

    def reading(unread: list[torch.Tensor]) -> list[float]:
        most.append(len(unread))
        return read(unread)

    monkeypatch.setattr(recipe, "_read", reading)
    assert recipe.train() == [loss.item() for loss in made]
    assert max(most) == 2
    logged = [json.loads(line) for line in (recipe.output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [2, 4, 6]
    assert logged[1]["loss"] == (made[2].item() + made[3].item()) / 2


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ("[]", "no JSON object"),
        ("3", "no JSON object"),
        ("[" * 100_000, "no JSON"),
        ('{"run": 3}', "a wrong run"),
        ("{", "no JSON"),
    ],
)
def test_a_state_that_is_none_is_damaged(tmp_path: Path, content: str, got: str) -> None:
    (tmp_path / STATE).write_text(content)
    with pytest.raises(DamagedCheckpointError, match=rf"expected a whole {tmp_path / STATE}, got {got}$"):
        read_state(tmp_path)


def test_random_states_are_part_of_a_checkpoint(file: str) -> None:
    recipe = make_recipe(load_config(file, ["steps=2"]))
    recipe.train()
    recipe.save_checkpoint()
    expected = torch.rand(3), random.random(), np.random.rand()
    again = make_recipe(load_config(file, []))
    resume(again)
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]


def test_a_checkpoint_is_let_go_once_it_is_restored(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", file, "--set", "steps=2"]) == 0
    held: list[str] = []

    def train(self: VaeRecipe, overwrite: bool) -> None:
        gc.collect()
        held.extend(
            line for line in Path("/proc/self/maps").read_text().splitlines() if "checkpoint-2" in line
        )
        held.extend(repr(one.folder) for one in gc.get_objects() if isinstance(one, Checkpoint))
        assert self.step == 2

    monkeypatch.setattr(VaeRecipe, "train", train)
    assert main(["train", file, "--resume_from_checkpoint", "latest"]) == 0
    assert not held
