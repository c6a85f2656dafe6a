"""The interaction adapter on pictures of one's own, on a frozen base (paper section 3.4)."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from interactdiff import attach
from interactdiff.data.texts import TextCache, phrases_of
from interactdiff.errors import ModelError, RecipeError
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.interaction.phrases import pipeline_phrases
from interactdiff.interaction.tokens import scene_phrases
from interactdiff.picture import overlay
from interactdiff.scene import Entity, Interaction
from interactdiff.training.interaction_config import OF_A_TRANSFORMER, OF_A_UNET, InteractionConfig
from interactdiff.training.interaction_data import (
    CachedFeatures,
    Variation,
    feature_encoder,
    items_of,
    varied_captions,
)
from interactdiff.training.model_card import push, write_card
from interactdiff.training.pictures import PictureRecipe
from interactdiff.training.probe import Counts, Probe, load_probe, verdict
from interactdiff.training.run_folder import SAMPLES


class InteractionRecipe(PictureRecipe[InteractionConfig]):
    """Trains an `InteractionAdapter` on pictures."""

    config_type = InteractionConfig
    _probe: Probe | None = None
    _counts: tuple[Counts, Counts] = (Counts(), Counts())

    def new_adapter(self) -> InteractionAdapter:
        """Of the configuration's sizes, or to go on from."""
        config, denoiser = self.config, self.base.denoiser
        sizes = config.adapter.model_fields_set
        if not config.init_from:
            adapter = InteractionAdapter.for_denoiser(
                denoiser, **config.adapter.model_dump(exclude_unset=True)
            )
        elif sizes:
            raise RecipeError(
                f"expected no sizes of the adapter beside init_from, which has its own, got "
                f"{', '.join(f'adapter.{name}' for name in sorted(sizes))}"
            )
        else:
            unet = denoiser if self.in_unet else None
            adapter = InteractionAdapter.from_pretrained(config.init_from, unet=unet).float()
            adapter.check(denoiser)
        self.slots = adapter.config.max_interactions
        return adapter

    def misplaced_keys(self) -> set[str]:
        """Keys that are set and are for the other kind of base."""
        others = OF_A_TRANSFORMER if self.in_unet else OF_A_UNET
        sizes = self.config.adapter.model_fields_set & others
        return super().misplaced_keys() | {f"adapter.{name}" for name in sizes}

    def started_from(self) -> str:
        """Where the adapter's weights come from, in words."""
        return (
            f"from {self.config.init_from}" if self.config.init_from else f"new ({self.config.adapter.init})"
        )

    def attached(self, adapter: InteractionAdapter) -> Any:
        """Its handle in the base."""
        return attach(self.pipe, adapter, phrase_encoder=self.features)

    def vary(self) -> Variation:
        """Draws what an example is trained without."""
        return Variation(self.config.drops, self.slots)

    def captions(self) -> Iterator[str]:
        """Every caption, with and without actions."""
        return varied_captions(self.data.records, self.data.framing, self.config.flip > 0, self.slots)

    def drawn_of_rows(self) -> str:
        """What decides, beside the rows, which captions and phrases may be drawn."""
        return f"{super().drawn_of_rows()} {self.slots}"

    def further_caches(self, keys: Mapping[str, str]) -> dict[str, TextCache]:
        """Features of phrases."""
        of_encoders = " ".join(keys[name] for name in self.base.encoders)
        known = TextCache(self.data.cache / "phrases", f"phrases {of_encoders}", torch.float32)
        self.features = CachedFeatures(known, self.device)
        return {"phrases": known}

    def cache_more(self, adapter: InteractionAdapter, done: bool) -> None:
        """Features of the phrases of the data, and of the scenes that are drawn."""
        phrases = scene_phrases([self.shown_scene(n)[1] for n in range(self.shown_count)])
        if not done:
            phrases += phrases_of(self.data.records, self.config.flip > 0)
        encode = pipeline_phrases(self.pipe, adapter.config.feature_dim, adapter.config.phrases)
        if encode is None:
            raise RecipeError(f"expected text encoders for phrases in {self.config.base}, got none")
        rank, count = self.processes.rank, self.processes.count
        for _ in self.features.cache.build(phrases, feature_encoder(encode), rank, count):
            pass

    def condition(self, batch: dict[str, Any]) -> None:
        """Tokens of the batch's items, by the adapter as accelerate wraps it."""
        self.handle["interaction"].set_tokens(self.model(**self._scene_tensors(batch)))

    def _scene_tensors(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        adapter: InteractionAdapter = self.handle["interaction"].adapter
        none = torch.zeros(adapter.config.feature_dim, device=self.device)  # of a batch without a phrase
        features = {"": none} | self.features(scene_phrases(batch["items"]))
        tensors = adapter.scene_tensors(batch["items"], features)
        order = batch["slots"].to(self.device)
        first = torch.arange(len(order), device=self.device)[:, None]
        return {name: tensor[first, order] for name, tensor in tensors.items()}

    # --- samples ---

    def load_validation(self) -> None:
        """Load the detector that looks at samples, in the process that draws them."""
        self.processes.on_main(self._load_probe)

    def _load_probe(self) -> None:
        if (name := self.config.validation.detector) is None:
            return
        shown = [self.shown_scene(n)[1] for n in range(self.shown_count)]
        asked = [one for scene in shown for one in scene if isinstance(one, Interaction)]
        actions = [one.action for one in asked if one.action is not None]
        try:
            self._probe = load_probe(name, actions, self.device)
        except ModelError as error:
            raise RecipeError(f"validation.detector: {error}") from None

    def trained_items(self, items: Sequence[Any]) -> Sequence[Interaction | Entity]:
        """Interactions and entities, as many as there are slots."""
        return items_of(items, self.slots)

    def sample(self) -> Image.Image | None:
        """A row for each scene; a detector looks, if there is one."""
        self._counts = Counts(), Counts()
        return super().sample()

    def scores(self) -> dict[str, float]:
        """Shares of boxes and actions that the drawn scenes show, with the adapter and without."""
        without, with_it = self._counts
        return with_it.shares() | without.shares("_without")

    def row(self, number: int) -> list[Image.Image]:
        """The picture itself, drawn without the adapter, and with it, boxes over it."""
        _, items, placement = self.shown_scene(number)
        pictures = [placement.apply(self.shown[number].record.open())]
        for scene, counts in zip(((), items), self._counts, strict=True):
            self.handle.set_scene(scene)
            pictures.append(self.draw(number))
            self._look(pictures[-1], items, counts)
        triplets = tuple(item for item in items if isinstance(item, Interaction))
        entities = tuple(item for item in items if isinstance(item, Entity))
        return [overlay(picture, triplets, entities) for picture in pictures]

    def _look(self, picture: Image.Image, items: Sequence[Interaction | Entity], counts: Counts) -> None:
        if self._probe is not None:
            self._probe.look(picture, items, counts)

    # --- what comes out ---

    def export(self) -> None:
        adapter = self.accelerator.unwrap_model(self.model)
        half = {name: tensor.half() for name, tensor in self.weights().items()}
        config = self.config
        InteractionAdapter.from_tensors(adapter.config, half).save_pretrained(config.export_to)
        scores = self.scores()
        if "control/found" in scores:
            print(f"interactdiff: {verdict(scores)}", file=sys.stderr)
        samples = sorted((self.output / SAMPLES).glob("*.png"))
        write_card(config, self._facts(), scores, samples[-1] if samples else None)

    def publish(self) -> None:
        """To the Hub, if the configuration says where."""
        if (name := self.config.hub.id) is not None:
            push(self.config.export_to, name, self.config.hub.private)

    def _facts(self) -> dict[str, str]:
        """What the card says of the training."""
        config = self.config
        data = ", ".join(f"{one.path}{f' ({one.split})' if one.split else ''}" for one in config.data)
        return {
            "Pictures": f"{len(self.data.records)}, of {data}",
            "Steps": f"{self.step} of {config.global_batch} examples",
            "Resolution": f"{config.resolution} px" + (", square crops" if config.square else ""),
            "Optimizer": f"{config.optimizer}, {config.learning_rate:g}, {config.lr_scheduler}",
            "Precision": f"base in {self.precision}, adapter in float32",
            "Started": self.started_from(),
        }
