#!/usr/bin/env bash
# Proves that the compose project does what it promises, step by step, in three to six minutes.
#
#   deploy/check.sh          checks the running project, or starts one of its own and takes it down again
#
# Needs Docker and nothing else. It floods, restarts and kills the server: not for one that others are using.
set -euo pipefail
cd "$(dirname "$0")/.."

LIMIT_SECONDS=${LIMIT_SECONDS:-900}
NAME=check-$$  # of the model that is trained here
began=$SECONDS
texts=$(mktemp -d)
own= board=

compose() { docker compose "$@"; }
say() { printf '%4ds  %-9s %s\n' $((SECONDS - began)) "$1" "$2"; }
fail() { say FAILED "$1"; exit 1; }
no() { echo "$1"; return 1; }
step() {  # NAME COMMAND...: one line of what it came to; all of what it said if it failed
    local name=$1 said status
    shift
    set +e  # as the left side of ||, a step would go on after its first failure
    said=$(set -e; "$@" 2>&1)
    status=$?
    set -e
    if [ $status != 0 ]; then
        printf '%s\n' "$said" | tail -n 30
        fail "$name"
    fi
    say ok "$name: $(printf '%s\n' "$said" | tail -n 1)"
}
container() { compose ps -q service; }
network() { docker inspect -f '{{range $name, $_ := .NetworkSettings.Networks}}{{$name}}{{end}}' "$(container)"; }
beside() {  # FILE: a part of the check, in a container of the server's image on the project's network
    local image
    image=$(docker inspect -f '{{.Image}}' "$(container)")
    docker run --rm --network "$(network)" --read-only --tmpfs /tmp --cap-drop ALL -e RDT_API_KEY \
        -v "$PWD/deploy:/deploy:ro" --entrypoint python "$image" "/deploy/check/$1"
}
inside() { compose exec -T service python - < "deploy/check/$1"; }
digest() {
    compose exec -T service python -c "
import os, urllib.request as u
asked = u.Request('http://127.0.0.1:8000/model', headers={'X-API-Key': os.environ.get('RDT_API_KEY', '')})
print(__import__('json').load(u.urlopen(asked, timeout=10))['digest'])"
}
trained() { compose run --rm -T --entrypoint sha256sum trainer "/models/$NAME/best_model.pt" | cut -d ' ' -f 1; }
until_true() {  # SECONDS COMMAND...
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 1
    done
}
cleanup() {
    local status=$?
    trap - EXIT
    kill "$watchdog" 2> /dev/null || true
    if [ -n "$own" ]; then
        compose --profile training down -v -t 5 > /dev/null 2>&1 || true
    else
        compose up -d --no-build service > /dev/null 2>&1 || true  # with its own model again
        [ -n "$board" ] || compose rm -sf tensorboard > /dev/null 2>&1 || true
        compose run --rm -T --entrypoint rm trainer -rf "/models/$NAME" "/logs/$NAME" > /dev/null 2>&1 || true
    fi
    rm -rf "$texts"
    if [ $status = 0 ]; then say passed "all steps"; else say FAILED "status $status"; fi
    exit $status
}

