"""Finds persons, objects and who does what to what in pictures of stickworld.

A small anchor-free detector in the manner of CenterNet (Zhou et al., "Objects as Points", 2019): heatmaps of
centres, and at each centre what belongs to the thing there. The cell of a person's centre also tells its
action and points at the object of that action, as in PPDM (Liao et al., 2020). What a thing looks like is
read off its crop by a second stage.
"""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from interactdiff.checkpoint import save_tensors
from interactdiff.files import write_aside
from interactdiff.scene import Box
from interactdiff.stickworld.attribute_reader import (
    CROPS,
    OBJECT_HEADS,
    PERSON_HEADS,
    AttributeReader,
    conv,
)
from interactdiff.stickworld.world import ACTIONS, OBJECTS

SIZE = 128  # height and width in pixels of the pictures that it looks at
STRIDE = 4  # pixels of a cell
KINDS = ("person", *OBJECTS)
WEIGHTS, CONFIG = "detector.safetensors", "config.json"
_VOCABULARY = {"kinds": list(KINDS), "actions": list(ACTIONS)} | {
    f"attributes of {whose}": {name: list(values) for name, values in heads.items()}
    for whose, heads in (("persons", PERSON_HEADS), ("objects", OBJECT_HEADS))
}
_MOST = 6  # persons and objects each in a picture
_LEAST_SCORE = 0.1  # of a centre's heat, and of an action's probability
_PAIRING_REACH = 0.1  # distance, as a share of the picture, at which a pointed-at object counts 0.6


