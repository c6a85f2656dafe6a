"""The studio behind its server: the API, what it refuses, and many clients at once."""

import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import interactdiff.app
from interactdiff.app.examples import EXAMPLES
from interactdiff.app.serve import LOCAL, PUBLIC, limits_for
from interactdiff.cli import main
from interactdiff.generation import ScenePipeline
from interactdiff.picture import read_record

SCENE = replace(EXAMPLES["riding"], steps=2)
QUEUE = 6


@pytest.fixture(scope="module")
def studio() -> Iterator[subprocess.Popen[str]]:
    """A process that serves the U-Net with a short queue, from an empty folder of no models."""
    limits = ["--max-steps", "30", "--max-pixels", str(128 * 128), "--max-queue", str(QUEUE), "--no-hub"]
    command = [
        sys.executable,
        "-m",
        "interactdiff",
        "app",
        "--model",
        "stickworld",
        "--device",
        "cpu",
        *limits,
    ]
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as temporary:
        process = subprocess.Popen(
            [*command, "--allow", empty],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=empty,
            env={**os.environ, "TMPDIR": temporary},
        )
        yield process
        if process.poll() is None:
            process.terminate()
            process.wait(30)


def temporary_files(studio: subprocess.Popen[str], pattern: str) -> list[Path]:
    """What a studio has in its folder for temporary files."""
    return list(Path(psutil.Process(studio.pid).environ()["TMPDIR"]).rglob(pattern))


@pytest.fixture(scope="module")
def server(studio: subprocess.Popen[str]) -> str:
    """Its address."""
    assert studio.stdout is not None
    return next(word for line in studio.stdout for word in line.split() if word.startswith("http")) + "/"


def connected(server: str, folder: Path) -> Client:
    return Client(server, verbose=False, download_files=folder, httpx_kwargs={"timeout": 60})


@pytest.fixture
def client(server: str, tmp_path: Path) -> Client:
    return connected(server, tmp_path)


def draw(
    client: Client, scene: dict[str, Any], model: str = "", adapters: Any = None, methods: Any = None
) -> str:
    return client.predict(scene, model, adapters, methods, api_name="/generate")


def test_the_api_draws_what_the_command_line_draws(client: Client) -> None:
    path = draw(client, SCENE.to_dict())
    record = read_record(path)
    assert (record.scene, record.model) == (SCENE, "stickworld")
    pipeline = ScenePipeline.from_pretrained("stickworld", device="cpu")
    assert Image.open(path).tobytes() == pipeline.generate(SCENE).tobytes()


def test_the_api_tells_what_there_is(client: Client) -> None:
    answer = client.predict(api_name="/models")
    assert answer["models"]["stickworld-dit"]["interaction"] == "stickworld-dit-interaction"
    assert answer["methods"]["high_resolution"]["scale"] == 2
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/generate", "/models"}


