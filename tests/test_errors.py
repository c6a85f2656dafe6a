"""What cannot work ends in one sentence, at every entry: the command line, the studio, its API, Python."""

import importlib
import pkgutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import torch

from interactdiff import InteractdiffError, Scene, SceneError, generate
from interactdiff.app.document import Document
from interactdiff.app.examples import EXAMPLES
from interactdiff.app.form import filled
from interactdiff.app.limits import Limits
from interactdiff.app.studio import Studio
from interactdiff.app.worker import Worker
from interactdiff.cli import main
from interactdiff.generation import ScenePipeline
from interactdiff.picture import Record

DIT = ["--model", "stickworld-dit", "--device", "cpu"]
VAE = str(Path(__file__).parent.parent / "training/configs/stickworld_vae.yaml")


def modules() -> Iterator[Any]:
    """Every module of the package but those that start something when imported."""
    for name in ("interactdiff", "interactdiff.app", "interactdiff.pipelines", "interactdiff.training"):
        package = importlib.import_module(name)
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if found.name not in ("interactdiff.__main__", "interactdiff.app.app"):
                yield importlib.import_module(found.name)


def test_all_errors_of_the_package_have_one_parent() -> None:
    errors = {
        value
        for module in modules()
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Exception)
        if value.__module__.startswith("interactdiff.") and not value.__name__.startswith("_")
    }
    named = {error.__name__ for error in errors}
    assert {"SceneError", "AdapterError", "ModelError", "ClearError", "RecipeError"} < named
    assert {"PictureError", "MethodError", "UsageError"} < named
    assert {error.__name__ for error in errors if not issubclass(error, InteractdiffError)} == {"Stopped"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["evaluate", "--world", *DIT, "--scenes", "1", "--steps", "1", "--size", "104"],
            "size: expected a multiple of 32 pixels, got 104",
        ),
        (
            ["generate", "a", *DIT, "--steps", "1", "--method", "clear", "--width", "104"],
            "width: expected a multiple of 32 pixels, got 104",
        ),
        (
            ["generate", "a", *DIT, "--adapter", "clear=stickworld-interaction"],
            "expected an adapter of ",
        ),
        (["generate", "a", *DIT, "--adapter", "clear=./nothing"], "expected as adapter a packaged one"),
        (["generate", "a", *DIT, "--method", "clear:size=2"], "clear: expected settings of min_tokens, got"),
        (
            ["generate", "a", *DIT, "--method", "clear:min_tokens"],
            "--method: expected NAME:SETTING=number",
        ),
        (["evaluate", "--world", "--steps", "1001"], "--steps: expected a whole number from 1 to 1000, got"),
        (
            ["evaluate", "--world", "--seed", "-1"],
            "--seed: expected a whole number from 0 to 4294967295",
        ),
        (["evaluate", "--world", "--guidance-scale", "nan"], "--guidance-scale: expected a number from 0 to"),
        (
            ["evaluate", "--world", "--rows", "adapter"],
            "--rows: expected --data, --concept or --subject beside it, got --world",
        ),
        (["evaluate", "--concept", "--sheet", "a.png"], "--sheet: expected --data beside it, got --concept"),
        (
            ["evaluate", "--concept", "--method", "concept:rank=2"],
            "--method concept: expected settings of none, got 'rank'",
        ),
        (["evaluate", "--subject", "--method", "clear"], "--method: expected subject beside --subject, got"),
        (["evaluate", "--subject", "--method", "subject:masks=2"], "masks: expected a whole number from 0"),
        (["evaluate", "--world", "--method", "clear"], "--method: expected --concept or --subject beside it"),
        (["evaluate", "--subject", "--fast"], "--fast: expected --world beside it, got --subject"),
        (
            ["evaluate", "--compare", "a", "b", "--batch-size", "16"],
            "--batch-size: expected --world, --data, --concept or --subject beside it, got --compare",
        ),
        (["evaluate", "--world", "--adapter", "clear=x"], "expected an adapter's folder or the id of one"),
        (["train", VAE, "--set", "steps=abc"], "steps: expected a whole number from 1 up, got 'abc'"),
        (["train", VAE, "--set", "batch_size=-1"], "batch_size: expected a whole number from 1 up, got -1"),
        (
            ["train", VAE, "--set", "learning_rate=fast"],
            "learning_rate: expected a number from 0 up, got 'fast'",
        ),
        (["train", VAE, "--set", "weight_decay=.nan"], "weight_decay: expected a number from 0 up, got nan"),
    ],
)
def test_the_command_line_refuses_before_anything_is_drawn(
    command: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"interactdiff: {message}")
    assert err.count("\n") == 1  # no progress bar either


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            "got CUDA out of memory\n",
        ),
        (MemoryError(), "got no memory left\n"),
        (OSError(28, "No space left on device"), "got [Errno 28] No space left on device\n"),
    ],
)
def test_too_little_memory_or_disk_is_one_sentence(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ScenePipeline, "generate", failing)
    assert main(["generate", "a", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("interactdiff: expected ")
    assert err.endswith(message)


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(ScenePipeline, "generate", failing)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["generate", "a", "--device", "cpu"])


def test_a_port_that_is_taken_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["app", "--model", "stickworld", "--device", "cpu", "--port", str(port)]) == 2
    assert f"expected an address that can be served at, got 127.0.0.1:{port}: " in capsys.readouterr().err


