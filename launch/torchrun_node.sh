#!/usr/bin/env bash
# One node of a run over several machines, by torchrun. The same line on each, with its own NODE_RANK:
#   MASTER_ADDR=10.0.0.1 NODES=2 NODE_RANK=0 launch/torchrun_node.sh experiment=NAME run.dir=/shared/runs/NAME
#   MASTER_ADDR=10.0.0.1 NODES=2 NODE_RANK=1 launch/torchrun_node.sh experiment=NAME run.dir=/shared/runs/NAME
# run.dir must be on a disk that every machine sees. An elastic run is always resumed. Settings:
#   MASTER_ADDR   address or name of the machine with NODE_RANK=0, as the others reach it
#   MASTER_PORT   where the machines meet (29400)
#   NODES         how many machines, or from:to for an elastic run: 1:4 goes on with those that are left
#   NODE_RANK     0 on the machine of MASTER_ADDR, which keeps the list of who takes part; anything else elsewhere
#   RANKS         ranks on this machine (gpu: one for each GPU; without GPUs 1)
#   RUN_ID        the same on every machine, another for each run that meets at the same port (lisa-dist)
#   MAX_RESTARTS  how often a run may start again after losing a rank (0, elastic: 100)
#   WAIT          seconds to wait for MASTER_ADDR before giving up (300)
#   PYTHON        the interpreter (python)
set -euo pipefail

: "${MASTER_ADDR:?set it to the address of the machine with NODE_RANK=0}"
: "${NODES:?set it to the number of machines, or to from:to for an elastic run}"
: "${NODE_RANK:?set it to 0 on the machine of MASTER_ADDR, and to another number elsewhere}"
PYTHON=${PYTHON:-python}
MASTER_PORT=${MASTER_PORT:-29400}
WAIT=${WAIT:-300}
if [[ -z ${RANKS:-} ]]; then
    RANKS=$("$PYTHON" -c 'import torch; print("gpu" if torch.cuda.is_available() else 1)')
fi
if [[ $NODES == *:* ]]; then
    MAX_RESTARTS=${MAX_RESTARTS:-100}
    # Else a machine that comes back hangs the others: the store of the ranks must not outlive a round.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    set -- "$@" checkpoint.resume=auto
fi

# The address by which this machine reaches the first one, which is the one that the others reach it at.
local_address=$("$PYTHON" - "$MASTER_ADDR" <<'PROGRAM'
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    try:
        probe.connect((sys.argv[1], 9))  # of a datagram socket this only chooses the route
    except OSError as error:
        sys.exit(f"torchrun_node.sh: no way to MASTER_ADDR={sys.argv[1]}: {error}")
    print(probe.getsockname()[0])
PROGRAM
)

# torchrun would say nothing for two minutes and then show a stack of C++ frames.
if [[ $NODE_RANK != 0 ]]; then
    deadline=$((SECONDS + WAIT))
    until reason=$(timeout 5 bash -c ': <>"/dev/tcp/$0/$1"' "$MASTER_ADDR" "$MASTER_PORT" 2>&1); do
        if ((SECONDS >= deadline)); then
            reason=${reason##*: }
            echo "torchrun_node.sh: nobody answers at $MASTER_ADDR:$MASTER_PORT after $WAIT s" \
                "(${reason:-no answer}): is the machine with NODE_RANK=0 up, and is the port open?" >&2
            exit 1
        fi
        sleep 1
    done
fi

is_host=$([[ $NODE_RANK == 0 ]] && echo 1 || echo 0)
exec "$PYTHON" -m torch.distributed.run \
    --nnodes="$NODES" --nproc-per-node="$RANKS" --max-restarts="${MAX_RESTARTS:-0}" \
    --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id="${RUN_ID:-lisa-dist}" \
    --rdzv-conf="is_host=$is_host,keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=3" \
    --local-addr="$local_address" \
    -m lisa_dist train "$@"
