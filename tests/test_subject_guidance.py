"""Reference guidance through unmodified pipelines, and the defects of the published code that it has not."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import Calls, close
from tiny_dit import draw
from tiny_subject import dog, trained_subject_adapter
from torch import Tensor

from interactdiff import AdapterError, attach
from interactdiff.sites import denoiser_of
from interactdiff.subject.adapter import SubjectAdapter
from interactdiff.subject.guidance import guided_by_reference, halves_of, map_rows

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
ALWAYS, NEVER = {"guidance_share": 1.0}, {"guidance_share": 0.0}


def guided(pipe: Any, seed: int = 0, run: dict[str, Any] | None = None, **settings: Any) -> Tensor:
    with attach(pipe, SubjectAdapter()) as handle:
        handle["subject"].configure(**{"guidance": 2.0, "time_gap": 0} | settings)
        handle.set_scene([dog()], seed=seed)
        return draw(pipe, **{"guidance_scale": 3.0} | (run or {}))


@pytest.fixture(params=["sd1", "sd2", "sdxl", "sd3"])
def cfg_pipe(request: pytest.FixtureRequest) -> Any:
    """A pipeline of epsilon, v or flow, with both halves of guidance in one batch."""
    if request.param == "sd3":
        return request.getfixturevalue("sd3_pipe")
    pipe = request.getfixturevalue("xl_pipe" if request.param == "sdxl" else "pipe")
    if request.param == "sd2":
        config = {**pipe.scheduler.config, "prediction_type": "v_prediction"}
        pipe.scheduler = DDIMScheduler.from_config(config)
    return pipe


def test_a_reference_step_is_equation_4(cfg_pipe: Any) -> None:
    """One step is linear in the prediction: 2 with the reference - 1 without it, both of the prompt alone.

    Without it means without it: not an empty picture that is attended to (defect c).
    """
    step = {"num_inference_steps": 1}
    got = guided(cfg_pipe, run=step, **ALWAYS)
    alone = {**step, "guidance_scale": 1.0}
    seeing, blind = guided(cfg_pipe, run=alone, guidance=0), draw(cfg_pipe, **alone)
    assert not torch.allclose(seeing, blind, atol=1e-5)
    assert (got - (2 * seeing - blind)).abs().max() < 0.02 * (seeing - blind).abs().max() + 1e-5


def test_a_text_step_is_guidance_with_the_reference_in_both_rows(cfg_pipe: Any) -> None:
    assert torch.equal(guided(cfg_pipe, **NEVER), guided(cfg_pipe, guidance=0))


def test_a_weight_of_1_is_the_prompts_row(cfg_pipe: Any) -> None:
    alone = guided(cfg_pipe, guidance=0, run={"guidance_scale": 1.0})
    assert close(guided(cfg_pipe, guidance=1.0, **ALWAYS), alone)


def test_prompt_negative_prompt_and_weight_have_an_effect(cfg_pipe: Any) -> None:
    """The negative prompt in the text steps (defect b), the weight in the others (defect a)."""
    run, other = {"num_inference_steps": 4}, {"num_inference_steps": 4, "negative_prompt": "a red bike"}
    seed = next(
        seed for seed in range(99) if {guided_by_reference(seed, n, 0.5) for n in range(4)} == {True, False}
    )
    first = guided(cfg_pipe, seed, run, guidance_share=0.5)
    assert not torch.allclose(guided(cfg_pipe, seed, other, guidance_share=0.5), first, atol=1e-5)
    assert not torch.allclose(guided(cfg_pipe, seed, run, guidance_share=0.5, guidance=4), first, atol=1e-5)
    assert torch.equal(guided(cfg_pipe, seed, run, **ALWAYS), guided(cfg_pipe, seed, other, **ALWAYS))
    assert not torch.allclose(
        guided(cfg_pipe, seed, run, **NEVER), guided(cfg_pipe, seed, other, **NEVER), atol=1e-5
    )


def test_a_seed_repeats_a_picture_whatever_was_drawn_before(pipe: Any) -> None:
    """Draws come from the scene's seed, and the reference's noise from its own (defect e)."""
    run = {"num_inference_steps": 4}
    first = guided(pipe, 1, run, time_gap=5)
    torch.rand(3)
    guided(pipe, 2, run)
    assert torch.equal(guided(pipe, 1, run, time_gap=5), first)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_every_run_has_its_share_of_steps_by_the_reference(share: float) -> None:
    """However short it is, and whatever its seed; each step has it over many seeds, by chance."""
    draws = torch.tensor(
        [[guided_by_reference(seed, n, share) for n in range(40)] for seed in range(400)], dtype=torch.float64
    )
    for steps in (4, 20, 40):
        counts = draws[:, :steps].sum(1)
        assert (counts - share * steps).abs().max() < 1
        assert (draws[:, 40 - steps :].sum(1) - share * steps).abs().max() < 1
    assert (draws.mean(0) - share).abs().max() < 0.07
    assert len(draws.unique(dim=0)) >= (3 if 0 < share < 1 else 1)


def test_a_gap_puts_less_noise_on_the_prompts_reference_and_ends_within_the_schedule(pipe: Any) -> None:
    """At the last of 1000 timesteps too (defect d)."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    run = {"num_inference_steps": 2}
    none, some = (guided(pipe, run=run, time_gap=gap, **NEVER) for gap in (0, 60))
    assert pipe.scheduler.timesteps[0] == 999
    assert not torch.allclose(none, some, atol=1e-6)
    with attach(pipe, SubjectAdapter()) as handle:
        handle["subject"].configure(guidance=2.0, time_gap=60, **NEVER)
        handle.set_scene([dog()])
        draw(pipe, guidance_scale=3.0, **run)
        kept = {
            key: one for times in handle["subject"].runner.cache._kept.values() for key, one in times.items()
        }
        first = handle["subject"]._keys[0]
        rows = first.blocks[0].keys  # of the negative prompt and of the prompt, at the last step
    noisy, clear = (
        kept[key][first.site.path][0] for key in sorted((k for k in kept if k[0] == 499), key=lambda k: k[1])
    )
    assert torch.equal(rows, torch.cat([noisy, clear]))
    signal = {(t, share[0]) for t, share in kept}
    assert len(signal) == 4
    late = sorted(share for t, share in signal if t == 499)
    alphas = pipe.scheduler.alphas_cumprod
    assert late == pytest.approx([float(alphas[559]) ** 0.5, float(alphas[439]) ** 0.5])


