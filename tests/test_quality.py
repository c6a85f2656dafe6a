"""Image quality, boxes and relations against other implementations and cases known by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_detectors as tiny
import torch
from data_files import export_scenes
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import CLIPTokenizer

from interactdiff.errors import DataError, ModelError
from interactdiff.evaluation import measures
from interactdiff.evaluation.box_scores import (
    ap50,
    box_ious,
    mean_iou,
    relation_score,
    wanted_boxes,
)
from interactdiff.evaluation.detection import Instance, Picture
from interactdiff.evaluation.layout import Layout
from interactdiff.evaluation.layout_data import open_data
from interactdiff.evaluation.layout_detection import PictureSet
from interactdiff.evaluation.quality import (
    check_alike,
    clip_scores,
    features_of,
    fid,
    inception_features,
    kid,
)
from interactdiff.evaluation.sampling import held_out_scenes
from interactdiff.evaluation.verb_scorers import ContrastiveVerbs
from interactdiff.scene import Entity, Interaction

COUNT = 40


class Features(nn.Module):
    """Eight features of a picture: means of patches."""

    num_features = 8

    def forward(self, pictures: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(pictures.float() / 255, (2, 4))[:, 0].flatten(1)


@pytest.fixture(scope="module")
def two_sides(tmp_path_factory: pytest.TempPathFactory) -> list[list[Picture]]:
    folder = tmp_path_factory.mktemp("sides")
    rng = np.random.default_rng(0)
    sides = []
    for side, brightest in enumerate((255, 200)):
        pictures = []
        for number in range(COUNT):
            path = folder / f"{side}-{number}.png"
            Image.fromarray(rng.integers(0, brightest, (16, 16, 3), dtype=np.uint8)).save(path)
            pictures.append(Picture(path.name, path))
        sides.append(pictures)
    return sides


def pixels(pictures: list[Picture]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(one.open()) for one in pictures])).permute(0, 3, 1, 2)


@pytest.mark.filterwarnings("ignore")
def test_fid_and_kid_are_torchmetrics(two_sides: list[list[Picture]]) -> None:
    real, drawn = (features_of(side, Features()) for side in two_sides)
    assert real.shape == (COUNT, 8)
    assert vars(two_sides[0][0]).keys() == {"file_name", "source", "size"}  # no pixels are kept
    for metric, ours in (
        (FrechetInceptionDistance(Features()), fid(drawn, real)),
        (KernelInceptionDistance(Features(), subsets=1, subset_size=COUNT), kid(drawn, real, COUNT, 1)),
    ):
        metric.update(pixels(two_sides[0]), real=True)
        metric.update(pixels(two_sides[1]), real=False)
        value: Any = metric.compute()
        theirs = float(value[0] if isinstance(value, tuple) else value)
        assert ours == pytest.approx(theirs, rel=1e-3)
        assert ours > 0
    assert fid(real, real) == pytest.approx(0, abs=1e-6)


def test_too_few_pictures_are_refused_or_warned_of(two_sides: list[list[Picture]]) -> None:
    features = features_of(two_sides[0], Features())
    with pytest.raises(DataError, match="expected at least 1000 pictures for KID, got 40"):
        kid(features, features)
    with pytest.warns(UserWarning, match="FID of 40 pictures: below 5000 it is too high"):
        fid(features, features)


def test_sides_that_differ_are_refused(two_sides: list[list[Picture]], tmp_path: Path) -> None:
    real, _ = two_sides
    check_alike(real, real)
    larger, jpeg = [], []
    for one in real:
        one.open().resize((32, 32)).save(tmp_path / one.file_name)
        larger.append(Picture(one.file_name, tmp_path / one.file_name))
        one.open().save((tmp_path / one.file_name).with_suffix(".jpg"))
        jpeg.append(Picture(one.file_name, (tmp_path / one.file_name).with_suffix(".jpg")))
    for other, message in (
        (real[1:], "expected as many pictures on both sides, got 40 and 39"),
        (larger, "got 16 x 16 px, lossless and 32 x 32 px, lossless"),
        (jpeg, "got 16 x 16 px, lossless and 16 x 16 px, JPEG"),
        ([*real[1:], larger[0]], "expected pictures of one size and format"),
    ):
        with pytest.raises(DataError, match=message):
            check_alike(real, other)
    check_alike([Picture(one.file_name, one.source, (16, 16)) for one in larger], real)


def test_an_absent_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity.utils", None)
    with pytest.raises(ModelError, match=r"expected torch-fidelity for FID and KID, got none: pip install"):
        inception_features(torch.device("cpu"))
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.coco", None)
    with pytest.raises(ModelError, match=r"expected pycocotools for AP50, got none: pip install"):
        ap50(Known({}), [], [])
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(ModelError, match=r"expected scipy for mean IoU, got none: pip install"):
        box_ious([], [])


def test_clip_scores_are_the_models_own(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    model, processor = tiny.clip(tokenizer)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    layout = Layout("a.png", "a dog", (), (Entity("ball", (0, 0, 0.5, 0.5)), Entity("cat", (0.5, 0, 1, 1))))
    scores = clip_scores(ContrastiveVerbs(model, processor), [Picture("a.png", tmp_path / "a.png")], [layout])
    crops = [image, image.crop((0, 0, 20, 20)), image.crop((20, 0, 40, 40))]
    inputs = processor(images=crops, text=["a dog", "ball", "cat"], padding=True, return_tensors="pt")
    with torch.no_grad():
        cosines = (model(**inputs).logits_per_image / model.logit_scale.exp()).diagonal().clamp(min=0)
    once = np.ones((1, 1))
    assert scores["clip"].value(once)[0] == pytest.approx(float(cosines[0]), abs=1e-5)
    assert scores["clip_local"].value(once)[0] == pytest.approx(float(cosines[1:].mean()), abs=1e-5)


class Known:
    """Boxes that are known by the picture's colour, a letter's number."""

    name = "known"

    def __init__(self, found: dict[str, list[Instance]]):
        self.found = found

    def boxes(self, images: Any, names: Any) -> list[list[Instance]]:
        return [
            [one for one in self.found.get(chr(image.getpixel((0, 0))[0]), []) if one.name in names]
            for image in images
        ]


def layout_and_picture(tmp_path: Path, name: str = "a") -> tuple[Layout, Picture]:
    ride = Interaction("person", "riding", "bike", (0, 0, 0.4, 0.4), (0.5, 0, 1, 0.4))
    push = Interaction("person", "pushing", "bike", (0, 0, 0.4, 0.42), (0.5, 0, 1, 0.4))
    layout = Layout(f"{name}.png", "", (ride, push), (Entity("bike", (0, 0.5, 0.4, 0.9)),))
    picture = Picture(layout.file_name, tmp_path / layout.file_name)
    Image.new("RGB", (100, 100), 3 * (ord(name),)).save(tmp_path / layout.file_name)
    return layout, picture


def test_boxes_are_matched_one_to_one_within_a_name(tmp_path: Path) -> None:
    layout, picture = layout_and_picture(tmp_path)
    wanted = wanted_boxes(layout, (100, 100))
    assert wanted == [  # the person of both verbs is one, and so is the bike
        ("person", (0, 0, 40, 40)),
        ("bike", (50, 0, 100, 40)),
        ("bike", (0, 50, 40, 90)),
    ]
    found = [
        Instance("person", (0, 0, 40, 20), 0.9),
        Instance("bike", (50, 0, 100, 40), 0.9),
        Instance("bike", (50, 0, 100, 40), 0.1),  # not sure enough
        Instance("dog", (0, 50, 40, 90), 0.9),
    ]
    assert box_ious(wanted, found) == pytest.approx([0.5, 1, 0])
    scores = mean_iou(Known({"a": found}), [picture], [layout])
    once = np.ones((1, 1))
    assert scores["miou"].value(once)[0] == pytest.approx(0.5)
    assert scores["miou_50"].value(once)[0] == pytest.approx(1 / 3)


def test_ap50_by_hand(tmp_path: Path) -> None:
    (first, a), (second, b) = layout_and_picture(tmp_path), layout_and_picture(tmp_path, "b")
    right = [Instance(name, box, 0.9) for name, box in wanted_boxes(first, (100, 100))]
    assert ap50(Known({"a": right, "b": right}), [a, b], [first, second]) == pytest.approx(1)
    # persons of one picture of two: recalls up to 1/2 of 101 points; bikes likewise, behind a wrong surer one
    wrong = Instance("bike", (0, 0, 5, 5), 0.95)
    half = ap50(Known({"a": [*right, wrong]}), [a, b], [first, second])
    assert half == pytest.approx((51 / 101 + 51 / 101 * 2 / 3) / 2)
    assert ap50(Known({}), [a, b], [first, second]) == 0


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("1: yes\n2: no", 1 / 2),
        ("1. Yes.\n2) YES", 1),
        ("1: yes", 1 / 2),
        ("yes", 0),
        ("1: no\n1: yes\n2: yesterday", 0),
        ("3: yes", 0),
    ],
)
def test_relations_that_are_not_answered_are_not_shown(tmp_path: Path, said: str, expected: float) -> None:
    layout, picture = layout_and_picture(tmp_path)
    asked = []

    def answer(image: Image.Image, question: str) -> str:
        asked.append(question)
        return said

    none = Layout("b.png", "", (), ())
    score = relation_score(answer, [picture, picture], [layout, none])
    assert score.value(np.ones((1, 2)))[0] == expected
    (question,) = asked
    assert "1. the person at [0, 0, 400, 400] is riding the bike at [500, 0, 1000, 400]" in question


@pytest.mark.filterwarnings("ignore:FID of")
def test_measures_are_of_all_seeds_and_leave_the_ceiling_out(tmp_path: Path) -> None:
    export_scenes(tmp_path / "test", held_out_scenes(6, 0), 24)
    data = open_data(str(tmp_path))

    def pictures(row: str, seed: int, folder: str = "test") -> PictureSet:
        return PictureSet(
            row, seed, lambda layout: Picture(layout.file_name, tmp_path / folder / layout.file_name)
        )

    export_scenes(tmp_path / "others", held_out_scenes(6, 1), 24)
    measure = measures.distances({"fid"}, data, None, Features())
    assert measure(data.layouts, [pictures("real", 0)]).plain == {}
    same = measure(data.layouts, [pictures("adapter", 1)]).plain["fid"]
    other = measure(data.layouts, [pictures("adapter", 1, "others")]).plain["fid"]
    both = measure(data.layouts, [pictures("adapter", 1), pictures("adapter", 2, "others")]).plain["fid"]
    assert same == pytest.approx(0, abs=1e-6)
    assert both == pytest.approx((same + other) / 2)
    with pytest.raises(DataError, match="expected at least 1000 pictures for KID, got 6"):
        measures.distances({"fid", "kid"}, data, None, Features())  # before anything is drawn
    answers = iter(["1: yes\n2: yes\n3: yes"] * 6 + ["no"] * 6)
    relations = measures.relations(lambda image, question: next(answers, "no"))
    shares = relations(data.layouts, [pictures("adapter", 1), pictures("adapter", 2)]).shares["relations"]
    total = sum(len(layout.interactions) for layout in data.layouts)
    assert shares.total.sum() == 2 * total
    assert 0 < shares.hits.sum() <= 2 * total
