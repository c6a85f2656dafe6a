"""Masks and photos as people give them: thin, nested, on other devices' terms, with transparency, turned."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_concept import PAIR, halves, photo

from interactdiff.concept import (
    ConceptError,
    Learner,
    LearnOptions,
    Looking,
    MaskSettings,
    find_masks,
    fold,
    learn,
)
from interactdiff.concept.masks import make_masks
from interactdiff.concept.pictures import as_shown
from interactdiff.concept.prompts import segments

SETTINGS = MaskSettings(background="start")


def test_thin_masks_have_a_cell_and_small_ones_are_not_refused() -> None:
    scores = torch.rand(3, 8, 8)
    thin, large = torch.zeros(64, 64), torch.zeros(64, 64)
    thin[10, 20:23], large[32:] = 1, 1
    masks = make_masks(["a", "b"], scores, SETTINGS, given={"a": thin, "b": large})
    assert masks.masks[0].nonzero().tolist() == [[1, 2]]
    masks.check(0.5, given=["a", "b"])
    with pytest.raises(ConceptError, match=r"expected a in the photo, got a mask of 1.6 % of it"):
        masks.check(0.5, given=["b"])


@pytest.mark.parametrize("order", [("inner", "outer"), ("outer", "inner")])
def test_of_nested_masks_the_smaller_one_has_what_they_share(order: tuple[str, str]) -> None:
    inner, outer = torch.zeros(8, 8), torch.zeros(8, 8)
    inner[2:4, 2:4], outer[1:6, 1:6] = 1, 1
    given = {"inner": inner, "outer": outer}
    masks = make_masks(["inner", "outer"], torch.rand(3, 8, 8), SETTINGS, given={n: given[n] for n in order})
    assert torch.equal(masks.masks[0], inner.bool())
    assert torch.equal(masks.masks[1], outer.bool() & ~inner.bool())
    assert torch.equal(masks.masks[2], ~outer.bool())


def test_empty_masks_are_allowed_where_the_least_area_is_zero() -> None:
    scores = torch.zeros(3, 8, 8)
    scores[2] = 1
    masks = make_masks(["a", "b"], scores, MaskSettings(background="start", minimum_area=0.0))
    masks.check(0.0)
    with pytest.raises(ConceptError, match="expected a in the photo"):
        masks.check(0.01)


def test_given_masks_leave_what_attention_says(pipe: Any) -> None:
    """By which `sampling` "reweighted" draws more often what attention finds less well."""
    options = LearnOptions(size=64, prefix="", looking=Looking((100,)), sampling="reweighted")
    with Learner(pipe, photo(64, 64), PAIR, options, "{0} on {1}") as learner:
        masks = learner.find(given=halves())
        assert torch.equal(masks.scores, learner.finder.scores())
        scores = torch.full_like(masks.scores, 0.25)
        scores[0][masks.masks[0]] = 0.75  # found three times as well as the other
        learner._accept(type(masks)(masks.names, scores, masks.masks))
        assert learner._weights == pytest.approx([0.25, 0.75])


def test_photos_are_read_as_they_are_shown(pipe: Any, tmp_path: Path) -> None:
    upright = photo(64, 48)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as stored:
        assert np.array_equal(np.asarray(as_shown(stored)), np.asarray(upright))
        looking = Looking((100,), masks=MaskSettings(0.0, minimum_area=0.0, unassigned="nearest"))
        options: Any = {"size": 32, "prompt": "{0} on {1}", "looking": looking}
        found = find_masks(pipe, stored, ["c", "d"], **options)
    assert torch.equal(found.scores, find_masks(pipe, upright, ["c", "d"], **options).scores)
    clear = upright.convert("RGBA")
    clear.putalpha(0)
    assert np.asarray(as_shown(clear)).min() == 255
    deep = Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16))
    assert as_shown(deep).getpixel((0, 0)) == (128, 128, 128)
    with pytest.raises(ConceptError, match="photo: expected a picture of 8 or 16 bits"):
        as_shown(Image.new("F", (8, 8)))


def test_text_encoders_that_are_not_loaded_have_no_rows(sd3_pipe: Any) -> None:
    """Diffusers fills the rows of a missing T5 with zeros, whatever its tokenizer says."""
    sd3_pipe.tokenizer_3 = sd3_pipe.tokenizer
    assert sd3_pipe.text_encoder_3 is None
    assert [first for _, first, _ in segments(sd3_pipe)] == [0]


def test_an_interruption_within_a_step_keeps_the_last_checkpoint(
    pipe: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Weights of half a step are of no step."""
    options: Any = {"size": 64, "prefix": "", "steps": 3, "checkpoint_every": 2, "refresh_every": 0}

    def run(checkpoint: Path | None) -> Any:
        return learn(
            pipe, photo(64, 64), PAIR, masks=halves(), prompt="{0} on {1}", checkpoint=checkpoint, **options
        )

    expected = run(None).state_dict()
    step, count = torch.optim.AdamW.step, 0

    def interrupted(self: Any, *args: Any, **given: Any) -> Any:
        nonlocal count
        count += 1
        done = step(self, *args, **given)
        if count == 3:
            raise KeyboardInterrupt
        return done

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert '"step": 2' in (tmp_path / "checkpoint.json").read_text()
    made = run(tmp_path).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in made.items())


def test_folded_into_an_old_clip_it_pools_at_the_end(pipe: Any) -> None:
    """With `eos_token_id` 2 it pools at the highest id, which is a new token's."""
    adapter = learn(
        pipe, photo(64, 64), PAIR, masks=halves(), prompt="{0} on {1}", steps=1, size=64, acts_on="all"
    )
    core = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
    core.eos_token_id = pipe.text_encoder.config.eos_token_id = 2
    fold(pipe, adapter)
    ids = pipe.tokenizer("a <hero> on", return_tensors="pt").input_ids
    assert int(ids.argmax()) < ids.shape[1] - 1, "the highest id is not the end's"
    made = pipe.text_encoder(ids)
    assert torch.equal(made.pooler_output[0], made.last_hidden_state[0, -1])
