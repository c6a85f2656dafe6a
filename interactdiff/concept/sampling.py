"""Which concepts a training step names: drawn of seed and step alone, so that a run can be resumed."""

import random
from collections.abc import Sequence
from itertools import combinations

FEW = 3  # concepts up to which all subsets are equally likely; above, all sizes of subsets are


def chosen_concepts(
    count: int, rng: random.Random, weights: Sequence[float] | None = None, joint_share: float = 1 / 3
) -> list[int]:
    """Concepts of a step in the order of their prompt.

    Args:
        count: of all concepts, K.
        rng: draws.
        weights: of each concept alone, with a sum of 1; None draws all subsets alike, as published for two.
        joint_share: of all concepts together, where there are weights.
    """
    everything = list(range(count))
    if weights is not None:
        chosen = everything if rng.random() < joint_share else rng.choices(everything, weights)
    elif count <= FEW:
        chosen = list(rng.choice([s for n in range(1, count + 1) for s in combinations(everything, n)]))
    else:
        chosen = rng.sample(everything, rng.randint(1, count))
    return rng.sample(chosen, len(chosen))
