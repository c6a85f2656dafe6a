"""Latents and text states on disk: what they are, when they are made anew, and by how many processes."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from data_files import make_folder, noise, write_rows
from safetensors import safe_open
from tiny_training import largest_file
from torch.utils.data import DataLoader

from interactdiff.data import Records
from interactdiff.data import latents as latents_module
from interactdiff.data.examples import Examples, collate, make_order, pixels_of
from interactdiff.data.framing import Framing
from interactdiff.data.latents import LatentCache, vae_mean, weights_key
from interactdiff.data.order import GlobalBatches
from interactdiff.data.texts import TextCache, captions_of, phrases_of
from interactdiff.errors import DataError
from interactdiff.files import write_aside
from interactdiff.interaction.phrases import pipeline_phrases

FRAMING = Framing(resolution=32, multiple=16)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents_module, "BLOCK", 4)


def cache_of(folder: Path, vae: Any, **options: Any) -> LatentCache:
    records = Records.open(folder / "rows")
    return LatentCache(folder / "latents", records, FRAMING, weights_key(vae), dtype=torch.float32, **options)


def built(cache: LatentCache, encode: Any, *ranks: int) -> int:
    """Build what is missing: the number of files."""
    before = set(cache.folder.glob("latents-*"))
    list(cache.build(encode, *ranks))
    return len(set(cache.folder.glob("latents-*")) - before)


@pytest.mark.usefixtures("small_blocks")
def test_cached_latents_are_those_of_the_pictures(tmp_path: Path, pipe: Any) -> None:
    rows = make_folder(tmp_path / "rows", 10)
    rows[2]["prompt"] = "a sign that says stop"  # never mirrored
    write_rows(tmp_path / "rows", rows)
    vae = pipe.vae
    cache, encode = cache_of(tmp_path, vae), vae_mean(vae)
    assert list(cache.build(encode, batch_size=3)) == [4, 8, 10]
    records = cache.records
    for number in range(10):
        record = records[number]
        placement = FRAMING.place(int(records.widths[number]), int(records.heights[number]), record.items)
        pixels = pixels_of(record, placement)[None]
        with torch.no_grad():
            alone = vae.encode(pixels).latent_dist.mean[0] * vae.config.scaling_factor
            mirrored = vae.encode(pixels.flip(-1)).latent_dist.mean[0] * vae.config.scaling_factor
        torch.testing.assert_close(cache.get(number, False), alone, rtol=1e-4, atol=1e-5)
        if number != 2:
            torch.testing.assert_close(cache.get(number, True), mirrored, rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match="expected cached latents of record 2, got none"):
        cache.get(2, True)
    order = make_order(records, FRAMING, 4, 0)
    batches = GlobalBatches(order)
    cached, plain = (Examples(records, FRAMING, order, latents=one) for one in (cache, None))
    loaders = [DataLoader(one, batch_sampler=batches, collate_fn=collate) for one in (cached, plain)]
    for _, one, other in zip(range(5), *loaders, strict=False):
        with torch.no_grad():
            torch.testing.assert_close(one["latents"], encode(other["pixels"]), rtol=1e-4, atol=1e-5)
        for key in ("prompts", "items", "crop", "flipped"):
            assert one[key] == other[key]


@pytest.mark.usefixtures("small_blocks")
def test_rows_stay_unread_where_no_picture_has_changed(
    tmp_path: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "rows", 10)
    encode = vae_mean(pipe.vae)
    first = cache_of(tmp_path, pipe.vae)
    list(first.build(encode))
    read: list[int] = []
    own = Records.__getitem__
    monkeypatch.setattr(Records, "__getitem__", lambda self, n: (read.append(n), own(self, n))[1])
    again = cache_of(tmp_path, pipe.vae)
    assert list(again.build(encode)) == [4, 8, 10]
    assert read == []
    assert torch.equal(again.get(7, True), first.get(7, True))

    fifth = tmp_path / "rows" / first.records[5].name
    read.clear()
    noise(*first.records[5].open().size, seed=99).save(fifth)
    read.clear()
    changed = cache_of(tmp_path, pipe.vae)
    assert list(changed.build(encode)) == [4, 8, 10]
    assert set(read) >= {4, 5, 6, 7}
    assert len(list((tmp_path / "latents").glob("latents-000001-*"))) == 2
    read.clear()
    assert list(cache_of(tmp_path, pipe.vae).build(encode)) == [4, 8, 10]
    assert read == []


def test_what_is_kept_of_rows_follows_captions_and_pictures(tmp_path: Path) -> None:
    rows = make_folder(tmp_path / "rows", 2, sizes=[(64, 48)])
    del rows[0]["prompt"]
    write_rows(tmp_path / "rows", rows)
    (tmp_path / "rows/0000.txt").write_text("one")
    (tmp_path / "rows/0001.txt").write_text("of a row that has its own")

    def opened() -> Records:
        return Records.open(tmp_path / "rows", cache=tmp_path / "cache")

    first = opened()
    (tmp_path / "rows/0001.txt").write_text("changed")
    assert opened().files_digest == first.files_digest
    (tmp_path / "rows/0000.txt").write_text("two")
    assert opened().files_digest != first.files_digest
    noise(48, 64).save(tmp_path / "rows/0001.png")
    assert list(opened().widths) == [64, 48]
    assert opened().digest == first.digest  # of the rows alone
    assert list(opened().heights) == [48, 64]

    (tmp_path / "rows/metadata.jsonl").unlink()
    loose = opened()
    assert opened().files_digest == loose.files_digest
    (tmp_path / "rows/0001.txt").write_text("changed once more")
    assert opened().files_digest != loose.files_digest


def test_weights_have_one_key_in_every_folder(tmp_path: Path, pipe: Any) -> None:
    for part in (pipe.vae, pipe.text_encoder):
        keys = set()
        for name in ("a", "b"):
            part.save_pretrained(tmp_path / type(part).__name__ / name)
            loaded = type(part).from_pretrained(tmp_path / type(part).__name__ / name)
            if hasattr(loaded.config, "transformers_version"):
                loaded.config.transformers_version = name
            keys.add(weights_key(loaded))
        assert len(keys) == 1
    own = weights_key(pipe.vae)
    pipe.vae.register_to_config(scaling_factor=0.5)
    assert weights_key(pipe.vae) != own


@pytest.mark.usefixtures("small_blocks")
def test_processes_share_the_work_and_take_it_up_again(tmp_path: Path, pipe: Any) -> None:
    rows = make_folder(tmp_path / "rows", 10)
    cache, encode = cache_of(tmp_path, pipe.vae), vae_mean(pipe.vae)
    next(iter(cache.build(encode, 0, 2)))  # stopped after a block
    before = {path: path.stat().st_mtime_ns for path in cache.folder.iterdir()}
    assert [built(cache, encode, rank, 2) for rank in range(2)] == [1, 1]
    assert built(cache, encode) == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    rows[0]["prompt"] = "another caption"
    write_rows(tmp_path / "rows", rows)
    assert built(cache_of(tmp_path, pipe.vae), encode) == 0
    rows[0]["interactions"][0]["subject_box"] = [0.2, 0.1, 0.6, 1.0]  # same crop: nothing is cut off
    write_rows(tmp_path / "rows", rows)
    assert built(cache_of(tmp_path, pipe.vae), encode) == 0
    noise(64, 64, seed=99).save(tmp_path / "rows" / "0005.png")
    assert built(cache_of(tmp_path, pipe.vae), encode) == 1
    assert built(cache_of(tmp_path, pipe.vae, flip=False), encode) == 3
    with torch.no_grad():
        pipe.vae.decoder.conv_in.bias.add_(1e-3)
    assert built(cache_of(tmp_path, pipe.vae), encode) == 3


@pytest.mark.usefixtures("small_blocks")
def test_broken_pictures_are_listed_and_replaced(tmp_path: Path, pipe: Any) -> None:
    make_folder(tmp_path / "rows", 12)
    cache = cache_of(tmp_path, pipe.vae)
    path = tmp_path / "rows" / "0004.png"
    path.write_bytes(path.read_bytes()[:-300])
    list(cache.build(vae_mean(pipe.vae)))
    (line,) = (cache.folder / "bad.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "record": 4,
        "name": "0004.png",
        "reason": "expected a whole picture, got a file that ends early",
    }
    order = make_order(cache.records, FRAMING, 4, 0)
    examples = Examples(cache.records, FRAMING, order, latents=cache)
    draws = [draw for step in range(order.steps_before(2)) for draw in order.batch(step)]
    assert [bool(examples[draw]["bad"]) for draw in draws] == [draw.index == 4 for draw in draws]


def test_a_damaged_file_of_latents_is_named(tmp_path: Path, pipe: Any) -> None:
    make_folder(tmp_path / "rows", 2)
    cache = cache_of(tmp_path, pipe.vae)
    list(cache.build(vae_mean(pipe.vae)))
    (path,) = cache.folder.glob("latents-*")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="expected a whole file of latents at"):
        cache_of(tmp_path, pipe.vae).get(0, False)


def test_a_full_disk_is_one_sentence(tmp_path: Path, pipe: Any) -> None:
    make_folder(tmp_path / "rows", 4)
    cache, texts = cache_of(tmp_path, pipe.vae), TextCache(tmp_path / "texts", "none")
    with largest_file(200):
        with pytest.raises(DataError, match=r"^expected disk space for a cache in .*/latents, got .*large"):
            list(cache.build(vae_mean(pipe.vae)))
        with pytest.raises(DataError, match=r"^expected disk space for a cache in .*/texts, got .*too large"):
            list(texts.build(["a"], states_of(pipe)))
    with (
        largest_file(10),
        pytest.raises(DataError, match=r"^expected disk space for a cache in .*/kept, got File too large"),
    ):
        Records.open(tmp_path / "rows", cache=tmp_path / "kept")
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob(".aside-*"))
    assert list(cache.build(vae_mean(pipe.vae))) == [4]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process to kill it")
def test_what_killed_processes_left_is_removed(tmp_path: Path, pipe: Any) -> None:
    make_folder(tmp_path / "rows", 4)
    cache, texts = cache_of(tmp_path, pipe.vae), TextCache(tmp_path / "texts", "none")
    for folder in (cache.folder, texts.folder):
        folder.mkdir()
        if (child := os.fork()) == 0:
            write_aside(folder / "a.safetensors", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        os.waitpid(child, 0)
        (folder / ".aside-older.safetensors").touch()  # by a version that did not say which process writes
        os.utime(folder / ".aside-older.safetensors", (0, 0))
        (folder / ".aside-elsewhere.safetensors").touch()
        assert len(list(folder.glob(".aside-*"))) == 3

    def build(aside: Path) -> None:
        list(cache.build(vae_mean(pipe.vae)))
        list(texts.build(["a"], states_of(pipe)))
        assert aside.exists()  # of a process that runs

    write_aside(cache.folder / "b.safetensors", build)
    for folder in (cache.folder, texts.folder):
        assert [path.name for path in folder.glob(".aside-*")] == [".aside-elsewhere.safetensors"]


def states_of(pipe: Any) -> Any:
    """Unpadded states of a text encoder, and its pooled output."""

    def encode(texts: Any) -> dict[str, dict[str, torch.Tensor]]:
        made = {}
        for text in texts:
            out = pipe.text_encoder(pipe.tokenizer(text, return_tensors="pt").input_ids)
            made[text] = {"states": out.last_hidden_state[0], "pooled": out.pooler_output[0]}
        return made

    return encode


def test_states_are_kept_once_a_distinct_text(tmp_path: Path, pipe: Any) -> None:
    rows = make_folder(tmp_path / "rows", 20)
    for number, one in enumerate(rows):
        one["prompt"] = "on the left" if number % 2 else f"number {number}"
    write_rows(tmp_path / "rows", rows)
    records = Records.open(tmp_path / "rows")
    texts = [caption for caption, _ in captions_of(records, FRAMING)]
    assert set(texts) == {"on the left", "on the right", *(f"number {n}" for n in range(0, 20, 2))}
    key, encode = weights_key(pipe.text_encoder), states_of(pipe)
    caches = [TextCache(tmp_path / "texts", key, torch.float32) for _ in range(2)]
    done = [sum(1 for _ in cache.build(texts, encode, rank, 2)) for rank, cache in enumerate(caches)]
    assert done == [1, 1]
    merged = TextCache(tmp_path / "texts", key, torch.float32)
    assert merged.missing(texts) == []
    for text in set(texts):
        expected = encode([text])[text]
        got = merged.get(text)
        assert got.keys() == expected.keys()
        torch.testing.assert_close(got["states"], expected["states"])
        assert got["states"].shape[0] == len(pipe.tokenizer(text).input_ids)  # no padding
        torch.testing.assert_close(got["pooled"], expected["pooled"])
    kept = sorted((tmp_path / "texts").iterdir())
    keys = []
    for path in kept:
        with safe_open(path, framework="pt") as file:
            keys += file.keys()
    assert len(keys) == 2 * 12
    assert list(merged.build([*texts, "a new one"], encode)) == [1]
    assert set(kept) < set((tmp_path / "texts").iterdir())
    caches[0].refresh()
    assert caches[0].missing([*texts, "a new one"]) == []
    with pytest.raises(DataError, match="expected cached states of every text, got none of 'unknown'"):
        merged.get("unknown")
    assert TextCache(tmp_path / "texts", "another encoder").missing(["number 0"]) == ["number 0"]


def test_every_caption_of_training_is_known_before(tmp_path: Path) -> None:
    rows = make_folder(tmp_path / "rows", 8)
    for one in rows:
        one["interactions"][0]["subject_box"] = [0.0, 0.0, 0.1, 1.0]
        one["interactions"].append(
            {**one["interactions"][0], "subject_box": [0.4, 0.1, 0.6, 0.9], "action": None}
        )
        one["prompt"] = "a person is riding a bike, a person with a bike"
        one["interactions"][0]["action"] = "riding"
        one.pop("entities", None)
    write_rows(tmp_path / "rows", rows)
    records, framing = Records.open(tmp_path / "rows"), Framing(32, 16, square=True)
    known = {caption for caption, _ in captions_of(records, framing)}
    order = make_order(records, framing, 4, 0)
    examples = Examples(records, framing, order)
    drawn = {examples[draw]["prompt"] for step in range(order.steps_before(3)) for draw in order.batch(step)}
    assert drawn == known == {rows[0]["prompt"], "a person with a bike"}


def test_phrase_features_are_kept_the_same_way(tmp_path: Path, pipe: Any) -> None:
    make_folder(tmp_path / "rows", 4)
    phrases = list(phrases_of(Records.open(tmp_path / "rows")))
    assert set(phrases) == {"person", "riding", "bike", "ball"}
    features: Any = pipeline_phrases(pipe, 24)
    cache = TextCache(tmp_path / "texts", "phrases", torch.float32)
    list(cache.build(phrases, lambda texts: {t: {"feature": f} for t, f in features(texts).items()}))
    torch.testing.assert_close(cache.get("bike")["feature"], features(["bike"])["bike"])
