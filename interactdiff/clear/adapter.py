"""CLEAR as one module: the attention layers that a base was given for its windows (arXiv 2412.16112)."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from interactdiff.adapter import Adapter, Binding, Host
from interactdiff.checkpoint import save_adapter_files
from interactdiff.clear.pattern import Pattern
from interactdiff.errors import AdapterError, ClearError
from interactdiff.module_paths import checked_path, submodule_at
from interactdiff.sites import Denoiser, Site, attention_sites
from interactdiff.sources import Source, file_or_source, is_saved_adapter, read_weights, saved_adapter

METHOD, VERSION = "clear", 1
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")  # that distillation trains; single blocks have no last
SPATIAL_WEIGHT = "processor.spatial_weight"
PUBLISHED_NAME = re.compile(r"clear_local_(\d+)(?:_down_(\d+))?")


@dataclass(frozen=True)
class ClearConfig:
    """Which image tokens an image token attends to.

    Attributes:
        window: radius r in tokens, from 1 up: dy^2 + dx^2 < r^2.
        down_factor: every token attends to keys and values pooled d x d too; 1: there are none.
        shape: "circle", as published, or "square".
        dilation: tokens per step of the window (arXiv 2209.15001).

    Raises:
        ClearError: in one sentence, for a value out of its range.
    """

    window: int = 16
    down_factor: int = 1
    shape: str = "circle"
    dilation: int = 1

    def __post_init__(self):
        if isinstance(self.down_factor, int):
            side = max(self.down_factor, 1)
            self.pattern((side, side))

    def pattern(self, grid: tuple[int, int], text_length: int = 0, text_first: bool = True) -> Pattern:
        """Which token attends to which on a grid."""
        return Pattern(
            grid, text_length, self.window, self.down_factor, self.shape, self.dilation, text_first
        )

    def __str__(self) -> str:
        """Name it as messages do."""
        return f"window {self.window} and down factor {self.down_factor}"


class ClearAdapter(Adapter):
    """The projections that attention was given for windows, and the weights of pooling.

    `state_dict` has the published names, which are the base's own
    (`transformer_blocks.0.attn.to_q.weight`, `...attn.processor.spatial_weight`). Without projections the
    base's are used; without weights of pooling the mean is.

    Args:
        config: the window.
        tensors: under those names.
    """

    name = METHOD
    order = 0

    def __init__(self, config: ClearConfig, tensors: Mapping[str, Tensor] | None = None):
        super().__init__()
        self.config = config
        for name, tensor in (tensors or {}).items():
            path, _, leaf = name.rpartition(".")
            submodule_at(self, path).register_parameter(leaf, nn.Parameter(tensor))

    def forward(self) -> None:
        """Nothing: the layers act inside the base; what wraps a module in training waits for this call."""

    @classmethod
    def for_denoiser(cls, denoiser: Denoiser, config: ClearConfig | None = None) -> "ClearAdapter":
        """Where distillation starts: copies of the base's projections in float32, pooling by the mean.

        Args:
            denoiser: the base.
            config: the window; None is that of `ClearConfig()` with the base's own layers, and no copies.
        """
        if config is None:
            return cls(ClearConfig())
        copies = {
            name: torch.full_like(tensor, 1 / config.down_factor**2)
            if name.endswith(SPATIAL_WEIGHT)
            else tensor.detach().float().clone()
            for name, tensor in expected_tensors(denoiser, config).items()
        }
        return cls(config, copies)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        weight_name: str | None = None,
        window: int | None = None,
        down_factor: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> "ClearAdapter":
        """Load published layers or ours, in eval mode; attaching checks whether they fit a base.

        Args:
            path_or_id: a file such as clear_local_16_down_4.safetensors, a folder that `save_pretrained`
                made, or a repository on the Hub.
            weight_name: which file of a folder or repository.
            window: the one that the file is expected to be for; needed where its name does not tell.
            down_factor: likewise.
            dtype: of the weights; what they are stored in if not given.

        Raises:
            AdapterError: there is no such file, it is damaged, or it is for another window or factor.
        """
        source, name = file_or_source(path_or_id, weight_name)
        known, tensors = _opened(source, name or _published_name(source, window, down_factor))
        for what, value in (("window", window), ("down_factor", down_factor)):
            if value is not None and known.get(what, value) != value:
                wanted = ClearConfig(window or known["window"], down_factor or known["down_factor"])
                file = name or source.where
                raise AdapterError(f"expected layers for {wanted}, got {file}, which is for {_config(known)}")
        given = {"window": window, "down_factor": down_factor}
        known = {name: value for name, value in given.items() if value is not None} | known
        if "window" not in known:
            file = name or source.where
            raise AdapterError(f"expected a file that tells its window by its name, or a window, got {file}")
        read = {name: tensor.read(dtype) for name, tensor in tensors.items()}
        return cls(_config(known), read).eval()

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write `adapter.safetensors` and `config.json` into a folder, in the dtype that the weights have.

        Raises:
            OSError: the folder cannot be written.
        """
        config = {"method": METHOD, "version": VERSION, **asdict(self.config)}
        save_adapter_files(path, config, self.exact_state())

    def check(self, denoiser: Denoiser) -> None:
        """Make sure that the layers are those of a base: all of its attention sites, or none.

        Raises:
            AdapterError: naming the window that they are for and the first tensor that is missing,
                superfluous or of another shape; or a LoRA is fused into what they replace.
        """
        got = self.state_dict()
        if not got:
            return
        for site in attention_sites(denoiser):
            if any(getattr(module, "merged", False) for module in site.module.modules()):
                raise AdapterError(
                    f"expected LoRAs beside the projections that trained layers replace, got a fused one at "
                    f"{site.path}: unfuse it first"
                )
        expected = expected_tensors(denoiser, self.config)
        wrong = [
            (name, *(list(t[name].shape) if name in t else "no such tensor" for t in (expected, got)))
            for name in sorted(expected.keys() | got.keys())
            if name not in expected or name not in got or expected[name].shape != got[name].shape
        ]
        if wrong:
            name, wanted, found = wrong[0]
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise AdapterError(
                f"expected the layers of {self.config} for {type(denoiser).__name__} with {name} {wanted}, "
                f"got {found}{more}"
            )

    def bind(self, host: Host) -> Binding:
        """What one attachment needs."""
        from interactdiff.clear.binding import ClearBinding

        return ClearBinding(self, host)

    def of_site(self, path: str) -> dict[str, nn.Parameter]:
        """What a site is given, by the names below its path; nothing where the base's own layers stay."""
        try:
            return dict(self.get_submodule(path).named_parameters())
        except AttributeError:
            return {}

    def spatial_weight(self, path: str) -> nn.Parameter | None:
        """A site's weights of pooling [1, 1, 1, d, 1, d, 1], or None for the mean."""
        return self.of_site(path).get(SPATIAL_WEIGHT)


