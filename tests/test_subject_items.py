"""Subjects as users give them: in Python, scene files, on the command line, in records, in pipelines."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import RIDING, draw, trained_adapter
from tiny_dit import draw as draw_dit
from tiny_dit import trained_joint_adapter
from tiny_subject import dog, half_mask, picture

from interactdiff import Interaction, Scene, SceneError, attach, generate
from interactdiff.app.snippets import as_command, as_python
from interactdiff.cli import main
from interactdiff.picture import read_record
from interactdiff.pipelines import (
    InteractionFluxPipeline,
    InteractionStableDiffusion3Pipeline,
    InteractionStableDiffusionPipeline,
    InteractionStableDiffusionXLPipeline,
)
from interactdiff.scene_pictures import MAX_PICTURE_SIDE, Picture, picture_files
from interactdiff.sites import denoiser_of
from interactdiff.subject.adapter import SubjectAdapter
from interactdiff.subject.foreground import foreground, load_segmenter, segmented
from interactdiff.subject.items import Subject

SETTINGS = {"guidance": 2.0, "time_gap": 3, "extra_row": 1}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a picture and its mask."""
    picture(0).save(tmp_path / "ref.png")
    half_mask().save(tmp_path / "m.png")
    return tmp_path


# --- pictures ---


def test_a_picture_is_what_it_was_however_it_came(folder: Path) -> None:
    image = picture(0)
    array = np.asarray(image)
    tensor = torch.tensor(array.copy()).permute(2, 0, 1)
    one = Picture.of("image", image)
    ways: list[Any] = [
        folder / "ref.png",
        str(folder / "ref.png"),
        array,
        tensor,
        tensor / 255,
        one.to_text(),
    ]
    assert all(Picture.of("image", way) == one for way in ways)
    assert one.image.tobytes() == image.tobytes()
    alpha = Image.new("RGBA", (4, 4), (1, 2, 3, 4))
    assert Picture.of("image", Picture.of("image", alpha).to_text()).image.tobytes() == alpha.tobytes()
    large = Picture.of("image", Image.new("RGB", (3000, 1500)))
    assert large.size == (MAX_PICTURE_SIDE, MAX_PICTURE_SIDE // 2)
    assert Picture.of("mask", half_mask().convert("1"), mask=True).image.tobytes() == half_mask().tobytes()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("nowhere.png", "image: expected a picture at 'nowhere.png', got no file"),
        (__file__, "image: expected a whole PNG, JPEG, WEBP at .*, got a file that is none"),
        ("data:image/png;base64,AAAA", "image: expected a whole PNG, JPEG, WEBP at its data"),
        ("data:text,hello", "image: expected data:image/png;base64,..., got 'data:text,hello'"),
        (Image.new("L", (10000, 5000)), "image: expected at most 40000000 pixels, got 10000 x 5000"),
        (torch.full((3, 2, 2), 2.0), r"image: expected numbers in \[0, 1\], got 2 to 2"),
        (torch.zeros(2, 2, 2), r"expected 1, 3 or 4 channels of rows and columns, got \[2, 2, 2\]"),
        (3, "image: expected a path, a PIL image or a tensor, got 3"),
    ],
)
def test_what_is_no_picture_is_refused_in_words(value: Any, words: str) -> None:
    with pytest.raises(SceneError, match=words):
        Subject("dog", value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": half_mask((8, 16))}, "mask: expected 16 x 16 pixels, as its picture has once both are"),
        (
            {"mask": Image.new("L", (16, 16), 20)},
            "mask: expected light pixels where the subject is, got an empty",
        ),
        ({"box": (0, 0, 1.2, 1)}, "box: expected x1 to be a number in"),
        ({"strength": 3}, "strength: expected a number from 0 to 2, got 3"),
        ({"reference_prompt": " "}, "reference_prompt: expected a phrase"),
    ],
)
def test_what_is_no_subject_is_refused_in_words(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SceneError, match=words):
        Subject("dog", picture(), **options)


# --- the foreground ---


def test_what_the_subject_is_is_said() -> None:
    white = Image.new("RGB", (16, 16), "white")
    white.paste((200, 0, 0), (4, 4, 12, 12))
    white.putpixel((8, 8), (255, 255, 255))  # not joined to the background
    found = foreground(Subject("dog", white))
    assert found.how == "its white background"
    assert np.asarray(found.mask).sum() == 255 * 64
    cut = picture().convert("RGBA")
    cut.putalpha(half_mask())
    found = foreground(Subject("dog", cut))
    assert found.how == "its alpha channel"
    assert found.mask.tobytes() == half_mask().tobytes()
    assert (np.asarray(found.image)[:, 8:] == 255).all()
    assert (np.asarray(found.image)[:, :8] == np.asarray(picture())[:, :8]).all()
    assert foreground(dog()).how == "its mask"
    assert foreground(Subject("dog", picture())).how.startswith("nothing")
    with pytest.raises(
        SceneError, match="subject 'dog': expected pixels of it in its picture, got none by its white"
    ):
        foreground(Subject("dog", Image.new("RGB", (16, 16), "white")))


