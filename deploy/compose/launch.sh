#!/usr/bin/env bash
# Runs deskrl on one Docker host with docker compose (or docker-compose 1.29). Documentation: docs/launch-compose.md.
# Usage: CERTIFICATES=DIR deploy/compose/launch.sh build|start|scale|drain|roll|stop CONFIG
#   build  build the images
#   start  start all roles
#   scale  start or stop actors to match desktop.num_envs
#   drain  stop the actors
#   roll   replace containers whose image or configuration has changed, actors last
#   stop   remove all containers; the run directory remains in RUNS, and start resumes the run
# COMPOSE_FILE may list further files after compose.yaml, such as compose.gpu.yaml.
set -euo pipefail
die() { # MESSAGE HINT
    echo "launch.sh: $1 (hint: $2)" >&2
    exit 2
}
here=$(dirname "$(realpath "$0")")
(($# == 2)) || die "a command and a configuration are required" "CERTIFICATES=DIR launch.sh build|start|scale|drain|roll|stop CONFIG"
command=$1 RUN_CONFIG=$(realpath -m "$2") CERTIFICATES=$(realpath -m "${CERTIFICATES:-certificates}")
RUNS=$(realpath -m "${RUNS:-runs}")
COMPOSE_FILE=${COMPOSE_FILE:-$here/compose.yaml}
COMPOSE_PROJECT_NAME=${COMPOSE_PROJECT_NAME:-deskrl}
export RUN_CONFIG CERTIFICATES RUNS COMPOSE_FILE COMPOSE_PROJECT_NAME
[ -f "$RUN_CONFIG" ] || die "$RUN_CONFIG: not found" "name a run configuration"
[ -f "$CERTIFICATES/token" ] || die "$CERTIFICATES: contains no certificates" "deskrl certificates $CERTIFICATES --host replay --host inference"
if docker compose version >/dev/null 2>&1; then compose=(docker compose); else compose=(docker-compose); fi
type -P "${compose[0]}" >/dev/null || die "neither docker compose nor docker-compose is on PATH" "install one of them"
docker info >/dev/null 2>&1 || die "the Docker daemon does not answer" "start it, or set DOCKER_HOST"
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
*) die "$command: unknown command" "build, start, scale, drain, roll or stop" ;;
esac
