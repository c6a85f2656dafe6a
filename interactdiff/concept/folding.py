"""Folds a concept into a base: a pipeline whose matrices, tokenizers and text encoders have it for good."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from interactdiff.concept.adapter import ConceptAdapter
from interactdiff.concept.encoders import check_new, extended, text_encoders
from interactdiff.concept.projections import projection_weight
from interactdiff.errors import AdapterError
from interactdiff.models import MODEL, resolve
from interactdiff.pipeline_loading import load_pipeline
from interactdiff.sites import denoiser_of

LEGACY_END = 2  # `eos_token_id` of CLIPs whose files are older than transformers 4.29


@torch.no_grad()
def fold(pipeline: Any, adapter: ConceptAdapter) -> None:
    """Write a concept into a pipeline: nothing is attached, and no step costs more.

    Matrices and tables of embeddings change in place; tokenizers are replaced by copies.

    A concept that was learned for the rows of its own tokens (`acts_on` "own") changes those of all words
    once it is folded.

    Args:
        pipeline: the base.
        adapter: with changes of projections of the text alone.

    Raises:
        AdapterError: it is for another base, changes projections that the image shares, or has a token that
            the pipeline has; nothing has been changed then.
    """
    denoiser = denoiser_of(pipeline)
    adapter.check(denoiser)
    changed = list(adapter.changed(denoiser))
    shared = next((site.path for site, _ in changed if site.role == "single"), None)
    if shared is not None:
        raise AdapterError(
            f"expected changes of the text's own projections to fold, got some of {shared}, which projects "
            "the image too: learn with acts_on 'all', or keep the concept attached"
        )
    encoders = text_encoders(pipeline) if adapter.config.concepts else []
    widths = {encoder.name: encoder.width(pipeline) for encoder in encoders}
    if adapter.config.concepts and widths != adapter.config.widths:
        raise AdapterError(f"expected text encoders of widths {adapter.config.widths}, got {widths}")
    for encoder in encoders:
        check_new(pipeline, encoder, adapter.tokens)
    for site, at in changed:
        weight, projection = projection_weight(site, at), adapter.projection(site, at)
        weight.copy_(projection.folded(weight))  # type: ignore[operator]
    for encoder in encoders:
        tokenizer, module = extended(encoder.tokenizer(pipeline), adapter.tokens), encoder.module(pipeline)
        setattr(pipeline, encoder.tokenizer_name, tokenizer)
        table = module.get_input_embeddings().weight
        if len(tokenizer) > len(table):
            module.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            table = module.get_input_embeddings().weight
        ids = tokenizer.convert_tokens_to_ids(list(adapter.tokens))
        table[ids] = adapter.all_vectors(encoder.name).to(table)
        _pool_at_the_end(module, tokenizer)


def _pool_at_the_end(module: Any, tokenizer: Any) -> None:
    """Let an old CLIP know its end of text; with `eos_token_id` 2 it pools at the highest id, a new token."""
    end = tokenizer.eos_token_id
    if getattr(module.config, "eos_token_id", None) == LEGACY_END and end is not None:
        module.config.eos_token_id = end
        core = getattr(module, "text_model", module)
        if hasattr(core, "eos_token_id"):
            core.eos_token_id = end


def loaded_for(source: str, model: str | None) -> tuple[ConceptAdapter, Any]:
    """A concept, and the pipeline that it is for.

    Raises:
        InteractdiffError: one of them cannot be loaded, or they do not fit.
    """
    adapter = ConceptAdapter.from_pretrained(resolve("adapter", source))
    pipeline = load_pipeline(resolve("model", model or MODEL), torch.device("cpu"), torch.float32)
    adapter.check(denoiser_of(pipeline))
    return adapter, pipeline


def export_folded(source: str, target: Path, model: str | None) -> str:
    """`interactdiff convert IN OUT --fold --model M`: the whole pipeline, in a folder of its own.

    Raises:
        InteractdiffError: as `loaded_for` and `fold`; or the folder holds something.
    """
    if target.is_dir() and any(target.iterdir()):
        raise AdapterError(
            f"expected a new or an empty folder for the folded model, got {target} with files in it"
        )
    adapter, pipeline = loaded_for(source, model)
    fold(pipeline, adapter)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=".aside-"))
    try:
        pipeline.save_pretrained(aside, safe_serialization=True)
        aside.chmod(0o755)
        aside.replace(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    words = (
        ""
        if adapter.config.acts_on == "all"
        else "; it was learned for its own tokens and now changes all words"
    )
    return f"{target}: {model or MODEL} with {', '.join(adapter.tokens)}{words}"
