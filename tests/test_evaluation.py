import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from interactdiff.checkpoint import AdapterError
from interactdiff.clear import ClearAdapter, ClearConfig
from interactdiff.cli import main
from interactdiff.evaluation.hoi import (
    Share,
    at_box,
    average_precision,
    hoi_map,
    iou,
    picture_scores,
    with_interval,
)
from interactdiff.evaluation.world import (
    Drawing,
    Order,
    draw,
    evaluate_world,
    format_table,
    held_out_scenes,
    look_at,
    packaged_detector,
    shrunk,
    swap,
    swap_scores,
)
from interactdiff.generation import ScenePipeline
from interactdiff.handle import attach, attached_bindings
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.models import ModelError
from interactdiff.scene import Box, SceneError
from interactdiff.stickworld.detector import Detections, Detector, Found, FoundTriplet
from interactdiff.stickworld.world import GROUPS, HELD_OUT, Triplet, WorldScene

HERE: Box = (0.1, 0.1, 0.4, 0.6)
THERE: Box = (0.5, 0.1, 0.8, 0.6)


def asked(
    action: str = "kicking", thing: str = "ball", person: Box = HERE, object_box: Box = THERE
) -> Triplet:
    return Triplet(action, thing, "red", "blue", person, object_box, "right")


def seen(
    action: str = "kicking",
    thing: str = "ball",
    person: Box = HERE,
    object_box: Box = THERE,
    score: float = 0.9,
) -> FoundTriplet:
    subject = Found("person", person, "red", score, action)
    return FoundTriplet(subject, action, Found(thing, object_box, "blue", score), score)


def value(found: list[list[FoundTriplet]], wanted: list[list[Triplet]]) -> float:
    return float(hoi_map(found, wanted).value(np.ones((1, len(wanted))))[0])


def perfect(world: WorldScene) -> Detections:
    triplets = tuple(
        FoundTriplet(
            Found("person", t.subject_box, t.subject_colour, 1.0, t.action),
            t.action,
            Found(t.object, t.object_box, t.object_colour, 1.0),
            1.0,
        )
        for t in world.triplets
    )
    return Detections(tuple(t.person for t in triplets), tuple(t.object for t in triplets), triplets)


def test_iou_of_boxes_known_by_hand() -> None:
    assert iou(HERE, HERE) == pytest.approx(1)
    assert iou(HERE, THERE) == 0
    assert iou((0, 0, 0.4, 0.4), (0.2, 0, 0.6, 0.4)) == pytest.approx(1 / 3)
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


@pytest.mark.parametrize(
    ("right", "positives", "expected"),
    [
        ([1, 1], 2, 1.0),
        ([1, 0], 1, 1.0),  # a wrong one after everything is found costs nothing
        ([0, 1], 1, 1 / 2),
        ([1, 0, 1], 2, (1 + 2 / 3) / 2),
        ([0, 1, 1], 2, 2 / 3),  # the envelope lifts 1/2 to 2/3
        ([1], 4, 1 / 4),
        ([], 3, 0.0),
    ],
)
def test_average_precision_by_hand(right: list[int], positives: int, expected: float) -> None:
    got = average_precision(np.array(right, dtype=bool), np.ones((1, len(right))), np.array([positives]))
    assert got == pytest.approx([expected])


def slow_average_precision(right: list[bool], times: list[int], positives: int) -> float:
    """The definition: for each right one, the best precision at its recall or beyond."""
    precisions = []
    for last in range(1, len(right) + 1):
        hits = sum(n for hit, n in zip(right[:last], times[:last], strict=True) if hit)
        precisions.append(hits / max(sum(times[:last]), 1))
    gains = [n * max(precisions[k:]) for k, (hit, n) in enumerate(zip(right, times, strict=True)) if hit]
    return sum(gains) / positives


