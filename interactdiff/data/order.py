"""The order of training: which examples a step gets, as a pure function of (seed, epoch, global position).

No list is shuffled and no state is kept, so the order is the same at any number of processes and workers, and
a run resumes at any step by its number alone.

Every bucket is an endless sequence: in each epoch its examples once, permuted anew. Its batches are cut from
that sequence, so the last one of an epoch takes what it lacks from the next epoch. How an epoch's batches of
different buckets follow each other is drawn anew as well.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from interactdiff.data.kept import Kept
from interactdiff.errors import DataError

_MASK = 2**64 - 1
_ROUNDS = 4


@dataclass(frozen=True)
class Draw:
    """One example at one place of the training order.

    Attributes:
        index: number of the record.
        epoch: how often its bucket has been through before.
        position: global, step times the global batch size plus the place in it; what is random about the
            example is drawn from (seed, position).
        bucket: number of its bucket.
    """

    index: int
    epoch: int
    position: int
    bucket: int


def mixed(*numbers: int) -> int:
    """64 well mixed bits of whole numbers (splitmix64, Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state ^ (number & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def permuted(position: int, count: int, key: int) -> int:
    """Where a keyed permutation of 0 to `count` - 1 takes a position: a Feistel network, walked in a cycle.

    Black and Rogaway, "Ciphers with arbitrary finite domains" (2002), section 5. Takes no memory.

    Args:
        position: from 0 to `count` - 1.
        count: from 1.
        key: which permutation.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (mixed(key, turn, right) & mask)
        position = left << half | right
        if position < count:
            return position


def _mixed_range(key: int, count: int) -> np.ndarray:
    """`mixed(key, n)` of each n below `count`, [count] uint64."""
    state = np.uint64(mixed(key)) ^ np.arange(count, dtype=np.uint64)
    state += np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return state ^ state >> np.uint64(31)


class Order:
    """The endless order of all examples.

    In memory: 4 bytes for each time that an example comes in an epoch, and 6 for each step of one.

    Args:
        buckets: [N] the bucket of each record.
        batch_size: G, of all processes and accumulated micro-batches together.
        seed: of the order.
        weights: [N] how often each record comes in an epoch; once each if not given.
        shards: [N] the shard of each record, ascending. Shards are permuted as wholes, and their examples
            within windows of some of them, so that few files are read at a time.
        window: W, shards in a window.

    Raises:
        DataError: there is no record, or no batch.
    """

    def __init__(
        self,
        buckets: Sequence[int] | np.ndarray,
        batch_size: int,
        seed: int,
        weights: Sequence[int] | np.ndarray | None = None,
        shards: Sequence[int] | np.ndarray | None = None,
        window: int = 8,
    ):
        self.batch_size, self.seed, self.window = batch_size, seed, window
        of = np.asarray(buckets)
        if not len(of) or batch_size < 1:
            raise DataError(
                f"expected examples and a batch, got {len(of)} examples in batches of {batch_size}"
            )
        repeats = np.ones(len(of), np.int64) if weights is None else np.asarray(weights, np.int64)
        self.buckets = [int(bucket) for bucket in np.unique(of)]
        self.members: list[np.ndarray] = []
        self._starts: list[
            np.ndarray
        ] = []  # of each bucket: where its shards start among its members, and the end
        for bucket in self.buckets:
            here = np.flatnonzero(of == bucket).astype(np.uint32)
            here = np.repeat(here, repeats[here])
            self.members.append(here)
            if shards is None:
                self._starts.append(np.array([0, len(here)]))
            else:
                firsts = np.unique(np.asarray(shards)[here], return_index=True)[1]
                self._starts.append(np.append(firsts, len(here)))
        self._plan = Kept(self._planned, 2)
        self._shard_order = Kept(self._ordered_shards, 4 * len(self.buckets))

    def steps_before(self, epoch: int) -> int:
        """How many steps begin before an epoch does."""
        return sum(self._batches_before(place, epoch) for place in range(len(self.buckets)))

    def epoch_of(self, step: int) -> int:
        """The epoch that a step begins in."""
        examples = sum(map(len, self.members))
        epoch = max(0, (step - len(self.buckets)) * self.batch_size // examples)  # not after it
        while self.steps_before(epoch + 1) <= step:
            epoch += 1
        return epoch

    def batch(self, step: int) -> list[Draw]:
        """The G examples of a step, all of one bucket."""
        epoch = self.epoch_of(step)
        places, numbers = self._plan(epoch)
        slot = step - self.steps_before(epoch)
        place, number = int(places[slot]), int(numbers[slot])
        size, bucket = len(self.members[place]), self.buckets[place]
        start = (self._batches_before(place, epoch) + number) * self.batch_size
        draws = []
        for n in range(self.batch_size):
            of_epoch, position = divmod(start + n, size)
            index = self._index(place, of_epoch, position)
            draws.append(Draw(index, of_epoch, step * self.batch_size + n, bucket))
        return draws

    def replacement(self, draw: Draw, attempt: int) -> int:
        """Another record of the same bucket, chosen by the position, for one that cannot be read.

        Args:
            draw: of the record that cannot be read.
            attempt: from 0; different attempts give different places in the bucket.
        """
        members = self.members[self.buckets.index(draw.bucket)]
        return int(
            members[permuted(attempt % len(members), len(members), mixed(self.seed, draw.position, 2))]
        )

    def _batches_before(self, place: int, epoch: int) -> int:
        """How many batches of a bucket begin before an epoch does."""
        return -(-epoch * len(self.members[place]) // self.batch_size)

    def _index(self, place: int, epoch: int, position: int) -> int:
        """The record at a place of a bucket's epoch."""
        shards, ends = self._shard_order(place, epoch)
        window = int(np.searchsorted(ends[self.window - 1 :: self.window], position, side="right"))
        first = window * self.window
        last = min(first + self.window, len(shards)) - 1
        start = int(ends[first - 1]) if first else 0
        count = int(ends[last]) - start
        within = (
            permuted(position - start, count, mixed(self.seed, epoch, self.buckets[place], first, 3)) + start
        )
        slot = int(np.searchsorted(ends, within, side="right"))
        shard = int(shards[slot])
        return int(
            self.members[place][self._starts[place][shard] + within - (int(ends[slot - 1]) if slot else 0)]
        )

    def _planned(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of an epoch's batches: of each step the bucket's place, and the batch's number in it.

        Batches of one bucket stay in their order, so that shards are read window by window.
        """
        before, after = (
            [self._batches_before(p, e) for p in range(len(self.buckets))] for e in (epoch, epoch + 1)
        )
        counts = np.subtract(after, before)
        places = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)
        places = places[np.argsort(_mixed_range(mixed(self.seed, epoch, 1), len(places)), kind="stable")]
        numbers = np.empty(len(places), np.uint32)
        for place, count in enumerate(counts):
            numbers[places == place] = np.arange(count)
        return places, numbers

    def _ordered_shards(self, place: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """A bucket's shards in the order of an epoch, and where each of them ends."""
        starts = self._starts[place]
        count = len(starts) - 1
        key = mixed(self.seed, epoch, self.buckets[place], 4)
        shards = np.array([permuted(n, count, key) for n in range(count)])
        return shards, np.cumsum(np.diff(starts)[shards])


class GlobalBatches:
    """A batch sampler: this process's micro-batches, from a step on, without an end.

    Goes into `torch.utils.data.DataLoader(examples, batch_sampler=...)`, which keeps its order at any number
    of workers. It knows the processes: accelerate's `prepare` must not get the loader, or it would divide it
    again.

    Args:
        order: of all examples.
        step: the first one; where a run resumes.
        rank: of this process.
        world_size: processes in all.
        accumulate: micro-batches of a step.

    Raises:
        DataError: the global batch cannot be divided.
    """

    def __init__(self, order: Order, step: int = 0, rank: int = 0, world_size: int = 1, accumulate: int = 1):
        if order.batch_size % (world_size * accumulate):
            raise DataError(
                f"expected a global batch that {world_size} processes x {accumulate} micro-batches divide, "
                f"got {order.batch_size}"
            )
        self.order, self.step, self.accumulate = order, step, accumulate
        self.rank, self.size = rank, order.batch_size // world_size

    def __iter__(self) -> Iterator[list[Draw]]:
        step, part = self.step, self.size // self.accumulate
        while True:
            batch = self.order.batch(step)[self.rank * self.size : (self.rank + 1) * self.size]
            for first in range(0, self.size, part):
                yield batch[first : first + part]
            step += 1
