"""Learns concepts from one photo: AttenCraft (arXiv 2405.17965) on accelerate, resumable after each step."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from interactdiff.concept.adapter import MASKS, ConceptAdapter
from interactdiff.concept.binding import ConceptBinding
from interactdiff.concept.checkpoints import hash_of, load_checkpoint, remove_checkpoint, save_checkpoint
from interactdiff.concept.config import METHOD
from interactdiff.concept.denoising import TRAIN_STEPS, Denoising
from interactdiff.concept.finding import Finder, default_size, known_info
from interactdiff.concept.losses import (
    SSIM_WINDOW,
    sampling_weights,
    structural_similarity,
)
from interactdiff.concept.masks import ConceptMasks, iou, make_masks
from interactdiff.concept.objective import SAMPLE_STEPS, Objective
from interactdiff.concept.options import LearnOptions
from interactdiff.concept.pictures import as_shown, side_by_side
from interactdiff.concept.sampling import chosen_concepts
from interactdiff.concept.scene_boxes import scene_boxes
from interactdiff.concept.words import Concept, ConceptError, as_concepts, joint_prompt, subset_prompt
from interactdiff.fingerprints import weights_digest
from interactdiff.handle import Handle, attach
from interactdiff.pipeline_calls import call_arguments
from interactdiff.scene import Scene
from interactdiff.scene_checks import Box

NAME = "learning"
REFRESH_RANGE = (50, 250)


@dataclass(frozen=True)
class StepReport:
    """What a step came to.

    Attributes:
        step: from 1 on.
        loss: all of it.
        denoising: of it, the denoising error.
        attention: of each concept that the step named, by its token, the attention loss.
        accepted: whether better masks were taken; None where none were looked for.
    """

    step: int
    loss: float
    denoising: float
    attention: dict[str, float]
    accepted: bool | None = None


OnStep = Callable[[StepReport], None]


def learn(
    pipeline: Any,
    image: Image.Image,
    concepts: Mapping[str, str] | Sequence[Concept],
    *,
    options: LearnOptions | None = None,
    prompt: str | None = None,
    boxes: Mapping[str, Box] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    scene: Scene | None = None,
    checkpoint: Path | None = None,
    on_masks: Callable[[ConceptMasks], None] | None = None,
    on_step: OnStep | None = None,
    **changes: Any,
) -> ConceptAdapter:
    """Learn concepts from one photo.

    Args:
        pipeline: from text, with a U-Net, Flux or SD3; it is what it was afterwards.
        image: the photo, of any mode; its orientation (EXIF) is applied.
        concepts: {token: word}, such as {"<hero>": "person", "<blob>": "ball"}.
        options: how they are learned; None for the defaults.
        prompt: with slots that the concepts fill, "{0} beside {1}"; None is "a photo of {0} and {1}".
        boxes: for some tokens a box, xyxy in [0, 1], outside which they are not.
        masks: for some tokens a mask [h, w] in [0, 1], in the place of what would be found.
        scene: what the photo shows; boxes of phrases that are a concept's word or token are that concept's,
            where `boxes` has none of it.
        checkpoint: folder in which training is kept, and from which it goes on; None for none.
        on_masks: called with the masks before training.
        on_step: called after each step; what it raises ends training and comes through.
        **changes: fields of `LearnOptions`, over those of `options`.

    Returns:
        The adapter in eval mode, not attached.

    Raises:
        ConceptError: what was given cannot be learned, before anything is trained.
        AdapterError: the pipeline is of no such family.
    """
    options = LearnOptions(**{**vars(options or LearnOptions()), **changes})
    with Learner(pipeline, image, concepts, options, prompt, checkpoint) as learner:
        if scene is not None:
            words = {concept.token: concept.word for concept in learner.concepts}
            boxes = {**scene_boxes(scene, words), **(boxes or {})}
        learner.find(boxes, masks)
        if on_masks is not None:
            on_masks(learner.masks)
        learner.train(on_step)
        return learner.adapter.eval()


class Learner:
    """One photo's concepts in training; a context manager that attaches and detaches.

    Attributes:
        adapter: what is trained, attached as "concept:learning".
        masks: once `find` has been called.
        step: how many steps are done.
    """

    masks: ConceptMasks

    def __init__(
        self,
        pipeline: Any,
        image: Image.Image,
        concepts: Mapping[str, str] | Sequence[Concept],
        options: LearnOptions,
        prompt: str | None = None,
        checkpoint: Path | None = None,
    ):
        self.options = options.suited(known_info(pipeline).learning)
        assert self.options.prefix is not None
        self._prefix = self.options.prefix
        self.pipeline, self.step = pipeline, 0
        self._is_whole = True  # False while an optimizer's step is under way
        self._folder, self._template = checkpoint, prompt
        self.concepts = as_concepts(concepts, options.vectors)
        self.names = [concept.token for concept in self.concepts]
        joint_prompt(prompt, self.names)
        self.denoising = Denoising.of(pipeline)
        side, image = options.size or default_size(pipeline), as_shown(image)
        self.photo, self._crop = self.denoising.sized(image, side), self.denoising.crop(image.size, side)
        self.adapter = ConceptAdapter.for_pipeline(
            pipeline,
            self.concepts,
            projections=options.projections,
            rank=options.rank,
            acts_on=options.acts_on,
            prompt=prompt,
        ).named(NAME)
        self._accelerator = Accelerator(device_placement=False)
        self._handle: Handle | None = None
        self._frozen: list[nn.Parameter] = []

    def __enter__(self) -> "Learner":
        """Attach, and freeze the base."""
        self._handle = attach(self.pipeline, self.adapter.train())
        try:
            parts = [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]
            self._frozen = [p for part in parts for p in part.parameters() if p.requires_grad]
            for parameter in self._frozen:
                parameter.requires_grad_(False)
            self.binding.detach_start = self.options.detach_start
            self.finder = Finder(
                self.denoising,
                self.binding,
                self.photo,
                self.names,
                self._template,
                self.options.looking,
                self._prefix,
            )
            self.objective = Objective(self.finder, self.options)
            self._make_optimizer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Detach; the pipeline is what it was."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []
        if self._handle is not None:
            self._handle.detach()
        self.adapter.name = METHOD

    @property
    def binding(self) -> ConceptBinding:
        """The adapter's attachment."""
        assert self._handle is not None
        return self._handle[f"concept:{NAME}"]

    def find(
        self, boxes: Mapping[str, Box] | None = None, given: Mapping[str, Tensor] | None = None
    ) -> ConceptMasks:
        """Find the concepts in the photo, or take up what a checkpoint has of them.

        Args:
            boxes: for some concepts a box, xyxy in [0, 1] of the whole photo.
            given: for some concepts a mask [h, w] of the whole photo.

        Raises:
            ConceptError: one is not found, or a box or mask is of no concept.
        """
        self._boxes = {name: self._crop.box(box) for name, box in (boxes or {}).items()}
        self._given = {name: self._crop.mask(mask) for name, mask in (given or {}).items()}
        self._run = {} if self._folder is None else self._agreed()
        if not self._resume():
            scores = self.finder.scores()
            if self.options.published_refresh and min(scores.shape[1:]) < SSIM_WINDOW:
                raise ConceptError(
                    f"expected maps of {SSIM_WINDOW} x {SSIM_WINDOW} or more for published_refresh, got "
                    f"{scores.shape[1]} x {scores.shape[2]}"
                )
            self._accept(self._looked(scores))
            if self.options.needs_masks:
                self.masks.check(self.finder.settings.minimum_area, self._given)
        return self.masks

    def train(self, on_step: OnStep | None = None) -> list[StepReport]:
        """Train to the end; what interrupts it leaves a checkpoint, and so does the end.

        An interruption within an optimizer's step leaves the last checkpoint.

        Returns:
            What each step came to, from where training went on.
        """
        reports = []
        options = self.options
        try:
            while self.step < options.steps:
                report = self._train_step()
                reports.append(report)
                every = options.checkpoint_every
                is_due = self.step == options.steps or (every and self.step % every == 0)
                if self._folder is not None and is_due:
                    self._keep()
                if on_step is not None:
                    on_step(report)
        except BaseException:
            if self._folder is not None and reports and self._is_whole:
                self._keep()
            raise
        return reports

    def _make_optimizer(self) -> None:
        tokens = list(self.adapter.concept_tokens.parameters())
        if self.options.freeze_last_token:
            last = self.adapter.concept_tokens[self.names[-1]]
            tokens = [p for p in tokens if all(p is not own for own in last.parameters())]
        own = {id(parameter) for parameter in self.adapter.concept_tokens.parameters()}
        changes = [p for p in self.adapter.parameters() if id(p) not in own]
        groups = [{"params": tokens, "lr": self.options.token_learning_rate, "weight_decay": 0.0}]
        if changes:
            decay = self.options.weight_decay
            groups.append({"params": changes, "lr": self.options.learning_rate, "weight_decay": decay})
        self._trained = [*tokens, *changes]
        self._optimizer: Any = self._accelerator.prepare(torch.optim.AdamW(groups))

    def forget(self) -> None:
        """Remove the checkpoint of a run that is over."""
        if self._folder is not None:
            remove_checkpoint(self._folder)

    @torch.no_grad()
    def samples(self, on_step: Callable[..., None] | None = None) -> Image.Image:
        """A row of pictures: the photo, each concept alone, and if there are several all together.

        Args:
            on_step: called after each denoising step; what it raises ends drawing and comes through.
        """

        def after_step(_: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                on_step(step)
            return tensors

        guidance = known_info(self.pipeline).guidance_scale
        panels = [(self.photo, "photo")]
        together = [self.names] if len(self.names) > 1 else []
        for names in (*([name] for name in self.names), *together):
            prompt = subset_prompt(names, self._prefix).text
            arguments = call_arguments(self.pipeline, prompt, None, guidance)
            drawn = self.pipeline(
                **arguments,
                width=self.photo.width,
                height=self.photo.height,
                num_inference_steps=SAMPLE_STEPS,
                callback_on_step_end=after_step,
                generator=torch.Generator().manual_seed(self.options.seed),
            ).images[0]
            panels.append((drawn, prompt))
        return side_by_side(panels)

    # --- a step ---

    def _train_step(self) -> StepReport:
        options, step = self.options, self.step
        accepted = self._refresh(step) if options.refresh_every and step else None
        rng = random.Random(options.seed * 1_000_003 + step)
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        chosen = chosen_concepts(
            len(self.names),
            rng,
            self._weights if options.sampling == "reweighted" else None,
            options.joint_share,
        )
        names = [self.names[n] for n in chosen]
        is_joint = len(chosen) == len(self.names) and self._template is not None
        prompt = self.finder.prompt if is_joint else subset_prompt(names, self._prefix)
        chosen = list(range(len(self.names))) if is_joint else chosen
        names = [self.names[n] for n in chosen]
        is_half = options.mixed_precision == "bf16"
        with torch.autocast(self.denoising.device.type, torch.bfloat16, enabled=is_half):
            denoising, maps, named_masks = self.objective.denoise(prompt, chosen, generator)
            attention = self.objective.attention(maps, named_masks)
            loss = denoising + options.attention_weight * attention.mean()
            if options.prior_pictures:
                loss = loss + options.prior_weight * self.objective.prior_error(step, generator)
        self._optimizer.zero_grad()
        self._accelerator.backward(loss)
        self._accelerator.clip_grad_norm_(self._trained, 1.0)
        self._is_whole = False
        self._optimizer.step()
        self.step += 1
        self._is_whole = True
        values = torch.cat([loss[None], denoising[None], attention]).tolist()
        return StepReport(
            self.step, values[0], values[1], dict(zip(names, values[2:], strict=False)), accepted
        )

    # --- masks ---

    def _looked(self, scores: Tensor) -> ConceptMasks:
        return make_masks(self.names, scores, self.finder.settings, self._boxes, self._given)

    def _accept(self, masks: ConceptMasks) -> None:
        self.masks = masks
        self.adapter.masks = masks.masks.to(torch.uint8)
        self.objective.take(masks, self._given)
        inside = [masks.scores[n][masks.masks[n]] for n in range(len(self.names))]
        outside = [masks.scores[n][~masks.masks[n]] for n in range(len(self.names))]
        ratios = [
            float(i.sum() / max(len(i), 1) / (o.sum() / max(len(o), 1)).clamp(min=1e-3))
            for i, o in zip(inside, outside, strict=True)
        ]
        self._weights = sampling_weights(ratios)

    def _refresh(self, step: int) -> bool | None:
        """Look again; take the new masks if each is close to the last one."""
        if step % self.options.refresh_every or len(self._given) == len(self.names):
            return None
        rng = random.Random(self.options.seed * 1_000_003 + step + 17)
        if self.options.published_refresh:
            scores = self.finder.scores([rng.randrange(TRAIN_STEPS)], step)
        else:
            count = len(self.options.looking.timesteps)
            scores = self.finder.scores([rng.randrange(*REFRESH_RANGE) for _ in range(count)], step)
        looked = self._looked(scores)
        if not self._are_close(looked.masks, self.masks.masks):
            return False
        self._accept(looked)
        return True

    def _are_close(self, new: Tensor, last: Tensor) -> bool:
        least = self.options.least_overlap
        if self.options.published_refresh:  # the background is not compared
            return all(
                float(structural_similarity(one, other)) >= least
                for one, other in zip(new[:-1], last[:-1], strict=True)
            )
        return bool((iou(new, last) >= least).all())

    # --- checkpoints ---

    def _keep(self) -> None:
        assert self._folder is not None
        tensors = {"scores": self.masks.scores, **self.adapter.state_dict()}
        save_checkpoint(self._folder, self.step, self._run, tensors, self._moments)

    def _resume(self) -> bool:
        """Take up a checkpoint, if there is one."""
        kept = None if self._folder is None else load_checkpoint(self._folder, self._run)
        if kept is None:
            return False
        scores, masks = kept.tensors.pop("scores"), kept.tensors.pop(MASKS)
        self.adapter.load_state_dict(kept.tensors, strict=False)
        for parameter, moments in zip(self._trained, kept.moments, strict=True):
            self._optimizer.state[parameter] = {
                name: value.to(parameter.device) if value.ndim else value for name, value in moments.items()
            }
        self._accept(ConceptMasks(tuple(self.names), scores, masks.bool()))
        self.step = kept.step
        return True

    @property
    def _moments(self) -> list[dict[str, Tensor]]:
        states = self._optimizer.state
        return [
            {name: torch.as_tensor(value) for name, value in states.get(parameter, {}).items()}
            for parameter in self._trained
        ]

    def _agreed(self) -> dict[str, Any]:
        """What a checkpoint has to agree in; steps may be added to."""
        options = asdict(self.options)
        for name in ("steps", "checkpoint_every", "sample_every"):
            del options[name]
        modules = (part for part in self.pipeline.components.values() if isinstance(part, nn.Module))
        values = {
            "model": " ".join(weights_digest(module) for module in modules),
            "concepts": [asdict(concept) for concept in self.concepts],
            "prompt": self._template,
            "photo": hash_of(self.photo.size, self.photo.tobytes()),
            "boxes": dict(sorted(self._boxes.items())),
            "masks": {
                name: hash_of(mask.shape, mask.float().cpu().numpy().tobytes())
                for name, mask in sorted(self._given.items())
            },
            "options": options,
        }
        return json.loads(json.dumps(values))