def test_average_precision_equals_the_slow_one_for_scenes_taken_any_number_of_times() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        right, times = rng.random(12) < 0.5, rng.integers(0, 3, 12)
        positives = int((times * right).sum()) + int(rng.integers(1, 4))
        got = average_precision(right, times[None].astype(float), np.array([positives]))
        assert got == pytest.approx([slow_average_precision(right.tolist(), times.tolist(), positives)])


def test_map_of_perfect_detections_is_one_and_of_swapped_boxes_zero() -> None:
    worlds = held_out_scenes(20, seed=3)
    found, wanted = [list(perfect(w).triplets) for w in worlds], [list(w.triplets) for w in worlds]
    assert value(found, wanted) == pytest.approx(1)
    assert value([[seen(person=THERE, object_box=HERE)]], [[asked()]]) == 0


def test_map_counts_a_triplet_once() -> None:
    twice = [[seen(score=0.9), seen(score=0.8)]]
    assert value(twice, [[asked()]]) == 1
    assert value(twice, [[asked(), asked(person=THERE, object_box=HERE)]]) == pytest.approx(1 / 2)


def test_map_looks_in_the_right_picture_and_at_both_boxes_and_the_class() -> None:
    assert value([[], [seen()]], [[asked()], []]) == 0
    assert value([[seen(object_box=HERE)]], [[asked()]]) == 0
    assert value([[seen(action="pushing")]], [[asked()]]) == 0
    assert value([[seen(thing="box")]], [[asked()]]) == 0
    # IoU of exactly one half is not above it
    assert value([[seen(person=(0.0, 0.0, 1.0, 0.5))]], [[asked(person=(0.0, 0.0, 1.0, 1.0))]]) == 0


def test_map_is_the_mean_over_classes_and_ranks_over_pictures() -> None:
    wanted = [[asked()], [asked()], [asked("riding", "bike")]]
    found = [[seen(score=0.5)], [seen(person=THERE, score=0.9)], []]
    assert value(found, wanted) == pytest.approx(((1 / 2) / 2 + 0) / 2)
    found = [[seen(score=0.9)], [seen(person=THERE, score=0.5)], []]
    assert value(found, wanted) == pytest.approx((1 / 2 + 0) / 2)


def test_shares_of_boxes_actions_and_colours() -> None:
    person, ball = Found("person", HERE, "green", 0.9, "kicking"), Found("ball", THERE, "blue", 0.9)
    far = asked("riding", "bike", (0.0, 0.7, 0.1, 0.9), (0.2, 0.7, 0.3, 0.9))
    scores = picture_scores([Detections((person,), (ball,), ())], [(asked(), far)])
    once = np.ones((1, 1))
    assert scores["box_acc"].value(once) == pytest.approx([2 / 4])
    assert scores["action_acc"].value(once) == pytest.approx([1 / 2])
    assert scores["colour_acc"].value(once) == pytest.approx([1 / 4])
    assert scores["hoi_map"].value(once) == pytest.approx([0])


def test_the_best_overlapping_thing_of_the_kind_is_at_a_box() -> None:
    near = Found("ball", (0.5, 0.1, 0.8, 0.5), "red", 0.99)
    exact, other = Found("ball", THERE, "blue", 0.2), Found("box", THERE, "red", 1.0)
    assert at_box([near, exact, other], "ball", THERE) is exact
    assert at_box([near, exact, other], "dog", THERE) is None
    assert at_box([near, exact, other], "ball", HERE) is None


def test_interval_holds_the_value_and_narrows_with_scenes() -> None:
    def width(scenes: int) -> float:
        hits = np.arange(scenes) % 4 != 0
        got, (low, high) = with_interval(Share(hits.astype(float), np.ones(scenes)), scenes)
        assert got == pytest.approx(0.75)
        assert low < got < high
        # the binomial's own, 2 * 1.96 standard errors
        assert high - low == pytest.approx(3.92 * (0.75 * 0.25 / scenes) ** 0.5, rel=0.15)
        return high - low

    assert width(400) < width(40)
    assert with_interval(Share(np.ones(5), np.ones(5)), 5) == (1.0, (1.0, 1.0))


