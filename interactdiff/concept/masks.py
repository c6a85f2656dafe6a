"""Masks of concepts from attention maps (AttenCraft, arXiv 2405.17965, section 3.2).

    u     columns of the concepts' tokens and of a background, enlarged to the finer grid
    P     u squared, from 0 to 1
    R     S S S S P, from 0 to 1, with S the image's attention to itself
    mask  where R of a class is larger than that of each other class by a threshold

The published form makes a matrix of S and its fourth power, each rescaled from 0 to 1. Rows of S sum to 1, so
that rescaling only shifts and scales whole maps, and R is the same.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from interactdiff.concept.capture import AttentionCapture
from interactdiff.concept.words import ConceptError, NotFoundError, check_range
from interactdiff.scene_checks import Box

UNASSIGNED = -1


@dataclass(frozen=True)
class MaskSettings:
    """How masks are made of maps.

    Attributes:
        threshold: by how much a class has to win, in [0, 1).
        exponent: of the maps before they are spread, 0.1 to 10.
        power: how often the image's attention to itself spreads them, 0 to 64.
        background: what stands for it: "start", the text's first token; "template", the words around the
            concepts; "complement", where no concept is; None for what suits the text encoder.
        unassigned: pixels that no class wins: "ignore" leaves them to none, "nearest" to the best.
        minimum_area: share of the picture that a concept has at least.
    """

    threshold: float = 0.1
    exponent: float = 2.0
    power: int = 4
    background: str | None = None
    unassigned: str = "ignore"
    minimum_area: float = 0.01

    def __post_init__(self) -> None:
        for name, value, known in (
            ("background", self.background, (None, "start", "template", "complement")),
            ("unassigned", self.unassigned, ("ignore", "nearest")),
        ):
            if value not in known:
                names = ", ".join(filter(None, known))
                raise ConceptError(f"expected {name} of {names}, got {value!r}")
        if not 0 <= self.threshold < 1:
            raise ConceptError(f"expected a threshold of 0 up to 1, got {self.threshold}")
        check_range("exponent", self.exponent, 0.1, 10)
        check_range("power", self.power, 0, 64, whole=True)
        check_range("minimum_area", self.minimum_area, 0, 1)


@dataclass(frozen=True)
class ConceptMasks:
    """Where concepts are in a photo.

    Attributes:
        names: of the concepts.
        scores: R [K + 1, h, w] in [0, 1], the background's last: what attention says, 0 outside boxes.
        masks: [K + 1, h, w] bool, disjoint, the background's last.
    """

    names: tuple[str, ...]
    scores: Tensor
    masks: Tensor

    @property
    def areas(self) -> dict[str, float]:
        """Each concept's share of the picture."""
        return {name: float(self.masks[n].float().mean()) for n, name in enumerate(self.names)}

    def check(self, minimum_area: float, given: Collection[str] = ()) -> None:
        """Make sure that each concept was found.

        Args:
            minimum_area: share of the picture that each has at least.
            given: concepts whose masks were not looked for, of any size.

        Raises:
            NotFoundError: naming the first that was not, and what to try.
        """
        for name, area in self.areas.items():
            if name not in given and area < minimum_area:
                raise NotFoundError(
                    f"expected {name} in the photo, got a mask of {100 * area:.1f} % of it: try another "
                    "word, a lower threshold, a box, or a mask of your own"
                )


def from_zero_to_one(maps: Tensor) -> Tensor:
    """Each map of [..., h, w] shifted and scaled to [0, 1]; zeros where it is constant."""
    low, high = (getattr(maps.flatten(-2), name)(-1)[..., None, None] for name in ("amin", "amax"))
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)


