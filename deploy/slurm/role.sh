#!/usr/bin/env bash
# One role of a run as a Slurm job; launch.sh submits it. Usage: role.sh ROLE CONFIG
# Replay writes into RUN/addresses/ where it is, because nobody knows it before the job has a node; the others wait for it.
set -euo pipefail
role=$1 config=$2
eval "$(deskrl size "$config")"
addresses=$folder/addresses
here=$(hostname -f 2>/dev/null || hostname)

publish() { # ADDRESS: where replay is found from now on
    printf '%s\n' "$1" >"$addresses/.$SLURM_JOB_ID" && mv "$addresses/.$SLURM_JOB_ID" "$addresses/replay"
}

await_replay() { # until it has a node; prints its address
    until [ -s "$addresses/replay" ]; do sleep 1; done
    cat "$addresses/replay"
}

case $role in
prepare)
    exec deskrl prepare "$config"
    ;;
replay)
    export DESKRL_REPLAY__ADDRESS=$here:$replay_port
    publish "$DESKRL_REPLAY__ADDRESS"
    exec deskrl replay "$config"
    ;;
esac
DESKRL_REPLAY__ADDRESS=$(await_replay)
export DESKRL_REPLAY__ADDRESS DESKRL_INFERENCE__NUM_REPLICAS=0 # replicas join wherever they run
case $role in
inference)
    export DESKRL_INFERENCE__JOIN=true DESKRL_INFERENCE__ADDRESS=$here:$((inference_port + SLURM_ARRAY_TASK_ID))
    exec deskrl inference "$config"
    ;;
actor)
    exec deskrl actor "$config" --index "$SLURM_ARRAY_TASK_ID"
    ;;
esac
deskrl learner "$config" &
learner=$!
trap 'kill -TERM $learner' TERM
wait "$learner" || wait "$learner" # the first is cut short by the signal
for other in actor inference replay; do
    scancel --me --name="deskrl-$name-$other" # the run is over
done