def test_a_close_up_shows_the_subject_alone_however_small_it_is() -> None:
    image = Image.new("RGB", (200, 100), "white")
    image.paste((200, 0, 0), (20, 30, 60, 50))
    found = foreground(Subject("dog", image))
    close = found.seen(close_up=True)
    assert close.size == (44, 24)
    pixels = np.asarray(close)
    assert (pixels[2:-2, 2:-2] == (200, 0, 0)).all()
    assert (pixels[[0, 1, -1, -2]] == 255).all()
    assert (pixels[:, [0, 1, -1, -2]] == 255).all()
    assert found.seen(close_up=False).tobytes() == image.tobytes()
    whole = foreground(Subject("dog", picture()))
    assert whole.seen(close_up=True).tobytes() == picture().tobytes(), "no frame around a whole picture"
    dot = Image.new("L", (16, 16))
    dot.putpixel((0, 15), 255)
    assert foreground(Subject("dog", picture(), dot)).seen(close_up=True).size == (3, 3)
    soft = Image.new("L", (200, 100))
    soft.paste(100, (19, 29, 61, 51))  # an edge too soft for the box of the subject
    soft.paste(255, (20, 30, 60, 50))
    edge = np.asarray(foreground(Subject("dog", image, soft)).seen(close_up=True))
    assert edge.shape == (24, 44, 3)
    dark = Image.new("RGB", (200, 100), "black")
    edge = np.asarray(foreground(Subject("dog", dark, soft)).seen(close_up=True))
    assert (edge[10, :3, 0] == (255, 155, 0)).all(), "white, the soft edge, the subject"


def test_a_segmentation_model_of_transformers_finds_it(tmp_path: Path, pipe: Any) -> None:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    torch.manual_seed(0)
    config: Any = SegformerConfig
    model = SegformerForSemanticSegmentation(
        config(
            num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[8], patch_sizes=[3], strides=[2],
            num_attention_heads=[1], mlp_ratios=[1], decoder_hidden_size=8,
            id2label={0: "background", 1: "dog", 2: "cat"}, label2id={"background": 0, "dog": 1, "cat": 2},
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    SegformerImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    segmenter = load_segmenter(str(tmp_path))
    segments = {one["label"]: np.asarray(one["mask"]) for one in segmenter(picture())}
    label = next(name for name in ("dog", "cat") if name in segments)
    found = foreground(Subject(f"brown {label}", picture()), segmenter)
    assert found.how == "the segmentation model"
    assert (np.asarray(found.mask) == segments[label]).all()
    with attach(pipe, SubjectAdapter()) as handle:
        handle["subject"].configure(segmenter=str(tmp_path))
        handle.set_scene([Subject(label, picture())])
        assert handle.describe() == f"subject: {label} by the segmentation model"


def test_labels_of_several_words_are_found_and_kept_apart(pipe: Any) -> None:
    left, right = half_mask(), Image.fromarray(255 - np.asarray(half_mask()))

    def segmenter(_: Image.Image) -> list[dict[str, Any]]:
        return [{"label": "teddy bear", "mask": left}, {"label": "cat", "mask": right}]

    for phrase, mask in (("brown teddy bear", left), ("cat", right)):
        found = segmented(segmenter, picture(), phrase)
        assert found.tobytes() == mask.tobytes()
    assert segmented(segmenter, picture(), "catalogue").tobytes() in (left.tobytes(), right.tobytes())
    with attach(pipe, SubjectAdapter()) as handle:
        handle["subject"].runner.segmenter = segmenter
        one = {"image": picture(), "reference_prompt": "a photo"}
        handle.set_scene([Subject("teddy bear", **one), Subject("cat", **one)])
        references = [one.reference for one in handle["subject"].scene.subjects]
        assert not torch.equal(references[0].mask, references[1].mask)


def test_transparent_parts_of_a_mask_are_not_the_subject() -> None:
    mask = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 8, 16))
    assert foreground(dog(mask=mask)).mask.tobytes() == half_mask().tobytes()


# --- text: scene files and the command line ---


