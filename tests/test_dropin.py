"""Scripts written for the published pipeline, and for the AUTOMATIC1111 extension's text, run as they are."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from containers import publish
from tiny import FEEDING, RIDING, Calls, close, draw, trained_adapter
from torch import Tensor

from interactdiff.checkpoint import AdapterError
from interactdiff.handle import attach
from interactdiff.interaction.adapter import InteractionAdapter
from interactdiff.pipelines import (
    InteractionStableDiffusionPipeline,
    InteractionStableDiffusionXLPipeline,
)
from interactdiff.scene import Interaction, SceneError

TEXT = "person=riding=bike; child=feeding=dog;"


def published(*interactions: Interaction, **others: Any) -> dict[str, Any]:
    """Interactions as the published pipeline's arguments."""
    fields = {
        "subject_phrases": [i.subject for i in interactions],
        "action_phrases": [i.action for i in interactions],
        "object_phrases": [i.object for i in interactions],
        "subject_boxes": [list(i.subject_box) for i in interactions],
        "object_boxes": [list(i.object_box) for i in interactions],
    }
    return {f"interactdiffusion_{name}": value for name, value in {**fields, **others}.items()}


BOTH = published(RIDING, FEEDING)
BOXES = {name: boxes for name, boxes in BOTH.items() if name.endswith("boxes")}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in BOTH.items() if key != f"interactdiffusion_{name}"}


def attached(pipe: Any, adapter: InteractionAdapter, *asked: Any, **run: Any) -> Tensor:
    """What a stock pipeline draws of a scene, strength and schedule."""
    with attach(pipe, adapter) as handle:
        handle.set_scene(*asked)
        return draw(pipe, **run)


@pytest.fixture
def ours(pipe, adapter) -> InteractionStableDiffusionPipeline:
    components = {**pipe.components, "unet": copy.deepcopy(pipe.unet)}
    pipeline = InteractionStableDiffusionPipeline(**components, requires_safety_checker=False)
    pipeline.load_interaction_adapter(adapter)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=["sd", "sdxl"])
def published_folder(request, tmp_path) -> tuple[type, Path, Any, InteractionAdapter]:
    """Our class, a folder with a custom U-Net and code, and what is in it: a pipeline and an adapter."""
    is_xl = request.param == "sdxl"
    pipe = request.getfixturevalue("xl_pipe" if is_xl else "pipe")
    adapter = trained_adapter(pipe.unet, grid_positions=False)
    ours = InteractionStableDiffusionXLPipeline if is_xl else InteractionStableDiffusionPipeline
    return ours, publish(tmp_path / "published", pipe, adapter), pipe, adapter


# --- a script for the published pipeline, with another import ---


def test_a_published_script(published_folder):
    DiffusionPipeline, repository, pipe, adapter = published_folder
    pipeline = DiffusionPipeline.from_pretrained(repository, trust_remote_code=True)
    pipeline = pipeline.to("cpu")
    images = pipeline(
        prompt="a person is riding a bike",
        interactdiffusion_subject_phrases=["person"],
        interactdiffusion_object_phrases=["bike"],
        interactdiffusion_action_phrases=["riding"],
        interactdiffusion_subject_boxes=[[0.1, 0.1, 0.6, 0.7]],
        interactdiffusion_object_boxes=[[0.2, 0.4, 0.9, 0.9]],
        interactdiffusion_scheduled_sampling_beta=1,
        output_type="pil",
        num_inference_steps=5,
        generator=torch.Generator().manual_seed(6),
    ).images
    assert not (repository / "trace").exists(), "code of the repository ran"
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING])
        run = {"num_inference_steps": 5, "generator": torch.Generator().manual_seed(6)}
        expected = pipe("a person is riding a bike", **run).images
    assert np.array_equal(np.asarray(images[0]), np.asarray(expected[0]))


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")
def test_a_published_script_in_half_precision(published_folder):
    ours, folder, pipe, adapter = published_folder
    publish(folder, pipe, adapter, variant="fp16")
    options = {"trust_remote_code": True, "variant": "fp16", "torch_dtype": torch.float16}
    pipeline = ours.from_pretrained(folder, **options)
    loaded = pipeline.interaction["interaction"].adapter
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.float16}
    pipeline.set_progress_bar_config(disable=True)
    half, base = draw(pipeline, **published(RIDING)), draw(pipeline)
    assert half.dtype == torch.float16
    expected = attached(pipe, adapter, [RIDING])
    assert (half.float() - expected).abs().mean() < 0.05 * (base.float() - expected).abs().mean()


