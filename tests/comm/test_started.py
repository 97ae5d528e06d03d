"""Whose variables say which rank a process is, and where the ranks meet."""

import pytest

from ringattn.comm.started import PORTS, _slurms_address, translated

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}  # fmt: skip
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SLURM = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_JOB_ID": "20001",
}  # fmt: skip
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}  # a batch script is one process
SIXTH = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    "environ, found",
    [
        ({}, {}),
        (OPEN_MPI, SIXTH),
        (MPICH, SIXTH),
        (SLURM, SIXTH),
        (BATCH, {}),
        (SLURM | {"SLURM_PROCID": "0"} | MPICH, SIXTH),
        (SLURM | {"PMI_RANK": "5", "PMI_SIZE": "8"}, SIXTH),
        (SIXTH | OPEN_MPI, {}),
        (SIXTH | SLURM | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, {}),
    ],
    ids=["none", "open mpi", "mpich", "srun", "batch", "mpich in slurm", "srun pmi2", "both alike", "torchrun in srun"],
)
def test_a_rank_knows_its_place(environ: dict[str, str], found: dict[str, str]) -> None:
    assert translated(environ) == found


@pytest.mark.parametrize("environ", [OPEN_MPI, MPICH])
def test_launchers_that_contradict_each_other_are_named(environ: dict[str, str]) -> None:
    rank, size = list(environ)[:2]
    with pytest.raises(ValueError, match=f"RANK=0 beside {rank}=5, WORLD_SIZE=8 beside {size}=8: torchrun and mpiexec"):
        translated(environ | {"RANK": "0", "WORLD_SIZE": "8"})


def test_the_first_node_of_a_slurm_step_is_where_ranks_meet() -> None:
    assert _slurms_address(SLURM) == ("node07", PORTS[1])
    assert _slurms_address(SLURM | {"SLURM_STEP_NODELIST": "gpu-a,gpu-b"}) == ("gpu-a", PORTS[1])
    assert _slurms_address(SLURM | MPICH) is None, "MPI is asked"
