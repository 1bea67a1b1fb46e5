# What the benchmarks on GPUs share; sourced, not run. Sets OUT, PYTHONPATH and GPUS, and defines `compare`.
set -uo pipefail
OUT=${OUT:-runs/gpu}
mkdir -p "$OUT"
if [ -d .whl ] && [ ! -d /tmp/site ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl || exit 1
fi
# The wheels announce the plugins and bring what is not installed; the code that runs is the working tree's.
PYTHONPATH=$(printf '%s:' "$PWD"/packages/*/src)/tmp/site
export PYTHONPATH
python3 - <<'PYTHON' || exit 1
from importlib.metadata import entry_points
found = sorted({entry.name for entry in entry_points(group="colossal.plugins")})
missing = {"comm", "pipeline", "tensor", "zero"} - set(found)
assert not missing, f"no wheel announces {sorted(missing)}: found {found}"
PYTHON
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | sort | uniq -c
GPUS=$(nvidia-smi --query-gpu=index --format=csv,noheader | wc -l)

compare() { # script, minutes, processes, then options; ends by itself after the minutes
  local script=$1 minutes=$2 processes=$3
  shift 3
  timeout -k 10 "$(python3 -c "print(int(60 * $minutes + 45))")" python3 "benchmarks/$script" --processes "$processes" --minutes "$minutes" \
    --date "${DATE:-}" --out "$OUT" "$@"
  echo "status $?"
}