@pytest.mark.parametrize(
    "scheduler",
    [
        "EulerDiscrete",
        "EulerAncestralDiscrete",
        "HeunDiscrete",
        "DPMSolverMultistep",
        "LMSDiscrete",
        "KDPM2AncestralDiscrete",
        "UniPCMultistep",
    ],
)
def test_any_scheduler_and_its_own_scaling(pipe: Any, scheduler: str) -> None:
    """Of sizes that no square has, and with samplers that scale their latents (defect f)."""
    import diffusers

    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(pipe.scheduler.config)
    run = {"num_inference_steps": 3, "size": (32, 48)}
    got = guided(pipe, run=run)
    assert got.isfinite().all()
    assert torch.equal(guided(pipe, run=run), got)
    assert not torch.allclose(got, draw(pipe, guidance_scale=3.0, **run), atol=1e-4)


def test_a_step_costs_as_many_rows_as_without(pipe: Any) -> None:
    calls = Calls(pipe.unet)
    run = {"num_inference_steps": 4}
    with attach(pipe, SubjectAdapter()) as handle:
        handle["subject"].configure(guidance=2.0, time_gap=1)
        handle.set_scene([dog()])
        draw(pipe, guidance_scale=3.0, **run)
        calls.count = 0
        draw(pipe, guidance_scale=3.0, **run)
        assert calls.count == 4


