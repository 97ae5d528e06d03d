"""Ranks that die, freeze, fail or refuse in the middle of a job: the others say which, and what it was doing."""

import dataclasses
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch import board as boards
from launch.board import LOST, REFUSED, Board, Word
from launch.processes import World, limit_waits
from launch.run import prepare, start, train
from ringattn.testing import run_processes
from tests.support.pretrain import tiny

TIMEOUT = 2.0


class Never:
    number = 0


def world_with_board(rank: int, world_size: int) -> World:
    boards.BEAT, boards.GRACE = 0.1, 1.0
    store = dist.PrefixStore("board", dist.distributed_c10d._get_default_store())
    board = Board(store, rank, world_size, hosts=False)
    board.timeout = TIMEOUT
    limit_waits(TIMEOUT)
    return World(rank, world_size, torch.device("cpu"), dist.group.WORLD, board=board)


def fall(rank: int, world_size: int, config: Any, run: Path, phase: str, how: str) -> tuple[Word | None, float, str]:
    """What a survivor says once rank 1 has met its end at a phase, how many seconds later, and the error it got."""
    world = world_with_board(rank, world_size)
    assert world.board is not None
    at = world.board.at

    def watched(text: str) -> None:
        at(text)
        if rank == 1 and re.search(phase, text):
            (run.parent / "when").write_text(f"{time.time_ns()} {os.getpid()}")
            if how == "raises":
                raise MemoryError("no memory is left")
            if how == "refuses":
                raise ValueError("the data is gone; restore it")
            os.kill(os.getpid(), getattr(signal, how))

    world.board.at = watched  # type: ignore[method-assign]
    try:
        job = prepare(config, run, go_on=False, overwrite=False)
        train(job, start(job, world), Never())  # type: ignore[arg-type]
    except (MemoryError, ValueError) as error:
        kind = REFUSED if isinstance(error, ValueError) else "failed"
        world.board.end(kind, 2, f"{error}")
        dist.destroy_process_group()  # as the end of the process would
        return None, 0.0, ""
    except Exception as error:
        word = world.board.explain(error)
        now = time.time_ns()
        world.board.end(LOST, 5, word.text if word else "")
        when, victim = map(int, (run.parent / "when").read_text().split())
        if how == "SIGSTOP" and rank == 0:
            time.sleep(1.0)  # others are to see it frozen
            os.kill(victim, signal.SIGKILL)
        return word, (now - when) / 1e9, str(error)
    raise AssertionError("nothing happened")


CASES = [
    (3, "step 3, backward", "SIGKILL"),
    (3, "step 2, the sum of losses", "SIGSTOP"),
    (2, "step 2, reading data", "refuses"),
]
MORE = [
    (2, "comparing settings", "SIGKILL"),
    (2, "placing the model", "SIGKILL"),
    (3, "step 1, reading data", "SIGKILL"),
    (2, "step 2, forward", "SIGKILL"),
    (2, "step 3, the gradient's norm", "SIGKILL"),
    (3, "saving after step 4", "SIGKILL"),
    (2, "saving after step 2", "SIGSTOP"),
    (3, "step 3, forward", "SIGSTOP"),
    (2, "step 3, backward", "SIGSTOP"),
    (2, "the summary", "SIGSTOP"),
    (3, "step 3, the gradient's norm and the optimizer", "raises"),
    (3, "saving after step 4", "refuses"),
]


@pytest.mark.parametrize(
    ("ranks", "phase", "how"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_a_rank_that_falls_is_named_with_what_it_did(
    ranks: int, phase: str, how: str, text: Path, tmp_path: Path
) -> None:
    config = tiny(text, save_every=2, timeout=TIMEOUT)
    dead = [1] if how.startswith("SIG") else []
    found = collect(ranks, config, tmp_path / "run", phase, how, dead)
    for word, seconds, error in found:
        assert word is not None, error
        assert word.kind == (REFUSED if how == "refuses" else LOST), word
        if dead:
            assert re.search(rf"rank 1 is dead or frozen: .* the last was at .{phase}", word.text), word
        elif how == "refuses":
            assert word == Word(REFUSED, 2, "rank 1: the data is gone; restore it")
        else:
            assert word.text == "rank 1 failed: no memory is left"
        assert seconds < (1 if how == "refuses" else TIMEOUT + 3), seconds


def collect(ranks: int, config: Any, run: Path, phase: str, how: str, dead: list[int]) -> list[Any]:
    results = run_processes(fall, ranks, config, run, phase, how, casualties=dead, timeout=30)
    return [result for rank, result in enumerate(results) if rank != 1]


def late(rank: int, world_size: int) -> str:
    """What is said of a rank that lives and does not come."""
    world = world_with_board(rank, world_size)
    assert world.board is not None
    world.at("elsewhere" if rank else "here")
    if rank:
        time.sleep(TIMEOUT + 1.2)
        return ""
    try:
        world.tell("I am here")
    except boards.LostRank as error:
        return str(error)
    return "nothing"


def test_a_rank_that_lives_and_does_not_come_is_named_too() -> None:
    said, _ = run_processes(late, 2)
    assert said == "rank 1 is at 'elsewhere', and did not come to 'here' within 2.0 s"


def everyone_tells(rank: int, world_size: int) -> list[Any]:
    world = world_with_board(rank, world_size)
    found: list[Any] = [world.tell({"rank": rank, "turn": turn}) for turn in range(5)]
    begin = time.perf_counter()
    for turn in range(200):
        world.at(f"turn {turn}")
    found.append((time.perf_counter() - begin) / 200)
    world.close()
    return found


def test_everyone_hears_what_everyone_tells_and_saying_costs_microseconds() -> None:
    for *told, seconds in run_processes(everyone_tells, 3):
        assert told == [[{"rank": rank, "turn": turn} for rank in range(3)] for turn in range(5)]
        assert seconds < 1e-3


def groups_of(rank: int, world_size: int, config: Any, run: Path) -> list[float]:
    """The deadlines of all groups that a job makes."""
    world = world_with_board(rank, world_size)
    trainer = start(prepare(config, run, go_on=False, overwrite=False), world)
    assert trainer.cp.options.timeout == TIMEOUT
    world_of_groups = dist.distributed_c10d._world.pg_map
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in world_of_groups]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_every_group_has_the_deadline_of_the_config(engine: str, text: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny(text, timeout=TIMEOUT), engine=engine, data_parallel=2)
    for found in run_processes(groups_of, 4, config, tmp_path / "run"):
        assert len(found) >= 3 and set(found) == {TIMEOUT}
