"""Frozen bases in fewer bits: linear layers keep 8 or 4 bits a weight, widened again where they compute."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interactdiff.errors import RecipeError

BYTES = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5 + 1 / 64}
"""Of a weight; "nf4" keeps a scale of 8 bits for each 64 of them, the other two one for each row or layer."""
_PACKAGES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}


def quantized_layers(denoiser: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers of a denoiser's blocks that are not quantised yet, with their parents and names.

    Embeddings of times, prompts and latents, the last projection, and convolutions stay as they are: they
    are few, or the quantisers do not take them.
    """
    for path, parent in denoiser.named_modules():
        for name, layer in parent.named_children():
            if not isinstance(layer, nn.Linear) or "blocks." not in f"{path}.":
                continue
            if type(layer) is nn.Linear and type(layer.weight) is nn.Parameter:
                yield parent, name, layer


def check_quantization(kind: str) -> None:
    """Make sure that the package of a quantisation is installed; "none" needs none.

    Raises:
        RecipeError: it is not.
    """
    if (package := _PACKAGES.get(kind)) is None:
        return
    try:
        import_module(package)
    except ImportError:
        raise RecipeError(
            f"base_quantization: expected the package {package} for {kind}, got none: pip install {package}"
        ) from None


def quantize(denoiser: nn.Module, kind: str, device: torch.device) -> None:
    """Quantise a frozen denoiser in place, a layer at a time, so that the device never has all of it whole.

    Args:
        denoiser: without adapters, in the dtype that it computes in.
        kind: "int8" (torchao, a scale for each row), "fp8" (torchao, float8_e4m3fn) or "nf4" (bitsandbytes,
            QLoRA's, arXiv 2305.14314, section 3).
        device: where its layers go.
    """
    for parent, name, layer in [*quantized_layers(denoiser)]:
        setattr(parent, name, _quantized(layer, kind, device).requires_grad_(False))


def _quantized(layer: nn.Linear, kind: str, device: torch.device) -> nn.Module:
    if kind == "nf4":
        from bitsandbytes import nn as bnb  # pyright: ignore[reportMissingImports]

        weight, bias, sizes = layer.weight, layer.bias, (layer.in_features, layer.out_features)
        made: Any = bnb.LinearNF4(*sizes, bias is not None, compute_dtype=weight.dtype, device="meta")
        made.weight = bnb.Params4bit(weight.detach(), requires_grad=False, quant_type="nf4")
        made.bias = bias
        return made.to(device)
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    holder = nn.Sequential(layer.to(device))
    quantize_(holder, Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())
    made: Any = holder[0]
    made.__class__ = WeightOnlyLinear
    return made


class WeightOnlyLinear(nn.Linear):
    """A frozen layer of torchao's, whose widened weights are not kept for the backward pass."""

    def forward(self, input: Tensor) -> Tensor:
        """As that of a linear layer."""
        return _WeightOnly.apply(input, self.weight, self.bias)


class _WeightOnly(torch.autograd.Function):
    """x W^T + b; its backward pass widens W again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return (gradient @ ctx.weight.dequantize().to(gradient.dtype)).to(ctx.dtype), None, None
