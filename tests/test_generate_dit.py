"""Drawing and scoring with diffusion transformers: stock Flux and SD3 pipelines, tiny and random."""

import json
import shutil
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel, StableDiffusionPipeline
from PIL import Image
from tiny import RIDING, trained_adapter
from tiny_bases import BASES, tiny_base
from tiny_dit import TEXT_LENGTH, tiny_flux_pipeline, trained_joint_adapter, trained_layers
from transformers import CLIPTokenizer

import interactdiff.evaluation.world
import interactdiff.stickworld
from interactdiff.clear import ClearConfig
from interactdiff.clear.high_resolution import HighResolution
from interactdiff.cli import main
from interactdiff.evaluation.sampling import PictureRequest, Sampling, draw_pictures
from interactdiff.evaluation.table import format_table
from interactdiff.evaluation.world import evaluate_world
from interactdiff.generation import ScenePipeline
from interactdiff.models import absolute_name, default_adapter
from interactdiff.picture import read_record
from interactdiff.pipeline_calls import call_arguments
from interactdiff.pipelines import InteractionFluxPipeline
from interactdiff.scene import Scene, SceneError
from interactdiff.stickworld.detector import Detector

BOXES = "person|riding|bike|0.30,0.20,0.62,0.80|0.28,0.55,0.70,0.92"
LONG = " ".join(["a"] * TEXT_LENGTH)  # for T5 one more token, the end; for CLIP not too long


@pytest.fixture
def scene_pipeline(flux_pipe: Any) -> ScenePipeline:
    return ScenePipeline(flux_pipe, None, "tiny")


