"""Concept files: ours, AttenCraft's, Custom Diffusion's; what diffusers makes of those that we write."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_concept import PAIR, draw, trained_concept

from interactdiff import AdapterError, attach
from interactdiff.concept import ConceptAdapter, fold
from interactdiff.concept import adapter as concept_adapter
from interactdiff.concept.published import save_custom_diffusion

WEIGHTS = "pytorch_custom_diffusion_weights.bin"


def published(pipe: Any, folder: Path, letters: str = "kv", empty: bool = True) -> dict[str, Any]:
    """A checkpoint as AttenCraft leaves it: empty entries, and tokens as views of whole tables."""
    torch.manual_seed(0)
    state: dict[str, Any] = {}
    for name, processor in pipe.unet.attn_processors.items():
        if ".attn1." in name:
            if empty:
                state[name] = {}
            continue
        assert processor is not None
        attention = pipe.unet.get_submodule(name.removesuffix(".processor"))
        for letter in letters:
            weight = getattr(attention, f"to_{letter}").weight
            state[f"{name}.to_{letter}_custom_diffusion.weight"] = weight.detach() + 0.2 * torch.randn_like(
                weight
            )
    folder.mkdir(parents=True)
    torch.save(state, folder / WEIGHTS)
    table = torch.randn(500, 24)
    for row, token in enumerate(("<new1>", "<new2>")):
        torch.save({token: table[row]}, folder / f"{token}.bin")
    return state


@pytest.mark.parametrize("acts_on", ["own", "all"])
def test_ours_is_read_as_it_was_written(flux_pipe: Any, tmp_path: Path, acts_on: Any) -> None:
    adapter = trained_concept(flux_pipe, acts_on=acts_on, vectors=2, rank=2, prompt="{0} on {1}")
    adapter.masks = torch.randint(0, 2, (3, 4, 4), dtype=torch.uint8)
    adapter.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter.safetensors", "config.json"}
    assert "concept_tokens.<hero>.text_encoder_2" in load_file(tmp_path / "adapter.safetensors")
    read = ConceptAdapter.from_pretrained(tmp_path)
    assert read.config == adapter.config
    assert not read.training
    one, other = adapter.state_dict(), read.state_dict()
    assert sorted(one) == sorted(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    with attach(flux_pipe, adapter):
        expected = draw(flux_pipe)
    with attach(flux_pipe, read):
        assert torch.equal(draw(flux_pipe), expected)
    assert ConceptAdapter.from_pretrained(tmp_path, acts_on="all").config.acts_on == "all"


@pytest.mark.parametrize(("letters", "empty"), [("kv", True), ("kv", False), ("k", True), ("v", False)])
def test_published_files_are_read(pipe: Any, tmp_path: Path, letters: str, empty: bool) -> None:
    """Of a folder, its last checkpoint, or the file: matrices take the place of the base's for every word."""
    published(pipe, tmp_path / "checkpoint-100", letters, empty)
    state = published(pipe, tmp_path / "checkpoint-200", letters, empty)
    adapter = ConceptAdapter.from_pretrained(tmp_path)
    same = ConceptAdapter.from_pretrained(tmp_path / "checkpoint-200" / WEIGHTS)
    assert adapter.config == same.config
    assert adapter.tokens == ("<new1>", "<new2>")
    assert (adapter.config.projections, adapter.config.acts_on) == (letters, "all")
    with attach(pipe, adapter):
        attached = draw(pipe, "<new1> on", guidance_scale=1.0)
    for name, weight in state.items():
        if len(weight):
            path, _, at = name.removesuffix("_custom_diffusion.weight").rpartition(".processor.")
            getattr(pipe.unet.get_submodule(path), at).weight.data.copy_(weight)
    tokens = torch.load(tmp_path / "checkpoint-200" / "<new1>.bin", weights_only=True)
    with attach(pipe, ConceptAdapter.from_tensors(*_tokens_alone(adapter))):
        assert torch.allclose(draw(pipe, "<new1> on", guidance_scale=1.0), attached, atol=1e-4)
    assert tokens["<new1>"].shape == (24,)


def _tokens_alone(adapter: ConceptAdapter) -> tuple[Any, dict[str, torch.Tensor]]:
    from dataclasses import replace

    tensors = {n: t for n, t in adapter.state_dict().items() if n.startswith("concept_tokens.")}
    return replace(adapter.config, projections="none"), tensors