def test_bootstrap_of_map_equals_scoring_the_scenes_again() -> None:
    wanted = [[asked()], [asked()], [asked("riding", "bike")]]
    found = [[seen(score=0.9)], [seen(person=THERE, score=0.8)], [seen("riding", "bike", score=0.7)]]
    score = hoi_map(found, wanted)
    for taken in ([0, 1], [2], [0, 1, 2], [1, 2]):
        counts = np.isin(np.arange(3), taken).astype(float)[None]
        again = value([found[i] for i in taken], [wanted[i] for i in taken])
        assert score.value(counts) == pytest.approx([again])


def test_held_out_scenes_are_beyond_training_and_differ_by_seed() -> None:
    scenes = held_out_scenes(5, seed=1)
    assert all(scene.seed >= HELD_OUT for scene in scenes)
    assert not {s.seed for s in scenes} & {s.seed for s in held_out_scenes(5, seed=0)}


def test_swap_changes_one_action_and_nothing_else() -> None:
    for number, world in enumerate(held_out_scenes(12, seed=0)):
        s = swap(number, world, seed=0)
        action = world.triplets[s.chosen].action
        assert action in s.actions
        assert s.actions in GROUPS.values()
        assert not any(action in order.prompt for order in s.pictures)
        for order, wanted in zip(s.pictures, s.actions, strict=True):
            interactions = list(order.interactions)
            assert interactions[s.chosen].action == wanted
            interactions[s.chosen] = replace(interactions[s.chosen], action=None)
            assert tuple(interactions) == s.without.interactions
            assert order.prompt == s.without.prompt


def test_swap_followed_is_one_and_boxes_only_is_chance() -> None:
    worlds = held_out_scenes(30, seed=0)
    swaps = [swap(n, world, 0) for n, world in enumerate(worlds)]
    found = {}
    for s in swaps:
        person = perfect(worlds[s.scene]).triplets[s.chosen].person
        for order, action in zip(s.pictures, s.actions, strict=True):
            found[order] = Detections((replace(person, action=action),), (), ())
        found[s.without] = Detections((person,), (), ())
    once = np.ones((1, len(worlds)))
    scores = {name: float(score.value(once)[0]) for name, score in swap_scores(swaps, worlds, found).items()}
    pictures = [1 / len(s.actions) for s in swaps for _ in s.actions]
    assert scores["adapter"] == 1
    assert scores["chance"] == pytest.approx(np.mean(pictures))
    assert scores["boxes_only"] == pytest.approx(scores["chance"])


@pytest.fixture
def drawer(pipe: StableDiffusionPipeline, adapter: InteractionAdapter) -> ScenePipeline:
    return ScenePipeline(pipe, attach(pipe, adapter), "tiny", {"interaction": "tiny-adapter"})


@pytest.fixture
def detector() -> Detector:
    torch.manual_seed(0)
    return Detector((8, 8, 8, 8)).eval()


def test_evaluate_world_gives_the_whole_table(drawer: ScenePipeline, detector: Detector) -> None:
    table = evaluate_world("", "", 2, 5, 2, 3, "cpu", progress=False, drawer=drawer, detector=detector)
    assert list(table["rows"]) == ["real", "base", "boxes_only", "adapter"]
    scores = ["hoi_map", "box_acc", "action_acc", "colour_acc"]
    for row in table["rows"].values():
        assert list(row) == scores
        assert all(0 <= share <= 1 for share in row.values())
    assert list(table["action_swap"]) == ["adapter", "boxes_only", "chance"]
    assert list(table["intervals"]["rows"]["base"]) == scores
    assert list(table["text"]) == list(table["intervals"]["text"]) == ["real", "base"]
    for row in table["text"].values():
        assert list(row) == ["object_acc", "action_acc", "colour_acc"]
    assert (table["scenes"], table["seed"]) == (2, 5)
    assert (table["guidance_scale"], table["size"]) == (2.0, 16)
    text = format_table(table)
    assert "real renders" in text
    assert "found anywhere" in text
    assert f"chance {100 * table['action_swap']['chance']:.1f}" in text


