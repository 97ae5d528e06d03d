"""A job whose ranks are killed or frozen, in every phase: the others say whom they have lost, the launcher's next
attempt goes on, and the end is that of a run nobody has disturbed, to the last bit."""

import dataclasses
import json
import random
import signal
from pathlib import Path

import pytest

from launch.tables import dump
from ringattn.testing import run_processes
from tests.support.clock import patience
from tests.support.launched import TIMEOUT, Launched, hit
from tests.support.pretrain import TINY, records_of, run_until

CONFIG = dataclasses.replace(TINY, save_every=2, timeout=TIMEOUT, dtype="float32", accumulate=2)
NEVER = -1  # a step that no run comes to
# what a victim is waited for to be at; the first means any moment from when the ranks listen
PHASES = (
    "any moment",
    "starting|reading the config",
    "joining the group",
    "comparing settings|looking for a checkpoint",
    "placing the model|loading the checkpoint",
    "reading data|dealing out",
    "forward",
    "backward",
    "sum of losses",
    "optimizer",
    "saving",
)


def disturb(folder: Path, text: Path, ranks: int, engine: str, hits: list[tuple[str, int]], seed: int) -> list[str]:
    """A run under torchrun with so many hits, against one without, in processes of ours. Returns what was hit."""
    draw = random.Random(seed)
    file = folder / "job.toml"
    steps = 40 + 10 * len(hits)  # the last attempt still has some before it
    config = dataclasses.replace(CONFIG, steps=steps, data=(str(text),), engine=engine)
    file.write_text(dump(config))
    whole = run_processes(run_until, ranks, config, folder / "whole", False, NEVER, timeout=patience(180))
    assert whole == [True] * ranks
    job = Launched(ranks, folder / "hit", ["--config", str(file), "--overwrite"], restarts=len(hits))
    found = []
    try:
        for attempt, (phase, number) in enumerate(hits):
            victim, at = hit(job, attempt, phase, number, draw)
            found.append(f"{signal.Signals(number).name} of rank {victim} of {ranks} at {at!r}: named by all others")
        job.members(len(hits))
    finally:
        job.finish()
    expected, there = records_of(folder / "whole"), records_of(folder / "hit")
    for name in ("step", "loss", "grad_norm", "position"):
        assert [record[name] for record in there] == [record[name] for record in expected], name
    manifests = [
        json.loads((folder / name / "checkpoint" / f"step-{steps:08d}" / "manifest.json").read_text())["body"]
        for name in ("whole", "hit")
    ]
    assert manifests[0]["files"] == manifests[1]["files"]  # lengths and checksums
    return found


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_killed_rank_is_named_and_the_next_attempt_goes_on(tmp_path: Path, text: Path) -> None:
    hits = [("saving after step [4-9]", signal.SIGKILL)]
    disturb(tmp_path, text, 2, "ddp", hits, 0)


# by ranks and engine: how many hits, how many in a soak, and the phase of the first; the first two meet all phases
RUNS = {(2, "ddp"): (6, 15, 0), (3, "fsdp"): (5, 11, 6), (3, "ddp"): (0, 4, 8)}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("ranks", "engine"), [pytest.param(*run, marks=[] if RUNS[run][0] else pytest.mark.soak) for run in RUNS]
)
def test_hits_change_nothing(ranks: int, engine: str, tmp_path: Path, text: Path, soak: bool) -> None:
    few, many, first = RUNS[ranks, engine]
    count = many if soak else few
    numbers = [signal.SIGSTOP if index % 4 == 3 else signal.SIGKILL for index in range(count)]
    phases = [PHASES[(index + first) % len(PHASES)] for index in range(count)]
    for line in disturb(tmp_path, text, ranks, engine, list(zip(phases, numbers, strict=True)), ranks):
        print(line)
