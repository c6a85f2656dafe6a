"""Attaches adapters to a denoiser, and takes them off again."""

from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any, cast

import torch

from interactdiff.adapter import Adapter, Binding, Host, PhraseEncoder
from interactdiff.autograd_modes import plain_tensors
from interactdiff.callers import check_guidance
from interactdiff.controller import Controller
from interactdiff.errors import AdapterError, SceneError
from interactdiff.pipeline_watch import check_denoiser
from interactdiff.registry import adapter_method
from interactdiff.scene import Scene
from interactdiff.scene_checks import Schedule, shown
from interactdiff.scene_source import SceneSource
from interactdiff.sites import Denoiser, denoiser_of


class Handle:
    """Adapters that were attached together: takes scenes, and detaches. Made by `attach`; a context manager.

    `handle["interaction"]` is the binding of one of them, with what its method alone can do.

    Attributes:
        denoiser: the U-Net or transformer that they act in.
    """

    def __init__(self, controller: Controller, bindings: Sequence[Binding], given: object):
        self.denoiser: Denoiser = controller.denoiser
        self._controller, self._given = controller, given
        self._bindings = {binding.adapter.name: binding for binding in bindings}

    def __getitem__(self, name: str) -> Any:
        """The binding of one adapter, such as "interaction", "clear" or "concept:cat".

        The name of the method will do where the handle has one adapter of it.

        Raises:
            AdapterError: it is not, or no longer, attached by this handle.
        """
        if name not in self._bindings:
            self._check_attached()
            several = [one for one in self._bindings if adapter_method(one) == name]
            if len(several) == 1:
                return self._bindings[several[0]]
            names = ", ".join(self._bindings)
            raise AdapterError(f"expected an adapter of this handle ({names}), got {shown(name)}")
        return self._bindings[name]

    def __iter__(self) -> Iterator[str]:
        """The names of the adapters that this handle has attached."""
        return iter(self._bindings)

    def set_scene(
        self,
        scene: Scene | Sequence[Any],
        strength: float = 1.0,
        schedule: Schedule = 1.0,
        *,
        num_inference_steps: int | None = None,
        guidance: bool | None = None,
        **options: Any,
    ) -> None:
        """Say what is where from now on. Phrases and pictures are encoded here, once.

        Args:
            scene: a `Scene`; or its items, for every image, or one sequence of them for each prompt of the
                batch. An image without any is drawn as the base draws it.
            strength: how strongly interactions and entities act, in [0, 2]; subjects have their own.
            schedule: the share of the steps that they act in, from the first; or shares [on, linear decay,
                off]. A share is of the steps that a run takes: of those from where image to image starts, of
                those up to `denoising_end`. Of a scene that is set in the middle of a run, as by a callback,
                it is a share of the steps that remain, the next one first.
            num_inference_steps: for a bare denoiser, whose schedule is otherwise not followed; a pipeline
                knows.
            guidance: whether batches are [unconditional half, conditional half]; None asks the pipeline that
                calls, and takes a bare denoiser's batches as conditional.
            **options: further ones of the adapters, such as `fast`; of a `Scene` its `fast`, `seed` and
                `prompt`.

        Raises:
            SceneError: an item that no attached adapter takes, or that cannot be drawn; a strength or
                schedule out of range.
            AdapterError: the handle is detached, no adapter has such an option, or nothing is there to encode
                phrases with.
        """
        self._check_attached()
        common: dict[str, Any] = {"strength": strength, "schedule": schedule}
        if isinstance(scene, Scene):
            common = {"strength": scene.strength, "schedule": scene.schedule}
            own = {"fast": scene.fast, "seed": scene.seed, "prompt": scene.prompt}
            options = {name: value for name, value in own.items() if self._takes(name)} | options
            scene = scene.items
        prompts = self._split(scene)
        common["all_items"] = prompts
        for name in options:
            if not self._takes(name):
                known = ", ".join(sorted({n for b in self._bindings.values() for n in _options(b)}))
                raise AdapterError(f"expected options of {known}, got {name}")
        encoded: dict[str, SceneSource] = {}
        for name, binding in self._bindings.items():
            if kinds := binding.adapter.items:
                own = [tuple(item for item in items if isinstance(item, kinds)) for items in prompts]
                taken = {n: value for n, value in (common | options).items() if n in _options(binding)}
                with plain_tensors():
                    encoded[name] = SceneSource(binding, own, taken, binding.encode(own, **taken))
        self._controller.calls.configure(guidance, num_inference_steps)
        self._controller.scenes.changed(True)
        self._controller.read.update(encoded)
        for one in encoded.values():
            one.use()

    def describe(self) -> str:
        """What the scene demands of each adapter, in words; empty if nothing."""
        said = ((name, binding.describe()) for name, binding in self._bindings.items())
        return "; ".join(f"{name}: {words}" for name, words in said if words)

    def clear(self) -> None:
        """Forget the scene: the base draws as it always did, but for adapters that take no items."""
        self._controller.scenes.changed(False)
        for binding in self._bindings.values():
            binding.clear()

    def detach(self, name: str | None = None) -> None:
        """Take an adapter off, or all that this handle attached. Doing it twice is the same as once.

        Args:
            name: of one of them; None for all.
        """
        names = list(self._bindings) if name is None else [name] if name in self._bindings else []
        leaving = [self._bindings.pop(one) for one in names]
        if leaving:
            for binding in leaving:
                binding.clear()
            self._controller.leave(leaving)

    def __enter__(self) -> "Handle":
        """The handle itself; leaving the block detaches."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Detach."""
        self.detach()

    def _takes(self, option: str) -> bool:
        return any(option in _options(binding) for binding in self._bindings.values())

    def _check_attached(self) -> None:
        if not self._bindings:
            raise AdapterError("expected an attached adapter, got a handle that is detached")
        check_denoiser(self._given, self.denoiser)

    def _split(self, items: Any) -> list[tuple[Any, ...]]:
        """One tuple of items a prompt; a flat sequence is a single scene, for every image.

        Raises:
            SceneError: there is something that no attached adapter takes.
        """
        kinds = tuple(kind for binding in self._bindings.values() for kind in binding.adapter.items)
        prompts: list[Any] | None = None
        if isinstance(items, Sequence) and not isinstance(items, str):
            nested = bool(items) and all(_is_list(one) for one in items)
            prompts = list(items) if nested else [items]
        for item in (item for prompt in prompts or () for item in prompt):
            if not isinstance(item, kinds) and (method := _method_of(type(item))):
                have = " and ".join(self._bindings)
                if any(method == other.adapter.method for other in self._controller.bindings):
                    have += f"; {method} was attached by another handle, which takes them"
                raise SceneError(
                    f"expected an attached adapter of {method} for {type(item).__name__} items, got {have}"
                )
        if prompts is None or not all(isinstance(item, kinds) for prompt in prompts for item in prompt):
            names = " or ".join(kind.__name__ for kind in kinds) or "no adapter here"
            raise SceneError(
                f"expected items of {names}, or a sequence of them for each prompt, got {shown(items)}"
            )
        return [tuple(prompt) for prompt in prompts]


