"""Self-subject attention in U-Nets and transformers: what it adds, where, and what it costs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from PIL import Image
from tiny import RIDING, close, trained_adapter
from tiny_dit import draw, trained_joint_adapter
from tiny_subject import dog, half_mask, picture
from torch import Tensor

from interactdiff import AdapterError, Handle, SceneError, attach
from interactdiff.adapter import KeyBlock
from interactdiff.merge import merged_attention
from interactdiff.sites import denoiser_of
from interactdiff.subject.adapter import SubjectAdapter
from interactdiff.subject.attention import self_subject_attention_oracle
from interactdiff.subject.items import Subject
from interactdiff.subject.place import place

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(params=["pipe", "xl_pipe", "flux_pipe", "sd3_pipe"])
def any_pipe(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def attached(pipe: Any, *subjects: Any, adapter: SubjectAdapter | None = None, **settings: Any) -> Handle:
    handle = attach(pipe, adapter or SubjectAdapter())
    handle["subject"].configure(**settings)
    handle.set_scene(list(subjects))
    return handle


def drawn(pipe: Any, *subjects: Any, run: dict[str, Any] | None = None, **settings: Any) -> Tensor:
    with attached(pipe, *subjects, **settings):
        return draw(pipe, **run or {})


# --- the formula ---


def test_the_split_form_is_equation_3() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 8, generator=generator) for n in (6, 6, 6))
    k_r, v_r = (torch.randn(1, 2, 10, 8, generator=generator) for _ in range(2))
    mask = torch.tensor([1.0, 0, 0.3, 1, 0, 0, 0.7, 1, 1, 0])
    seen = torch.tensor([0.0, 1, 1, 0.5, 0, 1])
    expected = self_subject_attention_oracle(q, k, v, k_r, v_r, mask, 3.0, seen)
    kept = mask.nonzero()[:, 0]
    block = KeyBlock(
        k_r[:, :, kept],
        v_r[:, :, kept],
        mask[kept].log().view(1, 1, 1, -1),
        (3.0 * seen).log().view(1, 1, -1, 1),
    )
    assert torch.allclose(merged_attention(q, k, v, [block], 8**-0.5), expected, atol=1e-5)
    plain = F.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(self_subject_attention_oracle(q, k, v, k_r, v_r, mask, 0.0), plain, atol=1e-5)


class BankProcessor:
    """A self-attention of its own: keeps its keys and values, or attends to those that it kept, Eq. 3."""

    def __init__(self, weight: float, mask: Tensor, flux: bool):
        self.weight, self.mask, self.flux = weight, mask, flux
        self.bank: tuple[Tensor, Tensor] | None = None
        self.keep = True

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        rotary: Any = None,
        **_: Any,
    ) -> Any:
        def heads(states: Tensor, q: str, k: str, v: str) -> list[Tensor]:
            return [getattr(attn, n)(states).unflatten(2, (attn.heads, -1)) for n in (q, k, v)]

        q, k, v = heads(hidden_states, "to_q", "to_k", "to_v")
        text = 10 if self.flux else 0
        if self.flux:
            q, k = attn.norm_q(q), attn.norm_k(k)
            if encoder_hidden_states is not None:
                tq, tk, tv = heads(encoder_hidden_states, "add_q_proj", "add_k_proj", "add_v_proj")
                tq, tk = attn.norm_added_q(tq), attn.norm_added_k(tk)
                q, k, v = (torch.cat(both, 1) for both in ((tq, q), (tk, k), (tv, v)))
            q, k = (apply_rotary_emb(t, rotary, sequence_dim=1) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        if self.keep:
            self.bank = k[:, :, text:], v[:, :, text:]
        else:
            assert self.bank is not None
            side = round(self.bank[0].shape[2] ** 0.5)
            m = F.adaptive_avg_pool2d(self.mask, side).flatten()
            image = self_subject_attention_oracle(
                q[:, :, text:], k, v, *self.bank, torch.where(m > 0.05, m, 0.0), self.weight
            )
            out = torch.cat([out[:, :, :text], image], 2)
        out = out.transpose(1, 2).flatten(2)
        if not self.flux:
            return attn.to_out[1](attn.to_out[0](out))
        if encoder_hidden_states is None:
            return out
        return attn.to_out[1](attn.to_out[0](out[:, text:])), attn.to_add_out(out[:, :text])


@pytest.mark.parametrize("weight", [1.0, 3.0])
@pytest.mark.parametrize("masked", [False, True], ids=["whole picture", "masked"])
@pytest.mark.parametrize("fixture", ["pipe", "flux_pipe"])
@torch.no_grad()
def test_it_is_reference_attention_by_plain_code(
    fixture: str, weight: float, masked: bool, request: pytest.FixtureRequest
) -> None:
    """With weight 1 and no mask reference-only; one step, the reference run by hand."""
    pipe = request.getfixturevalue(fixture)
    flux = fixture == "flux_pipe"
    n = 32 if flux else 16  # pixels a side
    image, size = picture(3, (n, n)), (n, n)
    mask = half_mask(size) if masked else half_mask(size).point(lambda _: 255)
    run = {"num_inference_steps": 1}
    got, plain = drawn(pipe, Subject("dog", image, mask), run=run, reference_weight=weight), draw(pipe, **run)

    denoiser, t = denoiser_of(pipe), float(pipe.scheduler.timesteps[0])
    pixels = torch.tensor(list(image.tobytes())).view(1, n, n, 3).permute(0, 3, 1, 2) / 127.5 - 1
    m = torch.ones(1, 1, n, n)
    if masked:
        m[..., n // 2 :] = 0
    r = pipe.vae.encode(torch.where(m > 0, pixels, torch.ones_like(pixels))).latent_dist.mode()
    r = r * pipe.vae.config.scaling_factor
    noise = torch.randn(r.shape, generator=torch.Generator().manual_seed(0))
    sites = ["attn1"] if not flux else ["attn"]
    own = dict(denoiser.attn_processors)
    banks = {
        name: BankProcessor(weight, m, flux) if name.split(".")[-2] in sites else processor
        for name, processor in own.items()
    }
    denoiser.set_attn_processor(dict(banks))
    if flux:
        x = (1 - t / 1000) * r + t / 1000 * noise
        packed = x.view(1, 4, 8, 2, 8, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 64, 16)
        ids = pipe._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)
        text, pooled, text_ids = pipe.encode_prompt("dog", None, max_sequence_length=10)
        denoiser(packed, text, pooled, torch.tensor([t / 1000]), ids, text_ids, guidance=None)
    else:
        a = pipe.scheduler.alphas_cumprod[int(t)]
        text, _ = pipe.encode_prompt("dog", "cpu", 1, False)
        denoiser(a.sqrt() * r + (1 - a).sqrt() * noise, t, text)
    for bank in banks.values():
        if isinstance(bank, BankProcessor):
            bank.keep = False
    expected = draw(pipe, **run)
    denoiser.set_attn_processor(own)
    assert (got - expected).abs().max() < 0.01 * (got - plain).abs().max()


# --- off is off ---


def test_without_weight_strength_schedule_or_subjects_no_bit_changes(any_pipe: Any) -> None:
    plain = draw(any_pipe)
    for subjects, settings in (
        ([], {}),
        ([dog()], {"reference_weight": 0}),
        ([dog(strength=0)], {}),
        ([dog()], {"schedule": 0}),
        ([dog()], {"layers": 0}),
    ):
        assert torch.equal(drawn(any_pipe, *subjects, **settings), plain)
    with attached(any_pipe, dog()) as handle:
        acting = draw(any_pipe)
        assert not torch.allclose(acting, plain, atol=1e-3)
        assert torch.equal(draw(any_pipe), acting), "a run is repeatable"
        handle.clear()
        assert torch.equal(draw(any_pipe), plain)
    assert torch.equal(draw(any_pipe), plain)


@pytest.mark.parametrize("settings", [{"reference_weight": 10}, {"layers": 0.5}, {"schedule": 0.5}])
def test_settings_act(pipe: Any, settings: dict[str, Any]) -> None:
    run = {"num_inference_steps": 4}
    default = drawn(pipe, dog(), run=run)
    assert not torch.allclose(drawn(pipe, dog(), run=run, **settings), default, atol=1e-4)


def test_positions_can_be_shifted_in_flux_alone(flux_pipe: Any, pipe: Any) -> None:
    same = drawn(flux_pipe, dog())
    for shift in (1.0, -2.0):
        assert not torch.allclose(drawn(flux_pipe, dog(), position_shift=shift), same, atol=1e-4)
    with (
        attach(pipe, SubjectAdapter()) as handle,
        pytest.raises(AdapterError, match="position_shift: expected 0 for UNet2D"),
    ):
        handle["subject"].configure(position_shift=1.0)


def reference_places(pipe: Any, subject: Subject, **settings: Any) -> list[list[float]]:
    """Of the tokens of a reference in Flux: the rows' places in the picture's grid, and the columns'."""
    ids: list[Tensor] = []
    kept = pipe.transformer.register_forward_pre_hook(
        lambda _, args, arguments: ids.append(arguments["img_ids"]), with_kwargs=True
    )
    drawn(pipe, subject, run={"num_inference_steps": 1}, **settings)
    kept.remove()
    assert [len(one) for one in ids] == [64, 64]  # the picture's, and within its call the reference's
    return [ids[1][:, axis].unique().tolist() for axis in (1, 2)]


