"""Options that do as AttenCraft's released code, one by one, and what each term of the loss adds."""

from typing import Any

import pytest
import torch
from tiny_concept import PAIR, halves, photo

from interactdiff.concept import Learner, LearnOptions, Looking, MaskSettings, learn
from interactdiff.concept.losses import structural_similarity

LOOKING = Looking((100,), masks=MaskSettings(0.0, minimum_area=0.0, background="template"))
SHORT: Any = {"steps": 3, "size": 64, "looking": LOOKING, "prefix": "", "refresh_every": 0}


def learner(pipe: Any, **changes: Any) -> Learner:
    return Learner(pipe, photo(64, 64), PAIR, LearnOptions(**(SHORT | changes)), "{0} on {1}")


@pytest.mark.parametrize("fixture", ["pipe", "flux_pipe", "sd3_pipe"])
def test_the_preset_learns_on_every_family(
    fixture: str, request: pytest.FixtureRequest, monkeypatch: Any
) -> None:
    """Also where the text has no first token that could stand for the background."""
    monkeypatch.setattr("interactdiff.concept.objective.SAMPLE_STEPS", 1)
    options = LearnOptions.published(steps=2, size=64, prior_pictures=1, prior_prompt="a", prefix="")
    adapter = learn(request.getfixturevalue(fixture), photo(64, 64), PAIR, options=options, masks=halves())
    assert adapter.config.acts_on == "all"
    assert all(bool(parameter.isfinite().all()) for parameter in adapter.parameters())


def test_keys_and_values_of_the_first_token_are_constants(pipe: Any) -> None:
    """With acts_on all it has changes like every row; detached, they are trained by the other rows alone."""
    gradients = {}
    for detached in (False, True):
        with learner(pipe, acts_on="all", detach_start=detached, attention_loss="none") as one:
            one.find(given=halves())
            error, _, _ = one.objective.denoise(one.finder.prompt, [0, 1], torch.Generator().manual_seed(0))
            error.backward()
            gradients[detached] = [p.grad for n, p in one.adapter.named_parameters() if "tokens" not in n]
    pairs = zip(gradients[False], gradients[True], strict=True)
    assert all(not torch.allclose(own, detached) for own, detached in pairs)


@pytest.mark.parametrize("published", [True, False])
def test_the_published_refresh_compares_concepts_by_ssim(
    pipe: Any, published: bool, monkeypatch: Any
) -> None:
    """And not the background, which ours compares too."""
    options = {"published_refresh": published, "refresh_every": 1, "least_overlap": 1.0}
    with learner(pipe, **options) as one:
        first = one.find()
        monkeypatch.setattr(one.finder, "scores", lambda *_: first.scores)
        for turned, is_taken in ((0, False), (-1, published)):
            masks = first.masks.clone()
            masks[turned] = masks[turned].flip(1)
            assert structural_similarity(masks[turned], first.masks[turned]) < 1
            one._accept(type(first)(first.names, first.scores, masks))
            assert one._refresh(1) is is_taken


@pytest.mark.parametrize("name", ["attention_weight", "prior_weight"])
def test_each_term_of_the_loss_counts_by_its_weight(pipe: Any, name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("interactdiff.concept.objective.SAMPLE_STEPS", 1)
    options = {"acts_on": "all", "prior_pictures": 1, "prior_prompt": "a", "attention_weight": 0.0}
    losses = []
    for weight in (0.0, 1.0, 2.0):
        with learner(pipe, **(options | {"prior_weight": 0.0, name: weight})) as one:
            one.find(given=halves())
            report = one._train_step()
            losses.append(report.loss)
            assert losses[0] == pytest.approx(report.denoising)
    assert losses[1] > losses[0]
    assert losses[2] - losses[0] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-4)


def test_half_precision_computes_in_bfloat16(pipe: Any) -> None:
    """What is trained stays in float32."""
    seen = []
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.register_forward_hook(
        lambda _, __, output: seen.append(output.dtype)
    )
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        with learner(pipe, mixed_precision=precision) as one:
            one.find(given=halves())
            seen.clear()
            one._train_step()
            assert set(seen) == {dtype}
            assert {p.dtype for p in one.adapter.parameters()} == {torch.float32}
