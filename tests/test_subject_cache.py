"""Features of references: when they are computed, kept and evicted."""

from typing import Any

import pytest
import torch
from test_subject import attached, drawn
from tiny import Calls, close
from tiny_dit import draw
from tiny_subject import dog

from interactdiff.sites import denoiser_of


@pytest.fixture(params=["pipe", "xl_pipe", "flux_pipe", "sd3_pipe"])
def any_pipe(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture
def counted(any_pipe: Any) -> tuple[Any, Calls]:
    return any_pipe, Calls(denoiser_of(any_pipe))


def test_a_reference_is_run_once_for_all_seeds_prompts_and_batches(counted: tuple[Any, Calls]) -> None:
    pipe, calls = counted
    steps = {"num_inference_steps": 3}
    draw(pipe, **steps)
    plain, calls.count = calls.count, 0
    with attached(pipe, dog()) as handle:
        first = draw(pipe, **steps)
        assert calls.count == plain + 1, "one pass, batched over times"
        assert torch.equal(draw(pipe, **steps), first)
        handle.set_scene([dog()])
        draw(pipe, num_images_per_prompt=2, **steps)
        assert calls.count == 3 * plain + 1
        others = draw(pipe, prompt="a red bike", seed=1, **steps)
        assert calls.count == 4 * plain + 1, "another prompt and seed"
        handle["subject"].runner.cache.clear()
        assert close(draw(pipe, prompt="a red bike", seed=1, **steps), others)
        calls.count = 3 * plain + 1
        handle.set_scene([dog(reference_prompt="a brown dog")])
        other = draw(pipe, **steps)
        assert calls.count == 4 * plain + 2
        assert not torch.allclose(other, first, atol=1e-5)


@pytest.mark.parametrize("settings", [{"rows_at_once": 1}, {"cache_bytes": 0}, {"cache_device": "cpu"}])
def test_kept_features_are_those_that_a_pass_gives(any_pipe: Any, settings: dict[str, Any]) -> None:
    steps = {"num_inference_steps": 3}
    with attached(any_pipe, dog()):
        expected = draw(any_pipe, **steps)
    calls = Calls(denoiser_of(any_pipe))
    draw(any_pipe, **steps)
    plain, calls.count = calls.count, 0
    with attached(any_pipe, dog(), **settings) as handle:
        assert close(draw(any_pipe, **steps), expected)
        assert calls.count == plain + (1 if "cache_device" in settings else 3)
        cache = handle["subject"].runner.cache
        assert (cache.size == 0) == (cache.limit == 0)
        assert close(draw(any_pipe, **steps), expected)
        assert (
            calls.count
            == 2 * plain + {"rows_at_once": 3, "cache_bytes": 6, "cache_device": 1}[next(iter(settings))]
        )


def test_a_changed_weight_is_noticed(pipe: Any) -> None:
    with attached(pipe, dog()):
        before = draw(pipe)
        with torch.no_grad():
            pipe.unet.conv_in.weight.mul_(1.5)
        after = draw(pipe)
    assert torch.equal(drawn(pipe, dog()), after)
    assert not torch.allclose(after, before, atol=1e-3)


def test_the_cache_lets_go_of_other_runs_first(pipe: Any) -> None:
    with attached(pipe, dog()) as handle:
        draw(pipe)
        cache = handle["subject"].runner.cache
        cache.limit = 1.5 * cache.size
        handle.set_scene([dog(1)])
        draw(pipe)
        assert len(cache._kept) == 1
        assert 0 < cache.size <= cache.limit
        assert next(iter(cache._kept))[0].subject == dog(1)


def test_references_of_one_scene_do_not_evict_each_other(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not all features fit, each time of each reference is still computed once."""
    steps = {"num_inference_steps": 6}
    with attached(pipe, dog(), dog(1)) as handle:
        expected = draw(pipe, **steps)
        whole = handle["subject"].runner.cache.size
    with attached(pipe, dog(), dog(1)) as handle:
        runner, computed = handle["subject"].runner, []
        runner.cache.limit, run = 0.7 * whole, runner._run

        def counted_run(call: Any, passes: Any, reference: Any, times: Any, *more: Any) -> Any:
            computed.extend((reference.subject, time) for time in times)
            return run(call, passes, reference, times, *more)

        monkeypatch.setattr(runner, "_run", counted_run)
        assert close(draw(pipe, **steps), expected)
        assert len(computed) == len(set(computed)) == 2 * 6
        assert runner.cache.size <= runner.cache.limit


def test_fresh_noise_is_drawn_by_the_seed_and_not_kept(pipe: Any) -> None:
    pictures = []
    with attached(pipe, dog(), fresh_noise=1) as handle:
        for seed in (1, 1, 2):
            handle.set_scene([dog()], seed=seed)
            torch.rand(1)
            pictures.append(draw(pipe))
        assert handle["subject"].runner.cache.size == 0
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.allclose(pictures[0], pictures[2], atol=1e-5)