def test_fast_control_has_a_row_of_its_own(drawer: ScenePipeline, detector: Detector) -> None:
    table = evaluate_world(
        "", "", 1, 5, 3, 3, "cpu", progress=False, fast=True, drawer=drawer, detector=detector
    )
    assert list(table["rows"]) == ["real", "base", "boxes_only", "adapter", "adapter_fast"]
    assert "adapter, fast" in format_table(table)


def test_windows_have_a_row_of_their_own(drawer: ScenePipeline, detector: Detector) -> None:
    windows = ClearAdapter(ClearConfig(2)).eval()
    table = evaluate_world(
        "", "", 1, 5, 3, 3, "cpu", progress=False, drawer=drawer, detector=detector, clear=windows
    )
    assert list(table["rows"]) == ["real", "base", "boxes_only", "adapter", "adapter_clear"]
    assert "adapter+clear" in format_table(table)
    names = [binding.adapter.name for binding in attached_bindings(drawer.denoiser)]
    assert names == ["interaction"]


def test_without_an_adapter_there_are_the_rows_that_need_none(
    pipe: StableDiffusionPipeline, drawer: ScenePipeline, detector: Detector
) -> None:
    full = evaluate_world("", "", 2, 5, 2, 3, "cpu", progress=False, drawer=drawer, detector=detector)
    assert drawer.handle is not None
    drawer.handle.detach()
    bare = ScenePipeline(pipe, None, "tiny")
    table = evaluate_world("", None, 2, 5, 2, 3, "cpu", progress=False, drawer=bare, detector=detector)
    assert table["action_swap"] is table["intervals"]["action_swap"] is table["adapter"] is None
    assert list(table) == list(full)
    for part in (table, table["intervals"]):
        whole = full if part is table else full["intervals"]
        assert part["rows"] == {row: whole["rows"][row] for row in ("real", "base")}
        assert part["text"] == whole["text"]
    text = format_table(table)
    assert "base, text only" in text
    assert "action swap" not in text
    with pytest.raises(
        AdapterError, match="expected an adapter for the row of fast control, got none for tiny"
    ):
        evaluate_world("", None, 2, 5, 2, 3, "cpu", fast=True, drawer=bare, detector=detector)


