"""The order of training: each example once an epoch, the same at any number of ranks and workers."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import make_folder, make_links, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from interactdiff.data import read_folder
from interactdiff.data.examples import BadPictures, Examples, collate, make_order
from interactdiff.data.framing import Framing
from interactdiff.data.order import GlobalBatches, Order, _mixed_range, mixed, permuted
from interactdiff.data.reading import Records
from interactdiff.data.shards import write_shards
from interactdiff.errors import DataError

ROWS, SHARD = 1003, 97


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_a_permutation_takes_each_place_once(count: int, key: int) -> None:
    assert sorted(permuted(n, count, key) for n in range(count)) == list(range(count))


def test_permutations_of_other_keys_are_others() -> None:
    made = {tuple(permuted(n, 20, key) for n in range(20)) for key in range(200)}
    assert len(made) == 200


def test_many_places_are_mixed_as_each_is() -> None:
    assert _mixed_range(123, 50).tolist() == [mixed(123, n) for n in range(50)]


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("sharded", [False, True])
def test_each_example_comes_once_an_epoch(window: int, sharded: bool) -> None:
    rng = np.random.default_rng(0)
    buckets = rng.integers(0, 3, ROWS)
    weights = rng.integers(1, 3, ROWS)
    shards = np.arange(ROWS) // SHARD if sharded else None
    order = Order(buckets, 8, 7, weights, shards, window)
    seen: dict[int, list[int]] = {}
    position = 0
    for step in range(order.steps_before(3) + 50):
        batch = order.batch(step)
        assert len({draw.bucket for draw in batch}) == 1
        for draw in batch:
            assert draw.position == position
            assert draw.bucket == buckets[draw.index]
            position += 1
            seen.setdefault(draw.epoch, []).append(draw.index)
    once = sorted(np.repeat(np.arange(ROWS), weights).tolist())
    epochs = [seen[epoch] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == once
    assert epochs[0] != epochs[1] != epochs[2]


def test_few_shards_are_open_at_a_time() -> None:
    shards = np.arange(ROWS) // SHARD
    order = Order(np.zeros(ROWS), 1, 0, shards=shards, window=2)
    of_step = [int(shards[order.batch(step)[0].index]) for step in range(ROWS)]
    window: set[int] = set()
    windows = [window]
    for shard in of_step:
        if shard not in window and len(window) == 2:
            window = set()
            windows.append(window)
        window.add(shard)
    assert sorted(shard for window in windows for shard in window) == list(range(11))
    assert windows != [set(range(n, min(n + 2, 11))) for n in range(0, 11, 2)]
    free = Order(np.zeros(ROWS), 1, 0)
    assert len({int(shards[free.batch(step)[0].index]) for step in range(60)}) > 8


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_and_accumulation_divide_the_same_batches(ranks: int) -> None:
    order = Order(np.arange(ROWS) % 2, 12, 1, shards=np.arange(ROWS) // SHARD)
    steps = order.steps_before(2)
    whole = [draw for step in range(steps) for draw in order.batch(step)]
    for accumulate in (1, 2):
        samplers = [iter(GlobalBatches(order, 0, rank, ranks, accumulate)) for rank in range(ranks)]
        got = []
        for _ in range(steps):
            parts = [[next(sampler) for _ in range(accumulate)] for sampler in samplers]
            assert all(len(part) == 12 // ranks // accumulate for rank in parts for part in rank)
            got += [draw for rank in parts for part in rank for draw in part]
        assert got == whole
    resumed = GlobalBatches(order, 37, ranks - 1, ranks)
    assert next(iter(resumed)) == order.batch(37)[12 - 12 // ranks :]


def test_steps_are_found_in_their_epochs() -> None:
    for batch_size in (1, 4, 50):  # also more than a bucket has
        order = Order([0] * 7 + [1] * 13 + [2] * 2, batch_size, 3)
        for epoch in range(5):
            for step in range(order.steps_before(epoch), order.steps_before(epoch + 1)):
                assert order.epoch_of(step) == epoch
        drawn = [d for step in range(order.steps_before(60)) for d in order.batch(step)]
        counts = np.bincount([d.index for d in drawn])
        assert counts.min() >= 60
        assert counts.max() <= 60 + -(-batch_size // 2)


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(DataError, match="that 2 processes x 3 micro-batches divide, got 8"):
        GlobalBatches(Order([0], 8, 0), 0, 0, 2, 3)
    with pytest.raises(DataError, match="got 0 examples in batches of 8"):
        Order([], 8, 0)


def loaded(folder: Path, ranks: int, workers: int, steps: int, start: int = 0) -> list[tuple[int, str, bool]]:
    """What the ranks see, in the global order."""
    records = Records.open(folder)
    framing = Framing(resolution=32, multiple=16)
    order = make_order(records, framing, batch_size=6, seed=5)
    examples = Examples(records, framing, order)
    seen = []
    streams = [
        iter(
            DataLoader(
                examples,
                batch_sampler=GlobalBatches(order, start, rank, ranks),
                num_workers=workers,
                collate_fn=collate,
            )
        )
        for rank in range(ranks)
    ]
    for _ in range(steps):
        for stream in streams:
            batch = next(stream)
            assert batch["pixels"].shape[1:] == (3, *batch["target_size"][0])
            seen += list(zip(batch["position"], batch["name"], batch["flipped"], strict=True))
    return seen


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 97 of 1,003 rows."""
    root = tmp_path_factory.mktemp("shards")
    write_rows(root / "rows", make_links(root / "rows", ROWS))
    write_shards(Records.open(root / "rows"), root / "shards", "train", count=SHARD)
    return root / "shards"


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_ranks_and_workers_read_shards_without_a_repeat(sharded: Path) -> None:
    """Two epochs of the reference; a part of them by other numbers of ranks and workers."""
    records = Records.open(sharded)
    order = make_order(records, Framing(resolution=32, multiple=16), 6, 5)
    names = [f"{r.name.partition('/')[2]}" for r in records]
    assert names == [f"{n:09d}" for n in range(ROWS)]
    for epoch in range(3):
        drawn = [
            d.index for s in range(order.steps_before(3) + 1) for d in order.batch(s) if d.epoch == epoch
        ]
        assert sorted(drawn) == list(range(ROWS))
    reference = loaded(sharded, 1, 0, 20)
    assert len({name for _, name, _ in reference}) == 120
    assert 30 < sum(flipped for _, _, flipped in reference) < 90
    assert loaded(sharded, 2, 1, 20) == reference
    assert loaded(sharded, 3, 0, 20) == reference
    assert loaded(sharded, 1, 4, 20) == reference
    assert loaded(sharded, 1, 0, 5, start=15) == reference[90:]


