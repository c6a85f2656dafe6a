"""Learns concepts from a photo on the worker's thread, and keeps what was learned while the server runs."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from PIL import Image

from interactdiff.app.document import Document
from interactdiff.app.worker import PREVIEW_EVERY, GenerationRequest, Stopped, Worker
from interactdiff.concept.words import Concept, ConceptError, check_distinct
from interactdiff.scene import NULL_ACTION
from interactdiff.scene_checks import Box, SceneError, parse_box

METHOD = "concept"
MOST_CONCEPTS = 4  # of one photo
KEPT_IN = "concepts"  # folder of what was learned, within the worker's


@dataclass(frozen=True)
class LearnRequest:
    """What a page asks for.

    Attributes:
        photo: in RGB.
        concepts: up to `MOST_CONCEPTS`.
        boxes: by their tokens, outside which they are not.
        steps: of training; 0 finds the masks alone.
        model: a name that `Limits` lets through.
    """

    photo: Image.Image
    concepts: tuple[Concept, ...]
    boxes: Mapping[str, Box] = field(default_factory=dict)
    steps: int = 0
    model: str = "stickworld"


@dataclass(frozen=True)
class LearnedConcept:
    """What was learned from one photo.

    Attributes:
        name: of its adapter, which the server has while it runs.
        tokens: that prompts call it by.
        model: that it was learned on.
        archive: of its adapter, which a page offers for download.
    """

    name: str
    tokens: tuple[str, ...]
    model: str
    archive: Path

    @property
    def label(self) -> str:
        """As people read it."""
        return f"learned: {' and '.join(self.tokens)}"


@dataclass(frozen=True)
class LearnProgress:
    """How far learning is.

    Attributes:
        message: what is being done.
        fraction: done of it all, 0 to 1.
        seconds_left: as far as can be estimated.
        masks: the photo and each concept in its mask, once they are found.
        samples: the photo, each concept alone and all together, drawn at the end.
        learned: once it is kept.
        is_result: whether it says what came of the request; one that is stopped early has no such report.
    """

    message: str
    fraction: float
    seconds_left: float | None = None
    masks: Image.Image | None = None
    samples: Image.Image | None = None
    learned: LearnedConcept | None = None
    is_result: bool = False


def parsed_concepts(text: str) -> tuple[tuple[Concept, ...], dict[str, Box]]:
    """Concepts and boxes of lines of the form `TOKEN=WORD` or `TOKEN=WORD|x0,y0,x1,y1`.

    Raises:
        ConceptError: there are none, too many, two of one token, or a line is of another form.
        SceneError: a box is none.
    """
    concepts, boxes = [], {}
    for line in filter(str.strip, text.splitlines()):
        named, bar, box = line.partition("|")
        concept = Concept.parse(named)
        concepts.append(concept)
        if bar:
            boxes[concept.token] = parse_box(f"the box of {concept.token}", box.strip().removeprefix("box="))
    check_distinct([concept.token for concept in concepts])
    if len(concepts) > MOST_CONCEPTS:
        raise ConceptError(f"expected at most {MOST_CONCEPTS} concepts of a photo, got {len(concepts)}")
    return tuple(concepts), boxes


def taken_boxes(document: Document, text: str) -> tuple[Document, str]:
    """Boxes of the canvas as lines of concepts; those of interactions stay where they are.

    A box is named as a line is, `<hero>=person`, or by its word alone, from which a token is made.

    Args:
        document: the canvas.
        text: the lines so far; a concept that has a line gets the box.

    Raises:
        ConceptError: a box has no name, or there is none.
    """
    linked = {end for link in document.links for end in (link.subject, link.object)}
    taken = [box for box in document.boxes if box.id not in linked]
    if not taken:
        raise ConceptError("expected boxes on the canvas, got none: draw one around each concept and name it")
    lines = [line for line in text.splitlines() if line.strip()]
    for box in taken:
        name = box.phrase.strip()
        if name in ("", NULL_ACTION):
            raise ConceptError("expected a name for every box, got one without: select it and type")
        own = [line.partition("|")[0].strip() for line in lines]
        without = [named for named, line in zip(own, lines, strict=True) if "|" not in line]
        found = next((one for one in without if name in (one, *one.split("=", 1))), None)
        where = ",".join(f"{side:g}" for side in box.box)
        if found is not None:
            lines[own.index(found)] = f"{found}|{where}"
        else:
            lines.append(f"{name if '=' in name else _with_token(name, own)}|{where}")
    left = tuple(box for box in document.boxes if box.id in linked)
    return document.changed(boxes=left, picture=None), "\n".join(lines)


def _with_token(word: str, lines: Sequence[str]) -> str:
    """A line for a word, with a token that no other line has."""
    known = {line.partition("=")[0] for line in lines}
    plain = "".join(letter if letter.isalnum() else "-" for letter in word)
    tokens = [f"<{plain}>", *(f"<{plain}-{n}>" for n in range(2, len(lines) + 3))]
    return f"{next(token for token in tokens if token not in known)}={word}"


def with_learned(request: GenerationRequest, learned: Sequence[LearnedConcept]) -> GenerationRequest:
    """A request with the learned concepts whose tokens are in its prompt or phrases, the latest first.

    Raises:
        SceneError: a token was learned on other models alone, where no concept is chosen that may have it.
    """
    scene = request.scene
    phrases = (text for item in scene.items for text in vars(item).values() if isinstance(text, str))
    texts = " ".join((scene.prompt, scene.negative_prompt, *phrases))
    adapters, methods = dict(request.adapters), dict(request.methods)
    names = {one.name for one in learned}
    is_chosen = any(name.split(":")[0] == METHOD and at not in names for name, at in adapters.items())
    known = {token for one in learned if one.name in adapters.values() for token in one.tokens}
    for one in reversed(learned):
        is_named = any(token in texts for token in one.tokens)
        if not is_named or one.model != request.model or known.intersection(one.tokens):
            continue
        name = METHOD if METHOD not in adapters else f"{METHOD}:{len(adapters)}"
        adapters[name] = one.name
        methods.setdefault(METHOD, {})
        known.update(one.tokens)
    for one in reversed(learned):
        token = next((token for token in one.tokens if token in texts and token not in known), None)
        if token is not None and one.model != request.model and not is_chosen:
            raise SceneError(
                f"prompt: expected the model {one.model}, on which {token} was learned, got {request.model}: "
                f"choose that model, or learn {token} on this one"
            )
    return replace(request, adapters=adapters, methods=methods)


def learn(worker: Worker, request: LearnRequest, stop: threading.Event) -> Iterator[LearnProgress]:
    """Find a photo's concepts and learn them, and report progress.

    Args:
        worker: on whose thread it is done.
        request: what to learn.
        stop: ends it within a step; what is learned by then is kept.

    Raises:
        InteractdiffError: in one sentence: nothing can be learned of this.
    """
    worker.limits.check_learning(request.steps)
    return worker.run(lambda report: _learn(worker, request, stop, report), stop)


def _learn(
    worker: Worker, request: LearnRequest, stop: threading.Event, report: Callable[[LearnProgress], None]
) -> None:
    from interactdiff.concept.finding import default_size
    from interactdiff.concept.learner import Learner
    from interactdiff.concept.options import LearnOptions

    report(LearnProgress("Loading the model", 0.0))
    pipeline = worker.without_adapters(request.model)
    options = LearnOptions(steps=max(1, request.steps), size=default_size(pipeline), checkpoint_every=0)
    report(LearnProgress("Looking for the concepts in the photo", 0.0))

    def check_stop(*_: Any) -> None:
        if worker.is_ended(stop):
            raise Stopped

    with Learner(pipeline, request.photo, request.concepts, options) as learner:
        _find(learner, request, report)
        if not request.steps:
            return
        began, last = time.monotonic(), 0.0

        def on_step(step: Any) -> None:
            nonlocal last
            now, fraction = time.monotonic(), step.step / options.steps
            if now - last >= PREVIEW_EVERY or step.step == options.steps:
                last, left = now, (now - began) * (1 - fraction) / fraction
                message = f"Step {step.step} of {options.steps}, loss {step.loss:.3f}"
                report(LearnProgress(message, fraction, left))
            check_stop()

        samples = None
        try:
            learner.train(on_step)
            report(LearnProgress("Drawing samples", 1.0))
            samples = learner.samples(check_stop)
        except Stopped:
            pass
        if not learner.step or worker.is_ended():
            return
        kept = _kept(worker, learner.adapter.eval(), request)
        message = f"Learned, after step {learner.step}: write {' and '.join(kept.tokens)} in the prompt."
        if learner.step < options.steps:
            message = f"Stopped after step {learner.step} of {options.steps}: what is learned so far is kept."
        report(LearnProgress(message, 1.0, samples=samples, learned=kept, is_result=True))


def _find(learner: Any, request: LearnRequest, report: Callable[[LearnProgress], None]) -> None:
    """Find the masks and show them, also if a concept is not found.

    One that attention does not find within its box gets the whole box, unless that is too small itself.
    """
    from interactdiff.concept.masks import box_mask
    from interactdiff.concept.pictures import masks_picture

    boxes, given = request.boxes, dict[str, Any]()
    least = learner.finder.settings.minimum_area
    while True:
        try:
            learner.find(boxes, given)
            missing = None
        except ConceptError:
            areas = learner.masks.areas if hasattr(learner, "masks") else {}
            missing = next((name for name, area in areas.items() if area < least), None)
            if missing is None:
                raise
        if missing is None or missing not in boxes or missing in given:
            break
        x0, y0, x1, y1 = boxes[missing]
        if (x1 - x0) * (y1 - y0) < least:
            break
        given[missing] = box_mask(boxes[missing], (request.photo.height, request.photo.width))
    shares = learner.masks.areas
    found = ", ".join(f"{name} {100 * area:.0f} %" for name, area in shares.items())
    whole = f"; the whole box of {' and '.join(given)}" if given else ""
    picture = masks_picture(learner.photo, learner.masks)
    message = f"Masks, in shares of the photo: {found}{whole}"
    report(LearnProgress(message, 0.0, masks=picture, is_result=not request.steps))
    if missing is not None:
        tip = "try another box" if missing in boxes else "draw a box around it, or try another word"
        raise ConceptError(
            f"expected {missing} in the photo, got {100 * shares[missing]:.1f} % of its pixels: {tip}"
        )


def _kept(worker: Worker, adapter: Any, request: LearnRequest) -> LearnedConcept:
    """Store what was learned, as a folder and, for downloads, as an archive of it."""
    plain = "-".join(concept.token.strip("<>") for concept in request.concepts)[:60]
    folder = worker.folder / KEPT_IN / f"concept-{plain}-{uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    adapter.save_pretrained(folder)
    archive = Path(shutil.make_archive(str(folder), "zip", folder))
    tokens = tuple(concept.token for concept in request.concepts)
    return LearnedConcept(worker.keep_adapter(folder), tokens, request.model, archive)