def test_another_adapter_takes_the_place_of_the_published_one(published_folder):
    ours, folder, pipe, _ = published_folder
    other = trained_adapter(pipe.unet)
    pipeline = ours.from_pretrained(folder, adapter=other)
    assert pipeline.interaction["interaction"].adapter is other
    pipeline.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipeline), draw(pipe))


def test_a_published_file_is_an_adapter_too(pipe, tmp_path):
    """How many heads the base has is read off the base."""
    adapter = trained_adapter(pipe.unet, grid_positions=False)
    pipe.save_pretrained(tmp_path / "base")
    torch.save(adapter.state_dict(), tmp_path / "adapter.pth")
    ours = InteractionStableDiffusionPipeline.from_pretrained(
        tmp_path / "base", adapter=tmp_path / "adapter.pth"
    )
    ours.set_progress_bar_config(disable=True)
    assert torch.equal(draw(ours, **published(RIDING)), attached(pipe, adapter, [RIDING]))


# --- the published names ---


@pytest.mark.parametrize("guidance_scale", [3.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("run", [{}, {"num_images_per_prompt": 2}, {"prompt": ["a dog", "a bike"]}])
def test_lists_are_one_scene_for_every_image(ours, pipe, adapter, guidance_scale, run):
    run = {**run, "guidance_scale": guidance_scale}
    expected = attached(pipe, adapter, [RIDING, FEEDING], **run)
    assert torch.equal(draw(ours, **BOTH, **run), expected)
    assert not torch.allclose(draw(ours, **published(RIDING), **run), expected, atol=1e-2)


@pytest.mark.parametrize("beta", [1, 0.4, [0.2, 0.6, 0.2], 0])
def test_beta_is_the_schedule_of_one_run(ours, pipe, adapter, beta):
    """And the next run has control from its first step on."""
    run = {"num_inference_steps": 5}
    whole = attached(pipe, adapter, [RIDING], **run)
    for _ in range(2):
        drawn = draw(ours, **published(RIDING, scheduled_sampling_beta=beta), **run)
        assert torch.equal(drawn, attached(pipe, adapter, [RIDING], 1.0, beta, **run))
        assert torch.equal(drawn, whole) == (beta == 1)
        assert torch.equal(draw(ours, **published(RIDING), **run), whole)


def test_our_strength_schedule_and_speed_go_with_the_published_names(ours, pipe, adapter):
    run = {"num_inference_steps": 5}
    asked = {"interaction_strength": 1.7, "interaction_schedule": (0.5, 0.5, 0.0)}
    expected = attached(pipe, adapter, [RIDING], 1.7, (0.5, 0.5, 0.0), **run)
    assert torch.equal(draw(ours, **published(RIDING), **asked, **run), expected)
    exact, fast = (draw(ours, **published(RIDING), interaction_fast=fast, **run) for fast in (False, True))
    assert not torch.equal(exact, fast)


def test_an_action_of_none_is_boxes_only(ours, pipe, adapter):
    boxes_only = Interaction("person", None, "bike", RIDING.subject_box, RIDING.object_box)
    assert torch.equal(draw(ours, **published(boxes_only)), attached(pipe, adapter, [boxes_only]))


def test_boxes_may_be_arrays_or_tensors(ours):
    expected = draw(ours, **BOTH)
    for make in (np.array, torch.tensor):
        boxes = {name: make(value, dtype=make([0.0]).dtype) for name, value in BOXES.items()}
        assert close(draw(ours, **{**BOTH, **boxes}), expected)


def test_no_interactions_in_lists_are_the_stock_pipeline(ours, pipe):
    assert torch.equal(draw(ours, **published()), draw(pipe))
    assert torch.equal(draw(ours, interactdiffusion_scheduled_sampling_beta=0.3), draw(pipe))


def test_what_the_caller_gives_stays_as_it_is(ours):
    given = {**copy.deepcopy(BOTH), "cross_attention_kwargs": {"scale": 1.0}}
    before = copy.deepcopy(given)
    assert torch.equal(draw(ours, **given), draw(ours, **given))
    assert given == before


# --- the text ---


def test_text_is_the_lists(ours):
    expected = draw(ours, **BOTH)
    assert torch.equal(draw(ours, **BOXES, interactdiffusion_text=TEXT), expected)
    other = TEXT.replace("riding", "washing")
    assert not torch.allclose(draw(ours, **BOXES, interactdiffusion_text=other), expected, atol=1e-3)


# --- what is refused ---


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {**BOTH, "interactdiffusion_action_phrases": ["riding"]},
            "lists of equal length, got 2 subject_phrases, 1 action_phrases, 2 object_phrases, "
            "2 subject_boxes, 2 object_boxes",
        ),
        (
            {**BOXES, "interactdiffusion_text": "person=riding=bike"},
            "lists of equal length, got 1 subject_phrases",
        ),
        ({**BOXES, "interactdiffusion_text": "person=riding;"}, "subject=action=object, got 'person=riding'"),
        (
            {**BOTH, "interactdiffusion_text": TEXT},
            "phrases in lists or in a text, got interactdiffusion_subject_phrases and interactdiffusion_text",
        ),
        (
            {**BOTH, "interactions": [RIDING]},
            "interactions or published arguments, got interactions and interactdiffusion_subject_phrases",
        ),
        (
            {"interactions": [RIDING], "interactdiffusion_scheduled_sampling_beta": 0.5},
            "interactions or published arguments, got interactions and "
            "interactdiffusion_scheduled_sampling_beta",
        ),
        (
            {**BOTH, "interaction_schedule": 0.5, "interactdiffusion_scheduled_sampling_beta": 0.5},
            "interaction_schedule or interactdiffusion_scheduled_sampling_beta, got both",
        ),
        (
            without("action_phrases"),
            "interactdiffusion_action_phrases along with interactdiffusion_subject_phrases, got none",
        ),
        (
            {"interactdiffusion_text": TEXT},
            "interactdiffusion_subject_boxes along with interactdiffusion_text, got none",
        ),
        (BOXES, "interactdiffusion_subject_phrases along with interactdiffusion_subject_boxes, got none"),
        ({**BOTH, "interactdiffusion_subject_phrases": "person"}, "a list, got 'person'"),
        ({**BOTH, "interactdiffusion_subject_boxes": [[0, 0, 1, 1], [0, 0, 2, 1]]}, "x1 to be a number in"),
        ({**BOTH, "interactdiffusion_scheduled_sampling_beta": 1.5}, "a share in [0, 1], or three"),
        (published(*[RIDING] * 4), "at most 3 interactions an image, got 4"),
    ],
)
def test_nothing_is_drawn_when_refused(ours, asked, message):
    work = Calls(ours.unet, ours.text_encoder)
    with pytest.raises(SceneError) as refused:
        draw(ours, **asked)
    assert f"expected {message}" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert work.count == 0


def test_published_names_need_an_adapter(ours):
    ours.unload_interaction_adapter()
    with pytest.raises(AdapterError, match="expected an adapter to be loaded for the interactions, got none"):
        draw(ours, **BOTH)


# --- the page about it ---


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")
@pytest.mark.parametrize("number", range(3))
def test_every_snippet_of_the_migration_page_runs(pipe, tmp_path, monkeypatch, number):
    """Tiny models stand where the page names large ones."""
    adapter = trained_adapter(pipe.unet, grid_positions=False)
    monkeypatch.chdir(tmp_path)
    publish(tmp_path / "interactdiffusion" / "diffusers-v1-2", pipe, adapter, variant="fp16")
    pipe.save_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    torch.save(adapter.state_dict(), "ext_interactdiff_v1.2.pth")
    adapter.save_pretrained("interactdiffusion-v1-2")
    page = (Path(__file__).parent.parent / "docs" / "migration.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 3
    names: dict[str, Any] = {}
    exec(snippets[number].replace('"cuda"', '"cpu"'), names)
    (image, *_) = names.get("images") or [names["image"]]
    assert image.size == (16, 16)