def test_a_picture_that_breaks_is_replaced_by_one_of_its_bucket(tmp_path: Path) -> None:
    make_folder(tmp_path, 12)
    records, framing = Records.open(tmp_path), Framing(resolution=64, multiple=32)
    (tmp_path / "0004.png").write_bytes(b"broken")
    order = make_order(records, framing, 4, 0)
    examples = Examples(records, framing, order)
    runs: list[list[dict[str, Any]]] = []
    for _ in range(2):
        draws = [draw for step in range(order.steps_before(2)) for draw in order.batch(step)]
        runs.append([examples[draw] for draw in draws])
    replaced = [one for one in runs[0] if one["bad"] and one["epoch"] < 2]
    assert len(replaced) == 2
    for one in replaced:
        assert one["bad"][0].startswith("0004.png: expected a whole picture")
        assert framing.bucket(*one["original_size"][::-1]) == framing.bucket(64, 64)
        assert one["name"] != "0004.png"
    assert [one["name"] for one in runs[0]] == [one["name"] for one in runs[1]]
    bad = BadPictures(len(records), max_share=0.1)
    assert bad.count(collate(replaced[:1])) == replaced[0]["bad"]
    assert bad.count(collate(replaced[1:])) == []
    with pytest.raises(DataError, match=r"at most 0.1% of 12 pictures that cannot be read, got 1: 0004.png"):
        BadPictures(len(records)).count(collate(replaced))
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"expected pictures that can be read, got \d that cannot"):
        examples[order.batch(0)[0]]


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_hundred_thousand_rows_are_read_in_constant_memory(tmp_path: Path) -> None:
    make_links(tmp_path, 10)
    lines = (f'{{"file_name": "{n % 10:07d}.jpg", "prompt": "picture {n}"}}\n' for n in range(100_000))
    with (tmp_path / "metadata.jsonl").open("w") as file:
        file.writelines(lines)
    records = read_folder(tmp_path)
    assert sum(1 for _ in islice(records, 5_000)) == 5_000
    before = resident()
    assert sum(1 for _ in records) == 95_000
    assert resident() - before < 2_000_000  # 21 bytes a row
