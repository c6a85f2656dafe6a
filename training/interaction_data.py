"""Examples of one's own pictures for the adapter: latents and states from caches, and what is left out."""

import hashlib
import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from interactdiff.data.cache_files import write_cache
from interactdiff.data.examples import BadPictures, Examples, Further, Latents, collate, make_order
from interactdiff.data.framing import Framing
from interactdiff.data.latents import LatentCache
from interactdiff.data.mixture import MixedLatents, Mixture
from interactdiff.data.order import Draw, GlobalBatches, mixed
from interactdiff.data.reading import Records
from interactdiff.data.texts import TextCache, captions_of
from interactdiff.errors import DataError, SceneError
from interactdiff.scene import Box, Entity, Interaction
from interactdiff.training.interaction_config import DropsConfig
from interactdiff.training.objectives import Objective
from interactdiff.training.pictures_config import PicturesConfig

Item = Interaction | Entity


def without_actions(prompt: str, items: Sequence[Item]) -> str:
    """A caption that does not say what happens: "a person is riding a bike" is "a person and a bike".

    Actions that it does not name in the interactions' words stay.
    """
    for item in items:
        if isinstance(item, Interaction) and item.action is not None:
            words = r"\s+".join(map(re.escape, item.action.split()))
            prompt = re.sub(rf"(?<!\w)((is|are)\s+)?{words}(?!\w)", "and", prompt, flags=re.IGNORECASE)
    return prompt


def items_of(items: Sequence[Any], slots: int) -> list[Item]:
    """The interactions and entities of a picture; of too many the largest by the sum of their boxes."""
    kept = [item for item in items if isinstance(item, Interaction | Entity)]
    largest = sorted(range(len(kept)), key=lambda n: -sum(map(_area, _boxes(kept[n]))))[:slots]
    return [kept[n] for n in sorted(largest)]


def _boxes(item: Any) -> list[Box]:
    if isinstance(item, Interaction):
        return [item.subject_box, item.object_box]
    return [] if item.box is None else [item.box]  # a subject may have none


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


class Varied(Protocol):
    """Draws what an example is trained without."""

    def __call__(self, prompt: str, items: Sequence[Any], rng: random.Random) -> tuple[str, Sequence[Any]]:
        """A caption and items as training gets them."""
        ...

    def more(self, items: Sequence[Any], rng: random.Random) -> dict[str, Tensor]:
        """Further tensors of an example, by name, of the items that it kept."""
        ...


@dataclass(frozen=True)
class Variation:
    """Draws what an example is trained without.

    Attributes:
        drops: the probabilities.
        slots: of the adapter.
    """

    drops: DropsConfig
    slots: int

    def __call__(self, prompt: str, items: Sequence[Any], rng: random.Random) -> tuple[str, list[Item]]:
        """A caption and items as training gets them."""
        drops, kept = self.drops, items_of(items, self.slots)
        if rng.random() < drops.all:
            return "", []
        share = rng.random()
        if not (share < drops.keep_caption or (drops.captions_without_items and not kept)):
            stripped = share < drops.keep_caption + drops.strip_caption
            prompt = without_actions(prompt, kept) if stripped else ""
        left = [item for item in kept if rng.random() >= drops.item] or kept[:1]
        return prompt, [self._varied(item, rng) for item in left]

    def more(self, items: Sequence[Item], rng: random.Random) -> dict[str, Tensor]:
        """The slots that items take, "slots" [N]."""
        slots = [*range(self.slots)]
        if self.drops.slots:
            rng.shuffle(slots)
        return {"slots": torch.tensor(slots)}

    def _varied(self, item: Item, rng: random.Random) -> Item:
        if isinstance(item, Entity):
            return replace(item, box=self._moved(item.box, rng))
        boxes = {name: self._moved(getattr(item, name), rng) for name in ("subject_box", "object_box")}
        return replace(item, action=None if rng.random() < self.drops.action else item.action, **boxes)

    def _moved(self, box: Box, rng: random.Random) -> Box:
        most = min(self.drops.jitter, 0.49)  # edges keep their order
        across, down = most * (box[2] - box[0]), most * (box[3] - box[1])
        moved = (edge + rng.uniform(-1, 1) * by for edge, by in zip(box, (across, down) * 2, strict=True))
        x0, y0, x1, y1 = (min(1.0, max(0.0, edge)) for edge in moved)
        return x0, y0, x1, y1


