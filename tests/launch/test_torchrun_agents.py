"""The main job under two agents of torchrun, as on two machines: their ranks train as those of one agent do."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.clock import patience
from tests.support.mpi import ROOT
from tests.support.pretrain import config_file, records_of, tiny

SCRIPT = ROOT / "launch" / "cluster" / "torchrun.sh"


def agents(run: Path, config: Path, environments: list[dict[str, str]]) -> list[str]:
    """What each agent of a job says, all of which must end well."""
    known = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(SCRIPT), "--config", str(config), "--out", str(run)]
    jobs = [
        subprocess.Popen(command, env=known | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for own in environments
    ]
    try:
        said = [job.communicate(timeout=patience(100))[0] for job in jobs]
    finally:
        for job in jobs:
            job.terminate()  # which an agent passes on
            job.wait(10)
    assert [job.returncode for job in jobs] == [0] * len(jobs), said
    return said


@pytest.mark.slow
def test_two_agents_train_as_one(text: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path, "", "", tiny(text, steps=3))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    both = {"NNODES": "2", "NPROC": "1", "HEAD": "127.0.0.1", "PORT": port}
    apart = "".join(agents(tmp_path / "apart", config, [both | {"NODE_RANK": str(node)} for node in range(2)]))
    (together,) = agents(tmp_path / "together", config, [{"NPROC": "2"}])
    assert "1 rank a node, says torchrun" in apart and "2 ranks a node, says torchrun" in together
    losses = [[record["loss"] for record in records_of(tmp_path / name)] for name in ("apart", "together")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12) and len(losses[0]) == 3
