"""The detector's second stage: what things look like, read off their crops."""

from typing import Any

import pytest
import torch

from interactdiff.stickworld.appearance import COLOURS
from interactdiff.stickworld.attribute_reader import OBJECT_HEADS, AttributeReader, crops, worn
from interactdiff.stickworld.detector import KINDS, Detector

TINY = (8, 8, 8, 8)


def test_crops_are_what_is_in_the_boxes() -> None:
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    images = torch.stack([torch.stack([x, y, torch.full_like(x, n)]) for n in (0.0, 7.0)])
    boxes = torch.tensor([[0.25, 0.5, 0.5, 0.75], [0.5, 0.0, 1.0, 0.5]])
    cut = crops(images, boxes, torch.tensor([1, 0]), (16, 20))
    assert cut.shape == (2, 3, 16, 20)
    assert cut[0, 2].allclose(torch.tensor(7.0))
    for n, (left, top, right, bottom) in enumerate([[16, 32, 32, 48]]):
        middle = cut[n, :2, 7:9, 9:11].mean((1, 2))
        torch.testing.assert_close(middle, torch.tensor([(left + right - 1) / 2, (top + bottom - 1) / 2]))
        width = cut[n, 0, 8, -1] - cut[n, 0, 8, 0]
        assert width == pytest.approx(1.12 * 16 * 19 / 20, rel=1e-3)  # with a margin of 6 percent a side


def test_what_a_thing_does_not_have_is_not_said() -> None:
    assert worn({"pattern": "plain", "second_colour": "blue"}) == {"pattern": "plain"}
    assert worn({"headwear": "none", "headwear_colour": "red"}) == {"headwear": "none"}
    whole = {"pattern": "star", "second_colour": "blue", "headwear": "cap", "headwear_colour": "red"}
    assert worn(whole) == whole


def test_attributes_are_read_for_each_box() -> None:
    torch.manual_seed(0)
    reader = AttributeReader(OBJECT_HEADS, (16, 16), TINY).eval()
    images = torch.rand(2, 3, 32, 32)
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.3, 0.3, 1.0, 1.0], [0.0, 0.0, 0.5, 0.5]])
    pictures = torch.tensor([0, 1, 1])
    with torch.no_grad():
        logits = reader(images, boxes, pictures)
        alone = reader(images, boxes[1:2], pictures[1:2])
        said = reader.read(images, boxes, pictures)
    assert {name: values.shape for name, values in logits.items()} == {
        "colour": (3, 6), "pattern": (3, 4), "second_colour": (3, 4),
    }  # fmt: skip
    torch.testing.assert_close(logits["pattern"][1:2], alone["pattern"])
    assert [one["colour"] for one in said] == [list(COLOURS)[n] for n in logits["colour"].argmax(1)]
    assert reader.read(images, boxes[:0], pictures[:0]) == []


def test_attributes_go_to_the_things_that_they_are_of() -> None:
    """In pictures with several persons and objects, found in the order of their scores."""
    torch.manual_seed(0)
    detector = Detector(TINY, reader_widths=TINY).eval()
    detector.heat.bias = torch.nn.Parameter(torch.zeros(len(KINDS)))  # something is everywhere
    images = torch.rand(3, 3, 128, 128)
    found = detector.detect(images)
    readers: Any = detector.readers
    assert sum(len(picture.persons) for picture in found) > 3
    for n, picture in enumerate(found):
        for things, reader in zip((picture.persons, picture.objects), readers, strict=True):
            for thing in things:
                boxes = torch.tensor([thing.box])
                with torch.no_grad():
                    (alone,) = reader.read(images, boxes, torch.tensor([n]))
                assert {"colour": thing.colour, **thing.attributes} == alone
