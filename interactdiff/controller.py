"""One controller a denoiser: it owns every hook, processor and swapped parameter of all attached adapters.

Before each call of the denoiser it lets every binding prepare, outside of what torch.compile sees, and lays
out the edits that act in the call. Processors and parameters stand in only while a call runs, so that between
calls the denoiser is its own: it can be saved, and others may set what they like.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from interactdiff.adapter import (
    Adapter,
    Binding,
    Edit,
    ExtraKeys,
    Guidance,
    Observer,
    OwnKeys,
    Parameter,
    Residual,
)
from interactdiff.autograd_modes import plain_tensors
from interactdiff.calls import Call, CallReader
from interactdiff.compiled import forget_compiled
from interactdiff.errors import AdapterError
from interactdiff.pipeline_watch import PipelineWatch
from interactdiff.processors import KeysProcessor, keys_processor
from interactdiff.scene_source import Components, SceneSource
from interactdiff.scene_thread import SceneThread
from interactdiff.site_hooks import (
    AttentionHooks,
    BlockHooks,
    ObserverHooks,
    ProjectionHooks,
    SiteHooks,
    stateful_hooks,
)
from interactdiff.sites import Denoiser, Site, find_sites


class Controller:
    """Performs the edits of the adapters that are attached to a denoiser.

    Calls from several threads run one after the other, so that each sees its own state.

    Attributes:
        denoiser: the U-Net or transformer.
        calls: reads its calls.
        sites: all of its sites.
        bindings: in the order in which their edits are chained.
        read: by an adapter's name, what it has read of its pipeline.
        scenes: which thread has set the scene.
    """

    def __init__(self, denoiser: Denoiser):
        self.denoiser = denoiser
        self._given: list[object] = []  # to attach: some hold the denoiser within a compiled wrapper
        self._watches: dict[int, PipelineWatch] = {}
        self.calls = CallReader(denoiser, None)
        self.sites = tuple(find_sites(denoiser))
        self.bindings: list[Binding] = []
        self.read: dict[str, Components] = {}
        self.scenes = SceneThread()
        self._hooks: list[Any] = []
        self._places: dict[tuple[str, str], SiteHooks] = {}
        self._processors: dict[str, KeysProcessor] = {}
        self._laid_out: list[Any] | None = None
        self._restore: list[Callable[[], None]] = []
        self._lock, self._local = threading.RLock(), threading.local()

    @staticmethod
    def of(denoiser: nn.Module) -> "Controller | None":
        """The controller of a denoiser that something is attached to."""
        owners = (getattr(hook, "__self__", None) for hook in denoiser._forward_pre_hooks.values())
        return next((owner for owner in owners if isinstance(owner, Controller)), None)

    def __reduce__(self) -> Any:
        """A copy would control the original.

        Raises:
            AdapterError: always.
        """
        raise AdapterError(
            "expected a denoiser without adapters attached to be pickled or copied, got one that has some: "
            "detach them first, or save it with save_pretrained"
        )

    def check(self, bindings: Sequence[Binding]) -> None:
        """Make sure that further bindings can act beside those that there are; nothing is touched.

        Raises:
            AdapterError: naming two that cannot.
        """
        taken: dict[Any, str] = {}
        for binding in [*self.bindings, *bindings]:
            name = binding.adapter.name
            for claim, words in _claims(binding):
                if (other := taken.setdefault(claim, name)) != name:
                    raise AdapterError(f"expected one adapter {words}, got {other} and {name}")
        for edit in (edit for binding in bindings for edit in binding.edits):
            if isinstance(edit, OwnKeys | ExtraKeys):
                keys_processor(edit.site)
            if isinstance(edit, Parameter) and isinstance(edit.value, Tensor):
                _check_in_memory(getattr(edit.module, edit.name))

    def join(self, bindings: Sequence[Binding], given: object, pipeline: Any) -> None:
        """Take further bindings, which have been checked.

        Args:
            bindings: the bindings.
            given: the pipeline or denoiser that `attach` was given.
            pipeline: the same if it is a pipeline, else None.
        """
        if not any(one is given for one in self._given):
            self._given.append(given)
        if pipeline is not None or not self.bindings:
            self.calls.pipeline = pipeline
        self.bindings = sorted([*self.bindings, *bindings], key=_order)
        self._laid_out = None
        if pipeline is not None and id(pipeline) not in self._watches:
            self._watches[id(pipeline)] = PipelineWatch(pipeline, self.denoiser, self._acts, self.read.values)
            self._watches[id(pipeline)].install()
        if not self._hooks:
            self._install()
        for key, make in _places(self.bindings).items():
            if key not in self._places:
                self._places[key] = make()
            self._places[key].hook()
        forget_compiled(self.denoiser, *self._given)
        try:
            for binding in bindings:
                binding.install()
                if not binding.adapter.items:
                    remedy = f"{binding.adapter.name} was attached with, got another: attach it again"
                    self.read[binding.adapter.name] = Components(binding, remedy)
        except BaseException:
            self.leave(bindings)
            raise

    def leave(self, bindings: Iterable[Binding]) -> None:
        """Let bindings go; the denoiser is its own again after the last one."""
        leaving = set(map(id, bindings))
        for binding in [binding for binding in self.bindings if id(binding) in leaving]:
            binding.uninstall()
            binding.adapter.restore()
            self.read.pop(binding.adapter.name, None)
        self._release()
        self._give_back()
        self.bindings = [binding for binding in self.bindings if id(binding) not in leaving]
        self._laid_out = None
        forget_compiled(self.denoiser, *self._given)
        needed = _places(self.bindings)
        for key in [key for key in self._places if key not in needed]:
            self._places.pop(key).unhook()
        if not self.bindings:
            self._uninstall()

    def _install(self) -> None:
        self._hooks = [
            self.denoiser.register_forward_pre_hook(self._before, with_kwargs=True),
            self.denoiser.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        if hasattr(self.denoiser, "cache_context"):
            own = vars(self.denoiser).get("cache_context")
            wrapped = self.calls.wrap_context(self.denoiser.cache_context)
            self.denoiser.cache_context = wrapped
            self._hooks.append(_Attribute(self.denoiser, "cache_context", wrapped, own))

    def _uninstall(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._processors.clear()
        while self._watches:
            self._watches.popitem()[1].remove()

    def _acts(self) -> bool:
        return any(binding.scene is not None or not binding.adapter.items for binding in self.bindings)

    @cast(Any, torch.compiler.disable)
    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nested = self.calls.is_nested
        if not nested:
            self._release()  # of a call that was interrupted, which no hook hears of
        self._lock.acquire()
        self._local.depth = getattr(self._local, "depth", 0) + 1
        self._give_back()
        with plain_tensors(autocast=True):
            return self._prepare(args, kwargs, nested)

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any], nested: bool) -> Any:
        """Let every binding prepare, and lay out what acts; the call's arguments where one changes them."""
        call, changed = self.calls.read(args, kwargs), None
        if not nested:
            self._local.call = call
            self._start(call)
            for guidance in self._guidance():
                if (changed := guidance.inputs(call)) is not None:
                    arguments = {**call.arguments, **changed.arguments}
                    edited = self.calls.read((), arguments, changed.rows)
                    if "step" in vars(call):  # reading it twice would be two calls to a clock
                        vars(edited)["step"] = call.step
                    self._local.call = call = edited
        active = [binding.prepare(call) for binding in self.bindings]
        self._lay_out(active, call)
        return None if changed is None else ((), dict(call.arguments))

    def _start(self, call: Call) -> None:
        """At the start of a run, make anew what of a scene is no longer what it was made of."""
        has_scene = any(binding.scene is not None for binding in self.bindings)
        starts = self.scenes.check(call, has_scene)
        if has_scene and starts is not False:
            for source in self.read.values():
                if isinstance(source, SceneSource):
                    source.refresh(call.device, values=starts is True)

    @cast(Any, torch.compiler.disable)
    def _after(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        try:
            if output is None:  # an error is on its way
                self._give_back()
                return None
            if not (torch.is_grad_enabled() and getattr(self.denoiser, "is_gradient_checkpointing", False)):
                self._give_back()  # else blocks run again in `backward`, as they did
            if self.calls.is_nested:
                return None
            for guidance in self._guidance():
                prediction = guidance.prediction(self._local.call, _prediction(output))
                if prediction is not None:
                    output = _with_prediction(output, prediction)
            return output
        finally:
            if not self.calls.is_nested:
                self._local.call = None
            self._release(1)

    def _release(self, times: int | None = None) -> None:
        depth = getattr(self._local, "depth", 0)
        for _ in range(depth if times is None else min(times, depth)):
            self._local.depth -= 1
            self._lock.release()

    def _guidance(self) -> list[Guidance]:
        return [edit for binding in self.bindings for edit in binding.edits if isinstance(edit, Guidance)]

    def _lay_out(self, active: Sequence[Iterable[Edit]], call: Call) -> None:
        """Give the edits that act in a call to the hooks, processors and parameters that perform them."""
        for place in self._places.values():
            place.hook()
        if not any(active):
            if self._laid_out != []:
                self._clear_places()
                self._laid_out = []
            return
        if self._laid_out is None or not _same(self._laid_out, active):
            self._clear_places()
            for edit in (edit for edits in active for edit in edits):
                if isinstance(edit, Residual):
                    self._places[_key(edit)].residuals += (edit.fn,)
                elif isinstance(edit, Observer):
                    self._places[_key(edit)].observers += (edit.fn,)
            self._laid_out = list(active)
        for place in self._places.values():
            if place.residuals or place.observers:
                place.batch, place.image = call.batch, call.image_slice(place.site)
                place.tokens, place.autocast = call.token_count(place.site), call.autocast
                place.caches = (*stateful_hooks(self.denoiser), *stateful_hooks(place.site.module))
        adapters = {
            id(edit): binding.adapter
            for binding, edits in zip(self.bindings, active, strict=True)
            for edit in edits
            if isinstance(edit, Parameter)
        }
        self._stand_in([edit for edits in active for edit in edits], call, adapters)

    def _clear_places(self) -> None:
        for place in self._places.values():
            place.residuals, place.observers = (), ()

    def _stand_in(self, edits: Sequence[Edit], call: Call, adapters: Mapping[int, Adapter]) -> None:
        chosen: dict[str, tuple[Site, list[Any], list[Any]]] = {}
        for edit in edits:
            if isinstance(edit, OwnKeys | ExtraKeys):
                _, own, extra = chosen.setdefault(edit.site.path, (edit.site, [], []))
                (own if isinstance(edit, OwnKeys) else extra).append(edit)
        processors = [(site, self._processor(site)) for site, _, _ in chosen.values()]
        for site, processor in processors:
            _, own, extra = chosen[site.path]
            processor.own, processor.extra = (own[0].fn if own else None), tuple(edit.fn for edit in extra)
            processor.records = tuple(edit.record for edit in extra if edit.record is not None)
            processor.text_length = call.text_length
            processor.image_length = call.grid[0] * call.grid[1]
            self._swap(site.module, "processor", processor)
        for edit in edits:
            if isinstance(edit, Parameter):
                own = getattr(edit.module, edit.name)
                value = edit.value
                new = (
                    _moved(value, own, adapters[id(edit)]) if isinstance(value, nn.Parameter) else value(own)
                )
                if new is not own:
                    self._swap(edit.module, edit.name, new)

    def _processor(self, site: Site) -> KeysProcessor:
        """The processor for a site, made anew where the site's own is another one."""
        processor = self._processors.get(site.path)
        if processor is None or processor.original is not site.module.processor:
            processor = self._processors[site.path] = keys_processor(site)
        return processor

    def _swap(self, module: nn.Module, name: str, new: Any) -> None:
        own = getattr(module, name)
        setattr(module, name, new)
        self._restore.append(lambda: setattr(module, name, own))

    def _give_back(self) -> None:
        while self._restore:
            self._restore.pop()()


class _Attribute:
    """An attribute that was put over one of a class, to be removed like a hook."""

    def __init__(self, owner: Any, name: str, mine: Any, own: Any):
        self._owner, self._name, self._mine, self._own = owner, name, mine, own

    def remove(self) -> None:
        """Put back what was there, unless somebody has put something over it since."""
        if vars(self._owner).get(self._name) is self._mine:
            delattr(self._owner, self._name)
            if self._own is not None:
                setattr(self._owner, self._name, self._own)


def _order(binding: Binding) -> tuple[int, str]:
    return binding.adapter.order, binding.adapter.name


def _claims(binding: Binding) -> Iterable[tuple[Any, str]]:
    """What only one adapter can have, and in words, what that one does."""
    for edit in binding.edits:
        if isinstance(edit, OwnKeys):
            yield ("keys", edit.site.path), f"to choose the keys of {edit.site.path}"
        elif isinstance(edit, Parameter):
            yield (id(edit.module), edit.name), f"to stand in for one {edit.name} of a module"
        elif isinstance(edit, Guidance):
            yield "guidance", "to guide"


def _key(edit: Residual | Observer) -> tuple[str, str]:
    at = "observed" if isinstance(edit, Observer) else edit.at
    return edit.site.path, at


def _places(bindings: Iterable[Binding]) -> dict[tuple[str, str], Callable[[], SiteHooks]]:
    """The places that need hooks, and what makes them."""
    places: dict[tuple[str, str], Callable[[], SiteHooks]] = {}
    for edit in (edit for binding in bindings for edit in binding.edits):
        if isinstance(edit, Residual | Observer):
            places[_key(edit)] = _maker(edit)
    return places


def _maker(edit: Residual | Observer) -> Callable[[], SiteHooks]:
    site = edit.site
    if isinstance(edit, Observer):
        return lambda: ObserverHooks(site)
    if edit.at != "out":
        return lambda: ProjectionHooks(site, edit.at)
    return lambda: BlockHooks(site) if site.role == "block" else AttentionHooks(site)


def _same(before: Sequence[Any], now: Sequence[Any]) -> bool:
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))


def _check_in_memory(own: Any) -> None:
    if getattr(own, "is_meta", False):
        raise AdapterError(
            "expected weights in memory for layers to stand in for, got some on meta: "
            "offload whole models, not layer by layer"
        )


def _moved(new: nn.Parameter, own: Tensor, adapter: Adapter) -> nn.Parameter:
    """A parameter where the denoiser's own is, and in eval mode in its dtype, for the base may have moved."""
    _check_in_memory(own)
    adapter.cast(own.device, new.dtype if adapter.training else own.dtype, [new])
    return new


def _prediction(output: Any) -> Tensor:
    first = output[0]
    return torch.stack(list(first)) if isinstance(first, list | tuple) else first


def _with_prediction(output: Any, prediction: Tensor) -> Any:
    """The denoiser's output with another prediction in it, of the same kind."""
    new: Any = list(prediction.unbind(0)) if isinstance(output[0], list | tuple) else prediction
    if isinstance(output, tuple):
        return (new, *output[1:])
    output.sample = new
    return output
