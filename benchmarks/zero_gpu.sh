#!/usr/bin/env bash
# Data parallelism beside DDP and FSDP2 on this machine's GPUs, one set a call. Prints tables; files go to $OUT.
#   bash benchmarks/zero_gpu.sh smoke|gpt2|llama|llama-stages|muon|muon-forms|estimate ...
# Each set ends by itself after its minutes, with a table of what was measured by then. DATE is written into the reports.
. benchmarks/on_gpus.sh

for set in "$@"; do
  echo "== $set"
  case $set in
    smoke) compare zero_vs_peers.py 4 "$GPUS" --model llama-1b --name smoke --micro-batches 4 --contestants ddp,fsdp2-z3,fsdp2-z2,zero1,zero2,zero3,zero3-keep \
      --warmup-steps 2 --timed-steps 3 --profile zero1,zero3 --memory-estimate ;;
    gpt2) compare zero_vs_peers.py 8.5 "$GPUS" --model gpt2-1.5b --micro-batches 32,8 --contestants ddp,fsdp2-z3,fsdp2-z2,zero1,zero2,zero3,zero3-keep \
      --profile zero1,zero2,zero3 --memory-estimate ;;
    llama) compare zero_vs_peers.py 7.5 "$GPUS" --model llama-8b --micro-batches 1,2 --contestants fsdp2-z3,fsdp2-z2,zero2,zero3,zero3-keep \
      --warmup-steps 3 --timed-steps 8 --profile zero3,fsdp2-z3 --memory-estimate ;;
    llama-stages) compare zero_vs_peers.py 7.5 "$GPUS" --model llama-8b --name llama-stages --micro-batches 2,1 --contestants fsdp2-z2,zero1,zero2 \
      --warmup-steps 3 --timed-steps 7 --profile zero1,zero2 ;;
    muon) compare zero_vs_peers.py 5 "$GPUS" --model llama-1b --name muon --micro-batches 8,16 --contestants zero1,zero3 --optimizers adamw,muon ;;
    muon-forms) timeout -k 10 240 python3 benchmarks/muon_forms.py; echo "status $?" ;;
    estimate) compare zero_vs_peers.py 4 "$GPUS" --model gpt2-1.5b --name estimate --micro-batches 8 --contestants zero1,zero3 --recompute none,full \
      --compile yes,no --warmup-steps 3 --timed-steps 3 --memory-estimate ;;
    *) echo "no such set: $set"; exit 2 ;;
  esac
done
