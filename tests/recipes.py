"""The packaged recipes, cut down to six tiny steps; shared by the tests."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from interactdiff.training.latent_reader import LatentReader
from interactdiff.training.recipe import Recipe
from interactdiff.training.run import load_config, make_recipe
from interactdiff.training.run_folder import checkpoints

CONFIGS = Path(__file__).parent.parent / "training" / "configs"
SHORT = {
    "renders": 12,
    "steps": 6,
    "batch_size": 2,
    "warmup_steps": 1,
    "log_every": 3,
    "checkpoint_every": 3,
    "sample_every": 6,
    "sample_steps": 2,
    "mixed_precision": "no",
    "compile": False,
}
VAE = {
    "latent_channels": 4,
    "encoder_block_out_channels": [8] * 4,
    "decoder_block_out_channels": [8] * 4,
    "num_encoder_blocks": [0, 0, 0, 1],
    "num_decoder_blocks": [1, 0, 0, 0],
    "scaling_factor": 1.0,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
}
SIZES = {96: {"renders": 12, "batch_size": 2, "share": 1.0}}


def short(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """The packaged configuration of a recipe, cut down to six tiny steps."""
    config = load_config(CONFIGS / f"{name}.yaml", [])
    cut = {**SHORT, "cache_dir": str(folder / "cache"), "output_dir": str(folder / name)}
    return config | {key: value for key, value in cut.items() if key in config} | changes


def tiny_reader(folder: Path) -> str:
    """The folder of a reader of `VAE`'s latents, for the perceptual loss."""
    path = folder / "reader"
    if not path.exists():
        torch.manual_seed(0)
        LatentReader(VAE["latent_channels"], (8, 8, 8)).save_pretrained(path)
    return str(path)


def four_steps(folder: Path, cache: Path) -> str:
    """The file of a recipe of four tiny steps, with a checkpoint every second."""
    config = short(folder, "stickworld_vae", model=VAE, renders=2, steps=4, checkpoint_every=2)
    config |= {
        "cache_dir": str(cache),
        "output_dir": str(folder / "r"),
        "export_to": str(folder / "made"),
    }
    config |= {"sample_every": 100, "log_every": 1, "optimizer": "adamw"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "recipe.yaml")


def names(folder: Path) -> list[str]:
    """The checkpoints in a run's folder."""
    return [found.name for found in checkpoints(folder)]


def state(recipe: Recipe) -> list[torch.Tensor]:
    """Every number that training carries from step to step."""
    states = [s for optimizer in recipe.optimizers for s in optimizer.state.values()]
    moments = [v for s in states for _, v in sorted(s.items()) if torch.is_tensor(v)]
    rate = torch.tensor([rate for s in recipe.schedulers for rate in (*s.get_last_lr(), recipe.step)])
    return [*recipe.model.state_dict().values(), *recipe.ema.shadow_params, *moments, rate]


def resume(recipe: Recipe, which: str = "latest") -> None:
    """Go on from a checkpoint, as the command line does."""
    checkpoint = recipe.folder.find(which, recipe.config)
    assert checkpoint is not None
    recipe.restore(checkpoint)


def check_that_a_resumed_run_is_the_unbroken_one(config: dict[str, Any]) -> Recipe:
    """Cut a run off after a step and resume it: the same numbers, and the same losses from there on."""
    unbroken = make_recipe(config | {"stop_after": 0.0})
    assert len(unbroken.train()) == 1
    resumed = make_recipe(config)
    resume(resumed)
    for one, other in zip(state(unbroken), state(resumed), strict=True):
        assert torch.equal(one, other)
    unbroken.config.stop_after = float("inf")
    losses = unbroken.train()
    assert len(losses) == 5
    # Two runs in one process differ as well: memory alignment moves sums in the last bit, and Adam turns the
    # gradient of a bias before a norm, which is nothing but such bits, into whole steps.
    assert resumed.train(overwrite=True) == pytest.approx(losses, rel=2e-3)
    return unbroken


def check_that_a_loss_counts_by_its_weight(config: dict[str, Any], folder: Path, weight_key: str) -> None:
    """While a base is trained, and not otherwise."""
    config = config | {"output_dir": str(folder / weight_key), "empty_caption": 0.0, "perceptual": 0.0}
    losses: list[float] = []
    outside: list[float] = []
    for weight in (0.0, 0.5, 2.0):
        torch.manual_seed(0)
        recipe = make_recipe(config | {weight_key: weight})
        recipe.model.train()
        batch = recipe.batch(0)
        assert ("regions" in batch) == (recipe.config.word_attention > 0)
        losses.append(recipe.loss(batch, recipe.generator(0)).item())
        recipe.model.eval()
        outside.append(recipe.loss(batch, recipe.generator(0)).item())
    assert outside == [outside[0]] * 3
    assert losses[0] < losses[1] < losses[2]
    assert losses[2] - losses[0] == pytest.approx(4 * (losses[1] - losses[0]), rel=1e-3)
