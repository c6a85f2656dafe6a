"""What makes a stock pipeline take interactions as arguments of its call."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from diffusers import DiffusionPipeline

from interactdiff.errors import AdapterError
from interactdiff.handle import Handle, attach
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.pipeline_calls import repeatable
from interactdiff.pipelines.hub import CODE_OPTIONS, is_published_folder, load_hub_folder
from interactdiff.scene import Entity, Interaction, SceneError
from interactdiff.scene_checks import Schedule
from interactdiff.scene_forms import interactions_from_lists, interactions_from_text
from interactdiff.sites import denoiser_of
from interactdiff.subject.adapter import SubjectAdapter
from interactdiff.subject.items import Subject
from interactdiff.subject.spec import SPEC

if TYPE_CHECKING:
    from typing_extensions import Self

PUBLISHED = "interactdiffusion_"  # how the published pipeline's arguments begin
BOXES = ("subject_boxes", "object_boxes")


class InteractionMixin(DiffusionPipeline):
    """Goes before a stock pipeline among a class's bases, and adds arguments to its call.

    Attributes:
        stock: the stock pipeline; saved files name it.
        interaction: the handle of the attached adapter; None before `load_interaction_adapter`.
        subject: the handle of subjects; None before the first ones, or `load_subject_adapter`.
    """

    stock: ClassVar[type[DiffusionPipeline]]
    interaction: Handle | None = None
    subject: Handle | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter: InteractionAdapter | str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> "Self":
        """Load a stock pipeline's files and an adapter, or a published pipeline, which holds both.

        Args:
            pretrained_model_name_or_path: as in diffusers.
            adapter: an adapter, its file or folder, or its id on the Hugging Face Hub; a published pipeline's
                own if not given.
            **options: as in diffusers, but for those that would run code of the folder, such as
                `trust_remote_code`: they are ignored, since none is needed.

        Raises:
            AdapterError: the adapter cannot be loaded or is made for another base.
        """
        load = super().from_pretrained
        options = {name: value for name, value in options.items() if name not in CODE_OPTIONS}
        if is_published_folder(pretrained_model_name_or_path, **options):
            pipeline, published = load_hub_folder(load, pretrained_model_name_or_path, **options)
            adapter = published if adapter is None else adapter
        else:
            pipeline = load(pretrained_model_name_or_path, **options)
        if adapter is not None:
            pipeline.load_interaction_adapter(adapter)
        return pipeline

    def load_interaction_adapter(self, adapter: InteractionAdapter | str | os.PathLike[str]) -> None:
        """Attach an adapter, in place of the one that was attached.

        Args:
            adapter: an adapter, its file or folder, or its id on the Hugging Face Hub.

        Raises:
            AdapterError: it cannot be loaded or is made for another base.
        """
        if not isinstance(adapter, InteractionAdapter):
            unet, dtype = getattr(self, "unet", None), denoiser_of(self).dtype
            adapter = InteractionAdapter.from_pretrained(adapter, unet=unet, dtype=dtype)
        before = None if self.interaction is None else self.interaction["interaction"].adapter
        self.unload_interaction_adapter()
        try:
            self.interaction = attach(self, adapter)
        except Exception:  # another base; or no memory for it
            self.interaction = attach(self, before) if before is not None else None
            raise

    def unload_interaction_adapter(self) -> None:
        """Detach the adapter, if there is one."""
        if self.interaction is not None:
            self.interaction.detach()
        self.interaction = None

    def load_subject_adapter(self, adapter: SubjectAdapter | str | os.PathLike[str] | None = None) -> None:
        """Attach an adapter of subjects, in place of the one that was attached.

        Args:
            adapter: an adapter, its folder, or its id on the Hugging Face Hub; None is one without weights:
                self-subject attention alone, which `subjects=` also has by itself.

        Raises:
            AdapterError: it cannot be loaded or is made for another base.
        """
        if adapter is None:
            adapter = SubjectAdapter()
        elif not isinstance(adapter, SubjectAdapter):
            adapter = SubjectAdapter.from_pretrained(adapter, dtype=denoiser_of(self).dtype)
        adapter.check(denoiser_of(self))
        self.unload_subject_adapter()
        self.subject = attach(self, adapter)

    def unload_subject_adapter(self) -> None:
        """Detach the adapter of subjects, if there is one."""
        if self.subject is not None:
            self.subject.detach()
        self.subject = None

    def to_json_string(self) -> str:
        """`model_index.json`'s text: names the stock class, so that any diffusers reads what is saved."""
        stock = json.loads(super().to_json_string()) | {"_class_name": self.stock.__name__}
        return json.dumps(stock, indent=2, sort_keys=True) + "\n"

    def __call__(
        self,
        *args: Any,
        interactions: Sequence[Interaction | Entity] | Sequence[Sequence[Interaction | Entity]] = (),
        interaction_strength: float = 1.0,
        interaction_schedule: Schedule = 1.0,
        interaction_fast: bool = False,
        subjects: Sequence[Subject] | Sequence[Sequence[Subject]] = (),
        subject_settings: Mapping[str, float] | None = None,
        interactdiffusion_subject_phrases: Sequence[str] | None = None,
        interactdiffusion_action_phrases: Sequence[str | None] | None = None,
        interactdiffusion_object_phrases: Sequence[str] | None = None,
        interactdiffusion_subject_boxes: Sequence[Sequence[float]] | None = None,
        interactdiffusion_object_boxes: Sequence[Sequence[float]] | None = None,
        interactdiffusion_scheduled_sampling_beta: Schedule | None = None,
        interactdiffusion_text: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Draw.

        What happens where is said by `interactions`, or by the names that the published pipeline has for it:
        three lists of phrases and two of boxes, of equal length, which hold for every prompt. In place of the
        phrases there may be a text.

        Args:
            *args: as in the stock pipeline.
            interactions: who does what to what, and where, and what else is where: for every image, or one
                sequence for each prompt.
            interaction_strength: how strongly they act, in [0, 2].
            interaction_schedule: the share of the steps that they act in, from the first; or the shares
                [on, linear decay, off].
            interaction_fast: whether to reuse what was added at an earlier step: less exact, and most of the
                time that control takes is saved.
            subjects: these very persons and objects, from their pictures: for every image, or one sequence
                for each prompt. Those without a box are placed by interactions of the same phrase.
            subject_settings: of subjects, by name (docs/subject.md); the defaults where there are none.
            interactdiffusion_subject_phrases: who acts, in each interaction.
            interactdiffusion_action_phrases: what is done; None in it for boxes only.
            interactdiffusion_object_phrases: what it is done to.
            interactdiffusion_subject_boxes: where who acts is, xyxy in [0, 1].
            interactdiffusion_object_boxes: where what it is done to is, likewise.
            interactdiffusion_scheduled_sampling_beta: the published name of `interaction_schedule`.
            interactdiffusion_text: the form of the AUTOMATIC1111 extension, `subject=action=object;...`.
            **kwargs: as in the stock pipeline.

        Returns:
            What the stock pipeline returns.

        Raises:
            SceneError: the interactions cannot be drawn, or are said in two ways.
            AdapterError: there are interactions, and no adapter.
        """
        lists = {
            "subject_phrases": interactdiffusion_subject_phrases,
            "action_phrases": interactdiffusion_action_phrases,
            "object_phrases": interactdiffusion_object_phrases,
            "subject_boxes": interactdiffusion_subject_boxes,
            "object_boxes": interactdiffusion_object_boxes,
        }
        beta = interactdiffusion_scheduled_sampling_beta
        if beta is not None and interaction_schedule != 1:
            raise SceneError(f"expected interaction_schedule or {PUBLISHED}scheduled_sampling_beta, got both")
        published = {**lists, "text": interactdiffusion_text, "scheduled_sampling_beta": beta}
        _check_said_once(interactions, [name for name, value in published.items() if value is not None])
        scenes = interactions or _published_scene(lists, interactdiffusion_text)
        draw = cast(Any, super()).__call__
        if self.interaction is None and scenes:
            raise AdapterError("expected an adapter to be loaded for the interactions, got none")
        prompt = args[0] if args else kwargs.get("prompt")
        try:
            if self.interaction is not None:
                _check_count(scenes, prompt, kwargs.get("prompt_embeds"))
                schedule = interaction_schedule if beta is None else beta
                self.interaction.set_scene(scenes, interaction_strength, schedule, fast=interaction_fast)
            if subjects:
                embeds, noise = kwargs.get("prompt_embeds"), kwargs.get("generator")
                self._set_subjects(subjects, scenes, subject_settings or {}, prompt, embeds, noise)
            with repeatable(self, kwargs.get("generator")):
                return draw(*args, **kwargs)
        finally:
            for handle in (self.interaction, self.subject):
                if handle is not None:
                    handle.clear()

    def _set_subjects(
        self,
        subjects: Any,
        scenes: Any,
        settings: Mapping[str, float],
        prompt: Any,
        embeds: Any,
        generator: Any,
    ) -> None:
        """Take subjects, with what interactions say of their places, and a seed of the noise's generator."""
        if self.subject is None:
            self.load_subject_adapter()
        assert self.subject is not None
        own, other = _per_prompt(subjects), _per_prompt(scenes)
        _check_count(subjects, prompt, embeds, "subjects")
        count = max(len(own), len(other))
        own, other = ([some[n % len(some)] for n in range(count)] for some in (own, other))
        places = [[*some, *beside] for some, beside in zip(own, other, strict=True)]
        first = generator[0] if isinstance(generator, list) else generator
        options: dict[str, Any] = {"seed": 0 if first is None else first.initial_seed() % 2**63}
        options |= {} if prompt is None else {"prompt": prompt}
        defaults = {setting.name: setting.default for setting in SPEC.settings}
        self.subject["subject"].configure(**defaults | dict(settings))
        self.subject.set_scene(own, all_items=places, **options)


def _per_prompt(items: Any) -> list[list[Any]]:
    """One list of items for each prompt, or a single one for all."""
    nested = bool(items) and all(isinstance(one, Sequence) for one in items)
    return [list(one) for one in items] if nested else [list(items)]


def _check_said_once(interactions: Any, published: Sequence[str]) -> None:
    """Interactions in our words or in the published ones, phrases in lists or in a text."""
    if interactions and published:
        raise SceneError(
            f"expected interactions or published arguments, got interactions and {PUBLISHED}{published[0]}"
        )
    phrases = [name for name in published if name.endswith("phrases")]
    if phrases and "text" in published:
        raise SceneError(
            f"expected phrases in lists or in a text, got {PUBLISHED}{phrases[0]} and {PUBLISHED}text"
        )


def _published_scene(lists: Mapping[str, Any], text: str | None) -> tuple[Interaction, ...]:
    """One scene, of the published arguments."""
    needed = lists if text is None else {name: lists[name] for name in BOXES}
    missing = [name for name, value in needed.items() if value is None]
    if text is None and len(missing) == len(lists):
        return ()
    if missing:
        with_it = "text" if text is not None else next(name for name in lists if name not in missing)
        raise SceneError(f"expected {PUBLISHED}{missing[0]} along with {PUBLISHED}{with_it}, got none")
    return interactions_from_lists(**needed) if text is None else interactions_from_text(text, **needed)


def _check_count(items: Any, prompt: Any, prompt_embeds: Any, name: str = "interactions") -> None:
    """One list of items for all prompts, or one for each."""
    given = prompt if isinstance(prompt, list) else [prompt] if prompt_embeds is None else prompt_embeds
    each = isinstance(items, Sequence) and not all(
        isinstance(item, (Interaction, Entity, Subject)) for item in items
    )
    scenes = len(items) if each else 1
    if scenes not in (1, len(given)):
        raise SceneError(f"expected {name} for each of {len(given)} prompts, got {scenes} lists of them")
