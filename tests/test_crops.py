"""A scene within a part of the picture that is drawn as a picture of its own."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image
from tiny import RIDING, trained_adapter

from interactdiff import Entity, Interaction, Scene, SceneError, attach
from interactdiff.scene_items import cropped_box

PERSON, BIKE, BALL = (0.1, 0.2, 0.4, 0.6), (0.5, 0.5, 0.9, 0.9), (0.0, 0.0, 0.2, 0.2)
SCENE = Scene(
    "a", (Interaction("person", "riding", "bike", PERSON, BIKE, 0.5, "union"),), (Entity("ball", BALL),)
)


@pytest.mark.parametrize(
    ("box", "crop", "expected"),
    [
        (BIKE, (0.5, 0.5, 1.0, 1.0), (0.0, 0.0, 0.8, 0.8)),
        (BIKE, (0.0, 0.0, 1.0, 1.0), BIKE),
        (PERSON, (0.2, 0.0, 0.7, 0.5), (0.0, 0.4, 0.4, 1.0)),  # half of its area
        (PERSON, (0.35, 0.0, 0.85, 0.5), None),  # an eighth
        (PERSON, (0.5, 0.0, 1.0, 1.0), None),
        (PERSON, (0.4, 0.0, 1.0, 1.0), None),  # it ends where the crop begins
    ],
)
def test_boxes_become_shares_of_the_crop(box: Any, crop: Any, expected: Any) -> None:
    assert cropped_box(box, crop) == (None if expected is None else pytest.approx(expected))


def test_how_much_of_a_box_has_to_be_there() -> None:
    crop = (0.35, 0.0, 0.85, 0.5)
    assert cropped_box(PERSON, crop, 0.125) == pytest.approx((0.0, 0.4, 0.1, 1.0))
    assert cropped_box(PERSON, crop, 0.0) is not None
    assert cropped_box(PERSON, crop, 0.13) is None


def test_a_cropped_scene_keeps_what_is_left() -> None:
    whole = SCENE.cropped((0.0, 0.0, 1.0, 1.0))
    assert whole == SCENE
    left = SCENE.cropped((0.0, 0.0, 0.5, 0.8))
    assert left.interactions == ()
    assert [item.phrase for item in left.entities] == ["person", "ball"]
    assert left.entities[0].box == pytest.approx((0.2, 0.25, 0.8, 0.75))
    assert left.entities[0].strength == 0.5
    right = SCENE.cropped((0.45, 0.4, 1.0, 1.0))
    assert [item.phrase for item in right.entities] == ["bike"]
    both = SCENE.cropped((0.1, 0.2, 0.9, 0.9)).interactions[0]
    assert both.subject_box == pytest.approx((0, 0, 0.375, 4 / 7))
    assert both.object_box == pytest.approx((0.5, 3 / 7, 1, 1))
    assert (both.action, both.strength, both.action_region) == ("riding", 0.5, "union")
    assert SCENE.cropped((0.92, 0.92, 1.0, 1.0)).items == ()


def test_a_crop_of_a_crop_is_the_crop_of_both() -> None:
    outer, inner = (0.05, 0.1, 0.95, 0.95), (0.0, 0.05, 0.9, 1.0)
    joined = tuple(outer[i % 2] + (outer[i % 2 + 2] - outer[i % 2]) * inner[i] for i in range(4))
    twice, once = SCENE.cropped(outer).cropped(inner), SCENE.cropped(joined)  # type: ignore[arg-type]
    assert twice.interactions[0].object_box == pytest.approx(once.interactions[0].object_box)


@dataclass(frozen=True)
class Fixed:
    """An item of another method that says nothing of crops."""

    text: str


@pytest.mark.parametrize(
    ("crop", "visible", "message"),
    [
        ((0.5, 0.0, 0.5, 1.0), 0.25, r"^crop: expected"),
        ((0.0, 0.0, 1.2, 1.0), 0.25, r"^crop: expected"),
        ((0.0, 0.0, 1.0, 1.0), 1.5, r"^min_visible: expected a number from 0 to 1, got 1.5$"),
    ],
)
def test_what_is_no_crop_is_refused(crop: Any, visible: float, message: str) -> None:
    with pytest.raises(SceneError, match=message):
        SCENE.cropped(crop, visible)


def test_items_that_cannot_be_cropped_are_refused() -> None:
    with pytest.raises(SceneError, match="expected items that can be cropped, got Fixed"):
        replace(SCENE, extra_items=(Fixed("a"),)).cropped((0, 0, 1, 1))


def test_only_masked_inpainting_draws_by_the_cropped_scene(pipe: Any) -> None:
    """diffusers crops the picture around the mask, and draws that: boxes are shares of the crop there."""
    inpaint = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    inpaint.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    picture = Image.fromarray((torch.rand(64, 64, 3) * 255).byte().numpy())
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    region = inpaint.mask_processor.get_crop_region(mask, 16, 16, pad=4)
    crop = tuple(edge / 64 for edge in region)
    options: dict[str, Any] = {"width": 16, "height": 16, "num_inference_steps": 3, "strength": 1.0}

    def drawn(image: Any, mask: Any, item: Any, **more: Any) -> Any:
        with attach(inpaint, trained_adapter(pipe.unet)) as handle:
            handle.set_scene([item])
            generator = torch.Generator().manual_seed(0)
            how = {"image": image, "mask_image": mask, "generator": generator, **options, **more}
            return inpaint("a dog", **how).images[0]

    item = RIDING.cropped(crop)  # type: ignore[arg-type]
    assert isinstance(item, Interaction)
    assert item.subject_box != RIDING.subject_box
    alone = drawn(picture.crop(region), mask.crop(region), item)
    expected = inpaint.image_processor.apply_overlay(mask, picture, alone, region)
    masked = drawn(picture, mask, item, padding_mask_crop=4)
    assert (np.asarray(masked) == np.asarray(expected)).all()
    whole = drawn(picture, mask, RIDING, padding_mask_crop=4)
    assert (np.asarray(masked) != np.asarray(whole)).any()
