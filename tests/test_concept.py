"""Concepts attached: new tokens, changes at their rows of the text alone, and nothing left behind."""

import copy
import warnings
from dataclasses import replace
from string import ascii_lowercase
from typing import Any

import pytest
import torch
from tiny import RIDING, Graphs, trained_adapter
from tiny_concept import PROMPT, draw, trained_concept
from tiny_dit import trained_joint_adapter, trained_layers
from tiny_subject import dog, trained_subject_adapter

from interactdiff import AdapterError, attach
from interactdiff.clear import ClearConfig
from interactdiff.concept import ConceptAdapter, ConceptError, fold
from interactdiff.concept.encoders import equal_rows, text_encoders
from interactdiff.concept.projections import projection_weight
from interactdiff.concept.words import Concept, as_concepts, joint_prompt
from interactdiff.sites import denoiser_of

BASES = ["sd1", "sd2", "sdxl", "flux", "sd3"]


@pytest.fixture
def any_pipe(request: pytest.FixtureRequest) -> Any:
    """Of each base that concepts are for."""
    name = request.param
    if name in ("flux", "sd3"):
        return request.getfixturevalue(f"{name}_pipe")
    pipe = request.getfixturevalue("xl_pipe" if name == "sdxl" else "pipe")
    if name == "sd2":
        pipe.scheduler = type(pipe.scheduler).from_config(
            pipe.scheduler.config, prediction_type="v_prediction"
        )
        pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
        pipe.tokenizer.pad_token = "a"  # its id is 0 and it is a token of words, as "!" of SD 2's
    return pipe


every_base = pytest.mark.parametrize("any_pipe", BASES, indirect=True)


def state(pipe: Any) -> list[Any]:
    """The objects that a concept may edit, and what hangs on them."""
    found: list[Any] = []
    for encoder in text_encoders(pipe):
        module = encoder.module(pipe)
        table = module.get_input_embeddings()
        hooks = [dict(m._forward_hooks) | dict(m._forward_pre_hooks) for m in module.modules()]
        found += [id(encoder.tokenizer(pipe)), len(encoder.tokenizer(pipe)), id(table.weight), hooks]
        found += [list(module.state_dict())]
    denoiser = denoiser_of(pipe)
    found += [list(denoiser.state_dict()), [len(m._forward_hooks) for m in denoiser.modules()]]
    return found


@every_base
def test_it_changes_nothing_but_its_rows_and_leaves_nothing_behind(any_pipe: Any) -> None:
    plain, word = draw(any_pipe, "a cat"), draw(any_pipe, "c on d")
    before = state(any_pipe)  # transformers' own hooks come with the first call
    with attach(any_pipe, trained_concept(any_pipe)) as handle:
        assert torch.equal(draw(any_pipe, "a cat"), plain), "a prompt without concepts is the base's"
        drawn = draw(any_pipe)
        assert not torch.allclose(drawn, word, atol=1e-3)
        rows, every = handle["concept"]._text[2]
        assert 2 <= len(rows[0]) < len(every[0])
        assert handle.describe() == "concept: <hero>, <blob> (changes no other words)"
    assert state(any_pipe) == before
    assert torch.equal(draw(any_pipe, "a cat"), plain)


@every_base
def test_untrained_it_is_its_words(any_pipe: Any) -> None:
    """Words of one letter are one token each, so that prompts of them have the ids of their concepts."""
    adapter = ConceptAdapter.for_pipeline(any_pipe, {"<hero>": "c", "<blob>": "d"}).eval()
    for encoder in text_encoders(any_pipe):
        ids = encoder.tokenizer(any_pipe)("c", add_special_tokens=False).input_ids
        table = encoder.module(any_pipe).get_input_embeddings().weight
        expected = table[ids].mean(0, keepdim=True)
        assert torch.allclose(adapter.vectors_of(adapter.config.concepts[0], encoder.name), expected)
    with attach(any_pipe, adapter):
        with_changes = draw(any_pipe)
    tokens = ConceptAdapter.for_pipeline(any_pipe, {"<hero>": "c", "<blob>": "d"}, projections="none").eval()
    with attach(any_pipe, tokens):
        assert torch.equal(draw(any_pipe), with_changes), "changes of zero change a bit"
    if hasattr(any_pipe, "unet"):  # CLIP's letters are whole words here
        assert torch.allclose(draw(any_pipe, "c on d"), with_changes, atol=1e-5)


