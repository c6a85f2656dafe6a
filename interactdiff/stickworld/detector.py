"""Finds persons, objects and who does what to what in pictures of stickworld.

A small anchor-free detector in the manner of CenterNet (Zhou et al., "Objects as Points", 2019): heatmaps of
centres, and at each centre what belongs to the thing there. The cell of a person's centre also tells its
action and points at the object of that action, as in PPDM (Liao et al., 2020).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from interactdiff.files import write_aside
from interactdiff.scene import Box
from interactdiff.stickworld.world import ACTIONS, COLOURS, OBJECTS

SIZE = 96  # height and width in pixels of the pictures that it looks at
STRIDE = 4  # pixels of a cell
GRID = SIZE // STRIDE
KINDS = ("person", *OBJECTS)
COLOUR_NAMES = tuple(COLOURS)
WEIGHTS, CONFIG = "detector.safetensors", "config.json"
_MOST = 6  # persons and objects each in a picture
_LEAST_SCORE = 0.1  # of a centre's heat, and of an action's probability
_PAIRING_REACH = 0.1  # distance, as a share of the picture, at which a pointed-at object counts 0.6


@dataclass(frozen=True)
class Found:
    """A person or an object: `box` xyxy as shares of the picture, `score` in 0..1.

    `action` is the likeliest one of a person, and None of an object.
    """

    name: str
    box: Box
    colour: str
    score: float
    action: str | None = None


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
    """What the network says of every cell; G is `GRID`.

    Attributes:
        heat: [B, 1 + O, G, G] logits that the centre of a person, or of an object of each kind, is here.
        boxes: [B, 2, 4, G, G] of person and object here: how far left, up, right and down of the cell's
            middle its box reaches, as shares of the picture.
        colours: [B, 2, C, G, G] logits.
        actions: [B, A, G, G] logits of the person's action.
        towards: [B, 2, G, G] x and y from the cell's middle to the middle of the object acted on.
    """

    heat: Tensor
    boxes: Tensor
    colours: Tensor
    actions: Tensor
    towards: Tensor


def cell_middles(device: torch.device | str = "cpu") -> Tensor:
    """[2, G, G]: x and y of every cell's middle, as shares of the picture."""
    middles = (torch.arange(GRID, device=device) + 0.5) / GRID
    return torch.stack(torch.meshgrid(middles, middles, indexing="xy"))


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(outputs // 8, outputs), nn.SiLU()
    )