def varied_captions(records: Records | Mixture, framing: Framing, flip: bool, slots: int) -> Iterator[str]:
    """Every caption that `Variation` may make of records: with and without actions, and none."""
    yield ""
    for caption, items in captions_of(records, framing, flip):
        yield caption
        yield without_actions(caption, items_of(items, slots))


class VariedExamples(Dataset):
    """Examples with their noise, times and states; what is random is a function of (seed, position).

    Args:
        examples: with latents.
        variation: what is left out.
        texts: states of every caption.
        objective: draws noise and times.
    """

    def __init__(self, examples: Examples, variation: Varied, texts: TextCache, objective: Objective):
        self.examples, self.variation = examples, variation
        self.texts, self.objective = texts, objective

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        """The example of a draw: as `Examples` has it, with `states`, `noise`, `times` and what
        the variation adds."""
        example = self.examples[draw]
        seed = mixed(self.examples.order.seed, draw.position, 5)
        rng = random.Random(seed)
        prompt, items = self.variation(example["prompt"], example["items"], rng)
        more = self.variation.more(items, rng)
        latents = example["latents"].float()
        generator = torch.Generator().manual_seed(seed)
        return {
            **example,
            **self.objective.draw(latents, generator),
            "latents": latents,
            "prompt": prompt,
            "items": items,
            **more,
            "states": self.texts.get(prompt),
        }

    def __getitems__(self, draws: Sequence[Draw]) -> list[dict[str, Any]]:
        """The examples of several draws, as a loader reads them.

        Where one cannot be made, the only example has an `error`, which is its sentence: torch would add the
        worker's traceback to an error.
        """
        try:
            return [self[draw] for draw in draws]
        except (DataError, SceneError, OSError) as error:
            return [{"error": str(error)}]