def enlarged(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps [B, K, h, w] on another grid, bicubic as published; as they are where they have it."""
    if maps.shape[2:] == grid:
        return maps
    return F.interpolate(maps, grid, mode="bicubic", align_corners=False)


@torch.no_grad()
def refined(capture: AttentionCapture, columns: Tensor, settings: MaskSettings) -> Tensor:
    """R [B, K, h, w] of columns [B, K, h', w'], each row of the batch for itself."""
    finer = enlarged(columns, capture.grid).abs()  # bicubic overshoots, and (-x) ** 1.5 is no number
    maps = from_zero_to_one(finer**settings.exponent)
    for _ in range(settings.power):
        maps = capture.spread(maps)
    return from_zero_to_one(maps)


def with_background(scores: Tensor, settings: MaskSettings) -> Tensor:
    """Scores [..., K + 1, h, w] with the background's last; where that is what is left, of K scores."""
    if settings.background != "complement":
        return scores
    rest = 1 - scores.amax(-3, keepdim=True)
    return torch.cat([scores, from_zero_to_one(rest)], -3)


def assigned(scores: Tensor, threshold: float, unassigned: str = "ignore") -> Tensor:
    """Which class each pixel belongs to: int64 [h, w], `UNASSIGNED` where none wins by the threshold.

    Args:
        scores: [K + 1, h, w]; what is no number wins nowhere.
        threshold: the least lead over each other class; a tie leads by nothing.
        unassigned: "nearest" gives what is left to the best class.
    """
    scores = scores.nan_to_num(nan=-torch.inf)
    best, classes = scores.topk(2, dim=0)
    lead = (best[0] - best[1]).nan_to_num(nan=0.0)
    if unassigned == "nearest":
        return classes[0]
    return torch.where(lead > threshold, classes[0], UNASSIGNED)


def make_masks(
    names: Sequence[str],
    scores: Tensor,
    settings: MaskSettings,
    boxes: Mapping[str, Box] | None = None,
    given: Mapping[str, Tensor] | None = None,
) -> ConceptMasks:
    """Masks of scores.

    Args:
        names: of the concepts.
        scores: R [K + 1, h, w].
        settings: thresholds.
        boxes: for some concepts a box, xyxy in [0, 1], outside which they are not.
        given: for some concepts a mask [h', w'] with values in [0, 1], in the place of what was found; of
            two that overlap, the smaller one has what they share.

    Raises:
        ConceptError: a box or a mask is of none of the names, a given mask is empty, or two are the same.
    """
    for name in (*(boxes or {}), *(given or {})):
        if name not in names:
            raise ConceptError(f"expected boxes and masks of {', '.join(names)}, got one of {name}")
    scores = scores.clone()
    height, width = scores.shape[1:]
    for name, box in (boxes or {}).items():
        scores[names.index(name)] *= box_mask(box, (height, width)).to(scores)
    classed = scores.clone()
    on_grid = {name: _cells(mask.to(scores), (height, width)) for name, mask in (given or {}).items()}
    for name, mask in sorted(on_grid.items(), key=lambda pair: -int(pair[1].sum())):
        if not mask.any():
            raise ConceptError(f"expected a mask that is not empty for {name}, got one without a pixel")
        twin = next((other for other in on_grid if other != name and on_grid[other].equal(mask)), None)
        if twin is not None:
            raise ConceptError(
                f"expected a mask of its own for each concept, got the same for {name} and {twin}"
            )
        classed[:, mask] = 0
        classed[names.index(name)] = mask.to(scores)
    classes = assigned(classed, settings.threshold, settings.unassigned)
    masks = torch.stack([classes == number for number in range(len(scores))])
    if len(on_grid) == len(names):
        masks[-1] = ~masks[:-1].any(0)
    return ConceptMasks(tuple(names), scores, masks)


def _cells(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """The cells of a grid that a given mask [h, w] is: half or more of each, or where none is, the most."""
    shares = to_grid(mask, grid)
    return (shares >= min(0.5, float(shares.max()))) & (shares > 0)


def box_mask(box: Box, grid: tuple[int, int]) -> Tensor:
    """[h, w], 1 in the cells whose middle is in a box, xyxy in [0, 1]."""
    height, width = grid
    rows, columns = ((torch.arange(n) + 0.5) / n for n in (height, width))
    x0, y0, x1, y1 = box
    inside_rows, inside_columns = (rows >= y0) & (rows <= y1), (columns >= x0) & (columns <= x1)
    return (inside_rows[:, None] & inside_columns[None, :]).float()


def to_grid(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """A mask [h, w] in [0, 1] on another grid: shares of area where that is coarser, in [0, 1]."""
    mask = mask.float()[None, None]
    if mask.shape[2] >= grid[0] and mask.shape[3] >= grid[1]:
        return F.adaptive_avg_pool2d(mask, grid)[0, 0]
    return F.interpolate(mask, grid, mode="bilinear", align_corners=False)[0, 0].clamp(0, 1)


def iou(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of masks [..., h, w]: [...]; two empty ones have 1."""
    both = (one & other).flatten(-2).sum(-1)
    either = (one | other).flatten(-2).sum(-1)
    return torch.where(either == 0, 1.0, both / either.clamp(min=1))
