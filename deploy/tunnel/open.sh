#!/usr/bin/env bash
# Keeps an SSH tunnel open from a machine with desktops to the machine with replay and inference.
# Documentation: docs/launch-tunnel.md.
# Usage: deploy/tunnel/open.sh CONFIG [USER@]HOST [ssh option ...]
# Each server of the run is then reached on this machine at its loopback address in the configuration. The tunnel is
# reopened when it breaks, until this script is terminated. Given ssh options override the ones below.
set -euo pipefail
die() { # MESSAGE HINT
    echo "open.sh: $1 (hint: $2)" >&2
    exit 2
}
(($# >= 2)) || die "a configuration and a host are required" "open.sh CONFIG [USER@]HOST [ssh option ...]"
config=$1 host=$2
shift 2
type -P ssh >/dev/null || die "ssh: not on PATH" "apt-get install openssh-client"
type -P deskrl >/dev/null || die "deskrl: not on PATH" "source .venv/bin/activate"
values=$(deskrl size "$config") || exit 2
eval "$values"
for server in "replay.address $replay_host" "inference.address $inference_host"; do
    case ${server#* } in
    127.* | localhost) ;;
    *) die "${server% *}: actors would bypass the tunnel, because its host is ${server#* }" "use a port of 127.0.0.1" ;;
    esac
done

forwards=()
for port in "$replay_port" $(seq "$inference_port" $((inference_port + num_replicas - 1))); do
    forwards+=(-L "127.0.0.1:$port:127.0.0.1:$port")
done
options=(
    -o BatchMode=yes -o ExitOnForwardFailure=yes
    -o LogLevel=ERROR # otherwise, each connection to a server that has not started yet is logged
    -o ServerAliveInterval=5 -o ServerAliveCountMax=3 # a dead connection is detected after 15 s
    -o PermitLocalCommand=yes -o "LocalCommand=echo 'open.sh: the tunnel to $host is open'"
)
trap 'kill "$child" 2>/dev/null; exit 0' TERM INT
while :; do
    ssh -N -T "$@" "${options[@]}" "${forwards[@]}" "$host" &
    child=$!
    wait "$child" || true
    echo "open.sh: the tunnel to $host is down, trying again in 2 s" >&2
    sleep 2 &
    child=$!
    wait "$child" || true
done
