"""Detectors of interactions in two stages, of models that transformers has: boxes first, then verbs.

Boxes by DETR, RT-DETR, D-FINE, Deformable DETR (COCO's names) or GroundingDINO, OWLv2 (any names). A pair's
score is s_h^l s_o^l s_v as in UPT and PViC (Zhang et al., 2022 and 2023), with their thresholds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image

from interactdiff.data.classes import SUBJECT
from interactdiff.errors import ModelError
from interactdiff.evaluation.detection import (
    DetectedPair,
    Instance,
    Picture,
    PictureDetections,
    PixelBox,
)
from interactdiff.evaluation.hoi_classes import ClassTable
from interactdiff.fingerprints import weights_digest

LEAST_SCORE = 0.05  # of a box
FEWEST, MOST = 3, 15  # persons, and objects, that are kept whatever their scores, and at most
EXPONENT = 2.8  # l, of DETR; PViC has 1.7 for H-DETR


class BoxDetector(Protocol):
    """Finds instances of named kinds."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def digest(self) -> str:
        """Of its weights."""
        ...

    def boxes(self, images: Sequence[Image.Image], names: Sequence[str]) -> list[list[Instance]]:
        """What of these kinds is in each picture, in its pixels."""
        ...


@dataclass(frozen=True)
class Candidate:
    """A person and an object of which a verb is wanted; boxes in pixels."""

    person: PixelBox
    object: PixelBox
    name: str


class VerbScorer(Protocol):
    """Says how likely each verb is of a person and an object."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def digest(self) -> str:
        """Of its weights."""
        ...

    def verbs(
        self, image: Image.Image, candidates: Sequence[Candidate], verbs_of: Mapping[str, Sequence[str]]
    ) -> list[dict[str, float]]:
        """For each candidate, a probability of each verb that its object can have."""
        ...


def on_device(inputs: Any, model: Any) -> dict[str, Any]:
    """A processor's output on the model's device, numbers with fractions in its dtype."""
    return {
        name: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor)
    }


def _instances(result: Mapping[str, Any], labels: Sequence[str], size: tuple[int, int]) -> list[Instance]:
    width, height = size
    found = []
    for name, score, box in zip(labels, result["scores"].tolist(), result["boxes"].tolist(), strict=True):
        x0, x1 = (min(max(edge, 0.0), width) for edge in (box[0], box[2]))
        y0, y1 = (min(max(edge, 0.0), height) for edge in (box[1], box[3]))
        if x0 < x1 and y0 < y1:
            found.append(Instance(name, (x0, y0, x1, y1), score))
    return found


def _target_sizes(images: Sequence[Image.Image]) -> list[tuple[int, int]]:
    return [(image.height, image.width) for image in images]


@dataclass
class ClosedBoxes:
    """Boxes of the kinds that a model was trained on, by DETR and its relatives.

    Attributes:
        model: with `config.id2label`.
        processor: of its pictures.
        name: what tables call it.
    """

    model: Any
    processor: Any
    name: str = "detr"

    @property
    def digest(self) -> str:
        """Of the model's weights."""
        return weights_digest(self.model)

    @torch.no_grad()
    def boxes(self, images: Sequence[Image.Image], names: Sequence[str]) -> list[list[Instance]]:
        """What of these kinds is in each picture.

        Raises:
            ModelError: the model knows none of the kinds.
        """
        labels = {number: _plain(label) for number, label in self.model.config.id2label.items()}
        if not set(labels.values()) & set(names):
            known = ", ".join(list(labels.values())[:5])
            raise ModelError(f"expected a model of {', '.join(names[:5])} ..., got one of {known} ...")
        outputs = self.model(
            **on_device(self.processor(images=list(images), return_tensors="pt"), self.model)
        )
        results = self.processor.post_process_object_detection(
            outputs, threshold=0.0, target_sizes=_target_sizes(images)
        )
        found = [
            _instances(result, [labels[n] for n in result["labels"].tolist()], image.size)
            for result, image in zip(results, images, strict=True)
        ]
        return [[one for one in of_picture if one.name in names] for of_picture in found]


# COCO's names in the words of HICO-DET, where checkpoints have others.
_SYNONYMS = {
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "hair dryer": "hair drier",
}


def _plain(label: str) -> str:
    label = label.replace("_", " ").lower()
    return _SYNONYMS.get(label, label)


