"""Starts a recipe from its YAML file."""

import math
from pathlib import Path
from typing import Any

import yaml

from interactdiff import registry
from interactdiff.training.recipe import Recipe, RecipeError

OWN_RECIPES = {  # of the embedded world; methods have theirs in the registry
    "text": "interactdiff.training.text:TextRecipe",
    "t5": "interactdiff.training.text:T5Recipe",
    "vae": "interactdiff.training.vae:VaeRecipe",
    "base": "interactdiff.training.base:BaseRecipe",
    "dit": "interactdiff.training.dit:DitRecipe",
    "detector": "interactdiff.training.detector:DetectorRecipe",
}


COUNTS = ("steps", "batch_size", "log_every", "checkpoint_every", "checkpoints_total_limit", "sample_every")
RATES = ("seed", "learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "ema_decay")


def recipes() -> dict[str, str]:
    """All recipes by the name that a YAML file gives, and the "module:class" of each."""
    return {**OWN_RECIPES, **registry.recipes()}


class Config(dict[str, Any]):
    """A recipe's keys and values; a key that the file lacks is refused in words."""

    def __missing__(self, key: str) -> Any:
        raise RecipeError(f"expected the key {key} in the recipe's file, got only {', '.join(self)}")


def load_config(path: str | Path, overrides: list[str]) -> dict[str, Any]:
    """Read a recipe's YAML file and lay `key=value` overrides over it (values are read as YAML).

    Raises:
        RecipeError: the file is not a mapping with a known `recipe`, or an override names an unknown key or
            is no YAML.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"expected {path} to be YAML in UTF-8, got other bytes") from None
    config = _parsed(str(path), text)
    if not isinstance(config, dict) or config.get("recipe") not in recipes():
        got = config.get("recipe") if isinstance(config, dict) else type(config).__name__
        raise RecipeError(f"expected {path} to name a recipe ({', '.join(recipes())}), got {got!r}")
    for pair in overrides:
        key, _, value = pair.partition("=")
        if key not in config:
            raise RecipeError(f"expected an override of a key in {path} ({', '.join(config)}), got {key!r}")
        config[key] = _parsed(f"the value of {key}", value)
    _check_numbers(config)
    return config


def _check_numbers(config: dict[str, Any]) -> None:
    """Refuse what would end in a traceback after the models are built."""
    for key in COUNTS:
        value = config.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RecipeError(f"{key}: expected a whole number from 1 up, got {value!r}")
    for key in RATES:
        value = config.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise RecipeError(f"{key}: expected a number from 0 up, got {value!r}")


def _parsed(what: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}, column {place.column + 1}" if place else ""
        raise RecipeError(f"expected {what} to be YAML, got a mistake{where}") from None


def make_recipe(config: dict[str, Any]) -> Recipe:
    """The recipe that a configuration names, built and ready to train."""
    return registry.load_attribute(recipes()[config["recipe"]])(Config(config))


def run(config_path: str | Path, overrides: list[str], resume: str | None) -> None:
    """Train by a recipe.

    Args:
        config_path: the YAML file.
        overrides: `key=value` pairs laid over it.
        resume: "latest", the path of a checkpoint, or None to start anew.
    """
    recipe = make_recipe(load_config(config_path, overrides))
    if resume is not None:
        recipe.resume(resume)
    recipe.train()
