#!/usr/bin/env bash
# Makes every packaged model of stickworld again, in the order and with the settings of the packaged ones:
# `bash training/stickworld.sh` from the repository's root, some eight hours on two CPU cores. What was cut off
# goes on where it stopped. The models come to lie in runs/.
set -euo pipefail

train() {
	.venv/bin/interactdiff train "training/configs/stickworld_$1.yaml" --resume_from_checkpoint latest --set "${@:2}"
}

# The autoencoder, in three stages of less and less noise.
train vae output_dir=runs/vae1 export_to=runs/vae1/made seed=0 learning_rate=1.5e-3
train vae output_dir=runs/vae2 export_to=runs/vae2/made seed=10 init_from=runs/vae1/made \
	steps=4500 stop_at=3010 warmup_steps=100 learning_rate=1.0e-3 latent_noise=0.07
train vae output_dir=runs/vae3 seed=20 init_from=runs/vae2/made \
	steps=1600 stop_at=759 learning_rate=7.0e-4 latent_noise=0.07

train text seed=3
train base seed=0
train interaction seed=1 steps=3000 stop_at=300
train interaction seed=1

# The diffusion transformer reads with the text encoder of the U-Net base and one of its own, and draws for the
# same autoencoder; then the layers for its windows, and its adapter.
mkdir -p runs/stickworld-dit
cp -R runs/stickworld/{vae,text_encoder,tokenizer} runs/stickworld-dit/
train t5 seed=4
train dit seed=5
train_clear() {
	.venv/bin/interactdiff train "training/configs/distill_clear_stickworld$1.yaml" \
		--resume_from_checkpoint latest --set seed=6 "${@:2}"
}
train_clear ""
train_clear _down_4
train_clear _down_4 output_dir=runs/clear-more init_from=runs/stickworld-dit-clear-down-4 \
	export_to=runs/stickworld-dit-clear-more seed=7 steps=2200 ema_decay=0.998 mixed_precision=bf16 \
	"data={folder: runs/cache/self-generated, pictures: 2400, prompts: null, size: 96, steps: 20, guidance_scale: 3.0, batch_size: 32}"
train dit_interaction seed=1 \
	"adapter={max_interactions: 4, hidden: 112, token_dim: 192, parts: 4, structured: false, action_region: between, init: open}"

# What scores the pictures; it has seen renders only.
train detector seed=2
