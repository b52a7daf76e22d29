#!/usr/bin/env bash
# One role of a run as a Slurm job; launch.sh submits it. Usage: role.sh ROLE CONFIG
# Servers write into RUN/addresses/ where they are, because nobody knows it before the job has a node; the others wait.
set -euo pipefail
role=$1 config=$2
eval "$(deskrl size "$config")"
addresses=$folder/addresses
here=$(hostname -f 2>/dev/null || hostname)

publish() { # ADDRESS: where the role of this job is found from now on
    printf '%s\n' "$1" >"$addresses/.$role.$SLURM_JOB_ID" && mv "$addresses/.$role.$SLURM_JOB_ID" "$addresses/$role"
}

await() { # ROLE: until it has a node; prints its address
    until [ -s "$addresses/$1" ]; do sleep 1; done
    cat "$addresses/$1"
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
inference)
    export DESKRL_INFERENCE__ADDRESS=$here:$inference_port
    publish "$DESKRL_INFERENCE__ADDRESS"
    exec deskrl inference "$config"
    ;;
esac
DESKRL_REPLAY__ADDRESS=$(await replay)
DESKRL_INFERENCE__ADDRESS=$(await inference)
export DESKRL_REPLAY__ADDRESS DESKRL_INFERENCE__ADDRESS
if [ "$role" = actor ]; then
    exec deskrl actor "$config" --index "$SLURM_ARRAY_TASK_ID"
fi
deskrl learner "$config" &
learner=$!
trap 'kill -TERM $learner' TERM
wait "$learner" || wait "$learner" # the first is cut short by the signal
for other in actor inference replay; do
    scancel --me --name="deskrl-$name-$other" # the run is over
done
