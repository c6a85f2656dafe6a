"""Finds out, as a run starts, that a pipeline no longer has the components that adapters have read.

A denoiser that took the place of the one with adapters has none of their hooks, and would draw without them
and without a word. Every diffusers pipeline checks its inputs before it encodes them, and makes its
`progress_bar` before it denoises: there it is checked. A modular pipeline does neither itself; its
components are replaced by `update_components`.
"""

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from interactdiff.errors import AdapterError
from interactdiff.scene_source import Components
from interactdiff.sites import held_denoiser


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
        components: what adapters have read.
    """

    def __init__(
        self,
        pipeline: Any,
        denoiser: object,
        acts: Callable[[], bool],
        components: Callable[[], Iterable[Components]],
    ):
        self._pipeline, self._denoiser = pipeline, denoiser
        self._acts, self._components = acts, components
        self._wrapped: dict[str, tuple[Any, Any]] = {}  # by name what was put there, and what was there

    def install(self) -> None:
        """Look from now on."""
        self._wrap("check_inputs", before=lambda *_, **__: self.check())
        self._wrap("progress_bar", before=self._starts)
        self._wrap("update_components", after=self.check)

    def remove(self) -> None:
        """Put back what was there, unless somebody has put something over it since."""
        for name, (mine, own) in self._wrapped.items():
            if vars(self._pipeline).get(name) is mine:
                delattr(self._pipeline, name)
                if own is not None:
                    setattr(self._pipeline, name, own)
        self._wrapped.clear()

    def check(self) -> None:
        """Make sure that the pipeline has what adapters have read.

        Raises:
            AdapterError: the denoiser, or a component that was read, is another one, and an adapter would
                act.
        """
        if self._acts():
            check_denoiser(self._pipeline, self._denoiser)
            for one in self._components():
                one.check(self._pipeline)

    def _starts(self, iterable: Any = None, total: int | None = None) -> None:
        self.check()
        if self._acts() and total == 0:
            warnings.warn(
                "expected a run of one step at least, got none, since strength times steps is below 1: "
                "nothing is drawn of the scene",
                stacklevel=4,
            )

    def _wrap(
        self,
        name: str,
        before: Callable[..., None] = lambda *_, **__: None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        method = getattr(self._pipeline, name, None)
        if method is None:
            return

        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before(*args, **kwargs)
            result = method(*args, **kwargs)
            after()
            return result

        self._wrapped[name] = wrapped, vars(self._pipeline).get(name)
        setattr(self._pipeline, name, wrapped)
