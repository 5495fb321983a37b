#!/usr/bin/env bash
# All that wants a GPU, one part after the other, whatever becomes of the parts before. Builds nothing: `make gpu-check` does,
# and calls this.
#
#   GPU_TESTS          the program of the tests in this folder
#   GREENROOM_COMMAND  the `greenroom` command
#   GPU_PYTHON         a Python that has vLLM for CUDA, Greenroom's wheel and pytest; empty: no real vLLM
#   FIGURES            folder for the figures (default: benches/results)
#   LOG                file for what the parts say (default: target/gpu-check.log)
#   PARTS              which parts (default: doctor tests copies vllm demo)
set -uo pipefail
cd "$(dirname "$0")/../.."
# Taken once: the figures themselves change the checkout.
GREENROOM_COMMIT=${GREENROOM_COMMIT:-$(git describe --always --abbrev=40 --dirty --exclude='*' 2>/dev/null || echo unknown)}
export GREENROOM_COMMAND GREENROOM_COMMIT REQUIRE_GPU=1 GPU_PYTHON=${GPU_PYTHON:-}
FIGURES=$(realpath -m "${FIGURES:-benches/results}")
LOG=${LOG:-target/gpu-check.log}
PARTS=${PARTS:-doctor tests copies vllm demo}

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader --id=0 | tr 'A-Z ' 'a-z-' | sed 's/^nvidia-//; s/^geforce-//')
mkdir -p "$FIGURES" "$(dirname "$LOG")"
: >"$LOG"
table=
failed=0

# part NAME LIMIT_S COMMAND...
part() {
  local name=$1 limit=$2 start=$SECONDS rc=0 before
  shift 2
  if [[ " $PARTS " != *" $name "* ]]; then return; fi
  echo "== $name: $*" | tee -a "$LOG"
  before=$(wc -l <"$LOG")
  timeout --kill-after=10 "$limit" "$@" >>"$LOG" 2>&1 || rc=$?
  # What a part says at its end is its summary.
  tail -n +$((before + 1)) "$LOG" | tail -n 12
  table+=$(printf '%-8s %4d s  %s' "$name" $((SECONDS - start)) "$([ $rc = 0 ] && echo passed || echo "FAILED ($rc)")")$'\n'
  # Bars are reported and fail nothing: they are for quiet machines.
  table+=$(tail -n +$((before + 1)) "$LOG" | grep -E '^bar |^(met|NOT met) |"bar":' | sed -E 's/.*"bar": "([^"]*)".*/\1/; s/^/           /')$'\n'
  [ $rc = 0 ] || failed=1
}

# Problems that doctor sees are the user's, not this check's: it ends with 1 then.
part doctor 30 bash -c '"$GREENROOM_COMMAND" doctor || [ $? = 1 ]'
part tests 240 "$GPU_TESTS" --test-threads=1 --nocapture
part copies 600 "$GREENROOM_COMMAND" bench copy --engine cuda --json "$FIGURES/copy-$gpu.json" --svg "$FIGURES/copy-$gpu.svg"
if [ -n "$GPU_PYTHON" ]; then
  export PYTHONPATH=$PWD/tests/python${PYTHONPATH:+:$PYTHONPATH} GPU_RESULTS=$FIGURES/vllm-$gpu.json
  part vllm 600 "$GPU_PYTHON" -m pytest tests/python/gpu -p no:cacheprovider -v
  part demo 600 "$GPU_PYTHON" -m demo --cuda --out "$FIGURES"
  for kind in json svg; do
    if [ -e "$FIGURES/demo.$kind" ]; then mv "$FIGURES/demo.$kind" "$FIGURES/demo-$gpu.$kind"; fi
  done
else
  table+=$'vllm, demo: left out, GPU_PYTHON names no Python with vLLM for CUDA\n'
fi
echo
printf '%s' "$table" | grep -v '^$'
exit $failed
