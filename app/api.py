"""The studio for programs: `/generate` and `/models`, called by gradio_client (docs/app.md)."""

import threading
from collections.abc import Mapping
from typing import Any

import gradio as gr

from interactdiff.app.worker import GenerationRequest, Worker
from interactdiff.errors import InteractdiffError, SceneError
from interactdiff.models import PACKAGED, packaged_adapters
from interactdiff.registry import configurables
from interactdiff.scene import Scene
from interactdiff.scene_checks import shown


def add_to(blocks: gr.Blocks, worker: Worker, model: str, adapters: Mapping[str, str]) -> None:
    """Add the endpoints to a page; they share its queue and its turn at the models.

    Args:
        blocks: the page.
        worker: generates.
        model: where a request names none.
        adapters: likewise, of that model.
    """

    def generate(scene: Any, chosen: Any, given: Any, methods: Any) -> str:
        try:
            worker.limits.check_values(scene)
            request = GenerationRequest(
                Scene.from_dict(scene),
                model=_text("model", chosen) or model,
                adapters=_object("adapters", given, str) or ({} if chosen else adapters),
                methods=_object("methods", methods),
            )
            worker.check(request)
            *_, last = worker.generate(request, threading.Event())
            return str(last.images[0].path)
        except InteractdiffError as error:
            raise gr.Error(str(error), print_exception=False) from None
        except Exception as error:  # whatever a model raises, a client gets one sentence
            raise gr.Error(f"The model failed: {type(error).__name__}: {error}") from error

    def models() -> dict[str, Any]:
        offered = {name: dict(info.adapters) for name, info in PACKAGED.items()}
        settings = {name: {s.name: s.default for s in one.settings} for name, one in configurables().items()}
        return {"models": offered, "adapters": list(packaged_adapters()), "methods": settings}

    with gr.Row(visible=False):
        scene, chosen = gr.JSON(label="scene"), gr.Textbox("", label="model")
        given, methods = gr.JSON(label="adapters"), gr.JSON(label="methods")
        picture, offered = gr.File(label="picture"), gr.JSON(label="models")
        button = gr.Button("generate")
        button.click(
            generate, [scene, chosen, given, methods], picture,
            api_name="generate", concurrency_id="models", concurrency_limit=1,
            api_description="Generate a scene (docs/scene.md), and get a PNG with the scene inside.",
        )  # fmt: skip
        gr.Button("models").click(
            models, None, offered, api_name="models", queue=False,
            api_description="The models, adapters and methods that this server offers by name.",
        )  # fmt: skip


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str | None):
        raise SceneError(f"{name}: expected text, got {shown(value)}")
    return value or ""


def _object(name: str, value: Any, kind: type = object) -> dict[str, Any]:
    """A JSON object whose values are of one kind; {} for null.

    Raises:
        SceneError: it is none.
    """
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(one, kind) for one in value.values()):
        raise SceneError(f"{name}: expected an object, got {shown(value)}")
    return value
