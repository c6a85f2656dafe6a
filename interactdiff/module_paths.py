"""Modules laid out under the paths that a base has, so that `state_dict` has the published names."""

from torch import nn


def submodule_at(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path below `root`; those that are missing on the way are made, empty."""
    module = root
    for name in path.split("."):
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module


def checked_path(value: str) -> str:
    """A dotted path of module names, as it came.

    Raises:
        ValueError: it is none, or would hide what every module has.
    """
    parts = value.split(".")
    if not all((part.isidentifier() or part.isdecimal()) and not hasattr(nn.Module, part) for part in parts):
        raise ValueError(f"{value!r} where a module's path should be")
    return value
