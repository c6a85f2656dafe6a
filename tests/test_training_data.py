"""How recipes read pictures: forked and spawned loader workers, and errors for unreadable data."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from data_files import make_folder, write_rows
from tiny_training import config_of
from torch.utils.data import DataLoader

from interactdiff.data.examples import BadPictures, Examples, collate, make_order
from interactdiff.data.framing import Framing
from interactdiff.data.latents import LatentCache
from interactdiff.data.order import GlobalBatches
from interactdiff.data.reading import Records
from interactdiff.data.texts import TextCache
from interactdiff.errors import DataError
from interactdiff.training import interaction_data
from interactdiff.training.bench import Loading
from interactdiff.training.objectives import Flow
from interactdiff.training.pictures_config import LossConfig
from interactdiff.training.run import make_recipe

FRAMING = Framing(resolution=32, multiple=16)


def encode(pixels: torch.Tensor) -> torch.Tensor:
    """Latents that differ from picture to picture."""
    return pixels[..., ::8, ::8].repeat(1, 2, 1, 1)[:, :4]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_spawned_workers_read_what_the_process_itself_reads(tmp_path: Path) -> None:
    """As on macOS and Windows, and from Python 3.14 on."""
    make_folder(tmp_path / "rows", 8)
    records = Records.open(tmp_path / "rows")
    order = make_order(records, FRAMING, 2, 0)
    latents = LatentCache(tmp_path / "latents", records, FRAMING, "none")
    list(latents.build(encode))
    examples = Examples(records, FRAMING, order, latents=latents)
    batches = [[examples[draw] for draw in order.batch(step)] for step in range(2)]  # opens files
    loader = DataLoader(
        examples,
        batch_sampler=GlobalBatches(order),  # type: ignore[arg-type]
        num_workers=1,
        collate_fn=collate,
        multiprocessing_context="spawn",
    )
    for made, here in zip(loader, batches, strict=False):
        assert made["name"] == [one["name"] for one in here]
        assert torch.equal(made["latents"], torch.stack([one["latents"] for one in here]))


def test_caches_of_texts_go_to_other_processes(tmp_path: Path) -> None:
    cache = TextCache(tmp_path, "none", torch.float32)
    list(cache.build(["a", "bc"], lambda texts: {one: {"states": torch.ones(len(one))} for one in texts}))
    here = cache.get("bc")["states"]
    assert torch.equal(pickle.loads(pickle.dumps(cache)).get("bc")["states"], here)


def read(folder: Path, workers: int) -> Iterator[dict[str, Any]]:
    """The batches of a training on twelve pictures."""
    if not (folder / "rows").exists():
        make_folder(folder / "rows", 12)
    shapes = (4, 4, 4), {"states": (1, 8)}
    loading = Loading(folder / "cache", folder / "rows", 32, *shapes, batch_size=2, workers=workers)
    return loading.batches(Flow({}, LossConfig()))


def test_captions_beside_pictures_may_change_between_two_trainings(tmp_path: Path) -> None:
    rows = make_folder(tmp_path / "rows", 12)
    write_rows(tmp_path / "rows", [{"file_name": one["file_name"]} for one in rows])
    for caption in ("before", "after"):
        for one in rows:
            (tmp_path / "rows" / one["file_name"]).with_suffix(".txt").write_text(caption)
        batches = read(tmp_path, 0)
        assert {one for _ in range(10) for one in next(batches)["prompts"]} <= {caption, ""}


def test_broken_pictures_are_counted_before_the_first_step(
    pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, also by a start on caches, whether or not a step of this process draws them."""
    pipe.save_pretrained(tmp_path / "base")
    make_folder(tmp_path / "rows", 12)
    for name in ("0004.png", "0007.png"):
        path = tmp_path / "rows" / name
        path.write_bytes(path.read_bytes()[:-300])  # it ends early, after its header
    config = config_of(tmp_path / "base", tmp_path / "rows", tmp_path, steps=1)
    reason = "expected a whole picture, got a file that ends early"
    named = f"0004.png: {reason}; 0007.png: {reason}"
    with pytest.raises(DataError) as raised:
        make_recipe(config)
    expected = f"expected at most 0.1% of 12 pictures that cannot be read, got 2: {named}"
    assert str(raised.value) == expected
    monkeypatch.setattr(interaction_data, "BadPictures", lambda count: BadPictures(count, max_share=0.5))
    recipe: Any = make_recipe(config)
    said = capsys.readouterr().err
    assert f"2 of 12 pictures cannot be read, others stand in for them: {named} (all in" in said
    drawn = [name for step in range(6) for name in recipe.batch(step)["name"]]
    assert not {"0004.png", "0007.png"} & {*drawn}
    assert "replaced by another picture" not in capsys.readouterr().err  # they are known


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_its_sentence_from_workers_too(tmp_path: Path, workers: int) -> None:
    next(read(tmp_path, 0))
    batches = read(tmp_path, workers)
    rows = tmp_path / "rows/metadata.jsonl"
    rows.write_text("x" * rows.stat().st_size)
    with pytest.raises(DataError) as raised:
        next(batches)
    assert str(raised.value) == "expected JSON, got 'xxxxxxxxxxxx' (Expecting value)"
