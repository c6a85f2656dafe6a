"""The detector of stickworld as a detector of any layouts that are worded like its scenes."""

from collections.abc import Sequence

import numpy as np
import torch

from interactdiff.evaluation.detection import DetectedPair, Instance, Picture, PictureDetections, in_pixels
from interactdiff.evaluation.sampling import reduced
from interactdiff.fingerprints import weights_digest
from interactdiff.stickworld.detector import Detector, Found


class StickworldDetector:
    """Finds persons and objects of stickworld, by the names of their kinds.

    Args:
        detector: that looks.
        name: what tables call it.
    """

    def __init__(self, detector: Detector, name: str = "stickworld"):
        self.detector, self.name, self.digest = detector, name, weights_digest(detector)

    def detect(self, pictures: Sequence[Picture]) -> list[PictureDetections]:
        """What is in each picture."""
        found = []
        for picture in pictures:  # one by one: what a batch holds changes the last bits of what is found
            image = picture.open()
            pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
            detections = self.detector.detect(reduced(pixels[None], self.detector.size))[0]
            size = image.size
            persons, objects = detections.persons, detections.objects
            pairs = tuple(
                DetectedPair(_place(persons, one.person), _place(objects, one.object), one.action, one.score)
                for one in detections.triplets
            )
            found.append(PictureDetections(size, _instances(persons, size), _instances(objects, size), pairs))
        return found


def _place(things: Sequence[Found], thing: Found) -> int:
    return next(number for number, one in enumerate(things) if one is thing)


def _instances(things: Sequence[Found], size: tuple[int, int]) -> tuple[Instance, ...]:
    return tuple(Instance(one.name, in_pixels(one.box, size), one.score) for one in things)
