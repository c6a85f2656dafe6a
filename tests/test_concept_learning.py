"""Learning: losses by hand, which parameters move, runs that go on as they would have, and the command."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_concept import PAIR, draw, halves, photo
from torch import Tensor

from interactdiff.concept import (
    ConceptAdapter,
    ConceptError,
    Learner,
    LearnOptions,
    Looking,
    MaskSettings,
    learn,
)
from interactdiff.concept.denoising import Denoising
from interactdiff.concept.losses import (
    sampling_weights,
)
from interactdiff.concept.sampling import chosen_concepts
from interactdiff.latent_encoding import picture_latents

LOOKING = Looking((100, 200), masks=MaskSettings(0.0, minimum_area=0.0, background="template"))
SHORT = {"steps": 3, "size": 32, "looking": LOOKING, "prefix": "", "refresh_every": 2, "checkpoint_every": 0}
BASES = ["pipe", "xl_pipe", "flux_pipe", "sd3_pipe"]


@pytest.fixture(params=BASES)
def any_pipe(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def learned(pipe: Any, **changes: Any) -> ConceptAdapter:
    options = {"image": photo(), "masks": halves(), "prompt": "{0} on {1}"} | SHORT | changes
    return learn(pipe, concepts=PAIR, **options)


def test_how_concepts_are_drawn() -> None:
    counts = Counter(tuple(sorted(chosen_concepts(2, random.Random(n)))) for n in range(3000))
    assert all(abs(count / 3000 - 1 / 3) < 0.04 for count in counts.values())
    assert len(counts) == 3
    assert {tuple(chosen_concepts(2, random.Random(n))) for n in range(50)} >= {(0, 1), (1, 0)}
    sizes = Counter(len(chosen_concepts(5, random.Random(n))) for n in range(2000))
    assert all(abs(sizes[size] / 2000 - 0.2) < 0.04 for size in range(1, 6))
    weights = sampling_weights([4.0, 1.0])
    assert weights == pytest.approx([0.2, 0.8])
    assert sampling_weights([1.0, 1000.0])[0] == pytest.approx(0.9)
    drawn = Counter(tuple(sorted(chosen_concepts(2, random.Random(n), weights))) for n in range(3000))
    assert drawn[0, 1] / 3000 == pytest.approx(1 / 3, abs=0.04)
    assert drawn[1,] > 3 * drawn[0,]


def test_noise_levels_are_those_of_the_schedulers(any_pipe: Any) -> None:
    """Once the noise is taken out by what should be predicted, the photo is there again."""
    torch.manual_seed(0)
    denoising = Denoising.of(any_pipe)
    sized = denoising.sized(photo(), 32)
    latents = denoising.latents(sized)
    assert latents.shape[3] > latents.shape[2]
    noise, times = torch.randn(latents.shape), torch.tensor([300])
    noisy, target = (f(latents, noise, times) for f in (denoising.noisy, denoising.target))
    if hasattr(any_pipe, "unet"):
        a = any_pipe.scheduler.alphas_cumprod[300]
        assert torch.allclose((noisy - (1 - a).sqrt() * target) / a.sqrt(), latents, atol=1e-5)
    else:
        assert torch.allclose(noisy - 0.3 * target, latents, atol=1e-5)
    with torch.no_grad():
        predicted = denoising.predict(noisy, times, denoising.encode(["a cat"], sized.size[::-1]))
    assert predicted.shape == latents.shape


@pytest.mark.parametrize(("dtype", "raised"), [(torch.float16, True), (torch.bfloat16, False)])
def test_a_vae_that_overflows_encodes_in_float32(xl_pipe: Any, dtype: torch.dtype, raised: bool) -> None:
    """In float16 alone, and is afterwards what it was; another VAE stays in its own precision."""
    vae, picture, seen = xl_pipe.vae.to(dtype), Denoising.of(xl_pipe).sized(photo(), 32), []
    vae.register_to_config(force_upcast=True)
    vae.encoder.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    latents = picture_latents(vae, picture)
    assert (seen, vae.dtype) == ([torch.float32 if raised else dtype], dtype)
    assert latents.dtype == torch.float32
    with torch.no_grad():
        pixels = torch.tensor(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
        own = vae.float().encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    assert torch.allclose(latents, own, atol=1e-6 if raised else 0.05)


def test_velocity_is_the_target_where_the_scheduler_predicts_it(pipe: Any) -> None:
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="v_prediction")
    denoising = Denoising.of(pipe)
    latents, noise, times = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([500])
    a = pipe.scheduler.alphas_cumprod[500]
    expected = a.sqrt() * noise - (1 - a).sqrt() * latents
    assert torch.allclose(denoising.target(latents, noise, times), expected, atol=1e-5)


# --- training ---


def test_it_trains_the_tokens_and_the_changes_alone(any_pipe: Any) -> None:
    before = {(key, n): p.clone() for key, part in any_pipe.components.items()
              if hasattr(part, "named_parameters") for n, p in part.named_parameters()}  # fmt: skip
    tokenizer, start = any_pipe.tokenizer, ConceptAdapter.for_pipeline(any_pipe, PAIR)
    plain = draw(any_pipe, "a cat")
    adapter = learned(any_pipe, sampling="reweighted", joint_share=1.0, batch_size=2)
    assert (adapter.training, adapter.name) == (False, "concept")
    for concept in adapter.config.concepts:
        for name in adapter.config.widths:
            assert not torch.equal(adapter.vectors_of(concept, name), start.vectors_of(concept, name)), name
    moved = [bool(p.abs().sum()) for n, p in adapter.named_parameters() if not n.startswith("concept_tokens")]
    assert moved
    assert all(moved)
    after = {(key, n): p for key, part in any_pipe.components.items()
             if hasattr(part, "named_parameters") for n, p in part.named_parameters()}  # fmt: skip
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.requires_grad for p in any_pipe.text_encoder.parameters())
    assert any_pipe.tokenizer is tokenizer
    assert torch.equal(draw(any_pipe, "a cat"), plain)
    assert adapter.masks is not None
    assert adapter.masks.shape[0] == 3


def test_published_options_train_too(pipe: Any, monkeypatch: Any) -> None:
    """Bugs and all: the last token stays where it was, and the picture as a whole counts."""
    monkeypatch.setattr("interactdiff.concept.objective.SAMPLE_STEPS", 1)
    options = LearnOptions.published(steps=2, size=32, prior_pictures=1, prior_prompt="a", prefix="")
    start = ConceptAdapter.for_pipeline(pipe, PAIR)
    adapter = learn(pipe, photo(64, 64), PAIR, options=options, masks=halves())
    first, last = adapter.config.concepts
    assert torch.equal(adapter.vectors_of(last, "text_encoder"), start.vectors_of(last, "text_encoder"))
    assert not torch.equal(adapter.vectors_of(first, "text_encoder"), start.vectors_of(first, "text_encoder"))
    assert adapter.config.acts_on == "all"


def test_the_prior_is_of_the_base_and_holds_the_changes_back(pipe: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("interactdiff.concept.objective.SAMPLE_STEPS", 1)
    options = LearnOptions.published(
        size=32, prior_pictures=1, prior_prompt="a", prefix="", published_refresh=False
    )
    with Learner(pipe, photo(), PAIR, options) as learner:
        learner.find(given=halves())
        for name, parameter in learner.adapter.named_parameters():
            if not name.startswith("concept_tokens"):
                parameter.data.normal_(std=0.3)
        learner.objective.prior_error(0, torch.Generator().manual_seed(0)).backward()
        moved = [p.grad for n, p in learner.adapter.named_parameters() if not n.startswith("concept_tokens")]
        assert all(grad is not None and grad.abs().sum() > 0 for grad in moved)
        size = {"width": learner.photo.width, "height": learner.photo.height}
    drawn = pipe("a", num_inference_steps=1, generator=torch.Generator().manual_seed(0), **size).images[0]
    assert torch.allclose(learner.objective._prior, learner.denoising.latents(drawn), atol=1e-4)


@pytest.mark.parametrize("changes", [{"rank": 2, "projections": "v"}, {"mixed_precision": "bf16"},
                                     {"vectors": 2, "attention_loss": "none"}])  # fmt: skip
def test_other_options(pipe: Any, changes: dict[str, Any]) -> None:
    adapter = learned(pipe, **changes)
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    assert all(bool(p.isfinite().all()) for p in adapter.parameters())
    assert adapter.config.rank == changes.get("rank", 0)


def test_custom_diffusion_reads_no_mask(pipe: Any) -> None:
    """Concepts that are not found are no hindrance; the whole picture counts."""
    options = LearnOptions.custom_diffusion(steps=1, size=32, prefix="", looking=Looking((100,)))
    adapter = learn(pipe, photo(), PAIR, options=options, boxes={"<hero>": (0.0, 0.0, 0.01, 0.01)})
    assert adapter.config.acts_on == "all"
    with pytest.raises(ConceptError, match="expected <hero> in the photo"):
        learn(
            pipe,
            photo(),
            PAIR,
            boxes={"<hero>": (0.0, 0.0, 0.01, 0.01)},
            **SHORT | {"looking": Looking((100,))},
        )


class Stop(BaseException):
    """As Ctrl-C."""


def test_a_run_that_was_interrupted_goes_on_as_it_would_have(pipe: Any, tmp_path: Path) -> None:
    whole = learned(pipe, steps=5)
    seen: list[int] = []

    def stop(report: Any) -> None:
        seen.append(report.step)
        if report.step == 3:
            raise Stop

    with pytest.raises(Stop):
        learned(pipe, steps=5, checkpoint=tmp_path, on_step=stop)
    assert not pipe.unet._forward_pre_hooks, "still attached"
    state = json.loads((tmp_path / "checkpoint.json").read_text())
    assert state["step"] == 3
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    resumed = learned(pipe, steps=5, checkpoint=tmp_path, on_step=lambda report: seen.append(report.step))
    assert seen == [1, 2, 3, 4, 5]
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6), name
    with pytest.raises(ConceptError, match="got one with another options: delete it"):
        learned(pipe, steps=5, checkpoint=tmp_path, learning_rate=1.0)
    for changes, what in (
        ({"image": photo().transpose(Image.Transpose.FLIP_LEFT_RIGHT)}, "photo"),
        ({"masks": halves() | {"<hero>": halves(16, 16)["<blob>"]}}, "masks"),
        ({"boxes": {"<hero>": (0.0, 0.0, 0.5, 1.0)}}, "boxes"),
    ):
        with pytest.raises(ConceptError, match=f"got one with another {what}: delete it"):
            learned(pipe, steps=5, checkpoint=tmp_path, **changes)
    pipe.unet.conv_in.weight.data.add_(1)
    with pytest.raises(ConceptError, match="got one with another model: delete it"):
        learned(pipe, steps=5, checkpoint=tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"half")
    with pytest.raises(ConceptError, match="expected a whole checkpoint"):
        learned(pipe, steps=5, checkpoint=tmp_path)


def test_masks_are_looked_for_again_and_taken_if_they_are_close(pipe: Any) -> None:
    options = LearnOptions(**{**SHORT, "least_overlap": 0.0})  # type: ignore[arg-type]
    with Learner(pipe, photo(), PAIR, options, "{0} on {1}") as learner:
        first = learner.find()
        reports = learner.train()
        assert [report.accepted for report in reports] == [None, None, True]
        assert learner.masks is not first
        assert set(reports[0].attention) <= set(PAIR)
    options = LearnOptions(**{**SHORT, "least_overlap": 1.0})  # type: ignore[arg-type]
    with Learner(pipe, photo(), PAIR, options, "{0} on {1}") as learner:
        first = learner.find()
        other = Tensor(first.masks.clone())
        learner._accept(type(first)(first.names, first.scores, ~other.bool()))
        kept = learner.masks
        assert [report.accepted for report in learner.train()] == [None, None, False]
        assert learner.masks is kept


def test_learning_lowers_the_error_of_the_photo(pipe: Any) -> None:
    """On one noise at one level, over a short run: a learner that does nothing fails."""
    options = LearnOptions(**{**SHORT, "steps": 8, "refresh_every": 0, "learning_rate": 1e-2,
                              "token_learning_rate": 5e-2})  # type: ignore[arg-type]  # fmt: skip
    with Learner(pipe, photo(), PAIR, options, "{0} on {1}") as learner:
        learner.find(given=halves())

        @torch.no_grad()
        def error() -> float:
            parts = []
            for seed in range(4):
                generator = torch.Generator().manual_seed(seed)
                value, _, _ = learner.objective.denoise(learner.finder.prompt, [0, 1], generator)
                parts.append(float(value))
            return sum(parts)

        before = error()
        learner.train()
        assert error() < 0.99 * before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "expected steps to be a whole number from 1 up, got 0"),
        ({"steps": 2.0}, "expected steps to be a whole number from 1 up, got 2.0"),
        ({"learning_rate": -1.0}, "expected learning_rate to be a number from 0 up, got -1.0"),
        ({"attention_weight": float("nan")}, "expected attention_weight to be a number from 0 up, got nan"),
        ({"weight_decay": float("inf")}, "expected weight_decay to be a number from 0 up, got inf"),
        ({"full_image_weight": 5}, "expected full_image_weight to be a number from 0 to 1, got 5"),
        ({"joint_share": 7.0}, "expected joint_share to be a number from 0 to 1, got 7.0"),
        ({"seed": 10**20}, "expected seed to be a whole number from 0 to 4294967295, got 1000000"),
        ({"vectors": 0}, "expected vectors to be a whole number from 1 to 16, got 0"),
        ({"size": 0}, "expected size to be a whole number from 1 up, got 0"),
        ({"sampling": "random"}, "expected sampling of uniform, reweighted"),
        ({"prior_pictures": 2}, "expected acts_on 'all' with prior_pictures"),
        ({"projections": "q"}, "expected projections of kv, k, v, none"),
        ({"masks": {"<hero>": torch.zeros(4, 4)}}, "expected a mask that is not empty for <hero>"),
        (
            {"masks": {"<cow>": torch.ones(4, 4)}},
            "expected boxes and masks of <hero>, <blob>, got one of <cow>",
        ),
        ({"published_refresh": True}, "expected maps of 7 x 7 or more for published_refresh"),
        ({"prompt": "{0}"}, "expected a prompt with each of {0}, {1} once"),
    ],
)
def test_what_is_refused_leaves_the_pipeline(
    pipe: Any, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConceptError, match=re.escape(words)):
        learned(pipe, checkpoint=tmp_path / "run", **changes)
    assert not pipe.unet._forward_pre_hooks
    assert not (tmp_path / "run").exists()
    assert len(pipe.tokenizer) == 54


def test_options_of_the_command_line() -> None:
    assert LearnOptions.parsed(["rank=8", "learning_rate=1e-3", "freeze_last_token=true", "prefix="]) == {
        "rank": 8, "learning_rate": 1e-3, "freeze_last_token": True, "prefix": "",
    }  # fmt: skip
    for wrong, words in (("ranks=1", "expected an option of"), ("rank=x", "expected rank like 0, got 'x'"),
                         ("learning_rate=x", "expected learning_rate like 0.0001, got 'x'"),
                         ("vectors=4", "expected --vectors for vectors, got 'vectors=4'")):  # fmt: skip
        with pytest.raises(ConceptError, match=words):
            LearnOptions.parsed([wrong])
    assert LearnOptions.custom_diffusion(steps=2).full_image_weight == 1.0


def test_options_are_those_that_are_given_or_suit_the_base(pipe: Any) -> None:
    own = {"learning_rate": 5e-4}
    options = LearnOptions().suited(own)
    assert (options.learning_rate, options.token_learning_rate, options.max_timestep) == (5e-4, 1e-3, 1000)
    assert options.prefix == "a photo of "
    assert LearnOptions().suited({"prefix": "a "}).prefix == "a "
    assert LearnOptions(prefix="").suited({"prefix": "a "}).prefix == ""
    options = LearnOptions(learning_rate=1e-2, token_learning_rate=0.0, max_timestep=1).suited(own)
    assert (options.learning_rate, options.token_learning_rate, options.max_timestep) == (1e-2, 0.0, 1)
    with Learner(pipe, photo(), PAIR, LearnOptions(**SHORT), "{0} on {1}") as learner:  # type: ignore[arg-type]
        assert [group["lr"] for group in learner._optimizer.param_groups] == [1e-3, 1e-4]


@pytest.mark.parametrize("count", [1, 4])
def test_the_photo_is_noised_up_to_the_most_that_is_set(pipe: Any, count: int, monkeypatch: Any) -> None:
    """Each copy of a step at a level of its own, spread evenly."""
    options = LearnOptions(**{**SHORT, "max_timestep": 250, "batch_size": count})  # type: ignore[arg-type]
    with Learner(pipe, photo(), PAIR, options, "{0} on {1}") as learner:
        learner.find(given=halves())
        times: list[float] = []
        noisy = learner.denoising.noisy

        def seen(latents: Tensor, noise: Tensor, at: Tensor) -> Tensor:
            times.extend(at.tolist())
            assert [int(time // (250 / count)) for time in at.tolist()] == list(range(count))
            return noisy(latents, noise, at)

        monkeypatch.setattr(learner.denoising, "noisy", seen)
        for seed in range(40):
            learner.objective.denoise(learner.finder.prompt, [0, 1], torch.Generator().manual_seed(seed))
    assert 200 < max(times) < 250


def test_a_mask_of_the_whole_photo_leaves_weights_to_sample_by(pipe: Any) -> None:
    whole = {"<hero>": torch.ones(8, 8)}
    options = {**SHORT, "masks": whole, "sampling": "reweighted", "joint_share": 0.0}
    adapter = learn(pipe, photo(), {"<hero>": "cat"}, prompt="{0} on", **options)
    assert adapter.tokens == ("<hero>",)


def test_a_photo_that_is_too_long_for_the_positions_is_refused(sd3_pipe: Any) -> None:
    long = Image.new("RGB", (4000, 100))
    with pytest.raises(ConceptError, match=r"at most \d+ pixels a side at a size of 64, got one of \d+ x"):
        Denoising.of(sd3_pipe).sized(long, 64)


def test_the_class_learns_as_the_function_does(pipe: Any) -> None:
    own = ConceptAdapter.learn(pipe, photo(), PAIR, masks=halves(), prompt="{0} on {1}", **SHORT)
    expected = learned(pipe).state_dict()
    assert own.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in own.state_dict().items())
