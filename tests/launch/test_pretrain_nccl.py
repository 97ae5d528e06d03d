"""The main job over NCCL on one GPU, which its ranks share; over gloo: `test_pretrain_ranks.py`,
`test_pretrain_kills.py`."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch

from launch.processes import check_device
from launch.tables import dump
from tests.support.clock import patience
from tests.support.launched import Launched, hit
from tests.support.pretrain import records_of, tiny


def job(folder: Path, text: Path, ranks: int, *arguments: str, **changes: object) -> Launched:
    where = {"device": "cuda", "share_gpus": True}
    file = folder / f"{ranks}.toml"
    file.write_text(dump(tiny(text, dtype="float32", timeout=30.0, **where, **changes)))
    return Launched(ranks, folder / f"run-{ranks}", ["--config", str(file), *arguments])


@pytest.mark.gpu
@pytest.mark.timeout(150)
def test_two_and_four_ranks_train_as_one(text: Path, tmp_path: Path) -> None:
    """Both at a time; each compares its first step with one rank's."""
    jobs = [job(tmp_path, text, 2, "--verify", steps=4)]
    jobs.append(job(tmp_path, text, 4, "--verify", "--engine", "fsdp", steps=4))
    said = ["\n".join(one.finish()) for one in jobs]
    for lines in said:
        assert "sharded and single-rank step are equal" in lines, lines
    two, four = ([record["loss"] for record in records_of(one.run)] for one in jobs)
    assert len(two) == 4 and two == pytest.approx(four, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.timeout(120)
def test_a_killed_rank_is_named_within_the_deadline(text: Path, tmp_path: Path) -> None:
    running = job(tmp_path, text, 2, steps=100_000)
    try:
        hit(running, 0, "step [2-9], (forward|backward)", signal.SIGKILL, random.Random(0))
        begin = time.monotonic()
        assert running.process.wait(patience(60)) != 0  # the launcher ends what is left
        assert time.monotonic() - begin < patience(40)
    finally:
        running.process.kill()


def test_ranks_have_a_gpu_each_unless_they_are_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for there, share, refused in ((2, False, False), (1, False, True), (1, True, False), (0, True, True)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        try:
            check_device("cuda", share)
            assert not refused
        except ValueError as error:
            assert refused and f"shows {there}" in str(error)
