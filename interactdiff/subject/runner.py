"""Makes references of subjects, and runs them through the denoiser, several times of a run in one pass."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from interactdiff.adapter import Host
from interactdiff.calls import Call
from interactdiff.fingerprints import fingerprint
from interactdiff.handle import attached_bindings
from interactdiff.subject.adapter import SubjectAdapter
from interactdiff.subject.features import FeatureCache, Features, Reference
from interactdiff.subject.foreground import foreground, whole
from interactdiff.subject.items import Subject
from interactdiff.subject.passes import AS_THE_PICTURE, Passes, Positions, passes_of
from interactdiff.subject.subject_sites import KeySite

Time = tuple[float, int]
"""The timestep that the denoiser is given, and -1, 0 or 1: less noise, as much, or more."""
CACHE_BYTES = 2e9
ROWS_AT_ONCE = 8
KEPT_REFERENCES = 16


class ReferenceRunner:
    """Runs references through a denoiser.

    Attributes:
        cache: what earlier passes gave.
        rows_at_once: times of one pass; those ahead of the call under way fill the cache.
        segmenter: finds foregrounds where nothing else does.
        masked: whether the foreground of references is seen, or the whole of them; the encoder sees the
            foreground in any case.
        reference: what the pass under way is over; None outside.
    """

    def __init__(self, host: Host, adapter: SubjectAdapter, sites: Sequence[KeySite]):
        self._host, self._adapter, self._sites = host, adapter, sites
        self.cache = FeatureCache(CACHE_BYTES)
        self.rows_at_once = ROWS_AT_ONCE
        self.segmenter: Any = None
        self.masked = True
        self.reference: Reference | None = None
        self._references: OrderedDict[Any, Reference] = OrderedDict()
        self._weights: tuple[Any, Any] | None = None
        self._passes: Passes | None = None

    def passes(self) -> Passes:
        """How the denoiser's family is run.

        Raises:
            AdapterError: there is no pipeline to encode pictures and texts with.
        """
        if self._passes is None:
            self._passes = passes_of(self._host)
        return self._passes

    @torch.no_grad()
    def reference_of(self, subject: Subject) -> Reference:
        """A subject's picture, encoded; the same object as long as nothing of it has changed.

        Raises:
            SceneError: nothing is left of the subject in its picture.
            AdapterError: as in `passes`.
        """
        passes = self.passes()
        prompt = subject.reference_prompt or subject.phrase
        key: Any = (subject.image, subject.mask, subject.phrase, prompt, self.segmenter, self.masked)
        key += (fingerprint(passes.pipeline.vae), fingerprint(self._adapter))
        text = passes.text(prompt)
        kept = self._references.get(key)
        if kept is not None and kept.same_text(text):
            self._references.move_to_end(key)
            return kept
        found = foreground(subject, self.segmenter)
        seen = found if self.masked else whole(subject)
        size = passes.size(*seen.image.size)
        latents = passes.latents(seen.image.resize(size, Image.Resampling.LANCZOS))
        mask = np.asarray(seen.mask.resize(size, Image.Resampling.BILINEAR), dtype=np.float32) / 255
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        tokens = None if self._adapter.config is None else self._adapter([found.seen(self._adapter.close_up)])
        reference = Reference(
            subject, latents, noise, passes.grid(latents), torch.from_numpy(mask)[None, None], text,
            found.how, tokens,
        )  # fmt: skip
        self._references[key] = reference
        while len(self._references) > KEPT_REFERENCES:
            self._references.popitem(last=False)
        return reference

    def features(
        self,
        call: Call,
        reference: Reference,
        now: Sequence[Time],
        ahead: Sequence[Time],
        gap: float,
        key: Any,
        fresh: int | None = None,
        positions: Positions = AS_THE_PICTURE,
    ) -> list[Features]:
        """A reference's features at the times of a call.

        Args:
            call: the call under way.
            reference: what to run.
            now: times that are needed.
            ahead: those that will be, nearest first.
            gap: timesteps between -1, 0 and 1.
            key: what else of the settings acts in a pass, compared by equality.
            fresh: seed of noise for this call alone, for which nothing is kept; None has the reference's own.
            positions: of its tokens.
        """
        passes = self.passes()
        if fresh is not None:
            noise = torch.randn(reference.noise.shape, generator=torch.Generator().manual_seed(fresh))
            return self._run(call, passes, reference, now, gap, positions, noise)
        dtype = self._host.denoiser.dtype, call.autocast
        run = (reference, passes.call_key(call), self._weights_key(call), dtype, gap, positions, key)

        def place(time: Time) -> Any:
            level = passes.noise_shares(time[0] + time[1] * gap, call.pipeline)
            return round(time[0], 3), tuple(round(share, 7) for share in level)

        found = {time: self.cache.get(run, place(time)) for time in now}
        missing = [time for time, kept in found.items() if kept is None]
        if missing:
            fitting = int(self.cache.available_bytes(run) // self._bytes(reference)) - len(missing)
            more = [time for time in dict.fromkeys(ahead) if time not in found]
            more = [time for time in more if self.cache.get(run, place(time)) is None]
            more = more[: max(min(self.rows_at_once - len(missing), fitting), 0)]
            times = [*missing, *more]
            rows = self._run(call, passes, reference, times, gap, positions)
            for time, made in zip(times, rows, strict=True):
                self.cache.put(run, place(time), made)
                if time in found:
                    found[time] = made
        return [features for time in now if (features := found[time]) is not None]

    def _run(
        self,
        call: Call,
        passes: Passes,
        reference: Reference,
        times: Sequence[Time],
        gap: float,
        positions: Positions,
        noise: Tensor | None = None,
    ) -> list[Features]:
        """One pass, with a row for each time."""
        levels = [time + sign * gap for time, sign in times]
        noise = reference.noise if noise is None else noise
        noised = passes.noised(reference.latents, noise, levels, call.pipeline)
        given = [time for time, _ in times]
        arguments = passes.arguments(call, reference.latents, noised, reference.text, given, positions)
        for one in self._sites:
            kept, _ = reference.foreground(one.site.grid(*reference.grid))
            one.kept, one.recorded = kept.to(call.device), None
        denoiser, self.reference = self._host.denoiser, reference
        context = getattr(denoiser, "cache_context", None)
        try:
            with (
                torch.no_grad(),
                torch.compiler.set_stance("force_eager"),
                self._host.calls.passing("reference"),
                nullcontext() if context is None else context("reference"),
            ):
                denoiser(**arguments)
            recorded = {one.site.path: one.recorded for one in self._sites if one.recorded is not None}
        finally:
            self.reference = None
            for one in self._sites:
                one.kept = one.recorded = None
        return [
            {path: (k[n : n + 1].clone(), v[n : n + 1].clone()) for path, (k, v) in recorded.items()}
            for n in range(len(times))
        ]

    def _bytes(self, reference: Reference) -> int:
        """Of the features of one time."""
        size = self._host.denoiser.dtype.itemsize
        counts = (
            len(reference.foreground(one.site.grid(*reference.grid))[0]) * one.site.dim for one in self._sites
        )
        return max(2 * size * sum(counts), 1)

    def _weights_key(self, call: Call) -> Any:
        """Of the weights and of what else acts in a pass; read at the first call of a run."""
        step = call.step
        run = (call.thread, id(call.pipeline))
        if self._weights is None or self._weights[0] != run or step is None or step[0] == 0:
            bindings = attached_bindings(self._host.denoiser)
            others = tuple((one.adapter.name, fingerprint(one.adapter), one.pass_key()) for one in bindings)
            self._weights = run, (fingerprint(self._host.denoiser), others)
        return self._weights[1]


def times_ahead(call: Call) -> list[float]:
    """Timesteps that the run will come to, in their order."""
    timesteps = getattr(getattr(call.pipeline, "scheduler", None), "timesteps", None)
    later = [] if timesteps is None else [float(t) for t in timesteps.tolist()]
    return list(dict.fromkeys(t for t in later if t < call.timestep))