class Detector(nn.Module):
    """Down to 6 x 6 for context and back up to 24 x 24 for places; under a million parameters."""

    def __init__(self, widths: tuple[int, int, int, int] = (32, 64, 96, 128)):
        super().__init__()
        a, b, c, d = self.widths = tuple(widths)
        self.fine = nn.Sequential(_conv(3, a, 2), _conv(a, b, 2))
        self.middle = nn.Sequential(_conv(b, c, 2), _conv(c, c))
        self.coarse = nn.Sequential(_conv(c, d, 2), _conv(d, d), _conv(d, d))
        self.to_middle = nn.Conv2d(d, c, 1)
        self.merge_middle = _conv(c, c)
        self.to_fine = nn.Conv2d(c, b, 1)
        self.merge_fine = nn.Sequential(_conv(b, b), _conv(b, b))
        self.heat = nn.Conv2d(b, len(KINDS), 1)
        self.boxes = nn.Conv2d(b, 2 * 4, 1)
        self.colours = nn.Conv2d(b, 2 * len(COLOURS), 1)
        self.actions = nn.Conv2d(b, len(ACTIONS), 1)
        self.towards = nn.Conv2d(b, 2, 1)
        nn.init.constant_(self.heat.bias, -4.0)  # type: ignore[arg-type]  # centres are rare
        nn.init.constant_(self.boxes.bias, 0.15)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Maps:
        """Look at pictures.

        Args:
            images: [B, 3, 96, 96] in [0, 1].
        """
        fine = self.fine(2 * images - 1)
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        middle = self.merge_middle(middle + F.interpolate(self.to_middle(coarse), scale_factor=2.0))
        fine = self.merge_fine(fine + F.interpolate(self.to_fine(middle), scale_factor=2.0))
        return Maps(
            heat=self.heat(fine).float(),
            boxes=self.boxes(fine).float().unflatten(1, (2, 4)),
            colours=self.colours(fine).float().unflatten(1, (2, len(COLOURS))),
            actions=self.actions(fine).float(),
            towards=self.towards(fine).float(),
        )

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[Detections]:
        """Find what is in each picture.

        Args:
            images: [B, 3, H, W] in [0, 1]; other sizes than 96 are scaled to it.

        Raises:
            ValueError: the pictures are not of that shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"expected pictures of shape [batch, 3, height, width], got {list(images.shape)}"
            )
        weight = self.to_fine.weight
        images = images.to(weight.device, weight.dtype)
        if images.shape[-2:] != (SIZE, SIZE):
            images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True).clamp(0, 1)
        return detections(self(images))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write float16 weights and `config.json`, making the folder if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: tensor.detach().half().contiguous().cpu() for name, tensor in self.state_dict().items()
        }
        config = {
            "widths": list(self.widths),
            "kinds": list(KINDS),
            "colours": list(COLOUR_NAMES),
            "actions": list(ACTIONS),
        }
        write_aside(folder / WEIGHTS, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
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
        for name, ours in (("kinds", KINDS), ("colours", COLOUR_NAMES), ("actions", ACTIONS)):
            if config[name] != list(ours):
                raise ValueError(f"expected a detector of the {name} {list(ours)}, got one of {config[name]}")
        detector = cls(tuple(config["widths"]))
        detector.load_state_dict({n: t.float() for n, t in load_file(Path(folder, WEIGHTS)).items()})
        return detector.eval()


def detections(maps: Maps) -> list[Detections]:
    """Read persons, objects and triplets off the maps, one `Detections` a picture."""
    heat = maps.heat.sigmoid()
    kinds = heat[:, 1:].argmax(1)
    peaks = torch.stack([heat[:, 0], heat[:, 1:].amax(1)], 1)  # of persons, and of objects of any kind
    peaks = peaks * (peaks == F.max_pool2d(peaks, 3, 1, 1))
    scores, cells = peaks.flatten(2).topk(_MOST)  # [B, 2, K]
    middles = cell_middles(heat.device)
    sign = heat.new_tensor([-1, -1, 1, 1])[:, None, None]
    boxes = (middles.repeat(2, 1, 1) + sign * maps.boxes).clamp(0, 1)
    colours = maps.colours.argmax(2)
    probabilities = maps.actions.softmax(1)
    targets = middles + maps.towards
    found = []
    for image in range(len(heat)):
        things: list[list[tuple[Found, int]]] = [[], []]
        for role in (0, 1):
            for score, cell in zip(scores[image, role].tolist(), cells[image, role].tolist(), strict=True):
                if score < _LEAST_SCORE:
                    continue
                row, column = divmod(cell, GRID)
                x0, y0, x1, y1 = boxes[image, role, :, row, column].tolist()
                thing = Found(
                    name=KINDS[0] if role == 0 else KINDS[1 + int(kinds[image, row, column])],
                    box=(x0, y0, x1, y1),
                    colour=COLOUR_NAMES[int(colours[image, role, row, column])],
                    score=score,
                    action=ACTIONS[int(probabilities[image, :, row, column].argmax())] if role == 0 else None,
                )
                things[role].append((thing, cell))
        objects = tuple(thing for thing, _ in things[1])
        triplets = []
        for person, cell in things[0]:
            row, column = divmod(cell, GRID)
            x, y = targets[image, :, row, column].tolist()
            if (thing := _pointed_at(x, y, objects)) is None:
                continue
            for action, probability in zip(
                ACTIONS, probabilities[image, :, row, column].tolist(), strict=True
            ):
                if probability >= _LEAST_SCORE:
                    score = person.score * thing.score * probability
                    triplets.append(FoundTriplet(person, action, thing, score))
        triplets.sort(key=lambda triplet: -triplet.score)
        found.append(Detections(tuple(person for person, _ in things[0]), objects, tuple(triplets)))
    return found


def _pointed_at(x: float, y: float, objects: tuple[Found, ...]) -> Found | None:
    """The object whose middle is nearest to a point, unless one that is surer is nearly as near."""

    def log_likelihood(thing: Found) -> float:
        x0, y0, x1, y1 = thing.box
        squared = ((x0 + x1) / 2 - x) ** 2 + ((y0 + y1) / 2 - y) ** 2
        return math.log(thing.score) - squared / (2 * _PAIRING_REACH**2)

    return max(objects, key=log_likelihood, default=None)