@pytest.mark.parametrize("projections", ["kv", "v"])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_change_is_that_of_the_formula(pipe: Any, projections: str, rank: int) -> None:
    """At its rows a projection's output is (W + dW) h, at all others W h."""
    adapter = trained_concept(pipe, projections=projections, rank=rank)
    seen: dict[str, Any] = {}
    with attach(pipe, adapter) as handle:
        assert len(adapter.shapes) == len(projections) * 11
        site, at = next(adapter.changed(pipe.unet))
        layer = getattr(site.module, at)
        hook = layer.register_forward_hook(lambda _, args, out: seen.update(states=args[0], out=out))
        draw(pipe, num_inference_steps=1)
        hook.remove()
        row, token = handle["concept"]._text[2][0]
        states, out = seen["states"], seen["out"]
        own = adapter.projection(site, at).folded(projection_weight(site, at))
        expected = states @ layer.weight.T
        expected[row, token] = states[row, token] @ own.T
        assert torch.allclose(out, expected, atol=1e-5)
        assert set(row.tolist()) == {1}, "guidance's other half has no concept"
        assert token.tolist() == [1, 4]  # after start; "on" is two letters


def test_rows_are_found_however_text_is_joined_repeated_or_cast(pipe: Any) -> None:
    known, text = torch.randn(3, 6), torch.randn(2, 5, 6)
    text[1, 2], text[0, 4] = known[1], known[2]
    found = equal_rows(text, known)
    assert found.nonzero().tolist() == [[0, 4], [1, 2]]
    text[0, 4, 5] += 1e-6  # the first columns are equal, the row is not
    assert equal_rows(text, known).nonzero().tolist() == [[1, 2]]
    with attach(pipe, trained_concept(pipe)) as handle:
        text, _ = pipe.encode_prompt(PROMPT, pipe.device, 1, False)
        more = torch.cat([torch.zeros_like(text), text.repeat(2, 1, 1)]).half()
        own, _ = handle["concept"]._rows(more)
        assert [t.tolist() for t in own] == [[1, 1, 2, 2], [1, 4, 1, 4]]
        drawn = draw(pipe)
        nothing, _ = pipe.encode_prompt("", pipe.device, 1, False)
        given = {"prompt_embeds": text, "negative_prompt_embeds": nothing}
        assert torch.allclose(draw(pipe, None, **given), drawn, atol=1e-5)
        ids = pipe.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
        skipped = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        own, _ = handle["concept"]._rows(pipe.text_encoder.final_layer_norm(skipped))
        assert own[1].tolist() == [1, 4], "what clip_skip reads"


def test_texts_act_however_long_ago_they_were_encoded(pipe: Any, monkeypatch: Any) -> None:
    """Many texts' states are kept, repeated ones once; a warning says when the limit is reached."""
    prompts = [f"{letter} <hero>" for letter in ascii_lowercase]
    with attach(pipe, trained_concept(pipe)) as handle, warnings.catch_warnings():
        warnings.simplefilter("error")
        (tokens,) = handle["concept"].new_tokens
        texts = [pipe.encode_prompt(prompt, pipe.device, 1, False)[0] for prompt in prompts * 2]
        assert len(tokens.states) == len(prompts)
        assert all(len(handle["concept"]._rows(text)[0][1]) == 1 for text in texts)
        given = {"prompt_embeds": texts[0], "negative_prompt_embeds": torch.zeros_like(texts[0])}
        early = draw(pipe, None, **given)
        assert not torch.equal(early, draw(pipe, None, **given | {"prompt_embeds": texts[0] * 1.0001}))
        monkeypatch.setattr("interactdiff.concept.encoders.MOST_BYTES", 10 * 24 * 4)
        pipe.encode_prompt("on <blob>", pipe.device, 1, False)
        assert len(tokens.states) == 10
        draw(pipe, "a <blob>")  # which is known
        with pytest.raises(UserWarning, match="concept: expected one of the latest texts with <hero>"):
            draw(pipe, None, **given | {"prompt_embeds": texts[0].clone()})


