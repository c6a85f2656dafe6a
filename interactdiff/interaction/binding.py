"""InteractDiffusion attached: from the items of a scene to what its sites read in each denoiser call."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from interactdiff.adapter import Binding, Edit, Host
from interactdiff.calls import Call
from interactdiff.errors import AdapterError
from interactdiff.interaction.active_scene import ActiveScene
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.interaction.maps import AttentionRecorder
from interactdiff.interaction.phrases import encoder_names, pipeline_phrases
from interactdiff.interaction.site_state import SceneTokenTable
from interactdiff.interaction.tokens import Item, SceneTokens, check_count, scene_phrases
from interactdiff.interaction.transformer import TransformerInteractions
from interactdiff.interaction.unet import UNetInteractions
from interactdiff.scene import MAX_STRENGTH
from interactdiff.scene_checks import Schedule, checked_number, checked_schedule


class InteractionBinding(Binding):
    """An attached `InteractionAdapter`: `handle["interaction"]`."""

    adapter: InteractionAdapter
    scene: ActiveScene | None

    def __init__(self, adapter: InteractionAdapter, host: Host):
        super().__init__(adapter, host)
        kind = UNetInteractions if adapter.config.joint is None else TransformerInteractions
        self._interactions = kind(host, adapter)
        self.sites = self._interactions.sites
        self.edits = tuple(site.residual for site in self.sites)
        self._phrase_encoder = host.phrase_encoder
        if self._phrase_encoder is None and host.pipeline is not None:
            config = adapter.config
            self._phrase_encoder = pipeline_phrases(host.pipeline, config.feature_dim, config.phrases)
        self._recorders: list[AttentionRecorder] = []

    def encode(
        self,
        items: Sequence[Sequence[Item]],
        strength: float = 1.0,
        schedule: Schedule = 1.0,
        fast: bool = False,
    ) -> ActiveScene | None:
        """Make the tokens of interactions and entities; phrases are encoded here, once.

        Args:
            items: for every image, or one sequence for each prompt of the batch.
            strength: how strongly they act, in [0, 2].
            schedule: the share of the steps that they act in, from the first; or shares [on, linear decay,
                off].
            fast: reuse what was added at an earlier step, see `schedule.refreshes`: less exact, and most of
                the time that it takes is saved.

        Raises:
            SceneError: too many interactions, a phrase too long, a strength or schedule out of range.
            AdapterError: nothing is there to encode phrases with.
        """
        strength, shares = checked_number("strength", strength, 0.0, MAX_STRENGTH), checked_schedule(schedule)
        if not any(item.strength for scene in items for item in scene):
            return None
        return ActiveScene(self.sites, self._tokens(items), strength, shares, fast)

    def components(self) -> Mapping[str, Any]:
        """The tokenizers and text encoders that phrases are encoded with."""
        pipeline = self.host.pipeline
        if pipeline is None or self.host.phrase_encoder is not None:
            return {}
        pairs = encoder_names(pipeline, self.adapter.config.phrases)
        return {name: getattr(pipeline, name, None) for pair in pairs for name in pair}

    def use(self, encoded: ActiveScene | None) -> None:
        """Act by a scene from the next call on."""
        self.clear()
        self.scene = encoded

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
            strength: as in `encode`.
            schedule: as in `encode`.
            num_inference_steps: as in `Handle.set_scene`.

        Raises:
            SceneError: the tokens are not that, or a strength or schedule is out of range.
        """
        strength, shares = checked_number("strength", strength, 0.0, MAX_STRENGTH), checked_schedule(schedule)
        table = self._interactions.by_row(tokens)
        self.host.calls.configure(None, num_inference_steps)
        self.use(ActiveScene(self.sites, table, strength, shares))

    @contextmanager
    def record_attention(self, slots: int | None = None) -> Iterator[AttentionRecorder]:
        """Record where pictures attend to the scene's items, while they are drawn within the block.

        In a U-Net's fusers this costs about what their attention costs; what is drawn stays the same.

        Args:
            slots: how many items of a scene to record, from the first; None for all that the adapter has.
        """
        parts = self.adapter.token_parts
        recorder = AttentionRecorder(self.sites, 1 if parts is None else parts.parts, slots)
        with recorder.recording():
            self._recorders.append(recorder)
            try:
                yield recorder
            finally:
                self._recorders.remove(recorder)

    def prepare(self, call: Call) -> Collection[Edit]:
        """Lay out the call's step, rows and tokens at every site."""
        if call.is_pass:
            return ()
        for recorder in self._recorders:
            recorder.begin(call.timestep)
        if self.scene is None:
            return ()
        self.follow(call.device)
        state = self.scene.plan(call)
        for site in self.sites:
            site.state = state
        return () if state is None else self.edits

    def clear(self) -> None:
        """Forget the scene: the base draws as it always did."""
        self.scene = None
        for site in self.sites:
            site.forget()

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the scene's tokens."""
        if self.scene is not None:
            self.scene.move(device, dtype)

    def describe(self) -> str:
        """How many scenes, how strongly, when."""
        return "" if self.scene is None else str(self.scene)

    @torch.no_grad()
    def _tokens(self, scenes: Sequence[Sequence[Item]]) -> SceneTokenTable:
        if self._phrase_encoder is None:
            raise AdapterError(
                "expected a pipeline with a tokenizer and a text encoder to encode phrases, got none: "
                "attach to the pipeline, give attach a phrase_encoder, or use set_tokens"
            )
        check_count(scenes, self.adapter.config.max_interactions)  # before the text encoder does any work
        null = self.adapter.position_net.null_positive_feature
        features = {p: f.to(null.device) for p, f in self._phrase_encoder(scene_phrases(scenes)).items()}
        return self._interactions.scenes(scenes, features)
