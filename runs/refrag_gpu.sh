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
#   KNOWN=2000                             entities that the model is pretrained on
#   FLAGS="..."                            more flags for every training stage
#   NPROC=1 DEVICE=cuda                    GPUs; cpu tries it out
#   PYTHON=.venv/bin/python                the interpreter
set -euo pipefail

if [ $# -gt 1 ]; then
    sed -n '2,16s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
run=${1:-refrag_gpu}
cd "$(dirname "$0")/.."
source runs/stages.sh

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
    "$python" -m nanochat rag_eval --run "$run" --device "$device" --mode refrag --source "$stage" --questions "$fresh" --hops 2 3 \
        --max_hops 3 --hop_k 3 --max_tokens 160
done
"$python" -m nanochat report --run "$run"
echo "curves and traces: $out/$run/refrag/log.jsonl and traces.jsonl"
