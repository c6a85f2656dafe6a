"""The studio for programs: `/draw` and `/models`, called by gradio_client (docs/app.md)."""

import threading
from typing import Any

import gradio as gr

from interactdiff.app.artist import REFUSALS, Artist, Order
from interactdiff.methods import methods
from interactdiff.models import ADAPTERS, MODELS, default_adapter
from interactdiff.scene import Scene, SceneError
from interactdiff.scene_checks import shown


def add_to(blocks: gr.Blocks, artist: Artist) -> None:
    """Add the endpoints to a page; they share its queue and its turn at the models."""

    def draw(scene: Any, model: str, adapter: str, asked: Any) -> str:
        try:
            if asked is not None and not isinstance(asked, dict):
                raise SceneError(f"methods: expected an object, got {shown(asked)}")
            order = Order(
                Scene.from_dict(scene), model=model or MODELS[0], adapter=adapter or None, methods=asked or {}
            )
            artist.check(order)
            *_, last = artist.draw(order, threading.Event())
            return str(last.done[0].path)
        except REFUSALS as error:
            raise gr.Error(str(error), print_exception=False) from None

    def models() -> dict[str, Any]:
        offered = {name: default_adapter(name) for name in MODELS}
        settings = {name: {s.name: s.default for s in one.settings} for name, one in methods().items()}
        return {"models": offered, "adapters": list(ADAPTERS.values()), "methods": settings}

    with gr.Row(visible=False):
        scene = gr.JSON(label="scene")
        model, adapter = gr.Textbox("", label="model"), gr.Textbox("", label="adapter")
        asked = gr.JSON(label="methods")
        picture, offered = gr.File(label="picture"), gr.JSON(label="models")
        button = gr.Button("draw")
        button.click(
            draw, [scene, model, adapter, asked], picture,
            api_name="draw", concurrency_id="models", concurrency_limit=1,
            api_description="Draw a scene (docs/scene.md), and get a PNG with the scene inside.",
        )  # fmt: skip
        gr.Button("models").click(
            models, None, offered, api_name="models", queue=False,
            api_description="The models, adapters and methods that this server offers by name.",
        )  # fmt: skip
