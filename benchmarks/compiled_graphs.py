"""How many graphs torch.compile makes of a denoiser for varied requests, with adapters and without.

    python benchmarks/compiled_graphs.py --how compile repeated

docs/compatibility.md has the table. Graphs are counted, and run as they are, on the packaged
U-Net and transformer.
"""

import argparse
import logging
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch._dynamo.exc import FailOnRecompileLimitHit

from interactdiff import Interaction, InteractionAdapter, attach
from interactdiff.commands.arguments import quiet_libraries
from interactdiff.stickworld import model_path

RIDE = Interaction("person in blue", "riding", "red bike", (0.32, 0.06, 0.68, 0.68), (0.23, 0.58, 0.77, 0.95))
BALL = Interaction("person", "holding", "red ball", (0.1, 0.3, 0.4, 0.9), (0.3, 0.5, 0.5, 0.7))
PROMPTS = ["a person", "a bike"]
REQUESTS: dict[str, tuple[list[Any], dict[str, Any], dict[str, Any]]] = {
    "exact": ([RIDE], {}, {}),
    "fast": ([RIDE], {"fast": True}, {}),
    "a schedule that falls": ([RIDE], {"schedule": (0.3, 0.4, 0.3)}, {}),
    "two interactions": ([RIDE, BALL], {}, {}),
    "no scene": ([], {}, {}),
    "without guidance": ([RIDE], {}, {"guided": False}),
    "two prompts, one with a scene": ([[RIDE], []], {}, {"prompt": PROMPTS}),
    "two prompts, fast": ([[RIDE], [BALL]], {"fast": True}, {"prompt": PROMPTS}),
    "wider": ([RIDE], {}, {"size": (96, 128)}),
    "higher and wider, fast": ([RIDE], {"fast": True}, {"size": (128, 160)}),
    "exact again": ([RIDE], {}, {}),
}


def session(model: str, how: str, attached: bool) -> list[int | None]:
    """The graphs that there are after each request; None from where recompiling was given up."""
    pipe: Any = DiffusionPipeline.from_pretrained(model_path(model))
    pipe.set_progress_bar_config(disable=True)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    graphs: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    handle = None
    if attached:
        handle = attach(pipe, InteractionAdapter.from_pretrained(model_path(f"{model}-interaction")))
    compile_ = denoiser.compile if how == "compile" else denoiser.compile_repeated_blocks
    compile_(fullgraph=True, backend=count)
    seen: list[int | None] = []
    for scene, options, request in REQUESTS.values():
        if handle is not None:
            handle.set_scene(scene, **options)
        try:
            draw(pipe, **request)
            seen.append(len(graphs))
        except FailOnRecompileLimitHit:
            seen.append(None)
    return seen


def draw(pipe: Any, prompt: Any = "a person", guided: bool = True, size: tuple[int, int] = (96, 96)) -> None:
    """One picture of three steps, of which fast control reuses the last."""
    scale = 3.0 if guided else 1.0
    options: dict[str, Any] = {"guidance_scale": scale}
    if hasattr(pipe, "transformer"):
        options = {"true_cfg_scale": scale, "negative_prompt": [""] * len(prompt) if guided else None}
        options["negative_prompt"] = "" if guided and isinstance(prompt, str) else options["negative_prompt"]
        options["max_sequence_length"] = pipe.tokenizer_2.model_max_length
    pipe(prompt, height=size[0], width=size[1], num_inference_steps=3, output_type="latent", **options)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["stickworld", "stickworld-dit"])
    parser.add_argument("--how", nargs="+", choices=["compile", "repeated"], default=["compile"])
    args = parser.parse_args()
    quiet_libraries()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    for model in args.models:
        for how in args.how:
            columns = [session(model, how, attached) for attached in (False, True)]
            print(f"| {model}, {how} | alone | with an adapter |\n|---|---|---|")
            for number, name in enumerate(REQUESTS):
                cells = ("over the limit" if c[number] is None else str(c[number]) for c in columns)
                print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