@pytest.fixture
def packaged(
    flux_pipe: Any, pipe: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A tiny Flux, its adapter and its layers in the place of the packaged ones, an adapter for a U-Net, and
    an empty working folder."""
    flux_pipe.save_pretrained(tmp_path / "dit", safe_serialization=True)
    transformer = flux_pipe.transformer
    trained_joint_adapter(transformer).save_pretrained(tmp_path / "dit-interaction")
    trained_layers(transformer, ClearConfig(2)).save_pretrained(tmp_path / "dit-clear")
    trained_adapter(pipe.unet).save_pretrained(tmp_path / "adapter")
    names = ("dit", "dit-interaction", "dit-clear")
    folders = {f"stickworld-{name}": tmp_path / name for name in names}
    folders["detector"] = interactdiff.stickworld.model_path("detector")
    for module in (interactdiff.stickworld, interactdiff.evaluation.world):
        monkeypatch.setattr(module, "model_path", folders.__getitem__)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_each_kind_of_pipeline_is_told_the_guidance_its_own_way(
    pipe: StableDiffusionPipeline, flux_pipe: Any, sd3_pipe: Any, tokenizer: CLIPTokenizer
) -> None:
    distilled = tiny_flux_pipeline(tokenizer, guidance_embeds=True)
    padded = {"max_sequence_length": TEXT_LENGTH}
    asked = {"prompt": "a", "negative_prompt": "b"}
    assert call_arguments(pipe, "a", "b", 2.0) == {**asked, "guidance_scale": 2.0}
    assert call_arguments(sd3_pipe, "a", "b", 2.0) == {**asked, "guidance_scale": 2.0}
    assert call_arguments(flux_pipe, "a", "b", 2.0) == {**asked, "true_cfg_scale": 2.0, **padded}
    ours = InteractionFluxPipeline(**flux_pipe.components)
    assert call_arguments(ours, "a", "b", 2.0) == call_arguments(flux_pipe, "a", "b", 2.0)
    assert call_arguments(distilled, "a", "b", 2.0) == {**asked, "guidance_scale": 2.0, **padded}


def test_a_pipeline_is_told_no_more_than_it_has_to_be(pipe: StableDiffusionPipeline, flux_pipe: Any) -> None:
    assert call_arguments(pipe, "a") == {"prompt": "a"}
    assert call_arguments(pipe, ["a", "c"], guidance_scale=2.0) == {
        "prompt": ["a", "c"], "guidance_scale": 2.0
    }  # fmt: skip
    # but true CFG is done only where there is a negative prompt
    assert call_arguments(flux_pipe, "a", guidance_scale=2.0)["negative_prompt"] == ""
    assert call_arguments(flux_pipe, ["a", "c"], guidance_scale=2.0)["negative_prompt"] == ["", ""]


def test_text_is_padded_to_what_its_encoder_takes_and_never_beyond_the_pipelines_default(
    flux_pipe: Any, sd3_pipe: Any
) -> None:
    flux_pipe.tokenizer_2.model_max_length = 2000
    assert call_arguments(flux_pipe, "a")["max_sequence_length"] == 512
    sd3_pipe.tokenizer_3 = flux_pipe.tokenizer_2
    assert call_arguments(sd3_pipe, "a")["max_sequence_length"] == 256
    sd3_pipe.tokenizer_3.model_max_length = 32
    assert call_arguments(sd3_pipe, "a")["max_sequence_length"] == 32


def test_flux_draws_what_its_pipeline_draws(scene_pipeline: ScenePipeline) -> None:
    scene = Scene("a bike", negative_prompt="a dog", seed=4, steps=2, guidance_scale=3.0, width=32, height=48)
    wanted = scene_pipeline.pipeline(
        prompt="a bike",
        negative_prompt="a dog",
        true_cfg_scale=3.0,
        width=32,
        height=48,
        num_inference_steps=2,
        max_sequence_length=TEXT_LENGTH,
        generator=torch.Generator().manual_seed(4),
    ).images[0]
    got = scene_pipeline.generate(scene)
    assert got.size == (32, 48)
    assert got.tobytes() == wanted.tobytes()
    for other in ({"seed": 5}, {"guidance_scale": 1.0}, {"negative_prompt": ""}, {"prompt": "a box"}):
        assert scene_pipeline.generate(replace(scene, **other)).tobytes() != wanted.tobytes()
    off = replace(scene, guidance_scale=1.0)
    assert (
        scene_pipeline.generate(off).tobytes()
        == scene_pipeline.generate(replace(off, guidance_scale=None)).tobytes()
    )


def test_noise_that_a_scheduler_adds_at_each_step_is_the_seeds(scene_pipeline: ScenePipeline) -> None:
    pipeline = scene_pipeline.pipeline
    even = scene_pipeline.generate(Scene("a bike", seed=4, steps=3))
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, stochastic_sampling=True
    )
    first, again, other = (scene_pipeline.generate(Scene("a bike", seed=seed, steps=3)) for seed in (4, 4, 5))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() not in (even.tobytes(), other.tobytes())
    assert "step" not in vars(pipeline.scheduler), "the pipeline is left as it was"

    ours = InteractionFluxPipeline(**pipeline.components)
    arguments = {**scene_pipeline.pipeline_kwargs(Scene("a bike")), "num_inference_steps": 3}
    drawn = ours(**arguments, height=256, width=256, generator=torch.Generator().manual_seed(4)).images[0]
    assert drawn.tobytes() == first.tobytes()

    enlarge = HighResolution(pipeline, scales=(1, 2), steps=4, strength=0.7, progress=False)
    sizes = {"height": 32, "width": 32, "base_steps": 2, "max_sequence_length": TEXT_LENGTH}
    twice = [enlarge("a bike", **sizes).images for _ in range(2)]
    assert [image.tobytes() for image in twice[0]] == [image.tobytes() for image in twice[1]]

    how = Sampling(steps=3, size=32)
    requests = [PictureRequest(number, "a bike") for number in range(2)]
    both = draw_pictures(requests, scene_pipeline, 0, how)
    torch.testing.assert_close(
        both[1:], draw_pictures(requests[1:], scene_pipeline, 0, how), atol=1e-4, rtol=0
    )
    assert (both[0] - both[1]).abs().max() > 0.01


def test_a_size_that_nobody_asked_for_is_the_models_own(scene_pipeline: ScenePipeline, sd3_pipe: Any) -> None:
    assert scene_pipeline.size == 256  # which is all that a Flux pipeline knows
    assert replace(scene_pipeline, model="stickworld-dit").size == 128
    sd3 = ScenePipeline(sd3_pipe, None, "tiny")
    assert sd3.generate(Scene("a dog", steps=1)).size == (32, 32)
    assert sd3.generate(Scene("a dog", steps=1, width=24)).size == (24, 32)


def test_what_the_pipeline_would_cut_or_round_is_refused(
    scene_pipeline: ScenePipeline, sd3_pipe: Any
) -> None:
    for name in ("prompt", "negative_prompt"):
        with pytest.raises(SceneError, match=rf"^{name}: expected at most {TEXT_LENGTH} tokens.* got 11$"):
            scene_pipeline.set_scene(replace(Scene("a"), **{name: LONG}))
    scene_pipeline.set_scene(
        Scene("standing balancing carrying")
    )  # CLIP spells it in 28 tokens and truncates it
    scene_pipeline.set_scene(Scene(LONG.removesuffix(" a")))
    with pytest.raises(SceneError, match="expected at most 24 tokens"):
        ScenePipeline(sd3_pipe, None, "tiny").set_scene(Scene("b" * 30))
    scene_pipeline.pipeline.vae_scale_factor = 8  # as Flux has it
    scene_pipeline.set_scene(Scene("a", width=32))
    with pytest.raises(SceneError, match=r"^height: expected a multiple of 16 pixels, got 40$"):
        scene_pipeline.set_scene(Scene("a", height=40))


@pytest.mark.parametrize("name", BASES)
def test_the_newer_bases_take_what_they_are_given(name: str) -> None:
    pipeline = ScenePipeline(tiny_base(name), None, "tiny")
    scene = Scene("a dog", steps=1, width=32, height=32, guidance_scale=2.0)
    kwargs = pipeline.pipeline_kwargs(scene)
    signature(pipeline.pipeline.__call__).bind(**kwargs)
    assert pipeline.size % 8 == 0
    if "Flux2" in name:  # whose text encoder is larger than any of ours
        with pytest.raises(SceneError, match=r"negative_prompt: expected none for Flux2\w*Pipeline"):
            pipeline.pipeline_kwargs(replace(scene, negative_prompt="rain"))
        return
    previews: list[Any] = []
    image = pipeline.generate(scene, lambda step, preview: previews.append(preview()))
    assert image.size == (32, 32)
    assert [None if one is None else one.size for one in previews] == [
        None if name == "Qwen-Image" else (32, 32)
    ]


def test_interactions_need_an_adapter(scene_pipeline: ScenePipeline) -> None:
    with pytest.raises(SceneError, match=r"expected an adapter for 1 interactions .* got none for tiny"):
        scene_pipeline.set_scene(Scene("a", (RIDING,)))


def test_the_packaged_transformer_has_a_name_and_an_adapter() -> None:
    assert default_adapter("stickworld-dit") == "stickworld-dit-interaction"
    assert absolute_name("stickworld-dit") == "stickworld-dit"


def test_generate_draws_with_the_packaged_transformer(packaged: Path) -> None:
    flags = ["--model", "stickworld-dit", "--steps", "2", "--device", "cpu"]
    assert main(["generate", "a red bike", *flags, "--out", "x.png"]) == 0
    record = read_record("x.png")
    adapter = "stickworld-dit-interaction"
    assert (record.model, record.adapters, record.dtype) == (
        "stickworld-dit", {"interaction": adapter}, "float32"
    )  # fmt: skip
    assert Image.open("x.png").size == (128, 128)
    assert main(["generate", "a red bike", *flags, "--interaction", BOXES, "--out", "boxes.png"]) == 0
    assert Image.open("boxes.png").tobytes() != Image.open("x.png").tobytes()
    assert main(["generate", "--from", "x.png"]) == 0
    assert Path("x.again.png").read_bytes() == Path("x.png").read_bytes()
    assert main(["generate", "--from", "x.png", "--guidance-scale", "4", "--out", "own.png"]) == 0
    assert Image.open("own.png").tobytes() == Image.open("x.png").tobytes()
    assert main(["generate", "--from", "x.png", "--guidance-scale", "1", "--out", "off.png"]) == 0
    assert Image.open("off.png").tobytes() != Image.open("x.png").tobytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--model", "../dit", "--interaction", BOXES],
            "expected an adapter for 1 interactions (interaction), got none for ",
        ),
        (["--adapter", "../adapter"], "expected the base that the adapter is made for, a U-Net of"),
        (["--negative-prompt", LONG], "negative_prompt: expected at most 10 tokens"),
    ],
)
def test_what_a_transformer_cannot_draw_is_one_sentence(
    flags: list[str], message: str, packaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a bike", "--model", "stickworld-dit", "--device", "cpu", *flags]) == 2
    assert capsys.readouterr().err.startswith(f"interactdiff: {message}")
    assert list(Path().iterdir()) == []


def test_a_transformer_of_an_unknown_kind_is_refused(
    packaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make: Any = PixArtTransformer2DModel
    other = make(
        num_attention_heads=1, attention_head_dim=8, num_layers=1, cross_attention_dim=8,
        norm_num_groups=1, sample_size=8, caption_channels=8,
    )  # fmt: skip
    shutil.rmtree(packaged / "dit/transformer")
    other.save_pretrained(packaged / "dit/transformer")
    index = packaged / "dit/model_index.json"
    parts = json.loads(index.read_text())
    index.write_text(json.dumps(parts | {"transformer": ["diffusers", "PixArtTransformer2DModel"]}))
    assert main(["generate", "a bike", "--model", "stickworld-dit", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"interactdiff: {packaged / 'dit'}: expected a UNet2DConditionModel, a ")
    assert said.endswith("got PixArtTransformer2DModel\n")


def test_pictures_that_are_scored_are_guided_and_have_noise_of_their_own(
    scene_pipeline: ScenePipeline,
) -> None:
    requests = [PictureRequest(0, "a red bike"), PictureRequest(1, "a dog")]
    together = draw_pictures(requests, scene_pipeline, seed=0, how=Sampling(2, 3.0, 32))
    assert together.shape == (2, 3, 32, 32)
    alone = torch.cat(
        [draw_pictures([request], scene_pipeline, seed=0, how=Sampling(2, 3.0, 32)) for request in requests]
    )
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert not torch.allclose(
        together, draw_pictures(requests, scene_pipeline, seed=0, how=Sampling(2, 1.0, 32)), atol=1e-3
    )


def test_a_transformer_is_scored_by_its_captions(scene_pipeline: ScenePipeline) -> None:
    torch.manual_seed(0)
    detector = Detector((8, 8, 8, 8)).eval()
    table = evaluate_world(
        "", None, 2, 5, 1, 2, "cpu", progress=False, size=32, scene_pipeline=scene_pipeline, detector=detector
    )
    assert list(table["rows"]) == list(table["text"]) == ["real", "base"]
    assert "found anywhere" in format_table(table)


def test_evaluate_scores_the_packaged_transformer(packaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "stickworld-dit", "--scenes", "1", "--steps", "1", "--device", "cpu"]
    assert main(["evaluate", "--world", *flags, "--json", "score.json"]) == 0
    table = json.loads(Path("score.json").read_text())
    assert (table["model"], table["adapter"]) == ("stickworld-dit", "stickworld-dit-interaction")
    assert list(table["rows"]) == ["real", "base", "boxes_only", "adapter", "adapter_clear"]
    assert (table["size"], table["guidance_scale"]) == (128, 4.0)
    assert table["text"]["real"]["object_acc"] == 1.0
    assert format_table(table) in capsys.readouterr().out
    assert main(["evaluate", "--world", "--model", "../dit", "--fast"]) == 2
    assert "--fast: expected --adapter for the model ../dit, got none" in capsys.readouterr().err


def test_methods_are_drawn_with_kept_and_drawn_again(packaged: Path) -> None:
    flags = ["--model", "stickworld-dit", "--steps", "2", "--device", "cpu"]
    method = "high_resolution:scale=2,steps=4,strength=0.5"
    assert main(["generate", "a bike", *flags, "--method", method, "--out", "large.png"]) == 0
    assert Image.open("large.png").size == (256, 256)
    kept = read_record("large.png").methods
    assert kept == {"high_resolution": {"scale": 2, "steps": 4, "strength": 0.5, "shift": 1.0, "window": 8}}
    assert main(["generate", "--from", "large.png"]) == 0
    assert Path("large.again.png").read_bytes() == Path("large.png").read_bytes()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("high_resolution:scale", "--method: expected NAME:SETTING=number, got 'high_resolution:scale'"),
        (
            "high_resolution:scale=big",
            "--method: expected NAME:SETTING=number, got 'high_resolution:scale=big'",
        ),
        ("other", "method: expected one of clear, concept, subject, high_resolution, got 'other'"),
    ],
)
def test_a_method_that_is_none_is_one_sentence(
    method: str, message: str, packaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a", "--model", "stickworld-dit", "--device", "cpu", "--method", method]) == 2
    assert capsys.readouterr().err == f"interactdiff: {message}\n"
    assert list(Path().iterdir()) == []