# --- Python ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere"}, "expected as model a packaged one"),
        ({"device": "toaster"}, "expected a device of this machine"),
        ({"dtype": "float64"}, "expected a dtype of float32"),
        ({"adapters": 3}, "expected adapters by the name of their method, got 3"),
        ({"adapters": {"interaction": 3}}, "expected adapters by the name of their method, got"),
        (
            {"adapters": {"nothing": "x"}},
            "expected an adapter of clear, concept, interaction, subject, got one of 'nothing'",
        ),
        ({"adapters": {"interaction": None}, "model": "/nowhere"}, "expected as model a packaged one"),
        ({"methods": {"clear": 3}}, "clear: expected settings by their names, got 3"),
    ],
)
def test_python_refuses_in_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InteractdiffError) as refused:
        generate(Scene("a", steps=1), **{"device": "cpu"} | options)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_weights_that_are_missing_are_named(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    with pytest.raises(InteractdiffError, match="expected weights for interaction, got none for"):
        generate(Scene("a", steps=1), model=str(tmp_path), adapters={"interaction": None}, device="cpu")


@pytest.mark.parametrize("items", [3, ["a"], [Scene("a")], (EXAMPLES["riding"].interactions[0],)])
def test_items_of_no_method_are_refused(items: Any) -> None:
    with pytest.raises(SceneError, match=r"extra_items: expected .*, got|expected items of"):
        Scene("a", extra_items=items).to_dict()


# --- the studio and its API ---


@pytest.fixture(scope="module")
def studio() -> Iterator[Studio]:
    worker = Worker(Limits(), device="cpu")
    yield Studio(worker, "stickworld")
    worker.close()


def api(studio: Studio, *arguments: Any) -> Any:
    """Call the endpoint `/generate` as the server does."""
    (endpoint,) = (one for one in studio.blocks.fns.values() if one.api_name == "generate")
    return endpoint.fn(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"prompt": "a"}, 3, None, None), "model: expected text, got 3"),
        (({"prompt": "a"}, "", [1], None), r"adapters: expected an object, got \[1\]"),
        (({"prompt": "a"}, "", {"interaction": 3}, None), "adapters: expected an object, got"),
        (({"prompt": "a"}, "", {"nothing": "x"}, None), "expected an adapter that this server has, got 'x'"),
        (({"prompt": "a"}, "", {"nothing": "stickworld-dit-clear"}, None), "expected an adapter of clear"),
        (({"prompt": "a"}, "", None, {"high_resolution": 1}), "high_resolution: expected settings by their"),
        ((None, "", None, None), "expected an object with prompt, got None"),
    ],
)
def test_the_api_refuses_in_one_sentence(studio: Studio, arguments: Any, message: str) -> None:
    with pytest.raises(gr.Error, match=message):
        api(studio, *arguments)


def test_a_model_that_fails_leaves_page_and_server_running(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("too <large>")

    values = {name: getattr(field, "value", None) for name, field in studio.fields.items()} | {"steps": 1}
    with monkeypatch.context() as failed:
        failed.setattr(ScenePipeline, "generate", failing)
        *_, last = studio._generate("job", Document(), "", (), *values.values())
        assert "The model failed: RuntimeError: too &lt;large&gt;" in last[studio.errors["model"]]["value"]
        assert last[studio.generate]["interactive"]
        with pytest.raises(gr.Error, match="The model failed: RuntimeError: too <large>"):
            api(studio, {"prompt": "a", "steps": 1}, "", None, None)
        failed.setattr(ScenePipeline, "unsupported", failing)
        updates = studio._model_chosen("stickworld", None, Document())
        assert "The model failed" in updates[studio.errors["model"]]["value"]
    *_, last = studio._generate("job", Document(), "", (), *values.values())
    assert len(last[studio.images]) == 1


def test_a_record_with_settings_that_there_are_not_is_refused() -> None:
    record = Record(EXAMPLES["riding"], "stickworld", {}, "cpu", "float32")
    for settings in ({"scale": "x"}, {"size": 2}, {"scale": 3}):
        with pytest.raises(SceneError, match="high_resolution"):
            filled(replace(record, methods={"high_resolution": settings}), 96)
