#!/usr/bin/env bash
# The main job on several machines without a scheduler; run this on each of them, from the repository:
#   NNODES=2 HEAD=first-machine ./launch/cluster/torchrun.sh --config gpu-8
# NPROC (ranks a machine; its GPUs), PORT (29500), RUN_ID (ringattn) and PYTHON (.venv/bin/python) may be set.
# runs/ must be on a file system that all machines share.
set -euo pipefail
cd "$(dirname "$0")/../.."

: "${NNODES:?number of machines}" "${HEAD:?host name of the first machine}"
NPROC=${NPROC:-gpu}
PORT=${PORT:-29500}
RUN_ID=${RUN_ID:-ringattn}
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec "$PYTHON" -m torch.distributed.run \
  --nnodes "$NNODES" --nproc-per-node "$NPROC" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$RUN_ID" \
  -m launch.pretrain "$@"
