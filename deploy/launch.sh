#!/usr/bin/env bash
# Run corefit on the GPUs of this node, as one node of a launch, through torchrun:
#
#     launch.sh run pipeline.toml
#
#     NODES=1          how many nodes there are
#     NODE=0           which one this is, from 0
#     HEAD=127.0.0.1   the address of node 0
#     PORT=29500       a port that is free there
#     PROCESSES=gpu    processes on this node: one for each GPU, or a number
#
# torchrun kills its processes 30 seconds after a signal, which a step and a checkpoint may exceed, and its own exit
# status does not say why they ended. So SIGTERM, SIGINT and SIGUSR1 are sent to the processes of the run here, and the
# exit status is theirs: 0 done, 2 something to correct, 130 stopped after a checkpoint, and the same command continues.
set -uo pipefail

COREFIT_STATUS=$(mktemp -d)
export COREFIT_STATUS

(
    trap '' USR1 INT # torchrun would end at once; corefit, below it, takes them again
    exec torchrun \
        --nnodes "${NODES:-1}" --node-rank "${NODE:-0}" --nproc-per-node "${PROCESSES:-gpu}" \
        --master-addr "${HEAD:-127.0.0.1}" --master-port "${PORT:-29500}" \
        -m corefit "$@"
) &
torchrun=$!

trap 'pkill -USR1 -P "$torchrun"' TERM INT USR1

wait "$torchrun"
status=$?
while kill -0 "$torchrun" 2>/dev/null; do # a signal has ended the wait
    wait "$torchrun"
    status=$?
done

noted=$(cat "$COREFIT_STATUS"/* 2>/dev/null | sort -u)
rm -rf "$COREFIT_STATUS"
if [ "$status" -ne 0 ] && [ -n "$noted" ]; then
    status=$(grep -v -x -e 0 -e 130 <<<"$noted" | head -n 1) # a failure comes before a stop, which may follow from it
    status=${status:-130}
fi
exit "$status"
