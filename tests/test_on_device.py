"""Training on one device in some minutes: what recipes are given, and how models travel."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from interactdiff.stickworld.detector import Detector
from interactdiff.training import device_files
from interactdiff.training.device_files import BASES, FILES, from_package, pack, unpack, with_parts
from interactdiff.training.device_stages import PLAN, Stage
from interactdiff.training.on_device import CONFIGS, minutes_to_share, settings_of
from interactdiff.training.run import load_config

STAGES = [stage for lanes in PLAN for lane in lanes for stage in lane if stage.config]


@pytest.mark.parametrize("toy", [False, True])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_settings_are_keys_of_the_recipe(tmp_path: Path, stage: Stage, again: bool, toy: bool) -> None:
    settings = settings_of(stage, tmp_path, 1.5, again, toy)
    config = load_config(CONFIGS / f"{stage.config}.yaml", settings)
    assert config["stop_after"] == 1.5
    assert config["lr_scheduler"] == "cosine_by_time"
    assert str(config["output_dir"]) == str(tmp_path / f"run-{stage.name}")
    assert "{" not in "".join(str(value) for value in config.values() if isinstance(value, str))
    if "init_from" in config:
        new = ("text", "t5", "detector")  # always
        assert bool(config["init_from"]) == (again and stage.name not in new)
    if "sizes" in config:
        assert sum(one["share"] for one in config["sizes"].values()) == pytest.approx(1)


def test_every_model_has_a_share_and_lanes_end_in_time() -> None:
    for lanes in PLAN:
        for lane in lanes:
            assert sum(stage.share for stage in lane) < 0.95
    assert sum(max(sum(stage.share for stage in lane) for lane in lanes) for lanes in PLAN) < 0.9
    made = {stage.made for stage in STAGES}
    packed = {folder for folders in FILES.values() for folder in folders}
    assert all(any(folder == one or folder.startswith(f"{one}/") for folder in packed) for one in made)


def test_minutes_of_an_autoencoder_that_is_there_go_to_the_rest(tmp_path: Path) -> None:
    (share,) = (stage.share for stage in STAGES if stage.name == "vae")
    assert minutes_to_share(tmp_path, 8.0, []) == 8
    fill(tmp_path / "parts/vae")
    assert minutes_to_share(tmp_path, 8.0, []) == pytest.approx(8 / (1 - share))
    assert minutes_to_share(tmp_path, 8.0, ["vae"]) == 8


def fill(folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file({"weight": torch.ones(4)}, folder / "model.safetensors")


def test_models_travel_in_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, out, back = tmp_path / "runs", tmp_path / "out", tmp_path / "back"
    for folder in (
        "parts/vae",
        "parts/text_encoder",
        "stickworld/unet",
        "stickworld-interaction",
        "cache",
    ):
        fill(runs / folder)
    written = pack(runs, out)
    assert [path.name for path in written] == ["parts.tar", "unet.tar", "adapters.tar"]
    unpack(out, back)
    with_parts(back, "stickworld")
    there = {str(path.parent.relative_to(back)) for path in back.rglob("*.safetensors")}
    assert {"parts/vae", "stickworld/unet", "stickworld-interaction"} <= there
    assert not (back / "cache").exists()
    assert all((back / "stickworld" / part).is_symlink() for part in BASES["stickworld"])
    assert (back / "stickworld" / "vae").resolve() == back / "parts" / "vae"
    from_package(back)  # takes the place of what is there, and adds the detector
    assert {"vae", "text_encoder", "tokenizer"} <= {path.name for path in (back / "parts").iterdir()}
    assert Detector.from_pretrained(back / "detector").size == 128
    monkeypatch.setattr(device_files, "LARGEST", 100)
    with pytest.raises(RuntimeError, match=r"at most 100 bytes, got larger ones: parts\.tar"):
        pack(runs, out)
