#!/usr/bin/env bash
# The main job under torchrun, on one machine or, started on each of them, on several without a scheduler:
#   launch/cluster/torchrun.sh --config gpu-8
#   NNODES=2 HEAD=first-machine launch/cluster/torchrun.sh --config gpu-8
# NPROC (ranks a machine; its GPUs), PORT (29500), RUN_ID (ringattn), PYTHON (.venv/bin/python) and NODE_RANK may be set;
# the last says which machine this is, from 0, which is HEAD; else they agree on it.
# runs/ must be on a file system that all machines share.
set -euo pipefail
cd "$(dirname "$0")/../.."

NNODES=${NNODES:-1}
NPROC=${NPROC:-gpu}
PORT=${PORT:-29500}
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ "$NNODES" = 1 ]; then
  where=(--standalone)
elif [ -n "${NODE_RANK:-}" ]; then
  where=(--master-addr "${HEAD:?host name of the first machine}" --master-port "$PORT" --node-rank "$NODE_RANK")
else
  where=(--rdzv-backend c10d --rdzv-endpoint "${HEAD:?host name of the first machine}:$PORT"
    --rdzv-id "${RUN_ID:-ringattn}")
fi
exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$NPROC" "${where[@]}" \
  -m launch.pretrain "$@"
