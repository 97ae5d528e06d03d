"""What a step of the job takes of a rank's memory is known before it: the account of the operations against every block
that PyTorch's allocators hand out."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

import launch.budget
import launch.memory
import ringattn as ra
from benchmarks import budget
from launch.config import Config, ModelConfig
from ringattn.kernels import windows
from ringattn.testing import run_processes
from tests.support.pretrain import NOWHERE, run_until, tiny


@pytest.mark.slow
def test_planned_and_measured_peaks_agree() -> None:
    """Within 10 % on all configurations but one at most: lengths, ways of recomputing, chunks, documents, offload, both
    models, ranks and engines. With DeepSpeed on all."""
    rows = budget.rows()
    assert len(rows) >= 12
    zero = [row for row in rows if "ZeRO" in row["name"]]
    assert len(zero) == 3 and all(abs(row["planned"] / row["measured"] - 1) <= 0.1 for row in zero), zero
    off = [row for row in rows if abs(row["planned"] / row["measured"] - 1) > 0.1]
    assert len(off) <= 1, "\n".join(map(budget.line, rows))


def test_a_run_says_what_its_first_step_takes(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ModelConfig(d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=160)
    config = tiny(text, steps=1, seqlen=1024, dtype="float32", documents=False, model=model, loss_chunks=2)
    run_until(0, 1, config, NOWHERE / "budget", False, -1)
    said = capsys.readouterr().out
    planned = re.search(r"memory planned \(allocated by PyTorch\): ([\d.]+) MiB a rank at the peak, l.*MLP inner", said)
    verdict = (
        r"memory of the first step \(allocated by PyTorch\): ([\d.]+) MiB a rank at the peak, "
        r"([\d.]+) % (more|less) than planned"
    )
    found = re.search(verdict, said)
    assert planned and found, said
    assert float(found[2]) < 10 and "warning: the first step" not in said
    assert float(found[1]) == pytest.approx(float(planned[1]), rel=0.1)


def test_a_step_counts_the_masks_that_it_keeps_whatever_ran_before() -> None:
    """`--verify` computes the step first, and the kernel keeps masks of its windows."""
    cp = ra.ContextParallel(None, 2048, mask=ra.sliding_window(255))
    q, k, v = torch.randn(3, 1, 2048, 2, 16).unbind()
    ra.attention(q, k, v, cp=cp)  # plans, and leaves a workspace
    windows.forget()  # as in a process that has computed nothing
    peaks = []
    for _ in range(2):
        with launch.memory.measured(torch.device("cpu"), cp.link.workspace) as found:
            ra.attention(q, k, v, cp=cp)
        peaks.append(found.peak)
    assert peaks[0] == peaks[1]


def broken(rank: int, world: int, config: Config, run: Path, where: str) -> str:
    """A run in which one rank's account, or its count of the first step, fails as nobody has foreseen."""
    patch, out = pytest.MonkeyPatch(), io.StringIO()

    def fail(*_: object, **__: object) -> None:
        raise KeyError("planted")

    with patch.context() as plant, contextlib.redirect_stdout(out):
        if rank == 1:
            plant.setattr(*{"account": (launch.budget, "step_of"), "count": (launch.memory, "_peak")}[where], fail)
        assert run_until(rank, world, config, run, False, -1)
    return out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["account", "count"])
def test_what_fails_in_a_forecast_is_said_and_ends_nothing(where: str, text: Path, tmp_path: Path) -> None:
    config = tiny(text, steps=2, timeout=30)
    said, _ = run_processes(broken, 2, config, tmp_path / "run", where, timeout=60)
    assert ("memory is not planned: rank 1: KeyError: 'planted'" in said) == (where == "account"), said
    counted = "memory of the first step was not counted: rank 1: KeyError: 'planted'"
    assert (counted in said) == (where == "count"), said
    assert ("memory of the first step (allocated by PyTorch): " in said) == (where == "account"), said
