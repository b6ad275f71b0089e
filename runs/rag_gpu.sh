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
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
python=${PYTHON:-$python}
device=${DEVICE:-cuda}
say() { printf '\n== %s\n' "$*"; }

if [ "$device" = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: $python sees no GPU: install a torch with CUDA, or set PYTHON" >&2
    exit 1
fi
out=${NANOCHAT_OUT:-out}
world="seed=0,known=${KNOWN:-2000},new=8000"
shown=${SHOWN:-8}
nproc=${NPROC:-1}
read -r -a flags <<< "${FLAGS:-}"
train() { # COMMAND FLAGS...: on all GPUs (without the --, torchrun would take --run for a flag of its own)
    local common=(--run "$run" --device "$device" "${@:2}" ${flags[@]+"${flags[@]}"})
    if [ "$nproc" -gt 1 ]; then
        "$python" -m torch.distributed.run --standalone --nproc_per_node="$nproc" -m "scripts.$1" -- "${common[@]}"
    else
        "$python" -m nanochat "$1" "${common[@]}"
    fi
}
rows=(--device_batch_size 32 --sequence_len 512)
long=(--device_batch_size 8 --sequence_len 2048)

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
