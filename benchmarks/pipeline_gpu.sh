#!/usr/bin/env bash
# Pipelines beside torch's own and FSDP2 on this machine's GPUs, over all of them, one set a call. Prints tables; files go to $OUT.
#   bash benchmarks/pipeline_gpu.sh tests|smoke|ours|peers|variants ...
# ours and peers both measure torch's 1F1B, the library's 1f1b and zbv, and FSDP2, so that each stands alone. Each set ends by itself after
# its minutes, with a table of what was measured by then. DATE is written into the reports.
. benchmarks/on_gpus.sh

# FSDP2 holds the activations of 4 sequences of 4096 beside its part of the states on 4 GPUs, and not on 2.
FSDP2=$([ "$GPUS" -ge 4 ] && echo fsdp2-z3 || echo fsdp2-z3+micro=2)
llama() { # name, contestants, more options
  local name=$1 contestants=$2
  shift 2
  compare pipeline_vs_peers.py 8 "$GPUS" --name "$name-$GPUS-gpus" --row-seconds 200 --contestants "$contestants" "$@"
}

for set in "$@"; do
  echo "== $set"
  case $set in
    tests) timeout -k 10 540 python3 -m pytest -q -m gpu -p no:cacheprovider --rootdir "$PWD" packages/colossal-pipeline/tests/gpu 2>&1 \
      | tail -n 60 ;;
    smoke) compare pipeline_vs_peers.py 4 "$GPUS" --model llama-1b --name pipeline-smoke --warmup-steps 2 --timed-steps 3 --row-seconds 100 \
      --contestants "pp-1f1b,pp-zbv,torch-pp-1f1b,torch-pp-zbv+compile=false,pp-interleaved,pp-zb-h1,fsdp2-z3" ;;
    ours) llama pipeline-ours "pp-1f1b,pp-zbv,torch-pp-1f1b,$FSDP2,pp-interleaved,pp-zb-h1" ;;
    peers) llama pipeline-peers "torch-pp-1f1b,pp-1f1b,torch-pp-interleaved,torch-pp-zbv+compile=false,pp-zbv,$FSDP2,pp-zbv+compile=false" ;;
    variants) llama pipeline-variants "pp-zbv,pp-zb-h2,pp-dualpipev,pp-1f1b+micro=2,pp-interleaved+chunks=4" --timed-steps 4 ;;
    *) echo "no such set: $set"; exit 2 ;;
  esac
done
