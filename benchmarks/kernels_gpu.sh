#!/usr/bin/env bash
# The kernels on this machine's GPU: tests, the benchmark of every op beside its peers, settings of kernels, and whole training steps.
#   bash benchmarks/kernels_gpu.sh tests|two-gpus|sanitizer|ceilings|warm|bench-norms|bench-gates|bench-losses|bench-experts|bench-fp8|
#                                  bench-optimizers|bench-cpu|sweep-OP|llama|llama-compiled|gpt2 ...
# Each set ends by itself: minutes (expected, at most): tests (4, 8), two-gpus (2, 4), sanitizer (3, 7), warm (2, 5), bench-FAMILY (1.5, 4
# each after warm; 3 without), sweep-OP (2, 4), llama, llama-compiled and gpt2 (4, 7.5 each). Files go to $OUT. DATE is written into reports.
. benchmarks/on_gpus.sh
python3 - <<'PYTHON' || exit 1
from importlib.metadata import entry_points
assert "kernels" in entry_points(group="colossal.plugins").names, "no wheel announces colossal-kernels"
PYTHON
# What is compiled is kept between the sets of a machine.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/colossal-inductor} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/colossal-triton}
GPU_TESTS=packages/colossal-kernels/tests/gpu

tests() { # seconds, files, then options
  local seconds=$1 files=$2
  shift 2
  # shellcheck disable=SC2086 # several files
  timeout -k 10 "$seconds" python3 -m pytest -q -m gpu -p no:cacheprovider -p no:benchmark --rootdir "$PWD" $files "$@" 2>&1 | tail -n 60
}

bench() { # family, minutes, ops
  local family=$1 minutes=$2
  shift 2
  timeout -k 10 "$(python3 -c "print(int(60 * $minutes + 60))")" python3 -m colossal_launch bench kernels "$@" --minutes "$minutes" \
    --json "$OUT/kernels-$family.json" > "/tmp/kernels-$family.md" 2>> "$OUT/kernels.log"
  echo "status $?"
  cat "/tmp/kernels-$family.md" >> "$OUT/kernels.md" # few files: so many come back from a lent machine
  # The ceilings, then what follows the table: the table and the formulas are in the file.
  sed -n '1,2p' "/tmp/kernels-$family.md"
  grep -E '^(no time left|stopped)|: (none of ours|[a-z_]+ [0-9.e+-]+ ms|[0-9.]+ x the fastest)' "/tmp/kernels-$family.md"
  grep -E '^\| [^|]* \| [^|]* \| [A-Za-z]*(Error|Exception)' "/tmp/kernels-$family.md"
  [ -s "/tmp/kernels-$family.md" ] || tail -n 15 "$OUT/kernels.log"
}

end_to_end() { # name, then options
  local name=$1
  shift
  compare end_to_end_kernels.py 7 1 --name "end-to-end-$name" --row-seconds 120 "$@"
}

for set in "$@"; do
  echo "== $set"
  case $set in
    tests)
      tests 330 "$GPU_TESTS/test_ops_on_gpu.py $GPU_TESTS/test_experts_on_gpu.py $GPU_TESTS/test_optimizers_on_gpu.py $GPU_TESTS/test_wide_rows_on_gpu.py $GPU_TESTS/test_losses_on_gpu.py" --numprocesses 8
      tests 150 $GPU_TESTS/test_large_on_gpu.py ;;
    two-gpus) tests 240 $GPU_TESTS/test_ops_on_gpu.py -k not_the_current_one ;;
    sanitizer) # every allocation is CUDA's own, so that what is read behind a tensor is seen
      for tool in memcheck racecheck; do
        echo "-- $tool"
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 10 210 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 \
          python3 -m pytest -q -m gpu -p no:cacheprovider -p no:benchmark --rootdir "$PWD" $GPU_TESTS/test_ops_on_gpu.py -k runs_once \
          > "$OUT/sanitizer-$tool.log" 2>&1
        echo "status $?"
        grep -E 'ERROR SUMMARY|Invalid|hazard|passed|failed|rror' "$OUT/sanitizer-$tool.log" | tail -n 20
      done ;;
    ceilings) timeout -k 10 120 python3 -m colossal_launch bench kernels rms_norm --minutes 0 ;;
    warm) timeout -k 10 300 python3 -m colossal_kernels.bench.warm --processes 6; echo "status $?" ;;
    bench-norms) bench norms 4 rms_norm layer_norm add_rms_norm add_layer_norm rms_norm_fp8 ;;
    bench-gates) bench gates 4 rotary swiglu geglu packed_swiglu packed_geglu merge_attention ;;
    bench-losses) bench losses 4 cross_entropy vocabulary_statistics vocabulary_gradient linear_cross_entropy ;;
    bench-experts) bench experts 4 route expert_order expert_permute expert_unpermute grouped_matmul experts ;;
    bench-fp8) bench fp8 4 quantize_fp8 scaled_matmul fp8_linear quantize_blocks dequantize_blocks_sum ;;
    bench-optimizers) bench optimizers 4 adamw_step lion_step sgd_step symmetric_product ;;
    bench-cpu) bench cpu 2 --device cpu ;;
    sweep-*) timeout -k 10 270 python3 -m colossal_kernels.bench.sweep "${set#sweep-}" --minutes 4 --json "$OUT/$set.json"; echo "status $?" ;;
    llama) end_to_end llama-1b --model llama-1b --micro-batches 8 ;;
    llama-compiled) end_to_end llama-1b-compiled --model llama-1b --micro-batches 8 --compile yes --contestants \
      "fsdp2-z2,zero1+ops=plain,zero1,zero1+ops=rms_norm/add_rms_norm,zero1+ops=rms_norm/add_rms_norm/rotary/swiglu" ;;
    gpt2) end_to_end gpt2-1.5b --model gpt2-1.5b --micro-batches 16 ;;
    *) echo "no such set: $set"; exit 2 ;;
  esac
done