def test_in_flux_a_reference_lies_on_its_place_as_high_as_that(flux_pipe: Any) -> None:
    """Of 8 x 8 tokens the left half is the subject; its place is 4 rows high, right of the middle."""
    placed = dog(0, (32, 32), box=(0.5, 0.25, 0.75, 0.75))
    rows, columns = reference_places(flux_pipe, placed, position_scale=1)
    middles = [0.5 + n for n in range(8)]  # of tokens, which their numbers lie a half before
    assert rows == [4 + 0.5 * (middle - 4) - 0.5 for middle in middles]
    assert columns == [5 + 0.5 * (middle - 2) - 0.5 for middle in middles]
    unscaled = [[float(n) for n in range(8)], [3.0 + n for n in range(8)]]
    assert reference_places(flux_pipe, placed, position_scale=0) == unscaled
    assert reference_places(flux_pipe, dog(0, (32, 32))) == [unscaled[0]] * 2
    flat = dog(0, (32, 32), box=(0.5, 0.5, 0.75, 0.51))
    rows, _ = reference_places(flux_pipe, flat, position_scale=1)
    assert rows[1] - rows[0] == 0.25, "no closer together than by 4"
    for position_scale, apart in (({}, 0.5**0.5), ({"position_scale": 0.25}, 0.5**0.25)):
        rows, columns = reference_places(flux_pipe, placed, **position_scale)
        assert rows == pytest.approx([4 + apart * (middle - 4) - 0.5 for middle in middles])
        assert columns == pytest.approx([5 + apart * (middle - 2) - 0.5 for middle in middles])
    assert not torch.equal(drawn(flux_pipe, placed), drawn(flux_pipe, placed, position_scale=0))


def test_stray_pixels_of_a_mask_do_not_change_a_references_extent(flux_pipe: Any) -> None:
    mask = half_mask((32, 32))
    mask.putpixel((31, 31), 255)
    with attached(flux_pipe, dog(0, (32, 32), mask=mask)) as handle:
        assert handle["subject"].scene.subjects[0].reference.extent == (0, 0, 0.5, 1)


# --- sizes, batches, several subjects ---


def test_any_size_of_picture_and_reference(any_pipe: Any) -> None:
    for size, reference in (((32, 48), (16, 16)), ((48, 32), (32, 16)), ((32, 32), (40, 24))):
        run = {"size": size, "num_inference_steps": 1}
        got = drawn(any_pipe, dog(0, reference), run=run)
        assert got.shape == draw(any_pipe, **run).shape
        assert not torch.allclose(got, draw(any_pipe, **run), atol=1e-5)


def draw_batch(pipe: Any, prompts: list[str]) -> Tensor:
    generators = [torch.Generator().manual_seed(n) for n in range(len(prompts))]
    options = {"max_sequence_length": 10} if hasattr(pipe, "transformer") else {}
    return pipe(
        prompts,
        height=32,
        width=32,
        num_inference_steps=2,
        generator=generators,
        output_type="latent",
        **options,
    ).images


def test_a_different_set_of_subjects_for_each_prompt(any_pipe: Any) -> None:
    prompts = ["a dog", "two dog and dog"]
    plain = draw_batch(any_pipe, prompts)
    one, two = dog(0), dog(1, (24, 16))
    with attach(any_pipe, SubjectAdapter()) as handle:
        rows = {}
        for name, scenes in {
            "both": [[one], [two]],
            "first": [[one], []],
            "second": [[], [one, two]],
        }.items():
            handle.set_scene(scenes)
            rows[name] = draw_batch(any_pipe, prompts)
    assert close(rows["first"][1], plain[1])
    assert close(rows["second"][0], plain[0])
    assert close(rows["first"][0], rows["both"][0])
    assert not close(rows["both"][0], plain[0])
    assert not close(rows["both"][1], plain[1])
    assert not close(rows["second"][1], rows["both"][1])
    with attached(any_pipe, [one], [one], [one]), pytest.raises(SceneError, match="a multiple of 3 rows"):
        draw_batch(any_pipe, prompts)


def test_a_place_is_soft_and_never_empty() -> None:
    inside = place([(0.25, 0.0, 0.6875, 0.5)], (4, 8)).view(4, 8)
    assert inside[0].tolist() == [0, 0, 1, 1, 1, 0.5, 0, 0]
    assert inside[2:].sum() == 0
    assert place([(0.5, 0.5, 0.51, 0.51)], (4, 4)).max() >= 0.2
    assert place([], (2, 2)).tolist() == [1, 1, 1, 1]
    both = place([(0, 0, 0.5, 1), (0.5, 0, 1, 1)], (4, 4))
    assert both.min() == 1


