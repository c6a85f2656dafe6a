"""The newer bases through their own pipelines: interactions act where they should, and leave nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from methods import EditsAdapter
from test_attach import state_of
from tiny import FEEDING, RIDING
from tiny_bases import BASES, GUIDED, WIDTH, draw, embeddings, flux2_transformer, qwen_tokenizer, tiny_base
from tiny_dit import trained_joint_adapter, trained_layers
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model

from interactdiff import AdapterError, Interaction, InteractionAdapter, SceneError, attach
from interactdiff.adapter import Guidance, Residual, SiteInputs
from interactdiff.clear import ClearConfig, ClearError, linearize
from interactdiff.families import FAMILIES
from interactdiff.interaction.phrases import mean_states
from interactdiff.sites import Base, find_sites, joint_sites

SMALL = Interaction("person", "riding", "bike", (0.0, 0.0, 0.25, 0.5), (0.0, 0.25, 0.5, 0.5))


def probing(look: Callable[[SiteInputs, Tensor], None], order: int) -> EditsAdapter:
    """Looks at what attention gathers, after the edits of a lower order."""
    sites = ("joint", "single")
    return EditsAdapter(lambda host: [Residual(s, look) for s in host.sites_of(*sites)], f"at {order}", order)


@pytest.fixture(params=BASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipe(name: str) -> Any:
    return tiny_base(name)


def test_an_untrained_adapter_changes_no_bit(pipe: Any, name: str) -> None:
    expected = draw(pipe, **GUIDED[name])
    adapter = InteractionAdapter.for_transformer(pipe.transformer, hidden=8, token_dim=8)
    assert adapter.config.feature_dim == WIDTH
    with attach(pipe, adapter) as handle:
        assert torch.equal(draw(pipe, **GUIDED[name]), expected)
        handle.set_scene([RIDING, FEEDING])
        assert torch.equal(draw(pipe, **GUIDED[name]), expected)


def test_it_acts_and_detaching_leaves_nothing(pipe: Any, name: str) -> None:
    transformer = pipe.transformer
    expected, before = draw(pipe, **GUIDED[name]), state_of(transformer)
    processors = dict(getattr(transformer, "attn_processors", {}))
    handle = attach(pipe, trained_joint_adapter(transformer))
    handle.set_scene([RIDING])
    assert not torch.allclose(draw(pipe, **GUIDED[name]), expected, atol=1e-2)
    handle.clear()
    assert torch.equal(draw(pipe, **GUIDED[name]), expected)
    handle.detach()
    assert torch.equal(draw(pipe, **GUIDED[name]), expected)
    assert state_of(transformer) == before
    assert dict(getattr(transformer, "attn_processors", {})) == processors


def test_it_acts_inside_its_boxes_in_the_prompts_rows_alone(pipe: Any, name: str) -> None:
    """What each attention gathers before and after interactions: equal but for the boxes' cells."""
    before: list[Tensor] = []
    after: list[Tensor] = []

    def keeping(kept: list[Tensor], order: int) -> EditsAdapter:
        def keep(_: SiteInputs, output: Tensor) -> None:
            kept.append(output.clone())

        return probing(keep, order)

    adapter = trained_joint_adapter(pipe.transformer, structured=True)
    with attach(pipe, adapter, keeping(before, 0), keeping(after, 90)) as handle:
        handle.set_scene([SMALL])
        draw(pipe, num_inference_steps=1, **GUIDED[name])
    sites = len(joint_sites(pipe.transformer))
    calls = 1 if name in ("Flux2 dev", "Z-Image") else 2
    assert len(before) == len(after) == calls * sites
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[:4, :4] = True  # the union of both boxes, which the action has
    outside = ~inside.flatten()
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        assert one.shape[1] == 64
        change = (other - one).abs().amax(-1)
        prompt, negative = change[:1], change[1:]
        if number >= sites:  # the second call, that of the negative prompt
            prompt, negative = change[:0], change
        assert not negative.any()
        assert not prompt[:, outside].any()
        assert (prompt[:, inside.flatten()].amax(1) > 1e-4).all()
    assert len(before[0]) == (2 if name == "Z-Image" else 1)


