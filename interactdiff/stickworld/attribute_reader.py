"""Reads what a person or an object looks like off its crop: the second stage of the detector."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interactdiff.stickworld.appearance import COLOURS, OBJECT_ATTRIBUTES, PERSON_ATTRIBUTES

PERSON_HEADS = {"colour": tuple(COLOURS), **PERSON_ATTRIBUTES}
OBJECT_HEADS = {"colour": tuple(COLOURS), **OBJECT_ATTRIBUTES}
CROPS = ((64, 48), (48, 56))  # height and width in pixels of the crops of persons, and of objects
_MARGIN = 0.06  # that a crop shows around a box, as a share of the box
# An attribute that is there only if another one has not this value.
_NEEDS = {"second_colour": ("pattern", "plain"), "headwear_colour": ("headwear", "none")}


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A 3 x 3 convolution, a norm over groups of eight channels, and SiLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(outputs // 8, outputs), nn.SiLU()
    )


class Residual(nn.Module):
    """Adds what two convolutions make of features of `width` channels."""

    def __init__(self, width: int):
        super().__init__()
        self.branch = nn.Sequential(conv(width, width), conv(width, width))

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        return features + self.branch(features)


def crops(images: Tensor, boxes: Tensor, pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut boxes with a small margin out of pictures, scaled to one size.

    Args:
        images: [B, 3, H, W].
        boxes: [N, 4] xyxy as shares of the picture.
        pictures: [N] the picture that each box is of.
        size: height and width of a crop.

    Returns:
        [N, 3, height, width]; black beyond the picture.
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    margin = _MARGIN * (high - low)
    low, high = low - margin, high + margin
    theta = boxes.new_zeros(len(boxes), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = (high - low).unbind(1)
    theta[:, :, 2] = low + high - 1
    doubled = (2 * size[0], 2 * size[1])  # averaged down, so that large things do not alias
    grid = F.affine_grid(theta, [len(boxes), 3, *doubled], align_corners=False)
    return F.avg_pool2d(F.grid_sample(images[pictures], grid.to(images.dtype), align_corners=False), 2)


class AttributeReader(nn.Module):
    """Says of each crop what every attribute of the thing in it is.

    Args:
        heads: the values that each attribute can have.
        size: height and width of the crops in pixels.
        widths: channels at the crop's size, half, a quarter and an eighth of it.
    """

    def __init__(
        self, heads: dict[str, tuple[str, ...]], size: tuple[int, int], widths: tuple[int, int, int, int]
    ):
        super().__init__()
        a, b, c, d = widths
        self.heads, self.size = heads, size
        self.features = nn.Sequential(
            conv(3, a), conv(a, b, 2), Residual(b), conv(b, c, 2), Residual(c), conv(c, d, 2), conv(d, d)
        )
        self.out = nn.Linear(2 * d, sum(map(len, heads.values())))

    def forward(self, images: Tensor, boxes: Tensor, pictures: Tensor) -> dict[str, Tensor]:
        """Read boxes; see `crops` for the arguments, images are in [0, 1].

        Returns:
            [N, C] logits of each attribute.
        """
        features = self.features(2 * crops(images, boxes, pictures, self.size) - 1)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
        logits = self.out(pooled).float().split([len(values) for values in self.heads.values()], 1)
        return dict(zip(self.heads, logits, strict=True))

    def read(self, images: Tensor, boxes: Tensor, pictures: Tensor) -> list[dict[str, str]]:
        """The likeliest attributes of each box; one that the thing does not have is left out."""
        if not len(boxes):
            return []
        logits = self(images, boxes, pictures)
        chosen = {name: values.argmax(1).tolist() for name, values in logits.items()}
        return [
            worn({name: self.heads[name][indices[n]] for name, indices in chosen.items()})
            for n in range(len(boxes))
        ]


def worn(attributes: dict[str, str]) -> dict[str, str]:
    """Attributes without the second colour of what is plain, and the colour of headwear that is not there."""
    absent = {name for name, (other, value) in _NEEDS.items() if attributes.get(other) == value}
    return {name: value for name, value in attributes.items() if name not in absent}
