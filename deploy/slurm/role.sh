#!/usr/bin/env bash
# Runs one role as a Slurm job, which launch.sh submits. Usage: role.sh ROLE CONFIG
# The node of the replay job is known only once it runs, so it writes its address to RUN/addresses/, and the other roles
# wait for it.
# SIGTERM (scancel, preemption, scontrol requeue) stops the role. SIGUSR1, which Slurm sends before the time limit
# (--signal), stops it and requeues the job, unless the run has ended. A role that crashes is started again.
set -euo pipefail
role=$1 config=$2
here=$(hostname -f 2>/dev/null || hostname)
job=$SLURM_JOB_ID
# In one element of an array, SLURM_JOB_ID is the id of the whole array.
[ -z "${SLURM_ARRAY_JOB_ID-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
child='' stopping='' requeue='' status=0
readonly INVALID_INPUT=2 STOPPED=143 MAX_RESTARTS=20 RESTART_PAUSE_S=2

stop() { # end the role, or this script if the role has not started
    stopping=1
    [ -n "$child" ] || exit $STOPPED
    if [ "$role" = learner ] && ((num_nodes > 1)); then
        scancel --signal=TERM "$job" || true # srun would kill its tasks KillWait (30 seconds) after SIGTERM
    else
        kill -TERM "$child" 2>/dev/null || true
    fi
}

await_replay() { # wait for the address of the replay service, and print it
    until [ -s "$addresses/replay" ]; do sleep 1; done
    cat "$addresses/replay"
}

run() { # COMMAND: run it to its end, whatever signals arrive, and return its status
    "$@" &
    child=$!
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a signal interrupts wait
    wait "$child"
}

move_to() { # NODE: requeue this job, to run on that node
    echo "role.sh: the store of this run is on $1, not on ${SLURMD_NODENAME:-$here}: the job is requeued to run there"
    trap '' TERM # which the first command causes
    scontrol requeue "$job" && scontrol update "JobId=$job" "ReqNodeList=$1"
}

run_replay() { # publish the address of the service, and run it
    local node=${SLURMD_NODENAME:-$here}
    if [ -L "$folder/replay" ] && [ -s "$folder/replay_node" ] && [ "$(<"$folder/replay_node")" != "$node" ]; then
        move_to "$(<"$folder/replay_node")"
        exit
    fi
    printf '%s\n' "$node" >"$folder/replay_node"
    export DESKRL_REPLAY__ADDRESS=$here:$replay_port
    printf '%s\n' "$DESKRL_REPLAY__ADDRESS" >"$addresses/.$SLURM_JOB_ID"
    mv "$addresses/.$SLURM_JOB_ID" "$addresses/replay" # atomically
    run deskrl replay "$config"
}

run_learner() { # run the learner on every node of the job; srun returns the highest status
    if ((num_nodes == 1)); then
        run deskrl learner "$config"
        return
    fi
    export DESKRL_LEARNER__MASTER_ADDR=$here # this script runs on the first node
    # A node that fails ends the other nodes itself. If srun killed them, their exit statuses would not tell whether a
    # restart helps.
    # shellcheck disable=SC2016 # each task expands its own rank
    run srun --ntasks-per-node=1 --kill-on-bad-exit=0 --cpu-bind=none --mpi=none \
        sh -c 'exec deskrl learner "$1" --node-rank "$SLURM_NODEID"' sh "$config"
}

run_client() { # run a role that calls the replay service
    DESKRL_REPLAY__ADDRESS=$(await_replay)
    export DESKRL_REPLAY__ADDRESS DESKRL_INFERENCE__NUM_REPLICAS=0 # replicas register with the replay service instead
    case $role in
    learner) run_learner ;;
    actor) run deskrl actor "$config" --index "$SLURM_ARRAY_TASK_ID" ;;
    inference)
        export DESKRL_INFERENCE__JOIN=true DESKRL_INFERENCE__ADDRESS=$here:$((inference_port + SLURM_ARRAY_TASK_ID))
        run deskrl inference "$config"
        ;;
    esac
}

trap stop TERM
trap 'requeue=1; stop' USR1
values=$(deskrl size "$config")
eval "$values"
addresses=$folder/addresses
for ((restarts = 0; ; restarts++)); do
    status=0
    case $role in
    prepare) exec deskrl prepare "$config" ;;
    replay) run_replay || status=$? ;;
    *) run_client || status=$? ;;
    esac
    case $status in 0 | "$INVALID_INPUT" | "$STOPPED") break ;; esac
    [ -z "$stopping" ] && ((restarts < MAX_RESTARTS)) || break
    echo "role.sh: $role ended with status $status and is started again"
    sleep $RESTART_PAUSE_S
    [ -z "$stopping" ] || break
done
if [ "$role" = learner ] && [ $status = 0 ]; then
    for other in actor inference replay; do
        scancel --me --name="deskrl-$name-$other" # the run has ended
    done
elif [ -n "$requeue" ] && [ $status != $INVALID_INPUT ]; then
    scontrol requeue "$job"
fi
exit $status