def test_the_example_of_the_docs_runs(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = (Path(__file__).parent.parent / "docs/app.md").read_text(encoding="utf-8")
    example = docs.split("```python\n")[1].split("```")[0].replace("http://127.0.0.1:7860", server)
    exec(compile(example.replace('"prompt"', '"steps": 2, "prompt"'), "docs/app.md", "exec"), {})
    path = capsys.readouterr().out.splitlines()[-1].split()[0]
    assert read_record(path).model == "stickworld-dit"


@pytest.mark.parametrize(
    ("scene", "model", "methods", "message"),
    [
        ({"prompt": "a", "steps": 31}, "", None, "steps: expected at most 30 on this server, got 31"),
        ({"prompt": "a", "width": 256, "height": 256}, "", None, "width: expected at most 16384 pixels"),
        ({"prompt": 3}, "", None, "prompt: expected text, got 3"),
        ({"promt": "a"}, "", None, "expected only the keys prompt"),
        ([1], "", None, "expected an object with prompt"),
        ({"prompt": "a"}, "/etc", None, "expected a model that this server has, or one from /.*, got '/etc'"),
        (
            {"prompt": "a"},
            "owner/name",
            None,
            "expected a model that this server has, or one from /.*, got 'owner/name'",
        ),
        ({"prompt": "a"}, "", [2], r"methods: expected an object, got \[2\]"),
        ({"prompt": "a"}, "", {"high_resolution": {}}, "high_resolution: expected a Flux"),
    ],
)
def test_the_api_refuses_in_one_sentence_and_goes_on(
    client: Client, scene: Any, model: str, methods: Any, message: str
) -> None:
    with pytest.raises(AppError, match=message):
        draw(client, scene, model, None, methods)
    assert Image.open(draw(client, SCENE.to_dict())).size == (128, 128)


def test_the_api_refuses_items_and_pictures_before_they_are_read(client: Client) -> None:
    """Too many, too large in all, and files of the server, which a scene from elsewhere must not open."""
    picture = Path(__file__).parent.parent / "docs/demo.png"
    ride = SCENE.to_dict()["interactions"][0]
    broken = "data:image/png;base64,AAAA"  # which would be refused in other words once it is read
    for key, items, message in (
        ("subjects", [{"phrase": "cat", "image": broken}] * 9, "subjects: expected at most 8, got 9"),
        (
            "subjects",
            [{"phrase": "cat", "image": broken}] * 500,
            "subjects: expected at most 64 items",
        ),
        ("interactions", [ride] * 65, "interactions: expected at most 64 items on this server, got 65"),
        (
            "interactions",
            [ride, ride | {"action": "a" * 2001}],
            "interactions 2, action: expected at most",
        ),
        (
            "subjects",
            [{"phrase": "cat", "image": "data:" + "A" * 28 * 2**20}],
            "at most 20 MB in all",
        ),
        (
            "subjects",
            [{"phrase": "cat", "image": str(picture)}],
            "subject 1: image: expected data:image",
        ),
        (
            "subjects",
            [{"phrase": "cat", "image": broken, "mask": str(picture)}],
            "subject 1: mask: expected",
        ),
    ):
        with pytest.raises(AppError, match=message):
            draw(client, {"prompt": "a cat", key: items})


def status(address: str) -> int:
    try:
        with urllib.request.urlopen(address) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_files_outside_the_folders_of_the_server_are_refused(server: str, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("x")
    readme = Path(__file__).parent.parent / "README.md"
    for path in (tmp_path / "secret.txt", "/etc/passwd", readme, "../../etc/passwd"):
        assert status(f"{server}gradio_api/file={path}") in (403, 404)
    assert status(server) == 200


def test_an_upload_that_is_too_large_is_refused(server: str, tmp_path: Path) -> None:
    (tmp_path / "big.png").write_bytes(bytes(21 * 2**20))
    boundary = b"x" * 20
    head = b"--" + boundary + b'\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head + (tmp_path / "big.png").read_bytes() + b"\r\n--" + boundary + b"--\r\n"
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary.decode()}"}
    request = urllib.request.Request(f"{server}gradio_api/upload", body, kind)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 413
    assert handle_file(str(tmp_path / "big.png"))  # the client itself would send it


def test_forty_requests_of_eight_clients_are_answered_or_refused(
    studio: subprocess.Popen[str], server: str, tmp_path: Path
) -> None:
    def memory() -> float:
        return psutil.Process(studio.pid).memory_info().rss / 2**20

    def ask(client: int) -> list[str]:
        mine = connected(server, tmp_path / str(client))
        answers = []
        jobs = [
            mine.submit(replace(SCENE, seed=10 * client + n).to_dict(), "", None, None, api_name="/generate")
            for n in range(5)
        ]
        for n, job in enumerate(jobs):
            try:
                record = read_record(job.result(timeout=120))
                answers.append("drawn" if record.scene.seed == 10 * client + n else "another's")
            except Exception as error:
                answers.append(str(error))
        return answers

    def rush() -> list[str]:
        with ThreadPoolExecutor(8) as pool:
            return [answer for answers in pool.map(ask, range(8)) for answer in answers]

    rush()  # whatever is allocated once is there
    before = memory()
    answers = rush()
    assert len(answers) == 40
    assert set(answers) - {"drawn"} <= {answer for answer in answers if "Queue is full" in answer}
    assert answers.count("drawn") > QUEUE
    assert any("Queue is full" in answer for answer in answers)
    assert memory() < 1.1 * before


# --- the command ---


def test_the_world_may_do_less_than_oneself() -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        assert limits_for(host, share=False) == LOCAL
    assert limits_for("0.0.0.0", share=False) == limits_for("127.0.0.1", share=True) == PUBLIC
    assert (PUBLIC.hub, PUBLIC.folders) == (False, ())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "0"], "--port: expected a number from 1 to 65535, got 0"),
        (["--allow", "/nowhere"], "--allow: expected a folder, got '/nowhere'"),
        (["--max-steps", "0"], "argument --max-steps: expected a whole number from 1 up, got '0'"),
        (["--model", "nowhere"], "expected as model a packaged one"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["app", *flags]) == 2
    assert capsys.readouterr().err.startswith(f"interactdiff: {message}")


def test_the_folder_is_a_space() -> None:
    """Front matter, requirements and `demo` in app.py, as a Space wants them."""
    folder = Path(interactdiff.app.__file__).parent
    front = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert (front["sdk"], front["app_file"]) == ("gradio", "app.py")
    pinned = (folder.parent / "constraints.txt").read_text()
    assert f"gradio=={front['sdk_version']}\n" in pinned
    assert "interactdiff[app] @ git+https://" in (folder / "requirements.txt").read_text()
    names = {path.stem for path in folder.glob("*.py")}
    assert not names & sys.stdlib_module_names  # a Space looks for modules in it first
    run = "import runpy; print(type(runpy.run_path('app.py')['demo']).__name__)"
    done = subprocess.run([sys.executable, "-c", run], cwd=folder, check=True, capture_output=True, text=True)
    assert done.stdout.split()[-1] == "Blocks"


def test_a_picture_is_stored_once_and_sigterm_removes_it(
    server: str, studio: subprocess.Popen[str], client: Client
) -> None:
    """The last test of this file: the server is gone after it."""
    before = {path.name for path in temporary_files(studio, "*.png")}
    draw(client, replace(SCENE, seed=77).to_dict())
    made = [path for path in temporary_files(studio, "*.png") if path.name not in before]
    assert [path.name.startswith("interactdiff-77-") for path in made] == [True]
    folder = Path(psutil.Process(studio.pid).environ()["TMPDIR"])
    studio.terminate()
    assert studio.wait(60) == 143
    assert [
        path for path in folder.rglob("*") if path.is_file() or path.name.startswith("interactdiff")
    ] == []
