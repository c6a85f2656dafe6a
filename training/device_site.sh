# Sourced from the repository's root: lays the package out for a bare machine that has torch, transformers and
# accelerate, with the wheels of the folder WHEELS (diffusers), and puts it on PYTHONPATH.
site=build/on_device
rm -rf "$site" && mkdir -p "$site"
cp -R interactdiff "$site/"
cp -R app pipelines training "$site/interactdiff/"
if [ -n "${WHEELS:-}" ]; then
	python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$WHEELS"/*.whl
fi
export PYTHONPATH="$PWD/$site" PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE
