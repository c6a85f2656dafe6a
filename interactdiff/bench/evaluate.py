"""What it costs to score detections: as many pictures and pairs as HICO-DET's test set has, made up."""

import resource
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from interactdiff.evaluation.hoi_classes import ClassTable
from interactdiff.evaluation.hoi_matching import HoiEvaluator, Pairs
from interactdiff.evaluation.hoi_precision import HoiPrecisions
from interactdiff.evaluation.hoi_protocols import chosen_protocols

PICTURES, TRUTHS = 9_546, 33_405  # of HICO-DET's test set
SIZE = 512


def made_up(pictures: int, pairs: int, classes: int, seed: int = 0) -> Iterator[tuple[Pairs, Pairs]]:
    """Truth and detections of pictures: a third of the pairs are near a truth, half of those of its class.

    Args:
        pictures: how many.
        pairs: detected in each.
        classes: how many there are; as in HICO-DET, some occur far more often than others.
        seed: of all.
    """
    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, classes + 1)
    frequency /= frequency.sum()

    def boxes(count: int) -> np.ndarray:
        corners = rng.uniform(0, 0.6 * SIZE, (count, 2))
        return np.concatenate([corners, corners + rng.uniform(20, 0.4 * SIZE, (count, 2))], 1)

    for _ in range(pictures):
        count = 1 + rng.poisson(TRUTHS / PICTURES - 1)
        truth = Pairs(rng.choice(classes, count, p=frequency), boxes(count), boxes(count), np.ones(count))
        found = Pairs(rng.choice(classes, pairs, p=frequency), boxes(pairs), boxes(pairs), rng.random(pairs))
        near = pairs // 3
        of = rng.integers(0, count, near)
        found.persons[:near] = truth.persons[of] + rng.normal(0, 8, (near, 4))
        found.objects[:near] = truth.objects[of] + rng.normal(0, 8, (near, 4))
        found.classes[: near // 2] = truth.classes[of[: near // 2]]
        yield truth, found


def bench_evaluate(pictures: int, pairs: int, protocols: tuple[str, ...]) -> dict[str, Any]:
    """Score made-up detections by several protocols, Default and Known Object.

    Returns:
        cpu_seconds: of this process, for matching and for precision, without making detections up;
        wall_seconds: likewise; kept_mb: what is kept of all detections; peak_mb: of the process.
    """
    table = ClassTable.hico()
    objects = np.array([thing for _, thing in table.classes])
    evaluator = HoiEvaluator(chosen_protocols(protocols), len(table.classes))
    cpu = wall = 0.0
    for truth, found in made_up(pictures, pairs, len(table.classes)):
        known = np.isin(objects, objects[truth.classes])
        started = time.process_time(), time.perf_counter()
        evaluator.add(truth, found, known)
        cpu += time.process_time() - started[0]
        wall += time.perf_counter() - started[1]
    started = time.process_time(), time.perf_counter()
    outcomes = evaluator.outcomes()
    values = HoiPrecisions((outcomes,), protocols, table.rare).values(np.ones((1, pictures)))
    precision = time.process_time() - started[0], time.perf_counter() - started[1]
    kept = sum(getattr(outcomes, name).nbytes for name in outcomes.ARRAYS)
    return {
        "pictures": pictures,
        "pairs": pairs,
        "protocols": list(protocols),
        "cpu_seconds": {"matching": cpu, "precision": precision[0]},
        "wall_seconds": {"matching": wall, "precision": precision[1]},
        "kept_mb": kept / 1e6,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "values": {name: float(value[0]) for name, value in values.items()},
    }
