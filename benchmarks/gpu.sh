#!/usr/bin/env bash
# Everything that wants a card, in under eight minutes, on a machine that has torch, numpy and tokenizers and no more
# (the tests want pytest, the figures of training PyYAML, TensorBoard and tqdm). What a part prints is in $OUT as well;
# a part that fails or takes too long loses only what it had not printed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
export PYTHONPATH=. PYTHONUNBUFFERED=1
mkdir -p "$OUT"
failed=()

part() { # NAME SECONDS ARGUMENTS...
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    timeout "$seconds" "$PYTHON" "$@" 2>&1 | tee "$OUT/$name.log" || failed+=("$name")
}

part machine 30 -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'
part tests 70 -m pytest -c /dev/null --rootdir=. -p no:cacheprovider -q tests/gpu
part agreement 70 -m benchmarks.gpu --models models/rdt-small/best_model.pt --workloads "$@"
part ladder-rdt-small 60 -m benchmarks.gpu --models models/rdt-small/best_model.pt --agreement 0 "$@"
part ladder-base 75 -m benchmarks.gpu --models base --agreement 0 "$@"
part ladder-large 110 -m benchmarks.gpu --models large --agreement 0 "$@"
part training 60 -m benchmarks.training --steps 20 training.batch_size=64
echo "failed or not finished: ${failed[*]:-none}"
[ ${#failed[@]} = 0 ]
