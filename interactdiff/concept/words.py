"""What a person names: a concept's new token, and the word whose embedding it starts from. No torch."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from interactdiff.errors import InteractdiffError
from interactdiff.scene_checks import as_float, shown

TOKEN = re.compile(r"<[\w-]+>")
MAX_VECTORS = 16
MAX_SEED = 2**32 - 1
PREFIX = "a photo of "


class ConceptError(InteractdiffError):
    """Concepts that cannot be learned, found or read as they were given."""


class NotFoundError(ConceptError):
    """A concept that attention does not find in a photo."""


@dataclass(frozen=True)
class Concept:
    """A thing that is learned.

    Attributes:
        token: what prompts call it, in angle brackets, such as "<hero>".
        word: what it is, such as "person": its embedding starts there.
        vectors: embeddings that the token stands for, 1 to `MAX_VECTORS`.

    Raises:
        ConceptError: a token without brackets, no word, or a number of vectors out of range.
    """

    token: str
    word: str
    vectors: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.token, str) or not TOKEN.fullmatch(self.token):
            raise ConceptError(
                f"expected a concept's token in angle brackets, such as <hero>, got {shown(self.token)}"
            )
        if not isinstance(self.word, str) or not self.word.strip():
            raise ConceptError(
                f"expected a word for {self.token}, such as {self.token}=person, got {shown(self.word)}"
            )
        if type(self.vectors) is not int or not 1 <= self.vectors <= MAX_VECTORS:
            raise ConceptError(f"expected 1 to {MAX_VECTORS} vectors a token, got {shown(self.vectors)}")

    @classmethod
    def parse(cls, text: str, vectors: int = 1) -> "Concept":
        """Read `<token>=word`.

        Raises:
            ConceptError: it is of another form.
        """
        token, equals, word = text.partition("=")
        if not equals:
            raise ConceptError(f"expected TOKEN=WORD, such as <hero>=person, got {shown(text)}")
        return cls(token.strip(), word.strip(), vectors)

    @property
    def tokens(self) -> tuple[str, ...]:
        """One token for each vector, as diffusers' textual inversion names them: `<hero>`, `<hero>_1`."""
        return (self.token, *(f"{self.token}_{n}" for n in range(1, self.vectors)))


def check_range(name: str, value: Any, low: float, high: float = math.inf, whole: bool = False) -> None:
    """Make sure that an option is a finite number within a range, both ends included.

    Raises:
        ConceptError: it is not, or it should be a whole number and is none.
    """
    number = as_float(value)
    is_right = number is not None and math.isfinite(number) and low <= number <= high
    if not is_right or (whole and type(value) is not int):
        upper = "up" if math.isinf(high) else f"to {high:.12g}"
        kind = "a whole number" if whole else "a number"
        raise ConceptError(f"expected {name} to be {kind} from {low:g} {upper}, got {shown(value)}")


def as_concepts(given: Mapping[str, str] | Sequence[Concept], vectors: int = 1) -> tuple[Concept, ...]:
    """Concepts, of {token: word} or as they are.

    Raises:
        ConceptError: there are none, or two of one token.
    """
    if isinstance(given, Mapping):
        given = [Concept(token, word, vectors) for token, word in given.items()]
    check_distinct([concept.token for concept in given])
    return tuple(given)


def check_distinct(names: Sequence[str]) -> None:
    """Make sure that concepts have a name each.

    Raises:
        ConceptError: there are none, one is empty, or two have the same.
    """
    if not names:
        raise ConceptError("expected at least one concept, got none")
    if not all(name.strip() for name in names):
        raise ConceptError("expected a word for each concept, got an empty one")
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise ConceptError(f"expected each concept once, got {twice} twice")


@dataclass(frozen=True)
class ConceptPrompt:
    """A prompt that names concepts.

    Attributes:
        names: of the concepts: tokens or words.
        parts: of the text; `slots` says which of them are names.
        slots: for each name the number of its part.
    """

    names: tuple[str, ...]
    parts: tuple[str, ...]
    slots: tuple[int, ...]

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.parts)


def joint_prompt(template: str | None, names: Sequence[str], prefix: str = PREFIX) -> ConceptPrompt:
    """The prompt that names all concepts.

    Args:
        template: with a slot for each concept, "{0} beside {1}"; None is "a photo of {0} and {1}".
        names: what fills the slots: tokens or words.
        prefix: of the prompt where there is no template.

    Raises:
        ConceptError: the template's slots are not those of the concepts.
    """
    if template is None:
        return subset_prompt(names, prefix)
    try:
        parsed = [(text, slot) for text, slot, _, _ in Formatter().parse(template)]
    except ValueError as error:
        raise ConceptError(
            f"expected a prompt such as 'a photo of {{0}}', got {template!r}: {error}"
        ) from None
    numbers = [slot for _, slot in parsed if slot is not None]
    if sorted(numbers) != sorted(str(n) for n in range(len(names))):
        wanted = ", ".join(f"{{{n}}}" for n in range(len(names)))
        raise ConceptError(f"expected a prompt with each of {wanted} once, got {template!r}")
    parts, slots = [], [0] * len(names)
    for text, slot in parsed:
        parts.append(text)
        if slot is not None:
            slots[int(slot)] = len(parts)
            parts.append(names[int(slot)])
    return ConceptPrompt(tuple(names), tuple(parts), tuple(slots))


def subset_prompt(names: Sequence[str], prefix: str = PREFIX) -> ConceptPrompt:
    """The prompt that names some concepts, as published: "a photo of <new1> and <new2>"."""
    parts = [part for name in names for part in (" and ", name)]
    return ConceptPrompt(tuple(names), (prefix, *parts[1:]), tuple(range(1, 2 * len(names), 2)))
