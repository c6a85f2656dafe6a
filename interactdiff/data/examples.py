"""Examples for training: pictures at their bucket's size, boxes that follow, and captions.

A recipe's loop, on any number of processes:

    records = Records.open("people/", cache=cache)
    framing = Framing(resolution=512, multiple=64)
    order = make_order(records, framing, batch_size=per_device * world_size * accumulate, seed=0)
    examples = Examples(records, framing, order)
    batches = GlobalBatches(order, step, rank, world_size, accumulate)
    bad = BadPictures(len(records))
    for batch in DataLoader(examples, batch_sampler=batches, num_workers=4, collate_fn=collate):
        bad.count(batch)
        ...  # batch["pixels"] [B, 3, H, W] or batch["latents"], batch["prompts"], batch["items"]
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from interactdiff.data.framing import Framing, Placement
from interactdiff.data.order import Draw, Order
from interactdiff.data.reading import Records
from interactdiff.data.records import ImageRecord
from interactdiff.errors import DataError

if TYPE_CHECKING:
    from interactdiff.data.mixture import Mixture

MAX_BAD_SHARE = 0.001
_ATTEMPTS = 8  # of finding another picture of the bucket


class Latents(Protocol):
    """Latents that were computed before (`latents.LatentCache`)."""

    def get(self, index: int, flipped: bool) -> Tensor:
        """The latents [C, h, w] of a record.

        Raises:
            DataError: there are none, since the picture could not be read.
        """
        ...


def make_order(records: "Records | Mixture", framing: Framing, batch_size: int, seed: int) -> Order:
    """The order of a data set, by its buckets, weights and shards."""
    sides = zip(records.widths.tolist(), records.heights.tolist(), strict=True)
    buckets = np.fromiter((framing.bucket(width, height) for width, height in sides), np.uint16, len(records))
    shards = records.shards
    return Order(buckets, batch_size, seed, records.weights, shards if shards.any() else None)


class Further(Protocol):
    """Makes further tensors of an example, from its record."""

    def __call__(
        self, example: Mapping[str, Any], record: ImageRecord, placement: Placement, rng: random.Random
    ) -> dict[str, Tensor]:
        """By name; `example` is what is made so far, and `rng` the example's own.

        Raises:
            DataError: a picture could not be read.
        """
        ...


def pixels_of(record: ImageRecord, placement: Placement, control: bool = False) -> Tensor:
    """The picture, or its control image, as training sees it, [3, H, W] float32 in [-1, 1].

    Raises:
        DataError: it is no whole picture.
    """
    made = np.asarray(placement.apply(record.open_control() if control else record.open()))
    return torch.from_numpy(made.copy()).permute(2, 0, 1).float() / 127.5 - 1


class Examples(Dataset):
    """Makes an example of a `Draw`; what is random about it is a function of (seed, position).

    Args:
        records: the data.
        framing: the sizes.
        order: which seed and which replacements.
        flip: probability that a picture is mirrored.
        latents: in place of pixels.
        further: makes more of an example.
    """

    def __init__(
        self,
        records: "Records | Mixture",
        framing: Framing,
        order: Order,
        flip: float = 0.5,
        latents: Latents | None = None,
        further: Further | None = None,
    ):
        self.records, self.framing, self.order = records, framing, order
        self.flip, self.latents, self.further = flip, latents, further

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        """The example of a draw.

        Returns:
            `pixels` [3, H, W] float32 in [-1, 1], or `latents` [C, h, w]; `prompt`; `items`, boxes in shares
            of what is seen; `original_size`, `crop` (top, left) and `target_size`, which SDXL's time ids are
            made of, height before width in pixels; `name`, `index`, `epoch`, `position`, `flipped`; `bad`,
            names of pictures that could not be read, in whose place this one is.

        Raises:
            DataError: nor could several others of the bucket be read.
        """
        bad: list[str] = []
        tried: set[int] = set()
        for attempt in range(-1, _ATTEMPTS):
            index = draw.index if attempt < 0 else self.order.replacement(draw, attempt)
            if index in tried:
                continue
            tried.add(index)
            try:
                return {**self._example(index, draw), "bad": bad}
            except DataError as error:
                bad.append(f"{self.records[index].name}: {error}")
        raise DataError(f"expected pictures that can be read, got {len(bad)} that cannot: {'; '.join(bad)}")

    def _example(self, index: int, draw: Draw) -> dict[str, Any]:
        rng = random.Random(f"{self.order.seed} {draw.position}")
        record = self.records[index]
        flipped = rng.random() < self.flip and record.may_flip
        prompt = rng.choice(record.prompts)
        sides = int(self.records.widths[index]), int(self.records.heights[index])
        placement = self.framing.place(*sides, record.items, flipped)
        items = self.framing.items(placement, record.items)
        if self.latents is None:
            image = {"pixels": pixels_of(record, placement)}
        else:
            image = {"latents": self.latents.get(index, flipped)}
        height, width = placement.size
        scale = height / (placement.window[3] - placement.window[1])
        left = placement.window[0] if not flipped else sides[0] - placement.window[2]
        example = {
            **image,
            "prompt": placement.prompt(prompt, record.items, items),
            "items": items,
            "original_size": (sides[1], sides[0]),
            "crop": (round(placement.window[1] * scale), round(left * scale)),
            "target_size": (height, width),
            "name": record.name,
            "index": index,
            "epoch": draw.epoch,
            "position": draw.position,
            "flipped": flipped,
        }
        return example | (self.further(example, record, placement, rng) if self.further else {})


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of examples of one bucket: tensors stacked, everything else in lists; `prompt` is `prompts`."""
    batch: dict[str, Any] = {name: [one[name] for one in examples] for name in examples[0]}
    for name in ("pixels", "latents"):
        if name in batch:
            batch[name] = torch.stack(batch[name])
    batch["prompts"] = batch.pop("prompt")
    return batch


class BadPictures:
    """Counts pictures that could not be read, in the process that trains.

    Args:
        count: pictures of the data set.
        max_share: of them that may be bad.
    """

    def __init__(self, count: int, max_share: float = MAX_BAD_SHARE):
        self.total, self.max_share = count, max_share
        self.names: dict[str, int] = {}

    def count(self, batch: dict[str, Any]) -> list[str]:
        """Take the bad pictures of a batch, see `add`."""
        return self.add(name for names in batch["bad"] for name in names)

    def add(self, names: Iterable[str]) -> list[str]:
        """Take pictures that could not be read.

        Args:
            names: of each its name and the reason, as examples have them in `bad`.

        Returns:
            Those that were not known before.

        Raises:
            DataError: too many pictures of the data set are bad; names the first of them.
        """
        new = []
        for name in names:
            new += [] if name in self.names else [name]
            self.names[name] = self.names.get(name, 0) + 1
        if len(self.names) > self.max_share * self.total:
            listed = "; ".join(list(self.names)[:20])
            raise DataError(
                f"expected at most {self.max_share:.1%} of {self.total} pictures that cannot be read, "
                f"got {len(self.names)}: {listed}"
            )
        return new