def test_text_opens_files_only_where_it_may(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    values = {"phrase": "dog", "image": str(folder / "ref.png")}
    text = f"dog|{folder / 'ref.png'}"
    closed = "image: expected data:image/png;base64,... where no files are opened"
    for read in (lambda: Subject.from_dict(values), lambda: Subject.parse(text)):
        with pytest.raises(SceneError, match=closed):
            read()
        with picture_files():
            assert read() == Subject("dog", picture(0))
        with picture_files(folder):
            assert read() == Subject("dog", picture(0))
        with (
            picture_files(tmp_path_factory.mktemp("uploads")),
            pytest.raises(SceneError, match="an uploaded picture"),
        ):
            read()
    with pytest.raises(SceneError, match=closed):
        Scene.from_dict({"prompt": "a dog", "subjects": [values]})
    (folder / "scene.json").write_text(
        json.dumps({"prompt": "a dog", "subjects": [{"phrase": "dog", "image": "ref.png", "mask": "m.png"}]})
    )
    assert Scene.from_file(folder / "scene.json").extra_items == (dog(),)


def test_the_command_lines_form(folder: Path) -> None:
    text = f"dog|{folder / 'ref.png'}|box=0.1,0.1,0.5,0.9|mask={folder / 'm.png'}|strength=0.5"
    with picture_files():
        one = Subject.parse(text)
        assert Subject.parse(one.to_text()) == one
    assert one == dog(box=(0.1, 0.1, 0.5, 0.9), strength=0.5)
    with pytest.raises(SceneError, match=r"expected two parts, phrase\|picture, got 1"):
        Subject.parse("dog")
    assert Subject.parse(dog().to_text()) == dog(), "what came from no file is a data URI"


def test_scene_files_hold_subjects_and_settings() -> None:
    scene = Scene("a dog", extra_items=(dog(box=(0, 0, 1, 1)),), controls={"subject": {"guidance": 2.5}})
    again = Scene.from_json(scene.to_json())
    assert again == scene
    assert again.controls == {"subject": {"guidance": 2.5}}
    assert hash(again) == hash(scene)
    for controls, words in (
        ({"subject": 3}, "controls: expected settings by the names of methods, got"),
        ({"subject": {"guidance": "x"}}, "controls: expected a number as subject's guidance, got 'x'"),
    ):
        with pytest.raises(SceneError, match=words):
            Scene.from_dict({"prompt": "a", "controls": controls})
    wrong = Scene("a dog", extra_items=(dog(),), controls={"subject": {"beta": 1}})
    with pytest.raises(SceneError, match=r"subject: expected settings of encoder_weight, .*, got 'beta'"):
        generate(wrong, device="cpu")


def test_a_picture_is_drawn_again_from_its_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference travels in the PNG: its file is gone by then."""
    monkeypatch.chdir(folder)
    picture(0, (40, 32)).save("person.png")
    half_mask((40, 32)).save("mask.png")
    Path("scene.json").write_text(json.dumps({"prompt": "a person", "controls": {"subject": SETTINGS}}))
    common = ["--model", "stickworld-dit", "--steps", "2", "--device", "cpu"]
    subject = ["--subject", "person|person.png|mask=mask.png|box=0,0,0.6,1"]
    assert main(["generate", "--scene", "scene.json", *subject, *common, "--out", "one.png"]) == 0
    assert main(["generate", "a person", *common, "--out", "plain.png"]) == 0
    record = read_record("one.png")
    assert record.methods["subject"]["guidance"] == 2.0
    assert record.adapters["subject"] == "stickworld-dit-subject"
    Path("person.png").unlink()
    assert main(["generate", "--from", "one.png", "--out", "again.png"]) == 0
    assert Path("again.png").read_bytes() == Path("one.png").read_bytes()
    assert Image.open("one.png").tobytes() != Image.open("plain.png").tobytes()
    assert "--scene scene.json" in as_command(record)
    assert "Subject(" in as_python(record)


# --- the drop-in pipelines ---


def test_pipelines_take_subjects(pipe: Any) -> None:
    ours = InteractionStableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    ours.set_progress_bar_config(disable=True)
    plain = draw(ours)
    with attach(pipe, SubjectAdapter()) as handle:
        handle.set_scene([dog()])
        expected = draw(pipe)
    assert torch.equal(draw(ours, subjects=[dog()]), expected)
    assert torch.equal(draw(ours), plain)
    assert not torch.equal(draw(ours, subjects=[dog()], subject_settings={"reference_weight": 9}), expected)
    with pytest.raises(SceneError, match="expected subjects for each of 3 prompts, got 2 lists of them"):
        draw(ours, ["a dog"] * 3, subjects=[[dog()], [dog()]])
    two = draw(ours, ["a dog", "a dog"], subjects=[[dog()], []])
    assert not torch.allclose(two[0], two[1], atol=1e-6)
    ours.load_interaction_adapter(trained_adapter(ours.unet))
    person = Subject("person", picture(2), mask=half_mask())
    placed = Subject("person", picture(2), mask=half_mask(), box=RIDING.subject_box)
    run = {"prompt": "a person", "interactions": [RIDING]}
    by_interaction = draw(ours, subjects=[person], **run)
    assert torch.equal(draw(ours, subjects=[placed], **run), by_interaction)
    each = draw(ours, ["a person"] * 2, subjects=[person], interactions=[[RIDING], []])
    assert each.shape[0] == 2
    ours.unload_subject_adapter()
    ours.unload_interaction_adapter()
    assert torch.equal(draw(ours), plain)


@pytest.mark.parametrize(
    ("fixture", "kind"),
    [
        ("xl_pipe", InteractionStableDiffusionXLPipeline),
        ("flux_pipe", InteractionFluxPipeline),
        ("sd3_pipe", InteractionStableDiffusion3Pipeline),
    ],
)
def test_pipelines_of_every_family_take_subjects(
    fixture: str, kind: Any, request: pytest.FixtureRequest
) -> None:
    pipe = request.getfixturevalue(fixture)
    ours = kind(**pipe.components)
    ours.set_progress_bar_config(disable=True)
    plain = draw_dit(ours)
    with attach(pipe, SubjectAdapter()) as handle:
        handle.set_scene([dog()])
        expected = draw_dit(pipe)
    assert torch.equal(draw_dit(ours, subjects=[dog()]), expected)
    heavy = draw_dit(ours, subjects=[dog()], subject_settings={"reference_weight": 9})
    assert not torch.allclose(heavy, expected, atol=1e-4)
    denoiser = denoiser_of(ours)
    adapter = trained_adapter(denoiser) if hasattr(ours, "unet") else trained_joint_adapter(denoiser)
    ours.load_interaction_adapter(adapter)
    dogs = Interaction("dog", "riding", "bike", RIDING.subject_box, RIDING.object_box)
    by_interaction = draw_dit(ours, subjects=[dog()], interactions=[dogs])
    placed = draw_dit(ours, subjects=[dog(box=RIDING.subject_box)], interactions=[dogs])
    assert torch.equal(placed, by_interaction)
    assert not torch.allclose(by_interaction, draw_dit(ours, interactions=[dogs]), atol=1e-4)
    ours.unload_subject_adapter()
    ours.unload_interaction_adapter()
    assert torch.equal(draw_dit(ours), plain)


def test_a_scene_of_a_crop_keeps_what_is_in_it() -> None:
    anywhere, left, right = (dog(box=box) for box in (None, (0, 0, 0.4, 0.5), (0.6, 0, 1, 1)))
    cropped = Scene("a dog", extra_items=(anywhere, left, right)).cropped((0.5, 0.0, 1.0, 1.0))
    assert [one.box for one in cropped.extra_items] == [None, pytest.approx((0.2, 0.0, 1.0, 1.0))]
    dogs = Interaction("dog", "riding", "bike", (0.0, 0.0, 0.4, 1.0), (0.2, 0.0, 1.0, 1.0))
    scene = Scene("a dog", interactions=(dogs,), extra_items=(anywhere,))
    assert scene.cropped((0.5, 0.0, 1.0, 1.0)).extra_items == (), "its place is outside"
    (left,) = scene.cropped((0.0, 0.0, 0.5, 1.0), min_visible=0.5).extra_items
    assert left.box == pytest.approx((0.0, 0.0, 0.8, 1.0))


def test_transparent_pixels_are_white_whatever_colour_they_hide() -> None:
    hidden = np.zeros((16, 16, 4), np.uint8)
    hidden[4:12, 4:12] = (200, 0, 0, 255)
    cut_out = Image.fromarray(hidden)
    found = foreground(Subject("dog", cut_out, mask=Image.new("L", (16, 16), 255)))
    assert found.how == "its mask"
    assert found.image.getpixel((0, 0)) == (255, 255, 255)
    assert found.image.getpixel((8, 8)) == (200, 0, 0)


def test_bars_in_options_have_no_text_form() -> None:
    with pytest.raises(SceneError, match=r"expected a phrase without a bar, got 'a dog\|box=0,0,1,1'"):
        dog(reference_prompt="a dog|box=0,0,1,1").to_text()
