"""High resolution as a sampler: coarse to fine, within windows (CLEAR, arXiv 2412.16112)."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from interactdiff.clear.adapter import ClearAdapter, ClearConfig
from interactdiff.clear.high_resolution import FAMILIES, HighResolution, Stage
from interactdiff.clear.spec import HIGH_RESOLUTION, SCALES
from interactdiff.clear.windows import linearize
from interactdiff.errors import ClearError, SceneError
from interactdiff.method_specs import Cost
from interactdiff.models import default_adapter, resolve
from interactdiff.preview import preview
from interactdiff.scene import Scene

if TYPE_CHECKING:
    from PIL.Image import Image

    from interactdiff.generation import OnStep, ScenePipeline


class HighResolutionSampler:
    """`HighResolution` with the settings of its spec."""

    def unsupported(self, pipeline: Any) -> str | None:
        """Why it cannot work with a pipeline, or None."""
        if any(isinstance(pipeline, family) for family in FAMILIES):
            return None
        return f"expected a Flux or Stable Diffusion 3 pipeline, got {type(pipeline).__name__}"

    def cost(self, pipeline: "ScenePipeline", settings: dict[str, Any], scene: Scene) -> Cost:
        """Pixels of the last stage, and the steps of all."""
        _, stages = self._plan(pipeline, settings, scene)
        return Cost(stages[-1].width * stages[-1].height, sum(stage.steps for stage in stages))

    def generate(
        self, pipeline: "ScenePipeline", settings: dict[str, Any], scene: Scene, on_step: "OnStep | None"
    ) -> "Image":
        """The picture of the last stage."""
        helper, stages = self._plan(pipeline, settings, scene)
        kwargs = pipeline.pipeline_kwargs(scene)
        if "guidance_scale" in kwargs:
            helper.guidance_scale = kwargs["base_guidance_scale"] = kwargs.pop("guidance_scale")
        done, now = 0, stages[0]

        def begin(stage: Stage) -> None:
            nonlocal done, now
            done, now = sum(one.steps for one in stages[: stage.index]), stage

        def after_step(stage_pipeline: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                latents = tensors["latents"]
                look: Callable[[], Any] = partial(preview, stage_pipeline, latents, now.height, now.width)
                on_step(done + step, look)
            return tensors

        window = settings["window"]
        windows = None
        if window and "clear" not in pipeline.adapters:  # else those that are attached act
            windows = linearize(pipeline.pipeline, weights=_layers(pipeline.model, window))
        with nullcontext() if windows is None else windows:
            output = helper(
                height=stages[0].height,
                width=stages[0].width,
                seed=scene.seed,
                base_steps=scene.steps,
                before_stage=begin,
                callback_on_step_end=after_step,
                **kwargs,
            )
        return output.images[-1]

    def _plan(
        self, pipeline: "ScenePipeline", settings: dict[str, Any], scene: Scene
    ) -> tuple[HighResolution, tuple[Stage, ...]]:
        """What generates, and the stages that it will go through."""
        scales = (1, *(scale for scale in SCALES if scale <= settings["scale"]))
        options = {name: settings[name] for name in ("strength", "steps", "shift")}
        width, height = scene.width or pipeline.size, scene.height or pipeline.size
        try:
            helper = HighResolution(pipeline.pipeline, scales=scales, progress=False, **options)
            return helper, helper.stages(height, width, scene.steps)
        except ClearError as error:
            raise SceneError(f"{HIGH_RESOLUTION.name}, {error}") from None


def _layers(model: str, window: int) -> ClearAdapter:
    """Those that come with a packaged model, if they are made for this window; else the base's own."""
    if (layers := default_adapter(model, "clear")) is not None:
        packaged = ClearAdapter.from_pretrained(resolve("adapter", layers))
        if packaged.config.window == window:
            return packaged
    return ClearAdapter(ClearConfig(window)).eval()


SAMPLER = HighResolutionSampler()