def test_large_projections_that_the_image_shares_are_changed_by_lora(
    flux_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole changes of Flux's single-stream blocks would be 0.7 billion parameters."""
    monkeypatch.setattr(concept_adapter, "LARGE", 16)
    adapter = trained_concept(flux_pipe)
    names = [name for name, _ in adapter.named_parameters()]
    single = {name.rpartition(".")[2] for name in names if name.startswith("single_")}
    joint = {name.rpartition(".")[2] for name in names if name.startswith("transformer_")}
    assert (single, joint) == ({"up", "down"}, {"weight"})
    adapter.save_pretrained(tmp_path)
    read = ConceptAdapter.from_pretrained(tmp_path)
    assert read.config == adapter.config
    assert read.config.shared_rank == 16
    with attach(flux_pipe, adapter):
        expected = draw(flux_pipe)
    with attach(flux_pipe, read):
        assert torch.equal(draw(flux_pipe), expected)


def test_a_published_file_without_some_layers_is_refused(pipe: Any, tmp_path: Path) -> None:
    state = published(pipe, tmp_path / "cd")
    name = next(name for name in reversed(state) if name.endswith("to_v_custom_diffusion.weight"))
    torch.save({key: value for key, value in state.items() if key != name}, tmp_path / "cd" / WEIGHTS)
    with pytest.raises(AdapterError, match=r"all \d+ projections of the base's text, got none for 1 of them"):
        attach(pipe, ConceptAdapter.from_pretrained(tmp_path / "cd"))


def test_safetensors_under_the_name_of_a_pickle(pipe: Any, tmp_path: Path) -> None:
    published(pipe, tmp_path / "run")
    token = torch.load(tmp_path / "run" / "<new1>.bin", weights_only=True)
    save_file({"<new1>": token["<new1>"].clone()}, tmp_path / "run" / "<new1>.bin")
    adapter = ConceptAdapter.from_pretrained(tmp_path / "run")
    assert torch.equal(adapter.vectors_of(adapter.config.concepts[0], "text_encoder")[0], token["<new1>"])


def test_diffusers_reads_what_we_write(pipe: Any, tmp_path: Path) -> None:
    """Its loader of Custom Diffusion, its textual inversion, and folding agree with the attached adapter."""
    adapter = trained_concept(pipe, acts_on="all")
    with attach(pipe, adapter):
        expected = draw(pipe, guidance_scale=1.0)
    save_custom_diffusion(adapter, pipe.unet, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, "<hero>.bin", "<blob>.bin"}
    state = torch.load(tmp_path / WEIGHTS, weights_only=True)
    assert sum(value == {} for value in state.values() if isinstance(value, dict)) == 11
    own = pipe.tokenizer
    read = ConceptAdapter.from_pretrained(tmp_path)
    with attach(pipe, read):
        assert torch.allclose(draw(pipe, guidance_scale=1.0), expected, atol=1e-5)

    pipe.tokenizer = type(own).from_pretrained(_saved(own, tmp_path / "tokenizer"))
    # without a pipeline diffusers reads the file and installs nothing
    pipe.unet.load_attn_procs(str(tmp_path), weight_name=WEIGHTS, _pipeline=pipe, use_safetensors=False)
    for token in PAIR:
        pipe.load_textual_inversion(str(tmp_path), weight_name=f"{token}.bin")
    assert torch.allclose(draw(pipe, guidance_scale=1.0), expected, atol=1e-4)


def _saved(tokenizer: Any, folder: Path) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_folded_pipelines_are_saved_and_loaded(pipe: Any, tmp_path: Path) -> None:
    adapter = trained_concept(pipe, acts_on="all")
    with attach(pipe, adapter):
        expected = draw(pipe, guidance_scale=1.0)
    fold(pipe, adapter)
    pipe.save_pretrained(tmp_path)
    loaded: Any = StableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.allclose(draw(loaded, guidance_scale=1.0), expected, atol=1e-4)


def test_what_the_format_cannot_hold(pipe: Any, flux_pipe: Any, tmp_path: Path) -> None:
    for adapter, denoiser, words in (
        (trained_concept(flux_pipe), flux_pipe.transformer, "of a U-Net with one text encoder"),
        (trained_concept(pipe, projections="v"), pipe.unet, "with keys and values"),
    ):
        with pytest.raises(AdapterError, match=words):
            save_custom_diffusion(adapter, denoiser, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Hostile:
    """A pickle that would write a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_bad_files(pipe: Any, tmp_path: Path) -> None:
    def folder(name: str, state: Any = None, **files: Any) -> Path:
        (tmp_path / name).mkdir()
        if state is not None:
            torch.save(state, tmp_path / name / WEIGHTS)
        for token, content in files.items():
            torch.save(content, tmp_path / name / f"<{token}>.bin")
        return tmp_path / name

    touched = tmp_path / "touched"
    weight = torch.zeros(2, 24)
    good = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_custom_diffusion.weight"
    other = good.replace("to_k", "to_q")
    for source, words in (
        (folder("none"), "expected adapter.safetensors or pytorch_custom_diffusion_weights.bin in"),
        (folder("queries", {other: weight}), "got queries or outputs"),
        (folder("unknown", {"lora.weight": weight}), "got 'lora.weight'"),
        (
            folder("hidden", {"forward.processor.to_k_custom_diffusion.weight": weight}),
            "names of a base's modules",
        ),
        (folder("empty", {}), "without any"),
        (folder("tokens", {good: weight}, new1={"<new2>": weight[0]}), "expected one vector of <new1>"),
        (
            folder("widths", {good: weight}, a={"<a>": torch.zeros(4)}, b={"<b>": torch.zeros(5)}),
            "of one width",
        ),
        (folder("hostile", {good: weight, "x": Hostile(touched)}), r"expected torch weights|expected keys"),
    ):
        with pytest.raises(AdapterError, match=words):
            ConceptAdapter.from_pretrained(source)
    assert not touched.exists()
    assert pickle.dumps(Hostile(touched))
    wrong = ConceptAdapter.from_pretrained(
        folder("other", {good: torch.zeros(16, 1024)}, a={"<a>": torch.zeros(24)})
    )
    with pytest.raises(
        AdapterError, match=r"learned on, SD 2.x of text width 1024, with .*got UNet2D.* width 24"
    ):
        attach(pipe, wrong)
    ours = tmp_path / "ours"
    trained_concept(pipe).save_pretrained(ours)
    config = json.loads((ours / "config.json").read_text())
    for change, words in (
        ({"method": "clear"}, "expected an adapter of method and version"),
        ({"concepts": [{"token": "hero", "word": "x"}]}, "expected the configuration of a concept"),
        ({"widths": {"text_encoder": 7}}, "expected the concept's concept_tokens"),
        ({"stored": "pickles"}, "expected the configuration of a concept"),
    ):
        (ours / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(AdapterError, match=words):
            ConceptAdapter.from_pretrained(ours)
