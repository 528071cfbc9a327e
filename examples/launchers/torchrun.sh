#!/usr/bin/env bash
# bigbatch on several hosts that share a file system: run this on every host, with the same HOST and PORT.
#
#   HOST=10.0.0.1 NODES=2 ./torchrun.sh --data texts/ --model my-model/
#
# On hosts without GPUs, set PROCESSES to the number of processes on each: PROCESSES=2 HOST=... ./torchrun.sh ...
#
# HOST is one of the hosts, at an address that all of them reach. Only they may reach PORT: see "Who may reach the
# rendezvous port" in docs/how-to/several-machines.md. A restart resumes the run from its last checkpoint.
set -euo pipefail

: "${HOST:?set HOST to the address of one of the hosts}"
: "${NODES:?set NODES to the number of hosts}"
PORT=${PORT:-29400}
RUN=${RUN:-/shared/runs/mine}
PROCESSES=${PROCESSES:-gpu} # one for each GPU

exec torchrun --nnodes "$NODES" --nproc-per-node "$PROCESSES" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$HOST:$PORT" --rdzv-id "$(basename "$RUN")" \
  -m bigbatch train --out "$RUN" "$@"
