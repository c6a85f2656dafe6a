"""Scores of subjects and concepts on stickworld: the scenes, what counts, and the commands."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from world_truth import perfect

from interactdiff import attach
from interactdiff.cli import main
from interactdiff.concept import ConceptError, LearnOptions, NotFoundError
from interactdiff.errors import AdapterError, SceneError
from interactdiff.evaluation import concepts, subjects
from interactdiff.evaluation.likeness import (
    PERSON,
    Counts,
    Known,
    acting_scene,
    background_of,
    lone_scene,
    prompt_of,
    sample_known,
)
from interactdiff.evaluation.sampling import render_scenes
from interactdiff.evaluation.table import chosen_rows, format_scores
from interactdiff.generation import ScenePipeline
from interactdiff.method_specs import EvaluationOptions
from interactdiff.stickworld.appearance import Appearance
from interactdiff.stickworld.detector import Detections, Detector, Found
from interactdiff.stickworld.world import BACKGROUNDS, HELD_OUT
from interactdiff.subject.adapter import SubjectAdapter
from interactdiff.subject.foreground import WHOLE


def known_things(*names: str, seed: int = 0) -> list[Known]:
    rng = random.Random(seed)
    return [sample_known(name, rng) for name in names]


@pytest.fixture
def detector(tmp_path: Path) -> str:
    """A folder with a detector of random weights that reads attributes."""
    torch.manual_seed(0)
    Detector((8, 8, 8, 8), 64, (8, 8, 8, 8)).save_pretrained(tmp_path / "detector")
    return str(tmp_path / "detector")


@pytest.mark.parametrize("names", [[PERSON], ["ball"], [PERSON, "bike"], [PERSON, "car", "dog"]])
def test_scenes_have_what_is_known_as_it_looks(names: list[str]) -> None:
    known = known_things(*names)
    for n in range(5):
        one = acting_scene(known, n, "park")
        assert (len(one.scene.triplets), one.scene.background != "park") == (1, True)
        alone = lone_scene(known, n)
        assert len(alone.scene.things) == len(known)
        for made in (one, alone):
            things = [made.scene.things[number] for number in made.numbers]
            assert [(thing.name, thing.appearance) for thing in things] == [
                (k.name, k.appearance) for k in known
            ]
        assert acting_scene(known, n, "park") == one
    assert len({acting_scene(known, n).scene.seed for n in range(5)}) == 5


def test_prompts_name_no_attribute_of_what_is_known() -> None:
    known = known_things(PERSON, "bike", "dog")
    one = acting_scene(known, 1)
    words = dict(zip(one.numbers, ("a <a>", "a <b>", "a <c>"), strict=True))
    action = one.scene.triplets[0].action
    assert prompt_of(one.scene, words).startswith(f"a <a> {action} a <b> and a <c> ")
    alone = acting_scene(known[:1], 2)
    text = prompt_of(alone.scene, {0: "a person"})
    assert text.startswith(f"a person {alone.scene.triplets[0].action} ")
    assert alone.scene.triplets[0].object_colour in text


def test_backgrounds_are_told_apart_whatever_stands_before_them() -> None:
    scenes = [acting_scene([], n).scene for n in range(12)] + [lone_scene(known_things(PERSON), 3).scene]
    shown = [background_of(image) for image in render_scenes(scenes, 64)]
    assert shown == [scene.background for scene in scenes]
    assert len(set(shown)) == len(BACKGROUNDS)


def count_of_concepts(photo: Any, found: Any, scored: Any = None) -> dict[str, float]:
    counts = Counts(1)
    for chosen, one in photo.wanted:
        image = render_scenes([scored or one.scene], 64)[0]
        concepts._count(counts, 0, photo, chosen, one, image, found(chosen, one))
    return counts.scores(0)[0]


def test_perfect_pictures_of_concepts_have_perfect_scores() -> None:
    photo = concepts._photo(1, 0, 64)
    assert [len(chosen) for chosen, _ in photo.wanted] == [1] * 12 + [3] * 4
    right = count_of_concepts(photo, lambda chosen, one: perfect(one.scene))
    assert (right["identity"], right["text_acc"]) == (1, 1)
    assert right["leakage"] == 0
    nothing = count_of_concepts(photo, lambda chosen, one: Detections((), (), ()))
    assert (nothing["identity"], nothing["text_acc"]) == (0, 0.5)  # the background is right


def test_what_comes_over_from_a_photo_is_leakage() -> None:
    """Every object looks like the photo's first one, before the photo's background."""
    photo = concepts._photo(1, 0, 64)

    def alike(chosen: Any, one: Any) -> Detections:
        found = perfect(one.scene)
        look: Appearance = photo.known[1].appearance
        others = {k: v for k, v in look.attributes().items() if k != "colour"}
        objects = tuple(Found(o.name, o.box, look.colour, 1.0, None, others) for o in found.objects)
        return Detections(found.persons, objects, ())

    person = known_things(PERSON)
    there = next(s for n in range(99) if (s := lone_scene(person, n).scene).background == photo.background)
    background = count_of_concepts(photo, lambda chosen, one: perfect(one.scene), there)
    assert background["leakage"] > 0
    assert background["text_acc"] == 0.5
    leaked = count_of_concepts(photo, alike)
    assert leaked["leakage"] > 0.05
    assert leaked["identity"] < 1


def test_masks_are_compared_with_the_renderer_s() -> None:
    photo = concepts._photo(0, 0, 64)
    counts = Counts(1)
    concepts._count_masks(counts, 0, photo, photo.masks)
    assert counts.scores(0)[0]["mask_iou"] == 1
    halved = {token: mask[::2, ::2] for token, mask in photo.masks.items()}
    concepts._count_masks(counts, 0, photo, halved)
    assert counts.scores(0)[0]["mask_iou"] > 0.9
    concepts._count_masks(counts, 0, photo, {})
    assert counts.scores(0)[0]["mask_iou"] < 0.7


def test_a_perfect_picture_of_a_subject() -> None:
    task = subjects.subject_task(0, 0, 64)
    counts = Counts(1)
    for one in task.wanted:
        subjects._count(counts, 0, task, one, render_scenes([one.scene], 64)[0], perfect(one.scene))
    values = counts.scores(0)[0]
    assert all(values[name] == 1 for name in ("identity", "action_acc", "object_acc", "background_acc"))
    assert 0 <= values["copy"] < 0.9
    box = torch.tensor([0.1, 0.1, 0.6, 0.9]).tolist()
    image = torch.rand(3, 64, 64)
    assert float(subjects.structural_similarity(*(subjects._crop(image, box),) * 2)) == pytest.approx(1)


@pytest.mark.parametrize("seed", [0, 2, 2**32 - 1])
def test_all_scenes_of_subjects_are_held_out_and_of_their_own(seed: int) -> None:
    tasks = [subjects.subject_task(n, seed, 16) for n in (0, 1)]
    pairs = [subjects._pair(n, seed) for n in (0, 1)]
    scenes = [one.scene for task in tasks for one in task.wanted]
    scenes += [scene for pair in pairs for scene in (pair.wanted.scene, *pair.references)]
    assert min(scene.seed for scene in scenes) >= HELD_OUT
    assert len({scene.seed for scene in scenes}) == len(scenes) == 10
    with pytest.raises(ValueError, match="expected a number from 0 up, got -1"):
        lone_scene(pairs[0].known, -1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_settings_reach_the_rows_that_do_not_fix_them(pipe: Any) -> None:
    given = {"guidance": 3.0, "reference_weight": 8.0, "encoder_weight": 0.5, "extra_row": 0}
    given |= {"attention_without_box": 0}
    assert subjects.row_settings("attention", given) == {**given, "encoder_weight": 0, "guidance": 0}
    assert subjects.row_settings("both", given) == {**given, "guidance": 0}
    assert subjects.row_settings("guided", given) == given
    own = {"guidance": subjects.GUIDANCE, "reference_weight": 3.0, "extra_row": 1}
    assert subjects.row_settings("guided", {}) == {**own, "attention_without_box": 1}
    assert subjects.row_settings("text_full", given) == subjects.row_settings("placed", {}) == {}
    assert subjects.row_settings("placed", given) == given
    torch.manual_seed(0)
    detector, tasks = Detector((8, 8, 8, 8), 16, (8, 8, 8, 8)), [subjects.subject_task(0, 0, 16)]
    with attach(pipe, SubjectAdapter()) as handle:
        drawn = []
        for masks in (1, 0):
            options = EvaluationOptions(
                1, 0, 1, 2, size=16, settings={"reference_weight": 8.0, "masks": masks}
            )
            subjects._row("attention", tasks, ScenePipeline(pipe, handle, "tiny"), detector, options)
            assert handle["subject"].settings["reference_weight"] == 8
            drawn.append({one.reference.how for one in handle["subject"].scene.subjects})
        options = EvaluationOptions(1, 0, 1, 2, size=16, rows=("placed",), detector=detector)
        with pytest.raises(AdapterError, match="an adapter of interactions for the row placed, got none"):
            subjects.evaluate_subjects(ScenePipeline(pipe, handle, "tiny"), options)
    assert drawn == [{"its mask"}, {WHOLE}]


def test_two_persons_who_are_alike_or_swapped_have_collapsed() -> None:
    known = known_things(PERSON, PERSON, seed=4)
    wanted = lone_scene(known, 0)
    found = perfect(wanted.scene)

    def scr(persons: tuple[Found, ...]) -> dict[str, float]:
        counts = Counts(1)
        subjects._count_pair(counts, 0, known, wanted, Detections(persons, (), ()))
        return counts.scores(0)[0]

    one, other = found.persons
    assert scr((one, other)) == scr((other, one)) == {"identity": 1.0, "scr": 0.0}
    swapped = tuple(
        Found(a.name, a.box, b.colour, 1.0, None, b.attributes) for a, b in ((one, other), (other, one))
    )
    assert scr(swapped)["scr"] == 1
    alike = (one, Found(one.name, other.box, one.colour, 1.0, None, one.attributes))
    assert scr(alike)["scr"] == 1
    assert scr((one,))["scr"] == scr(())["scr"] == 1
    assert scr((one,))["identity"] > 0


def test_unknown_rows_are_refused() -> None:
    assert chosen_rows(concepts.ROWS, ["ours", "real"]) == ["real", "ours"]
    with pytest.raises(SceneError, match=r"expected rows of real, untrained, .*, got 'mine'"):
        chosen_rows(concepts.ROWS, ["mine"])


def test_a_row_may_lack_a_score() -> None:
    table = {
        "rows": {"real": {"a": 1.0}, "ours": {"a": 0.5, "b": 0.25, "seconds": 12.0}},
        "pairs": {"scr": 0.1},
    }
    lines = format_scores(table).splitlines()
    assert lines[1].split() == ["real", "renders", "100.0", "-"]
    assert lines[2].split() == ["ours", "50.0", "25.0"]
    assert lines[3:] == ["pairs: scr 10.0", "seconds: ours 12"]


def test_subjects_on_the_command_line(
    tmp_path: Path, detector: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The packaged U-Net, without its encoder: self-subject attention needs none."""
    out, bare = tmp_path / "out.json", tmp_path / "bare"
    SubjectAdapter().save_pretrained(bare)
    command = ["evaluate", "--subject", "--model", "stickworld", "--subjects", "2", "--steps", "1"]
    command += ["--size", "64", "--json", str(out), "--adapter", f"subject={bare}"]
    assert main([*command, "--rows", "encoder", "--detector", detector]) == 2
    assert "expected a subject encoder for the row encoder" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--detector", detector, "--method", "subject:position_shift=1"]) == 2
    assert "position_shift: expected 0 for UNet2DConditionModel" in capsys.readouterr().err
    settings = ["--method", "subject:reference_weight=8,masks=1"]
    assert main([*command, "--detector", detector, *settings]) == 0
    table = json.loads(out.read_text())
    assert table["settings"] == {"reference_weight": 8.0, "masks": 1}
    assert list(table["rows"]) == ["real", "text", "text_full", "attention", "guided", "placed"]
    assert all(row.keys() == table["rows"]["real"].keys() for row in table["rows"].values())
    assert table["rows"]["text"].keys() == {"identity", "action_acc", "object_acc", "background_acc", "copy"}
    assert table["pairs"].keys() == {"identity", "scr"}
    assert (table["subjects"], table["seed"], table["model"]) == (2, 0, "stickworld")


