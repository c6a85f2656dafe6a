"""Peak memory of what a function allocates, and weights to fill models with."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(run: Callable[[], object], device: torch.device) -> float:
    """How far allocations rise above where they stood before, in MB (1e6 bytes).

    Weights that are there already do not count; what is allocated and kept does.

    Args:
        run: what to run once.
        device: where it allocates.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = cast(Any, profiler.profiler).kineto_results.events()
    allocations = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, size in allocations:
        now += size
        peak = max(peak, now)
    return peak / 1e6


@torch.no_grad()
def filled(module: Any) -> Any:
    """A module, its weights random and small."""
    for parameter in module.parameters():
        parameter.uniform_(-0.03, 0.03)
    return module
