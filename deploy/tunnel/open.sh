#!/usr/bin/env bash
# Keeps an SSH tunnel open from a machine with desktops to the one where replay and inference are. docs/launch-tunnel.md goes with it.
# Usage: deploy/tunnel/open.sh CONFIG [USER@]HOST [ssh option ...]
# Each server of the run is then found on this machine under the loopback address that the file gives it. When the tunnel
# breaks it is opened again, until this is ended. Options given here win over those below.
set -euo pipefail
refuse() {
    echo "open.sh: $1" >&2
    exit 2
}
(($# >= 2)) || refuse "no configuration or no host; usage: open.sh CONFIG [USER@]HOST [ssh option ...]"
config=$1 host=$2
shift 2
type -P ssh >/dev/null || refuse "there is no ssh here; apt-get install openssh-client"
type -P deskrl >/dev/null || refuse "there is no deskrl on PATH; source .venv/bin/activate"
values=$(deskrl size "$config") || exit 2
eval "$values"
for server in "replay.address $replay_host" "inference.address $inference_host"; do
    case ${server#* } in
    127.* | localhost) ;;
    *) refuse "${server% *} is at ${server#* }, so actors would pass the tunnel by; give it a port of 127.0.0.1" ;;
    esac
done

forwards=()
for port in "$replay_port" $(seq "$inference_port" $((inference_port + num_replicas - 1))); do
    forwards+=(-L "127.0.0.1:$port:127.0.0.1:$port")
done
options=(
    -o BatchMode=yes -o ExitOnForwardFailure=yes
    -o LogLevel=ERROR # not a line for each look at a server that is not started yet
    -o ServerAliveInterval=5 -o ServerAliveCountMax=3 # a dead line is found out after 15 s
    -o PermitLocalCommand=yes -o "LocalCommand=echo 'open.sh: the tunnel to $host is open'"
)
trap 'kill "$child" 2>/dev/null; exit 0' TERM INT
while :; do
    ssh -N -T "$@" "${options[@]}" "${forwards[@]}" "$host" &
    child=$!
    wait "$child" || true
    echo "open.sh: the tunnel to $host is down; it is tried again in 2 s" >&2
    sleep 2 &
    child=$!
    wait "$child" || true
done
