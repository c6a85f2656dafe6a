"""DreamTuner's subject encoder on pictures with references (arXiv 2312.13691, section 3.1; stage 1).

The base stays as it is, and the image tower too unless it is a new one; the mapper and the attentions at the
sites are trained to predict a picture from its caption and its subject's cut-out. References are changed, so
that their pose and place are not learnt.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from transformers import CLIPVisionModel

from interactdiff import attach
from interactdiff.data.mixture import Mixture
from interactdiff.data.records import CONTROL
from interactdiff.errors import RecipeError
from interactdiff.subject.adapter import SubjectAdapter
from interactdiff.subject.config import CLIP_LARGE
from interactdiff.subject.encoder import tower_pixels
from interactdiff.subject.foreground import WHOLE, foreground
from interactdiff.subject.items import Subject
from interactdiff.training.control import FrozenControl, load_control
from interactdiff.training.pictures import PictureRecipe
from interactdiff.training.subject_config import (
    ReferenceChanges,
    SubjectDropsConfig,
    SubjectTrainingConfig,
)

LOOKED_AT = 100  # records among which one has to have a subject
CELLS = 4  # of the elastic grid, a side


def changed(image: Image.Image, how: ReferenceChanges, rng: random.Random) -> Image.Image:
    """A cut-out as another picture might show it, white around it."""
    if rng.random() < how.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if how.elastic:
        image = _elastic(image, how.elastic, rng)
    angle = rng.uniform(-how.rotation, how.rotation)
    image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor="white")
    factor = 1 - rng.uniform(0, how.scale)
    size = tuple(round(side / factor) for side in image.size)
    canvas = Image.new("RGB", cast(Any, size), "white")
    canvas.paste(image, tuple((new - old) // 2 for new, old in zip(size, image.size, strict=True)))  # type: ignore[arg-type]
    return canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0, how.blur) * max(size)))


def _elastic(image: Image.Image, most: float, rng: random.Random) -> Image.Image:
    """The picture with the inner nodes of a grid moved."""
    if min(image.size) < 2 * CELLS:
        return image
    cell = image.width / CELLS, image.height / CELLS
    nodes: dict[tuple[int, int], tuple[float, float]] = {}
    for row in range(CELLS + 1):
        for column in range(CELLS + 1):
            inner = 0 < row < CELLS and 0 < column < CELLS
            x, y = (rng.uniform(-most, most) / 2 * inner for _ in range(2))
            nodes[row, column] = (column + x) * cell[0], (row + y) * cell[1]
    mesh = []
    for row in range(CELLS):
        for column in range(CELLS):
            box = column * cell[0], row * cell[1], (column + 1) * cell[0], (row + 1) * cell[1]
            corners = [(row, column), (row + 1, column), (row + 1, column + 1), (row, column + 1)]
            quad = tuple(edge for corner in corners for edge in nodes[corner])
            mesh.append((tuple(map(round, box)), quad))
    return image.transform(image.size, Image.Transform.MESH, mesh, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class SubjectVariation:
    """Draws which subject of a picture is seen, and how.

    Attributes:
        drops: the probabilities.
        reference: how its picture is changed.
        side: pixels of what the image tower takes.
        close_up: whether it sees close-ups, see `SubjectConfig`.
    """

    drops: SubjectDropsConfig
    reference: ReferenceChanges
    side: int
    close_up: bool

    def __call__(self, prompt: str, items: Sequence[Any], rng: random.Random) -> tuple[str, list[Subject]]:
        """A caption, and at most one subject, with its place if it has one."""
        both = rng.random() < self.drops.all
        if both or rng.random() < self.drops.caption:
            prompt = ""
        subjects = subjects_of(items)
        if both or rng.random() < self.drops.subject or not subjects:
            return prompt, []
        return prompt, [rng.choice(subjects)]

    def more(self, items: Sequence[Subject], rng: random.Random) -> dict[str, Tensor]:
        """What the encoder is given.

        Returns:
            "reference" [3, side, side] that the image tower takes; "present" [], 0 without a subject; and
            "placed" [], 0 where its box, if it has one, is not given to the encoder.
        """
        if not items:
            none = torch.zeros(())
            return {"reference": torch.zeros(3, self.side, self.side), "present": none, "placed": none}
        image = changed(foreground(items[0]).seen(self.close_up), self.reference, rng)
        placed = torch.tensor(float(rng.random() >= self.drops.box))
        return {
            "reference": tower_pixels([image], self.side)[0],
            "present": torch.ones(()),
            "placed": placed,
        }


def subjects_of(items: Sequence[Any]) -> list[Subject]:
    """The subjects of a picture, in their own boxes or in those of interactions of the same phrases."""
    return [item.placed(items) for item in items if isinstance(item, Subject)]


class SubjectRecipe(PictureRecipe[SubjectTrainingConfig]):
    """Trains a `SubjectAdapter`: its mapper, its attentions, and where wanted its image tower."""

    config_type = SubjectTrainingConfig

    def check_data(self, records: Mixture) -> None:
        """Some of `LOOKED_AT` rows, spread evenly, have subjects; with a ControlNet some have control images.

        Warns of references without a mask, an alpha channel or a white background: their backgrounds are
        learned with them.

        Raises:
            RecipeError: none has.
        """
        looked_at = range(0, len(records), len(records) // LOOKED_AT + 1)
        subjects = [item for n in looked_at for item in records[n].items if isinstance(item, Subject)]
        if not subjects:
            raise RecipeError(
                f"expected subjects with pictures in the rows of {self._data_names()}, got none in the "
                f"{len(looked_at)} that were looked at"
            )
        if whole := sum(foreground(subject).how == WHOLE for subject in subjects):
            print(
                f"interactdiff: {whole} of {len(subjects)} references that were looked at are taken whole, "
                "background and all: give masks, or pictures with an alpha channel or a white background",
                file=sys.stderr,
            )
        if self.config.controlnet is not None and not records.controls.any():
            raise RecipeError(f"controlnet: expected rows with a {CONTROL} in {self._data_names()}, got none")

    def _data_names(self) -> str:
        return ", ".join(str(part.path) for part in self.config.data)

    def load_control(self) -> FrozenControl | None:
        """The ControlNet of the configuration."""
        config = self.config
        if config.controlnet is None:
            return None
        return load_control(
            config.controlnet, self.base, self.dtype, config.controlnet_scale, config.drops.control
        )

    def new_adapter(self) -> SubjectAdapter:
        """Untrained, or to go on from; of its image tower nothing is trained, or all that is read."""
        adapter = self._start()
        if self.config.train_image_encoder:
            adapter.train_tower()
        return adapter

    def _start(self) -> SubjectAdapter:
        config, denoiser = self.config, self.base.denoiser
        if config.init_from is not None:
            adapter = SubjectAdapter.from_pretrained(config.init_from, dtype=torch.float32)
            if adapter.config is None:
                raise RecipeError(f"expected a subject encoder at {config.init_from}, got an adapter without")
            adapter.check(denoiser)
            return adapter
        tower = None if config.image_encoder is None else _loaded_tower(config.image_encoder)
        vision = (
            CLIP_LARGE | (config.vision or {})
            if tower is None
            else {name: getattr(tower.config, name) for name in (*CLIP_LARGE, "hidden_act", "layer_norm_eps")}
        )
        adapter = SubjectAdapter.for_denoiser(
            denoiser, vision=vision, token_dim=config.token_dim, layers=config.layers
        )
        if tower is not None:
            adapter.image_encoder.load_state_dict(tower.state_dict())
        return adapter

    def started_from(self) -> str:
        """Where the adapter's weights come from, in words."""
        config = self.config
        if config.init_from is not None:
            return f"from {config.init_from}"
        return f"new, with {'a new tower' if config.vision else f'the tower of {config.image_encoder}'}"

    def attached(self, adapter: SubjectAdapter) -> Any:
        """Its handle in the base."""
        self.side, self.close_up = adapter.side, adapter.close_up
        return attach(self.pipe, adapter)

    def vary(self) -> SubjectVariation:
        """Draws which subject of a picture is seen."""
        return SubjectVariation(self.config.drops, self.config.reference, self.side, self.close_up)

    def condition(self, batch: dict[str, Any]) -> None:
        """Tokens of the batch's references, by the adapter as accelerate wraps it."""
        tokens = self.model(batch["reference"].to(self.device))
        boxes = [
            [one.box for one in items if placed and one.box is not None]
            for items, placed in zip(batch["items"], batch["placed"].tolist(), strict=True)
        ]
        weights = (batch["present"] * self.config.weight).tolist()
        self.handle["subject"].set_tokens(tokens, boxes, weights)

    def trained_items(self, items: Sequence[Any]) -> list[Subject]:
        """Subjects."""
        return subjects_of(items)

    def row(self, number: int) -> list[Image.Image]:
        """The picture itself, its first subject, drawn without the encoder, and with it."""
        _, subjects, placement = self.shown_scene(number)
        picture = placement.apply(self.shown[number].record.open())
        self.handle.clear()
        pictures = [picture, Image.new("RGB", picture.size, "white"), self.draw(number)]
        if subjects:
            cut = foreground(subjects[0]).seen(self.close_up)
            adapter = self.accelerator.unwrap_model(self.model)
            boxes = [[subjects[0].box]] if subjects[0].box is not None else [[]]
            self.handle["subject"].set_tokens(adapter([cut]), boxes, [self.config.weight])
            pictures[1].paste(_within(cut, picture.size), (0, 0))
        return [*pictures, self.draw(number)]

    def export(self) -> None:
        adapter: SubjectAdapter = self.accelerator.unwrap_model(self.model)
        made = SubjectAdapter(adapter.config)
        made.load_state_dict(self.weights())
        made.half().save_pretrained(self.config.export_to)


def _within(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    copy = image.copy()
    copy.thumbnail(size)
    return copy


def _loaded_tower(name: str) -> Any:
    """A CLIP image tower from safetensors.

    Raises:
        RecipeError: there is none.
    """
    try:
        return CLIPVisionModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise RecipeError(f"image_encoder: expected CLIP's image tower at {name}, got {reason}") from None
