"""Pictures with their colours inverted, a score of badges, and a recipe."""

from dataclasses import replace
from typing import Any

import numpy as np
from PIL import ImageOps

from interactdiff.badge.items import Badge  # type: ignore[import-not-found]
from interactdiff.method_specs import Cost, EvaluationOptions
from interactdiff.scene import Scene
from interactdiff.training.config import Count, Keys


class InvertedSampler:
    """Takes twice the steps, and inverts the colours."""

    def unsupported(self, pipeline: Any) -> str | None:
        """It takes any pipeline."""
        return None

    def cost(self, pipeline: Any, settings: dict[str, Any], scene: Scene) -> Cost:
        """Twice the steps."""
        return Cost(pipeline.size**2, 2 * scene.steps)

    def generate(self, pipeline: Any, settings: dict[str, Any], scene: Scene, on_step: Any) -> Any:
        """Invert what the pipeline draws with twice the steps."""
        return ImageOps.invert(pipeline.call_pipeline(replace(scene, steps=2 * scene.steps), on_step))


INVERTED = InvertedSampler()


class BadgeConfig(Keys):
    """The keys of the recipe."""

    recipe: str
    steps: Count


class BadgeRecipe:
    """Remembers its configuration."""

    config_type = BadgeConfig

    def __init__(self, config: BadgeConfig):
        self.config = config


def scores(pipeline: Any, options: EvaluationOptions) -> dict[str, float]:
    """How much more the inside of a badge changes than the outside, over seeds."""
    inside, outside = [], []
    for seed in range(options.seed, options.seed + options.scenes):
        scene = Scene("a person", seed=seed, steps=options.steps)
        badge = replace(scene, extra_items=(Badge("x", (0.0, 0.0, 0.5, 1.0)),))
        without, with_badge = (np.asarray(pipeline.generate(one), dtype=float) for one in (scene, badge))
        change = np.abs(with_badge - without)
        half = change.shape[1] // 2
        inside.append(change[:, :half].mean())
        outside.append(change[:, half:].mean())
    return {"inside": float(np.mean(inside)), "outside": float(np.mean(outside))}
