# What the recipes for a GPU share (sourced by rag_gpu.sh and refrag_gpu.sh in the project's directory, with $run set): the
# interpreter, `train`, and the stages from the tokenizer to SFT. Their variables stand in the scripts that source this.
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