def attach(
    pipeline_or_denoiser: object, *adapters: Adapter, phrase_encoder: PhraseEncoder | None = None
) -> Handle:
    """Let adapters act in a pipeline, or in a bare denoiser, until the handle detaches them.

    They may be of any number of methods, attached together or one after the other: the order does not matter.
    Each moves to the denoiser's device and, in eval mode, to its dtype until it is detached; in train mode it
    keeps its own.

    Args:
        pipeline_or_denoiser: a diffusers pipeline or its denoiser: a `UNet2DConditionModel`, or a transformer
            of a family in `interactdiff.families`.
        *adapters: the weights, at least one.
        phrase_encoder: phrases in, a [feature_dim] feature for each out; the pipeline's text encoders if not
            given.

    Raises:
        AdapterError: there is no such denoiser, it is not an adapter's base, an adapter cannot act beside
            another, or the pipeline guides by a picture too; nothing has been touched then.
    """
    for adapter in adapters:
        if not isinstance(adapter, Adapter):
            raise AdapterError(
                f"expected adapters, such as InteractionAdapter.from_pretrained loads, got {shown(adapter)}"
            )
    if not adapters:
        raise AdapterError("expected at least one adapter, got none")
    denoiser = denoiser_of(pipeline_or_denoiser)
    controller = Controller.of(denoiser) or Controller(denoiser)
    names = [binding.adapter.name for binding in controller.bindings]
    for adapter in adapters:
        adapter.check(denoiser)
        if adapter.name in names:
            raise AdapterError(
                f"expected a denoiser without {adapter.name} attached, got one that has it: detach that "
                "first, or give this adapter a name of its own with named()"
            )
        names.append(adapter.name)
    pipeline = pipeline_or_denoiser if hasattr(pipeline_or_denoiser, "scheduler") else None
    check_guidance(pipeline)
    host = Host(denoiser, controller.sites, controller.calls, pipeline, phrase_encoder)
    bindings = [adapter.bind(host) for adapter in adapters]
    controller.check(bindings)
    device = torch.device(denoiser.device if pipeline is None else cast(Any, pipeline)._execution_device)
    try:
        with plain_tensors():
            for binding in bindings:
                place = device
                if device.type == "meta" and not any(one.is_meta for one in binding.adapter.parameters()):
                    place = torch.device("cpu")  # offloaded layer by layer: each call knows where it runs
                if not binding.adapter.training:
                    binding.adapter.cast(place, denoiser.dtype)
                binding.follow(place)
    except BaseException:
        for binding in bindings:
            binding.adapter.restore()
        raise
    controller.join(bindings, pipeline_or_denoiser, pipeline)
    return Handle(controller, bindings, pipeline_or_denoiser)


def attached_bindings(denoiser: Any) -> list[Binding]:
    """All that is attached to a denoiser, by any handle, in the order in which edits are chained."""
    controller = Controller.of(denoiser)
    return [] if controller is None else list(controller.bindings)


def _options(binding: Binding) -> set[str]:
    """What `Handle.set_scene` may give a binding's `encode` by keyword."""
    parameters = list(signature(binding.encode).parameters.values())[1:]
    return {one.name for one in parameters if one.kind is not one.VAR_KEYWORD}


def _is_list(item: object) -> bool:
    return isinstance(item, Sequence) and not isinstance(item, str)


def _method_of(kind: type) -> str | None:
    """The method whose adapter takes such items; None if none does."""
    from interactdiff.registry import methods

    found = (name for name, spec in methods().items() if any(item.type is kind for item in spec.items))
    return next(found, None)
