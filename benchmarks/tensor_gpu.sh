#!/usr/bin/env bash
# Tensor parallelism beside FSDP2 and torch's DTensor styles on this machine's GPUs, one set a call. Prints tables; files go to $OUT.
#   bash benchmarks/tensor_gpu.sh tests|smoke|tp|variants|tp2gpus|matmul|estimate ...
# tp and variants are for 4 GPUs, tp2gpus for 2 (of as many as there are). Each set ends by itself after its minutes, with a table of what
# was measured by then. DATE is written into the reports.
. benchmarks/on_gpus.sh

for set in "$@"; do
  echo "== $set"
  case $set in
    tests) timeout -k 10 540 python3 -m pytest -q -m gpu -p no:cacheprovider --rootdir "$PWD" packages/colossal-tensor/tests/gpu 2>&1 \
      | tail -n 60 ;;
    smoke) compare tensor_vs_peers.py 4 "$GPUS" --model llama-1b --name tensor-smoke --micro-batches 2 --warmup-steps 2 --timed-steps 3 --profile ours \
      --contestants fsdp2-z3,tp2-zero3,tp2-zero3+overlap=plain,tp2-zero1+sequence_parallel=false,torch-tp2,torch-tp2-async --memory-estimate ;;
    tp) compare tensor_vs_peers.py 7.5 "$GPUS" --model llama-8b-4096 --name tensor-llama-8b --micro-batches 2 --warmup-steps 3 --timed-steps 8 --profile ours \
      --contestants fsdp2-z3,tp4,tp2-zero3,torch-tp4-async,torch-tp2-async,torch-tp4,torch-tp2,tp4+overlap=plain,tp2-zero3+overlap=plain,tp2-zero1,zero3 ;;
    variants) compare tensor_vs_peers.py 7.5 "$GPUS" --model llama-8b-4096 --name tensor-llama-8b-variants --micro-batches 2 --warmup-steps 3 --timed-steps 7 \
      --profile ours --memory-estimate --contestants fsdp2-z3,tp4+sequence_parallel=false,tp4+micro=4,tp2-zero3+sequence_parallel=false,tp2-zero1+overlap=plain,tp2-zero1+sequence_parallel=false,tp4,tp2-zero3,tp4+micro=4+overlap=plain,torch-tp4-async+loss=eager ;;
    tp2gpus) compare tensor_vs_peers.py 7.5 2 --model llama-8b-4096 --name tensor-llama-8b-2-gpus --micro-batches 2,4 --warmup-steps 3 --timed-steps 7 \
      --profile tp2,tp2+overlap=plain --contestants fsdp2-z3,tp2,torch-tp2-async,torch-tp2,tp2+overlap=plain,tp2+sequence_parallel=false,zero3 ;;
    matmul)
      for processes in 2 4; do
        [ "$processes" -le "$GPUS" ] || continue
        timeout -k 10 120 python3 benchmarks/tensor_matmul.py --processes "$processes" --samples "$((2 * processes))"
        echo "status $?"
      done ;;
    estimate) compare tensor_vs_peers.py 4 "$GPUS" --model llama-1b --name tensor-estimate --micro-batches 4 --warmup-steps 3 --timed-steps 3 --memory-estimate \
      --contestants tp2-zero1,tp2-zero3,tp2-zero3+sequence_parallel=false --recompute none,full --compile yes,no ;;
    *) echo "no such set: $set"; exit 2 ;;
  esac
done
