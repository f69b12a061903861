#!/usr/bin/env bash
# One whole run: train, release, evaluate. It goes on from the folder's newest checkpoint, so that a run longer than the
# machine is to be had needs the same line again. Exit status 124: LIMIT has passed, what was learnt is saved, call
# again. An evaluation begins anew with every call: choose --segments so that it fits into one. Paths are from the
# project's folder.
#
#   [LIMIT=SECONDS] training/run.sh FOLDER TEST_TEXT TRAINING_ARGUMENTS... [-- EVALUATION_ARGUMENTS...]
#   LIMIT=540 training/run.sh runs/base test.raw.xz --config training/configs/base.yaml \
#     --override training/configs/one-card.yaml data.dataset_name=train.txt -- --validation valid.txt \
#     --segments 200 --batch-size 100
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,10s/^# \?//p' "$0" >&2; exit 2; }
if [ -n "${LIMIT:-}" ]; then
    limit=$LIMIT
    unset LIMIT
    exec timeout --foreground "$limit" "$0" "$@"
fi
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
folder=$1 text=$2 training=()
shift 2
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    training+=("$1")
    shift
done
[ $# = 0 ] || shift # the line between the two

newest() {
    find "$folder" -maxdepth 1 -name 'checkpoint_epoch_*' | sed -n 's/.*_step_\([0-9]\+\)\.pt$/\1 &/p' |
        sort -n | tail -n 1 | cut -d ' ' -f 2-
}

# A signal ends the stage that is under way, and then the script. SIGINT reaches both, which are one group. SIGTERM may
# be for the script alone, so it is passed on, as SIGINT, at which every stage ends in order. A second one is not.
stop() {
    stopped=$1
    kill -s "$2" "${!-}" 2>/dev/null || exit "$stopped"
}
stopped=
trap 'stop 130 0' INT
trap 'trap : TERM; stop 143 INT' TERM
stage() {
    env --default-signal=INT,QUIT "$PYTHON" -m "$@" & # in the foreground, bash would hear of signals when it has ended
    while kill -s 0 $! 2>/dev/null; do
        wait $! || true
    done
    wait $! || exit
    [ -z "$stopped" ] || exit "$stopped"
}

mkdir -p "$folder"
resumed=$(newest)
stage training "${training[@]}" ${resumed:+--checkpoint "$resumed"} \
    "output.checkpoint_dir=$folder" "output.log_dir=$folder/logs"
stage training.release --checkpoint "$(newest)" --output "$folder/release.pt"
stage training.evaluate --checkpoint "$folder/release.pt" --text "$text" --output "$folder/evaluation" "$@"
