"""The subject encoder: its formula, its place, and its files, ours and published ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_unet
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import Calls, close
from tiny_dit import draw
from tiny_subject import LAYERS, VISION, dog, picture, trained_subject_adapter

from interactdiff import AdapterError, attach
from interactdiff.sites import Base, denoiser_of
from interactdiff.subject.adapter import SubjectAdapter
from interactdiff.subject.config import SubjectConfig
from interactdiff.subject.encoder import Mapper, subject_attention_oracle

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
ENCODER_ALONE = {"reference_weight": 0.0, "encoder_weight": 0.7}


@pytest.fixture(params=["pipe", "xl_pipe", "flux_pipe", "sd3_pipe"])
def any_pipe(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_untrained_it_changes_no_bit_and_trained_it_acts(any_pipe: Any) -> None:
    plain, denoiser = draw(any_pipe), denoiser_of(any_pipe)
    untrained = SubjectAdapter.for_denoiser(denoiser, vision=VISION, layers=LAYERS).eval()
    for adapter, subjects in ((untrained, [dog()]), (trained_subject_adapter(denoiser), [])):
        with attach(any_pipe, adapter) as handle:
            handle["subject"].configure(**ENCODER_ALONE)
            handle.set_scene(subjects)
            assert torch.equal(draw(any_pipe), plain)
    with attach(any_pipe, trained_subject_adapter(denoiser)) as handle:
        handle["subject"].configure(**ENCODER_ALONE)
        handle.set_scene([dog()])
        acting = draw(any_pipe)
        handle["subject"].configure(encoder_weight=0)
        assert torch.equal(draw(any_pipe), plain)
        handle["subject"].configure(encoder_weight=0.7)
        handle.set_scene([dog(1)])
        assert not torch.allclose(draw(any_pipe), acting, atol=1e-4)
        handle.set_scene([dog(box=(0, 0, 1, 1))])
        assert torch.equal(draw(any_pipe), acting)
        handle.set_scene([dog(box=(0, 0, 0.5, 1))])
        assert not torch.allclose(draw(any_pipe), acting, atol=1e-4)
        handle.set_scene([dog(), dog()])
        assert close(draw(any_pipe), acting), "the same twice is not twice as much"
    assert not torch.allclose(acting, plain, atol=1e-3)


@pytest.mark.parametrize("guided", [0.0, 0.25, 1.0])
@torch.no_grad()
def test_it_is_equation_1_in_every_block(pipe: Any, guided: float) -> None:
    """h + beta SEA(LN h, SE(r)) of what a block has after its self-attention, by hooks of its own.

    With `encoder_guidance` less of it in the negative prompt's half of the batch.
    """
    adapter, weight = trained_subject_adapter(pipe.unet), 0.7
    with attach(pipe, adapter) as handle:
        handle["subject"].configure(**ENCODER_ALONE, encoder_guidance=guided)
        handle.set_scene([dog()])
        got = draw(pipe, num_inference_steps=1)
        tokens = handle["subject"].scene.subjects[0].reference.tokens[0]
    kept: dict[str, torch.Tensor] = {}

    def before(path: str) -> Any:
        return lambda _, args, kwargs: kept.update({path: args[0] if args else kwargs["hidden_states"]})

    def after(path: str) -> Any:
        attention, norm = adapter.attentions[path]

        def add(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
            weights = (1 - guided) * weight, weight  # of the negative prompt's row, and of the prompt's
            rows = [
                subject_attention_oracle(attention, norm, x + a, tokens, by) - x  # type: ignore[arg-type]
                for x, a, by in zip(kept[path], out, weights, strict=True)
            ]
            return torch.stack(rows)

        return add

    for path in adapter.attentions:
        block = pipe.unet.get_submodule(path)
        block.register_forward_pre_hook(before(path), with_kwargs=True)
        block.attn1.register_forward_hook(after(path))
    assert close(draw(pipe, num_inference_steps=1), got)


@torch.no_grad()
def test_in_a_transformer_the_images_own_queries_attend_to_the_tokens(sd3_pipe: Any) -> None:
    """What each attention gathers for the image + beta SEA(its queries, SE(r)), by hooks of its own."""
    adapter, weight = trained_subject_adapter(sd3_pipe.transformer), 0.7
    with attach(sd3_pipe, adapter) as handle:
        handle["subject"].configure(**ENCODER_ALONE)
        handle.set_scene([dog()])
        got = draw(sd3_pipe, num_inference_steps=1)
        tokens = handle["subject"].scene.subjects[0].reference.tokens[0]
    queries: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Any:
        return lambda _, __, output: queries.update({path: output})

    def add(path: str) -> Any:
        attention, _ = adapter.attentions[path]
        out = attention.to_out[0]

        def changed(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            q = queries[path].unflatten(-1, (attention.heads, -1))  # [B, L, heads, D]
            k, v = ((tokens @ layer.weight.T).unflatten(-1, (attention.heads, -1))
                    for layer in (attention.to_k, attention.to_v))  # fmt: skip
            norm = sd3_pipe.transformer.get_submodule(path).norm_q
            q = q if norm is None else norm(q)
            scores = torch.einsum("blhd,mhd->bhlm", q, k) / q.shape[-1] ** 0.5
            gathered = torch.einsum("bhlm,mhd->blhd", scores.softmax(-1), v).flatten(2)
            return (args[0] + weight * (gathered @ out.weight.T + out.bias),)

        return changed

    for path in adapter.attentions:
        attention = sd3_pipe.transformer.get_submodule(path)
        attention.to_q.register_forward_hook(keep(path))
        attention.to_out[0].register_forward_pre_hook(add(path))
    assert close(draw(sd3_pipe, num_inference_steps=1), got)


def test_a_guided_encoder_acts_in_the_prompts_calls_alone(flux_pipe: Any) -> None:
    """Flux calls its transformer once a prompt. One step is linear: negative + 2 (prompt - negative)."""
    cfg = {"negative_prompt": "a dog", "true_cfg_scale": 2.0}
    plain = draw(flux_pipe, num_inference_steps=1)
    with attach(flux_pipe, trained_subject_adapter(flux_pipe.transformer)) as handle:
        handle["subject"].configure(**ENCODER_ALONE)
        handle.set_scene([dog()])
        seen = draw(flux_pipe, num_inference_steps=1)
        assert close(draw(flux_pipe, num_inference_steps=1, **cfg), seen)
        handle["subject"].configure(encoder_guidance=1)
        assert torch.equal(draw(flux_pipe, num_inference_steps=1), seen)
        assert close(draw(flux_pipe, num_inference_steps=1, **cfg), plain + 2 * (seen - plain))


def test_pictures_are_encoded_once_a_scene_and_keys_made_once_a_run(pipe: Any) -> None:
    adapter = trained_subject_adapter(pipe.unet)
    towers, keys = Calls(adapter.image_encoder), Calls(next(iter(adapter.attentions.values()))[0].to_k)
    with attach(pipe, adapter) as handle:
        handle["subject"].configure(**ENCODER_ALONE)
        handle.set_scene([dog()])
        draw(pipe, num_inference_steps=3)
        draw(pipe, num_inference_steps=3)
        assert (towers.count, keys.count) == (1, 1)


def test_the_reference_attends_to_its_own_tokens(pipe: Any) -> None:
    """With self-subject attention the encoder acts in the pass over the reference too, by its weight."""
    adapter = trained_subject_adapter(pipe.unet)
    with attach(pipe, adapter) as handle:
        handle.set_scene([dog()])
        handle["subject"].configure(encoder_weight=0.0)
        draw(pipe)
        handle["subject"].configure(encoder_weight=0.5)
        draw(pipe)
        one, other = handle["subject"].runner.cache._kept.values()
    for time, features in one.items():
        same = [torch.equal(keys, other[time][path][0]) for path, (keys, _) in features.items()]
        assert same == [True] + [False] * (len(same) - 1), "all after the first block's"


def test_the_mapper_is_the_published_formula() -> None:
    torch.manual_seed(0)
    mapper, states = Mapper(6, 4, 3), torch.randn(2, 3, 5, 6)
    x = mapper.in_norm(states)
    each = [getattr(mapper, f"w_{n}")(x[:, n]) for n in range(3)]
    expected = mapper.out_norm(mapper.proj(torch.cat(each, 1).relu()))
    assert torch.equal(mapper(states), expected)
    assert expected.shape == (2, 15, 4)


def test_the_tower_sees_the_subject_on_white(pipe: Any) -> None:
    adapter = trained_subject_adapter(pipe.unet)
    with torch.no_grad():
        one, two = (adapter([picture(seed)]) for seed in (0, 1))
    assert one.shape == (1, 3 * 5, 8)
    assert not torch.allclose(one, two, atol=1e-3)
    adapter.train()
    assert not adapter.image_encoder.training
    assert not any(parameter.requires_grad for parameter in adapter.image_encoder.parameters())


# --- files ---


@pytest.mark.parametrize("fixture", ["pipe", "flux_pipe"])
def test_saved_and_loaded_it_draws_the_same(fixture: str, request: Any, tmp_path: Path) -> None:
    pipe = request.getfixturevalue(fixture)
    adapter = trained_subject_adapter(denoiser_of(pipe))
    adapter.save_pretrained(tmp_path / "one")
    loaded = SubjectAdapter.from_pretrained(tmp_path / "one")
    assert loaded.config == adapter.config
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in adapter.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.image_encoder.parameters())
    SubjectAdapter().save_pretrained(tmp_path / "none")
    assert SubjectAdapter.from_pretrained(tmp_path / "none").config is None
    (tmp_path / "one/config.json").write_text('{"method": "subject", "version": 1, "base": 3}')
    with pytest.raises(AdapterError, match="expected the configuration of a subject adapter"):
        SubjectAdapter.from_pretrained(tmp_path / "one")
    with pytest.raises(AdapterError, match=r"layers of an image tower of 2, got \[4, 8, 12, 16\]"):
        SubjectAdapter.for_denoiser(denoiser_of(pipe), vision=VISION)


def published_unet() -> UNet2DConditionModel:
    """Eight heads and text of width 768, by which a published file's base is known."""
    torch.manual_seed(0)
    return make_unet(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=768, attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("prefix", ["image_encoder.vision_model.", "image_encoder."])
def test_the_published_layout_is_known_by_its_keys(tmp_path: Path, prefix: str) -> None:
    unet = published_unet()
    vision = VISION | {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 16}
    adapter = SubjectAdapter(SubjectConfig(Base.of(unet), vision))
    torch.nn.init.normal_(adapter.mapper.proj.weight)
    state = adapter.state_dict()
    encoder = {n: t for n, t in state.items() if n.startswith(("image_encoder.", "mapper."))}
    encoder = {n.replace("image_encoder.", prefix): t for n, t in encoder.items()}
    encoder[f"{prefix}embeddings.position_ids"] = torch.arange(5)[None]
    layers = {n: t for n, t in state.items() if ".se_" in n}
    for folder, tensors in (("subject_encoder", encoder), ("unet", {**unet.state_dict(), **layers})):
        (tmp_path / folder).mkdir()
        contiguous = {n: t.clone().contiguous() for n, t in tensors.items()}
        save_file(contiguous, tmp_path / folder / "diffusion_pytorch_model.safetensors")
    loaded = SubjectAdapter.from_pretrained(tmp_path)
    assert loaded.config is not None
    assert loaded.config.base == Base.of(unet)
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in loaded.state_dict().items())
    loaded.check(unet)
    (tmp_path / "subject_encoder/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(
        AdapterError, match="or weights in subject_encoder and unet, got none in subject_encoder"
    ):
        SubjectAdapter.from_pretrained(tmp_path)


