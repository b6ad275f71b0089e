#!/usr/bin/env bash
# RAG on a GPU: a d12 model learns to answer from eight documents, and is asked about a world of 100,000 of them.
#
#   runs/rag_gpu.sh [RUN]                RUN: name of the run (default: rag_gpu). A second call goes on where it stopped.
#
# Needs an NVIDIA GPU and an installed nanochat with the rag extra. One to three hours on one card is a guess: nobody has
# measured it. The world that is searched at the end is one that no stage has seen. Variables and their defaults:
#   DEPTH=12 PATTERN=alternate VOCAB=4096  the model
#   KNOWN=2000                             entities that the model is pretrained on
#   BASE=4000 MID=2000 SFT=300 RAG=8000    optimizer steps of the stages
#   DOCUMENTS=100000 SHOWN=8               new entities of the world that is searched; documents a prompt
#   QUESTIONS=1000                         of each kind: answerable, and not
#   RETRIEVER=bm25                         how to search: simple, bm25, dense or hybrid (vectors are made on the CPU)
#   FLAGS="..."                            more flags for every training stage
#   NPROC=1 DEVICE=cuda                    GPUs; cpu tries it out
#   PYTHON=.venv/bin/python                the interpreter
set -euo pipefail

if [ $# -gt 1 ]; then
    sed -n '2,18s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
run=${1:-rag_gpu}
cd "$(dirname "$0")/.."
source runs/stages.sh
shown=${SHOWN:-8}

say "answering from $shown documents"
train rag_finetune "${long[@]}" --source sft --contexts "seed=1,n=2000000,documents=$shown,questions=12" \
    --top_k "$shown" --num_iterations "${RAG:-8000}"

say "a world of ${DOCUMENTS:-100000} documents that nobody has seen"
questions=${QUESTIONS:-1000}
"$python" -m nanochat rag_eval --run "$run" --device "$device" --source rag --top_k "$shown" \
    --questions "world:seed=1,known=10,new=${DOCUMENTS:-100000}" --retriever_type "${RETRIEVER:-bm25}" \
    --max_problems "$questions" --max_unanswerable "$questions"
"$python" -m nanochat report --run "$run"
echo "the table for dev/LOG.md: $out/$run/rag_eval_rag.json"
