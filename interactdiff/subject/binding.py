"""DreamTuner attached: from the subjects of a scene to what its sites read in each denoiser call."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interactdiff.adapter import Binding, Edit, EditedCall, Guidance, Host
from interactdiff.calls import Call
from interactdiff.errors import AdapterError, SceneError
from interactdiff.scene_checks import Box, shown
from interactdiff.schedule import scheduled
from interactdiff.sites import known_family
from interactdiff.subject.active_scene import PlacedSubject, SubjectScene
from interactdiff.subject.adapter import SubjectAdapter
from interactdiff.subject.features import Features, moved
from interactdiff.subject.foreground import load_segmenter
from interactdiff.subject.guidance import GuidedStep, ReferenceGuidance
from interactdiff.subject.items import MAX_SUBJECTS, Subject, boxes_of, warn_unnamed
from interactdiff.subject.passes import AS_THE_PICTURE
from interactdiff.subject.place import place
from interactdiff.subject.runner import ReferenceRunner, Time, times_ahead
from interactdiff.subject.spec import SPEC
from interactdiff.subject.subject_sites import EncoderSite, KeySite


@dataclass
class Plan:
    """What is done in the call under way.

    Attributes:
        features: of subjects by number and sign.
        step: how it is guided.
    """

    features: dict[tuple[int, int], Features]
    step: GuidedStep


class SubjectBinding(Binding):
    """An attached `SubjectAdapter`: `handle["subject"]`.

    Attributes:
        settings: those of the method's spec, by name.
        runner: what runs the references; `runner.cache` keeps what they give.
    """

    adapter: SubjectAdapter
    scene: SubjectScene | None

    def __init__(self, adapter: SubjectAdapter, host: Host):
        super().__init__(adapter, host)
        self.settings = {setting.name: setting.default for setting in SPEC.settings}
        named = (f"{kind}{end}" for kind in ("tokenizer", "text_encoder") for end in ("", "_2", "_3"))
        loaded = ("vae", *named)
        self._component_names = [n for n in loaded if getattr(host.pipeline, n, None) is not None]
        self._keys = [KeySite(site) for site in host.sites_of("self", "joint", "single")]
        attentions = adapter.attentions
        self._encoders = [
            EncoderSite(site, *attentions[site.path]) for site in host.sites if site.path in attentions
        ]
        self.runner = ReferenceRunner(host, adapter, self._keys)
        self._reference_guidance = ReferenceGuidance(self.settings)
        self._guidance = Guidance(self._before, self._after)
        recorders = tuple(one.recorder for one in self._keys)
        self._encoder_edits = tuple(one.edit for one in self._encoders)
        self.edits = (
            self._guidance, *(one.edit for one in self._keys), *recorders, *self._encoder_edits,
        )  # fmt: skip
        self._recording = recorders, (*recorders, *self._encoder_edits)
        self._acting: dict[tuple[bool, bool, int], tuple[Edit, ...]] = {}
        self._plan: Plan | None = None
        self._pass_weight = 0.0  # of the encoder, in a pass over a reference
        self._given: tuple[Tensor, tuple[tuple[Box, ...], ...], tuple[float, ...]] | None = None
        self._autocast: torch.dtype | None = None

    def configure(
        self,
        *,
        segmenter: str | None = None,
        masked: bool | None = None,
        cache_bytes: float | None = None,
        cache_device: str | torch.device | None = None,
        rows_at_once: int | None = None,
        **settings: float,
    ) -> None:
        """Change how subjects act from the next call on; what is None stays.

        Args:
            segmenter: a model of transformers for image segmentation, folder or Hub id, for pictures without
                a mask, an alpha channel or a white background.
            masked: whether attention sees the foreground of references alone, or the whole of them.
            cache_bytes: limit of what is kept of references, 2e9 at first.
            cache_device: where it is kept, such as "cpu"; the denoiser's device at first.
            rows_at_once: times of one pass over a reference, 8 at first.
            **settings: those of the method: `encoder_weight`, `encoder_guidance`, `reference_weight`,
                `attention_without_box`, `guidance`, `guidance_share`, `time_gap`, `layers`, `schedule`,
                `extra_row`, `fresh_noise`, `position_shift`, `position_scale` (docs/subject.md).

        Raises:
            SceneError: there is no such setting, or its value is out of range.
            AdapterError: there is no such segmentation model, or positions cannot be shifted in this base.
        """
        known = {setting.name: setting for setting in SPEC.settings}
        checked = {}
        for name, value in settings.items():
            if name not in known:
                raise SceneError(f"subject: expected settings of {', '.join(known)}, got {shown(name)}")
            checked[name] = known[name].checked(value)
        if checked.get("position_shift") and known_family(self.host.denoiser).name != "Flux":
            kind = type(self.host.denoiser).__name__
            raise AdapterError(f"position_shift: expected 0 for {kind}, whose positions cannot be shifted")
        if segmenter is not None:
            self.runner.segmenter = load_segmenter(segmenter)
        if masked is not None:
            self.runner.masked = masked
        if rows_at_once is not None:
            self.runner.rows_at_once = max(int(rows_at_once), 1)
        if cache_bytes is not None or cache_device is not None:
            self.runner.cache.clear()
            cache = self.runner.cache
            cache.limit = cache.limit if cache_bytes is None else cache_bytes
            cache.device = cache.device if cache_device is None else torch.device(cache_device)
        self.settings |= checked

    def encode(
        self,
        items: Sequence[Sequence[Subject]],
        seed: int = 0,
        prompt: str | Sequence[str] | None = None,
        all_items: Sequence[Sequence[Any]] | None = None,
    ) -> SubjectScene | None:
        """Encode the references of a scene, once: latents, foreground, text, tokens.

        Args:
            items: for every image, or one sequence for each prompt of the batch.
            seed: of the draws of reference guidance.
            prompt: of the pictures, or one for each; subjects that it does not name get a warning.
            all_items: with interactions, whose boxes place subjects of the same phrases.

        Raises:
            SceneError: too many subjects, or nothing is left of one in its picture.
            AdapterError: there is no pipeline to encode pictures and texts with.
        """
        if not any(one.strength for subjects in items for one in subjects):
            return None
        for subjects in items:
            if len(subjects) > MAX_SUBJECTS:
                raise SceneError(f"subjects: expected at most {MAX_SUBJECTS}, got {len(subjects)}")
        self.runner.passes()
        if lost := [name for name, one in self.components().items() if one is None]:
            raise AdapterError(
                f"expected the pipeline with what it had when subjects were attached, got it without its "
                f"{' and '.join(lost)}: set subjects before taking them out"
            )
        self.follow(self.runner.passes().device)
        warn_unnamed(items, prompt)
        everything = items if all_items is None else all_items
        placed: dict[Any, tuple[int, PlacedSubject]] = {}
        prompts = []
        for n, subjects in enumerate(items):
            numbers = []
            for one in subjects:
                boxes = boxes_of(one, everything[n if len(everything) > 1 else 0])
                if (one, boxes) not in placed:
                    made = PlacedSubject(self.runner.reference_of(one), boxes, one.strength)
                    placed[one, boxes] = len(placed), made
                numbers.append(placed[one, boxes][0])
            prompts.append(tuple(numbers))
        references = tuple(subject for _, subject in placed.values())
        for one in references:
            if one.reference.how.startswith("nothing"):
                warnings.warn(
                    f"subject {shown(one.reference.subject.phrase)}: its whole picture is taken, background "
                    "and all: give a mask, an alpha channel, a white background or a segmenter",
                    stacklevel=2,
                )
        scene = SubjectScene(references, tuple(prompts), seed)
        if self.settings["guidance"] > 0 and not self._is_attended(scene):
            warnings.warn(
                "expected self-subject attention for reference guidance, got none: set reference_weight over "
                "0, and boxes for subjects or attention_without_box to 1; guidance does nothing here",
                stacklevel=2,
            )
        return scene

    def set_tokens(
        self, tokens: Tensor, boxes: Sequence[Sequence[Box]] = ((),), weights: Sequence[float] = (1.0,)
    ) -> None:
        """Give the encoder's tokens themselves, as training does: gradients flow to them and to what acts.

        Self-subject attention takes no part. Call `backward` before giving others: gradient checkpointing
        runs the blocks again.

        Args:
            tokens: [B, M, token_dim], of a subject for each row of the denoiser's batch, or of one for all.
            boxes: where each row's subject is; none of them is everywhere.
            weights: beta of each row; 0 where it sees none.

        Raises:
            AdapterError: the adapter has no encoder.
            SceneError: there are boxes or weights for another number of rows.
        """
        if not self._encoders:
            raise AdapterError("expected a subject adapter with an encoder for tokens, got one without")
        if not len(tokens) == len(boxes) == len(weights):
            raise SceneError(
                f"expected boxes and weights for {len(tokens)} rows, got {len(boxes)} and {len(weights)}"
            )
        self.use(None)
        self._given = tokens, tuple(map(tuple, boxes)), tuple(weights)

    def components(self) -> Mapping[str, Any]:
        """What references and their prompts are encoded with."""
        return {name: getattr(self.host.pipeline, name, None) for name in self._component_names}

    def use(self, encoded: SubjectScene | None) -> None:
        """Act by a scene from the next call on."""
        self.clear()
        self.scene = encoded

    def clear(self) -> None:
        """Forget the scene; what is kept of its references stays for the next one."""
        self.scene = self._plan = self._given = None
        self._reference_guidance.forget()
        for one in self._keys:
            one.blocks = ()
        for site in self._encoders:
            site.forget()

    def prepare(self, call: Call) -> Collection[Edit]:
        """Lay out the call's keys and the encoder's results at every site."""
        if self._autocast != call.autocast:  # keys and values are made in it
            self._autocast = call.autocast
            for site in self._encoders:
                site.forget()
        if call.is_pass:
            return self._prepare_pass(call)
        if self._given is not None:
            return self._prepare_given(call, *self._given)
        plan, scene = self._plan, self.scene
        if plan is None or scene is None or plan.step.returns:
            return ()
        self.follow(call.device)
        rows = scene.rows(call, plan.step.gap, plan.step.blind)
        acting = self._acting_keys() if plan.features else []
        for one in acting:
            one.blocks = scene.key_blocks(
                one.site, call, rows, plan.features, self.settings["reference_weight"]
            )
        encoder = False
        if self._encoders and self.settings["encoder_weight"]:
            weight, guided = self.settings["encoder_weight"], self.settings["encoder_guidance"]
            for site in self._encoders:
                grid = site.site.grid(*call.grid)
                shares = scene.encoder_shares(rows, grid, weight, guided, call.device)
                tokens = {n: scene.subjects[n].reference.tokens for n in shares}
                site.prepare(tokens, [self._cast(share) for share in shares.values()])  # type: ignore[arg-type]
                encoder = encoder or bool(shares)
        which = bool(acting), encoder, len(acting)
        if which not in self._acting:
            keys = tuple(one.edit for one in acting)
            self._acting[which] = keys + (self._encoder_edits if encoder else ())
        return self._acting[which]

    def describe(self) -> str:
        """Which subjects there are, and what found their foregrounds."""
        if self.scene is None:
            return ""
        words = [f"{one.reference.subject.phrase} by {one.reference.how}" for one in self.scene.subjects]
        return ", ".join(words)

    # --- a call ---

    def _before(self, call: Call) -> EditedCall | None:
        """Run what references the call needs, before anything is laid out for it; choose how it is guided."""
        self._plan, scene = None, self.scene
        if scene is None:
            return None
        share = self.settings["schedule"]
        if share < 1 and (not share or (call.step and not scheduled(*call.step, (share, 0.0, 1 - share)))):
            return None
        acts = self._is_attended(scene)
        step, edited, features = GuidedStep(), None, {}
        if acts and self.settings["guidance"] > 0:
            self._check_guided(scene)
            step, edited = self._reference_guidance.step(call, scene.seed)
        if acts and not step.returns:
            features = self._features(call, scene, step.gap, edited)
        self._plan = Plan(features, step)
        return edited

    def _is_attended(self, scene: SubjectScene) -> bool:
        """Whether any reference is seen by self-subject attention."""
        return self.settings["reference_weight"] > 0 and bool(self._acting_keys() and self._attended(scene))

    def _attended(self, scene: SubjectScene) -> set[int]:
        """The subjects whose references are seen by self-subject attention."""
        seen = {n for prompt in scene.prompts for n in prompt if scene.subjects[n].strength}
        everywhere = self.settings["attention_without_box"]
        return {n for n in seen if everywhere or scene.subjects[n].boxes}

    def _check_guided(self, scene: SubjectScene) -> None:
        """Refuse batches of which a prompt would lose its negative prompt, and see nothing for it."""
        attended = self._attended(scene)
        if without := [n for n, own in enumerate(scene.prompts, 1) if not attended & set(own)]:
            raise AdapterError(
                "expected subjects that are seen in every prompt of a batch for reference guidance, got none "
                f"in prompt {without[0]}: draw it in a batch of its own, or set guidance to 0"
            )

    def _features(
        self, call: Call, scene: SubjectScene, gap: bool, edited: EditedCall | None
    ) -> dict[tuple[int, int], Features]:
        """Of all references that the call's rows see."""
        parts = call.rows if edited is None else edited.rows or ()
        signs = (0,)
        if gap:
            signs = tuple(sorted({1 if part == "unconditional" else -1 for part in parts}))
        apart = float(self.settings["time_gap"]) if gap else 0.0
        time, passes = call.timestep, self.runner.passes()
        fresh = None
        if self.settings["fresh_noise"]:
            step = int(time) if call.step is None else call.step[0]
            fresh = (scene.seed * 1000003 + step + 1) % 2**63  # 0 is that of the reference's own noise
        found: dict[tuple[int, int], Features] = {}
        later = times_ahead(call)
        guided = (
            self._reference_guidance.by_reference(call, scene.seed, n) for n in range(1, len(later) + 1)
        )
        ahead = [t for time, by in zip(later, guided, strict=True) for t in _signed(time, gap, by)]
        if call.step is None or call.step[0] == 0:
            self.runner.cache.begin()
        for number in sorted(self._attended(scene)):
            subject = scene.subjects[number]
            self._pass_weight = self.settings["encoder_weight"] * subject.strength * bool(self._encoders)
            positions = AS_THE_PICTURE
            if passes.positioned:
                beside, fitted = (self.settings[f"position_{name}"] for name in ("shift", "scale"))
                positions = subject.positions(call.grid, beside, fitted)
            now = [(time, sign) for sign in signs]
            made = self.runner.features(
                call, subject.reference, now, ahead, apart, self._pass_weight, fresh, positions
            )
            for sign, features in zip(signs, made, strict=True):
                found[number, sign] = moved(features, call.device)
        return found

    def _after(self, call: Call, prediction: Tensor) -> Tensor | None:
        """What the caller gets of a step that is guided by the reference: the same in both halves."""
        return (
            None
            if self._plan is None
            else self._reference_guidance.returned(call, self._plan.step, prediction)
        )

    def _prepare_pass(self, call: Call) -> Collection[Edit]:
        """In a pass over a reference: keep its keys, and let it attend to its own tokens."""
        reference = self.runner.reference
        if reference is None:
            return ()
        weight = self._pass_weight
        if not weight:
            return self._recording[0]
        assert reference.tokens is not None
        share = self._cast(torch.full((1, 1, 1), weight, device=call.device))
        for site in self._encoders:
            site.prepare({-1: reference.tokens}, [share])
        return self._recording[1]

    def _prepare_given(
        self,
        call: Call,
        tokens: Tensor,
        boxes: tuple[tuple[Box, ...], ...],
        weights: tuple[float, ...],
    ) -> Collection[Edit]:
        if len(tokens) not in (1, call.batch):
            raise SceneError(f"expected tokens for {call.batch} batch rows, got {len(tokens)}")
        self.follow(call.device)
        for site in self._encoders:
            grid = site.site.grid(*call.grid)
            share = torch.stack([place(one, grid) * by for one, by in zip(boxes, weights, strict=True)])
            site.give(tokens, self._cast(share[..., None].to(call.device)))
        return self._encoder_edits

    def _acting_keys(self) -> list[KeySite]:
        """Attentions that see references: a share of all, those with the widest tokens first."""
        count = round(self.settings["layers"] * len(self._keys))
        order = sorted(range(len(self._keys)), key=lambda n: (-self._keys[n].site.dim, n))
        chosen = set(order[:count])
        return [one for n, one in enumerate(self._keys) if n in chosen]

    def _cast(self, share: Tensor) -> Tensor:
        return share.to(next(self.adapter.parameters()).dtype)


def _signed(time: float, gap: bool, by_reference: bool) -> list[Time]:
    """A time that a run will come to, once for each amount of noise that its references will have then."""
    signs = (0,) if not gap else (-1,) if by_reference else (-1, 1)
    return [(time, sign) for sign in signs]
