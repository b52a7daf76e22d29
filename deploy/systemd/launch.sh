#!/usr/bin/env bash
# Runs deskrl with systemd, on one machine or distributed over several. Documentation: docs/launch-systemd.md.
# Usage: deploy/systemd/launch.sh install | start|scale|drain|roll|stop RUN      (RUN: /etc/deskrl/RUN.toml)
#   install  copy the units to /etc/systemd/system
#   start    start all roles
#   scale    start or stop actors to match desktop.num_envs
#   drain    stop the actors
#   roll     restart all roles, actors last and one by one
#   stop     stop all roles; start resumes the run
set -euo pipefail
die() { # MESSAGE HINT
    echo "launch.sh: $1 (hint: $2)" >&2
    exit 2
}
deskrl=/opt/deskrl/.venv/bin/deskrl
command=${1-} run=${2-}
type -P systemctl >/dev/null && [ -d /run/systemd/system ] || die "this machine does not run systemd" "docs/launching.md describes other launchers"
if [ "$command" = install ]; then
    install -m 644 "$(dirname "$0")"/*.service "$(dirname "$0")"/*.target /etc/systemd/system/
    systemctl daemon-reload
    exit 0
fi
[ -n "$run" ] || die "a command and a run are required" "launch.sh start|scale|drain|roll|stop RUN"
values=$("$deskrl" size "/etc/deskrl/$run.toml") || exit 2
eval "$values"

scale() { # ROLE COUNT: start instances 0 to COUNT - 1, and stop all others
    local index unit
    for ((index = 0; index < $2; index++)); do
        systemctl start --no-block "deskrl-$1@$run:$index"
    done
    for unit in $(systemctl list-units --plain --no-legend "deskrl-$1@$run:*" | awk '{print $1}'); do
        index=${unit##*:}
        ((${index%.service} < $2)) || systemctl stop "$unit"
    done
}

case $command in
start)
    systemctl start "deskrl-prepare@$run"
    systemctl start "deskrl@$run.target"
    scale inference "$num_replicas"
    scale actor "$num_actors"
    ;;
scale) scale actor "$num_actors" ;;
drain) scale actor 0 ;;
roll)
    systemctl restart "deskrl-prepare@$run"
    systemctl restart "deskrl-replay@$run" "deskrl-learner@$run"
    scale inference "$num_replicas"
    for ((index = 0; index < num_replicas; index++)); do systemctl restart "deskrl-inference@$run:$index"; done
    for ((index = 0; index < num_actors; index++)); do systemctl restart "deskrl-actor@$run:$index"; done
    ;;
stop)
    scale actor 0
    scale inference 0
    systemctl stop "deskrl@$run.target" "deskrl-prepare@$run"
    ;;
*) die "$command: unknown command" "install, start, scale, drain, roll or stop" ;;
esac
