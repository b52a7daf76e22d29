#!/usr/bin/env bash
# Runs deskrl with Slurm: job arrays for actors and inference replicas, one job for each other role.
# Documentation: docs/launch-slurm.md.
# Usage: deploy/slurm/launch.sh start|scale|drain|stop CONFIG [sbatch option ...]
#   start  submit the roles that are not pending or running
#   scale  submit or end actors and replicas to match the configuration
#   drain  end the actors, which return their rollouts
#   stop   end all jobs of the run; start resumes it
# sbatch options apply to every submitted job; those in SBATCH_REPLAY, SBATCH_INFERENCE, SBATCH_LEARNER and SBATCH_ACTOR
# to the jobs of that role: SBATCH_LEARNER="--gres=gpu:4" deploy/slurm/launch.sh start CONFIG --account=lab
set -euo pipefail
die() { # MESSAGE HINT
    echo "launch.sh: $1 (hint: $2)" >&2
    exit 2
}
(($# >= 2)) || die "a command and a configuration are required" "launch.sh start|scale|drain|stop CONFIG"
command=$1 config=$(realpath -m "$2") here=$(dirname "$(realpath "$0")")
shift 2
type -P sbatch >/dev/null || die "sbatch: not on PATH" "run this on a login node of the cluster"
type -P deskrl >/dev/null || die "deskrl: not on PATH" "source .venv/bin/activate"
values=$(deskrl size "$config") || exit 2
eval "$values"

jobs_of() { # ROLE: print array index and id of each pending or running job of a role, one per line
    squeue --me --noheader --array --states=PENDING,RUNNING,CONFIGURING,SUSPENDED --format=%K:%F_%K --name="deskrl-$name-$1"
}

await_ends() { # wait until no job of the run is ending: Slurm then lists those that it has requeued as pending
    local message="$name: waiting for jobs that are ending" run=deskrl-$name
    local jobs=$run-replay,$run-learner,$run-inference,$run-actor
    while [ -n "$(squeue --me --noheader --states=COMPLETING --name="$jobs")" ]; do
        [ -z "$message" ] || echo "$message"
        message=''
        sleep 1
    done
}

submit() { # ROLE [sbatch option ...]
    local role=$1 own="SBATCH_${1^^}" log=$1 warning_s=60
    shift
    case $role in
    actor | inference) log=$role-%a ;;
    learner)
        warning_s=300 # it completes a checkpoint that it is writing
        ((num_nodes == 1)) || set -- --nodes="$num_nodes" --ntasks-per-node=1 "$@"
        ;;
    esac
    # A store in replay.folder is on the disk of one node, to which the run directory has a link.
    if [ "$role" = replay ] && [ -n "$replay_folder" ] && [ -L "$folder/replay" ] && [ -s "$folder/replay_node" ]; then
        set -- --nodelist="$(<"$folder/replay_node")" "$@"
    fi
    # shellcheck disable=SC2086 # the variable holds several options
    sbatch --parsable --job-name="deskrl-$name-$role" --output="$folder/logs/$log.log" --open-mode=append \
        --requeue --signal="B:USR1@$warning_s" "${options[@]}" ${!own-} "$@" "$here/role.sh" "$role" "$config"
}

scale() { # ROLE COUNT: make elements 0 to COUNT - 1 of its array pending or running, and end all others
    local role=$1 wanted index job missing=() surplus=()
    declare -A existing=()
    while IFS=: read -r index job; do
        [ -n "$index" ] && existing[$index]=$job
    done < <(jobs_of "$role")
    for ((wanted = 0; wanted < $2; wanted++)); do
        [ -n "${existing[$wanted]-}" ] || missing+=("$wanted")
        unset "existing[$wanted]"
    done
    surplus=("${existing[@]}")
    ((${#missing[@]} == 0)) || submit "$role" --array="$(IFS=,; echo "${missing[*]}")" "${after[@]}" >/dev/null
    ((${#surplus[@]} == 0)) || scancel --signal=TERM --full "${surplus[@]}"
    echo "$name: $2 of $role, ${#missing[@]} submitted, ${#surplus[@]} draining"
}

options=("$@") after=()
case $command in
start)
    mkdir -p "$folder/logs" "$folder/addresses"
    await_ends
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
    await_ends
    scale inference "$num_replicas"
    scale actor "$num_actors"
    ;;
drain) scancel --me --signal=TERM --full --name="deskrl-$name-actor" ;;
stop)
    for role in actor learner inference replay; do
        scancel --me --name="deskrl-$name-$role"
    done
    ;;
*) die "$command: unknown command" "start, scale, drain or stop" ;;
esac
