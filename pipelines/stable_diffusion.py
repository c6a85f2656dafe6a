"""Stable Diffusion 1.x and 2.x that takes interactions."""

import json
import os
from collections.abc import Sequence
from typing import Any

from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

from interactdiff.attach import Handle, attach
from interactdiff.checkpoint import AdapterError
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.scene import Interaction, SceneError
from interactdiff.scene_checks import Schedule


class InteractionStableDiffusionPipeline(StableDiffusionPipeline):
    """`StableDiffusionPipeline` with three more arguments to its call; everything else is the stock pipeline.

    Attributes:
        interaction: the handle of the attached adapter; None before `load_interaction_adapter`.
    """

    interaction: Handle | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter: InteractionAdapter | str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> "InteractionStableDiffusionPipeline":
        """Load a stock pipeline's files, and an adapter.

        Args:
            pretrained_model_name_or_path: as in diffusers.
            adapter: an adapter, its folder, or its id on the Hugging Face Hub.
            **options: as in diffusers.

        Raises:
            AdapterError: the adapter cannot be loaded or is made for another base.
        """
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **options)
        if adapter is not None:
            pipeline.load_interaction_adapter(adapter)
        return pipeline

    def load_interaction_adapter(self, adapter: InteractionAdapter | str | os.PathLike[str]) -> None:
        """Attach an adapter, in place of the one that was attached.

        Args:
            adapter: an adapter, its folder, or its id on the Hugging Face Hub.

        Raises:
            AdapterError: it cannot be loaded or is made for another base.
        """
        if not isinstance(adapter, InteractionAdapter):
            adapter = InteractionAdapter.from_pretrained(adapter)
        before = self.interaction
        self.unload_interaction_adapter()
        try:
            self.interaction = attach(self, adapter)
        except AdapterError:
            self.interaction = attach(self, before.adapter) if before is not None else None
            raise

    def unload_interaction_adapter(self) -> None:
        """Detach the adapter, if there is one."""
        if self.interaction is not None:
            self.interaction.detach()
        self.interaction = None

    def to_json_string(self) -> str:
        """`model_index.json`'s text: names the stock class, so that any diffusers reads what is saved."""
        stock = json.loads(super().to_json_string()) | {"_class_name": StableDiffusionPipeline.__name__}
        return json.dumps(stock, indent=2, sort_keys=True) + "\n"

    def __call__(
        self,
        *args: Any,
        interactions: Sequence[Interaction] | Sequence[Sequence[Interaction]] = (),
        interaction_strength: float = 1.0,
        interaction_schedule: Schedule = 1.0,
        **kwargs: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, ...]:
        """Draw.

        Args:
            *args: as in `StableDiffusionPipeline`.
            interactions: who does what to what, and where: for every image, or one sequence for each prompt.
            interaction_strength: how strongly they act, in [0, 2].
            interaction_schedule: the share of the steps that they act in, from the first; or the shares
                [on, linear decay, off].
            **kwargs: as in `StableDiffusionPipeline`.

        Raises:
            SceneError: the interactions cannot be drawn.
            AdapterError: there are interactions, and no adapter.
        """
        if self.interaction is None:
            if interactions:
                raise AdapterError("expected an adapter to be loaded for the interactions, got none")
            return super().__call__(*args, **kwargs)
        prompts = args[0] if args else kwargs.get("prompt")
        self._check_count(interactions, prompts, kwargs.get("prompt_embeds"))
        self.interaction.set_scene(interactions, interaction_strength, interaction_schedule)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.interaction.clear()

    @staticmethod
    def _check_count(interactions: Sequence[Any], prompt: Any, prompt_embeds: Any) -> None:
        """One scene for all prompts, or one for each."""
        given = prompt if isinstance(prompt, list) else [prompt] if prompt_embeds is None else prompt_embeds
        scenes = 1 if all(isinstance(i, Interaction) for i in interactions) else len(interactions)
        if scenes not in (1, len(given)):
            raise SceneError(
                f"expected interactions for each of {len(given)} prompts, got {scenes} lists of them"
            )
