"""What decides a concept adapter's shapes and where it acts, and how its file says so."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from interactdiff.concept.words import Concept, ConceptError, check_distinct
from interactdiff.errors import AdapterError

METHOD, VERSION = "concept", 1
Acts = Literal["own", "all"]
Stored = Literal["changes", "weights"]
PROJECTIONS = ("kv", "k", "v", "none")


@dataclass(frozen=True)
class ConceptConfig:
    """Everything that decides a concept adapter's shapes and where it acts.

    Attributes:
        concepts: the things that were learned; empty for an adapter that only observes.
        widths: of each text encoder's embeddings, by the name that the pipeline has for it.
        projections: of text that are changed: keys and values, one of them, or none.
        rank: of the changes; 0 for whole matrices.
        shared_rank: where `rank` is 0, the rank of changes of projections that text and image share; 0 for
            whole matrices.
        acts_on: the rows of the text that are changed: "own", those of the concepts' own tokens, so that all
            other words mean what they did; or "all", as Custom Diffusion and AttenCraft have it.
        stored: "changes" to the base's matrices, or "weights" in their place, as published files have them.
        prompt: that names all concepts, with slots {0}, {1}; None is "a photo of {0} and {1}".
        base: the denoiser's class and the width of its text, where they are known.
    """

    concepts: tuple[Concept, ...] = ()
    widths: dict[str, int] = field(default_factory=dict)
    projections: str = "kv"
    rank: int = 0
    acts_on: Acts = "own"
    stored: Stored = "changes"
    prompt: str | None = None
    base: tuple[str, int] | None = None
    shared_rank: int = 0

    def __post_init__(self) -> None:
        if self.projections not in PROJECTIONS:
            raise ConceptError(f"expected projections of {', '.join(PROJECTIONS)}, got {self.projections!r}")
        if self.acts_on not in get_args(Acts):
            raise ConceptError(f"expected acts_on of {', '.join(get_args(Acts))}, got {self.acts_on!r}")
        for rank in (self.rank, self.shared_rank):
            if type(rank) is not int or rank < 0:
                raise ConceptError(f"expected a rank from 0 up, got {rank!r}")

    @property
    def letters(self) -> str:
        """Of "kv", the projections that are changed."""
        return "" if self.projections == "none" else self.projections

    def to_json(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        return {"method": METHOD, "version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: Any) -> "ConceptConfig":
        """Read the contents of `config.json`.

        Raises:
            AdapterError: it is not the configuration of such an adapter.
        """
        got = (data.get("method"), data.get("version")) if isinstance(data, dict) else data
        if got != (METHOD, VERSION):
            raise AdapterError(f"expected an adapter of method and version {(METHOD, VERSION)}, got {got}")
        values = {name: value for name, value in data.items() if name not in ("method", "version")}
        try:
            concepts = tuple(Concept(**one) for one in values.pop("concepts"))
            check_distinct([concept.token for concept in concepts])
            widths = {str(name): int(width) for name, width in values.pop("widths").items()}
            base = values.pop("base", None)
            if values.get("stored") not in get_args(Stored):
                raise ValueError(f"stored {values.get('stored')!r}")
            known = None if base is None else (str(base[0]), int(base[1]))
            return cls(concepts=concepts, widths=widths, base=known, **values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AdapterError(
                f"expected the configuration of a concept, got {type(error).__name__}: {error}"
            ) from None
