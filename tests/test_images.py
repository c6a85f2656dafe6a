"""Distances between pictures."""

from itertools import pairwise

import torch

from interactdiff.evaluation.images import LAYERS, feature_distance
from interactdiff.evaluation.world import packaged_detector
from interactdiff.stickworld.layouts import sample_scene
from interactdiff.stickworld.render import render


def pictures(*seeds: int) -> torch.Tensor:
    stack = torch.stack([torch.tensor(render(sample_scene(seed)).image) for seed in seeds])
    return stack.permute(0, 3, 1, 2).float() / 255


def test_distance_grows_with_what_differs() -> None:
    detector = packaged_detector()
    one, other = pictures(1, 2), pictures(3, 4)
    noise = torch.randn(one.shape, generator=torch.Generator().manual_seed(0))
    distances = [
        feature_distance(detector, one, changed)
        for changed in (one, one + 0.02 * noise, one + 0.1 * noise, other)
    ]
    assert distances[0].abs().max() < 1e-6
    assert all((a < b).all() for a, b in pairwise(distances))
    assert torch.allclose(feature_distance(detector, other, one), distances[3], atol=1e-5)
    assert not any(module._forward_hooks for module in detector.modules())


def test_distance_is_the_mean_over_layers_of_unit_features() -> None:
    detector = packaged_detector()
    one, other = pictures(5), pictures(6)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in LAYERS}
    for name, outputs in seen.items():
        detector.get_submodule(name).register_forward_hook(lambda m, a, out, to=outputs: to.append(out[0]))
    with torch.no_grad():
        detector(one)
        detector(other)
    apart = []
    for a, b in seen.values():
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=0)
        apart.append((2 - 2 * cosine).mean())  # |x - y|^2 of unit vectors
    assert torch.allclose(feature_distance(detector, one, other)[0], torch.stack(apart).mean(), atol=1e-4)
