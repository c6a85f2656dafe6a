"""Image quality: FID and KID as torch-fidelity computes them, CLIP score for the whole and for each box."""

import io
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from interactdiff.data.pictures import picture_info
from interactdiff.errors import DataError, ModelError
from interactdiff.evaluation.bootstrap import Share
from interactdiff.evaluation.detection import Picture, in_pixels
from interactdiff.evaluation.layout import Layout
from interactdiff.evaluation.two_stage import on_device
from interactdiff.evaluation.verb_scorers import ContrastiveVerbs, normalised

FeatureExtractor = Callable[[Tensor], Tensor]
"""[B, D] features of [B, 3, H, W] pictures in uint8."""

KID_LEAST, FID_LEAST = 1000, 5000  # pictures
KID_SUBSETS, KID_SEED, KID_DEGREE = 100, 2020, 3
BATCH = 32


def inception_features(device: torch.device) -> FeatureExtractor:
    """The 2,048 features of InceptionV3 as FID was defined with, by torch-fidelity.

    Raises:
        ModelError: torch-fidelity is not installed, or its weights cannot be had.
    """
    try:
        create_feature_extractor = import_module("torch_fidelity.utils").create_feature_extractor
    except ImportError:
        raise ModelError(
            "expected torch-fidelity for FID and KID, got none: pip install 'interactdiff[eval]'"
        ) from None
    try:
        extractor: Any = create_feature_extractor("inception-v3-compat", ["2048"], cuda=device.type == "cuda")
    except Exception as error:  # its weights are fetched
        raise ModelError(f"expected the weights of torch-fidelity's Inception, got {error}") from error
    return lambda pictures: extractor(pictures.to(device))[0]


def check_alike(pictures: Sequence[Picture], others: Sequence[Picture]) -> None:
    """Refuse two sides of which one differs in size, format or count: that alone moves FID and KID.

    A picture that is resized here is compared without loss, like PNG.

    Raises:
        DataError: they do.
    """
    if len(pictures) != len(others):
        raise DataError(f"expected as many pictures on both sides, got {len(pictures)} and {len(others)}")
    kinds = [{_kind(one) for one in side} for side in (pictures, others)]
    for side in kinds:
        if len(side) > 1:
            first, second = sorted(side)[:2]
            raise DataError(
                f"expected pictures of one size and format, got {first} and {second}: give --size"
            )
    if kinds[0] != kinds[1]:
        first, second = (next(iter(side)) for side in kinds)
        raise DataError(f"expected the same size and format on both sides, got {first} and {second}")


def _kind(picture: Picture) -> str:
    data = picture.read()
    own = picture_info(data)
    width, height = picture.size or (own.width, own.height)
    resized = (width, height) != (own.width, own.height)
    with Image.open(io.BytesIO(data)) as opened:
        lossy = not resized and opened.format in ("JPEG", "MPO")
    return f"{width} x {height} px, {'JPEG' if lossy else 'lossless'}"


@torch.no_grad()
def features_of(pictures: Sequence[Picture], extract: FeatureExtractor) -> np.ndarray:
    """[N, D] features of pictures of one size, in float64."""
    parts = []
    for first in range(0, len(pictures), BATCH):
        pixels = np.stack([np.asarray(one.open()) for one in pictures[first : first + BATCH]])
        parts.append(extract(torch.from_numpy(pixels).permute(0, 3, 1, 2)).double().cpu().numpy())
    return np.concatenate(parts)


def fid(features: np.ndarray, others: np.ndarray) -> float:
    """Frechet distance of Gaussians fitted to two sets of features (Heusel et al., 2017, equation 6).

    Below `FID_LEAST` pictures it is biased upwards by much, and a warning says so.
    """
    if len(features) < FID_LEAST:
        warnings.warn(f"FID of {len(features)} pictures: below {FID_LEAST} it is too high", stacklevel=2)
    mean = features.mean(0) - others.mean(0)
    a, b = (np.atleast_2d(np.cov(one, rowvar=False)) for one in (features, others))
    roots = np.sqrt(np.linalg.eigvals(a @ b).astype(complex))
    root = float(np.real(roots).sum())
    return float(mean @ mean + np.trace(a) + np.trace(b) - 2 * root)


def check_count(pictures: int, least: int = KID_LEAST) -> None:
    """Refuse fewer pictures than KID needs.

    Raises:
        DataError: there are fewer.
    """
    if pictures < least:
        raise DataError(f"expected at least {least} pictures for KID, got {pictures}")


def kid(
    features: np.ndarray, others: np.ndarray, subset: int = KID_LEAST, subsets: int = KID_SUBSETS
) -> float:
    """Unbiased squared MMD with a cubic kernel (Binkowski et al., 2018), the mean over random subsets.

    Args:
        features: [N, D].
        others: [M, D].
        subset: pictures in each.
        subsets: how many, drawn as torch-fidelity draws them.

    Raises:
        DataError: there are fewer pictures than a subset has.
    """
    check_count(min(len(features), len(others)), subset)
    rng = np.random.RandomState(KID_SEED)
    values = []
    for _ in range(subsets):
        x = features[rng.choice(len(features), subset, replace=False)]
        y = others[rng.choice(len(others), subset, replace=False)]
        within = [(_kernel(one, one).sum() - np.trace(_kernel(one, one))) for one in (x, y)]
        values.append(sum(within) / (subset * (subset - 1)) - 2 * _kernel(x, y).mean())
    return float(np.mean(values))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** KID_DEGREE


@torch.no_grad()
def clip_scores(
    clip: ContrastiveVerbs, pictures: Sequence[Picture], layouts: Sequence[Layout]
) -> dict[str, Share]:
    """CLIP score of captions, and of phrases with the crops of their boxes (local), by picture.

    Cosines, 0 where negative: times 100 the CLIP score of Hessel et al. (2021), as torchmetrics has it.

    Args:
        clip: CLIP or SigLIP.
        pictures: one of each layout.
        layouts: whose captions and phrases.
    """
    hits = {name: np.zeros(len(layouts)) for name in ("clip", "clip_local")}
    totals = {"clip": np.ones(len(layouts)), "clip_local": np.zeros(len(layouts))}
    for number, (picture, layout) in enumerate(zip(pictures, layouts, strict=True)):
        image = picture.open()
        boxes = layout.named_boxes
        crops = [image, *(image.crop(_pixels(box, image.size)) for _, box in boxes)]
        texts = [layout.prompt, *(phrase for phrase, _ in boxes)]
        cosines = _cosines(clip, crops, texts)
        hits["clip"][number] = cosines[0]
        hits["clip_local"][number] = sum(cosines[1:])
        totals["clip_local"][number] = len(boxes)
    return {name: Share(hits[name], totals[name]) for name in hits}


def _pixels(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    left, top, right, bottom = in_pixels(box, size)
    return int(left), int(top), max(int(left) + 1, round(right)), max(int(top) + 1, round(bottom))


def _cosines(clip: ContrastiveVerbs, crops: list[Any], texts: list[str]) -> list[float]:
    model, processor = clip.model, clip.processor
    padding = "max_length" if model.config.model_type.startswith("siglip") else True
    pictures = normalised(
        model.get_image_features(**on_device(processor(images=crops, return_tensors="pt"), model))
    )
    inputs = processor(text=texts, padding=padding, truncation=True, return_tensors="pt")
    words = normalised(model.get_text_features(**on_device(inputs, model)))
    return (pictures * words).sum(1).clamp(min=0).tolist()