def test_pictures_are_drawn_at_a_size_and_averaged_down_to_the_detectors(
    drawer: ScenePipeline, detector: Detector
) -> None:
    assert draw([Order(0, "a person")], drawer, 0, Drawing(1, size=24)).shape == (1, 3, 24, 24)
    table = evaluate_world(
        "", "", 1, 5, 1, 3, "cpu", progress=False, size=24, drawer=drawer, detector=detector
    )
    assert table["size"] == 24
    assert "of 24 px" in format_table(table)
    large = torch.rand(2, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    corners = large.unflatten(2, (96, 2)).unflatten(4, (96, 2))
    torch.testing.assert_close(shrunk(large), corners.mean((3, 5)))
    assert shrunk(large[..., :96, :96]).equal(large[..., :96, :96])
    assert shrunk(large[..., :24, :24]).shape == (2, 3, 24, 24)
    with pytest.raises(SceneError, match="size: expected a multiple of 8 pixels, got 20"):
        evaluate_world("", "", 1, 5, 1, 3, "cpu", size=20, drawer=drawer, detector=detector)


def test_a_unet_is_called_as_it_always_was(drawer: ScenePipeline, pipe: StableDiffusionPipeline) -> None:
    order = Order(3, "a person")
    got = draw([order], drawer, 2, Drawing(2, 3.0))
    noise = torch.Generator().manual_seed(HELD_OUT + 2_000_003)
    plain: Any = pipe
    wanted = plain(
        ["a person"], generator=[noise], output_type="pt", num_inference_steps=2, guidance_scale=3.0
    )
    assert torch.equal(got, wanted.images)


def test_evaluate_on_the_command_line_prints_the_table_and_writes_it(
    pipe: StableDiffusionPipeline,
    adapter: InteractionAdapter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipe.save_pretrained(tmp_path / "model")
    adapter.save_pretrained(tmp_path / "adapter")
    models = ["--model", str(tmp_path / "model"), "--adapter", str(tmp_path / "adapter")]
    out = tmp_path / "score.json"
    sizes = ["--scenes", "2", "--steps", "1", "--batch-size", "2", "--device", "cpu"]
    assert main(["evaluate", "--world", *sizes, *models, "--json", str(out)]) == 0
    table = json.loads(out.read_text())
    assert table["rows"]["real"]["box_acc"] == 1.0  # by the packaged detector
    assert table["rows"]["base"]["hoi_map"] == 0.0
    assert format_table(table) in capsys.readouterr().out
    without = [*models[:2], "--size", "24", "--guidance-scale", "3"]
    assert main(["evaluate", "--world", *sizes, *without, "--json", str(out)]) == 0
    table = json.loads(out.read_text())
    assert list(table["rows"]) == list(table["text"]) == ["real", "base"]
    assert table["text"]["real"] == {"object_acc": 1.0, "action_acc": 1.0, "colour_acc": 1.0}
    assert (table["size"], table["guidance_scale"], table["action_swap"]) == (24, 3.0, None)
    assert format_table(table) in capsys.readouterr().out


def test_pictures_do_not_depend_on_the_batch(drawer: ScenePipeline) -> None:
    worlds = held_out_scenes(3, seed=0)
    orders = [Order(i, w.caption, w.interactions()) for i, w in enumerate(worlds)]
    together = draw(orders, drawer, seed=0, how=Drawing(2))
    alone = torch.cat([draw([order], drawer, seed=0, how=Drawing(2)) for order in orders])
    assert together.shape == (3, 3, 16, 16)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_the_base_row_is_the_base_and_the_others_are_not(
    drawer: ScenePipeline, pipe: StableDiffusionPipeline
) -> None:
    world = held_out_scenes(1, seed=0)[0]
    controlled = draw([Order(0, world.caption, world.interactions())], drawer, seed=0, how=Drawing(2))
    uncontrolled = draw([Order(0, world.caption)], drawer, seed=0, how=Drawing(2))
    assert drawer.handle is not None
    drawer.handle.detach()
    without = draw([Order(0, world.caption)], ScenePipeline(pipe, None, "tiny"), seed=0, how=Drawing(2))
    assert torch.equal(uncontrolled, without)
    assert not torch.allclose(uncontrolled, controlled, atol=1e-3)


def test_a_picture_ordered_twice_is_drawn_once(drawer: ScenePipeline, detector: Detector) -> None:
    drawn = []
    hook = drawer.pipeline.vae.decoder.register_forward_pre_hook(lambda _, args: drawn.append(len(args[0])))
    orders = [Order(0, "a person"), Order(1, "a person"), Order(0, "a person")]
    found = look_at(orders, drawer, detector, seed=0, how=Drawing(1), batch_size=8, progress=False)
    hook.remove()
    assert sum(drawn) == 2
    assert set(found) == set(orders)


def test_seed_out_of_range_is_refused(drawer: ScenePipeline, detector: Detector) -> None:
    with pytest.raises(SceneError, match=r"expected a seed .* got -1"):
        evaluate_world("", "", 1, -1, 1, 1, "cpu", drawer=drawer, detector=detector)


def test_missing_detector_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("interactdiff.evaluation.world.model_path", lambda name: tmp_path / name)
    with pytest.raises(ModelError, match="packaged detector"):
        packaged_detector()
