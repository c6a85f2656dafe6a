"""High resolution as a method that front ends offer: coarse to fine, within windows."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from interactdiff.clear.adapter import ClearAdapter, ClearConfig
from interactdiff.clear.high_resolution import FAMILIES, HighResolution, Stage
from interactdiff.clear.linearize import linearize
from interactdiff.clear.pattern import ClearError
from interactdiff.methods import Draw, Method, Setting, Work
from interactdiff.models import CLEAR_LAYERS
from interactdiff.preview import preview
from interactdiff.scene import Scene, SceneError
from interactdiff.stickworld import model_path

if TYPE_CHECKING:
    from PIL.Image import Image

    from interactdiff.generate import Drawer, OnStep

SCALES = (2, 4, 8)


def _why_not(pipeline: Any) -> str | None:
    if any(isinstance(pipeline, family) for family in FAMILIES):
        return None
    return f"expected a Flux or Stable Diffusion 3 pipeline, got {type(pipeline).__name__}"


def _plan(drawer: "Drawer", values: dict[str, Any], scene: Scene) -> tuple[HighResolution, tuple[Stage, ...]]:
    """What draws, and the stages that it will draw."""
    scales = (1, *(scale for scale in SCALES if scale <= values["scale"]))
    options = {name: values[name] for name in ("strength", "steps", "shift")}
    width, height = scene.width or drawer.size, scene.height or drawer.size
    try:
        helper = HighResolution(drawer.pipeline, scales=scales, progress=False, **options)
        return helper, helper.stages(height, width, scene.steps)
    except ClearError as error:
        raise SceneError(f"{METHOD.name}, {error}") from None


def _work(drawer: "Drawer", values: dict[str, Any], scene: Scene) -> Work:
    _, stages = _plan(drawer, values, scene)
    return Work(stages[-1].width * stages[-1].height, sum(stage.steps for stage in stages))


def _draw(
    drawer: "Drawer", values: dict[str, Any], _: Draw, scene: Scene, on_step: "OnStep | None"
) -> "Image":
    drawer.ask(scene)
    helper, stages = _plan(drawer, values, scene)
    told = drawer.told(scene)
    if "guidance_scale" in told:
        helper.guidance_scale = told["base_guidance_scale"] = told.pop("guidance_scale")
    done, now = 0, stages[0]

    def begin(stage: Stage) -> None:
        nonlocal done, now
        done, now = sum(one.steps for one in stages[: stage.index]), stage

    def after_step(pipeline: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            look: Callable[[], Any] = partial(preview, pipeline, tensors["latents"], now.height, now.width)
            on_step(done + step, look)
        return tensors

    windows = (
        linearize(drawer.pipeline, weights=_layers(drawer, values["window"])) if values["window"] else None
    )
    with nullcontext() if windows is None else windows:
        drawn = helper(
            height=stages[0].height,
            width=stages[0].width,
            seed=scene.seed,
            base_steps=scene.steps,
            before_stage=begin,
            callback_on_step_end=after_step,
            **told,
        )
    return drawn.images[-1]


def _layers(drawer: "Drawer", window: int) -> ClearAdapter:
    """Those that come with a packaged model, if they are made for this window; else the base's own."""
    if drawer.model in CLEAR_LAYERS:
        packaged = ClearAdapter.from_pretrained(model_path(CLEAR_LAYERS[drawer.model]))
        if packaged.config.window == window:
            return packaged
    return ClearAdapter(ClearConfig(window)).eval()


METHOD = Method(
    name="high_resolution",
    title="High resolution (CLEAR)",
    about="Draws the picture small, enlarges it and draws over it, within windows where those save time.",
    settings=(
        Setting("scale", "Times as large", 2, 2, 8, "Each side, over that of the first picture.", SCALES),
        Setting("strength", "Drawn over with", 0.7, 0.05, 1.0, "Share of the steps that are taken."),
        Setting("steps", "Steps of each enlargement", 20, 1, 200, "Of which that share is taken."),
        Setting("shift", "Shift towards noise", 10.0, 0.1, 100.0, "1: none; with 10, 0.7 is 96 % noise."),
        Setting("window", "Window of attention", 8, 0, 128, "Radius in tokens; 0: all is seen."),
    ),
    why_not=_why_not,
    draw=_draw,
    work=_work,
    suited={"stickworld-dit": {"strength": 0.25, "shift": 1.0}},
)
