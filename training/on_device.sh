#!/usr/bin/env bash
# Trains every model of stickworld on one CUDA GPU within some minutes, from a bare machine that has torch,
# transformers and accelerate; wheels of what it lacks (diffusers) are read from the folder WHEELS, if given.
#
#   pip download --no-deps --dest .whl diffusers==0.42.1      # elsewhere, and carried along
#   WHEELS=.whl bash training/on_device.sh --minutes 9 --out DIR [--from-package] [--start DIR] [--again base dit]
#
# --from-package takes the package's autoencoder, CLIP text encoder and detector as they are. --start is a folder
# with files that an earlier call wrote: models in them are taken as they are, those named by --again are trained on.
# `--install DIR` puts the models of such files into the package instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source training/device_site.sh
exec "${PYTHON:-python3}" -m interactdiff.training.on_device "$@"
