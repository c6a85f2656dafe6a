"""Attaches an adapter to a denoiser, by hooks alone, and takes it off again.

A hook before the denoiser plans what this call needs (which step, which half of guidance); hooks at each site
let the adapter act (`interaction.unet`, `interaction.transformer`). Nothing else of the base is touched.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, cast, overload

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from interactdiff.checkpoint import AdapterError
from interactdiff.clear.adapter import ClearAdapter
from interactdiff.clear.handle import ClearHandle, attach_clear
from interactdiff.compiled import forget_compiled
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.interaction.call import SceneTable
from interactdiff.interaction.control import Control
from interactdiff.interaction.joint import SceneTokens
from interactdiff.interaction.maps import AttentionRecorder
from interactdiff.interaction.phrases import PhraseEncoder, pipeline_phrases
from interactdiff.interaction.tokens import Item, check_count, scene_phrases
from interactdiff.interaction.transformer import InTransformer
from interactdiff.interaction.unet import InUNet
from interactdiff.scene import MAX_STRENGTH, Entity, Interaction, SceneError
from interactdiff.scene_checks import Schedule, checked_number, checked_schedule, shown
from interactdiff.sites import Denoiser, denoiser_of


class Handle:
    """An attached adapter: says what to draw, and detaches. Made by `attach`; a context manager.

    Attributes:
        adapter: the attached adapter.
        denoiser: the U-Net or transformer that it acts in.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        adapter: InteractionAdapter,
        pipeline: Any = None,
        phrase_encoder: PhraseEncoder | None = None,
        given: object = None,
    ):
        self.denoiser, self.adapter = denoiser, adapter
        self._given = given  # to attach, maybe a compiled denoiser
        self._pipeline, self._phrase_encoder = pipeline, phrase_encoder
        self._control: Control | None = None
        if isinstance(denoiser, UNet2DConditionModel):
            self._place = InUNet(denoiser, adapter, pipeline)
        else:
            self._place = InTransformer(denoiser, adapter, pipeline)
        self._hooks = [denoiser.register_forward_pre_hook(self._before, with_kwargs=True)]
        for site in self._place.sites:
            site.hook()
        forget_compiled(denoiser, given)

    def set_scene(
        self,
        interactions: Sequence[Item] | Sequence[Sequence[Item]],
        strength: float = 1.0,
        schedule: Schedule = 1.0,
        *,
        fast: bool = False,
        num_inference_steps: int | None = None,
        guidance: bool | None = None,
    ) -> None:
        """Say who does what to what from now on. Phrases are encoded here, once.

        Args:
            interactions: interactions and entities for every image, or one sequence of them for each prompt
                of the batch; an image without any is drawn as the base draws it.
            strength: how strongly they act, in [0, 2].
            schedule: the share of the steps that they act in, from the first; or shares [on, linear decay,
                off].
            fast: reuse what the fusers added at an earlier step, see `schedule.refreshes`: less exact, and
                most of their time is saved.
            num_inference_steps: for a bare denoiser, whose schedule is otherwise not followed; a pipeline
                knows.
            guidance: whether batches are [unconditional half, conditional half]; None asks the pipeline, and
                takes a bare denoiser's batches as conditional.

        Raises:
            SceneError: too many interactions, a phrase too long, a strength or schedule out of range.
            AdapterError: the handle is detached, or nothing is there to encode phrases with.
        """
        scenes = _as_scenes(interactions)
        strength, shares = checked_number("strength", strength, 0.0, MAX_STRENGTH), checked_schedule(schedule)
        self._check_attached()
        asked = any(item.strength for scene in scenes for item in scene)
        table = self._encode(scenes) if asked else None
        self.clear()
        if table is not None:
            self._control = Control(
                self._place.sites, table, strength, shares,
                self._pipeline, guidance, num_inference_steps, fast,
            )  # fmt: skip

    def set_tokens(
        self,
        tokens: Tensor | SceneTokens,
        strength: float = 1.0,
        schedule: Schedule = 1.0,
        *,
        num_inference_steps: int | None = None,
    ) -> None:
        """Give the tokens themselves, as training does: gradients flow to them and to what acts at the sites,
        nothing is cached.

        Call `backward` before giving other tokens: gradient checkpointing runs the blocks again.

        Args:
            tokens: what the adapter makes of `scene_tensors`, one row for each row of the denoiser's batch.
            strength: as in `set_scene`.
            schedule: as in `set_scene`.
            num_inference_steps: as in `set_scene`.

        Raises:
            SceneError: the tokens are not that, or a strength or schedule is out of range.
            AdapterError: the handle is detached.
        """
        strength, shares = checked_number("strength", strength, 0.0, MAX_STRENGTH), checked_schedule(schedule)
        self._check_attached()
        table = self._place.rows(tokens)
        self.clear()
        self._control = Control(
            self._place.sites,
            table,
            strength,
            shares,
            self._pipeline,
            num_inference_steps=num_inference_steps,
        )

    @contextmanager
    def record_attention(self, slots: int | None = None) -> Iterator[AttentionRecorder]:
        """Record where pictures look at what is asked, while they are drawn within the block.

        In a U-Net's fusers this costs about what their attention costs; what is drawn stays the same.

        Args:
            slots: how many items of a scene to record, from the first; None for all that the adapter has.
        """
        parts = self.adapter.token_parts
        recorder = AttentionRecorder(self._place, 1 if parts is None else parts.parts, slots)
        with recorder.recording(self.denoiser):
            yield recorder

    @contextmanager
    def following(self, pipeline: Any) -> Iterator[None]:
        """Ask another pipeline of the same modules about guidance and steps, until the block is left."""
        own = self._pipeline
        self._ask(pipeline)
        try:
            yield
        finally:
            self._ask(own)

    def asked(self) -> str:
        """What is asked for at present, in words; empty if nothing is."""
        return str(self._control) if self._control is not None else ""

    def clear(self) -> None:
        """Ask for nothing: the base draws as it always did."""
        self._control = None
        self._place.forget()

    def detach(self) -> None:
        """Take every hook off again. Doing it twice is the same as once."""
        self.clear()
        if self._hooks:
            forget_compiled(self.denoiser, self._given)
        while self._hooks:
            self._hooks.pop().remove()
        for site in self._place.sites:
            site.unhook()

    def __enter__(self) -> "Handle":
        """The handle itself; leaving the block detaches."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Detach."""
        self.detach()

    def _ask(self, pipeline: Any) -> None:
        self._pipeline = self._place.pipeline = pipeline
        if self._control is not None:
            self._control.follow(pipeline)

    def _check_attached(self) -> None:
        if not self._hooks:
            raise AdapterError("expected an attached adapter, got a handle that is detached")

    @torch.no_grad()
    def _encode(self, scenes: list[tuple[Item, ...]]) -> SceneTable:
        if self._phrase_encoder is None:
            raise AdapterError(
                "expected a pipeline with a tokenizer and a text encoder to encode phrases, got none: "
                "attach to the pipeline, give attach a phrase_encoder, or use set_tokens"
            )
        check_count(scenes, self.adapter.config.max_interactions)  # before the text encoder does any work
        null = self.adapter.position_net.null_positive_feature
        features = {p: f.to(null.device) for p, f in self._phrase_encoder(scene_phrases(scenes)).items()}
        return self._place.scenes(scenes, features)

    @cast(Any, torch.compiler.disable)
    def _before(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = None
        for site in self._place.sites:
            site.hook()
            site.call = None  # if this one is refused
        if self._control is not None:
            reading = self._place.read(args, kwargs)
            self._follow(reading.device)
            call = self._control.plan(reading)
        for site in self._place.sites:
            site.call = call

    def _follow(self, device: torch.device | str) -> None:
        """Move the adapter to where the denoiser runs; in eval mode, give it the denoiser's dtype too."""
        null = self.adapter.position_net.null_positive_feature
        dtype = null.dtype if self.adapter.training else self.denoiser.dtype
        if (null.device, null.dtype) != (torch.device(device), dtype):
            self.adapter.to(device, dtype)
            if self._control is not None:
                self._control.move(torch.device(device), dtype)


@overload
def attach(
    pipeline_or_denoiser: object,
    adapter: InteractionAdapter,
    *,
    phrase_encoder: PhraseEncoder | None = None,
) -> Handle: ...
@overload
def attach(pipeline_or_denoiser: object, adapter: ClearAdapter) -> ClearHandle: ...
def attach(
    pipeline_or_denoiser: object,
    adapter: InteractionAdapter | ClearAdapter,
    *,
    phrase_encoder: PhraseEncoder | None = None,
) -> Handle | ClearHandle:
    """Let an adapter act in a pipeline, or in a bare denoiser, until the handle detaches it.

    The adapter moves to the denoiser's device and, in eval mode, to its dtype; in train mode it keeps its
    own.

    Args:
        pipeline_or_denoiser: a diffusers pipeline or its denoiser: a `UNet2DConditionModel`, or a transformer
            of Flux or SD3. Interactions need the pipeline that you are going to call: it knows about guidance
            and steps.
        adapter: the weights.
        phrase_encoder: for interactions: phrases in, a [feature_dim] feature for each out; the pipeline's
            text encoders if not given.

    Raises:
        AdapterError: there is no such denoiser, it is not the adapter's base, it has such an adapter already,
            or the pipeline guides by a picture too; nothing has been touched then.
    """
    if isinstance(adapter, ClearAdapter):
        return attach_clear(pipeline_or_denoiser, adapter)
    if not isinstance(adapter, InteractionAdapter):
        raise AdapterError(
            "expected an InteractionAdapter or a ClearAdapter, such as from_pretrained loads, got "
            f"{type(adapter).__name__}"
        )
    denoiser = denoiser_of(pipeline_or_denoiser)
    adapter.config.base.check(denoiser)
    if attached_handle(denoiser) is not None:
        raise AdapterError(
            "expected a denoiser without an adapter attached, got one that has it: detach that first"
        )
    pipeline = pipeline_or_denoiser if hasattr(pipeline_or_denoiser, "scheduler") else None
    if phrase_encoder is None and pipeline is not None:
        phrase_encoder = pipeline_phrases(pipeline, adapter.config.feature_dim)
    if pipeline is not None and "image_guidance_scale" in signature(type(pipeline).__call__).parameters:
        raise AdapterError(
            f"expected guidance by the prompt alone, got {type(pipeline).__name__}: it guides by pictures too"
        )
    handle = Handle(denoiser, adapter, pipeline, phrase_encoder, pipeline_or_denoiser)
    try:
        if not adapter.training:
            adapter.to(denoiser.dtype)  # every weight: a file may hold several dtypes
        handle._follow(denoiser.device if pipeline is None else cast(Any, pipeline)._execution_device)
    except Exception:  # no memory left there, say
        handle.detach()
        raise
    return handle


def attached_handle(denoiser: nn.Module) -> Handle | None:
    """The handle of the adapter that is attached to a denoiser, if there is one."""
    owners = (getattr(hook, "__self__", None) for hook in denoiser._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Handle)), None)


def _as_scenes(items: Sequence[Any]) -> list[tuple[Item, ...]]:
    """One tuple of items a prompt; a flat sequence is a single scene, for every image."""
    kinds = (Interaction, Entity)
    if isinstance(items, Sequence):
        if all(isinstance(i, kinds) for i in items):
            return [tuple(items)]
        if all(isinstance(s, Sequence) and all(isinstance(i, kinds) for i in s) for s in items):
            return [tuple(scene) for scene in items]
    raise SceneError(
        f"expected Interactions or Entities, or a sequence of them for each prompt, got {shown(items)}"
    )
