#!/usr/bin/env bash
# The tables of docs/performance.md for one CUDA GPU, and the tests that need one, within some minutes, from a
# bare machine that has torch, transformers and accelerate; wheels of what it lacks (diffusers) are read from the
# folder WHEELS, if given. Each part has its own share of the time and writes as it goes.
#
#   WHEELS=.whl bash benchmarks/on_device.sh OUT [MINUTES]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$(realpath -m "${1:?the folder that the tables are written to}")
seconds=$((${2:-8} * 60))
mkdir -p "$out"

source training/device_site.sh
python=${PYTHON:-python3}

part() { # NAME PERCENT COMMAND...: at most that share of the time
	local name=$1 share=$2
	shift 2
	echo "== $name: $*"
	timeout "$((seconds * share / 100))" "$@" >"$out/$name.txt" 2>&1
	echo "exit code $? after ${SECONDS} s in all"
	tail -n 40 "$out/$name.txt"
}
bench() { # NAME PERCENT ARGUMENTS...
	part "$1" "$2" "$python" -m interactdiff bench "${@:3}"
}

part tests 18 "$python" -m pytest -q -rs -p no:cacheprovider tests/test_cuda.py tests/test_clear_attention.py tests/test_joint.py
bench clear 22 clear --dtype bfloat16 --grids 64,128,256,512 --windows 8,16,32 --text 512 --heads 24 --dim 128 --rounds 3
bench interaction 25 interaction --base sd15 sdxl --dtype bfloat16 --rounds 3
bench flux 15 joint --dtype bfloat16 --grids 64,128 --rounds 3
bench flux_512 15 joint --dtype bfloat16 --grids 512 --rounds 1 --blocks 1,1
"$python" -m interactdiff doctor >"$out/doctor.txt" 2>&1
echo "${SECONDS} s in all"