def test_grids_that_keep_as_many_tokens_have_weights_of_their_own(pipe: Any) -> None:
    """A subject of 40 pixels in the middle of 512 covers 4 tokens of either grid, less of each coarse one."""
    mask = Image.new("L", (512, 512))
    mask.paste(255, (236, 236, 276, 276))
    with attached(pipe, dog(0, (512, 512), mask=mask)) as handle:
        binding = handle["subject"]
        draw(pipe, num_inference_steps=1)
        reference = binding.scene.subjects[0].reference
        grids = {one.site.grid(*reference.grid) for one in binding._keys}
        shares = {grid: reference.foreground(grid)[1] for grid in grids}
        assert [len(kept) for kept in shares.values()] == [4, 4]
        for one in binding._keys:
            weights = torch.as_tensor(one.blocks[0].log_weight).exp().flatten()
            assert torch.allclose(weights, shares[one.site.grid(*reference.grid)])


def test_two_subjects_with_places_do_not_see_each_other(pipe: Any) -> None:
    """At each attention, queries in one's box are what they are without the other, bit for bit."""
    left, right = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
    kept: dict[str, list[KeyBlock]] = {}
    with attached(pipe, dog(0, box=left), dog(1, box=right)) as handle:
        binding = handle["subject"]
        draw(pipe, num_inference_steps=1)
        kept = {one.site.path: list(one.blocks) for one in binding._keys}
        grids = {one.site.path: one.site.grid(16, 16) for one in binding._keys}
    generator = torch.Generator().manual_seed(0)
    for path, (one, two) in kept.items():
        rows, columns = grids[path]
        heads, width = one.keys.shape[1], one.keys.shape[3]
        q, k, v = (torch.randn(2, heads, rows * columns, width, generator=generator) for _ in range(3))
        both, alone = (merged_attention(q, k, v, blocks, width**-0.5) for blocks in ([one, two], [one]))
        for got, expected in ((both, alone),):
            inside = got.unflatten(2, (rows, columns))[..., : columns // 2, :]
            assert torch.equal(inside, expected.unflatten(2, (rows, columns))[..., : columns // 2, :])
        assert not torch.allclose(both, alone, atol=1e-3)


def test_a_box_around_everything_is_none_and_interactions_place_subjects(any_pipe: Any) -> None:
    whole = half_mask((32, 32)).point(lambda _: 255)
    everywhere, alone = (dog(0, (32, 32), mask=whole, box=box) for box in ((0, 0, 1, 1), None))
    assert torch.equal(drawn(any_pipe, everywhere), drawn(any_pipe, alone))
    denoiser = denoiser_of(any_pipe)
    acting = trained_adapter(denoiser) if hasattr(any_pipe, "unet") else trained_joint_adapter(denoiser)
    person = Subject("person", picture(4), mask=half_mask())
    boxed = Subject("Person", picture(4), mask=half_mask(), box=RIDING.subject_box)
    with attach(any_pipe, acting, SubjectAdapter()) as handle:
        handle.set_scene([RIDING, person])
        by_interaction = draw(any_pipe)
        handle.set_scene([RIDING, boxed])
        assert not torch.equal(by_interaction, drawn_without_place(any_pipe, handle, person))
        handle.set_scene([RIDING, Subject("person", picture(4), mask=half_mask(), box=RIDING.subject_box)])
        assert torch.equal(draw(any_pipe), by_interaction)


def drawn_without_place(pipe: Any, handle: Handle, person: Subject) -> Tensor:
    handle.set_scene([RIDING, Subject("somebody", person.image, mask=person.mask, reference_prompt="person")])
    return draw(pipe)


def test_attention_may_be_for_subjects_with_a_place_alone(any_pipe: Any) -> None:
    plain, placed = draw(any_pipe), dog(1, box=(0.0, 0.0, 0.5, 1.0))
    alone = {"attention_without_box": 0}
    assert torch.equal(drawn(any_pipe, dog(), **alone), plain)
    with pytest.warns(UserWarning, match="expected self-subject attention for reference guidance, got none"):
        assert torch.equal(drawn(any_pipe, dog(), guidance=2.0, extra_row=1, **alone), plain)
    seen = drawn(any_pipe, placed)
    assert not torch.allclose(seen, plain, atol=1e-4)
    assert torch.equal(drawn(any_pipe, dog(), placed, **alone), seen)


def test_several_pictures_of_one_subject_are_seen_together(pipe: Any) -> None:
    alone = drawn(pipe, dog(0))
    together = drawn(pipe, dog(0), dog(1))
    assert not torch.allclose(together, alone, atol=1e-4)
    assert torch.allclose(drawn(pipe, dog(1), dog(0)), together, atol=1e-4)
