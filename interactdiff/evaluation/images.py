"""How far pictures are from each other, in the eyes of the detector."""

from typing import Any

import torch
from torch import Tensor

from interactdiff.stickworld.detector import Detector

LAYERS = ("fine.0", "fine.1", "middle", "coarse", "merge_middle", "merge_fine")


@torch.no_grad()
def feature_distance(detector: Detector, pictures: Tensor, others: Tensor) -> Tensor:
    """LPIPS (Zhang et al., 2018, equation 1) with the detector's features in the place of VGG's.

    Features of a place are scaled to length 1; squared differences are summed over channels, all with weight
    1, and averaged over places and layers. 0 is the same picture.

    Args:
        detector: whose features.
        pictures: [B, 3, 96, 96] in [0, 1].
        others: [B, 3, 96, 96] in [0, 1].

    Returns:
        [B], 0 or more.
    """
    normalised: list[Tensor] = []

    def keep(module: Any, args: object, output: Tensor) -> None:
        normalised.append(output / output.norm(dim=1, keepdim=True).clamp(min=1e-8))

    hooks = [detector.get_submodule(name).register_forward_hook(keep) for name in LAYERS]
    try:
        detector(torch.cat([pictures, others]))
    finally:
        for hook in hooks:
            hook.remove()
    apart = [(a - b).square().sum(1).mean((1, 2)) for a, b in (features.chunk(2) for features in normalised)]
    return torch.stack(apart).mean(0)