def expected_tensors(denoiser: Denoiser, config: ClearConfig) -> dict[str, Tensor]:
    """What distillation trains in a base, under the published names."""
    tensors = {}
    for site in attention_sites(denoiser):
        for name, parameter in site_parameters(site).items():
            tensors[f"{site.path}.{name}"] = parameter
        if (d := config.down_factor) > 1:
            tensors[f"{site.path}.{SPATIAL_WEIGHT}"] = torch.empty(1, 1, 1, d, 1, d, 1)
    return tensors


def site_parameters(site: Site) -> dict[str, nn.Parameter]:
    """The base's own projections at a site, by their names below its path; a LoRA's stay on top of them."""
    return {
        f"{name}.{leaf}": parameter
        for name, layer in site_layers(site)
        for leaf, parameter in layer.named_parameters(recurse=False)
    }


def site_layers(site: Site) -> Iterable[tuple[str, nn.Module]]:
    """The projections at a site, by name; those that a LoRA has wrapped themselves."""
    for name in PROJECTIONS:
        try:
            layer = site.module.get_submodule(name)
        except AttributeError:  # Flux's single blocks have no output projection
            continue
        yield name, cast(nn.Module, getattr(layer, "base_layer", layer))


def _opened(source: Source, name: str | None) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """What a file or a saved adapter tells of itself, and its tensors."""
    if is_saved_adapter(source, name):
        data, weights = saved_adapter(source)
        got = (data.get("method"), data.get("version"))
        if got != (METHOD, VERSION):
            raise AdapterError(f"expected an adapter of method and version {(METHOD, VERSION)}, got {got}")
        return {k: v for k, v in data.items() if k not in ("method", "version")}, _checked(weights.tensors)
    if name is None:
        files = sorted(n for n in source.names if n.endswith(".safetensors"))
        if len(files) != 1:
            got = ", ".join(files) or "none"
            raise AdapterError(f"expected one safetensors file in {source.where}, or weight_name, got {got}")
        name = files[0]
    weights = read_weights(source, name)
    known: dict[str, Any] = {"down_factor": 1}
    if match := PUBLISHED_NAME.search(Path(name).stem):
        known |= {"window": int(match[1]), "down_factor": int(match[2] or 1)}
    for tensor, value in weights.tensors.items():
        if tensor.endswith(SPATIAL_WEIGHT) and len(value.shape) == 7:
            known["down_factor"] = value.shape[3]
            break
    return known, _checked(weights.tensors)


def _published_name(source: Source, window: int | None, down_factor: int | None) -> str | None:
    """The file for this window and factor, where a folder or repository has it."""
    pooled = f"_down_{down_factor}" if down_factor and down_factor > 1 else ""
    name = f"clear_local_{window}{pooled}.safetensors"
    return name if name in source.names else None


def _checked(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    for name, tensor in tensors.items():
        try:
            checked_path(name.rpartition(".")[0])
        except ValueError as error:
            raise AdapterError(f"expected names of a base's modules, got {error}") from None
        if not tensor.is_floating_point():
            raise AdapterError(f"expected {name} in floating point, got {tensor.dtype}")
    return tensors


def _config(known: Mapping[str, Any]) -> ClearConfig:
    try:
        return ClearConfig(**known)
    except (TypeError, ClearError) as error:
        raise AdapterError(f"expected the configuration of a CLEAR adapter, got {error}") from None