@every_base
def test_several_vectors_a_token(any_pipe: Any) -> None:
    adapter = trained_concept(any_pipe, {"<hero>": "cat"}, vectors=2)
    assert adapter.tokens == ("<hero>", "<hero>_1")
    if not hasattr(any_pipe, "maybe_convert_prompt"):
        with pytest.raises(AdapterError, match="expected tokens of one vector for StableDiffusion3Pipeline"):
            attach(any_pipe, adapter)
        return
    with attach(any_pipe, adapter) as handle:
        draw(any_pipe, "a <hero>")
        assert len(handle["concept"]._text[2][0][0]) == 2


@every_base
def test_two_concepts_in_any_order_are_the_same_bits(any_pipe: Any) -> None:
    draw(any_pipe)
    before = state(any_pipe)
    one = trained_concept(any_pipe, {"<hero>": "cat"}, seed=1).named("one")
    other = trained_concept(any_pipe, {"<blob>": "dog"}, seed=2).named("other")
    with attach(any_pipe, one, other):
        both = draw(any_pipe)
    with attach(any_pipe, other) as second:
        alone = draw(any_pipe, "a <blob>")
        first = attach(any_pipe, one)
        assert torch.equal(draw(any_pipe), both)
        assert torch.equal(draw(any_pipe, "a <blob>"), alone), "the other concept acts on this one's word"
        second.detach()
        assert not torch.equal(draw(any_pipe), both)
        first.detach()
    assert state(any_pipe) == before


def test_two_that_act_on_all_words_keep_to_their_own(pipe: Any) -> None:
    one = trained_concept(pipe, {"<hero>": "cat"}, seed=1, acts_on="all").named("one")
    other = trained_concept(pipe, {"<blob>": "dog"}, seed=2, acts_on="all").named("other")
    with attach(pipe, one) as handle:
        assert handle.describe().endswith("(changes all words)")
        assert not torch.equal(draw(pipe, "<hero> on cat"), draw(pipe, "<hero> on dog"))
        with attach(pipe, other):
            assert handle.describe().endswith("(changes no other words)")
            both = draw(pipe)
    for adapter in (one, other):
        object.__setattr__(adapter.config, "acts_on", "own")
    with attach(pipe, other, one):
        assert torch.equal(draw(pipe), both)


