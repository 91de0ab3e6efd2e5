#!/usr/bin/env bash
# A real pretrained model through `misa train` and `misa eval`: sums before and after, four ways of training, one page.
#
#   bash bench/train_then_evaluate.sh OUTPUT        # about 80 minutes on one core; a killed call goes on where it was
#
# BASE=DIR (default: fetched into OUTPUT), STEPS=120, LIMIT=150 problems, SEED=0, FAMILY=chain_sum of reasoning-gym.
# Each method trains at the learning rate that was best for it in bench/results/learning/real, MISA at a third of it, too.
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,8p' "$0"; exit 2; }
output=$1
base=${BASE:-$output/smollm2-135m}
family=${FAMILY:-chain_sum}
mkdir -p "$output"
[ -e "$base/config.json" ] || misa fetch smollm2-135m "$base"
problems=$output/$family.jsonl
[ -e "$problems" ] || misa eval --tasks "reasoning:$family" --training_problems "$problems"

train() {  # NAME OPTION...: unless its weights are there
    [ -e "$output/$1/model.safetensors" ] || misa train --model "$base" --dataset "$problems" --output_dir "$output/$1" \
        --dtype float32 --delta 0.12 --inner_steps 2 --max_steps "${STEPS:-120}" --per_device_train_batch_size 8 \
        --max_length 96 --save_strategy no --lr_scheduler_type cosine --seed "${SEED:-0}" --overwrite_output_dir "${@:2}"
}
train misa --learning_rate 3e-4
train misa-slow --learning_rate 1e-4
train misa-none --learning_rate 7.5e-4 --rest none
train adamw --learning_rate 1e-4 --optimizer adamw

misa eval "$output"/{misa,misa-slow,misa-none,adamw} --base "$base" --tasks "reasoning:$family,reasoning:basic_arithmetic,forgetting" \
    --limit "${LIMIT:-150}" --output "$output/evaluation"
