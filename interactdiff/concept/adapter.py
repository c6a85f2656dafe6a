"""AttenCraft's concepts as one module (arXiv 2405.17965): new tokens, and changes of keys and values."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from interactdiff.adapter import Adapter, Binding, Host
from interactdiff.checkpoint import check_tensors, save_adapter_files
from interactdiff.concept.config import METHOD, Acts, ConceptConfig
from interactdiff.concept.encoders import text_encoders
from interactdiff.concept.projections import make_projection, projection_weight, text_projections
from interactdiff.concept.words import Concept, as_concepts
from interactdiff.errors import AdapterError
from interactdiff.families import UNET
from interactdiff.module_paths import submodule_at
from interactdiff.sites import KINDS, Denoiser, Site, denoiser_of, find_sites, known_family

MASKS = "masks"
SHARED = "single_transformer_blocks."  # whose projections are the image's and the text's
SHARED_RANK, LARGE = 16, 2**20  # of their changes, where their matrices have more elements than that
FAMILIES = ("U-Net", "Flux", "SD3")  # whose text rows are states of their text encoders, position by position


class ConceptAdapter(Adapter):
    """New tokens, and for each projection of the text what they change of it.

    `state_dict` has `concept_tokens.<hero>.text_encoder`, [vectors, width], for each token and text encoder;
    below a site's path `to_k` and `to_v`, or `add_k_proj` and `add_v_proj`; and, where a photo's masks are
    kept, `masks`, uint8 [K + 1, h, w], the background's last.

    Args:
        config: what was learned, and where it acts.
        shapes: of each projection's matrix, [out, in], by "PATH.NAME".
    """

    name = METHOD
    order = 30

    def __init__(self, config: ConceptConfig, shapes: Mapping[str, tuple[int, int]]):
        super().__init__()
        self.config, self.shapes = config, dict(shapes)
        self.masks: Tensor | None
        self.register_buffer(MASKS, None)
        self.concept_tokens = nn.ModuleDict(
            {
                concept.token: nn.ParameterDict(
                    {
                        name: nn.Parameter(torch.zeros(concept.vectors, width))
                        for name, width in config.widths.items()
                    }
                )
                for concept in config.concepts
            }
        )
        for name, (rows, columns) in self.shapes.items():
            path, _, at = name.rpartition(".")
            rank = config.rank or (config.shared_rank if path.startswith(SHARED) else 0)
            submodule_at(self, path).add_module(at, make_projection(config.stored, rows, columns, rank))

    @classmethod
    def for_denoiser(cls, denoiser: Any, *args: Any, **options: Any) -> "ConceptAdapter":
        """Not possible of a denoiser alone: see `for_pipeline`.

        Raises:
            AdapterError: always.
        """
        raise AdapterError("expected a concept that was learned, got none: see interactdiff learn")

    @classmethod
    def for_pipeline(
        cls,
        pipeline: Any,
        concepts: Mapping[str, str] | Sequence[Concept] = (),
        *,
        projections: str = "kv",
        rank: int = 0,
        acts_on: Acts = "own",
        vectors: int = 1,
        prompt: str | None = None,
    ) -> "ConceptAdapter":
        """An untrained adapter, in float32 and train mode: its tokens mean the words that they start from.

        Args:
            pipeline: the base, from text.
            concepts: {token: word}, such as {"<hero>": "person"}; none for an adapter that only observes.
            projections: of text that are changed: "kv", "k", "v" or "none".
            rank: of the changes; 0 for whole matrices, but for large ones of single-stream blocks, which
                then have `SHARED_RANK`.
            acts_on: the rows of the text that are changed, see `ConceptConfig`. With "own", single-stream
                blocks take part; "all" leaves them out, whose projections are the image's too.
            vectors: embeddings for each token, where `concepts` does not say.
            prompt: that names all concepts, see `ConceptConfig`.

        Raises:
            ConceptError: no concepts can be made of these.
            AdapterError: the pipeline is of a family whose text cannot be told apart by tokens, or has no
                text encoders.
        """
        denoiser = denoiser_of(pipeline)
        family = known_family(denoiser)
        if family.name not in FAMILIES:
            raise AdapterError(
                f"expected a base of {', '.join(FAMILIES)} for concepts, got {type(denoiser).__name__}"
            )
        made = as_concepts(concepts, vectors) if concepts else ()
        encoders = text_encoders(pipeline)
        if not encoders:
            raise AdapterError(f"expected a pipeline with text encoders, got {type(pipeline).__name__}")
        config = ConceptConfig(
            made,
            {encoder.name: encoder.width(pipeline) for encoder in encoders},
            projections,
            rank,
            acts_on,
            prompt=prompt,
            base=(family.denoiser, _text_width(denoiser)),
        )
        chosen = text_projections(denoiser, config.letters if made else "", acts_on == "own")
        shapes = {f"{site.path}.{at}": tuple(projection_weight(site, at).shape) for site, at in chosen}
        if any(name.startswith(SHARED) and prod(shape) > LARGE for name, shape in shapes.items()):
            config = replace(config, shared_rank=SHARED_RANK)
        adapter = cls(config, cast(Any, shapes))
        for concept in made:
            for encoder in encoders:
                start = encoder.word_vectors(pipeline, concept.word, concept.vectors)
                adapter.vectors_of(concept, encoder.name).data.copy_(start)
        return adapter

    @staticmethod
    def learn(pipeline: Any, image: Any, concepts: Mapping[str, str], **options: Any) -> "ConceptAdapter":
        """Learn concepts from one photo, see `interactdiff.concept.learner.learn`."""
        from interactdiff.concept.learner import learn

        return learn(pipeline, image, concepts, **options)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        weight_name: str | None = None,
        acts_on: Acts | None = None,
    ) -> "ConceptAdapter":
        """Load concepts, ours or published ones of AttenCraft and Custom Diffusion, in eval mode.

        Args:
            path_or_id: a folder that `save_pretrained` or one of their trainings made, a file in one, or a
                repository on the Hub. Of a folder with `checkpoint-N` folders the last counts.
            weight_name: which file of a folder.
            acts_on: the rows of the text that are changed; None for what the file was trained with, which is
                "all" for published ones.

        Raises:
            AdapterError: there are no concepts, or the files are damaged. No pickle is executed.
        """
        from interactdiff.concept.published import open_concept

        config, tensors = open_concept(path_or_id, weight_name, acts_on)
        return cls.from_tensors(config, tensors).eval()

    @classmethod
    def from_tensors(cls, config: ConceptConfig, tensors: Mapping[str, Tensor]) -> "ConceptAdapter":
        """An adapter that holds these tensors, under the names of `state_dict`.

        Raises:
            AdapterError: names or shapes are not those that the configuration asks for.
        """
        tensors = dict(tensors)
        masks = tensors.pop(MASKS, None)
        adapter = cls(config, shapes_of(tensors, config))
        check_tensors("the concept", adapter.state_dict(), tensors)
        adapter.load_state_dict(tensors, assign=True)
        if masks is not None:
            adapter.masks = masks
        return adapter

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write `adapter.safetensors` and `config.json` into a folder, in the dtype that the weights have.

        Raises:
            OSError: the folder cannot be written.
        """
        save_adapter_files(path, self.config.to_json(), self.exact_state())

    def check(self, denoiser: Denoiser) -> None:
        """Make sure that a denoiser has the projections that are changed.

        Raises:
            AdapterError: it is another base; the message names both.
        """
        family = known_family(denoiser)
        if family.name not in FAMILIES:
            raise AdapterError(
                f"expected a base of {', '.join(FAMILIES)} for concepts, got {type(denoiser).__name__}"
            )
        sites = {site.path: site for site in find_sites(denoiser)}
        for name, shape in self.shapes.items():
            path, _, at = name.rpartition(".")
            layer = getattr(sites[path].module, at, None) if path in sites else None
            got = tuple(projection_weight(sites[path], at).shape) if layer is not None else None
            if got != tuple(shape):
                found = "no such projection" if got is None else f"{list(got)}"
                raise AdapterError(
                    f"expected the base that the concept was learned on, {self._base(name)}, with {name} "
                    f"{list(shape)}, got {type(denoiser).__name__} of text width {_text_width(denoiser)} "
                    f"with {found}"
                )
        if self.config.stored == "weights" and self.shapes:
            wanted = text_projections(denoiser, self.config.letters, single_stream=False)
            names = [f"{site.path}.{at}" for site, at in wanted]
            if missing := [name for name in names if name not in self.shapes]:
                raise AdapterError(
                    f"expected a concept's file with all {len(names)} projections of the base's text, got "
                    f"none for {len(missing)} of them: {missing[0]}"
                )

    def bind(self, host: Host) -> Binding:
        """What one attachment needs.

        Raises:
            AdapterError: there is no pipeline, its text encoders are others, or a token is known already.
        """
        from interactdiff.concept.binding import ConceptBinding

        return ConceptBinding(self, host)

    @property
    def tokens(self) -> tuple[str, ...]:
        """All new tokens, one for each vector."""
        return tuple(token for concept in self.config.concepts for token in concept.tokens)

    def vectors_of(self, concept: Concept, encoder: str) -> nn.Parameter:
        """[vectors, width] embeddings of a concept in a text encoder."""
        return cast(Any, self.concept_tokens[concept.token])[encoder]

    def all_vectors(self, encoder: str) -> Tensor:
        """[len(tokens), width] embeddings of all tokens in a text encoder."""
        return torch.cat([self.vectors_of(concept, encoder) for concept in self.config.concepts])

    def projection(self, site: Site, at: str) -> nn.Module:
        """What is changed of one projection of a site."""
        return self.get_submodule(f"{site.path}.{at}")

    def changed(self, denoiser: Denoiser) -> Iterator[tuple[Site, str]]:
        """The projections that are changed: the denoiser's sites, and the projections' names there."""
        for site in find_sites(denoiser):
            for at in ("to_k", "to_v", "add_k_proj", "add_v_proj"):
                if f"{site.path}.{at}" in self.shapes:
                    yield site, at

    def _base(self, name: str) -> str:
        if self.config.base is not None:
            denoiser, width = self.config.base
            kind = KINDS.get(width, denoiser) if denoiser == UNET.denoiser else denoiser
            return f"{kind} of text width {width}"
        width = self.shapes[name][1]
        return f"{KINDS.get(width, 'a U-Net')} of text width {width}"


def shapes_of(tensors: Mapping[str, Tensor], config: ConceptConfig) -> dict[str, tuple[int, int]]:
    """The shape of each projection's matrix, of the tensors of a file."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if name.startswith("concept_tokens.") or tensor.ndim != 2:
            continue
        if leaf == "weight":
            shapes[path] = (tensor.shape[0], tensor.shape[1])
        elif leaf == "up" and f"{path}.down" in tensors:
            shapes[path] = (tensor.shape[0], tensors[f"{path}.down"].shape[1])
    return shapes


def _text_width(denoiser: Any) -> int:
    width = denoiser.config[known_family(denoiser).text_width]
    return width[0] if isinstance(width, list | tuple) else width
