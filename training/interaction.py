"""The interaction adapter on pictures of one's own, on a frozen base (paper section 3.4).

The base is any pipeline of `frozen_bases`, with the prediction and the schedule that it was trained with.
Latents, states of captions and features of phrases are computed once and kept on disk; then the text encoders
are let go.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from interactdiff import attach
from interactdiff.data.latents import vae_mean, weights_key
from interactdiff.data.reading import Records
from interactdiff.data.texts import TextCache, phrases_of
from interactdiff.errors import RecipeError
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.interaction.phrases import pipeline_phrases
from interactdiff.interaction.tokens import scene_phrases
from interactdiff.models import resolve
from interactdiff.picture import overlay
from interactdiff.pipeline_loading import load_pipeline
from interactdiff.scene import Entity, Interaction
from interactdiff.training.frozen_bases import frozen_base
from interactdiff.training.interaction_config import (
    OF_A_TRANSFORMER,
    OF_A_UNET,
    TRANSFORMER_LOSS,
    UNET_LOSS,
    InteractionConfig,
)
from interactdiff.training.interaction_data import (
    CachedFeatures,
    PictureData,
    Variation,
    WordsDone,
    captions_of,
    feature_encoder,
    inside_boxes,
    items_of,
)
from interactdiff.training.model_card import push, write_card
from interactdiff.training.objectives import weighted_loss
from interactdiff.training.probe import Counts, Probe, load_probe, verdict
from interactdiff.training.recipe import Recipe
from interactdiff.training.run_folder import SAMPLES

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class InteractionRecipe(Recipe[InteractionConfig]):
    """Trains an `InteractionAdapter` on pictures."""

    config_type = InteractionConfig
    shares_batches = True

    def build(self) -> nn.Module:
        config = self.config
        chosen = config.base_dtype
        self.dtype = _DTYPES[config.mixed_precision] if chosen == "auto" else getattr(torch, chosen)
        self.pipe: Any = load_pipeline(resolve("model", config.base), torch.device("cpu"), self.dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.base = frozen_base(self.pipe, config.loss, config.text_tokens)
        self.pipe.vae.float()  # SDXL's overflows in half precision
        self.in_unet = hasattr(self.pipe, "unet")
        self._check_keys()
        adapter = self._new_adapter().train()
        self.slots = adapter.config.max_interactions
        with self.accelerator.main_process_first():
            self.data = PictureData(config, self.base.multiple)
            validation = config.validation.data
            self.shown = self.data.records if validation is None else Records.open(validation)
        self._cache(adapter)
        if config.gradient_checkpointing:
            self.base.denoiser.enable_gradient_checkpointing()
        if self.in_unet:
            self.base.denoiser.to(memory_format=torch.channels_last)
        self.handle = attach(self.pipe, adapter, phrase_encoder=self.features)
        self._batches: Iterator[dict[str, Any]] | None = None
        self._next_step = -1
        self._probe: Probe | None = None
        self._scores: dict[str, float] = {}
        if self.processes.is_main:
            print(self._summary(adapter), file=sys.stderr)
        return adapter

    def _new_adapter(self) -> InteractionAdapter:
        config, denoiser = self.config, self.base.denoiser
        if config.init_from:
            unet = denoiser if self.in_unet else None
            adapter = InteractionAdapter.from_pretrained(config.init_from, unet=unet).float()
            adapter.check(denoiser)
            return adapter
        return InteractionAdapter.for_denoiser(denoiser, **config.adapter.model_dump(exclude_unset=True))

    def _check_keys(self) -> None:
        """Refuse keys that are for the other kind of base, and sizes that an adapter to go on from has."""
        config = self.config
        sizes, options = config.adapter.model_fields_set, config.loss.model_fields_set
        found = sizes & (OF_A_TRANSFORMER if self.in_unet else OF_A_UNET)
        names = [f"adapter.{name}" for name in sorted(found)]
        found = options & (TRANSFORMER_LOSS if self.in_unet else UNET_LOSS)
        names += [f"loss.{name}" for name in sorted(found)]
        if names:
            kind = "U-Net" if self.in_unet else "transformer"
            raise RecipeError(f"expected keys for the {kind} of {config.base}, got {', '.join(names)}")
        if config.init_from and sizes:
            raise RecipeError(
                f"expected no sizes of the adapter beside init_from, which has its own, got "
                f"{', '.join(f'adapter.{name}' for name in sorted(sizes))}"
            )

    @torch.no_grad()
    def _cache(self, adapter: InteractionAdapter) -> None:
        """Make what is missing in the caches, and let go of the text encoders.

        The denoiser stays off the device until the largest encoder has left it.
        """
        config, base, data, pipe = self.config, self.base, self.data, self.pipe
        cache = data.cache
        parts = {"vae": pipe.vae, **base.encoders}
        keys = {name: weights_key(part) for name, part in parts.items()}
        of_encoders = " ".join(keys[name] for name in base.encoders)
        self.latents = data.latent_caches(keys["vae"])
        length = base.padded_length(0)
        self.texts = TextCache(cache / "texts", f"{type(base).__name__} {of_encoders} {length}", self.dtype)
        known = TextCache(cache / "phrases", f"phrases {of_encoders}", torch.float32)
        self.features = CachedFeatures(known, self.device)
        shown = [self._shown(n) for n in range(min(config.validation.count, len(self.shown)))]
        captions = [prompt for prompt, *_ in shown]
        phrases = scene_phrases([items for _, items, _ in shown])
        done = WordsDone(data, config.flip, self.slots, self.texts, known)
        if not done.recalled():
            captions += captions_of(data.records, data.framing, config.flip, self.slots)
            phrases = [*phrases, *phrases_of(data.records, config.flip > 0)]
        rank, count = self.processes.rank, self.processes.count
        for part in parts.values():
            part.to(self.device)
        for one in self.latents:
            for _ in one.build(vae_mean(pipe.vae), rank, count):
                pass
        for _ in self.texts.build(captions, base.encode_texts(self.device), rank, count):
            pass
        if base.long_encoder is not None:
            base.drop(base.long_encoder)
        base.denoiser.to(self.device)
        width = adapter.config.feature_dim
        encode = pipeline_phrases(pipe, width, adapter.config.phrases)
        if encode is None:
            raise RecipeError(f"expected text encoders for phrases in {config.base}, got none")
        for _ in known.build(phrases, feature_encoder(encode), rank, count):
            pass
        base.drop(*base.encoders)
        pipe.vae.cpu()
        self.accelerator.wait_for_everyone()
        self.texts.refresh()
        known.refresh()
        self.processes.on_main(done.note)

    def _summary(self, adapter: InteractionAdapter) -> str:
        config, data = self.config, self.data
        count = int(data.records.weights.sum())
        started = f"from {config.init_from}" if config.init_from else f"new ({config.adapter.init})"
        return (
            f"interactdiff: {len(data.records)} pictures in {len(set(data.buckets))} sizes; steps of "
            f"{config.batch_size} x {config.accumulate} x {self.processes.count} = {config.global_batch}; "
            f"{config.steps} steps are {config.steps * config.global_batch / count:.1f} epochs; adapter "
            f"{started}, {sum(p.numel() for p in adapter.parameters()) / 1e6:.1f} M parameters; base "
            f"{config.base} in {str(self.dtype).removeprefix('torch.')}"
        )

    def batch(self, step: int) -> dict[str, Any]:
        """The first part of this process's share of a step."""
        return self.micro_batches(step)[0]

    def micro_batches(self, step: int) -> list[dict[str, Any]]:
        """This process's parts of a step, read in order; another step than the next one starts anew."""
        if self._batches is None or step != self._next_step:
            self._batches = self.data.batches(
                step,
                self.processes.rank,
                self.processes.count,
                self.latents,
                Variation(self.config.drops, self.slots),
                self.texts,
                self.base.objective,
            )
        self._next_step = step + 1
        return [next(self._batches) for _ in range(self.config.accumulate)]

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Noise comes with the batch."""
        objective, device = self.base.objective, self.device
        latents, noise, times = (batch[name].to(device) for name in ("latents", "noise", "times"))
        states = {name: tensor.to(device, self.dtype) for name, tensor in batch["states"].items()}
        self.handle["interaction"].set_tokens(self.model(**self._scene_tensors(batch)))
        noisy = objective.noisy(latents, noise, times).to(self.dtype)
        predicted = self.base.predict(noisy, times, states, batch)
        error = (predicted.float() - objective.target(latents, noise, times)).square()
        more = self.config.loss.boxes
        inside = inside_boxes(batch["items"], *latents.shape[2:]).to(device) if more else None
        return weighted_loss(error, objective.weights(times), inside, more)

    def _scene_tensors(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        adapter: InteractionAdapter = self.handle["interaction"].adapter
        none = torch.zeros(adapter.config.feature_dim, device=self.device)  # of a batch without a phrase
        features = {"": none} | self.features(scene_phrases(batch["items"]))
        tensors = adapter.scene_tensors(batch["items"], features)
        order = batch["slots"].to(self.device)
        first = torch.arange(len(order), device=self.device)[:, None]
        return {name: tensor[first, order] for name, tensor in tensors.items()}

    def _shown(self, number: int) -> tuple[str, Sequence[Interaction | Entity], Any]:
        """Caption, items and placement of a picture that is drawn."""
        record, framing = self.shown[number], self.data.framing
        placement = framing.place(
            int(self.shown.widths[number]), int(self.shown.heights[number]), record.items
        )
        items = framing.items(placement, record.items)
        prompt = placement.prompt(record.prompt, record.items, items)
        return prompt, items_of(items, self.slots), placement

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """The autoencoder on the device meanwhile."""
        self.pipe.vae.to(self.device)
        try:
            with self.accelerator.autocast():
                yield
        finally:
            self.handle.clear()
            self.pipe.vae.cpu()

    @torch.no_grad()
    def sample(self) -> Image.Image | None:
        """A row for each scene: the picture itself, drawn without the adapter, and with it, boxes over it."""
        count = min(self.config.validation.count, len(self.shown))
        counts = Counts(), Counts()
        with self._drawing():
            rows = [self._row(number, counts) for number in range(count)]
        self._scores = counts[1].shares() | counts[0].shares("_without")
        if not rows:
            return None
        size = max(row.width for row in rows), sum(row.height for row in rows)
        sheet = Image.new("RGB", size, "white")
        top = 0
        for row in rows:
            sheet.paste(row, (0, top))
            top += row.height
        return sheet

    def scores(self) -> dict[str, float]:
        """Shares of boxes and actions that the drawn scenes show, with the adapter and without."""
        return self._scores

    def _look(self, picture: Image.Image, items: Sequence[Interaction | Entity], counts: Counts) -> None:
        if (name := self.config.validation.detector) is None:
            return
        if self._probe is None:
            shown = [self._shown(n)[1] for n in range(min(self.config.validation.count, len(self.shown)))]
            actions = [
                one.action for of in shown for one in of if isinstance(one, Interaction) and one.action
            ]
            self._probe = load_probe(name, actions, self.device)
        self._probe.look(picture, items, counts)

    def _row(self, number: int, counts: tuple[Counts, Counts]) -> Image.Image:
        """One scene.

        Args:
            number: of its picture.
            counts: to which is added what is drawn without the adapter, and with it.
        """
        prompt, items, placement = self._shown(number)
        config = self.config.validation
        worded, empty = (
            {n: t.to(self.device, self.dtype) for n, t in self.texts.get(p).items()} for p in (prompt, "")
        )
        arguments = self.base.drawing_arguments(worded, empty, config.guidance_scale)
        height, width = placement.size
        pictures = [placement.apply(self.shown[number].open())]
        for scene, of_scene in zip(((), items), counts, strict=True):
            self.handle.set_scene(scene)
            drawn = self.pipe(
                **arguments,
                height=height,
                width=width,
                num_inference_steps=config.steps,
                generator=torch.Generator().manual_seed(self.config.seed + number),
            )
            pictures.append(drawn.images[0])
            self._look(pictures[-1], items, of_scene)
        triplets = tuple(item for item in items if isinstance(item, Interaction))
        entities = tuple(item for item in items if isinstance(item, Entity))
        pictures = [overlay(picture, triplets, entities) for picture in pictures]
        row = Image.new("RGB", (sum(p.width for p in pictures), pictures[0].height))
        for place, picture in enumerate(pictures):
            row.paste(picture, (sum(p.width for p in pictures[:place]), 0))
        return row

    def export(self) -> None:
        adapter = self.accelerator.unwrap_model(self.model)
        half = {name: tensor.half() for name, tensor in adapter.state_dict().items()}
        config = self.config
        InteractionAdapter.from_tensors(adapter.config, half).save_pretrained(config.export_to)
        if "control/found" in self._scores:
            print(f"interactdiff: {verdict(self._scores)}", file=sys.stderr)
        samples = sorted((self.output / SAMPLES).glob("*.png"))
        write_card(config, self._facts(), self._scores, samples[-1] if samples else None)
        if config.hub.id is not None:
            push(config.export_to, config.hub.id, config.hub.private)

    def _facts(self) -> dict[str, str]:
        """What the card says of the training."""
        config = self.config
        data = ", ".join(f"{one.path}{f' ({one.split})' if one.split else ''}" for one in config.data)
        return {
            "Pictures": f"{len(self.data.records)}, of {data}",
            "Steps": f"{self.step} of {config.global_batch} examples",
            "Resolution": f"{config.resolution} px" + (", square crops" if config.square else ""),
            "Optimizer": f"{config.optimizer}, {config.learning_rate:g}, {config.lr_scheduler}",
            "Precision": f"base in {str(self.dtype).removeprefix('torch.')}, adapter in float32",
            "Started from": config.init_from or "new weights",
        }
