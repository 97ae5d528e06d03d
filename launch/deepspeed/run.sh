#!/usr/bin/env bash
# The main job under DeepSpeed's ZeRO, from anywhere, on one machine or on those of a hostfile:
#   launch/deepspeed/run.sh --config cpu-128k                    # NPROC processes of this machine, by torchrun
#   HOSTFILE=hosts launch/deepspeed/run.sh --config gpu-8        # by the `deepspeed` command, over ssh (never run here)
# The stage of ZeRO is the config's ([deepspeed] stage = 3; 1 unless given). NPROC (2; ranks a machine), PYTHON
# (.venv/bin/python) and OMP_NUM_THREADS (1) may be set. A hostfile has lines such as "worker-1 slots=8"; the repository
# and runs/ must lie on a file system that all machines share.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ -n "${HOSTFILE:-}" ]; then
  exec "$PYTHON" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --module launch.pretrain --engine deepspeed "$@"
fi
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "${NPROC:-2}" \
  -m launch.pretrain --engine deepspeed "$@"