def test_a_batch_of_scenes_is_each_of_them_alone(pipe: Any, name: str) -> None:
    scenes = [[RIDING], [], [FEEDING, RIDING]]
    with attach(pipe, trained_joint_adapter(pipe.transformer)) as handle:
        handle.set_scene(scenes)
        together = draw(pipe, ["a dog"] * 3, **GUIDED[name])
        for number, scene in enumerate(scenes):
            handle.set_scene(scene)
            alone = draw(pipe, ["a dog"] * 3, **GUIDED[name])
            assert torch.allclose(together[number], alone[number], atol=1e-3)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_pictures_that_are_not_square(pipe: Any, name: str) -> None:
    expected = draw(pipe, size=(16, 48), **GUIDED[name])
    with attach(pipe, trained_joint_adapter(pipe.transformer, structured=True)) as handle:
        handle.set_scene([RIDING])
        assert not torch.allclose(draw(pipe, size=(16, 48), **GUIDED[name]), expected, atol=1e-2)


def test_saved_and_loaded_it_draws_the_same(pipe: Any, name: str, tmp_path: Path) -> None:
    adapter = trained_joint_adapter(pipe.transformer).eval()
    with attach(pipe, adapter) as handle:
        handle.set_scene([RIDING], schedule=0.5)
        expected = draw(pipe, **GUIDED[name])
    adapter.save_pretrained(tmp_path)
    loaded = InteractionAdapter.from_pretrained(tmp_path)
    assert loaded.config == adapter.config
    assert loaded.config.phrases == "mean"
    with attach(pipe, loaded) as handle:
        handle.set_scene([RIDING], schedule=0.5)
        assert torch.equal(draw(pipe, **GUIDED[name]), expected)


def test_half_precision(pipe: Any, name: str) -> None:
    with attach(pipe, trained_joint_adapter(pipe.transformer).eval()) as handle:
        handle.set_scene([RIDING])
        expected = draw(pipe, num_inference_steps=1, **GUIDED[name])
        pipe.to(torch.bfloat16)
        half = draw(pipe, num_inference_steps=1, **GUIDED[name])
    assert (half.float() - expected).abs().mean() < 0.2 * expected.abs().mean()


def test_another_base_is_refused_by_name(pipe: Any) -> None:
    other = next(n for n, made in BASES.items() if not isinstance(made().transformer, type(pipe.transformer)))
    adapter = trained_joint_adapter(tiny_base(other).transformer)
    with pytest.raises(
        AdapterError, match=r"^expected the base that the adapter is made for, .*, got .*$"
    ) as error:
        attach(pipe, adapter)
    family = next(f for f in FAMILIES if f.denoiser == type(pipe.transformer).__name__)
    assert f"got {family.name} " in str(error.value)
    assert Base.of(pipe.transformer).cross_attention_dim == pipe.transformer.config[family.text_width]


def test_one_prediction_in_both_halves_makes_the_scale_of_guidance_nothing(pipe: Any, name: str) -> None:
    chosen = 0.3 * torch.randn(64 * 16, generator=torch.Generator().manual_seed(1))
    guidance = Guidance(prediction=lambda call, out: chosen.view(1, *out.shape[1:]).expand_as(out))
    scale = next(n for n in GUIDED[name] if n.endswith("scale"))
    expected = draw(pipe, **GUIDED[name])
    with attach(pipe, EditsAdapter(lambda host: [guidance])):
        drawn = [draw(pipe, **GUIDED[name] | {scale: value}) for value in (2.0, 7.0)]
    assert torch.equal(*drawn)
    assert not torch.allclose(drawn[0], expected, atol=1e-2)


# --- windows ---


def test_windows_or_a_refusal_in_words(pipe: Any, name: str) -> None:
    expected = draw(pipe, **GUIDED[name])
    if name == "Chroma":  # its pipeline masks the text's padding
        with (
            linearize(pipe, window=2, min_tokens=0),
            pytest.raises(AdapterError, match="expected no attention mask beside windows"),
        ):
            draw(pipe, **GUIDED[name])
        assert torch.equal(draw(pipe, **GUIDED[name]), expected)
        return
    same = {"negative_prompt": "a dog"} if "negative_prompt" in GUIDED[name] else {}
    guided = GUIDED[name] | same  # Z-Image masks prompts of different lengths
    expected = draw(pipe, **guided)
    with linearize(pipe, window=100, min_tokens=0) as handle:
        assert torch.allclose(draw(pipe, **guided), expected, atol=1e-3)
        assert handle["clear"].active
    layers = trained_layers(pipe.transformer, ClearConfig(2, 2))
    with linearize(pipe, weights=layers, min_tokens=0):
        drawn = draw(pipe, **guided)
        with attach(pipe, trained_joint_adapter(pipe.transformer)) as handle:
            handle.set_scene([RIDING])
            assert not torch.allclose(draw(pipe, **guided), drawn, atol=1e-2)
    assert not torch.allclose(drawn, expected, atol=1e-2)
    assert torch.equal(draw(pipe, **guided), expected)