def test_concepts_on_the_command_line(
    tmp_path: Path, detector: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    command = ["evaluate", "--concept", "--photos", "1", "--steps", "1", "--size", "64", "--json", str(out)]
    assert main([*command, "--rows", "untrained", "real", "--detector", detector]) == 0
    table = json.loads(out.read_text())
    assert list(table["rows"]) == ["real", "untrained"]
    assert table["rows"]["untrained"].keys() == {"identity", "leakage", "text_acc"}
    assert table["photos"] == 1
    assert "not_found" not in table  # of rows that look for none
    learned = ["--rows", "ours", "custom_diffusion", "--detector", detector, "--set", "steps=1"]
    assert main([*command, *learned]) == 0
    table = json.loads(out.read_text())
    assert table["rows"]["ours"].keys() == {"mask_iou", "identity", "leakage", "text_acc", "seconds"}
    assert table["rows"]["custom_diffusion"].keys() == {"identity", "leakage", "text_acc", "seconds"}
    assert (table["seed"], table["changes"]) == (0, ["steps=1"])
    learning = ["--rows", "ours", "--detector", detector, "--set", "steps=1", "projections=v", "prefix=one "]
    seen: list[LearnOptions] = []

    def unfound(*_: Any, options: LearnOptions, **__: Any) -> None:
        seen.append(options)
        raise NotFoundError("not found")

    monkeypatch.setattr(concepts, "learn", unfound)
    assert main([*command, *learning]) == 0
    assert seen == [LearnOptions(steps=1, projections="v", prefix="one ", size=64)]
    table = json.loads(out.read_text())
    assert (table["not_found"], table["changes"]) == ({"ours": 1.0}, learning[-3:])
    assert "not_found: ours 100.0" in capsys.readouterr().out
    for wrong, words in (
        (["--concept", "--set", "seed=1"], "expected --seed for seed"),
        (["--concept", "--set", "rank=-1"], "expected rank to be a whole number from 0 up, got -1"),
        (["--concept", "--set", "projections=q"], "expected projections of kv, k, v, none, got 'q'"),
        (["--subject", "--set", "rank=1"], "--set: expected none beside --subject"),
        (["--world", "--set", "rank=1"], "--set: expected --concept or --subject beside it, got --world"),
    ):
        assert main(["evaluate", *wrong, "--detector", detector]) == 2
        assert words in capsys.readouterr().err


def test_rows_learn_as_their_names_say(flux_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of each, and a photo whose concepts are not found, which counts with untrained tokens."""
    photo = concepts._photo(0, 0, 32)
    learning = LearnOptions(steps=2, size=32, refresh_every=0, prefix="a ")
    adapters = {}
    for row in concepts.ROWS[1:]:
        adapter, found = concepts._learned(row, flux_pipe, photo, learning)
        adapters[row] = adapter.state_dict()
        if row == "given_masks":
            assert found.keys() == {c.token for c in photo.concepts}
    first = next(name for name in adapters["untrained"] if name.startswith("concept_tokens"))
    assert not torch.equal(adapters["given_masks"][first], adapters["untrained"][first])

    def unfound(*_: Any, **__: Any) -> None:
        raise NotFoundError("not found")

    learn = concepts.learn
    monkeypatch.setattr(concepts, "learn", unfound)
    adapter, found = concepts._learned("ours", flux_pipe, photo, learning)
    assert torch.equal(adapter.state_dict()[first], adapters["untrained"][first])
    assert found is None
    monkeypatch.setattr(concepts, "learn", learn)
    with pytest.raises(ConceptError, match="expected a photo of at least 128 pixels"):  # another fault
        concepts._learned("ours", flux_pipe, photo, replace(learning, size=512))
    changes = replace(learning, projections="v", rank=2)
    changed, _ = concepts._learned("given_masks", flux_pipe, photo, changes)
    assert (changed.config.projections, changed.config.rank) == ("v", 2)
