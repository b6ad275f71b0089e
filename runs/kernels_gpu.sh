#!/usr/bin/env bash
# Every GPU kernel on this machine: checked, then timed against the roofline and what else can be had; then training.
#
#   runs/kernels_gpu.sh [OUT]            OUT: where the tables go (default: out/kernels_gpu)
#
# Needs an NVIDIA GPU and an installed nanochat (pip install -e ., or make venv). Takes about ten minutes on an H200,
# besides the peers: mamba-ssm and causal-conv1d are compiled here (up to BUILD_MINUTES, needs nvcc and the network),
# fla is fetched, each into OUT/peers and not into your environment. A peer that cannot be built is left out, with a
# word; peers that are installed already are used as they are.
#
# Variables and their defaults:
#   PEERS="causal-conv1d mamba-ssm fla-core"   what to build or fetch; empty: nothing
#   BUILD_MINUTES=20                           for each of them
#   TOKENS=32768                               of a call of a kernel
#   NANOCHAT_PEER=                             a checkout of karpathy/nanochat: its training step beside ours
#   PATTERNS="transformer mamba mamba2 hybrid" of the d12 models that are trained
#   PYTHON=.venv/bin/python                    the interpreter
set -euo pipefail

if [ $# -gt 1 ]; then
    sed -n '2,20s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
out=${1:-out/kernels_gpu}
case $out in /*) ;; *) out=$PWD/$out ;; esac
cd "$(dirname "$0")/.."
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
python=${PYTHON:-$python}
say() { printf '\n== %s\n' "$*"; }

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: $python sees no GPU: install a torch with CUDA, or set PYTHON" >&2
    exit 1
fi
mkdir -p "$out/peers"
export MAMBA_KEEP_CUDA_BUILD=TRUE # newer sources of mamba-ssm leave its S6 kernel out otherwise
export PYTHONPATH="$out/peers${PYTHONPATH:+:$PYTHONPATH}"

for package in ${PEERS-causal-conv1d mamba-ssm fla-core}; do
    module=${package//-/_}
    if [ "$package" = fla-core ]; then module=fla; fi
    if "$python" -c "import $module" 2> /dev/null; then continue; fi
    say "$package into $out/peers"
    if ! timeout "${BUILD_MINUTES:-20}m" "$python" -m pip install --no-build-isolation --no-deps --target "$out/peers" \
        "$package" einops ninja packaging > "$out/$package.log" 2>&1; then
        echo "$package is left out: $(tail -n 1 "$out/$package.log") (all of it: $out/$package.log)"
    fi
done

say "what runs here, each kernel checked on this GPU"
"$python" -m nanochat doctor --device cuda 2>&1 | tee "$out/doctor.txt"

say "kernels"
"$python" -m benchmarks.kernels --tokens "${TOKENS:-32768}" 2>&1 | tee "$out/kernels.txt"

say "training d12"
read -r -a patterns <<< "${PATTERNS:-transformer mamba mamba2 hybrid}"
peer=()
if [ -n "${NANOCHAT_PEER:-}" ]; then peer=(--peer "$NANOCHAT_PEER"); fi
"$python" -m benchmarks.train --shape d12 --device cuda --dtypes bfloat16 --compile --patterns "${patterns[@]}" \
    ${peer[@]+"${peer[@]}"} 2>&1 | tee "$out/train.txt"

say "the tables for dev/LOG.md are in $out: doctor.txt, kernels.txt, train.txt"