@pytest.mark.parametrize("fixture", ["pipe", "flux_pipe"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_beside_interactions_and_windows(fixture: str, order: tuple[int, ...], request: Any) -> None:
    """A concept is a subject's phrase too, which is read with the learned token."""
    pipe = request.getfixturevalue(fixture)
    denoiser = denoiser_of(pipe)
    is_unet = hasattr(pipe, "unet")
    interaction = trained_adapter(denoiser) if is_unet else trained_joint_adapter(denoiser)
    adapters = [trained_concept(pipe), interaction, trained_layers(denoiser, ClearConfig(2)).eval()]
    ride = type(RIDING)("<hero>", "riding", "bike", RIDING.subject_box, RIDING.object_box)
    plain = draw(pipe, "a cat")

    def drawn(chosen: tuple[int, ...], item: Any = ride) -> torch.Tensor:
        with attach(pipe, *(adapters[n] for n in chosen)) as handle:
            if 2 in chosen:
                handle["clear"].configure(min_tokens=0)
            handle.set_scene([item])
            return draw(pipe)

    everything = drawn(order)
    assert torch.equal(everything, drawn((1, 2, 0)))
    assert not torch.equal(everything, drawn((0, 1)))
    word = type(RIDING)("cat", "riding", "bike", RIDING.subject_box, RIDING.object_box)
    assert not torch.equal(everything, drawn(order, word)), "the phrase is not read with the token"
    assert torch.equal(draw(pipe, "a cat"), plain)


@every_base
@pytest.mark.parametrize("beside", ["interaction", "clear"])
def test_a_pair_draws_the_same_in_both_orders_and_each_acts(any_pipe: Any, beside: str) -> None:
    denoiser, tokens = denoiser_of(any_pipe), trained_concept(any_pipe)
    if beside == "clear":
        other: Any = trained_layers(denoiser, ClearConfig(2)).eval()
    else:
        other = (trained_adapter if hasattr(any_pipe, "unet") else trained_joint_adapter)(denoiser)

    def drawn(*chosen: Any) -> torch.Tensor:
        with attach(any_pipe, *chosen) as handle:
            if beside == "clear" and other in chosen:
                handle["clear"].configure(min_tokens=0)
            elif other in chosen:
                handle.set_scene([RIDING])
            return draw(any_pipe, PROMPT if tokens in chosen else "a cat")

    both = drawn(tokens, other)
    assert torch.equal(drawn(other, tokens), both)
    assert not torch.equal(drawn(tokens), both)
    assert not torch.equal(drawn(other), both)


@pytest.mark.filterwarnings("ignore::UserWarning")  # subjects that the prompt does not name
@every_base
def test_beside_subjects_in_any_order(any_pipe: Any) -> None:
    """Each acts beside the other; a subject's phrase is read with the learned token, keys and values too."""
    tokens = trained_concept(any_pipe)
    subjects = trained_subject_adapter(denoiser_of(any_pipe))
    plain = draw(any_pipe, "a cat")

    def drawn(*chosen: Any, phrase: str = "<hero>", prompt: str = PROMPT) -> torch.Tensor:
        handles = [attach(any_pipe, one) for one in chosen]
        if subjects in chosen:
            handles[chosen.index(subjects)].set_scene([replace(dog(), phrase=phrase)])
        picture = draw(any_pipe, prompt)
        for handle in handles:
            handle.detach()
        return picture

    both = drawn(tokens, subjects)
    assert torch.equal(drawn(subjects, tokens), both)
    assert not torch.equal(drawn(tokens), both), "the subject does not act"
    assert not torch.equal(drawn(tokens, subjects, phrase="<blob>"), both), "its phrase does not count"
    with_word = drawn(tokens, subjects, phrase="dog", prompt="a cat")
    assert torch.equal(drawn(subjects, phrase="dog", prompt="a cat"), with_word), "acts on other words"
    with_token = drawn(tokens, subjects, prompt="a cat")
    for name, parameter in tokens.named_parameters():
        if not name.startswith("concept_tokens"):
            parameter.data.zero_()
    assert not torch.equal(drawn(tokens, subjects, prompt="a cat"), with_token), (
        "the reference's keys and values are the base's"
    )
    assert torch.equal(draw(any_pipe, "a cat"), plain)


@pytest.mark.parametrize("any_pipe", ["sd1", "sdxl", "flux"], indirect=True)
def test_folded_into_the_base_it_draws_the_same(any_pipe: Any) -> None:
    adapter = trained_concept(any_pipe, acts_on="all")
    with attach(any_pipe, adapter):
        attached, other = draw(any_pipe), draw(any_pipe, "a cat")
    fold(any_pipe, adapter)
    assert torch.allclose(draw(any_pipe), attached, atol=1e-4)
    assert torch.allclose(draw(any_pipe, "a cat"), other, atol=1e-4), "all words means all prompts"
    with pytest.raises(AdapterError, match="expected a new token, got <hero>"):
        fold(any_pipe, adapter)


def test_what_cannot_be_folded_is_left_as_it_is(flux_pipe: Any) -> None:
    adapter, before = trained_concept(flux_pipe), draw(flux_pipe, "a cat")
    with pytest.raises(AdapterError, match="which projects the image too: learn with acts_on 'all'"):
        fold(flux_pipe, adapter)
    assert "<hero>" not in flux_pipe.tokenizer.get_vocab()
    assert torch.equal(draw(flux_pipe, "a cat"), before)


def test_gradients_reach_the_tokens_and_the_changes_alone(flux_pipe: Any) -> None:
    pipe = flux_pipe
    adapter = trained_concept(pipe).train()
    for part in (pipe.text_encoder, pipe.text_encoder_2, pipe.transformer):
        part.requires_grad_(False)
    with attach(pipe, adapter):
        text, pooled, _ = pipe.encode_prompt(PROMPT, None, max_sequence_length=10)
        ((text * torch.randn_like(text)).sum() + (pooled * torch.randn_like(pooled)).sum()).backward()
    for concept in adapter.config.concepts:
        for name in ("text_encoder", "text_encoder_2"):
            gradient = adapter.vectors_of(concept, name).grad
            assert gradient is not None
            assert gradient.abs().sum() > 0
    assert all(p.grad is None for part in (pipe.text_encoder, pipe.text_encoder_2) for p in part.parameters())


def test_a_legacy_end_of_text_still_pools_there(pipe: Any) -> None:
    """Old configurations take the highest id for the end, which a new token's would be."""
    ends = pipe.text_encoder
    with attach(pipe, trained_concept(pipe)):
        ids = pipe.tokenizer("a <hero> on", return_tensors="pt").input_ids
        expected = ends(ids)
        core = getattr(ends, "text_model", ends)
        core.eos_token_id = 2
        legacy = ends(ids)
    assert torch.equal(legacy.pooler_output, expected.pooler_output)
    assert ids.max() > pipe.tokenizer.eos_token_id


def test_refusals(pipe: Any, xl_pipe: Any, unet: Any) -> None:
    concept = trained_concept(pipe)
    for wrong, words in (
        (lambda: attach(unet, concept), "got a bare denoiser"),
        (lambda: attach(xl_pipe, concept), r"expected the base that the concept was learned on"),
        (lambda: ConceptAdapter.for_denoiser(unet), "see interactdiff learn"),
    ):
        with pytest.raises(AdapterError, match=words):
            wrong()
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.add_tokens("<hero>")
    with pytest.raises(
        AdapterError, match="expected a new token, got <hero>, which the pipeline's tokenizer has"
    ):
        attach(pipe, concept)
    assert len(pipe.tokenizer) == 55
    other = trained_concept(pipe, {"<new>": "a"})
    pipe.text_encoder = None
    with pytest.raises(AdapterError, match="expected a pipeline with the concept's text_encoder of width 24"):
        attach(pipe, other)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"hero": "person"}, "in angle brackets, such as <hero>, got 'hero'"),
        ({"<hero>": " "}, "expected a word for <hero>"),
        ({}, "expected at least one concept"),
        ([Concept("<a>", "b"), Concept("<a>", "c")], "expected each concept once, got <a> twice"),
    ],
)
def test_words_that_are_refused(given: Any, words: str) -> None:
    with pytest.raises(ConceptError, match=words):
        as_concepts(given)


def test_prompts() -> None:
    assert joint_prompt(None, ["<a>", "<b>", "<c>"]).text == "a photo of <a> and <b> and <c>"
    assert joint_prompt("{1}, by {0}", ["<a>", "<b>"]).text == "<b>, by <a>"
    for wrong in ("{0}", "{0} {1} {1}", "{0} {1", "{} {}", "{0.x} {1}"):
        with pytest.raises(ConceptError, match="expected a prompt"):
            joint_prompt(wrong, ["<a>", "<b>"])
    assert Concept.parse("<hero>=tall person") == Concept("<hero>", "tall person")
    with pytest.raises(ConceptError, match="expected TOKEN=WORD"):
        Concept.parse("<hero>")


def test_compiled_it_is_one_graph_from_step_to_step(flux_pipe: Any, graphs: Graphs) -> None:
    adapter = trained_concept(flux_pipe)
    with attach(flux_pipe, adapter):
        expected = draw(flux_pipe, num_inference_steps=3)
    flux_pipe.transformer.compile(backend=graphs, fullgraph=True)
    with attach(flux_pipe, adapter):
        assert torch.allclose(draw(flux_pipe, num_inference_steps=3), expected, atol=1e-4)
        assert len(graphs) == 1, "a step compiles anew"


def test_many_hidden_states_push_no_prompt_out(xl_pipe: Any) -> None:
    """Guidance's other half names a concept too; both are found, whatever else was encoded before."""
    with attach(xl_pipe, trained_concept(xl_pipe)) as handle:
        for _ in range(3):
            xl_pipe.encode_prompt("a <hero>", device=xl_pipe.device)
        draw(xl_pipe, PROMPT, negative_prompt="<blob>")
        row, token = handle["concept"]._text[2][0]
    assert [row.tolist(), token.tolist()] == [[0, 1, 1], [1, 1, 4]]
