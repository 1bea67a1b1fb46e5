#!/usr/bin/env bash
# Options of the first run that need GPUs, a few steps each, and the collectives of this machine.
#   bash benchmarks/gpu_smoke.sh
set -uo pipefail
OUT=${OUT:-runs/gpu}
mkdir -p "$OUT"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
echo "== tests on GPUs"
python3 -m pytest -q -m gpu -p no:cacheprovider --rootdir "$PWD" packages/*/tests/gpu 2>&1 | tail -n 40
SMALL='model={architecture: llama, config: {hidden_size: 512, intermediate_size: 1408, num_hidden_layers: 8, num_attention_heads: 8, num_key_value_heads: 8, max_position_embeddings: 1024, attention_dropout: 0.0}}'
try() {
  local name=$1
  shift
  timeout 150 python3 -m colossal_launch train examples/pretrain_stdlib.yaml --processes 2 --set "$SMALL" --set data.sequence_length=1024 \
    --set train.num_steps=30 --set train.eval_every_steps=0 --set train.eval_num_batches=2 --set checkpoint.every_steps=0 \
    --set checkpoint.directory="$OUT/shared" --set optimizer.lr=1.0e-3 --set checkpoint.resume=true "$@" > "$OUT/$name.log" 2>&1
  echo "$name: status $?: $(grep -E 'held-out|error' "$OUT/$name.log" | tail -n 1) | $(grep -E '^step 30/30' "$OUT/$name.log" | tail -n 1)"
  rm -rf "$OUT/shared/checkpoints" "$OUT/shared/metrics.jsonl"
}
try bf16 --set precision=bf16
try bf16-compile --set precision=bf16 --set compile.enabled=true
try bf16-recompute --set precision=bf16 --set recompute.mode=full
try bf16-selective-compile --set precision=bf16 --set recompute.mode=selective --set compile.enabled=true
try fp16 --set precision=fp16
try fp32-stage0 --set precision=fp32 --set parallel.zero.stage=0
try bf16-gpt2-dropout --set precision=bf16 --set 'model={architecture: gpt2, config: {n_embd: 512, n_layer: 8, n_head: 8}}'
echo "== collectives, 2 GPUs"
timeout 120 python3 -m colossal_launch bench comm --processes 2 --max-bytes 268435456 2>&1 | tail -n 60
python3 -m colossal_launch doctor 2>&1 | head -n 40
