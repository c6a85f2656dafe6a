"""mAP by every protocol: cases known by hand, what must hold of any, the fast way against the slow one."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interactdiff.evaluation.bootstrap import resampled
from interactdiff.evaluation.hoi_matching import HoiEvaluator, Outcomes, Pairs, counted, suppressed
from interactdiff.evaluation.hoi_precision import (
    HoiPrecisions,
    average_precisions,
    class_subsets,
    mean_of_classes,
)
from interactdiff.evaluation.hoi_protocols import PROTOCOLS, Protocol, ScoreError, chosen_protocols
from interactdiff.evaluation.hoi_reference import OnePair, reference_average_precisions, reference_suppressed

EVERY = list(PROTOCOLS.values())
NAMES = list(PROTOCOLS)
CLASSES = 3
PERSON, OBJECT = (10.0, 10.0, 50.0, 90.0), (40.0, 40.0, 90.0, 90.0)


def moved(box: tuple[float, ...], across: float) -> tuple[float, ...]:
    return (box[0] + across, box[1], box[2] + across, box[3])


def outcomes_of(
    truth: list[OnePair], found: list[OnePair], pictures: int, known: dict[int, list[int]] | None = None
) -> Outcomes:
    evaluator = HoiEvaluator(EVERY, CLASSES, prepare=False)
    for picture in range(pictures):
        wanted, got = ([one for one in all_ if one.picture == picture] for all_ in (truth, found))
        evaluator.add(
            *(
                Pairs.of(
                    [one.cls for one in ones],
                    [one.person for one in ones],
                    [one.object for one in ones],
                    [one.score for one in ones],
                )
                for ones in (wanted, got)
            ),
            None if known is None else np.array([picture in known[cls] for cls in range(CLASSES)]),
        )
    return evaluator.outcomes()


def precisions(truth: list[OnePair], found: list[OnePair], pictures: int, name: str) -> np.ndarray:
    outcomes = outcomes_of(truth, found, pictures)
    return average_precisions(outcomes, PROTOCOLS[name], np.ones((1, pictures)))[0]


# Few places and few scores, so that boxes coincide, IoUs are exactly 1/2 and scores tie.
boxes = st.builds(
    lambda x, y, w, h: (float(x), float(y), float(x + w), float(y + h)),
    st.integers(0, 12),
    st.integers(0, 4),
    st.sampled_from([9, 19, 10, 20, 0]),
    st.sampled_from([9, 19, 10]),
)
PICTURES = 3
pairs = st.builds(
    OnePair,
    st.integers(0, PICTURES - 1),
    st.integers(0, CLASSES - 1),
    boxes,
    boxes,
    st.sampled_from([0.1, 0.5, 0.5000001, 0.9]),
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(pairs, max_size=8),
    st.lists(pairs, max_size=12),
    st.lists(st.lists(st.integers(0, PICTURES - 1)), min_size=CLASSES, max_size=CLASSES),
)
def test_fast_equals_slow(truth: list[OnePair], found: list[OnePair], known: list[list[int]]) -> None:
    truth = [replace(one, score=1.0) for one in truth]
    found = sorted(found, key=lambda one: one.picture)
    holds = dict(enumerate(known))
    outcomes = outcomes_of(truth, found, PICTURES, holds)
    once = np.ones((1, PICTURES))
    for protocol in EVERY:
        for only in (False, True):
            got = average_precisions(outcomes, protocol, once, only)[0]
            want = reference_average_precisions(truth, found, CLASSES, protocol, holds if only else None)
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-12, err_msg=f"{protocol.name} {only}")


@settings(max_examples=30, deadline=None)
@given(st.lists(pairs, min_size=1, max_size=8))
def test_a_perfect_detector_scores_one(truth: list[OnePair]) -> None:
    apart = []  # truths of one class that overlap each other are a protocol's own matter
    for one in truth:
        big = one.person[2] - one.person[0] >= 9 and one.object[2] - one.object[0] >= 9
        if big and not any((one.picture, one.cls) == (other.picture, other.cls) for other in apart):
            apart.append(replace(one, score=1.0))
    if not apart:
        return
    occur = sorted({one.cls for one in apart})
    for name in NAMES:
        got = precisions(apart, sorted(apart, key=lambda one: one.picture), PICTURES, name)
        assert got[occur].tolist() == [1.0] * len(occur)


@settings(max_examples=30, deadline=None)
@given(st.data(), st.lists(pairs, max_size=6), st.lists(pairs, max_size=8))
def test_the_order_of_pictures_and_of_detections_changes_nothing(
    data: st.DataObject, truth: list[OnePair], found: list[OnePair]
) -> None:
    found = [replace(one, score=1 / (2 + n)) for n, one in enumerate(found)]  # no ties
    places = data.draw(st.permutations(range(PICTURES)))
    shuffled = data.draw(st.permutations(found))
    before = outcomes_of(truth, found, PICTURES)
    after = outcomes_of(
        [replace(one, picture=places[one.picture]) for one in truth],
        [replace(one, picture=places[one.picture]) for one in shuffled],
        PICTURES,
    )
    for protocol in EVERY:
        a, b = (average_precisions(one, protocol, np.ones((1, PICTURES))) for one in (before, after))
        np.testing.assert_array_equal(a, b)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(pairs, max_size=8),
    st.lists(pairs, max_size=10),
    st.lists(st.booleans(), min_size=PICTURES, max_size=PICTURES),
)
def test_pictures_that_are_not_taken_count_as_if_they_were_not_there(
    truth: list[OnePair], found: list[OnePair], taken: list[bool]
) -> None:
    outcomes = outcomes_of(truth, found, PICTURES)
    kept = [[one for one in ones if taken[one.picture]] for ones in (truth, found)]
    alone = outcomes_of(kept[0], kept[1], PICTURES)
    there, ever = ({one.cls for one in ones} for ones in (kept[0], truth))
    for protocol in EVERY:
        got = average_precisions(outcomes, protocol, np.array([taken, [True] * PICTURES], dtype=float))
        want = average_precisions(alone, protocol, np.ones((1, PICTURES)))
        for cls in range(CLASSES):
            if cls in there:
                assert got[0, cls] == want[0, cls]
            elif cls in ever:  # left out: a class that was not drawn says nothing of the detections
                assert np.isnan(got[0, cls])
            else:
                np.testing.assert_array_equal(got[0, cls], got[1, cls])


def test_an_interval_holds_the_score_where_classes_are_in_few_pictures() -> None:
    truth = [OnePair(n, n, PERSON, OBJECT) for n in range(CLASSES)]
    outcomes = outcomes_of(truth, truth, CLASSES)
    counts = resampled(CLASSES, 50)
    for name in NAMES:
        scores = HoiPrecisions((outcomes,), (name,)).values(counts)
        assert scores[f"{name}.default.full"].tolist() == [1.0] * 50


@pytest.mark.parametrize("name", ["official", "world"])
def test_a_picture_taken_twice_counts_twice(name: str) -> None:
    truth = [OnePair(0, 0, PERSON, OBJECT), OnePair(1, 0, PERSON, OBJECT)]
    found = [OnePair(0, 0, moved(PERSON, 500), OBJECT, 0.9), OnePair(1, 0, PERSON, OBJECT, 0.8)]
    outcomes = outcomes_of(truth, found, 2)
    got = average_precisions(outcomes, PROTOCOLS[name], np.array([[1.0, 1], [1, 2], [2, 1]]))[:, 0]
    # recall 1/2, 2/3 and 1/3 with precisions 1/2, 2/3 and 1/3
    points = {"official": (6, 7, 4), "world": (11 / 2, 11 * 2 / 3, 11 / 3)}[name]
    assert got == pytest.approx([points[0] / 2 / 11, points[1] * 2 / 3 / 11, points[2] / 3 / 11])


@pytest.mark.parametrize("name", NAMES)
def test_of_equal_scores_the_earlier_is_the_surer(name: str) -> None:
    truth = [OnePair(1, 0, PERSON, OBJECT)]
    wrong, right = OnePair(0, 0, PERSON, OBJECT, 0.5), OnePair(1, 0, PERSON, OBJECT, 0.5)
    assert precisions(truth, [wrong, right], 2, name)[0] == pytest.approx(1 / 2)
    truth, wrong, right = [replace(truth[0], picture=0)], replace(wrong, picture=1), replace(right, picture=0)
    assert precisions(truth, [right, wrong], 2, name)[0] == pytest.approx(1)


@pytest.mark.parametrize("name", ["official", "pvic", "qpic", "exact"])
def test_a_recall_that_a_point_misses_by_rounding(name: str) -> None:
    """Ten truths, found one after the other: every recall of k/10 is reached with precision 1."""
    truth = [OnePair(n, 0, PERSON, OBJECT) for n in range(10)]
    found = [replace(one, score=1 - one.picture / 100) for one in truth[:10]]
    assert precisions(truth, found, 10, name)[0] == pytest.approx(1)
    # 3 of 10, then wrong ones: what is read at 3/10 is 1 or 0
    three = [*found[:3], *(OnePair(n, 0, moved(PERSON, 500), OBJECT, 0.1) for n in range(3, 10))]
    read_at = {"exact": 4, "official": 3, "pvic": 3, "qpic": 3}[name]
    assert precisions(truth, three, 10, name)[0] == pytest.approx(read_at / 11)
    # with a wrong one before each of 4, 7 and 8, precision falls after a recall of 3, 6 and 7 tenths
    hits = [1, 1, 1, 0, 1, 1, 1, 0, 1, 0, 1, 1, 1]
    run, number = [], 0
    for n, hit in enumerate(hits):
        where = replace(truth[number], score=1 - n / 100)
        run.append(where if hit else replace(where, person=moved(PERSON, 500)))
        number += hit
    at = {
        k: max(Fraction(sum(hits[: n + 1]), n + 1) for n in range(13) if sum(hits[: n + 1]) >= k)
        for k in range(11)
    }
    later = {"exact": (), "official": (3,), "pvic": (3,), "qpic": (3, 6, 7)}[name]
    want = sum(at[k + 1 if k in later else k] for k in range(11)) / 11
    assert precisions(truth, sorted(run, key=lambda one: one.picture), 10, name)[0] == pytest.approx(
        float(want)
    )


def test_suppression_equals_the_slow_one_and_keeps_a_product_of_one_half() -> None:
    official = PROTOCOLS["official"]
    rng, dropped = np.random.default_rng(0), 0
    for _ in range(20):
        corners = rng.integers(0, 5, (2, 14, 2)).astype(float)
        boxes_ = np.concatenate([corners, corners + rng.choice([9, 19], (2, 14, 2))], 2)
        scores, classes = rng.choice([0.2, 0.5, 0.9], 14), rng.integers(0, 2, 14)
        want = reference_suppressed(
            [
                OnePair(0, int(c), list(p), list(o), float(s))
                for c, p, o, s in zip(classes, boxes_[0], boxes_[1], scores, strict=True)
            ],
            0.5,
            official,
        )
        assert suppressed(Pairs.of(classes, boxes_[0], boxes_[1], scores)).tolist() == want
        dropped += sum(want)
    assert dropped > 5
    half = Pairs.of([0, 0], [(0, 0, 19, 9), (0, 0, 9, 9)], [OBJECT, OBJECT], [0.9, 0.8])
    assert not suppressed(half).any()
    assert suppressed(half.take(np.array([0, 0]))).tolist() == [False, True]


def test_only_the_surest_hundred_count_where_a_protocol_says_so() -> None:
    scores = np.linspace(0, 1, 130)
    far = [moved(PERSON, 1000.0 * n) for n in range(130)]
    many = Pairs.of([0] * 130, far, far, scores)
    assert counted(many, PROTOCOLS["qpic"]).tolist() == (scores >= scores[30]).tolist()
    assert counted(many, PROTOCOLS["fgahoi"]).sum() == 100
    assert counted(many, PROTOCOLS["official"]).all()
    again = Pairs.of([0] * 3, [PERSON] * 3, [OBJECT] * 3, [0.3, 0.9, 0.5])
    assert counted(again, PROTOCOLS["fgahoi"]).tolist() == [False, True, False]


def test_means_over_rare_classes_and_seeds() -> None:
    truth = [OnePair(0, 0, PERSON, OBJECT), OnePair(0, 1, PERSON, OBJECT)]
    found = [replace(truth[0], score=0.5)]
    one, none = outcomes_of(truth, found, 1), outcomes_of(truth, [], 1)
    once = np.ones((1, 1))

    def value(name: str, *outcomes: Outcomes) -> float:
        protocol, _, _ = name.partition(".")
        return float(HoiPrecisions(outcomes, (protocol,), (1,)).values(once)[name][0])

    assert value("official.default.full", one) == pytest.approx(1 / 3)
    assert value("qpic.default.full", one) == pytest.approx(1 / 2)
    assert value("official.default.rare", one) == 0
    assert value("official.known_object.non_rare", one) == pytest.approx(1 / 2)
    assert value("official.default.non_rare", one, none) == pytest.approx(1 / 4)
    assert HoiPrecisions((one, none), ("qpic",)).by_seed(once)["qpic.default.full"].tolist() == [[0.5], [0]]
    assert class_subsets(CLASSES, None) == {"full": None}
    assert mean_of_classes(np.array([[np.nan, np.nan]])).tolist() == [0]


def test_refusals() -> None:
    with pytest.raises(ScoreError, match=r"expected one of exact, .*, got 'voc'"):
        chosen_protocols(["voc"])
    assert chosen_protocols(["pvic", "pvic"]) == (PROTOCOLS["pvic"],)
    with pytest.raises(ScoreError, match="finite"):
        Pairs.of([0], [PERSON], [OBJECT], [float("nan")])
    with pytest.raises(ScoreError, match="as many"):
        Pairs.of([0, 1], [PERSON], [OBJECT])
    evaluator = HoiEvaluator([PROTOCOLS["exact"]], 1)
    with pytest.raises(ScoreError, match="classes from 0 to 0"):
        evaluator.add(Pairs.of([1], [PERSON], [OBJECT]), Pairs.of([], [], []))


def test_no_pictures_are_no_score() -> None:
    outcomes = HoiEvaluator(EVERY, CLASSES).outcomes()
    for protocol in EVERY:
        assert isinstance(protocol, Protocol)
        assert mean_of_classes(average_precisions(outcomes, protocol, np.ones((1, 0)))).tolist() == [0]
