#!/usr/bin/env bash
# Runs one role as a Slurm job, which launch.sh submits. Usage: role.sh ROLE CONFIG
# The node of the replay job is known only once it runs, so it writes its address to RUN/addresses/, and the other roles
# wait for it.
set -euo pipefail
role=$1 config=$2
eval "$(deskrl size "$config")"
addresses=$folder/addresses
here=$(hostname -f 2>/dev/null || hostname)

publish() { # ADDRESS: write the address of the replay service, atomically
    printf '%s\n' "$1" >"$addresses/.$SLURM_JOB_ID" && mv "$addresses/.$SLURM_JOB_ID" "$addresses/replay"
}

await_replay() { # wait for the address of the replay service, and print it
    until [ -s "$addresses/replay" ]; do sleep 1; done
    cat "$addresses/replay"
}

case $role in
prepare)
    exec deskrl prepare "$config"
    ;;
replay)
    node=${SLURMD_NODENAME:-$here}
    if [ -L "$folder/replay" ] && [ -s "$folder/replay_node" ] && [ "$(<"$folder/replay_node")" != "$node" ]; then
        echo "role.sh: the store of this run is on $(<"$folder/replay_node"), not on $node (hint: launch.sh start)" >&2
        exit 2
    fi
    printf '%s\n' "$node" >"$folder/replay_node"
    export DESKRL_REPLAY__ADDRESS=$here:$replay_port
    publish "$DESKRL_REPLAY__ADDRESS"
    exec deskrl replay "$config"
    ;;
esac
DESKRL_REPLAY__ADDRESS=$(await_replay)
export DESKRL_REPLAY__ADDRESS DESKRL_INFERENCE__NUM_REPLICAS=0 # replicas register with the replay service instead
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
wait "$learner" || wait "$learner" # the signal interrupts the first wait
for other in actor inference replay; do
    scancel --me --name="deskrl-$name-$other" # the run has ended
done
