"""Subjects that cannot be drawn: one sentence each."""

from typing import Any

import pytest
from diffusers import EDMEulerScheduler
from test_subject import attached
from tiny import RIDING, trained_adapter
from tiny_bases import tiny_base
from tiny_dit import draw
from tiny_subject import dog, picture

from interactdiff import AdapterError, SceneError, attach
from interactdiff.subject.adapter import SubjectAdapter
from interactdiff.subject.items import Subject

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def test_what_cannot_be_drawn_is_refused_in_words(pipe: Any, flux_pipe: Any) -> None:
    with attach(pipe, SubjectAdapter()) as handle:
        with pytest.raises(SceneError, match="subjects: expected at most 8, got 9"):
            handle.set_scene([dog()] * 9)
        with pytest.raises(SceneError, match=r"expected settings of encoder_weight, .*, got 'beta'"):
            handle["subject"].configure(beta=0.2)
        with pytest.raises(SceneError, match="guidance_share: expected a number from 0 to 1, got 2"):
            handle["subject"].configure(guidance_share=2)
    bare = "expected a pipeline with a VAE and text encoders"
    with attach(pipe.unet, SubjectAdapter()) as handle, pytest.raises(AdapterError, match=bare):
        handle.set_scene([dog()])
    of_interactions = "expected an attached adapter of interaction"
    with attach(flux_pipe, SubjectAdapter()) as handle, pytest.raises(SceneError, match=of_interactions):
        handle.set_scene([RIDING])
    of_subjects = "expected an attached adapter of subject"
    with attach(pipe, trained_adapter(pipe.unet)) as handle, pytest.raises(SceneError, match=of_subjects):
        handle.set_scene([dog()])


def test_reference_guidance_is_for_batches_whose_prompts_all_have_subjects(pipe: Any) -> None:
    with attach(pipe, SubjectAdapter()) as handle:
        handle["subject"].configure(guidance=2.0)
        for others in ([], [dog(1, strength=0)]):
            handle.set_scene([[dog()], others])
            with pytest.raises(AdapterError, match=r"subjects that are seen in every prompt .* in prompt 2"):
                pipe(["a dog", "a dog"], height=32, width=32, num_inference_steps=1, output_type="latent")


def test_a_transformer_that_fills_in_is_refused(flux_pipe: Any) -> None:
    """Its tokens have more channels than a reference's latents."""
    with attach(flux_pipe, SubjectAdapter()) as handle:
        handle.set_scene([dog()])
        flux_pipe.transformer.register_to_config(in_channels=96)
        with pytest.raises(AdapterError, match="expected a transformer of 16 channels for subjects, got 96"):
            draw(flux_pipe)


def test_as_many_lists_of_subjects_as_prompts(pipe: Any) -> None:
    words = "expected subjects for each of 3 prompts, got 2 lists of them"
    with attach(pipe, SubjectAdapter()) as handle, pytest.raises(SceneError, match=words):
        handle.set_scene([[dog()], [dog()]], prompt=["a dog"] * 3)


def test_the_base_is_refused_by_its_family() -> None:
    with pytest.raises(
        AdapterError, match="expected a denoiser of U-Net, Flux, SD3 for subjects, got Chroma"
    ):
        attach(tiny_base("Chroma"), SubjectAdapter())


def test_a_scheduler_without_alphas_is_refused(pipe: Any) -> None:
    with attached(pipe, dog()):
        pipe.scheduler = EDMEulerScheduler()
        with pytest.raises(
            AdapterError, match=r"expected a scheduler of 1000 alphas_cumprod .*, got EDMEuler"
        ):
            draw(pipe)


def test_a_phrase_that_the_prompt_does_not_name_is_a_warning(pipe: Any) -> None:
    with attach(pipe, SubjectAdapter()) as handle:
        with pytest.warns(
            UserWarning, match="'dog': expected its phrase in the prompt, got 'a cat': name it"
        ):
            handle.set_scene([dog()], prompt="a cat")
        with pytest.warns(UserWarning, match="expected its phrase in the prompt, got 'a dogged cat'"):
            handle.set_scene([dog()], prompt="a dogged cat")
        with pytest.warns(UserWarning, match="its whole picture is taken"):
            handle.set_scene([Subject("dog", picture())], prompt="a Dog")
