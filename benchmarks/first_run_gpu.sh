#!/usr/bin/env bash
# The first run on a machine with two GPUs, and the tests that need them. Prints tables; files go to $OUT.
#   bash benchmarks/first_run_gpu.sh
set -uo pipefail
OUT=${OUT:-runs/gpu}
mkdir -p "$OUT"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
echo "== tests on GPUs"
python3 -m pytest -q -m gpu -p no:cacheprovider --rootdir "$PWD" packages/*/tests/gpu 2>&1 | tail -n 25
echo "== the example, 1 and 2 GPUs, one YAML"
python3 benchmarks/first_run.py examples/pretrain_stdlib.yaml --processes 1 2 --out "$OUT/example" > "$OUT/example.log" 2>&1
tail -n 4 "$OUT/example.log"
echo "== 1.1B Llama, bf16, compiled blocks, sequence 2048, stages 0 and 1"
BIG='model={architecture: llama, config: {hidden_size: 2048, intermediate_size: 5632, num_hidden_layers: 20, num_attention_heads: 16, num_key_value_heads: 16, max_position_embeddings: 2048}}'
for stage in 0 1; do
  python3 benchmarks/first_run.py examples/pretrain_stdlib.yaml --processes 1 2 --out "$OUT/big-$stage" --set "$BIG" \
    --set precision=bf16 --set data.sequence_length=2048 --set batch.global_size=16 --set batch.micro_size=8 --set train.num_steps=30 \
    --set train.eval_every_steps=0 --set train.eval_num_batches=1 --set checkpoint.every_steps=0 --set optimizer.lr=3.0e-4 \
    --set compile.enabled=true --set parallel.zero.stage=$stage > "$OUT/big-$stage.log" 2>&1
  echo "stage $stage"
  tail -n 4 "$OUT/big-$stage.log"
done