def test_names_in_files_are_those_of_any_version_of_transformers(pipe: Any, tmp_path: Path) -> None:
    """Version 4 has the image tower's modules in a `vision_model`, version 5 has not."""
    adapter = trained_subject_adapter(pipe.unet)
    adapter.save_pretrained(tmp_path)
    file = tmp_path / "adapter.safetensors"
    written = load_file(file)
    assert not any("vision_model" in name for name in written)
    older = {name.replace("image_encoder.", "image_encoder.vision_model."): t for name, t in written.items()}
    assert older.keys() != written.keys()
    save_file(older, file)
    state, own = SubjectAdapter.from_pretrained(tmp_path).state_dict(), adapter.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[name], own[name]) for name in own)


def test_a_subject_without_strength_takes_nothing_from_others(pipe: Any) -> None:
    adapter, pictures = trained_subject_adapter(pipe.unet), []
    with attach(pipe, adapter) as handle:
        handle["subject"].configure(**ENCODER_ALONE)
        for subjects in ([dog()], [dog(), dog(1, strength=0)], [dog(), dog(1)]):
            handle.set_scene(subjects)
            pictures.append(draw(pipe))
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.allclose(pictures[0], pictures[2], atol=1e-4)


def test_the_published_shapes_and_counts(pipe: Any) -> None:
    """112 tensors of layers and 16 of the mapper, beside 391 of the tower."""
    with torch.device("meta"):
        base = Base.of(make_unet(cross_attention_dim=768, attention_head_dim=8))
        adapter = SubjectAdapter(SubjectConfig(base))
    state = adapter.state_dict()

    def count(*words: str) -> tuple[int, int]:
        some = [t for name, t in state.items() if any(word in name for word in words)]
        return len(some), sum(t.numel() for t in some)

    assert count("se_attn", "se_norm") == (112, 43_987_520)
    assert count("mapper.") == (16, 6_038_784)
    assert count("image_encoder.") == (391, 303_179_776)
    assert len(state) == 112 + 16 + 391
    assert state["up_blocks.3.attentions.2.transformer_blocks.0.se_attn.to_k.weight"].shape == (320, 768)
    with pytest.raises(AdapterError, match=r"expected the base .* SD 1.x \(cross-attention width 768"):
        adapter.check(pipe.unet)


def test_attention_may_see_whole_references_while_the_encoder_sees_the_foreground(pipe: Any) -> None:
    adapter = trained_subject_adapter(denoiser_of(pipe))
    found = {}
    with attach(pipe, adapter) as handle:
        for masked in (True, False):
            handle["subject"].configure(masked=masked)
            handle.set_scene([dog()])
            (found[masked],) = (one.reference for one in handle["subject"].scene.subjects)
            handle["subject"].configure(encoder_weight=0.0)
            found[masked, "drawn"] = draw(pipe)
        handle["subject"].configure(masked=True)
        handle.set_scene([dog(mask=Image.new("L", (16, 16), 255))])
        assert torch.equal(draw(pipe), found[False, "drawn"])
    assert torch.equal(found[True].tokens, found[False].tokens)
    assert found[True].mask.mean() < 0.6
    assert found[False].mask.min() == 1
    assert not torch.equal(found[True, "drawn"], found[False, "drawn"])
