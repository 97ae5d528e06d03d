#!/usr/bin/env bash
# The main job under MPI, from anywhere:
#   NPROC=4 launch/mpi.sh --config cpu-128k                  # attention as under torchrun: shared memory, gloo or NCCL
#   NPROC=4 launch/mpi.sh --config cpu-128k --transport mpi  # attention over MPI
# PYTHON (.venv/bin/python), MPIEXEC (the one beside it, else the PATH's) and MPI_ARGS may be set, the last for instance
# to "--hostfile hosts", or with Open MPI to "--oversubscribe" for more ranks than cores.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
MPIEXEC=${MPIEXEC:-$(command -v "$(dirname "$PYTHON")/mpiexec" || command -v mpiexec)} || {
  echo "error: no mpiexec: pip install -e '.[launch,mpi]' brings one, or set MPIEXEC" >&2; exit 2; }
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# shellcheck disable=SC2086 - several arguments
exec "$MPIEXEC" -n "${NPROC:-2}" ${MPI_ARGS:-} "$PYTHON" -m launch.pretrain "$@"
