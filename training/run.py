"""Starts a recipe from its YAML file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from interactdiff import registry
from interactdiff.errors import RecipeError
from interactdiff.method_specs import load_attribute
from interactdiff.training.config import RecipeConfig, checked, nearest
from interactdiff.training.recipe import Recipe
from interactdiff.training.run_folder import RunFolder

OWN_RECIPES = {  # of the embedded world; methods have theirs in the registry
    "text": "interactdiff.training.text:TextRecipe",
    "t5": "interactdiff.training.text:T5Recipe",
    "vae": "interactdiff.training.vae:VaeRecipe",
    "latent_reader": "interactdiff.training.latent_reader:LatentReaderRecipe",
    "image_tower": "interactdiff.training.image_tower:ImageTowerRecipe",
    "base": "interactdiff.training.base:BaseRecipe",
    "dit": "interactdiff.training.dit:DitRecipe",
    "detector": "interactdiff.training.detector:DetectorRecipe",
}


def recipes() -> dict[str, str]:
    """All recipes by the name that a YAML file gives, and the "module:class" of each."""
    return {**OWN_RECIPES, **registry.recipes()}


def load_config(path: str | Path, overrides: list[str]) -> dict[str, Any]:
    """Read a recipe's YAML file and lay `key=value` overrides over it (values are read as YAML).

    Returns:
        What was given, checked and converted to the types of the recipe's `RecipeConfig`.

    Raises:
        RecipeError: the file is not a mapping with a known `recipe`, an override is no YAML, or a key or a
            value is none of the recipe's.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"expected {path} to be YAML in UTF-8, got other bytes") from None
    config = _parsed(str(path), text)
    if not isinstance(config, dict):
        raise RecipeError(f"expected {path} to name a recipe, got {type(config).__name__}")
    _check_recipe(config, path)
    for pair in overrides:
        key, _, value = pair.partition("=")
        config[key.strip()] = _parsed(f"the value of {key}", value)
    _check_recipe(config, path)
    return checked(recipe_class(config).config_type, config, str(path)).model_dump(exclude_unset=True)


def _check_recipe(config: dict[str, Any], path: object) -> None:
    if not isinstance(name := config.get("recipe"), str) or name not in recipes():
        known = ", ".join(recipes())
        raise RecipeError(
            f"expected {path} to name a recipe ({known}), got {name!r}{nearest(name, recipes())}"
        )


def _parsed(what: str, text: str) -> Any:
    try:
        _check_keys(what, yaml.compose(text, yaml.SafeLoader))
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}, column {place.column + 1}" if place else ""
        raise RecipeError(f"expected {what} to be YAML, got a mistake{where}") from None


def _check_keys(what: str, root: yaml.Node | None) -> None:
    """Refuse a key that is there twice, of which YAML would take the last."""
    nodes, known = [root], set[int]()
    while nodes:
        node = nodes.pop()
        if id(node) in known or not isinstance(node, yaml.CollectionNode):
            continue
        known.add(id(node))  # an alias may hold itself
        pairs = node.value if isinstance(node, yaml.MappingNode) else [(None, one) for one in node.value]
        keys = [key for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
        for n, key in enumerate(keys):
            if any((key.tag, key.value) == (other.tag, other.value) for other in keys[:n]):
                line = key.start_mark.line + 1
                raise RecipeError(f"expected each key once in {what}, got {key.value} again at line {line}")
        nodes += [value for _, value in pairs]


def _check_folder(key: str, path: str | None) -> None:
    """Refuse a path at which no folder can be made, to which diffusers would write nothing."""
    there = next((one for one in (Path(path), *Path(path).parents) if one.exists()), None) if path else None
    if there is not None and not there.is_dir():
        raise RecipeError(f"expected a folder as {key}, got the file {there}")


def recipe_class(config: Mapping[str, Any]) -> type[Any]:
    """The class of the recipe that a configuration names."""
    return load_attribute(recipes()[config["recipe"]])


def make_recipe(config: Mapping[str, Any]) -> Recipe[Any]:
    """The recipe that a configuration names, built and ready to train.

    Raises:
        RecipeError: a key or a value is none of the recipe's.
    """
    kind = recipe_class(config)
    return kind(checked(kind.config_type, config))


def plan(config_path: str | Path, overrides: list[str], card: float | None = None) -> str:
    """What memory a recipe takes, in words. Neither a model nor data are loaded.

    Args:
        config_path: the YAML file.
        overrides: `key=value` pairs laid over it.
        card: GB; None: this machine's, or else common ones.

    Raises:
        RecipeError: the recipe has no plan, or its base's configuration is not there.
    """
    values = load_config(config_path, overrides)
    if values["recipe"] != "interaction":
        raise RecipeError(f"--plan: expected the recipe interaction, got {values['recipe']}")
    from interactdiff.training.plan import described

    return described(checked(recipe_class(values).config_type, values), card)


def run(
    config_path: str | Path, overrides: list[str], resume: str | None = None, overwrite: bool = False
) -> None:
    """Train by a recipe. What can be refused without a model or data is refused before they are loaded.

    Args:
        config_path: the YAML file.
        overrides: `key=value` pairs laid over it.
        resume: "latest", the path of a checkpoint, or None to start anew.
        overwrite: whether to remove an older run's checkpoints, log and samples from the output folder, once
            the new run is about to begin; when resuming, the checkpoints after the one that it goes on from.

    Raises:
        RecipeError: in one sentence.
    """
    values = load_config(config_path, overrides)
    config: RecipeConfig = checked(recipe_class(values).config_type, values)
    for key in ("output_dir", "export_to", "cache_dir"):
        _check_folder(key, getattr(config, key, None))
    folder = RunFolder(config.output_dir)
    checkpoint = None if resume is None else folder.find(resume, config)
    if checkpoint is None and not overwrite:
        folder.check_unused()
    recipe = make_recipe(values)
    state = checkpoint and checkpoint.state
    found = f"step {state.step} of run {state.run}" if state else "none"
    recipe.processes.check_same(found, "one checkpoint in an output_dir that all processes share")
    if checkpoint is not None:
        recipe.restore(checkpoint)
    del checkpoint, state  # its tensors would stay in memory
    recipe.train(overwrite)
