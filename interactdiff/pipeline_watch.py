"""Finds out, as a run starts, that a pipeline no longer has the components that adapters have read.

A denoiser that took the place of the one with adapters has none of their hooks, and would draw without them
and without a word. Every diffusers pipeline makes its `progress_bar` before it denoises: there it is checked.
"""

from collections.abc import Callable
from typing import Any

from interactdiff.errors import AdapterError
from interactdiff.sites import held_denoiser

ENCODERS = tuple(f"{kind}{end}" for end in ("", "_2", "_3") for kind in ("tokenizer", "text_encoder"))


def check_denoiser(given: object, denoiser: object) -> None:
    """Make sure that a pipeline still has a denoiser.

    Args:
        given: the pipeline, or the denoiser itself, compiled or not.
        denoiser: the one that adapters are attached to.

    Raises:
        AdapterError: it has another.
    """
    held = held_denoiser(given)
    if getattr(held, "_orig_mod", held) is not denoiser:
        raise AdapterError(
            f"expected the pipeline's denoiser to be the one that adapters are attached to, got another "
            f"{type(held).__name__}: attach to the pipeline again"
        )


class PipelineWatch:
    """Looks at one pipeline whenever it starts to denoise, from `install` to `remove`.

    Args:
        pipeline: a diffusers pipeline.
        denoiser: the one that adapters are attached to.
        acts: whether anything would act in a run.
    """

    def __init__(self, pipeline: Any, denoiser: object, acts: Callable[[], bool]):
        self._pipeline, self._denoiser, self._acts = pipeline, denoiser, acts
        self._encoders: dict[str, Any] = {}
        self._own = vars(pipeline).get("progress_bar")
        self._wrapped: Any = None

    def install(self) -> None:
        """Look from now on."""
        progress_bar = getattr(self._pipeline, "progress_bar", None)
        if progress_bar is None:
            return

        def checked(*args: Any, **kwargs: Any) -> Any:
            self.check()
            return progress_bar(*args, **kwargs)

        self._wrapped = self._pipeline.progress_bar = checked

    def remove(self) -> None:
        """Put back what was there, unless somebody has put something over it since."""
        if self._wrapped is not None and vars(self._pipeline).get("progress_bar") is self._wrapped:
            del self._pipeline.progress_bar
            if self._own is not None:
                self._pipeline.progress_bar = self._own

    def read_encoders(self) -> None:
        """Remember the encoders that a scene's phrases were made with."""
        held = self._pipeline
        self._encoders = {name: getattr(held, name) for name in ENCODERS if hasattr(held, name)}

    def check(self) -> None:
        """Make sure that the pipeline has what adapters have read.

        Raises:
            AdapterError: the denoiser or a text encoder is another one, and an adapter would act.
        """
        if not self._acts():
            return
        check_denoiser(self._pipeline, self._denoiser)
        for name, encoder in self._encoders.items():
            if getattr(self._pipeline, name, None) is not encoder:
                raise AdapterError(
                    f"expected the {name} that the scene's phrases were encoded with, got another: "
                    "set the scene again"
                )
