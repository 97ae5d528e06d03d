"""`ringattn check` of a machine: right ones pass, each planted fault is found, and ranks that share GPUs are told."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ringattn.check.exactness import Exactness
from ringattn.check.machine import FAILS, OK, SKIPPED, Answer, judged
from ringattn.check.place import Seen, refusal
from ringattn.cli.main import app
from ringattn.testing import run_processes
from ringattn.version import VERSION
from tests.support.clock import patience
from tests.support.machine import checked, findings
from tests.support.mpi import ABSENT, mpiexec

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
CHECK = ("-m", "ringattn.cli", "check")
KERNELS = {"kernel sdpa", "kernel blockwise", "kernel reference"}
MESSAGES = {"schedule ring", "schedule exchange", "schedule gather", "ulysses=2"}


def of_status(found: Path, status: str) -> set[str]:
    return {item for item, one in findings(found).items() if one["status"] == status}


def test_one_rank_checks_its_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = tmp_path / "found.json"
    result = CliRunner().invoke(app, ["check", "--json", str(found)])
    assert result.exit_code == 0, result.output
    assert {"ranks", "versions"} | KERNELS <= of_status(found, OK)
    absent = "kernels flash4, flash3, flash2, flash4_blocks, hub_flash3, hub_flash2"  # one line for all of them
    assert findings(found)[absent]["said"] == "there is no operator for device 'cpu' (only cuda has one)"
    assert absent in of_status(found, SKIPPED)
    assert "on several: torchrun" in result.output and f"ringattn {VERSION}, torch {torch.__version__}" in result.output
    assert len(result.output.splitlines()) == len(findings(found)) + 1, "one line a finding"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "--ranks", "3", "--seed", "1"], "--ranks, --seed: of a model's check"),
        (["check", "--model", "a:b", "--json", "x"], "--json: of a machine's check"),
        (["check", "--timeout", "0"], "--timeout 0.0: must be a positive"),
        (["check", "--model", "a:b", "--ulysses", "3"], "--ulysses 3: must divide the 2 ranks"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and words in result.output


def test_the_version_and_the_helps() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"ringattn {VERSION}\n"
    assert "torchrun --nproc-per-node 8 -m ringattn.cli check" in CliRunner().invoke(app, ["check", "--help"]).output
    assert "~/.cache/ringattn/" in CliRunner().invoke(app, ["calibrate", "--help"]).output


# -- what rank 0 makes of the answers -----------------------------------------------------------------


def test_one_answer_that_fails_or_is_missing_fails_the_item() -> None:
    fine, bad, absent = Answer(OK, "fine", 1.0), Answer(FAILS, "bad on rank 1", 2.0), Answer(SKIPPED, "not here")
    assert judged([fine, replace(fine, said="finer", weight=3.0)], 5.0) == (OK, "finer", False)
    assert judged([fine, bad], 5.0) == (FAILS, "bad on rank 1", False)
    assert judged([bad, bad, fine], 5.0) == (FAILS, "bad on rank 1 (2 of 3 ranks)", False)
    assert judged([absent, absent], 5.0) == (SKIPPED, "not here", False)
    status, said, lost = judged([fine, None, None], 5.0)
    assert status == FAILS and lost and "from rank 1, 2" in said


@pytest.mark.parametrize("world", [1, 2, 7, 64, 1000, 1024])
def test_lengths_stay_small_and_give_each_rank_a_token(world: int) -> None:
    for device in ("cpu", "cuda"):
        exact = Exactness(world, torch.device(device))
        assert world < exact.seqlen <= 1025
        assert all(mask.area(exact.seqlen, exact.seqlen) for mask in exact.masks.values())


ONE = Seen(0, "here", 0, 2, "GPU", "uuid-0", "2.28", "", 1, "2.13", "3.11", "0.1")


def test_ranks_with_a_gpu_each_are_one_group() -> None:
    assert refusal([ONE, replace(ONE, rank=1, number="uuid-1")]) == ""
    assert refusal([replace(ONE, number=""), replace(ONE, rank=1, number="")]) == ""


def test_ranks_that_share_a_gpu_need_hosts_of_their_own() -> None:
    said = refusal([ONE, replace(ONE, rank=1)])
    assert "ranks 0, 1 share a GPU of here" in said and "NCCL_HOSTID=$RANK" in said
    assert "share" in refusal([replace(ONE, nccl_host="a"), replace(ONE, rank=1, nccl_host="a")])
    assert refusal([replace(ONE, nccl_host="a"), replace(ONE, rank=1, nccl_host="b")]) == ""


def test_ranks_of_which_some_see_no_gpu_are_refused() -> None:
    assert "ranks 1 see no GPU" in refusal([ONE, replace(ONE, rank=1, number="")])


# -- ranks --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_under_torchrun(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    done = subprocess.run([*TORCHRUN, *CHECK, "--json", found], capture_output=True, text=True, timeout=patience(60))
    assert done.returncode == 0, done.stdout + done.stderr
    assert MESSAGES | KERNELS | {"links over shared memory", "transport gloo"} <= of_status(found, OK)
    assert done.stdout.count("schedule ring") == 1, "rank 0 alone prints"
    assert len(json.loads(found.read_text())["ranks"]) == 2
    links = findings(found)["links over shared memory"]["ranks"]
    assert all(answer["figures"]["inside"]["bytes_per_second"] > 0 for answer in links)


@pytest.mark.slow
@pytest.mark.skipif(ABSENT, reason="needs mpi4py and an mpiexec: pip install -e '.[mpi]'")
def test_two_ranks_under_mpiexec(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    ended = mpiexec(2, [sys.executable, *CHECK, "--json", str(found)])
    assert ended.code == 0, ended.said
    assert MESSAGES | KERNELS | {"transport MPI", "transport gloo"} <= of_status(found, OK)


@pytest.mark.slow
def test_nodes_bring_the_double_ring(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    assert [code for code, _ in run_processes(checked, 4, found, "", 2)] == [0] * 4
    assert MESSAGES | {"schedule double_ring", "ulysses=4", "subsets of ranks"} <= of_status(found, OK)
    links = findings(found)["links over shared memory"]["ranks"]
    assert all(answer["figures"].keys() == {"inside", "between"} for answer in links)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "fails"),
    [
        ("wrong_kernels", {"kernel blockwise", "kernel reference"}),
        ("swapped_rows", KERNELS | MESSAGES),
    ],
)
def test_planted_faults_are_found(fault: str, fails: set[str], tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    ranks = run_processes(checked, 2, found, fault)
    assert [code for code, _ in ranks] == [1, 1], ranks
    assert of_status(found, FAILS) == fails, ranks[0][1]
    assert json.loads(found.read_text())["exit_status"] == 1 and "see what fails" in ranks[0][1]
    if fault == "wrong_kernels":
        assert "rank 1 raised KeyError: 'planted'" in findings(found)["kernel blockwise"]["said"]
        worst = findings(found)["kernel reference"]["ranks"][1]["figures"]
        assert worst["error"] > 1e-6 > worst["allowed"]


@pytest.mark.slow
def test_what_ranks_are_refused_for_is_said_once(tmp_path: Path) -> None:
    (first, said), (second, nothing) = run_processes(checked, 2, tmp_path / "found.json", "no_gpu_on_one")
    assert (first, second, nothing) == (2, 2, "") and "ranks 1 see no GPU and the others do" in said


@pytest.mark.slow
def test_a_rank_that_dies_is_named_and_the_others_end(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    first, _, last = run_processes(checked, 3, found, "dies", 0, "--timeout", "4", casualties=[1])
    assert first[0] == last[0] == 1
    assert "no answer within 4 s from rank 1" in findings(found)["kernel blockwise"]["said"]
    assert "stopped: some ranks are lost" in first[1]