# --- Flux2's further pictures ---


def test_reference_pictures_of_flux2_are_left_alone() -> None:
    """The tokens of pictures to be edited come after the image's: interactions do not reach them."""
    transformer = flux2_transformer()
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    own = torch.stack([torch.zeros(16), y.flatten(), x.flatten(), torch.zeros(16)], 1)
    ids = torch.cat([own, own + torch.tensor([10.0, 0, 0, 0])])[None]
    call = {
        "hidden_states": torch.randn(1, 32, 16),
        "encoder_hidden_states": torch.randn(1, 5, 3 * WIDTH),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.0]),
        "img_ids": ids,
        "txt_ids": torch.zeros(1, 5, 4),
    }
    gathered: list[tuple[Tensor, Tensor]] = []
    shapes: list[torch.Size] = []
    features = {phrase: torch.ones(WIDTH) for phrase in ("person", "riding", "bike")}

    def probe(inputs: SiteInputs, output: Tensor) -> None:
        assert inputs.queries is not None
        shapes.append(output.shape)
        gathered.append((inputs.queries, output))

    adapters = trained_joint_adapter(transformer), probing(probe, 0)
    with torch.no_grad(), attach(transformer, *adapters, phrase_encoder=lambda _: features) as handle:
        base = transformer(**call).sample
        handle.set_scene([RIDING])
        assert not torch.allclose(transformer(**call).sample, base, atol=1e-3)
        assert {shape[1] for shape in shapes} == {16}
        assert all(queries.shape[2] == 16 for queries, _ in gathered)
        with pytest.raises(AdapterError, match="of reference tokens, got kv_cache_mode 'extract'"):
            transformer(**call, kv_cache_mode="extract", num_ref_tokens=16)
        with (
            linearize(transformer, window=2, min_tokens=0),
            pytest.raises(ClearError, match="one picture's tokens"),
        ):
            transformer(**call)


# --- phrases ---


def test_a_phrases_feature_is_the_mean_over_its_own_tokens() -> None:
    tokenizer = qwen_tokenizer()
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    encoder = Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **shape)).eval()
    phrases = ["dog", "red bike", "a"]
    together = mean_states(tokenizer, encoder, phrases)
    for phrase in phrases:
        with torch.no_grad():
            states = encoder(tokenizer(phrase, return_tensors="pt").input_ids).last_hidden_state
        assert torch.allclose(together[phrase], states[0].mean(0), atol=1e-5)
    tokenizer.model_max_length = 4
    with pytest.raises(SceneError, match=r"expected phrases of at most 4 tokens, .* got 8 for 'red bike'"):
        mean_states(tokenizer, encoder, phrases)


def test_special_tokens_are_no_part_of_a_phrase() -> None:
    pipe = tiny_base("Chroma")
    with torch.no_grad():
        encoded = pipe.tokenizer("bike", return_tensors="pt")
        states = pipe.text_encoder(encoded.input_ids).last_hidden_state[0]
    assert encoded.input_ids[0, -1] == pipe.tokenizer.eos_token_id
    feature = mean_states(pipe.tokenizer, pipe.text_encoder, ["bike"])["bike"]
    assert torch.allclose(feature, states[:-1].mean(0), atol=1e-5)


def test_a_text_encoder_of_another_width_is_refused(pipe: Any) -> None:
    adapter = InteractionAdapter.for_transformer(pipe.transformer, hidden=8, token_dim=8, feature_dim=7)
    with pytest.raises(AdapterError, match=r"expected a text encoder of width 7, .* got width 12"):
        attach(pipe, adapter)


# --- sites ---


def test_every_site_is_described(pipe: Any, name: str) -> None:
    """Where the table says that queries and outputs are, modules are."""
    sites = find_sites(pipe.transformer)
    assert sites
    for site in sites:
        assert site.module is pipe.transformer.get_submodule(site.path)
        assert type(site.module.processor).__name__ == site.kind.processor  # type: ignore[union-attr]
        assert site.dim == 32
        assert site.heads == 2
        assert isinstance(site.query, torch.nn.Module)
    assert embeddings(tiny_base("Flux2 dev"), ["a"]).shape[-1] == 3 * WIDTH