def collate_varied(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of examples: tensors stacked, those of `states` by name; only `error` where there is one."""
    if "error" in examples[0]:
        return examples[0]
    batch = collate(examples)
    for name, value in batch.items():
        if isinstance(value, list) and torch.is_tensor(value[0]):
            batch[name] = torch.stack(value)
    states = batch["states"]
    batch["states"] = {name: torch.stack([one[name] for one in states]) for name in states[0]}
    return batch


def open_pictures(config: PicturesConfig) -> Mixture:
    """The pictures of a recipe; their rows are checked.

    Raises:
        DataError: there are none, or a row has a mistake.
    """
    cache = Path(config.cache)
    parts = [Records.open(one.path, one.split, one.boxes, one.columns or None, cache) for one in config.data]
    return Mixture(parts, [one.weight for one in config.data])


class PictureData:
    """The pictures of a recipe: framed, cached, and read in the order of training.

    Args:
        config: the recipe's.
        records: its pictures.
        multiple: that sides are multiples of, if the configuration does not say.
    """

    def __init__(self, config: PicturesConfig, records: Mixture, multiple: int):
        self.config, self.cache = config, Path(config.cache)
        self.framing = Framing(
            config.resolution,
            config.multiple or multiple,
            config.square,
            config.min_box,
            config.min_visible,
        )
        self.records, self.parts = records, records.parts
        self.order = make_order(self.records, self.framing, config.global_batch, config.seed)
        self.bad = BadPictures(len(self.records))

    def latent_caches(self, key: str, control: bool = False) -> list[LatentCache]:
        """A cache for each data set, of its pictures or control images; `key` says what encodes."""
        folder = self.cache / "latents"
        flip = self.config.flip > 0
        # files are named by what is in them, so the data sets share a folder
        return [LatentCache(folder, part, self.framing, key, flip, control=control) for part in self.parts]

    def unreadable(self, latents: Sequence[LatentCache]) -> list[str]:
        """The pictures that could not be read when latents were cached, by any process, and why.

        Args:
            latents: built, for each data set.

        Raises:
            DataError: they are too many.
        """
        return self.bad.add(
            f"{cache.records[index].name}: {reason}"
            for cache in latents
            for index, reason in cache.bad().items()
        )

    def batches(
        self,
        step: int,
        rank: int,
        processes: int,
        latents: Sequence[Latents],
        variation: Varied,
        texts: TextCache,
        objective: Objective,
        further: Further | None = None,
    ) -> Iterator[dict[str, Any]]:
        """This process's batches from a step on, without an end.

        Raises:
            DataError: an example cannot be made.
        """
        config = self.config
        mixed_latents = MixedLatents(self.records, latents)
        examples = Examples(self.records, self.framing, self.order, config.flip, mixed_latents, further)
        loader = DataLoader(
            VariedExamples(examples, variation, texts, objective),
            batch_sampler=GlobalBatches(self.order, step, rank, processes, config.accumulate),  # type: ignore[arg-type]
            num_workers=config.workers,
            collate_fn=collate_varied,
        )
        for batch in loader:
            if "error" in batch:
                raise DataError(batch["error"])
            for name in self.bad.count(batch):
                print(f"interactdiff: {name}: replaced by another picture", file=sys.stderr)
            yield batch


class WordsDone:
    """Whether a data set's captions and phrases are all in the caches: then its rows need not be read again.

    Args:
        data: the pictures.
        how: what decides, beside the rows, which texts may be drawn.
        caches: by name.
    """

    def __init__(self, data: PictureData, how: str, caches: Mapping[str, TextCache]):
        self.caches = caches
        keys = {name: cache.key for name, cache in caches.items()}
        made_of = f"{[part.files_digest for part in data.parts]} {how} {keys}"
        self.file = data.cache / f"words-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.json"

    def recalled(self) -> bool:
        """Whether that was noted, and the caches have no fewer texts since."""
        try:
            noted = json.loads(self.file.read_text(encoding="utf-8"))
            return all(len(cache.files) >= noted[name] for name, cache in self.caches.items())
        except (OSError, ValueError, TypeError, KeyError):
            return False

    def note(self) -> None:
        """Note it, once all processes have built the caches."""
        counts = {name: len(cache.files) for name, cache in self.caches.items()}
        write_cache(self.file, lambda aside: aside.write_text(json.dumps(counts), encoding="utf-8"))


class CachedFeatures:
    """Features of phrases, read from a cache once each.

    Args:
        cache: of "feature" tensors.
        device: where they go.
    """

    def __init__(self, cache: TextCache, device: torch.device):
        self.cache, self.device = cache, device
        self.known: dict[str, Tensor] = {}

    def __call__(self, phrases: Sequence[str]) -> dict[str, Tensor]:
        """Phrases in, a [feature_dim] feature for each out."""
        for phrase in phrases:
            if phrase not in self.known:
                self.known[phrase] = self.cache.get(phrase)["feature"].to(self.device)
        return {phrase: self.known[phrase] for phrase in phrases}


def feature_encoder(encode: Callable[[Sequence[str]], Mapping[str, Tensor]]) -> Any:
    """A phrase encoder as a text cache calls it."""
    return lambda phrases: {phrase: {"feature": made} for phrase, made in encode(phrases).items()}


def inside_boxes(scenes: Sequence[Sequence[Any]], height: int, width: int) -> Tensor:
    """[B, 1, height, width]: 1 where a latent's centre is in a box of an item of any method, else 0."""
    inside = torch.zeros(len(scenes), 1, height, width)
    down, across = (torch.arange(n) / n + 0.5 / n for n in (height, width))
    for row, scene in enumerate(scenes):
        for x0, y0, x1, y1 in (box for item in scene for box in _boxes(item)):
            rows, columns = (down >= y0) & (down < y1), (across >= x0) & (across < x1)
            inside[row, 0] = torch.maximum(inside[row, 0], (rows[:, None] & columns).float())
    return inside
