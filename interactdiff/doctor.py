"""What is installed, which methods there are, what can run here and why not, and what is attached."""

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import is_dataclass
from importlib import metadata
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from packaging.version import Version

from interactdiff.adapter import Adapter
from interactdiff.clear.flex import can_run_flex
from interactdiff.clear.tiles import can_run_tiles
from interactdiff.handle import attached_bindings
from interactdiff.registry import methods, samplers
from interactdiff.sites import denoiser_of, held_denoiser

PACKAGES = ("interactdiff", "torch", "diffusers", "transformers", "accelerate", "safetensors")
# Lowest and highest version that the tests run with: constraints-lowest.txt and constraints.txt.
TESTED = {
    "torch": ("2.13.0", "2.13.0"),
    "diffusers": ("0.36.0", "0.42.1"),
    "transformers": ("4.57.1", "5.23.0"),
    "accelerate": ("1.2.0", "1.15.0"),
    "safetensors": ("0.4.5", "0.8.0"),
    "peft": ("0.17.0", "0.21.2"),
}
OPTIONAL = {
    "peft": "LoRA",
    "gradio": "the web page",
    "yaml": "training recipes",
    "torchmetrics": "training recipes",
    "torchsde": "the DPM++ SDE scheduler",
    "xformers": "diffusers' xformers attention",
}


def doctor(pipeline: Any = None) -> str:
    """A report in plain text.

    Args:
        pipeline: a diffusers pipeline or denoiser, of which the report says what is attached; may be None.
    """
    sections = {
        "versions": [
            f"Python {platform.python_version()}",
            *(f"{name} {metadata.version(name)}{untested(name)}" for name in PACKAGES),
        ],
        "methods": [f"{name}: {spec.title}" for name, spec in methods().items()]
        + [f"{name}: {spec.title}, a sampler" for name, spec in samplers().items()],
        "devices": devices(),
        "backends": [f"{name}: {why or 'can run'}" for name, why in backends().items()],
        "optional packages": [f"{name}: {_installed(name)} (for {use})" for name, use in OPTIONAL.items()],
        "attached": attached(pipeline) if pipeline is not None else ["no pipeline was given"],
    }
    texts = (title + "".join(f"\n  {line}" for line in lines) for title, lines in sections.items())
    return "\n\n".join(texts) + "\n"


def untested(package: str) -> str:
    """What is said of an installed version that is outside of what is tested; nothing of any other.

    Args:
        package: the name of one that is installed.
    """
    if package not in TESTED:
        return ""
    lowest, highest = TESTED[package]
    installed = Version(metadata.version(package))
    if Version(lowest) <= Version(installed.public) <= Version(highest):
        return ""
    return f", outside of what is tested, {lowest}" + (f" to {highest}" if highest != lowest else "")


def _installed(module: str) -> str:
    if importlib.util.find_spec(module) is None:
        return "not installed"
    return f"installed{untested(module)}"


def devices() -> list[str]:
    """Each device that torch can use here, with its memory or its threads."""
    found = [
        f"cuda:{i} {p.name}, {p.total_memory / 1e9:.0f} GB, compute capability {p.major}.{p.minor}"
        for i in range(torch.cuda.device_count())
        for p in [torch.cuda.get_device_properties(i)]
    ]
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, f"cpu, {torch.get_num_threads()} threads of {os.cpu_count()} cores"]


def backends() -> dict[str, str | None]:
    """For each way to compute, None if it can run here, or why not."""
    return {name: why_not() for name, why_not in _BACKENDS.items()}


def attached(pipeline: Any) -> list[str]:
    """What acts in a pipeline or a denoiser besides its base."""
    denoiser = denoiser_of(pipeline)
    part = "U-Net" if isinstance(denoiser, UNet2DConditionModel) else "transformer"
    lines = [f"base: {type(pipeline).__name__}, {part} on {denoiser.device} in {_dtype(denoiser.dtype)}"]
    bindings = attached_bindings(denoiser)
    for binding in bindings:
        lines.append(f"{binding.adapter.name} adapter: {describe(binding.adapter)}")
        lines.append(f"{binding.adapter.name} scene: {binding.describe() or 'none'}")
    if not bindings:
        lines.append("adapters: none")
    loras = getattr(denoiser, "peft_config", None)
    lines.append(f"LoRA: {', '.join(loras) if loras else 'none'}")
    kinds = sorted({type(processor).__name__ for processor in denoiser.attn_processors.values()})
    lines.append(f"attention processors: {', '.join(kinds)}")
    wrapped = hasattr(held_denoiser(pipeline), "_orig_mod")
    compiled = wrapped or denoiser._compiled_call_impl is not None
    lines.append(f"compiled: {'yes' if compiled else 'no'}")
    return lines


def describe(adapter: Adapter) -> str:
    """An adapter in a line: how large, its configuration, where."""
    parameters = list(adapter.parameters())
    count = sum(p.numel() for p in parameters) / 1e6
    config = getattr(adapter, "config", None)
    values = vars(config) if is_dataclass(config) else {}
    settings = "".join(f", {name} {value}" for name, value in values.items() if value is not None)
    where = f", on {parameters[0].device} in {_dtype(parameters[0].dtype)}" if parameters else ""
    return f"{count:.1f} M parameters{settings}{where}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _why_no_cuda() -> str | None:
    if torch.cuda.is_available():
        return None
    built = torch.version.cuda
    return "no CUDA device was found" if built else f"torch {torch.__version__} was built without CUDA"


def _why_no_compile() -> str | None:
    if torch.cuda.is_available():
        return None if importlib.util.find_spec("triton") else "no triton was found"
    compiler = os.environ.get("CXX", "g++")
    found = shutil.which(compiler) or shutil.which("clang++")
    return None if found else f"no C++ compiler was found ({compiler})"


def _best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _why_no_bfloat16() -> str | None:
    if torch.cuda.is_available():
        return None if torch.cuda.is_bf16_supported() else "emulated on this GPU, and slow"
    fast = torch.backends.cpu.get_cpu_capability()
    quick = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return None if quick else f"runs, but slower than float32: a CPU of {fast} has no instructions for it"


_BACKENDS: dict[str, Callable[[], str | None]] = {
    "scaled dot product attention": lambda: None,
    "bfloat16": _why_no_bfloat16,
    "torch.compile": _why_no_compile,
    "windows by tiles (CLEAR)": lambda: can_run_tiles(_best_device(), torch.float32),
    "windows by FlexAttention (CLEAR)": lambda: can_run_flex(_best_device(), torch.float32),
    "cuda": _why_no_cuda,
    "mps": lambda: None if torch.backends.mps.is_available() else "not a Mac, or a torch built without it",
}
