#!/usr/bin/env bash
# Your own text, all the way: tokenizer, base, mid, SFT, evaluation, report, one question.
#
#   runs/real_text.sh DIR [RUN]          e.g. runs/real_text.sh ~/texts mine
#
# DIR: a directory (or one file) of txt, md, rst, jsonl, parquet and manual pages, searched at any depth;
# DIR?on_error=skip passes over what is damaged or not UTF-8, and FILE.txt?val=tail10 keeps the last 10% of one file for
# validation. RUN: name of the run (default: real_text). A second call goes on where it stopped.
#
# Chats come from the public GSM8K, ARC and MMLU files in $NANOCHAT_SHARED (default ../shared/data) where these are
# (gsm8k/train.jsonl, gsm8k/test.jsonl, arc/ARC-*-test.jsonl, mmlu/test.jsonl), else from the embedded tiny world. Of
# ARC and MMLU only test rows are at hand: four in five are trained on, every fifth is kept for the evaluation.
#
# The defaults suit a laptop CPU. Variables and their defaults:
#   DEPTH=4 PATTERN=hybrid VOCAB=8192 SEQ=512 BATCH=8    the model, and rows a step
#   MINUTES=10 MID_MINUTES=3 SFT_MINUTES=3               of training
#   PROBLEMS=200                                         problems of each task to evaluate
#   PROMPT="..." FLAGS="..."                             the question; more flags for every training stage
#   NANOCHAT=.venv/bin/nanochat                          the program
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    sed -n '4,22s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
data=$1
case $data in /*) ;; *) data=$PWD/$data ;; esac
run=${2:-real_text}
cd "$(dirname "$0")/.."

out=${NANOCHAT_OUT:-out}
shared=${NANOCHAT_SHARED:-../shared/data}
depth=${DEPTH:-4} pattern=${PATTERN:-hybrid} vocab=${VOCAB:-8192} seq=${SEQ:-512} batch=${BATCH:-8}
minutes=${MINUTES:-10} mid_minutes=${MID_MINUTES:-3} sft_minutes=${SFT_MINUTES:-3}
problems=${PROBLEMS:-200}
prompt=${PROMPT:-"Natalia has 3 boxes with 4 pens each. How many pens does she have?"}
read -r -a flags <<< "${FLAGS:-}"

nanochat=nanochat
if [ -x .venv/bin/nanochat ]; then nanochat=.venv/bin/nanochat; fi
nanochat=${NANOCHAT:-$nanochat}
say() { printf '\n== %s\n' "$*"; }

split_rows() { # NAME FILE: four rows in five to NAME-train.jsonl, every fifth to NAME-eval.jsonl
    mkdir -p "$out/$run/data"
    awk 'NR % 5 != 0' "$2" > "$out/$run/data/$1-train.jsonl"
    awk 'NR % 5 == 0' "$2" > "$out/$run/data/$1-eval.jsonl"
}

train_tasks=() eval_tasks=()
if [ -f "$shared/gsm8k/train.jsonl" ]; then
    train_tasks+=("gsm8k:split=train,path=$shared/gsm8k/train.jsonl")
    eval_tasks+=("gsm8k:split=test,path=$shared/gsm8k/test.jsonl")
fi
for subset in ARC-Easy ARC-Challenge; do
    if [ -f "$shared/arc/$subset-test.jsonl" ]; then
        split_rows "$subset" "$shared/arc/$subset-test.jsonl"
        train_tasks+=("arc:subset=$subset,path=$out/$run/data/$subset-train.jsonl")
        eval_tasks+=("arc:subset=$subset,path=$out/$run/data/$subset-eval.jsonl")
    fi
done
if [ -f "$shared/mmlu/test.jsonl" ]; then
    split_rows mmlu "$shared/mmlu/test.jsonl"
    train_tasks+=("mmlu:path=$out/$run/data/mmlu-train.jsonl")
    eval_tasks+=("mmlu:path=$out/$run/data/mmlu-eval.jsonl")
fi
if [ ${#train_tasks[@]} -eq 0 ]; then
    echo "no GSM8K, ARC or MMLU files in $shared: chats come from the tiny world (set NANOCHAT_SHARED to change that)"
    train_tasks=("world-qa:known=200" "world-unanswerable:known=200" "world-chat:known=200")
    eval_tasks=("world-qa:known=200,part=heldout")
fi

common=(--run "$run" --device_batch_size "$batch" --sequence_len "$seq" ${flags[@]+"${flags[@]}"})

if [ ! -d "$out/$run/tokenizer" ]; then
    say "tokenizer: $vocab tokens from $data"
    "$nanochat" tok_train --run "$run" --data "$data" --vocab_size "$vocab"
fi
say "base: $pattern, depth $depth, $minutes minutes"
"$nanochat" base_train "${common[@]}" --data "$data" --depth "$depth" --pattern "$pattern" --max_minutes "$minutes"
say "mid: text and chats, $mid_minutes minutes"
"$nanochat" mid_train "${common[@]}" --data "$data" --tasks "${train_tasks[@]}" --max_minutes "$mid_minutes"
say "SFT: chats, $sft_minutes minutes"
"$nanochat" chat_sft "${common[@]}" --tasks "${train_tasks[@]}" --max_minutes "$sft_minutes"
say "evaluation"
"$nanochat" base_eval --run "$run" --data "$data"
"$nanochat" chat_eval --run "$run" --tasks "${eval_tasks[@]}" --max_problems "$problems" --controls
"$nanochat" report --run "$run"
say "$prompt"
"$nanochat" chat_cli --run "$run" -p "$prompt" --max_tokens 100
say "talk to it with: $nanochat chat_cli --run $run"
