"""Tiny pipelines of the newer bases with random weights: real classes, nothing to fetch."""

import json
import tempfile
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_dit import TEXT_LENGTH, shaken, tiny_vae
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from interactdiff.training.tokenizer import make_t5_tokenizer

WIDTH = 12  # of the text encoders' hidden states
LAYERS = (1, 2, 3)  # that Flux2 reads
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
)
SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
make: Any = diffusers


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Spells words letter by letter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
        (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = cast(Any, Qwen2Tokenizer)(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def tiny_chroma() -> Any:
    torch.manual_seed(0)
    transformer = make.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6), approximator_num_channels=8,
        approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    tokenizer = make_t5_tokenizer(TEXT_LENGTH)
    shape = {"d_model": WIDTH, "d_kv": 6, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return make.ChromaPipeline(
        scheduler=scheduler(), vae=tiny_vae(), tokenizer=tokenizer, transformer=shaken(transformer, 0),
        text_encoder=T5EncoderModel(T5Config(vocab_size=len(tokenizer), **shape)).eval(),
    )  # fmt: skip


def flux2_transformer(**options: Any) -> Any:
    shape: dict[str, Any] = {"in_channels": 16, "num_layers": 1, "num_single_layers": 2}
    shape |= {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 3 * WIDTH}
    shape |= {"timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)}
    return shaken(make.Flux2Transformer2DModel(**shape | options), 1)


def flux2_vae() -> Any:
    torch.manual_seed(2)
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    return make.AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=down, up_block_types=up, norm_num_groups=4,
        latent_channels=4, sample_size=32, layers_per_block=1,
    ).eval()  # fmt: skip


def tiny_klein() -> Any:
    tokenizer = qwen_tokenizer()
    torch.manual_seed(3)
    return make.Flux2KleinPipeline(
        scheduler=scheduler(), vae=flux2_vae(), tokenizer=tokenizer,
        text_encoder=Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), head_dim=8, **SHAPE)).eval(),
        transformer=flux2_transformer(guidance_embeds=False),
    )  # fmt: skip


def tiny_flux2() -> Any:
    """Flux2 dev, with guidance inside the transformer; its prompts come as embeddings."""
    tokenizer = qwen_tokenizer()
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 16, "patch_size": 8, "model_type": "pixtral"}
    text = {"vocab_size": len(tokenizer), "model_type": "mistral", "head_dim": 8, **SHAPE}
    torch.manual_seed(4)
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(vision_config=vision, text_config=text))
    return make.Flux2Pipeline(
        scheduler=scheduler(), vae=flux2_vae(), tokenizer=tokenizer, text_encoder=encoder.eval(),
        transformer=flux2_transformer(),
    )  # fmt: skip


def tiny_qwen() -> Any:
    tokenizer = qwen_tokenizer()
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": WIDTH}
    rope = {"type": "mrope", "mrope_section": [1, 1, 1]}
    text = {"vocab_size": len(tokenizer), "rope_scaling": rope, **SHAPE}
    torch.manual_seed(5)
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    vae = make.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip
    transformer = make.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return make.QwenImagePipeline(
        scheduler=scheduler(), vae=vae, text_encoder=encoder.eval(), tokenizer=tokenizer,
        transformer=shaken(transformer, 6),
    )  # fmt: skip


def tiny_z_image() -> Any:
    tokenizer = qwen_tokenizer()
    torch.manual_seed(7)
    encoder = Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), head_dim=8, **SHAPE)).eval()
    transformer = make.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
    )  # fmt: skip
    return make.ZImagePipeline(
        scheduler=scheduler(), vae=tiny_vae(), text_encoder=encoder, tokenizer=tokenizer,
        transformer=shaken(transformer, 8),
    )  # fmt: skip


BASES = {
    "Chroma": tiny_chroma,
    "Flux2 dev": tiny_flux2,
    "Flux2 klein": tiny_klein,
    "Qwen-Image": tiny_qwen,
    "Z-Image": tiny_z_image,
}
if not hasattr(diffusers, "Flux2KleinPipeline"):  # the lowest version that is promised has none
    del BASES["Flux2 klein"]
GUIDED: dict[str, dict[str, Any]] = {
    "Chroma": {"guidance_scale": 3.0, "negative_prompt": "a bike"},
    "Flux2 dev": {"guidance_scale": 3.0},
    "Flux2 klein": {"guidance_scale": 3.0},
    "Qwen-Image": {"true_cfg_scale": 3.0, "negative_prompt": "a bike"},
    "Z-Image": {"guidance_scale": 3.0, "negative_prompt": "a bike"},
}


def tiny_base(name: str) -> Any:
    pipeline = BASES[name]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipe: Any, prompts: list[str] | None = None, size: tuple[int, int] = (32, 32), **arguments: Any
) -> Tensor:
    """Pictures' latents, each from noise of its own."""
    prompts = prompts or ["a dog"]
    generators = [torch.Generator().manual_seed(n) for n in range(len(prompts))]
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "prompt": prompts}
    if isinstance(arguments.get("negative_prompt"), str):
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(prompts)
    if type(pipe).__name__ == "ChromaPipeline":
        options["max_sequence_length"] = TEXT_LENGTH
    if "Flux2" in type(pipe).__name__:
        options |= {"text_encoder_out_layers": LAYERS, "max_sequence_length": 64}
    if type(pipe).__name__ == "Flux2Pipeline":
        options |= {"prompt": None, "prompt_embeds": embeddings(pipe, prompts)}
        options.pop("text_encoder_out_layers")
    options |= arguments
    return pipe(height=size[0], width=size[1], generator=generators, **options).images


@torch.no_grad()
def embeddings(pipe: Any, prompts: list[str]) -> Tensor:
    """Three layers' hidden states side by side, as Flux2 dev reads them of its encoder."""
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
    return torch.cat([states[layer] for layer in LAYERS], -1)
