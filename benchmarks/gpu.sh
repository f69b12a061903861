#!/usr/bin/env bash
# Everything that wants a card, in under eight minutes, on a machine that has torch, numpy and tokenizers and no more
# (the tests want pytest, the figures of training PyYAML, TensorBoard and tqdm). What a part prints is in $OUT as well;
# a part that fails or takes too long loses only what it had not printed; those of benchmarks.* say it all again as JSON.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
export PYTHONPATH=. PYTHONUNBUFFERED=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 # whatever else is installed there
mkdir -p "$OUT"
failed=()
trap 'exit 130' INT

part() { # NAME SECONDS ARGUMENTS...: five of the seconds are for saying where it was
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    # In the foreground, or Ctrl-C would not reach it.
    timeout --foreground -s INT -k 5 $((seconds - 5)) "$PYTHON" "$@" 2>&1 | tee "$OUT/$name.log" || failed+=("$name")
}

# The first has nothing in the disk's cache yet.
part machine 70 -c 'import sys, torch; print(sys.version, torch.__version__)
if sys.version_info < (3, 11): sys.exit("Python 3.11 or newer is wanted")
if not torch.cuda.is_available(): sys.exit("torch finds no card: nothing is measured")
print(torch.cuda.get_device_name())'
[ ${#failed[@]} = 0 ] || exit 1 # without a card the minutes below would go to figures of a CPU
part tests 45 -m pytest -c /dev/null --rootdir=. -p no:cacheprovider -q tests/gpu
part agreement 65 -m benchmarks.gpu --models models/rdt-small/best_model.pt --workloads "$@"
part ladder-rdt-small 60 -m benchmarks.gpu --models models/rdt-small/best_model.pt --agreement 0 "$@"
part ladder-base 90 -m benchmarks.gpu --models base --agreement 0 "$@"
part ladder-large 95 -m benchmarks.gpu --models large --agreement 0 --requests 2048 "$@"
workers=$(nproc) # a step takes less time than one process needs to draw its batches
part training 50 -m benchmarks.training --steps 20 training.batch_size=64 data.pin_memory=true \
    "data.num_workers=$((workers < 32 ? workers : 32))" # hundreds take long to start
echo "failed or not finished: ${failed[*]:-none}"
[ ${#failed[@]} = 0 ]
