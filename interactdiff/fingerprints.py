"""Fingerprints of modules: whether weights, LoRAs and their scales are those that they were.

Some change weights where no counter of PyTorch's sees it: averages that are copied into place (EMA), fused
LoRAs, whatever writes to `parameter.data`. So a few values of each tensor are part of the fingerprint.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

VALUES = 16  # of each tensor
PLAIN = (Tensor, nn.Parameter)


def fingerprint(module: nn.Module, values: bool = True) -> tuple[Any, ...]:
    """What is equal as long as a module computes the same. Reads no whole tensor.

    Args:
        module: of any kind; weights that are not in memory have no values.
        values: whether to look at values, for which the device has to be waited for.
    """
    tensors = [*module.parameters(), *module.buffers()]
    shapes = tuple((tuple(one.shape), one.dtype, _version(one)) for one in tensors)
    return shapes, _scales(module), _values(tensors) if values else None


def digest(modules: Iterable[nn.Module]) -> str:
    """A hash of a few values of each tensor of modules, the same in every process; reads no whole tensor."""
    tensors = [one for module in modules for one in (*module.parameters(), *module.buffers())]
    made_of = hashlib.sha256(str([(tuple(one.shape), str(one.dtype)) for one in tensors]).encode())
    for values in _values(tensors):
        made_of.update(values)
    return made_of.hexdigest()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@torch.no_grad()
def _values(tensors: Iterable[Tensor]) -> tuple[bytes, ...]:
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for one in tensors:
        if type(one) in PLAIN and one.layout == torch.strided and one.numel() and _in_memory(one):
            step = max(one.numel() // VALUES, 1)
            spread = torch.as_strided(one.detach(), (min(one.numel(), VALUES),), (step,))
            by_kind.setdefault((one.device, one.dtype), []).append(spread)
    joined = (torch.cat(some).cpu().view(torch.uint8) for some in by_kind.values())
    return tuple(one.numpy().tobytes() for one in joined)


def _in_memory(tensor: Tensor) -> bool:
    """Whether as many values as a tensor has lie there one after the other: not of one that is expanded."""
    last = (tensor.storage_offset() + tensor.numel()) * tensor.itemsize
    return not tensor.is_meta and tensor.untyped_storage().nbytes() >= last


def _scales(module: nn.Module) -> tuple[Any, ...]:
    """Of LoRAs, IP-Adapters and FreeU."""
    scales: list[Any] = []
    for part in module.modules():
        if isinstance(scaling := getattr(part, "scaling", None), dict):  # a LoRA of peft
            active = tuple(getattr(part, "active_adapters", ()))
            rounded = tuple((name, round(float(scale), 6)) for name, scale in scaling.items())
            scales.append((active, rounded, getattr(part, "disable_adapters", None)))
        if (scale := getattr(getattr(part, "processor", None), "scale", None)) is not None:  # an IP-Adapter
            scales.append(str(scale))
        if hasattr(part, "s1"):  # FreeU
            scales.append(tuple(getattr(part, name, None) for name in ("s1", "s2", "b1", "b2")))
    return tuple(scales)