@dataclass
class PhraseBoxes:
    """Boxes of any kinds that are named, by GroundingDINO, MM-GroundingDINO or OWLv2.

    Attributes:
        model: of transformers' `AutoModelForZeroShotObjectDetection`.
        processor: of pictures and words.
        name: what tables call it.
        at_once: names in one call, since text encoders take so many words and no more.
    """

    model: Any
    processor: Any
    name: str = "grounding-dino"
    at_once: int = 20

    @property
    def digest(self) -> str:
        """Of the model's weights."""
        return weights_digest(self.model)

    @torch.no_grad()
    def boxes(self, images: Sequence[Image.Image], names: Sequence[str]) -> list[list[Instance]]:
        """What of these kinds is in each picture."""
        found: list[list[Instance]] = [[] for _ in images]
        for first in range(0, len(names), self.at_once):
            some = list(names[first : first + self.at_once])
            for place, instances in enumerate(self._some(images, some)):
                found[place] += instances
        return found

    def _some(self, images: Sequence[Image.Image], names: list[str]) -> list[list[Instance]]:
        owl = self.model.config.model_type.startswith("owl")
        text: Any = [[f"a photo of a {name}" for name in names]] if owl else [". ".join(names) + "."]
        padding = "max_length" if owl else True  # OWL's text encoder takes full rows alone
        inputs = self.processor(
            images=list(images),
            text=text * len(images),
            padding=padding,
            truncation=True,
            return_tensors="pt",
        )
        outputs = self.model(**on_device(inputs, self.model))
        sizes = _target_sizes(images)
        if not owl:
            return _phrase_instances(outputs, inputs["input_ids"], self.processor.tokenizer, names, images)
        results = self.processor.post_process_grounded_object_detection(
            outputs, threshold=0.0, target_sizes=sizes, text_labels=[names] * len(images)
        )
        return [
            _instances(result, result["text_labels"], image.size)
            for result, image in zip(results, images, strict=True)
        ]


def _phrase_instances(
    outputs: Any, tokens: torch.Tensor, tokenizer: Any, names: Sequence[str], images: Sequence[Image.Image]
) -> list[list[Instance]]:
    """GroundingDINO's boxes, each of the name whose words it is surest of.

    transformers would put together a label of all words above a threshold, of several names or of none.
    """
    stop = tokenizer.convert_tokens_to_ids(".")
    of_name: list[list[int]] = [[]]
    for place, token in enumerate(tokens[0].tolist()):
        if token == stop:
            of_name.append([])
        elif token not in tokenizer.all_special_ids:
            of_name[-1].append(place)
    of_name = of_name[: len(names)]
    if len(of_name) < len(names) or not all(of_name):
        raise ModelError(f"expected names without full stops, not too many, got {', '.join(names)}")
    probabilities = outputs.logits.float().sigmoid()
    scores = torch.stack([probabilities[..., places].amax(-1) for places in of_name], -1)
    best, labels = scores.max(-1)
    middle, sides = outputs.pred_boxes.float().chunk(2, -1)
    corners = torch.cat([middle - sides / 2, middle + sides / 2], -1)
    found = []
    for number, image in enumerate(images):
        pixels = corners[number] * corners.new_tensor([*image.size, *image.size])
        numbers: list[int] = labels[number].tolist()
        chosen = [names[label] for label in numbers]
        found.append(_instances({"scores": best[number], "boxes": pixels}, chosen, image.size))
    return found


@dataclass
class TwoStageDetector:
    """Boxes, then verbs of every person with every object, as a `HoiDetector`.

    Attributes:
        box_detector: finds persons and objects.
        verb_scorer: says what they do.
        table: the classes.
        exponent: l, of box scores.
        scale: of the verbs' logits, and what is added to them, see `calibration`.
    """

    box_detector: BoxDetector
    verb_scorer: VerbScorer
    table: ClassTable
    exponent: float = EXPONENT
    scale: tuple[float, float] = (1.0, 0.0)
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.names = tuple(dict.fromkeys((SUBJECT, *self.table.verbs_of)))

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.box_detector.name} + {self.verb_scorer.name}, l = {self.exponent:g}"

    @property
    def digest(self) -> str:
        """Of both models' weights."""
        return f"{self.box_detector.digest}-{self.verb_scorer.digest}"

    def detect(self, pictures: Sequence[Picture]) -> list[PictureDetections]:
        """What is in each picture; one at a time, so that nothing depends on what is looked at together."""
        return [self._one(picture.open()) for picture in pictures]

    def _one(self, image: Image.Image) -> PictureDetections:
        found = self.box_detector.boxes([image], self.names)[0]
        persons = _kept([one for one in found if one.name == SUBJECT])
        objects = _kept([one for one in found if one.name in self.table.verbs_of])
        places = [
            (p, o) for p, person in enumerate(persons) for o, thing in enumerate(objects) if thing != person
        ]
        candidates = [Candidate(persons[p].box, objects[o].box, objects[o].name) for p, o in places]
        verbs = self.verb_scorer.verbs(image, candidates, self.table.verbs_of) if candidates else []
        pairs = [
            DetectedPair(
                p, o, verb, (persons[p].score * objects[o].score) ** self.exponent * self.calibrated(score)
            )
            for (p, o), of_pair in zip(places, verbs, strict=True)
            for verb, score in of_pair.items()
        ]
        pairs.sort(key=lambda pair: -pair.score)
        return PictureDetections(image.size, persons, objects, tuple(pairs))

    def calibrated(self, probability: float) -> float:
        """A verb's probability after `scale`."""
        a, b = self.scale
        clipped = min(max(probability, 1e-6), 1 - 1e-6)
        return 1 / (1 + math.exp(-(a * math.log(clipped / (1 - clipped)) + b)))


def _kept(found: Sequence[Instance]) -> tuple[Instance, ...]:
    """Those that are sure, but not too few nor too many."""
    order = sorted(found, key=lambda one: -one.score)
    sure = sum(one.score >= LEAST_SCORE for one in order)
    return tuple(order[: min(max(sure, FEWEST), MOST)])
