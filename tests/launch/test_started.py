"""The main job under mpiexec: that it trains, and ends, as under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.clock import patience
from tests.support.mpi import ABSENT, ROOT, Ended, mpiexec
from tests.support.pretrain import NOWHERE, config_file, records_of, tiny

MPI = pytest.mark.skipif(ABSENT, reason="needs mpi4py and an mpiexec: pip install -e '.[mpi]'")


def launched(ranks: int, text: Path, run: Path, *arguments: str, **environment: str) -> Ended:
    config = config_file(run.parent, "", "", tiny(text))
    job = [sys.executable, "-m", "launch.pretrain", "--config", str(config), "--out", str(run), *arguments]
    return mpiexec(ranks, job, 100.0, **environment)


def by_script(ranks: int, text: Path, run: Path, *arguments: str) -> str:
    """The same through `launch/mpi.sh`, from another folder."""
    config = config_file(run.parent, "", "", tiny(text))
    command = [str(ROOT / "launch" / "mpi.sh"), "--config", str(config), "--out", str(run), *arguments]
    environment = os.environ | {"PYTHON": sys.executable, "NPROC": str(ranks)}
    done = subprocess.run(command, env=environment, cwd=run.parent, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@MPI
@pytest.mark.slow
def test_the_job_trains_alike_over_gloo_by_the_script_and_over_mpi(text: Path, tmp_path: Path) -> None:
    said = by_script(2, text, tmp_path / "auto", "--transport", "auto", "--verify")
    ended = launched(2, text, tmp_path / "mpi", "--transport", "mpi", "--verify")
    assert ended.code == 0
    assert all("sharded and single-rank step are equal" in words for words in (said, ended.said)), (said, ended.said)
    losses = [[record["loss"] for record in records_of(tmp_path / name)] for name in ("auto", "mpi")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12) and len(losses[0]) == 6


@MPI
@pytest.mark.slow
def test_replicas_attend_over_mpi_among_themselves(text: Path, tmp_path: Path) -> None:
    ended = launched(4, text, tmp_path / "run", "--transport", "mpi", "--verify", "--data-parallel", "2")
    assert ended.code == 0 and "step are equal" in ended.said and "2 x 2 (data x context)" in ended.said, ended.said


FAULTY = """
import os
import launch.run
samples = launch.run.Job.samples
def faulty(job, world):
    if world.rank == 1 and job.progress["step"] == 2:
        {fault}
    return samples(job, world)
launch.run.Job.samples = faulty
from launch.pretrain import run
run()
"""


@MPI
@pytest.mark.slow
@pytest.mark.parametrize("transport", ["auto", "mpi"])
@pytest.mark.parametrize("fault", ["raise KeyError('mine')", "raise ValueError('mine')", "os.kill(os.getpid(), 9)"])
def test_a_rank_that_fails_ends_all(text: Path, tmp_path: Path, transport: str, fault: str) -> None:
    config = config_file(tmp_path, "", "", tiny(text))
    program = [sys.executable, "-c", FAULTY.format(fault=fault), "--config", str(config), "--transport", transport]
    ended = mpiexec(3, [*program, "--out", str(tmp_path / "run")], 100.0)
    assert ended.code != 0, ended.said
    assert "mine" in ended.said or "kill" in fault, ended.said
    assert ended.seconds < patience(40), ended.said


@MPI
@pytest.mark.slow
def test_other_numbers_of_torchruns_are_refused(text: Path, tmp_path: Path) -> None:
    ended = launched(2, text, tmp_path / "run", RANK="0", WORLD_SIZE="3", LOCAL_RANK="0")
    assert ended.code == 2 and "WORLD_SIZE=3 beside PMI_SIZE=2" in ended.said, ended.said


@MPI
@pytest.mark.slow
def test_mpi_under_torchrun_is_refused(text: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path, "", "", tiny(text))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*torchrun, "launch.pretrain", "--config", str(config), "--out", str(NOWHERE), "--transport", "mpi"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode and "the job has 2 ranks and MPI" in done.stderr and "launch/mpi.sh" in done.stderr
