"""What differs between pipelines in how they take prompts, guidance and noise."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import Parameter, signature
from typing import Any, cast

import torch

from interactdiff.errors import SceneError
from interactdiff.scene_checks import shown
from interactdiff.sites import denoiser_of

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")  # the last one's limit is the longest


def call_parameters(kind: type) -> dict[str, Parameter]:
    """The parameters of a pipeline's call by name, and of the calls of its bases to which it hands others on.

    Args:
        kind: the pipeline's class, such as one of ours, whose call has `**kwargs` of the stock one.
    """
    found: dict[str, Parameter] = {}
    for base in kind.__mro__:
        if "__call__" in vars(base):
            parameters = signature(vars(base)["__call__"]).parameters
            found = {**parameters, **found}
            if all(one.kind is not Parameter.VAR_KEYWORD for one in parameters.values()):
                break
    return found


def call_arguments(
    pipeline: Any,
    prompt: str | list[str],
    negative_prompt: str | list[str] | None = None,
    guidance_scale: float | None = None,
) -> dict[str, Any]:
    """Prompts and guidance scale as arguments of a pipeline's call, whatever its kind.

    Flux has two kinds of guidance. A guidance-distilled model takes the scale as an input (`guidance_embeds`
    in its configuration) and has no use for a negative prompt. Any other has classifier-free guidance as
    Stable Diffusion has, which its pipelines call true CFG and do only where there is a negative prompt too.

    Args:
        pipeline: from text, with a U-Net or a transformer.
        prompt: one, or one for each picture.
        negative_prompt: likewise; None is an empty one.
        guidance_scale: up to 1 is off; None is the pipeline's default.

    Returns:
        Keyword arguments of the pipeline's call: those for what was given, and, where its text encoder takes
        fewer tokens than it would pad prompts to, `max_sequence_length`.

    Raises:
        SceneError: there is a negative prompt, and the pipeline takes none.
    """
    arguments: dict[str, Any] = {"prompt": prompt}
    parameters = call_parameters(type(pipeline))
    if negative_prompt is not None and "negative_prompt" in parameters:
        arguments["negative_prompt"] = negative_prompt
    elif any(negative_prompt or ()):  # Flux2
        kind = type(pipeline).__name__
        raise SceneError(f"negative_prompt: expected none for {kind}, got {shown(negative_prompt)}")
    if guidance_scale is not None:
        distilled = denoiser_config(pipeline).get("guidance_embeds")
        true_cfg = "true_cfg_scale" in parameters and not distilled
        arguments["true_cfg_scale" if true_cfg else "guidance_scale"] = guidance_scale
        if true_cfg and negative_prompt is None:
            arguments["negative_prompt"] = "" if isinstance(prompt, str) else [""] * len(prompt)
    if (padded := _padded_length(pipeline)) is not None:
        arguments["max_sequence_length"] = padded
    return arguments


def repeatable_call(
    pipeline: Any, *, generator: torch.Generator | Sequence[torch.Generator] | None = None, **arguments: Any
) -> Any:
    """Call a pipeline so that equal generators and arguments give equal pictures.

    Args:
        pipeline: any that takes a generator.
        generator: one, or one for each picture, which then does not depend on the others of the call; None
            leaves noise to torch's global generator.
        **arguments: of the call.

    Returns:
        What the pipeline returns.
    """
    with repeatable(pipeline, generator):
        return pipeline(**arguments, generator=generator)


@contextmanager
def repeatable(
    pipeline: Any, generator: torch.Generator | Sequence[torch.Generator] | None
) -> Iterator[None]:
    """Inside, a call of the pipeline with this generator is repeatable.

    cuDNN computes by deterministic kernels. A flow-matching scheduler that adds noise at every step
    (`stochastic_sampling` in its configuration) draws it from the generator too; the stock pipelines give
    such schedulers none, and the noise would come from torch's global generator.
    """
    scheduler: Any = getattr(pipeline, "scheduler", None)
    stochastic = generator is not None and getattr(scheduler, "config", {}).get("stochastic_sampling", False)
    stochastic = stochastic and "step" not in vars(scheduler)  # of a call around this one
    if stochastic:
        scheduler.step = partial(scheduler.step, generator=generator)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        if stochastic:
            del scheduler.step


def text_limits(pipeline: Any) -> list[tuple[Any, int]]:
    """The tokenizers that have to take a whole prompt, and how many tokens of it the pipeline lets through.

    Beside T5, CLIP reads the beginning alone, as is usual with Flux and SD3: there only T5 counts.
    """
    if (padded := _padded_length(pipeline)) is not None:
        return [(_tokenizers(pipeline)[-1], padded)]
    return [(one, one.model_max_length) for one in _tokenizers(pipeline) if one is not None]


def denoiser_config(pipeline: Any) -> dict[str, Any]:
    """The configuration of a pipeline's U-Net or transformer."""
    return cast(Any, denoiser_of(pipeline)).config


def _padded_length(pipeline: Any) -> int | None:
    """To how many tokens the last text encoder's prompts are padded or cut, where the call decides it."""
    argument = call_parameters(type(pipeline)).get("max_sequence_length")
    last = _tokenizers(pipeline)[-1]
    if argument is None or argument.default is None or last is None:
        return None
    return min(argument.default, last.model_max_length)


def _tokenizers(pipeline: Any) -> list[Any]:
    """Those that the pipeline's class has; None for one that was not loaded."""
    return [getattr(pipeline, name) for name in TOKENIZERS if hasattr(pipeline, name)]
