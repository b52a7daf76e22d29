#!/usr/bin/env bash
# Runs deskrl on one Docker host by docker compose (or docker-compose 1.29). docs/launch-compose.md goes with it.
# Usage: CERTIFICATES=FOLDER deploy/compose/launch.sh build|start|scale|drain|roll|stop CONFIG
#   build  makes the images                 start  starts every role         scale  brings the actors to desktop.num_envs
#   drain  ends the actors                  roll   replaces what has another image or configuration, actors last
#   stop   removes every container; what was learnt stays in RUNS, and start resumes it
# COMPOSE_FILE may name further files after compose.yaml, such as compose.gpu.yaml.
set -euo pipefail
refuse() {
    echo "launch.sh: $1" >&2
    exit 2
}
here=$(dirname "$(realpath "$0")")
(($# == 2)) || refuse "usage: CERTIFICATES=FOLDER launch.sh build|start|scale|drain|roll|stop CONFIG"
command=$1 RUN_CONFIG=$(realpath -m "$2") CERTIFICATES=$(realpath -m "${CERTIFICATES:-certificates}")
RUNS=$(realpath -m "${RUNS:-runs}")
COMPOSE_FILE=${COMPOSE_FILE:-$here/compose.yaml}
COMPOSE_PROJECT_NAME=${COMPOSE_PROJECT_NAME:-deskrl}
export RUN_CONFIG CERTIFICATES RUNS COMPOSE_FILE COMPOSE_PROJECT_NAME
[ -f "$RUN_CONFIG" ] || refuse "$RUN_CONFIG: no such file; name a run configuration"
[ -f "$CERTIFICATES/token" ] || refuse "$CERTIFICATES holds no certificates; run: deskrl certificates $CERTIFICATES --host replay --host inference"
if docker compose version >/dev/null 2>&1; then compose=(docker compose); else compose=(docker-compose); fi
type -P "${compose[0]}" >/dev/null || refuse "there is neither docker compose nor docker-compose on PATH; install one"
docker info >/dev/null 2>&1 || refuse "Docker does not answer; start it, or set DOCKER_HOST"
mkdir -p "$RUNS"

num_actors() {
    local values
    values=$("${compose[@]}" run --rm --no-deps -T prepare size /etc/deskrl/run.toml) || exit 2
    sed -n 's/^num_actors=//p' <<<"$values" | tr -d '\r'
}

case $command in
build) "${compose[@]}" build ;;
start | roll)
    actors=$(num_actors)
    "${compose[@]}" up --detach --remove-orphans --scale actor="$actors"
    ;;
scale) "${compose[@]}" up --detach --no-recreate --no-deps --scale actor="$(num_actors)" actor ;;
drain) "${compose[@]}" up --detach --no-recreate --no-deps --scale actor=0 actor ;;
stop) "${compose[@]}" down --remove-orphans ;;
*) refuse "there is no command $command; build, start, scale, drain, roll or stop" ;;
esac
