#!/usr/bin/env bash
# Runs deskrl under Slurm: arrays of actors and of inference replicas, a job each for the rest. docs/launch-slurm.md goes with it.
# Usage: deploy/slurm/launch.sh start|scale|drain|stop CONFIG [sbatch option ...]
#   start  submits the roles that are not there yet      scale  brings actors and replicas to what the file says
#   drain  ends the actors; they give their work back    stop   ends every job of the run; start resumes it
# sbatch options go to every job that is submitted, those in SBATCH_REPLAY, SBATCH_INFERENCE, SBATCH_LEARNER and
# SBATCH_ACTOR to that role's: SBATCH_LEARNER="--gres=gpu:4" deploy/slurm/launch.sh start CONFIG --account=lab
set -euo pipefail
refuse() {
    echo "launch.sh: $1" >&2
    exit 2
}
(($# >= 2)) || refuse "no command or no configuration; usage: launch.sh start|scale|drain|stop CONFIG"
command=$1 config=$(realpath -m "$2") here=$(dirname "$(realpath "$0")")
shift 2
type -P sbatch >/dev/null || refuse "there is no Slurm here (no sbatch on PATH); run this on a login node"
type -P deskrl >/dev/null || refuse "there is no deskrl on PATH; source .venv/bin/activate"
values=$(deskrl size "$config") || exit 2
eval "$values"

jobs_of() { # ROLE: array index and job of each of its jobs that waits or runs, a line each
    squeue --me --noheader --array --states=PENDING,RUNNING,CONFIGURING,SUSPENDED --format=%K:%F_%K --name="deskrl-$name-$1"
}

submit() { # ROLE [sbatch option ...]
    local role=$1 own="SBATCH_${1^^}" log=$1
    shift
    case $role in actor | inference) log=$role-%a ;; esac
    # shellcheck disable=SC2086 # the variable holds several options
    sbatch --parsable --job-name="deskrl-$name-$role" --output="$folder/logs/$log.log" --open-mode=append \
        "${options[@]}" ${!own-} "$@" "$here/role.sh" "$role" "$config"
}

scale() { # ROLE COUNT: elements 0 to COUNT - 1 of its array wait or run, others do not
    local role=$1 wanted index job missing=() surplus=()
    declare -A there=()
    while IFS=: read -r index job; do
        [ -n "$index" ] && there[$index]=$job
    done < <(jobs_of "$role")
    for ((wanted = 0; wanted < $2; wanted++)); do
        [ -n "${there[$wanted]-}" ] || missing+=("$wanted")
        unset "there[$wanted]"
    done
    surplus=("${there[@]}")
    ((${#missing[@]} == 0)) || submit "$role" --array="$(IFS=,; echo "${missing[*]}")" "${after[@]}" >/dev/null
    ((${#surplus[@]} == 0)) || scancel --signal=TERM --full "${surplus[@]}"
    echo "$name: $2 of $role, ${#missing[@]} submitted, ${#surplus[@]} draining"
}

options=("$@") after=()
case $command in
start)
    mkdir -p "$folder/logs" "$folder/addresses"
    if [ -z "$(jobs_of replay)$(jobs_of learner)" ]; then
        rm -f "$folder"/addresses/*
        after=(--dependency="afterok:$(submit prepare)" --kill-on-invalid-dep=yes)
    fi
    for role in replay learner; do
        [ -n "$(jobs_of $role)" ] || submit "$role" "${after[@]}" >/dev/null
    done
    scale inference "$num_replicas"
    scale actor "$num_actors"
    ;;
scale)
    scale inference "$num_replicas"
    scale actor "$num_actors"
    ;;
drain) scancel --me --signal=TERM --full --name="deskrl-$name-actor" ;;
stop)
    for role in actor learner inference replay; do
        scancel --me --name="deskrl-$name-$role"
    done
    ;;
*) refuse "there is no command $command; start, scale, drain or stop" ;;
esac
