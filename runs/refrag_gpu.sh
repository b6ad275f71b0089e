#!/usr/bin/env bash
# REFRAG on a GPU: a d12 model learns to search a tiny world of 100,000 documents in up to three hops.
#
#   runs/refrag_gpu.sh [RUN]             RUN: name of the run (default: refrag_gpu). A second call goes on where it stopped.
#
# Needs an NVIDIA GPU and an installed nanochat with the rag extra. Two to four hours on one card is a guess: nobody has
# measured it. The world that is searched at the end is one that no stage has seen. Variables and their defaults:
#   DEPTH=12 PATTERN=alternate VOCAB=4096  the model
#   BASE=4000 MID=2000 SFT=300 RAG=6000    optimizer steps of the stages before
#   WARM=4000 RL=300                       of the supervised stage and of reinforcement learning
#   DOCUMENTS=100000                       new entities of the world that is searched
#   NPROC=1                                GPUs
#   PYTHON=.venv/bin/python                the interpreter
set -euo pipefail

if [ $# -gt 1 ]; then
    sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
run=${1:-refrag_gpu}
cd "$(dirname "$0")/.."
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
python=${PYTHON:-$python}
say() { printf '\n== %s\n' "$*"; }

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: $python sees no GPU: install a torch with CUDA, or set PYTHON" >&2
    exit 1
fi
out=${NANOCHAT_OUT:-out}
world="seed=0,known=2000,new=8000"
nproc=${NPROC:-1}
train() { # COMMAND FLAGS...: on all GPUs (without the --, torchrun would take --run for a flag of its own)
    if [ "$nproc" -gt 1 ]; then
        "$python" -m torch.distributed.run --standalone --nproc_per_node="$nproc" -m "scripts.$1" -- --run "$run" "${@:2}"
    else
        "$python" -m nanochat "$1" --run "$run" "${@:2}"
    fi
}
rows=(--device_batch_size 32 --sequence_len 512)
long=(--sequence_len 2048 --device_batch_size 8)

if [ ! -d "$out/$run/tokenizer" ]; then
    say "tokenizer"
    "$python" -m nanochat tok_train --run "$run" --data "world:$world,wordings=20" --vocab_size "${VOCAB:-4096}"
fi
say "base, mid and SFT"
train base_train "${rows[@]}" --data "world:$world,wordings=60,dialogues=0.1" --depth "${DEPTH:-12}" \
    --pattern "${PATTERN:-alternate}" --num_iterations "${BASE:-4000}"
chats=(--tasks "world-qa:$world,wordings=4,style=sentence" "world-chat:$world,n=2000,style=sentence")
train mid_train "${rows[@]}" --data "world:$world,wordings=60" "${chats[@]}" --num_iterations "${MID:-2000}"
train chat_sft "${rows[@]}" "${chats[@]}" --num_iterations "${SFT:-300}"
say "reading documents"
train rag_finetune "${long[@]}" --source sft --contexts "n=2000000,documents=5,questions=12" --top_k 5 \
    --num_iterations "${RAG:-6000}"
say "searching: supervised, then by reward"
train refrag_finetune "${long[@]}" --contexts entities=1000,per_world=32 --max_hops 3 --top_k 3 \
    --warm_start_steps "${WARM:-4000}" --warm_start_rows 8 --num_iterations "${RL:-300}" --n_prompts 64 --n_samples 8 \
    --max_rows 256 --max_tokens 160 --lr_scale 0.05 --kl 0.001 --minibatches 2

say "a world of ${DOCUMENTS:-100000} documents that nobody has seen"
fresh="world:seed=1,known=10,new=${DOCUMENTS:-100000}"
for stage in refrag_sft refrag; do
    "$python" -m nanochat rag_eval --run "$run" --mode refrag --source "$stage" --questions "$fresh" --hops 2 3 \
        --max_hops 3 --hop_k 3 --max_tokens 160
done
"$python" -m nanochat report --run "$run"
echo "curves and traces: $out/$run/refrag/log.jsonl and traces.jsonl"
