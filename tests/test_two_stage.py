"""Detectors in two stages, with transformers' own classes at tiny sizes."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_detectors as tiny
import torch
from data_files import export_scenes
from PIL import Image
from transformers import CLIPTokenizer

from interactdiff.cli import main
from interactdiff.errors import ModelError
from interactdiff.evaluation.calibration import calibrate, fitted_scale
from interactdiff.evaluation.detection import Instance, Picture
from interactdiff.evaluation.hoi_classes import ClassTable
from interactdiff.evaluation.layout_data import open_data
from interactdiff.evaluation.model_loading import load_box_detector, load_contrastive, load_verb_scorer
from interactdiff.evaluation.sampling import held_out_scenes
from interactdiff.evaluation.two_stage import Candidate, ClosedBoxes, PhraseBoxes, TwoStageDetector
from interactdiff.evaluation.verb_scorers import (
    AskedVerbs,
    ContrastiveVerbs,
    VisionLanguage,
    union_crop,
    verb_sentence,
    with_boxes,
)

NAMES = ("person", "bike", "dog")
CANDIDATE = Candidate((1, 1, 20, 40), (10, 10, 60, 40), "bike")
VERBS = {"bike": ("riding", "pushing")}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def box_detector(kind: str, tmp_path: Path, tokenizer: CLIPTokenizer) -> Any:
    if kind == "owl":
        return PhraseBoxes(*tiny.owl(tokenizer), at_once=2)
    if kind == "grounding_dino":
        return PhraseBoxes(*tiny.grounding_dino(tmp_path))
    return ClosedBoxes(*getattr(tiny, kind)())


@pytest.mark.parametrize("kind", ["detr", "rt_detr", "d_fine", "grounding_dino", "owl"])
def test_boxes_are_of_the_names_wanted_and_in_the_picture(
    kind: str, tmp_path: Path, tokenizer: CLIPTokenizer, image: Image.Image
) -> None:
    detector = box_detector(kind, tmp_path, tokenizer)
    all_names = detector.boxes([image], NAMES)[0]
    assert all_names
    for one in all_names:
        x0, y0, x1, y1 = one.box
        assert one.name in NAMES
        assert 0 <= x0 < x1 <= 64
        assert 0 <= y0 < y1 <= 48
        assert 0 <= one.score <= 1
    if kind not in ("grounding_dino", "owl"):  # these are asked other words, and see other things
        some = detector.boxes([image], ("bike",))[0]
        assert some == [one for one in all_names if one.name == "bike"]


def test_boxes_are_the_models_own(image: Image.Image) -> None:
    model, processor = tiny.detr()
    found = ClosedBoxes(model, processor).boxes([image], NAMES)[0]
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt"))
    scores, labels = outputs.logits[0].softmax(-1)[:, :-1].max(-1)
    x, y, w, h = outputs.pred_boxes[0].unbind(-1)
    corners = torch.stack([(x - w / 2) * 64, (y - h / 2) * 48, (x + w / 2) * 64, (y + h / 2) * 48], 1)
    assert [one.name for one in found] == [tiny.LABELS[n] for n in labels.tolist()]
    assert [one.score for one in found] == pytest.approx(scores.tolist())
    for one, box in zip(found, corners.tolist(), strict=True):
        assert one.box == pytest.approx(box, abs=1e-4)
    with pytest.raises(ModelError, match=r"expected a model of kite \.\.\., got one of person, bike, dog"):
        ClosedBoxes(model, processor).boxes([image], ("kite",))


def test_phrases_are_told_by_their_own_words(tmp_path: Path, image: Image.Image) -> None:
    model, processor = tiny.grounding_dino(tmp_path)
    found = PhraseBoxes(model, processor).boxes([image], ("red bike", "dog"))[0]
    inputs = processor(images=[image], text=["red bike. dog."], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0].sigmoid()
    # [CLS] red bike . dog . [SEP]
    bike, dog = logits[:, 1:3].amax(1), logits[:, 4]
    assert [one.name for one in found] == [
        "red bike" if a >= b else "dog" for a, b in zip(bike, dog, strict=True)
    ]
    assert [one.score for one in found] == pytest.approx(torch.maximum(bike, dog).tolist())
    with pytest.raises(ModelError, match="expected names without full stops"):
        PhraseBoxes(model, processor).boxes([image], ("dog", "."))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_verbs_are_a_softmax_over_what_the_object_can_have(
    kind: str, tokenizer: CLIPTokenizer, image: Image.Image
) -> None:
    model, processor = getattr(tiny, kind)(tokenizer)
    scorer = ContrastiveVerbs(model, processor)
    (found,) = scorer.verbs(image, [CANDIDATE], VERBS)
    sentences = [verb_sentence(verb, "bike") for verb in VERBS["bike"]]
    crop = union_crop(image, CANDIDATE.person, CANDIDATE.object)
    padding = "max_length" if kind == "siglip" else True
    inputs = processor(images=crop, text=sentences, padding=padding, truncation=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits_per_image[0]
    if kind == "siglip":
        logits = logits - model.logit_bias
    assert list(found.values()) == pytest.approx(logits.softmax(0).tolist(), abs=1e-5)
    assert scorer.verbs(image, [CANDIDATE, CANDIDATE], VERBS) == [pytest.approx(found)] * 2


def test_the_crop_holds_both_boxes_and_a_margin(image: Image.Image) -> None:
    assert union_crop(image, (10, 10, 20, 20), (20, 20, 30, 30)).size == (24, 24)
    assert union_crop(image, (0, 0, 64, 48), (0, 0, 1, 1)).size == (64, 48)
    assert verb_sentence("riding", "elephant") == "a person riding an elephant"


def test_a_language_model_is_asked_yes_or_no(tmp_path: Path, image: Image.Image) -> None:
    model, processor = tiny.llava(tmp_path)
    asked = VisionLanguage(model, processor, "tiny", most_tokens=3)
    (found,) = AskedVerbs(asked).verbs(image, [CANDIDATE], VERBS)
    marked = with_boxes(image, CANDIDATE.person, CANDIDATE.object)
    assert marked.getpixel((1, 5)) == (255, 0, 0)
    assert marked.getpixel((60, 20)) == (0, 0, 255)
    text = "<image> Is the person in the red box riding the bike in the blue box? Answer yes or no."
    with torch.no_grad():
        logits = model(**processor(images=[marked], text=[text], return_tensors="pt")).logits[0, -1]
    yes, no = (logits[processor.tokenizer.convert_tokens_to_ids(word)].exp() for word in ("yes", "no"))
    assert found["riding"] == pytest.approx(float(yes / (yes + no)), abs=1e-5)
    assert list(found) == ["riding", "pushing"]
    assert 0 < len(asked.answer(image, "Is the person in red box ?").split()) <= 3
    processor.tokenizer.add_tokens(["maybe"])
    assert asked.yes(marked, "Is the bike red ?") > 0


@dataclass
class KnownBoxes:
    """Boxes that are known."""

    found: list[Instance]
    name: str = "known"
    digest: str = ""

    def boxes(self, images: Sequence[Image.Image], names: Sequence[str]) -> list[list[Instance]]:
        return [[one for one in self.found if one.name in names] for _ in images]


@dataclass
class KnownVerbs:
    """The first verb is likelier the further left the object is."""

    name: str = "left"
    digest: str = ""

    def verbs(
        self, image: Image.Image, candidates: Sequence[Candidate], verbs_of: Mapping[str, Sequence[str]]
    ) -> list[dict[str, float]]:
        likely = [1 - one.object[0] / image.width for one in candidates]
        return [
            dict.fromkeys(verbs_of[one.name], 0.1) | {verbs_of[one.name][0]: share}
            for one, share in zip(candidates, likely, strict=True)
        ]


TABLE = ClassTable("own", (("hugging", "person"), ("pushing", "bike"), ("riding", "bike")))


def test_pairs_are_scored_as_upt_does(tmp_path: Path, image: Image.Image) -> None:
    image.save(tmp_path / "a.png")
    boxes = [
        Instance("person", (0, 0, 10, 10), 0.9),
        Instance("person", (20, 0, 30, 10), 0.5),
        Instance("bike", (16, 0, 32, 10), 0.8),
        Instance("kite", (0, 0, 5, 5), 1.0),
        *(Instance("bike", (n, 0, 40, 40), 0.01) for n in range(20)),
    ]
    detector = TwoStageDetector(KnownBoxes(boxes), KnownVerbs(), TABLE)
    (found,) = detector.detect([Picture("a.png", tmp_path / "a.png")])
    assert found.size == (64, 48)
    assert detector.name == "known + left, l = 2.8"
    assert [one.score for one in found.persons] == [0.9, 0.5]
    assert [one.name for one in found.objects] == ["person", "bike", "person"]  # over 0.05; three at least
    said = {(p.person, p.object, p.verb): p.score for p in found.pairs}
    assert set(said) == {
        *((p, 1, verb) for p in (0, 1) for verb in ("pushing", "riding")),
        (0, 2, "hugging"),
        (1, 0, "hugging"),
    }
    assert said[0, 1, "pushing"] == pytest.approx((0.9 * 0.8) ** 2.8 * 0.75)
    assert said[0, 1, "riding"] == pytest.approx((0.9 * 0.8) ** 2.8 * 0.1)
    assert [p.score for p in found.pairs] == sorted(said.values(), reverse=True)
    scaled = TwoStageDetector(KnownBoxes(boxes), KnownVerbs(), TABLE, exponent=0, scale=(2.0, 1.0))
    (again,) = scaled.detect([Picture("a.png", tmp_path / "a.png")])
    best = next(p for p in again.pairs if (p.person, p.object, p.verb) == (0, 1, "pushing"))
    assert best.score == pytest.approx(1 / (1 + math.exp(-(2 * math.log(3) + 1))))
    many = TwoStageDetector(
        KnownBoxes([Instance("bike", (n, 0, 40, 40), 0.5) for n in range(20)]), KnownVerbs(), TABLE
    )
    assert len(many.detect([Picture("a.png", tmp_path / "a.png")])[0].objects) == 15


def test_a_scale_is_found_that_makes_probabilities_come_true() -> None:
    rng = np.random.default_rng(0)
    said = rng.uniform(0.02, 0.98, 20_000)
    true = rng.random(20_000) < 1 / (1 + np.exp(-(0.5 * np.log(said / (1 - said)) - 1)))
    assert fitted_scale(list(zip(said.tolist(), true.tolist(), strict=True))) == pytest.approx(
        (0.5, -1), abs=0.1
    )


@dataclass
class Knowing:
    """Knows the verbs of a world by the boxes, or always says the first."""

    truth: dict[tuple[float, ...], str]
    name: str = "knowing"
    digest: str = ""

    def verbs(
        self, image: Image.Image, candidates: Sequence[Candidate], verbs_of: Mapping[str, Sequence[str]]
    ) -> list[dict[str, float]]:
        return [
            {verb: 0.9 if verb == self.truth.get(one.person) else 0.1 for verb in verbs_of[one.name]}
            for one in candidates
        ]


def test_calibration_tells_who_knows_from_who_does_not(tmp_path: Path) -> None:
    export_scenes(tmp_path / "test", held_out_scenes(40, 0), 32)
    data = open_data(str(tmp_path))
    truth = {
        tuple(edge * 32 for edge in one.subject_box): one.action or ""
        for layout in data.layouts
        for one in layout.interactions
    }
    knows, not_at_all = (calibrate(Knowing(of), data) for of in (truth, {}))
    assert (knows["accuracy"], knows["auc"]) == (1.0, 1.0)
    assert not_at_all["auc"] == 0.5
    assert 0 < not_at_all["accuracy"] < 1
    assert knows["pairs"] == not_at_all["pairs"] > 20
    for picture in (tmp_path / "test").glob("*.png"):
        picture.unlink()
    with pytest.raises(ModelError, match="expected real pictures in"):
        calibrate(Knowing({}), open_data(str(tmp_path)))


def test_models_are_loaded_from_folders_and_score_layouts(
    tmp_path: Path,
    tokenizer: CLIPTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, parts in (("detr", tiny.detr()), ("clip", tiny.clip(tokenizer))):
        for part in parts:
            part.save_pretrained(tmp_path / name)
    export_scenes(tmp_path / "data/test", held_out_scenes(12, 0), 32)
    command = ["evaluate", "--data", "data", "--detector", "two-stage:detr,clip", "--json", "t.json"]
    command += ["--scores", "miou", "clip", "--box-model", "detr", "--clip-model", "clip", "--device", "cpu"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "verbs at the true boxes of" in shown
    assert "| CLIP | CLIP, local | mean IoU | IoU over 0.5 |" in shown
    table = json.loads(Path("t.json").read_text())
    assert table["detector"] == "detr + clip, l = 2.8"
    assert set(table["rows"]) == {"real"}
    assert 0 <= table["calibration"]["auc"] <= 1
    assert {"clip", "clip_local", "miou", "miou_50"} <= set(table["intervals"]["real"])
    assert isinstance(load_verb_scorer("clip", CPU), ContrastiveVerbs)
    with pytest.raises(ModelError, match="expected CLIP or SigLIP at detr, got detr"):
        load_contrastive("detr", CPU)
    with pytest.raises(ModelError, match="expected a model of transformers at none/here, got "):
        load_box_detector("none/here", CPU)