@pytest.mark.parametrize("fixture", ["pipe", "flux_pipe"])
def test_one_row_a_step_is_refused_or_gets_a_second(fixture: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(fixture)
    run = {"num_inference_steps": 1, "guidance_scale": 1.0}
    with pytest.raises(AdapterError, match="got one row a picture: set extra_row to 1"):
        guided(pipe, run=run)
    seeing, blind = guided(pipe, run=run, guidance=0), draw(pipe, **run)
    got = guided(pipe, run=run, extra_row=1, **ALWAYS)
    assert got.shape == blind.shape
    assert (got - (2 * seeing - blind)).abs().max() < 0.02 * (seeing - blind).abs().max() + 1e-5
    assert torch.equal(guided(pipe, run=run, extra_row=1, **NEVER), seeing)


def test_distilled_guidance_and_true_guidance_of_flux(tokenizer: Any) -> None:
    from tiny_dit import tiny_flux_pipeline

    pipe = tiny_flux_pipeline(tokenizer, guidance_embeds=True)
    with pytest.raises(AdapterError, match="set extra_row to 1"):
        guided(pipe)
    assert not torch.allclose(guided(pipe, extra_row=1), draw(pipe, guidance_scale=3.0), atol=1e-4)
    true = {"true_cfg_scale": 3.0, "negative_prompt": "a red bike"}
    other = true | {"negative_prompt": "a cat"}
    calls = Calls(denoiser_of(pipe))
    first = guided(pipe, run=true, extra_row=1, **ALWAYS)
    assert calls.count == 2 * 2 + 1
    assert torch.equal(guided(pipe, run=other, extra_row=1, **ALWAYS), first)
    assert close(first, guided(pipe, extra_row=1, **ALWAYS))
    assert not torch.allclose(
        guided(pipe, run=other, extra_row=1, **NEVER), guided(pipe, run=true, extra_row=1, **NEVER), atol=1e-5
    )


def test_the_encoder_stays_on_in_the_row_without_reference(pipe: Any) -> None:
    """Eq. 4 takes only the reference away: equal to the formula with the encoder in both of its terms."""
    adapter = trained_subject_adapter(pipe.unet)

    def run(scale: float, **settings: Any) -> Tensor:
        with attach(pipe, adapter) as handle:
            handle["subject"].configure(**{"encoder_weight": 1.0, "time_gap": 0} | settings)
            handle.set_scene([dog()])
            return draw(pipe, num_inference_steps=1, guidance_scale=scale)

    seeing, blind = run(1.0), run(1.0, reference_weight=0)
    got = run(3.0, guidance=2.0, **ALWAYS)
    assert (got - (2 * seeing - blind)).abs().max() < 0.02 * (seeing - blind).abs().max() + 1e-5
    assert not torch.allclose(blind, draw(pipe, num_inference_steps=1, guidance_scale=1.0), atol=1e-4)


def test_parts_of_a_batch() -> None:
    assert halves_of(("unconditional", "conditional")) == (0, 1)
    assert halves_of(("conditional", "unconditional")) == (1, 0)
    assert halves_of(("conditional",)) is None
    three: Sequence[Any] = ("unconditional", "conditional", "conditional")
    with pytest.raises(AdapterError, match="expected batches of prompt and negative prompt"):
        halves_of(three)
    rows = torch.arange(4.0)
    mapped = map_rows(
        {"a": {"b": [rows, None, "x"]}, "img_ids": rows, "c": torch.ones(3)}, 4, lambda t: t + 1
    )
    assert torch.equal(mapped["a"]["b"][0], rows + 1)
    assert torch.equal(mapped["img_ids"], rows)
    assert torch.equal(mapped["c"], torch.ones(3))


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("DDIM", {}),
        ("EulerDiscrete", {"timestep_spacing": "linspace"}),
        ("EulerDiscrete", {"use_karras_sigmas": True}),
        ("EulerAncestralDiscrete", {}),
        ("HeunDiscrete", {"use_karras_sigmas": True}),
        ("FlowMatchEulerDiscrete", {"shift": 3.0}),
    ],
)
def test_references_have_the_noise_of_the_scheduler(
    pipe: Any, flux_pipe: Any, scheduler: str, options: dict[str, Any]
) -> None:
    """As it scales what the denoiser is given, at all of its timesteps, whole or not."""
    import diffusers

    host = flux_pipe if scheduler.startswith("Flow") else pipe
    made = getattr(diffusers, f"{scheduler}Scheduler").from_config(host.scheduler.config, **options)
    made.set_timesteps(7)
    host.scheduler = made
    with attach(host, SubjectAdapter()) as handle:
        passes = handle["subject"].runner.passes()
        for number, time in enumerate(made.timesteps):
            signal, spread = passes.noise_shares(float(time), host)
            if scheduler == "DDIM":
                alpha = made.alphas_cumprod[int(time)]
                expected = alpha**0.5, (1 - alpha) ** 0.5
            elif scheduler.startswith("Flow"):
                expected = 1 - made.sigmas[number], made.sigmas[number]
            else:
                sigma = made.sigmas[number]
                expected = 1 / (sigma**2 + 1) ** 0.5, sigma / (sigma**2 + 1) ** 0.5
            assert (signal, spread) == pytest.approx([float(one) for one in expected], abs=2e-3)