@dataclass(frozen=True)
class Found:
    """A person or an object: `box` xyxy as shares of the picture, `score` in 0..1.

    `action` is the likeliest one of a person, and None of an object and of a person who does nothing.
    `attributes` are those beside the colour, by their names.
    """

    name: str
    box: Box
    colour: str
    score: float
    action: str | None = None
    attributes: dict[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class FoundTriplet:
    """Who does what to what; `score` is the product of both heats and the action's probability."""

    person: Found
    action: str
    object: Found
    score: float


@dataclass(frozen=True)
class Detections:
    """What is in one picture, best first."""

    persons: tuple[Found, ...]
    objects: tuple[Found, ...]
    triplets: tuple[FoundTriplet, ...]


@dataclass(frozen=True)
class Maps:
    """What the network says of every cell of the grid, G to a side.

    Attributes:
        heat: [B, 1 + O, G, G] logits that the centre of a person, or of an object of each kind, is here.
        boxes: [B, 2, 4, G, G] of person and object here: how far left, up, right and down of the cell's
            middle its box reaches, as shares of the picture.
        actions: [B, A + 1, G, G] logits of the person's action; the last is of none.
        towards: [B, 2, G, G] x and y from the cell's middle to the middle of the object acted on.
        attributes: of persons and of objects, [N, C] logits of each attribute, at the boxes that were given.
    """

    heat: Tensor
    boxes: Tensor
    actions: Tensor
    towards: Tensor
    attributes: tuple[dict[str, Tensor], ...] = ()


def cell_middles(grid: int, device: torch.device | str = "cpu") -> Tensor:
    """[2, G, G]: x and y of the middle of every cell of a grid, as shares of the picture."""
    middles = (torch.arange(grid, device=device) + 0.5) / grid
    return torch.stack(torch.meshgrid(middles, middles, indexing="xy"))


class Detector(nn.Module):
    """Down to a sixteenth for context and back up to a quarter for places, and two readers of crops.

    Args:
        widths: channels at a half, a quarter, an eighth and a sixteenth of the picture's size.
        size: S, height and width in pixels of the pictures that it looks at; a multiple of 16.
        reader_widths: of `AttributeReader`.
    """

    def __init__(
        self,
        widths: tuple[int, int, int, int] = (32, 64, 96, 128),
        size: int = SIZE,
        reader_widths: tuple[int, int, int, int] = (24, 32, 64, 96),
    ):
        super().__init__()
        a, b, c, d = self.widths = widths
        self.size, self.reader_widths = size, reader_widths
        self.fine = nn.Sequential(conv(3, a, 2), conv(a, b, 2))
        self.middle = nn.Sequential(conv(b, c, 2), conv(c, c))
        self.coarse = nn.Sequential(conv(c, d, 2), conv(d, d), conv(d, d))
        self.to_middle = nn.Conv2d(d, c, 1)
        self.merge_middle = conv(c, c)
        self.to_fine = nn.Conv2d(c, b, 1)
        self.merge_fine = nn.Sequential(conv(b, b), conv(b, b))
        self.heat = nn.Conv2d(b, len(KINDS), 1)
        self.boxes = nn.Conv2d(b, 2 * 4, 1)
        self.actions = nn.Conv2d(b, len(ACTIONS) + 1, 1)
        self.towards = nn.Conv2d(b, 2, 1)
        self.readers = nn.ModuleList(
            AttributeReader(heads, crop, reader_widths)
            for heads, crop in zip((PERSON_HEADS, OBJECT_HEADS), CROPS, strict=True)
        )
        nn.init.constant_(self.heat.bias, -4.0)  # type: ignore[arg-type]  # centres are rare
        nn.init.constant_(self.boxes.bias, 0.15)  # type: ignore[arg-type]

    def forward(self, images: Tensor, attribute_boxes: tuple[tuple[Tensor, Tensor], ...] = ()) -> Maps:
        """Look at pictures.

        Args:
            images: [B, 3, S, S] in [0, 1].
            attribute_boxes: where attributes of persons and of objects are read: for each of the two, [N, 4]
                xyxy as shares of the picture, and [N] the pictures that they are of.
        """
        fine = self.fine(2 * images - 1)
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        middle = self.merge_middle(middle + F.interpolate(self.to_middle(coarse), scale_factor=2.0))
        fine = self.merge_fine(fine + F.interpolate(self.to_fine(middle), scale_factor=2.0))
        return Maps(
            heat=self.heat(fine).float(),
            boxes=self.boxes(fine).float().unflatten(1, (2, 4)),
            actions=self.actions(fine).float(),
            towards=self.towards(fine).float(),
            attributes=tuple(
                r(images, *boxes) for r, boxes in zip(self.readers, attribute_boxes, strict=False)
            ),
        )

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[Detections]:
        """Find what is in each picture.

        Args:
            images: [B, 3, H, W] in [0, 1]; other sizes than S are scaled to it.

        Raises:
            ValueError: the pictures are not of that shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"expected pictures of shape [batch, 3, height, width], got {list(images.shape)}"
            )
        weight = self.to_fine.weight
        images = images.to(weight.device, weight.dtype)
        size = (self.size, self.size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)
        found = located(maps := self(images))
        for role, reader in enumerate(cast(Any, self.readers)):
            things = [(n, thing) for n, roles in enumerate(found) for thing, _ in roles[role]]
            boxes = images.new_tensor([thing.box for _, thing in things]).reshape(-1, 4)
            pictures = torch.tensor([n for n, _ in things], dtype=torch.long, device=images.device)
            read = iter(reader.read(images, boxes, pictures))
            for roles in found:
                roles[role] = [(_with_attributes(thing, next(read)), cell) for thing, cell in roles[role]]
        return paired(found, maps)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write float16 weights and `config.json`, making the folder if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: tensor.detach().half().contiguous().cpu() for name, tensor in self.state_dict().items()
        }
        config = {"widths": list(self.widths), "size": self.size, "reader_widths": list(self.reader_widths)}
        config |= _VOCABULARY
        write_aside(folder / WEIGHTS, lambda file: save_tensors(file, tensors))
        text = json.dumps(config, indent=2) + "\n"
        write_aside(folder / CONFIG, lambda file: file.write_text(text, encoding="utf-8"))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Detector":
        """Read a detector, in float32 and eval mode.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it was trained on another vocabulary.
        """
        config = json.loads(Path(folder, CONFIG).read_text(encoding="utf-8"))
        for name, ours in _VOCABULARY.items():
            if config[name] != ours:
                raise ValueError(f"expected a detector of the {name} {ours}, got one of {config[name]}")
        detector = cls(config["widths"], config["size"], config["reader_widths"])
        detector.load_state_dict({n: t.float() for n, t in load_file(Path(folder, WEIGHTS)).items()})
        return detector.eval()


_Located = tuple[Found, int]  # a thing, and the number of the cell that holds its centre


def located(maps: Maps) -> list[list[list[_Located]]]:
    """Read persons and objects off the maps: for each picture the persons and the objects, surest first.

    Their colours are empty until they are read.
    """
    heat = maps.heat.sigmoid()
    grid = heat.shape[-1]
    kinds = heat[:, 1:].argmax(1)
    peaks = torch.stack([heat[:, 0], heat[:, 1:].amax(1)], 1)  # of persons, and of objects of any kind
    peaks = peaks * (peaks == F.max_pool2d(peaks, 3, 1, 1))
    scores, cells = peaks.flatten(2).topk(_MOST)  # [B, 2, K]
    sign = heat.new_tensor([-1, -1, 1, 1])[:, None, None]
    boxes = (cell_middles(grid, heat.device).repeat(2, 1, 1) + sign * maps.boxes).clamp(0, 1)
    actions = maps.actions.argmax(1)
    found = []
    for image in range(len(heat)):
        things: list[list[_Located]] = [[], []]
        for role in (0, 1):
            for score, cell in zip(scores[image, role].tolist(), cells[image, role].tolist(), strict=True):
                if score < _LEAST_SCORE:
                    continue
                row, column = divmod(cell, grid)
                x0, y0, x1, y1 = boxes[image, role, :, row, column].tolist()
                thing = Found(
                    name=KINDS[0] if role == 0 else KINDS[1 + int(kinds[image, row, column])],
                    box=(x0, y0, x1, y1),
                    colour="",
                    score=score,
                    action=_action(int(actions[image, row, column])) if role == 0 else None,
                )
                things[role].append((thing, cell))
        found.append(things)
    return found


def paired(found: list[list[list[_Located]]], maps: Maps) -> list[Detections]:
    """Tell which person does what to which object, one `Detections` a picture.

    Args:
        found: persons and objects of each picture, see `located`.
        maps: that they were read off.
    """
    grid = maps.heat.shape[-1]
    probabilities = maps.actions.softmax(1)
    targets = cell_middles(grid, maps.towards.device) + maps.towards
    detections = []
    for image, (persons, things) in enumerate(found):
        objects = tuple(thing for thing, _ in things)
        triplets = []
        for person, cell in persons:
            row, column = divmod(cell, grid)
            x, y = targets[image, :, row, column].tolist()
            if person.action is None or (thing := _pointed_at(x, y, objects)) is None:
                continue
            likely = probabilities[image, : len(ACTIONS), row, column].tolist()
            for action, probability in zip(ACTIONS, likely, strict=True):
                if probability >= _LEAST_SCORE:
                    score = person.score * thing.score * probability
                    triplets.append(FoundTriplet(person, action, thing, score))
        triplets.sort(key=lambda triplet: -triplet.score)
        detections.append(Detections(tuple(person for person, _ in persons), objects, tuple(triplets)))
    return detections


def _action(index: int) -> str | None:
    """One of `ACTIONS`; the class beyond them is to do nothing."""
    return ACTIONS[index] if index < len(ACTIONS) else None


def _with_attributes(thing: Found, attributes: dict[str, str]) -> Found:
    """A thing with the colour and the other attributes that were read."""
    others = {name: value for name, value in attributes.items() if name != "colour"}
    return replace(thing, colour=attributes["colour"], attributes=others)


def _pointed_at(x: float, y: float, objects: tuple[Found, ...]) -> Found | None:
    """The object whose middle is nearest to a point, unless one that is surer is nearly as near."""

    def log_likelihood(thing: Found) -> float:
        x0, y0, x1, y1 = thing.box
        squared = ((x0 + x1) / 2 - x) ** 2 + ((y0 + y1) / 2 - y) ** 2
        return math.log(thing.score) - squared / (2 * _PAIRING_REACH**2)

    return max(objects, key=log_likelihood, default=None)
