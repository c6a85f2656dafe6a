"""Attaches an adapter to a denoiser, by hooks alone, and takes it off again.

Three kinds of hooks carry the fuser, and nothing else of the base is touched, so every attention processor,
LoRA, ControlNet and pipeline goes on working:

    the U-Net, before              which step, which half of guidance: what this call needs, or nothing
    a transformer block, before    keep the block's input x (and, of the model around it, the grid)
    its self-attention, after      a -> a + residual(x + a): the block's own x + a becomes the fuser's output
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from interactdiff.checkpoint import AdapterError
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.interaction.fuser import GatedSelfAttention, KeysValues, grid_features
from interactdiff.interaction.phrases import PhraseEncoder, encode_phrases
from interactdiff.interaction.tokens import scene_phrases, scene_tensors
from interactdiff.scene import MAX_STRENGTH, Interaction, SceneError
from interactdiff.schedule import Schedule, StepClock, checked_schedule, scheduled
from interactdiff.sites import Site, find_sites, unet_of


@dataclass
class _Control:
    """What was asked for.

    Attributes:
        tokens: [S + 1, 3N, token_dim] of S scenes and then of the unconditional half; or one row for each
            batch row.
        occupied: for each scene whether it has interactions; None where tokens were given instead of scenes.
        strength: multiplies the schedule's value.
        shares: the schedule.
        guidance: whether batches come in two halves; None to ask the pipeline.
        constant: what no step changes: keys, values and positions by site, and the plan by batch.
    """

    tokens: Tensor
    occupied: list[bool] | None
    strength: float
    shares: tuple[float, float, float]
    guidance: bool | None = None
    constant: dict[tuple[Any, ...], Any] = field(default_factory=dict)


@dataclass
class _Call:
    """What one denoiser call needs of the fusers.

    Attributes:
        scale: strength times schedule, not 0.
        rows: [R] for each controlled batch row its row of tokens; None where they are the same.
        controlled: [R] the batch rows that have a scene; None where all have.
    """

    scale: float
    rows: Tensor | None = None
    controlled: Tensor | None = None


@dataclass
class _Fused:
    """A site with its fuser, and what the block's hooks pass on to the attention's."""

    site: Site
    fuser: GatedSelfAttention
    x: Tensor | None = None
    grid: tuple[int, int] = (0, 0)


class Handle:
    """An attached adapter: says what to draw, and detaches. Made by `attach`; a context manager.

    Attributes:
        adapter: the attached adapter.
        unet: the U-Net that it acts in.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        adapter: InteractionAdapter,
        pipeline: Any = None,
        phrase_encoder: PhraseEncoder | None = None,
    ):
        self.unet, self.adapter = unet, adapter
        self._pipeline, self._phrase_encoder = pipeline, phrase_encoder
        self._control: _Control | None = None
        self._call: _Call | None = None
        self._clock = StepClock(None, None)
        self._hooks = [unet.register_forward_pre_hook(self._before_unet, with_kwargs=True)]
        fusers = adapter.fusers
        for site in find_sites(unet):
            self._hook_site(_Fused(site, fusers[site.path]))

    def set_scene(
        self,
        interactions: Sequence[Interaction] | Sequence[Sequence[Interaction]],
        strength: float = 1.0,
        schedule: Schedule = 1.0,
        *,
        num_inference_steps: int | None = None,
        guidance: bool | None = None,
    ) -> None:
        """Say who does what to what from now on. Phrases are encoded here, once.

        Args:
            interactions: for every image, or one sequence for each prompt of the batch; an image without any
                is drawn as the base draws it.
            strength: how strongly they act, in [0, 2].
            schedule: the share of the steps that they act in, from the first; or shares [on, linear decay,
                off].
            num_inference_steps: for a bare U-Net, whose schedule is otherwise not followed; a pipeline knows.
            guidance: whether batches are [unconditional half, conditional half]; None asks the pipeline, and
                takes a bare U-Net's batches as conditional.

        Raises:
            SceneError: too many interactions, a phrase too long, a strength or schedule out of range.
            AdapterError: the handle is detached, or nothing is there to encode phrases with.
        """
        scenes = _as_scenes(interactions)
        strength, shares = _checked_strength(strength), checked_schedule(schedule)
        self._check_attached()
        tokens = self._encode(scenes) if any(scenes) else None
        self.clear()
        if tokens is not None:
            occupied = [bool(scene) for scene in scenes]
            self._control = _Control(tokens, occupied, strength, shares, guidance)
            self._clock = StepClock(self._pipeline, num_inference_steps)

    def set_tokens(
        self,
        tokens: Tensor,
        strength: float = 1.0,
        schedule: Schedule = 1.0,
        *,
        num_inference_steps: int | None = None,
    ) -> None:
        """Give the tokens themselves, as training does: gradients flow to them and to the fusers, nothing is
        cached.

        Call `backward` before giving other tokens: gradient checkpointing runs the blocks again.

        Args:
            tokens: [B, 3N, token_dim] of the adapter's `position_net`, one row for each row of the U-Net's
                batch.
            strength: as in `set_scene`.
            schedule: as in `set_scene`.
            num_inference_steps: as in `set_scene`.

        Raises:
            SceneError: the tokens' shape is not that, or a strength or schedule is out of range.
            AdapterError: the handle is detached.
        """
        strength, shares = _checked_strength(strength), checked_schedule(schedule)
        self._check_attached()
        width = self.adapter.config.base.cross_attention_dim
        if tokens.ndim != 3 or tokens.shape[-1] != width:
            raise SceneError(f"expected tokens of shape [batch, 3N, {width}], got {list(tokens.shape)}")
        self.clear()
        self._control = _Control(tokens, None, strength, shares)
        self._clock = StepClock(self._pipeline, num_inference_steps)

    def clear(self) -> None:
        """Ask for nothing: the base draws as it always did."""
        self._control = self._call = None

    def detach(self) -> None:
        """Take every hook off again. Doing it twice is the same as once."""
        self.clear()
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> "Handle":
        """The handle itself; leaving the block detaches."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Detach."""
        self.detach()

    def _check_attached(self) -> None:
        if not self._hooks:
            raise AdapterError("expected an attached adapter, got a handle that is detached")

    @torch.no_grad()
    def _encode(self, scenes: list[tuple[Interaction, ...]]) -> Tensor:
        """Tokens of the scenes, and last those of the unconditional half: the same with every mask 0."""
        if self._phrase_encoder is None:
            raise AdapterError(
                "expected a pipeline with a tokenizer and a text encoder to encode phrases, got none: "
                "attach to the pipeline, give attach a phrase_encoder, or use set_tokens"
            )
        limit = self.adapter.config.max_interactions
        for scene in scenes:  # before the text encoder does any work
            if len(scene) > limit:
                raise SceneError(f"expected at most {limit} interactions an image, got {len(scene)}")
        null = self.adapter.position_net.null_positive_feature
        features = {p: f.to(null.device) for p, f in self._phrase_encoder(scene_phrases(scenes)).items()}
        return self.adapter(**scene_tensors([*scenes, ()], features, limit))

    def _before_unet(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # bookkeeping that reads the pipeline, which dynamo cannot trace: nothing to compile
        cast(Any, torch.compiler.disable)(self._plan_call)(args, kwargs)

    def _plan_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = None
        if (control := self._control) is None:
            return
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        if scale := control.strength * self._scheduled(control.shares, timestep):
            self._follow_unet(sample.device)
            self._call = self._plan(control, scale, sample.shape[0])

    def _scheduled(self, shares: tuple[float, float, float], timestep: Tensor | float) -> float:
        """The schedule's value at this call; where no step can be known, the schedule is all or nothing."""
        on, _, off = shares
        if on == 1 or off == 1:
            return on
        now = self._clock.read(timestep)
        return 1.0 if now is None else scheduled(*now, shares)

    def _plan(self, control: _Control, scale: float, batch: int) -> _Call:
        """Which tokens each row of the batch reads."""
        if control.occupied is None:
            if batch != len(control.tokens):
                raise SceneError(f"expected tokens for {batch} batch rows, got {len(control.tokens)}")
            return _Call(scale)
        scenes = len(control.occupied)
        halves = self._halves(control)
        if (known := control.constant.get((batch, *halves))) is not None:
            return replace(known, scale=scale)
        images, rest = divmod(batch, len(halves))
        if rest or images % scenes:
            raise SceneError(
                f"expected a batch of {len(halves)} times a multiple of {scenes} rows, for {scenes} scenes "
                f"with guidance {'on' if False in halves else 'off'}, got {batch} rows"
            )
        per_prompt = images // scenes
        scene_of_row = [(image // per_prompt, half) for half in halves for image in range(images)]
        controlled = [row for row, (scene, _) in enumerate(scene_of_row) if control.occupied[scene]]
        tokens_of_row = [scene if conditional else scenes for scene, conditional in scene_of_row]
        device = control.tokens.device
        call = _Call(
            scale,
            torch.tensor([tokens_of_row[row] for row in controlled], device=device),
            None if len(controlled) == batch else torch.tensor(controlled, device=device),
        )
        control.constant[(batch, *halves)] = call
        return call

    def _halves(self, control: _Control) -> list[bool]:
        """For each part of the batch whether it is conditional, in diffusers' order."""
        guidance = control.guidance
        if guidance is None and self._pipeline is not None:
            guidance = getattr(self._pipeline, "do_classifier_free_guidance", None)
            if guidance is None:
                name = type(self._pipeline).__name__
                raise AdapterError(
                    f"expected a pipeline with do_classifier_free_guidance, got {name} without it: "
                    "give set_scene guidance=True or False"
                )
        perturbed = getattr(self._pipeline, "do_perturbed_attention_guidance", False)
        return [False] * bool(guidance) + [True] + [True] * bool(perturbed)

    def _follow_unet(self, device: torch.device | str) -> None:
        """Move the adapter to where the U-Net runs; in eval mode, give it the U-Net's dtype too."""
        null = self.adapter.position_net.null_positive_feature
        dtype = null.dtype if self.adapter.training else self.unet.dtype
        if (null.device, null.dtype) != (torch.device(device), dtype):
            self.adapter.to(device, dtype)
            if self._control is not None:
                self._control.tokens = self._control.tokens.to(device, dtype)
                self._control.constant.clear()

    def _hook_site(self, fused: _Fused) -> None:
        site = fused.site

        def remember_grid(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            height, width = (args[0] if args else kwargs["hidden_states"]).shape[-2:]
            fused.grid = (height, width)

        def remember_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._call is not None:
                fused.x = args[0] if args else kwargs["hidden_states"]

        def add_residual(_: nn.Module, __: tuple[Any, ...], attended: Tensor) -> Tensor | None:
            if self._call is None or self._control is None or fused.x is None:
                return None
            x, fused.x = fused.x + attended, None
            return self._with_residual(fused, self._control, self._call, x, attended)

        self._hooks += [
            site.transformer.register_forward_pre_hook(remember_grid, with_kwargs=True),
            site.block.register_forward_pre_hook(remember_input, with_kwargs=True),
            site.block.attn1.register_forward_hook(add_residual),
        ]

    def _with_residual(
        self, fused: _Fused, control: _Control, call: _Call, x: Tensor, attended: Tensor
    ) -> Tensor:
        objects, positions = self._constant(fused, control)
        if call.rows is not None:
            objects = KeysValues(*(t[call.rows] for t in objects))
        if call.controlled is None:
            return attended + fused.fuser.residual(x, objects, call.scale, positions).to(attended.dtype)
        residual = fused.fuser.residual(x[call.controlled], objects, call.scale, positions)
        return attended.index_add(0, call.controlled, residual.to(attended.dtype))

    def _constant(self, fused: _Fused, control: _Control) -> tuple[KeysValues, Tensor | float]:
        """What no step changes: computed once for a scene, every time where gradients flow to it."""
        key = (fused.site.path, fused.grid)
        if control.occupied is None:
            return self._compute_constant(fused, control)
        if key not in control.constant:
            with torch.no_grad():
                control.constant[key] = self._compute_constant(fused, control)
        return control.constant[key]

    def _compute_constant(self, fused: _Fused, control: _Control) -> tuple[KeysValues, Tensor | float]:
        fuser, grid = fused.fuser, None
        if fuser.grid_positions is not None:
            grid = grid_features(*fused.grid, control.tokens.device)
        return fuser.keys_values(control.tokens), fuser.positions(grid)


def attach(
    pipeline_or_unet: object, adapter: InteractionAdapter, *, phrase_encoder: PhraseEncoder | None = None
) -> Handle:
    """Let an adapter control a pipeline, or a bare U-Net, until the handle detaches it.

    The adapter moves to the U-Net's device and, in eval mode, to its dtype; in train mode it keeps its own.

    Args:
        pipeline_or_unet: a diffusers pipeline with a `UNet2DConditionModel`, or that U-Net. Give the pipeline
            that you are going to call: it knows about guidance and steps.
        adapter: the weights.
        phrase_encoder: phrases in, a [feature_dim] feature for each out; the pipeline's text encoder if not
            given.

    Raises:
        AdapterError: there is no U-Net, it is not the adapter's base, it has an adapter already, or the
            pipeline guides by a picture too; nothing has been touched then.
    """
    if not isinstance(adapter, InteractionAdapter):
        raise AdapterError(
            f"expected an InteractionAdapter, such as from_pretrained loads, got {type(adapter).__name__}"
        )
    unet = unet_of(pipeline_or_unet)
    adapter.config.base.check(unet)
    if any(isinstance(getattr(hook, "__self__", None), Handle) for hook in unet._forward_pre_hooks.values()):
        raise AdapterError(
            "expected a U-Net without an adapter attached, got one that has it: detach that first"
        )
    pipeline = pipeline_or_unet if hasattr(pipeline_or_unet, "scheduler") else None
    if phrase_encoder is None and pipeline is not None:
        phrase_encoder = _pipeline_phrases(pipeline, adapter)
    if hasattr(type(pipeline), "image_guidance_scale"):
        raise AdapterError(
            f"expected guidance by the prompt alone, got {type(pipeline).__name__}: it guides by pictures too"
        )
    handle = Handle(unet, adapter, pipeline, phrase_encoder)
    try:
        if not adapter.training:
            adapter.to(unet.dtype)  # every weight: a file may hold several dtypes
        handle._follow_unet(unet.device if pipeline is None else cast(Any, pipeline)._execution_device)
    except Exception:  # no memory left there, say
        handle.detach()
        raise
    return handle


def _pipeline_phrases(pipeline: Any, adapter: InteractionAdapter) -> PhraseEncoder | None:
    """The pipeline's text encoder as a phrase encoder; None if the pipeline was loaded without it."""
    tokenizer, text_encoder = getattr(pipeline, "tokenizer", None), getattr(pipeline, "text_encoder", None)
    if tokenizer is None or text_encoder is None:
        return None
    width = adapter.config.feature_dim
    if text_encoder.config.hidden_size != width:
        raise AdapterError(
            f"expected a text encoder of width {width}, which the adapter's phrase features have, "
            f"got width {text_encoder.config.hidden_size}"
        )
    return lambda phrases: encode_phrases(tokenizer, text_encoder, phrases, pipeline._execution_device)


def _as_scenes(interactions: Sequence[Any]) -> list[tuple[Interaction, ...]]:
    """One tuple of interactions a prompt; a flat sequence is a single scene, for every image."""
    if isinstance(interactions, Sequence):
        if all(isinstance(i, Interaction) for i in interactions):
            return [tuple(interactions)]
        if all(isinstance(s, Sequence) and all(isinstance(i, Interaction) for i in s) for s in interactions):
            return [tuple(scene) for scene in interactions]
    raise SceneError(f"expected Interactions, or a sequence of them for each prompt, got {interactions!r}")


def _checked_strength(strength: float) -> float:
    if not isinstance(strength, int | float) or not 0 <= strength <= MAX_STRENGTH:
        raise SceneError(f"expected a strength in [0, {MAX_STRENGTH:g}], got {strength!r}")
    return float(strength)