files() {
    compose --profile gpu --profile gpu-training --profile training config -q
    compose --profile gpu config --format json | grep -q '"capabilities"' || no "no GPU is asked for"
    compose --profile '*' config --services | sort | tr '\n' ' '
}
ports() {
    local published
    published=$(docker ps -q --filter "network=$(network)" | xargs docker inspect -f \
        '{{range .NetworkSettings.Ports}}{{range .}}{{.HostIp}}:{{.HostPort}} {{end}}{{end}}' | tr '\n' ' ')
    case " $published" in *" 0.0.0.0:"* | *" :::"*) no "published to everybody: $published" ;; esac
    echo "published: $published"
}
rules() {
    compose exec -T prometheus promtool check config /etc/prometheus/rdt/prometheus.yml
    compose exec -T prometheus promtool test rules /etc/prometheus/rdt/alerts_test.yml
    echo "promtool: the configuration and its rules are valid, the tests of the alerts pass"
}
restart_under_load() {
    beside load.py > "$texts/load" 2>&1 &
    local load=$! status=0
    sleep 5
    compose restart service
    wait $load || status=$?
    cat "$texts/load"
    return $status
}
started_again() {
    [ "$(docker inspect -f '{{.RestartCount}} {{.State.Health.Status}}' "$(container)")" = "$1 healthy" ]
}
killed() {
    local count
    count=$(docker inspect -f '{{.RestartCount}}' "$(container)")
    inside kill.py || true  # ends with the container
    until_true 60 started_again $((count + 1)) || no "it has not come back"
    beside ask.py
    echo "started $((count + 1)) times by its restart policy, ready again"
}
build() {
    compose build -q trainer
    docker image ls --format '{{.Repository}}:{{.Tag}} {{.Size}}' rdt | sort | tr '\n' ' '
}
train() {  # SEED
    compose run --rm -T trainer "seed=$1" "name=$NAME" \
        training.num_steps=6 training.batch_size=2 data.max_seq_length=32 output.eval_batches=1
    echo "wrote /models/$NAME/best_model.pt, sha256 $(trained)"
}
show_board() {
    compose up -d --no-build --wait --wait-timeout 90 tensorboard
    until_true 60 has_run || no "the run is not on the board"
    echo "TensorBoard shows the run"
}
has_run() {
    compose exec -T tensorboard python -c "
import urllib.request as u
raise SystemExit(b'$NAME' not in u.urlopen('http://127.0.0.1:6006/data/runs', timeout=5).read())"
}
counted() { compose exec -T prometheus promtool query instant http://127.0.0.1:9090 "$1" | grep -q '=>'; }
serves() { [ "$(digest)" = "$1" ]; }
serve_trained() {
    local want
    want=$(trained)
    RDT_CHECKPOINT=/models/$NAME/best_model.pt compose up -d --no-build --wait --wait-timeout 90 service
    serves "$want" || no "GET /model says $(digest): want $want"
    beside ask.py
    echo "GET /model says $want"
}
reload() {
    local started
    started=$(docker inspect -f '{{.State.StartedAt}}' "$(container)")
    train 1
    compose kill -s HUP service
    until_true 60 serves "$(trained)" || no "GET /model still says $(digest)"
    [ "$(docker inspect -f '{{.State.StartedAt}}' "$(container)")" = "$started" ] || no "it was started anew"
    until_true 30 counted 'rdt_model_reloads_total{outcome="swapped"} == 1' \
        || no "Prometheus has not counted it"
    echo "after SIGHUP GET /model says $(digest), in the same process; Prometheus counted it"
}
serve_as_before() {
    compose up -d --no-build --wait --wait-timeout 90 service
    serves "$before" || no "GET /model says $(digest): want $before"
    echo "GET /model says $before again"
}

(
    while [ $((SECONDS - began)) -lt "$LIMIT_SECONDS" ]; do sleep 1; done
    echo "not done after $LIMIT_SECONDS s"
    kill -TERM $$
) &
watchdog=$!
trap cleanup EXIT
trap 'exit 1' INT TERM

chmod 755 "$texts"
cp README.md "$texts/text.txt"
export TRAIN_NAME=$NAME TRAIN_TEXTS=$texts TRAIN_DATA=/data/text.txt
if [ -z "$(container)" ]; then
    own=yes
    export COMPOSE_PROJECT_NAME=rdt-check
    say start "a project of its own"
    compose up -d --build --wait --wait-timeout 180 service prometheus > /dev/null 2>&1 || fail "it does not come up"
fi
board=$(compose ps -q tensorboard)
key=$(compose exec -T service sh -c 'printf %s "$RDT_API_KEY"')  # it may come from .env
[ -z "$key" ] || export RDT_API_KEY=$key
before=$(digest)

step files files
step ports ports
step confined inside confined.py
step rules rules
step ask beside ask.py
step traffic beside traffic.py
step panels beside panels.py
step restart restart_under_load
step killed killed
step build build
step train train 0
step board show_board
step serve serve_trained
step reload reload
step as-before serve_as_before
