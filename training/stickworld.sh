#!/usr/bin/env bash
# Makes every model of stickworld on CPU cores or one GPU, in order, by the recipes as they stand:
# `bash training/stickworld.sh` from the repository's root. What was cut off goes on where it stopped. The models
# come to lie in runs/. On a GPU with few minutes, `training/on_device.sh` does the same within a given time.
set -euo pipefail

train() {
	.venv/bin/interactdiff train "training/configs/$1.yaml" --resume_from_checkpoint latest --set "${@:2}"
}

# The autoencoder and the text encoders, which read before anything is drawn. Those of the packaged
# transformer are taken in their place after `mkdir -p runs/parts && cp -R
# interactdiff/stickworld/models/stickworld-dit/{vae,text_encoder,tokenizer,text_encoder_2,tokenizer_2} runs/parts`.
[ -d runs/parts/vae ] || train stickworld_vae seed=0 steps=1400 export_to=runs/parts/vae
[ -d runs/parts/text_encoder ] || train stickworld_text seed=3 export_to=runs/parts
[ -d runs/parts/text_encoder_2 ] || train stickworld_t5 seed=4 export_to=runs/parts
mkdir -p runs/stickworld runs/stickworld-dit
cp -R runs/parts/{vae,text_encoder,tokenizer} runs/stickworld/
cp -R runs/parts/{vae,text_encoder,tokenizer,text_encoder_2,tokenizer_2} runs/stickworld-dit/

# What the bases' latents are read by, in a loss beside that of denoising.
train stickworld_latent_reader seed=0

# What scores the pictures; it has seen renders only, half of them through the autoencoder.
train stickworld_detector seed=2 "autoencoders=[runs/parts/vae]"

# The bases, on captions; then what is attached to them. The transformer teaches the U-Net.
train stickworld_dit seed=5
train stickworld_dit_interaction seed=1
train stickworld_base seed=0 teacher=runs/stickworld-dit
train stickworld_interaction seed=1
train distill_clear_stickworld seed=6

# What draws a person or an object of one picture, in both.
[ -d runs/stickworld-subjects ] ||
	.venv/bin/interactdiff data convert stickworld 0:24000 runs/stickworld-subjects --subjects 2
train stickworld_image_tower seed=0
train stickworld_subject seed=2
train stickworld_dit_subject seed=2
