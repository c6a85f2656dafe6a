#!/usr/bin/env bash
# Trains every model of stickworld on one CUDA GPU within some minutes, from a bare machine that has torch,
# transformers and accelerate; wheels of what it lacks (diffusers) are read from the folder WHEELS, if given.
#
#   WHEELS=.whl bash training/on_device.sh --minutes 9 --out DIR [--start DIR] [--again base dit]
#
# --start is a folder with files that an earlier call wrote: models in them are taken as they are, those named
# by --again are trained on. `--install DIR` puts the models of such files into the package instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

site=build/on_device
rm -rf "$site" && mkdir -p "$site"
cp -R interactdiff "$site/"
cp -R app pipelines training "$site/interactdiff/"
if [ -n "${WHEELS:-}" ]; then
	python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$WHEELS"/*.whl
fi
export PYTHONPATH="$PWD/$site" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE
exec "${PYTHON:-python3}" -m interactdiff.training.on_device "$@"
